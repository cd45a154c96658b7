//! Loops over rows. Queries and outputs are taken in batches of up to 8, the query heads that share
//! a KV head, so that each byte of the cache is read and dequantized once for all of them.

#![expect(clippy::needless_range_loop, reason = "indices into two register arrays at once")]

use std::arch::x86_64::*;

use super::format::Format;
use crate::simd::rows::{BLOCK, Rows};

/// Queries or outputs of a batch.
const BATCH: usize = 8;

/// Parts of a block in the order that `Codes4` likes.
const ORDER: [usize; 4] = [0, 2, 1, 3];

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot<F: Format>(rows: &Rows<'_>, queries: &[f32], scores: &mut [f32]) {
    if rows.count == 0 {
        return;
    }
    let batches = queries.chunks(BATCH * rows.dim).zip(scores.chunks_mut(BATCH * rows.count));
    for (queries, scores) in batches {
        // Rows times queries: at most 8 sums, which leaves half of the registers to the rows.
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
    // SAFETY: `Rows::check` proved that rows `t..t + R` lie in the bytes; queries are `[Q, dim]` and
    // scores `[Q, count]`; the parts stop at the last complete vector of the row.
    unsafe {
        let starts: [_; R] =
            std::array::from_fn(|r| rows.bytes.as_ptr().add((t + r) * rows.stride));
        let blocks = dim / BLOCK;
        for block in 0..blocks {
            let open = open_rows::<F, R>(rows, &starts, block);
            let query = queries.as_ptr().add(block * BLOCK);
            for part in ORDER {
                dot_part::<F, R, Q>(&open, part, query, dim, &mut sums);
            }
        }
        if !dim.is_multiple_of(BLOCK) {
            let open = open_rows::<F, R>(rows, &starts, blocks);
            let query = queries.as_ptr().add(blocks * BLOCK);
            for part in 0..dim % BLOCK / 8 {
                dot_part::<F, R, Q>(&open, part, query, dim, &mut sums);
            }
        }
        let mut totals = [0.0; BATCH];
        add_lanes(&sums, &mut totals);
        for q in 0..Q {
            for r in 0..R {
                let mut score = totals[q * R + r];
                if F::SCALED {
                    score *= F::row_scale(rows, starts[r]);
                }
                for column in dim / 8 * 8..dim {
                    let element = F::open(rows, starts[r], 0).element(column);
                    score += element * queries[q * dim + column];
                }
                *scores.as_mut_ptr().add(q * rows.count + t + r) = score;
            }
        }
    }
}

/// One vector of each of `R` rows, for `Q` queries at distances of `dim`.
///
/// # Safety
/// The CPU has AVX2 and FMA; the part lies inside the rows and the queries.
#[inline(always)]
unsafe fn dot_part<F: Format, const R: usize, const Q: usize>(
    open: &[F; R],
    part: usize,
    query: *const f32,
    dim: usize,
    sums: &mut [[__m256; Q]; R],
) {
    // SAFETY: by contract.
    unsafe {
        // Not from_fn: its closure has no target features, so intrinsics in it become calls.
        let mut x = [_mm256_setzero_ps(); R];
        for (x, open) in x.iter_mut().zip(open) {
            *x = open.part(part);
        }
        for q in 0..Q {
            let query = _mm256_loadu_ps(query.add(q * dim + part * 8));
            for r in 0..R {
                sums[r][q] = _mm256_fmadd_ps(x[r], query, sums[r][q]);
            }
        }
    }
}

/// Block `block` of `R` rows.
///
/// # Safety
/// As for `Format::open`.
#[inline(always)]
unsafe fn open_rows<F: Format, const R: usize>(
    rows: &Rows<'_>,
    starts: &[*const u8; R],
    block: usize,
) -> [F; R] {
    // SAFETY: by contract. A loop for the reason given in `dot_part`.
    unsafe {
        let mut open = [F::open(rows, starts[0], block); R];
        for (open, start) in open.iter_mut().zip(starts).skip(1) {
            *open = F::open(rows, *start, block);
        }
        open
    }
}

/// Adds up the lanes of each vector, four vectors at a time.
#[inline(always)]
fn add_lanes<const R: usize, const Q: usize>(sums: &[[__m256; Q]; R], totals: &mut [f32; BATCH]) {
    const { assert!(R * Q <= BATCH) };
    // SAFETY: only called from functions with AVX2; `totals` holds two vectors of four.
    unsafe {
        let mut flat = [_mm256_setzero_ps(); BATCH];
        for q in 0..Q {
            for r in 0..R {
                flat[q * R + r] = sums[r][q];
            }
        }
        for four in 0..(R * Q).div_ceil(4) {
            let [a, b, c, d] = [0, 1, 2, 3].map(|i| flat[four * 4 + i]);
            let pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let sum = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs));
            _mm_storeu_ps(totals.as_mut_ptr().add(four * 4), sum);
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
        // More rows for each load and store of an output, as long as registers last.
        match outputs.len() / rows.dim {
            1 => axpy_batch::<F, 4, 1>(rows, weights, outputs),
            2 => axpy_batch::<F, 4, 2>(rows, weights, outputs),
            3 => axpy_batch::<F, 4, 3>(rows, weights, outputs),
            4 => axpy_batch::<F, 4, 4>(rows, weights, outputs),
            5 => axpy_batch::<F, 4, 5>(rows, weights, outputs),
            6 => axpy_batch::<F, 4, 6>(rows, weights, outputs),
            7 => axpy_batch::<F, 4, 7>(rows, weights, outputs),
            _ => axpy_batch::<F, 4, 8>(rows, weights, outputs),
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn axpy_batch<F: Format, const R: usize, const Q: usize>(
    rows: &Rows<'_>,
    weights: &[f32],
    outputs: &mut [f32],
) {
    let whole = rows.count / R * R;
    for t in (0..whole).step_by(R) {
        axpy_tile::<F, R, Q>(rows, t, weights, outputs);
    }
    for t in whole..rows.count {
        axpy_tile::<F, 1, Q>(rows, t, weights, outputs);
    }
}

/// Adds `R` rows from row `t` on to `Q` outputs. Rows are read once and in order, which lets the
/// hardware run ahead; the outputs stay in the first level cache.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn axpy_tile<F: Format, const R: usize, const Q: usize>(
    rows: &Rows<'_>,
    t: usize,
    weights: &[f32],
    outputs: &mut [f32],
) {
    let (dim, count) = (rows.dim, rows.count);
    // SAFETY: `Rows::check` proved that rows `t..t + R` lie in the bytes; weights are `[Q, count]`
    // and outputs `[Q, dim]`; the parts stop at the last complete vector of the row.
    unsafe {
        let starts: [_; R] =
            std::array::from_fn(|r| rows.bytes.as_ptr().add((t + r) * rows.stride));
        let first_weight = weights.as_ptr().add(t);
        let weight = |q: usize, r: usize| first_weight.add(q * count + r);
        let mut scaled = [0.0; 4 * BATCH];
        let (weights, distance) = if F::SCALED {
            for r in 0..R {
                let scale = F::row_scale(rows, starts[r]);
                for q in 0..Q {
                    scaled[q * R + r] = *weight(q, r) * scale;
                }
            }
            (scaled.as_ptr(), R)
        } else {
            (first_weight, count)
        };
        let outputs = outputs.as_mut_ptr();
        let blocks = dim / BLOCK;
        for block in 0..blocks {
            let open = open_rows::<F, R>(rows, &starts, block);
            let output = outputs.add(block * BLOCK);
            for part in ORDER {
                axpy_part::<F, R, Q>(&open, part, weights, distance, output, dim);
            }
        }
        if !dim.is_multiple_of(BLOCK) {
            let open = open_rows::<F, R>(rows, &starts, blocks);
            let output = outputs.add(blocks * BLOCK);
            for part in 0..dim % BLOCK / 8 {
                axpy_part::<F, R, Q>(&open, part, weights, distance, output, dim);
            }
        }
        for column in dim / 8 * 8..dim {
            for r in 0..R {
                let x = F::open(rows, starts[r], 0).element(column);
                for q in 0..Q {
                    *outputs.add(q * dim + column) += *weight(q, r) * x;
                }
            }
        }
    }
}

/// One vector of each of `R` rows, added to `Q` outputs at distances of `dim`; the weights of an
/// output are `count` apart.
///
/// # Safety
/// The CPU has AVX2 and FMA; the part lies inside the rows and the outputs.
#[inline(always)]
unsafe fn axpy_part<F: Format, const R: usize, const Q: usize>(
    open: &[F; R],
    part: usize,
    weights: *const f32,
    count: usize,
    output: *mut f32,
    dim: usize,
) {
    // SAFETY: by contract.
    unsafe {
        // Not from_fn: its closure has no target features, so intrinsics in it become calls.
        let mut x = [_mm256_setzero_ps(); R];
        for (x, open) in x.iter_mut().zip(open) {
            *x = open.part(part);
        }
        for q in 0..Q {
            let output = output.add(q * dim + part * 8);
            let mut sum = _mm256_loadu_ps(output);
            for r in 0..R {
                let weight = _mm256_broadcast_ss(&*weights.add(q * count + r));
                sum = _mm256_fmadd_ps(x[r], weight, sum);
            }
            _mm256_storeu_ps(output, sum);
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
                    let mut x = open.part(part);
                    if F::SCALED {
                        x = _mm256_mul_ps(x, _mm256_set1_ps(F::row_scale(rows, row)));
                    }
                    _mm256_storeu_ps(out.as_mut_ptr(), x);
                }
            }
        }
        for (i, x) in rest.iter_mut().enumerate() {
            // SAFETY: row `t` and the column lie in the bytes.
            *x = unsafe { F::open(rows, row, 0).element(rows.dim / 8 * 8 + i) };
        }
    }
}
