//! Loops over rows of plain numbers. Four queries or outputs at a time: with two rows, or two vectors
//! of a row, that is as many sums as hide the latency of a multiply-add and stay in registers.

#![expect(clippy::needless_range_loop, reason = "indices into two register arrays at once")]

use std::arch::x86_64::*;

use super::format::Raw;
use super::math::{store_four, store_one, sum_each};
use crate::simd::ahead::Ahead;
use crate::simd::rows::Rows;

/// Queries or outputs of a batch.
const BATCH: usize = 4;

/// Rows that are added up in registers before an output is touched.
const TILE: usize = 32;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot<F: Raw>(rows: &Rows<'_>, queries: &[f32], scores: &mut [f32]) {
    if rows.count == 0 {
        return;
    }
    let batches = queries.chunks(BATCH * rows.dim).zip(scores.chunks_mut(BATCH * rows.count));
    for (queries, scores) in batches {
        match queries.len() / rows.dim {
            1 => dot_batch::<F, 4, 1>(rows, queries, scores),
            2 => dot_batch::<F, 4, 2>(rows, queries, scores),
            3 => dot_batch::<F, 2, 3>(rows, queries, scores),
            _ => dot_batch::<F, 2, 4>(rows, queries, scores),
        }
        if !rows.dim.is_multiple_of(8) {
            add_tails::<F>(rows, queries, scores);
        }
    }
}

/// Scores of `Q` queries, `R` rows at a time, from the whole vectors of the rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_batch<F: Raw, const R: usize, const Q: usize>(
    rows: &Rows<'_>,
    queries: &[f32],
    scores: &mut [f32],
) {
    let (dim, count) = (rows.dim, rows.count);
    let whole = count / 4 * 4;
    // SAFETY: `Rows::check` proved that all rows lie in the bytes; queries are `[Q, dim]` and scores
    // `[Q, count]`.
    unsafe {
        let row = |t: usize| rows.bytes.as_ptr().add(t * rows.stride);
        let scores = scores.as_mut_ptr();
        let mut ahead = Ahead::new(rows.ahead, (whole / R).max(1));
        for t in (0..whole).step_by(4) {
            let mut lines = [_mm_setzero_ps(); 4];
            for first in (0..4).step_by(R) {
                ahead.fetch();
                let some = dot_rows::<F, R, Q>(row(t + first), rows.stride, queries, dim);
                lines[first..first + R].copy_from_slice(&some);
            }
            store_four::<Q>(lines, scores.add(t), count);
        }
        for t in whole..count {
            let [line] = dot_rows::<F, 1, Q>(row(t), rows.stride, queries, dim);
            store_one::<Q>(line, scores.add(t), count);
        }
    }
}

/// For each of `R` rows, its scores for `Q` queries.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C; there are `R` rows from `start` on, `stride` apart, and queries
/// are `[Q, dim]`.
#[inline(always)]
unsafe fn dot_rows<F: Raw, const R: usize, const Q: usize>(
    start: *const u8,
    stride: usize,
    queries: &[f32],
    dim: usize,
) -> [__m128; R] {
    // SAFETY: by contract; vectors stop at the last complete one of the row.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); Q]; R];
        let query = queries.as_ptr();
        for i in 0..dim / 8 {
            let mut x = [_mm256_setzero_ps(); R];
            for r in 0..R {
                x[r] = F::vector(start.add(r * stride), i);
            }
            for q in 0..Q {
                let y = _mm256_loadu_ps(query.add(q * dim + 8 * i));
                for r in 0..R {
                    sums[r][q] = _mm256_fmadd_ps(x[r], y, sums[r][q]);
                }
            }
        }
        let mut lines = [_mm_setzero_ps(); R];
        for r in 0..R {
            let mut all = [_mm256_setzero_ps(); BATCH];
            all[..Q].copy_from_slice(&sums[r]);
            lines[r] = sum_each(all);
        }
        lines
    }
}

