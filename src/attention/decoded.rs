//! Rows that are decoded once and then used as f32, when many queries share them.

use crate::simd::{self, Format, Rows};

/// Query vectors from which on this pays, instead of dequantizing rows again for each batch. With 64
/// vectors it saves 1 % (`had+q4_0`) to 9 % (`q4_0`) of the time; with 32 it loses up to 14 %.
pub(crate) const DECODE_FROM: usize = 64;

/// Query vectors that go through decoded rows together: fewer loads for each multiply-add than
/// with 8, and reading f32 again costs less than that.
const BATCH: usize = 4;

/// `scores[i, t] = queries[i] . rows[t]` for f32 rows, overwriting.
pub(crate) fn dot(rows: &Rows<'_>, queries: &[f32], scores: &mut [f32]) {
    let batches = queries.chunks(BATCH * rows.dim);
    for (queries, scores) in batches.zip(scores.chunks_mut(BATCH * rows.count)) {
        simd::active().dot(Format::F32, rows, queries, scores);
    }
}

/// `outputs[i] += sum over t of weights[i, t] * rows[t]` for f32 rows.
pub(crate) fn axpy(rows: &Rows<'_>, weights: &[f32], outputs: &mut [f32]) {
    let batches = weights.chunks(BATCH * rows.count);
    for (weights, outputs) in batches.zip(outputs.chunks_mut(BATCH * rows.dim)) {
        simd::active().axpy(Format::F32, rows, weights, outputs);
    }
}
