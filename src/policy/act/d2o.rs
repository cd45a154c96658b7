//! D2O: evicted tokens that are like a survivor go into it, the others are dropped.
//!
//! ```text
//! s(e), c(e) = cosine of k[e] with the nearest surviving key, and that survivor
//! merged     = e with s(e) of at least the mean of all s
//! v'[c]      = (e^1 v[c] + sum of e^s(e) v[e]) / (e^1 + sum of e^s(e))        over its merged
//! ```
//!
//! The authors move the threshold from step to step and merge keys as well; here each run has its own
//! threshold, as in their first step, and keys stay, because keys of different positions have different
//! phases.

use super::merge::nearest_survivors;
use super::{Act, Entry, Evicted};
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "d2o",
    summary: "evicted values that are more like a survivor than most go into it",
    paper: "D2O, arXiv 2406.13035",
    params: &[],
    needs: Needs::KEYS.union(Needs::VALUES),
    examples: &["h2o(recent=32) | keep(0.5) | d2o"],
    create: |_| Ok(Box::new(D2o)),
};

#[derive(Debug)]
struct D2o;

impl Act for D2o {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn values(&self, evicted: &Evicted<'_>) -> Vec<f32> {
        let kernels = simd::active();
        let dim = evicted.layer.value_dim;
        let (kept, gone) = evicted.split();
        let nearest = nearest_survivors(evicted, &kept, &gone);
        let mean = nearest.iter().map(|(s, _)| s).sum::<f32>() / nearest.len() as f32;
        let own = std::f32::consts::E;
        let mut weights = vec![own; kept.len()];
        let mut values = Vec::with_capacity(kept.len() * dim);
        for i in &kept {
            values.extend(evicted.value(*i).iter().map(|x| own * x));
        }
        for (i, (likeness, at)) in gone.iter().zip(nearest) {
            if likeness >= mean {
                let weight = likeness.exp();
                let target = &mut values[at * dim..][..dim];
                kernels.axpy_f32(weight, evicted.value(*i), target);
                weights[at] += weight;
            }
        }
        for (row, weight) in values.chunks_exact_mut(dim).zip(weights) {
            kernels.scale(row, 1.0 / weight);
        }
        values
    }
}