/// Adds what the elements behind the last whole vector of each row contribute.
#[cold]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_tails<F: Raw>(rows: &Rows<'_>, queries: &[f32], scores: &mut [f32]) {
    for t in 0..rows.count {
        for column in rows.dim / 8 * 8..rows.dim {
            // SAFETY: `Rows::check` proved that the row lies in the bytes.
            let x = unsafe { F::open(rows, rows.row(t).as_ptr(), 0).element(column) };
            let queries = queries.chunks_exact(rows.dim);
            for (query, scores) in queries.zip(scores.chunks_exact_mut(rows.count)) {
                scores[t] += x * query[column];
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn axpy<F: Raw>(rows: &Rows<'_>, weights: &[f32], outputs: &mut [f32]) {
    if rows.count == 0 {
        return;
    }
    let batches = weights.chunks(BATCH * rows.count).zip(outputs.chunks_mut(BATCH * rows.dim));
    for (weights, outputs) in batches {
        match outputs.len() / rows.dim {
            1 => axpy_batch::<F, 1>(rows, weights, outputs),
            2 => axpy_batch::<F, 2>(rows, weights, outputs),
            3 => axpy_batch::<F, 3>(rows, weights, outputs),
            _ => axpy_batch::<F, 4>(rows, weights, outputs),
        }
    }
}

/// Adds rows to `Q` outputs.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn axpy_batch<F: Raw, const Q: usize>(rows: &Rows<'_>, weights: &[f32], outputs: &mut [f32]) {
    let (dim, count) = (rows.dim, rows.count);
    // The weights of a row side by side, so that one address reaches all of them.
    let mut turned = [[0.0; Q]; TILE];
    for first in (0..count).step_by(TILE) {
        let turned = &mut turned[..TILE.min(count - first)];
        for (t, turned) in turned.iter_mut().enumerate() {
            for q in 0..Q {
                turned[q] = weights[q * count + first + t];
            }
        }
        // SAFETY: `Rows::check` proved that these rows lie in the bytes; outputs are `[Q, dim]`;
        // vectors stop at the last complete one of the row.
        unsafe {
            let start = rows.bytes.as_ptr().add(first * rows.stride);
            let outputs = outputs.as_mut_ptr();
            let vectors = dim / 8;
            let ahead = if first == 0 { rows.ahead } else { &[] };
            let mut ahead = Ahead::new(ahead, turned.len() * vectors.div_ceil(2).max(1));
            for i in (0..vectors / 2 * 2).step_by(2) {
                add_vectors::<F, Q, 2>(rows, start, turned, i, outputs, &mut ahead);
            }
            if vectors % 2 == 1 {
                let last = vectors - 1;
                add_vectors::<F, Q, 1>(rows, start, turned, last, outputs, &mut ahead);
            }
            for column in vectors * 8..dim {
                for (t, weights) in turned.iter().enumerate() {
                    let x = F::open(rows, start.add(t * rows.stride), 0).element(column);
                    for q in 0..Q {
                        *outputs.add(q * dim + column) += weights[q] * x;
                    }
                }
            }
        }
    }
}

/// Adds `P` vectors of each row from the `i`-th on, times the weights of the row, to `Q` outputs.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C; `start` is the first of as many rows as there are weights; the
/// vectors lie inside the rows and the outputs.
#[inline(always)]
unsafe fn add_vectors<F: Raw, const Q: usize, const P: usize>(
    rows: &Rows<'_>,
    start: *const u8,
    weights: &[[f32; Q]],
    i: usize,
    outputs: *mut f32,
    ahead: &mut Ahead,
) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); P]; Q];
        let mut row = start;
        for weights in weights {
            ahead.fetch();
            let mut x = [_mm256_setzero_ps(); P];
            for p in 0..P {
                x[p] = F::vector(row, i + p);
            }
            for q in 0..Q {
                let weight = _mm256_broadcast_ss(&weights[q]);
                for p in 0..P {
                    sums[q][p] = _mm256_fmadd_ps(x[p], weight, sums[q][p]);
                }
            }
            row = row.wrapping_add(rows.stride);
        }
        for q in 0..Q {
            for p in 0..P {
                let output = outputs.add(q * rows.dim + (i + p) * 8);
                _mm256_storeu_ps(output, _mm256_add_ps(_mm256_loadu_ps(output), sums[q][p]));
            }
        }
    }
}
