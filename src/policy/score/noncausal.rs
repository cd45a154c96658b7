//! Attention inside chunks, without a mask: what a chunk's own queries read of it.
//!
//! ```text
//! P[h, t, j] = softmax over the keys j of the chunk of q[h, t] . k[j], not scaled, not causal
//! a[j]       = mean over the group's heads of the sum over t of P[h, t, j], times |v[j]|
//! score[j]   = mean of a over j - 1, j, j + 1, with mean 0 and deviation 1 over the layer's heads
//! ```
//!
//! Reads all queries of the prompt, which are remembered until the first step after it: 4 bytes for each
//! element of each query. Tokens whose queries were not seen, those of a shared prefix, count as average. A short
//! last chunk is filled up with zero keys and queries, as the reference implementation does.

use super::linalg::standardize;
use super::{ALL_QUERIES, Entry, Score};
use crate::error::{Result, ensure};
use crate::policy::{HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "noncausal",
    summary: "keeps what the queries of its own chunk read, earlier ones included",
    paper: "Compactor, arXiv 2507.08143",
    params: &[CHUNK],
    needs: Needs::KEYS.union(Needs::VALUES).union(Needs::QUERY_WINDOW),
    examples: &["noncausal | keep(0.5)", "noncausal(chunk=64) | adakv | keep(0.25)"],
    create: |args| Ok(Box::new(NonCausal { chunk: args.count("chunk") })),
};

pub(super) const CHUNK: Param = Param {
    name: "chunk",
    help: "tokens of a chunk",
    domain: Domain::Int { default: 256, min: 1, max: 1 << 16 },
};

/// What a key of zeros counts as in a chunk that is filled up.
const FILLED: f32 = -1e-9;

#[derive(Debug)]
struct NonCausal {
    chunk: usize,
}

impl Score for NonCausal {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn query_window(&self) -> usize {
        ALL_QUERIES
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let scores = score("noncausal", self.chunk, layer, |head| 0..head.positions.len())?;
        Ok(scores.into_iter().map(HeadScores::open).collect())
    }
}

/// The standardized scores of the tokens `part` of each head.
pub(super) fn score(
    name: &str,
    chunk: usize,
    layer: &LayerInput<'_>,
    part: impl Fn(&HeadInput<'_>) -> std::ops::Range<usize>,
) -> Result<Vec<Vec<f32>>> {
    let mut scores = Vec::with_capacity(layer.heads.len());
    for head in &layer.heads {
        let range = part(head);
        ensure!(
            head.num_queries > 0 || range.is_empty(),
            InvalidState,
            "{name} has observed no queries of the prompt"
        );
        let mut sums = vec![0.0f32; range.len()];
        for (start, sums) in (range.start..).step_by(chunk).zip(sums.chunks_mut(chunk)) {
            add_chunk(layer, head, start, chunk, sums);
        }
        let dim = layer.value_dim;
        let kernels = simd::active();
        for (i, sum) in range.zip(&mut sums) {
            let value = &head.values[i * dim..][..dim];
            *sum *= kernels.dot_f32(value, value).sqrt() / layer.group as f32;
        }
        scores.push(smooth(&sums));
    }
    standardize(&mut scores);
    Ok(scores)
}

/// Adds what the queries of the tokens `start..start + sums.len()` read of them.
fn add_chunk(
    layer: &LayerInput<'_>,
    head: &HeadInput<'_>,
    start: usize,
    chunk: usize,
    sums: &mut [f32],
) {
    let kernels = simd::active();
    let dim = layer.head_dim;
    let len = sums.len();
    let last = head.positions[head.positions.len() - 1];
    let keys = &head.keys[start * dim..][..len * dim];
    let mut row = vec![0.0f32; len];
    for queries in head.queries.chunks_exact(head.num_queries * dim) {
        for position in &head.positions[start..][..len] {
            // The last query is that of the last token.
            let Some(index) = (head.num_queries - 1).checked_sub((last - position) as usize) else {
                continue;
            };
            let query = &queries[index * dim..][..dim];
            for (out, key) in row.iter_mut().zip(keys.chunks_exact(dim)) {
                *out = kernels.dot_f32(query, key);
            }
            let mut most = kernels.max(&row);
            if len < chunk {
                most = most.max(FILLED);
            }
            let sum = kernels.exp_sub(&mut row, most);
            let filled = (chunk - len) as f32 * (FILLED - most).exp();
            kernels.axpy_f32(1.0 / (sum + filled), &row, sums);
        }
        // Queries of zeros read everything alike.
        let alike = (chunk - len) as f32 / chunk as f32;
        sums.iter_mut().for_each(|sum| *sum += alike);
    }
}

/// The mean of each element and its neighbours, 0 beyond the ends.
fn smooth(values: &[f32]) -> Vec<f32> {
    let at = |i: usize| {
        let near = &values[i.saturating_sub(1)..(i + 2).min(values.len())];
        near.iter().sum::<f32>() / 3.0
    };
    (0..values.len()).map(at).collect()
}
