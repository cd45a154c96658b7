//! QFilter: keys against the main direction of queries, measured offline.
//!
//! ```text
//! score[j] = - f . k[j],   f the filter of the KV head
//! ```
//!
//! File: `layers.L.filter` `[num_kv_heads, head_dim]`, of keys after RoPE, signed as the authors
//! publish them: keys against the filter stay.

use super::{Entry, Score};
use crate::error::Result;
use crate::policy::weights::Weights;
use crate::policy::{HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "qfilter",
    summary: "keeps keys that the main direction of queries points to",
    paper: "Q-Filters, arXiv 2503.02812",
    params: &[Param {
        name: "file",
        help: "a safetensors file with the filters",
        domain: Domain::File,
    }],
    needs: Needs::KEYS,
    examples: &["qfilter(file=\"qfilter.safetensors\") | keep(0.5)"],
    create: |args| Ok(Box::new(QFilter { file: Weights::required(args, "file")? })),
};

#[derive(Debug)]
struct QFilter {
    file: Weights,
}

impl Score for QFilter {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let dim = layer.head_dim;
        let name = format!("layers.{}.filter", layer.layer);
        let filters = self.file.tensor(&name, &[layer.heads.len(), dim])?;
        let kernels = simd::active();
        let heads = layer.heads.iter().zip(filters.chunks_exact(dim));
        let score = |key: &[f32], filter: &[f32]| -kernels.dot_f32(key, filter);
        Ok(heads
            .map(|(head, filter)| head.keys.chunks_exact(dim).map(|key| score(key, filter)))
            .map(|scores| HeadScores::open(scores.collect()))
            .collect())
    }
}
