//! Merging: an evicted token's value goes into the survivor whose key is most like its own.
//!
//! ```text
//! c(e)  = survivor with the largest cos(k[e], k[c]),   if that is at least `threshold`
//! w(e)  = max(cos, 0) * |v[e]| / (|v[e]| + |v[c]| + 1e-6)
//! v'[c] = (v[c] + sum of w(e) v[e]) / (1 + sum of w(e))
//! ```
//!
//! Only the `fraction` of the evicted that is most like a survivor is merged. The time is that of a
//! product of all evicted with all surviving keys.

use super::{Act, Entry, Evicted};
use crate::registry::{Domain, Param};
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "merge",
    summary: "evicted values are blended into the survivor with the nearest key",
    paper: "MergingPress of kvpress; Token Merging, arXiv 2210.09461; D2O, arXiv 2406.13035",
    params: &[
        Param {
            name: "threshold",
            help: "least cosine of keys",
            domain: Domain::Real { default: 0.0, min: -1.0, max: 2.0 },
        },
        Param {
            name: "fraction",
            help: "fraction of the evicted that is merged",
            domain: Domain::Real { default: 1.0, min: 0.0, max: 1.0 },
        },
    ],
    needs: Needs::KEYS.union(Needs::VALUES),
    examples: &["snapkv | keep(0.5) | merge(threshold=0.5)"],
    create: |args| {
        Ok(Box::new(Merge {
            threshold: args.real("threshold") as f32,
            fraction: args.real("fraction"),
        }))
    },
};

/// Keeps quotients finite.
const EPSILON: f32 = 1e-6;

#[derive(Debug)]
struct Merge {
    threshold: f32,
    fraction: f64,
}

impl Act for Merge {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn values(&self, evicted: &Evicted<'_>) -> Vec<f32> {
        let kernels = simd::active();
        let dim = evicted.layer.value_dim;
        let (kept, gone) = evicted.split();
        let mut pairs: Vec<(f32, usize, usize)> = gone
            .iter()
            .zip(nearest_survivors(evicted, &kept, &gone))
            .map(|(i, nearest)| (nearest, *i))
            .filter(|((cosine, _), _)| *cosine >= self.threshold)
            .map(|((cosine, at), i)| (cosine, at, i))
            .collect();
        // As a quantile: of n evicted, those above the (1 - fraction) one.
        let skipped = ((1.0 - self.fraction) * gone.len().saturating_sub(1) as f64).ceil() as usize;
        pairs.sort_by(|a, b| b.0.total_cmp(&a.0));
        pairs.truncate(if self.fraction == 0.0 { 0 } else { gone.len() - skipped });

        let norm = |i: usize| {
            let value = evicted.value(i);
            kernels.dot_f32(value, value).sqrt()
        };
        let mut values: Vec<f32> = kept.iter().flat_map(|i| evicted.value(*i)).copied().collect();
        let mut weights = vec![0.0f32; kept.len()];
        for (cosine, at, i) in pairs {
            let norms = (norm(i), norm(kept[at]));
            let weight = cosine.max(0.0) * norms.0 / (norms.0 + norms.1 + EPSILON);
            let target = &mut values[at * dim..][..dim];
            kernels.axpy_f32(weight, evicted.value(i), target);
            weights[at] += weight;
        }
        for (row, weight) in values.chunks_exact_mut(dim).zip(weights) {
            kernels.scale(row, 1.0 / (1.0 + weight));
        }
        values
    }
}

/// For each evicted token the largest cosine of its key with a surviving one, and which that is.
pub(super) fn nearest_survivors(
    evicted: &Evicted<'_>,
    kept: &[usize],
    gone: &[usize],
) -> Vec<(f32, usize)> {
    let kernels = simd::active();
    let unit = |i: &usize| {
        let key = evicted.key(*i);
        let scale = 1.0 / kernels.dot_f32(key, key).sqrt().max(EPSILON);
        key.iter().map(|x| x * scale).collect::<Vec<f32>>()
    };
    let units: Vec<Vec<f32>> = kept.iter().map(unit).collect();
    let nearest = |i: &usize| {
        let key = unit(i);
        let mut best = (f32::NEG_INFINITY, 0);
        for (at, unit) in units.iter().enumerate() {
            let cosine = kernels.dot_f32(&key, unit);
            if cosine > best.0 {
                best = (cosine, at);
            }
        }
        best
    };
    gone.iter().map(nearest).collect()
}
