//! KVMerger: runs of tokens with like keys go into one of them.
//!
//! ```text
//! cluster = neighbouring tokens, each with a key whose cosine with that of the one before is at least
//!           `theta`
//! p       = the survivor of the cluster with the best score; a cluster without one is dropped
//! sigma   = mean over the evicted e of the cluster of |k[e] - k[p]|, divided by the root of 2
//! w(e)    = exp(-|k[e] - k[p]|^2 / (2 sigma^2))
//! v'[p]   = (v[p] + sum of w(e) v[e]) / (1 + sum of w(e))
//! ```
//!
//! The authors cluster first and keep one token of each cluster; here the score says what stays. They
//! merge keys as well; here keys stay, because keys of different positions have different phases.

use super::{Act, Entry, Evicted};
use crate::order::ordered;
use crate::registry::{Domain, Param};
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "kvmerger",
    summary: "evicted values go into the best survivor of a run of like keys",
    paper: "KVMerger, arXiv 2407.08454",
    params: &[Param {
        name: "theta",
        help: "least cosine of neighbouring keys",
        domain: Domain::Real { default: 0.75, min: -1.0, max: 1.0 },
    }],
    needs: Needs::KEYS.union(Needs::VALUES),
    examples: &["snapkv | keep(0.5) | kvmerger(theta=0.5)"],
    create: |args| Ok(Box::new(KvMerger { theta: args.real("theta") as f32 })),
};

#[derive(Debug)]
struct KvMerger {
    theta: f32,
}

impl Act for KvMerger {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn values(&self, evicted: &Evicted<'_>) -> Vec<f32> {
        let head = &evicted.layer.heads[evicted.head];
        let (kept, _) = evicted.split();
        let mut values: Vec<f32> = kept.iter().flat_map(|i| evicted.value(*i)).copied().collect();
        let mut start = 0;
        for i in 1..=head.positions.len() {
            if i == head.positions.len() || self.breaks(evicted, i) {
                merge(evicted, start..i, &kept, &mut values);
                start = i;
            }
        }
        values
    }
}

impl KvMerger {
    /// Whether token `i` begins a cluster.
    fn breaks(&self, evicted: &Evicted<'_>, i: usize) -> bool {
        let dot = |a: &[f32], b: &[f32]| simd::active().dot_f32(a, b);
        let (a, b) = (evicted.key(i - 1), evicted.key(i));
        // A key without a direction is like no other.
        let cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
        cosine.is_nan() || cosine < self.theta
    }
}

/// Merges the evicted tokens of a cluster into its best survivor.
fn merge(
    evicted: &Evicted<'_>,
    cluster: std::ops::Range<usize>,
    kept: &[usize],
    values: &mut [f32],
) {
    let kernels = simd::active();
    let dim = evicted.layer.value_dim;
    let survivors =
        kept.partition_point(|i| *i < cluster.start)..kept.partition_point(|i| *i < cluster.end);
    if survivors.is_empty() || survivors.len() == cluster.len() {
        return;
    }
    let score = |at: &usize| ordered(evicted.scores.scores[kept[*at]]);
    // The first of equals.
    let Some(pivot) = survivors.clone().rev().max_by_key(score) else { return };
    let is_gone = |i: &usize| kept[survivors.clone()].binary_search(i).is_err();
    let distance = |i: &usize| -> f32 {
        let (a, b) = (evicted.key(*i), evicted.key(kept[pivot]));
        a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt()
    };
    let gone: Vec<(usize, f32)> = cluster.filter(is_gone).map(|i| (i, distance(&i))).collect();
    let sum: f32 = gone.iter().map(|(_, distance)| distance).sum();
    let sigma = sum / gone.len() as f32 / std::f32::consts::SQRT_2;
    let target = &mut values[pivot * dim..][..dim];
    let mut total = 1.0;
    for (i, distance) in gone {
        // Keys that do not differ at all count in full.
        let weight = if sigma > 0.0 { (-(distance / sigma).powi(2) / 2.0).exp() } else { 1.0 };
        kernels.axpy_f32(weight, evicted.value(i), target);
        total += weight;
    }
    kernels.scale(target, 1.0 / total);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{HeadInput, HeadScores, LayerInput};
    use crate::shape::KeepSet;

    #[test]
    fn clusters_go_into_their_best_survivor() {
        // Two clusters, 0 to 3 and 4 to 5, and a token of its own.
        let keys = [1.0, 0.0, 1.0, 0.1, 1.0, 0.2, 1.0, 0.4, 0.0, 1.0, 0.0, 2.0, -1.0, 0.0f32];
        let values =
            [1.0, 10.0, 2.0, 20.0, 3.0, 30.0, 4.0, 40.0, 5.0, 50.0, 6.0, 60.0, 7.0, 70.0f32];
        let positions: Vec<i32> = (0..7).collect();
        let head = HeadInput {
            positions: &positions,
            keys: &keys,
            values: &values,
            ..HeadInput::default()
        };
        let layer =
            LayerInput { head_dim: 2, value_dim: 2, heads: vec![head], ..LayerInput::default() };
        let scores = HeadScores::open(vec![0.5, 0.9, 0.1, 0.2, 0.0, 0.0, 0.7]);
        let kept = KeepSet::from_indices([0, 1, 6]);
        let evicted = Evicted { layer: &layer, head: 0, scores: &scores, kept: &kept };
        let found = KvMerger { theta: 0.9 }.values(&evicted);
        // 2 and 3 go into 1; 4 and 5 have no survivor.
        let (d2, d3) = (0.1f64, 0.3f64);
        let sigma = (d2 + d3) / 2.0 / 2.0f64.sqrt();
        let weight = |d: f64| (-d * d / (2.0 * sigma * sigma)).exp();
        let (w2, w3) = (weight(d2), weight(d3));
        let merged = |v1: f64, v2: f64, v3: f64| (v1 + w2 * v2 + w3 * v3) / (1.0 + w2 + w3);
        let expected = [1.0, 10.0, merged(2.0, 3.0, 4.0), merged(20.0, 30.0, 40.0), 7.0, 70.0];
        for (found, expected) in found.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-4 * expected, "{found} {expected}");
        }
        // A threshold nobody reaches merges nothing.
        let alone = KvMerger { theta: 1.0 }.values(&evicted);
        assert_eq!(alone[..4], [1.0, 10.0, 2.0, 20.0]);
    }
}
