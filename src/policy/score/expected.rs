//! ExpectedAttention: the attention that the next queries will pay, in closed form.
//!
//! ```text
//! mu, C      = mean and covariance of the queries of head h before RoPE
//! R          = mean rotation of the positions T .. T + future
//! z[h, j]    = (R mu) . k[j] / sqrt(d) + k[j] . (R C R') k[j] / (2 d)
//! a[h, j]    = softmax over j of z[h, j], without sinks
//! score[j]   = (mean over the group's heads of a[h, j] + eps) * |v[j]|
//! ```
//!
//! A normal distribution of queries makes the expected power of a logit log-normal, hence the second
//! term. Sinks are protected. The queries of the first positions are not part of the statistics.

use super::rotation::MeanRotation;
use super::{Entry, Score};
use crate::error::{Result, ensure};
use crate::policy::{HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "expected",
    summary: "keeps what queries of the prompt's distribution would attend to next",
    paper: "ExpectedAttention, arXiv 2510.00636",
    params: &[
        Param {
            name: "future",
            help: "next positions to expect queries at",
            domain: Domain::Int { default: 512, min: 1, max: 1 << 20 },
        },
        Param {
            name: "sink",
            help: "leading tokens that stay",
            domain: Domain::Int { default: 4, min: 0, max: 1 << 20 },
        },
        Param {
            name: "cov",
            help: "1: with the covariance of queries, 0: with their mean alone",
            domain: Domain::Int { default: 1, min: 0, max: 1 },
        },
        Param {
            name: "vnorm",
            help: "1: times the norm of the value, 0: the probability alone",
            domain: Domain::Int { default: 1, min: 0, max: 1 },
        },
        Param {
            name: "eps",
            help: "added to the probability",
            domain: Domain::Real { default: 0.0, min: 0.0, max: 1.0 },
        },
    ],
    needs: Needs::KEYS.union(Needs::VALUES).union(Needs::QUERY_STATISTICS).union(Needs::ROPE),
    examples: &[
        "expected | keep(0.5)",
        "expected(future=512, sink=4, eps=1e-2) | adakv(0.2) | keep(0.5)",
        "expected(cov=0, vnorm=0) | keep_tokens(256)",
    ],
    create: |args| {
        Ok(Box::new(Expected {
            future: args.count("future"),
            sink: args.count("sink"),
            has_covariance: args.int("cov") == 1,
            has_value_norm: args.int("vnorm") == 1,
            epsilon: args.real("eps") as f32,
        }))
    },
};

#[derive(Debug)]
struct Expected {
    future: usize,
    sink: usize,
    has_covariance: bool,
    has_value_norm: bool,
    epsilon: f32,
}

impl Score for Expected {
    fn needs(&self) -> Needs {
        let values = if self.has_value_norm { Needs::VALUES } else { Needs::NONE };
        Needs::KEYS.union(Needs::QUERY_STATISTICS).union(Needs::ROPE).union(values)
    }

    fn keeps_whole(&self) -> usize {
        self.sink
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let rotation = MeanRotation::of_next("expected", layer, self.future)?;
        layer.heads.iter().map(|head| self.score_head(layer, head, &rotation)).collect()
    }
}

impl Expected {
    fn score_head(
        &self,
        layer: &LayerInput<'_>,
        head: &HeadInput<'_>,
        rotation: &MeanRotation<'_>,
    ) -> Result<HeadScores> {
        let (len, dim) = (head.positions.len(), layer.head_dim);
        let sink = self.sink.min(len);
        let protected = (0..len).map(|i| i < sink).collect();
        let mut scores = vec![0.0f32; len];
        if len == sink {
            return Ok(HeadScores { scores, protected });
        }
        ensure!(
            head.query_mean.len() == layer.group * dim
                && head.query_covariance.len() == layer.group * dim * dim,
            InvalidState,
            "expected has observed no queries"
        );
        let kernels = simd::active();
        let mut powers = vec![0.0f32; len - sink];
        for g in 0..layer.group {
            let mut mean = head.query_mean[g * dim..][..dim].to_vec();
            let mut covariance = head.query_covariance[g * dim * dim..][..dim * dim].to_vec();
            rotation.apply(&mut mean);
            rotation.apply_both_sides(&mut covariance, dim);
            self.logits(&head.keys[sink * dim..], &mean, &covariance, &mut powers);
            let most = kernels.max(&powers);
            let sum = kernels.exp_sub(&mut powers, most);
            let weight = 1.0 / (sum * layer.group as f32);
            kernels.axpy_f32(weight, &powers, &mut scores[sink..]);
        }
        for (i, score) in scores.iter_mut().enumerate().skip(sink) {
            *score += self.epsilon;
            if self.has_value_norm {
                let value = &head.values[i * layer.value_dim..][..layer.value_dim];
                *score *= kernels.dot_f32(value, value).sqrt();
            }
        }
        Ok(HeadScores { scores, protected })
    }

    /// `out[j] = mean . k[j] / sqrt(d) + k[j] . covariance k[j] / (2 d)`.
    fn logits(&self, keys: &[f32], mean: &[f32], covariance: &[f32], out: &mut [f32]) {
        let kernels = simd::active();
        let dim = mean.len();
        let mut turned = vec![0.0f32; dim];
        for (key, out) in keys.chunks_exact(dim).zip(out) {
            *out = kernels.dot_f32(mean, key) / (dim as f32).sqrt();
            if self.has_covariance {
                for (row, turned) in covariance.chunks_exact(dim).zip(&mut turned) {
                    *turned = kernels.dot_f32(row, key);
                }
                *out += kernels.dot_f32(&turned, key) / (2 * dim) as f32;
            }
        }
    }
}
