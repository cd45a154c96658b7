//! CaM: an evicted token's value is spread over the survivors right behind it.
//!
//! ```text
//! window(e) = the next `m` survivors behind e
//! p(e)      = clamp(a[e] / mean of a over the window, 0, 1),   a the attention received so far
//! v'[c]    += p(e) v[e] / tokens of the window                 for each c of the window
//! ```
//!
//! The authors draw whether a token is merged, with probability `p`; here `p` is its weight, which is
//! the mean of that. Of the evicted, the `candidates` with the best scores are merged, later ones
//! first if equal.

use super::{Act, Entry, Evicted};
use crate::registry::{Domain, Param};
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "cam",
    summary: "evicted values are spread over the survivors behind them, by attention",
    paper: "CaM, ICML 2024, openreview LCTmppB165",
    params: &[
        Param {
            name: "m",
            help: "survivors that share an evicted value",
            domain: Domain::Int { default: 32, min: 1, max: 1 << 20 },
        },
        Param {
            name: "candidates",
            help: "most evicted tokens that are merged; 0: all",
            domain: Domain::Int { default: 0, min: 0, max: 1 << 30 },
        },
    ],
    needs: Needs::VALUES.union(Needs::COLUMN_SUM),
    examples: &["h2o(recent=32) | keep(0.5) | cam(m=32)"],
    create: |args| {
        let candidates = match args.count("candidates") {
            0 => usize::MAX,
            candidates => candidates,
        };
        Ok(Box::new(Cam { window: args.count("m"), candidates }))
    },
};

#[derive(Debug)]
struct Cam {
    window: usize,
    candidates: usize,
}

impl Act for Cam {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn values(&self, evicted: &Evicted<'_>) -> Vec<f32> {
        let kernels = simd::active();
        let head = &evicted.layer.heads[evicted.head];
        let dim = evicted.layer.value_dim;
        let (kept, mut gone) = evicted.split();
        let scores = &evicted.scores.scores;
        gone.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(b.cmp(a)));
        gone.truncate(self.candidates);
        let received = |i: usize| head.column_sums.get(i).copied().unwrap_or(0.0);
        let mut values: Vec<f32> = kept.iter().flat_map(|i| evicted.value(*i)).copied().collect();
        for i in gone {
            let first = kept.partition_point(|survivor| *survivor < i);
            let window = first..(first + self.window).min(kept.len());
            if window.is_empty() {
                continue;
            }
            let sum: f32 = kept[window.clone()].iter().map(|survivor| received(*survivor)).sum();
            let part = received(i) * window.len() as f32 / sum;
            let part = if part.is_nan() { 0.0 } else { part.clamp(0.0, 1.0) };
            let weight = part / window.len() as f32;
            for target in values[window.start * dim..window.end * dim].chunks_exact_mut(dim) {
                kernels.axpy_f32(weight, evicted.value(i), target);
            }
        }
        values
    }
}
