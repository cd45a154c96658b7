//! CapKV: tokens whose values span what the next queries are going to read.
//!
//! ```text
//! a[h]     = mean rotation of the next positions times the mean query of head h before RoPE
//! w[h, j]  = exp(tau (cos(a[h], k[j]) - max over j))
//! A[h]     = I + sum over j of (w[h, j] + 1e-6) v[j] v[j]'
//! score[j] = mean over the group's heads h of w[h, j] v[j]' A[h]^-1 v[j]
//! ```
//!
//! Sinks are protected and take no part.

use super::linalg::leverage;
use super::rotation::MeanRotation;
use super::{Entry, Score};
use crate::error::{Result, ensure};
use crate::policy::{HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "capkv",
    summary: "keeps values that span what queries of the prompt's mean would read",
    paper: "CapKV, arXiv 2604.25975",
    params: &[
        Param {
            name: "tau",
            help: "how sharply queries choose",
            domain: Domain::Real { default: 5.0, min: 0.0, max: 1000.0 },
        },
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
    ],
    needs: Needs::KEYS.union(Needs::VALUES).union(Needs::QUERY_STATISTICS).union(Needs::ROPE),
    examples: &["capkv | keep(0.5)"],
    create: |args| {
        Ok(Box::new(CapKv {
            tau: args.real("tau") as f32,
            future: args.count("future"),
            sink: args.count("sink"),
        }))
    },
};

/// Added to weights, so that no token is lost to rounding.
const EPSILON: f32 = 1e-6;
/// Norms below this count as this, as in PyTorch's normalisation.
const SMALLEST: f32 = 1e-12;

#[derive(Debug)]
struct CapKv {
    tau: f32,
    future: usize,
    sink: usize,
}

impl Score for CapKv {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn keeps_whole(&self) -> usize {
        self.sink
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let rotation = MeanRotation::of_next("capkv", layer, self.future)?;
        layer.heads.iter().map(|head| self.score_head(layer, head, &rotation)).collect()
    }
}

impl CapKv {
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
            head.query_mean.len() == layer.group * dim,
            InvalidState,
            "capkv has observed no queries"
        );
        let (keys, values) = (&head.keys[sink * dim..], &head.values[sink * layer.value_dim..]);
        for mean in head.query_mean.chunks_exact(dim) {
            let mut anchor = mean.to_vec();
            rotation.apply(&mut anchor);
            let weights = self.weights(keys, &anchor);
            let shares: Vec<f32> = weights.iter().map(|weight| weight + EPSILON).collect();
            let leverage = leverage(values, layer.value_dim, &shares, 1.0);
            let parts = weights.iter().zip(leverage);
            for (score, (weight, leverage)) in scores[sink..].iter_mut().zip(parts) {
                *score += weight * leverage / layer.group as f32;
            }
        }
        Ok(HeadScores { scores, protected })
    }

    /// How much the anchor chooses each key, 1 for the best.
    fn weights(&self, keys: &[f32], anchor: &[f32]) -> Vec<f32> {
        let kernels = simd::active();
        let dot = |a: &[f32], b: &[f32]| kernels.dot_f32(a, b);
        let length = dot(anchor, anchor).sqrt().max(SMALLEST);
        let cosine = |key: &[f32]| {
            (dot(key, anchor) / (dot(key, key).sqrt().max(SMALLEST) * length)).clamp(-1.0, 1.0)
        };
        let cosines: Vec<f32> = keys.chunks_exact(anchor.len()).map(cosine).collect();
        let most = kernels.max(&cosines);
        cosines.iter().map(|cosine| (self.tau * (cosine - most)).exp()).collect()
    }
}
