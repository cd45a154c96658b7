//! Reading of formats without row kernels: rows are decoded a few at a time, and the decoded rows
//! serve all queries.

use std::ops::Range;

use super::{Cell, scratch};
use crate::simd::{Format, Kernels, Rows};

/// Rows decoded at a time: they stay in the first or second level cache.
const ROWS: usize = 32;

/// `Quantizer::dot` by `decode`, which decodes the given rows of the cell; its last argument is a
/// buffer of `extra` values.
pub(super) fn dot(
    kernels: &Kernels,
    cell: &Cell<'_>,
    queries: &[f32],
    scores: &mut [f32],
    extra: usize,
    mut decode: impl FnMut(Range<usize>, &mut [f32], &mut [f32]),
) {
    let (dim, count) = (cell.dim, cell.rows.len());
    let n = queries.len() / dim;
    assert_eq!(n * count, scores.len(), "scores must be [{n}, {count}]");
    scratch::with(ROWS * (dim + n) + extra, |buffer| {
        let (values, buffer) = buffer.split_at_mut(ROWS * dim);
        let (some_scores, buffer) = buffer.split_at_mut(ROWS * n);
        for start in (0..count).step_by(ROWS) {
            let end = count.min(start + ROWS);
            let values = &mut values[..(end - start) * dim];
            decode(cell.rows.start + start..cell.rows.start + end, values, buffer);
            let some_scores = &mut some_scores[..(end - start) * n];
            kernels.dot(Format::F32, &Rows::of_f32(values, dim), queries, some_scores);
            let pairs = scores.chunks_mut(count).zip(some_scores.chunks(end - start));
            pairs.for_each(|(to, from)| to[start..end].copy_from_slice(from));
        }
    });
}

/// `Quantizer::axpy` by `decode`, as in [`dot`].
pub(super) fn axpy(
    kernels: &Kernels,
    cell: &Cell<'_>,
    weights: &[f32],
    outputs: &mut [f32],
    extra: usize,
    mut decode: impl FnMut(Range<usize>, &mut [f32], &mut [f32]),
) {
    let (dim, count) = (cell.dim, cell.rows.len());
    let n = outputs.len() / dim;
    assert_eq!(n * count, weights.len(), "weights must be [{n}, {count}]");
    scratch::with(ROWS * (dim + n) + extra, |buffer| {
        let (values, buffer) = buffer.split_at_mut(ROWS * dim);
        let (some_weights, buffer) = buffer.split_at_mut(ROWS * n);
        for start in (0..count).step_by(ROWS) {
            let end = count.min(start + ROWS);
            let values = &mut values[..(end - start) * dim];
            decode(cell.rows.start + start..cell.rows.start + end, values, buffer);
            let some_weights = &mut some_weights[..(end - start) * n];
            let pairs = some_weights.chunks_mut(end - start).zip(weights.chunks(count));
            pairs.for_each(|(to, from)| to.copy_from_slice(&from[start..end]));
            kernels.axpy(Format::F32, &Rows::of_f32(values, dim), some_weights, outputs);
        }
    });
}
