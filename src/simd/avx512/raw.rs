//! Loops over rows of plain numbers: 16 sums at a time, which hides the latency of a multiply-add and
//! leaves half of the registers to what is added up.

#![expect(clippy::needless_range_loop, reason = "indices into two register arrays at once")]

use std::arch::x86_64::*;

use super::integer::MAX_DIM;
use super::many::{self, MANY};
use super::math::{LANES, mask, sum_each};
use crate::simd::ahead::Ahead;
use crate::simd::rows::Rows;

/// Queries or outputs of a batch, and rows of a step of `dot`.
const BATCH: usize = 4;

/// Rows that are added up in registers before an output is touched.
const TILE: usize = 128;

/// Plain numbers, one after the other.
pub(super) trait Raw {
    const BYTES: usize;

    /// Some of 16 elements, 0 in the other lanes.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW and VL; the elements of the mask are at `at`.
    unsafe fn vector(at: *const u8, mask: __mmask16) -> __m512;
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;

impl Raw for F32 {
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn vector(at: *const u8, mask: __mmask16) -> __m512 {
        // SAFETY: by contract.
        unsafe { _mm512_maskz_loadu_ps(mask, at.cast()) }
    }
}

impl Raw for F16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn vector(at: *const u8, mask: __mmask16) -> __m512 {
        // SAFETY: by contract.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at.cast())) }
    }
}

impl Raw for Bf16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn vector(at: *const u8, mask: __mmask16) -> __m512 {
        // SAFETY: by contract.
        unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
        }
    }
}

/// `scores[q, t] = queries[q] . rows[t]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn dot<F: Raw>(rows: &Rows<'_>, queries: &[f32], scores: &mut [f32]) {
    if rows.count == 0 {
        return;
    }
    if queries.len() / rows.dim >= MANY && rows.dim <= MAX_DIM {
        return many::dot::<F>(rows, queries, scores);
    }
    let batches = queries.chunks(BATCH * rows.dim).zip(scores.chunks_mut(BATCH * rows.count));
    for (queries, scores) in batches {
        match queries.len() / rows.dim {
            1 => dot_batch::<F, 1>(rows, queries, scores),
            2 => dot_batch::<F, 2>(rows, queries, scores),
            3 => dot_batch::<F, 3>(rows, queries, scores),
            _ => dot_batch::<F, 4>(rows, queries, scores),
        }
    }
}

/// Scores of `Q` queries, four rows at a time; the last step repeats its last row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn dot_batch<F: Raw, const Q: usize>(rows: &Rows<'_>, queries: &[f32], scores: &mut [f32]) {
    let (dim, count) = (rows.dim, rows.count);
    let mut ahead = Ahead::new(rows.ahead, count.div_ceil(BATCH) * dim.div_ceil(LANES));
    for t in (0..count).step_by(BATCH) {
        let some = BATCH.min(count - t);
        let mut starts = [std::ptr::null(); BATCH];
        for (r, start) in starts.iter_mut().enumerate() {
            *start = rows.row(t + r.min(some - 1)).as_ptr();
        }
        // SAFETY: `Rows::check` proved that these rows lie in the bytes; queries are `[Q, dim]` and
        // scores `[Q, count]`.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); BATCH * BATCH];
            for first in (0..dim / LANES * LANES).step_by(LANES) {
                ahead.fetch();
                dot_vector::<F, Q>(&starts, queries, dim, (first, u16::MAX), &mut sums);
            }
            if !dim.is_multiple_of(LANES) {
                ahead.fetch();
                let last = (dim / LANES * LANES, mask(dim % LANES));
                dot_vector::<F, Q>(&starts, queries, dim, last, &mut sums);
            }
            let mut values = [0.0; BATCH * BATCH];
            _mm512_storeu_ps(values.as_mut_ptr(), sum_each(sums));
            for q in 0..Q {
                let target = &mut scores[q * count + t..][..some];
                target.copy_from_slice(&values[q * BATCH..][..some]);
            }
        }
    }
}

