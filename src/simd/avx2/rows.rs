//! Loops over rows. Queries and outputs are taken in batches of up to 8, the query heads that share
//! a KV head, so that each byte of the cache is read and dequantized once for all of them.

#![expect(clippy::needless_range_loop, reason = "indices into two register arrays at once")]

use std::arch::x86_64::*;

use super::format::Format;
use crate::simd::rows::{BLOCK, Rows};

/// Queries or outputs of a batch.
const BATCH: usize = 8;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot<F: Format>(rows: &Rows<'_>, queries: &[f32], scores: &mut [f32]) {
    if rows.count == 0 {
        return;
    }
    let batches = queries.chunks(BATCH * rows.dim).zip(scores.chunks_mut(BATCH * rows.count));
    for (queries, scores) in batches {
        // Rows times queries: at most 8 sums, which with 8 rows opened still fit 16 registers.
        match queries.len() / rows.dim {
            1 => dot_batch::<F, 4, 1>(rows, queries, scores),
            2 => dot_batch::<F, 4, 2>(rows, queries, scores),
            3 => dot_batch::<F, 2, 3>(rows, queries, scores),
            4 => dot_batch::<F, 2, 4>(rows, queries, scores),
            5 => dot_batch::<F, 1, 5>(rows, queries, scores),
            6 => dot_batch::<F, 1, 6>(rows, queries, scores),
            7 => dot_batch::<F, 1, 7>(rows, queries, scores),
            _ => dot_batch::<F, 1, 8>(rows, queries, scores),
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_batch<F: Format, const R: usize, const Q: usize>(
    rows: &Rows<'_>,
    queries: &[f32],
    scores: &mut [f32],
) {
    let whole = rows.count / R * R;
    for t in (0..whole).step_by(R) {
        dot_tile::<F, R, Q>(rows, t, queries, scores);
    }
    for t in whole..rows.count {
        dot_tile::<F, 1, Q>(rows, t, queries, scores);
    }
}

/// Scores of `R` rows from row `t` on for `Q` queries.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_tile<F: Format, const R: usize, const Q: usize>(
    rows: &Rows<'_>,
    t: usize,
    queries: &[f32],
    scores: &mut [f32],
) {
    let dim = rows.dim;
    let mut sums = [[_mm256_setzero_ps(); Q]; R];
    // SAFETY: `Rows::check` proved that rows `t..t + R` lie in the bytes; queries are `[Q, dim]`;
    // `parts` stops at the last complete vector of the row.
    unsafe {
        let starts: [_; R] =
            std::array::from_fn(|r| rows.bytes.as_ptr().add((t + r) * rows.stride));
        let mut accumulate = |open: &[F; R], block: usize, part: usize| {
            let mut x = [_mm256_setzero_ps(); R];
            for r in 0..R {
                x[r] = open[r].part(part);
            }
            for q in 0..Q {
                let query =
                    _mm256_loadu_ps(queries.as_ptr().add(q * dim + block * BLOCK + part * 8));
                for r in 0..R {
                    sums[r][q] = _mm256_fmadd_ps(x[r], query, sums[r][q]);
                }
            }
        };
        let blocks = dim / BLOCK;
        for block in 0..blocks {
            let open: [F; R] = std::array::from_fn(|r| F::open(rows, starts[r], block));
            accumulate(&open, block, 0);
            accumulate(&open, block, 1);
            accumulate(&open, block, 2);
            accumulate(&open, block, 3);
        }
        let rest = dim % BLOCK;
        if rest > 0 {
            let open: [F; R] = std::array::from_fn(|r| F::open(rows, starts[r], blocks));
            for part in 0..rest / 8 {
                accumulate(&open, blocks, part);
            }
        }
        store_sums(&sums, |r, q, sum| {
            let mut sum = sum;
            for column in dim / 8 * 8..dim {
                let element = F::open(rows, starts[r], 0).element(column);
                sum += element * queries[q * dim + column];
            }
            scores[q * rows.count + t + r] = sum;
        });
    }
}

/// Adds up the lanes of each vector, four vectors at a time, and hands out the results.
#[inline(always)]
fn store_sums<const R: usize, const Q: usize>(
    sums: &[[__m256; Q]; R],
    mut store: impl FnMut(usize, usize, f32),
) {
    const { assert!(R * Q <= BATCH) };
    // SAFETY: only called from functions with AVX2.
    unsafe {
        let mut flat = [_mm256_setzero_ps(); BATCH];
        for r in 0..R {
            for q in 0..Q {
                flat[r * Q + q] = sums[r][q];
            }
        }
        let mut totals = [0.0f32; BATCH];
        for half in 0..(R * Q).div_ceil(4) {
            let v = &flat[half * 4..];
            let pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
            let sum = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs));
            _mm_storeu_ps(totals[half * 4..].as_mut_ptr(), sum);
        }
        for r in 0..R {
            for q in 0..Q {
                store(r, q, totals[r * Q + q]);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn axpy<F: Format>(rows: &Rows<'_>, weights: &[f32], outputs: &mut [f32]) {
    if rows.count == 0 {
        return;
    }
    let batches = weights.chunks(BATCH * rows.count).zip(outputs.chunks_mut(BATCH * rows.dim));
    for (weights, outputs) in batches {
        // Outputs times parts: at most 12 sums stay in registers over all rows.
        match outputs.len() / rows.dim {
            1 => axpy_batch::<F, 1, 4>(rows, weights, outputs),
            2 => axpy_batch::<F, 2, 4>(rows, weights, outputs),
            3 => axpy_batch::<F, 3, 2>(rows, weights, outputs),
            4 => axpy_batch::<F, 4, 2>(rows, weights, outputs),
            5 => axpy_batch::<F, 5, 2>(rows, weights, outputs),
            6 => axpy_batch::<F, 6, 2>(rows, weights, outputs),
            7 => axpy_batch::<F, 7, 1>(rows, weights, outputs),
            _ => axpy_batch::<F, 8, 1>(rows, weights, outputs),
        }
    }
}

/// `Q` outputs, `P` parts of a block at a time, so that the sums stay in registers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn axpy_batch<F: Format, const Q: usize, const P: usize>(
    rows: &Rows<'_>,
    weights: &[f32],
    outputs: &mut [f32],
) {
    let blocks = rows.dim / BLOCK;
    for block in 0..blocks {
        for group in 0..4 / P {
            match group {
                0 => axpy_tile::<F, Q, P>(rows, block, 0, weights, outputs),
                1 => axpy_tile::<F, Q, P>(rows, block, P, weights, outputs),
                2 => axpy_tile::<F, Q, P>(rows, block, 2 * P, weights, outputs),
                _ => axpy_tile::<F, Q, P>(rows, block, 3 * P, weights, outputs),
            }
        }
    }
    for part in 0..rows.dim % BLOCK / 8 {
        axpy_tile::<F, Q, 1>(rows, blocks, part, weights, outputs);
    }
    for column in rows.dim / 8 * 8..rows.dim {
        for t in 0..rows.count {
            // SAFETY: row `t` and the column lie in the bytes.
            let x = unsafe { F::open(rows, rows.row(t).as_ptr(), 0).element(column) };
            for q in 0..Q {
                outputs[q * rows.dim + column] += weights[q * rows.count + t] * x;
            }
        }
    }
}

#[inline(always)]
fn axpy_tile<F: Format, const Q: usize, const P: usize>(
    rows: &Rows<'_>,
    block: usize,
    first: usize,
    weights: &[f32],
    outputs: &mut [f32],
) {
    // SAFETY: only called from functions with AVX2; `Rows::check` proved that every row lies in the
    // bytes; weights are `[Q, count]` and outputs `[Q, dim]`; the parts lie inside the row.
    unsafe {
        let column = block * BLOCK + first * 8;
        let mut sums = [[_mm256_setzero_ps(); P]; Q];
        for q in 0..Q {
            for p in 0..P {
                let at = outputs.as_ptr().add(q * rows.dim + column + p * 8);
                sums[q][p] = _mm256_loadu_ps(at);
            }
        }
        let mut row = rows.bytes.as_ptr();
        for t in 0..rows.count {
            let open = F::open(rows, row, block);
            let mut x = [_mm256_setzero_ps(); P];
            for p in 0..P {
                x[p] = open.part(first + p);
            }
            for q in 0..Q {
                let weight = _mm256_broadcast_ss(&*weights.as_ptr().add(q * rows.count + t));
                for p in 0..P {
                    sums[q][p] = _mm256_fmadd_ps(x[p], weight, sums[q][p]);
                }
            }
            row = row.wrapping_add(rows.stride);
        }
        for q in 0..Q {
            for p in 0..P {
                let at = outputs.as_mut_ptr().add(q * rows.dim + column + p * 8);
                _mm256_storeu_ps(at, sums[q][p]);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn decode<F: Format>(rows: &Rows<'_>, out: &mut [f32]) {
    for (t, out) in out.chunks_exact_mut(rows.dim).enumerate() {
        let row = rows.row(t).as_ptr();
        let (vectors, rest) = out.as_chunks_mut::<8>();
        for (block, parts) in vectors.chunks_mut(4).enumerate() {
            // SAFETY: row `t` and the parts lie in the bytes.
            unsafe {
                let open = F::open(rows, row, block);
                for (part, out) in parts.iter_mut().enumerate() {
                    _mm256_storeu_ps(out.as_mut_ptr(), open.part(part));
                }
            }
        }
        for (i, x) in rest.iter_mut().enumerate() {
            // SAFETY: row `t` and the column lie in the bytes.
            *x = unsafe { F::open(rows, row, 0).element(rows.dim / 8 * 8 + i) };
        }
    }
}
