//! KeyDiff: keys that point away from the mean direction are the distinct ones.
//!
//! ```text
//! a        = mean over j of k[j] / |k[j]|
//! score[j] = -cos(k[j], a)
//! ```
//!
//! Needs no queries, so it also works while a prompt is read in pieces and while decoding.

use super::{Entry, Score, per_head};
use crate::error::Result;
use crate::policy::{HeadInput, HeadScores, LayerInput};
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "keydiff",
    summary: "keeps keys that differ most from the mean direction",
    paper: "KeyDiff, arXiv 2504.15364",
    params: &[],
    needs: Needs::KEYS,
    examples: &["keydiff | keep(0.5)", "every(64) | keydiff | keep_tokens(256)"],
    create: |_| Ok(Box::new(KeyDiff)),
};

/// Norms below this count as this, as in the cosine similarity of PyTorch.
const SMALLEST: f32 = 1e-8;

#[derive(Debug)]
struct KeyDiff;

impl Score for KeyDiff {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        Ok(per_head(layer, |head| score_head(head, layer.head_dim)))
    }
}

fn score_head(head: &HeadInput<'_>, dim: usize) -> HeadScores {
    let kernels = simd::active();
    let dot = |a: &[f32], b: &[f32]| kernels.dot_f32(a, b);
    let keys = || head.keys.chunks_exact(dim);
    let inverse: Vec<f32> = keys().map(|key| 1.0 / dot(key, key).sqrt().max(SMALLEST)).collect();
    let mut anchor = vec![0.0f32; dim];
    keys().zip(&inverse).for_each(|(key, inverse)| kernels.axpy_f32(*inverse, key, &mut anchor));
    let length = dot(&anchor, &anchor).sqrt().max(SMALLEST);
    let scores = keys().zip(&inverse).map(|(key, inverse)| -dot(key, &anchor) * inverse / length);
    HeadScores::open(scores.collect())
}