/// Adds the products of one vector of elements of each row and each query to `sums[query, row]`.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VL; the elements lie in the rows and in the `Q` queries.
#[inline(always)]
unsafe fn dot_vector<F: Raw, const Q: usize>(
    starts: &[*const u8; BATCH],
    queries: &[f32],
    dim: usize,
    (first, mask): (usize, __mmask16),
    sums: &mut [__m512; BATCH * BATCH],
) {
    // SAFETY: by contract.
    unsafe {
        let mut x = [_mm512_setzero_ps(); BATCH];
        for r in 0..BATCH {
            x[r] = F::vector(starts[r].add(first * F::BYTES), mask);
        }
        for q in 0..Q {
            let y = _mm512_maskz_loadu_ps(mask, queries.as_ptr().add(q * dim + first));
            for r in 0..BATCH {
                let sum = &mut sums[q * BATCH + r];
                *sum = _mm512_fmadd_ps(x[r], y, *sum);
            }
        }
    }
}

/// `outputs[q] += sum over t of weights[q, t] * rows[t]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
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

/// Adds rows to `Q` outputs, up to four vectors of channels at a time.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn axpy_batch<F: Raw, const Q: usize>(rows: &Rows<'_>, weights: &[f32], outputs: &mut [f32]) {
    let dim = rows.dim;
    for first in (0..rows.count).step_by(TILE) {
        let tile = first..rows.count.min(first + TILE);
        let whole = dim / LANES * LANES;
        let ahead = if first == 0 { rows.ahead } else { &[] };
        let mut ahead = Ahead::new(ahead, tile.len() * dim.div_ceil(4 * LANES));
        let mut channel = 0;
        // SAFETY: `Rows::check` proved that these rows lie in the bytes; weights are `[Q, count]`,
        // outputs `[Q, dim]`.
        unsafe {
            while channel < whole {
                let out = outputs.as_mut_ptr().add(channel);
                let vectors = ((whole - channel) / LANES).min(4);
                let (tile, at, ahead) = (tile.clone(), (channel, u16::MAX), &mut ahead);
                match vectors {
                    4 => add_vectors::<F, Q, 4>(rows, tile, weights, at, out, ahead),
                    2 | 3 => add_vectors::<F, Q, 2>(rows, tile, weights, at, out, ahead),
                    _ => add_vectors::<F, Q, 1>(rows, tile, weights, at, out, ahead),
                }
                channel += LANES * if vectors == 3 { 2 } else { vectors };
            }
            if whole < dim {
                let out = outputs.as_mut_ptr().add(whole);
                let last = (whole, mask(dim - whole));
                add_vectors::<F, Q, 1>(rows, tile, weights, last, out, &mut ahead);
            }
        }
    }
}

/// Adds `P` vectors of channels of the rows of a tile, times their weights, to `Q` outputs.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VL; the vectors lie inside the rows and at `out` in each of `Q`
/// outputs that are `dim` apart; weights are `[Q, count]`.
#[inline(always)]
unsafe fn add_vectors<F: Raw, const Q: usize, const P: usize>(
    rows: &Rows<'_>,
    tile: std::ops::Range<usize>,
    weights: &[f32],
    (channel, mask): (usize, __mmask16),
    out: *mut f32,
    ahead: &mut Ahead,
) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); P]; Q];
        let mut row = rows.bytes.as_ptr().add(tile.start * rows.stride + channel * F::BYTES);
        for t in tile {
            ahead.fetch();
            let mut x = [_mm512_setzero_ps(); P];
            for p in 0..P {
                x[p] = F::vector(row.add(p * LANES * F::BYTES), mask);
            }
            for q in 0..Q {
                let weight = _mm512_set1_ps(*weights.as_ptr().add(q * rows.count + t));
                for p in 0..P {
                    sums[q][p] = _mm512_fmadd_ps(x[p], weight, sums[q][p]);
                }
            }
            row = row.wrapping_add(rows.stride);
        }
        for q in 0..Q {
            for p in 0..P {
                let out = out.add(q * rows.dim + p * LANES);
                let old = _mm512_maskz_loadu_ps(mask, out);
                _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(old, sums[q][p]));
            }
        }
    }
}
