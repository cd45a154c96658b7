//! Knorm: keys of a small norm draw attention.
//!
//! ```text
//! score[j] = -|k[j]|
//! ```
//!
//! Before or after RoPE is the same, because rotation keeps norms. Sums are in f32: with 16-bit sums
//! most scores of a head tie.

use super::{Entry, Score, per_head};
use crate::error::Result;
use crate::policy::{HeadScores, LayerInput};
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "knorm",
    summary: "keeps the keys of the smallest norm",
    paper: "L2 norm, arXiv 2406.11430",
    params: &[],
    needs: Needs::KEYS,
    examples: &["knorm | keep(0.5)", "every(64) | knorm | keep_tokens(256)"],
    create: |_| Ok(Box::new(Knorm)),
};

#[derive(Debug)]
struct Knorm;

impl Score for Knorm {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let kernels = simd::active();
        Ok(per_head(layer, |head| {
            let norm = |key: &[f32]| -kernels.dot_f32(key, key).sqrt();
            HeadScores::open(head.keys.chunks_exact(layer.head_dim).map(norm).collect())
        }))
    }
}
