//! LagKV: tokens that stand out against the tokens that follow them.
//!
//! ```text
//! partitions of `lag` tokens after `sink` ones; min, max per channel of the next partition:
//! u[j]     = softmax over the partition of std over channels of (x[j] - min) / (max - min)
//! score[j] = (u of keys + u of values) / 2, as a rank in its partition / lag unless `cross`
//! ```
//!
//! Sinks, the last partition and what does not fill one are protected. A prompt shorter than
//! `sink + 2 lag` is scored by recency. The standard deviation is the unbiased one. A channel in
//! which the next partition is constant says nothing and counts as 0. Ranks tie across partitions.

use super::{Entry, Score, per_head};
use crate::error::Result;
use crate::policy::{HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "lagkv",
    summary: "keeps tokens that stand out against the following ones",
    paper: "LagKV, arXiv 2504.04704",
    params: &[
        Param {
            name: "sink",
            help: "leading tokens that stay",
            domain: Domain::Int { default: 4, min: 0, max: 1 << 20 },
        },
        Param {
            name: "lag",
            help: "tokens of a partition",
            domain: Domain::Int { default: 128, min: 2, max: 1 << 20 },
        },
        Param {
            name: "cross",
            help: "yes: scores of different partitions compete as they are; no: by rank",
            domain: Domain::Choice(&["no", "yes"]),
        },
    ],
    needs: Needs::KEYS.union(Needs::VALUES),
    examples: &["lagkv | keep(0.5)", "lagkv(lag=64, cross=yes) | keep(0.25)"],
    create: |args| {
        Ok(Box::new(LagKv {
            sink: args.count("sink"),
            lag: args.count("lag"),
            cross: args.text("cross") == "yes",
        }))
    },
};

#[derive(Debug)]
struct LagKv {
    sink: usize,
    lag: usize,
    cross: bool,
}

impl Score for LagKv {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        Ok(per_head(layer, |head| self.score_head(head, layer.head_dim, layer.value_dim)))
    }
}

impl LagKv {
    fn score_head(&self, head: &HeadInput<'_>, key_dim: usize, value_dim: usize) -> HeadScores {
        let (len, lag) = (head.positions.len(), self.lag);
        let partitions = len.saturating_sub(self.sink) / lag;
        if partitions < 2 {
            return HeadScores {
                scores: (0..len).map(|i| i as f32).collect(),
                protected: (0..len).map(|i| i < self.sink).collect(),
            };
        }
        let scored = self.sink..self.sink + (partitions - 1) * lag;
        let mut scores = vec![1.0f32; len];
        for (p, scores) in scores[scored.clone()].chunks_exact_mut(lag).enumerate() {
            let first = self.sink + p * lag;
            let parts = |rows: &[f32], dim: usize| {
                let rows = &rows[first * dim..][..2 * lag * dim];
                spread(&rows[..lag * dim], &rows[lag * dim..], dim)
            };
            let (keys, values) = (parts(head.keys, key_dim), parts(head.values, value_dim));
            for (score, (k, v)) in scores.iter_mut().zip(keys.iter().zip(&values)) {
                *score = (k + v) / 2.0;
            }
            if !self.cross {
                rank(scores);
            }
        }
        HeadScores { protected: (0..len).map(|i| !scored.contains(&i)).collect(), scores }
    }
}

/// The softmax over the rows of their standard deviations, relative to the range of `next`.
fn spread(rows: &[f32], next: &[f32], dim: usize) -> Vec<f32> {
    let (mut min, mut max) = (vec![f32::INFINITY; dim], vec![f32::NEG_INFINITY; dim]);
    for row in next.chunks_exact(dim) {
        min.iter_mut().zip(row).for_each(|(min, x)| *min = min.min(*x));
        max.iter_mut().zip(row).for_each(|(max, x)| *max = max.max(*x));
    }
    let mut relative = vec![0.0f32; dim];
    let deviations = rows.chunks_exact(dim).map(|row| {
        for (c, out) in relative.iter_mut().enumerate() {
            let range = max[c] - min[c];
            *out = if range > 0.0 { (row[c] - min[c]) / range } else { 0.0 };
        }
        let mean = relative.iter().sum::<f32>() / dim as f32;
        let squares: f32 = relative.iter().map(|x| (x - mean) * (x - mean)).sum();
        (squares / (dim.max(2) - 1) as f32).sqrt()
    });
    let mut powers: Vec<f32> = deviations.collect();
    let most = powers.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    powers.iter_mut().for_each(|x| *x = (*x - most).exp());
    let total: f32 = powers.iter().sum();
    powers.iter_mut().for_each(|x| *x /= total);
    powers
}

/// Replaces scores by their rank, from 0, over their number.
fn rank(scores: &mut [f32]) {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
    let len = scores.len() as f32;
    for (rank, at) in order.into_iter().enumerate() {
        scores[at] = rank as f32 / len;
    }
}
