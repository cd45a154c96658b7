//! Loops over rows of small integers, in 16-bit arithmetic.
//!
//! Queries, and weights times scales, become 16-bit integers of a common scale; two products and
//! their sum are then one instruction, and integers need not become floats. What that rounds away
//! is 2^-15 of the largest query or weight, far below the error of any format that is stored so.
//!
//! ```text
//! dot    score[q, t] = sum over blocks of scale[t, b] * (integers[t, b] . query[q, b])
//! axpy   output[q, c] += sum over pairs of rows (t, t + 1) of weight[q, t] * integer[t, c]
//! ```
//!
//! Queries or weights that are not finite, or too large or small for it, take the float loops.

#![expect(clippy::needless_range_loop, reason = "indices into two register arrays at once")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::math::{load, store_four, store_one, sum_each, sum_lanes};
use super::rows as decoded;
use super::whole::{Factor, Whole};
use crate::simd::ahead::Ahead;
use crate::simd::rows::{BLOCK, Rows};

/// Queries or outputs of a batch.
const BATCH: usize = 4;

/// Rows whose weights share a scale.
const TILE: usize = 32;

/// Elements of the widest row that has room on the stack.
const MAX_DIM: usize = 512;

/// Between these magnitudes integers can stand for floats, and factors are normal numbers.
pub(in crate::simd) const TINY: f32 = 1e-30;
pub(in crate::simd) const HUGE: f32 = 1e30;

/// `scores[q, t] = queries[q] . rows[t]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot<W: Whole>(rows: &Rows<'_>, queries: &[f32], scores: &mut [f32]) {
    if rows.count == 0 {
        return;
    }
    let batches = queries.chunks(BATCH * rows.dim).zip(scores.chunks_mut(BATCH * rows.count));
    for (queries, scores) in batches {
        let mut factors = [0.0; BATCH];
        if rows.dim > MAX_DIM || !find_factors(rows.dim, queries, &mut factors) {
            decoded::dot::<W>(rows, queries, scores);
            continue;
        }
        match queries.len() / rows.dim {
            1 => dot_batch::<W, 1>(rows, queries, &factors, scores),
            2 => dot_batch::<W, 2>(rows, queries, &factors, scores),
            3 => dot_batch::<W, 3>(rows, queries, &factors, scores),
            _ => dot_batch::<W, 4>(rows, queries, &factors, scores),
        }
    }
}

/// What the integers of each query must be multiplied with again; `false` if integers cannot stand
/// for one of them.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn find_factors(dim: usize, queries: &[f32], factors: &mut [f32; BATCH]) -> bool {
    for (query, factor) in queries.chunks_exact(dim).zip(factors) {
        let mut most = _mm256_setzero_si256();
        for x in query.as_chunks::<8>().0 {
            // SAFETY: eight values. Magnitudes order like their bits, NaN above infinity.
            let bits = unsafe { _mm256_loadu_si256(x.as_ptr().cast()) };
            most = _mm256_max_epi32(most, _mm256_and_si256(bits, _mm256_set1_epi32(i32::MAX)));
        }
        // SAFETY: this function has AVX2.
        let largest = unsafe { largest_lane(most) };
        if !(largest > TINY && largest < HUGE) {
            return false;
        }
        *factor = largest / 32767.0;
    }
    true
}

/// Queries as integers.
struct Queries<const Q: usize> {
    /// `[dim / 16, Q]` vectors.
    integers: [[MaybeUninit<__m256i>; Q]; MAX_DIM / 16],
    /// Sums of the elements of each block, over their factor, one for each lane: `[dim / 32, Q]`.
    sums: [[MaybeUninit<__m256>; Q]; MAX_DIM / BLOCK],
}

impl<const Q: usize> Queries<Q> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn fill(&mut self, dim: usize, queries: &[f32], factors: &[f32; BATCH], with_sums: bool) {
        for (q, query) in queries.chunks_exact(dim).enumerate() {
            let inverse = _mm256_set1_ps(1.0 / factors[q]);
            for (block, values) in query.as_chunks::<BLOCK>().0.iter().enumerate() {
                let mut parts = [_mm256_setzero_ps(); 4];
                for (part, values) in parts.iter_mut().zip(values.as_chunks::<8>().0) {
                    *part = _mm256_mul_ps(load(values), inverse);
                }
                // SAFETY: this function has AVX2.
                unsafe {
                    self.integers[2 * block][q].write(round_16(parts[0], parts[1]));
                    self.integers[2 * block + 1][q].write(round_16(parts[2], parts[3]));
                }
                if with_sums {
                    let [a, b, c, d] = parts;
                    self.sums[block][q]
                        .write(_mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));
                }
            }
        }
    }
}

/// Two vectors rounded to integers of 16 bits, in order.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn round_16(low: __m256, high: __m256) -> __m256i {
    // SAFETY: by contract. Packing works in halves of 128 bits: put the quarters back in order.
    unsafe {
        let packed = _mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high));
        _mm256_permute4x64_epi64::<0b11_01_10_00>(packed)
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_batch<W: Whole, const Q: usize>(
    rows: &Rows<'_>,
    queries: &[f32],
    factors: &[f32; BATCH],
    scores: &mut [f32],
) {
    let count = rows.count;
    let mut prepared = Queries::<Q> {
        integers: [const { [const { MaybeUninit::uninit() }; Q] }; MAX_DIM / 16],
        sums: [const { [const { MaybeUninit::uninit() }; Q] }; MAX_DIM / BLOCK],
    };
    prepared.fill(rows.dim, queries, factors, W::HAS_MINIMUM);
    // SAFETY: `Rows::check` proved that all rows lie in the bytes; scores are `[Q, count]`.
    unsafe {
        let factors = _mm_loadu_ps(factors.as_ptr());
        let scores = scores.as_mut_ptr();
        let row = |t: usize| rows.bytes.as_ptr().add(t * rows.stride);
        let whole = count / 4 * 4;
        let mut ahead = Ahead::new(rows.ahead, (whole / 4).max(1));
        for t in (0..whole).step_by(4) {
            ahead.fetch();
            let mut lines = [_mm_setzero_ps(); 4];
            for r in 0..4 {
                lines[r] = _mm_mul_ps(dot_row::<W, Q>(rows, row(t + r), &prepared), factors);
            }
            store_four::<Q>(lines, scores.add(t), count);
        }
        for t in whole..count {
            let line = _mm_mul_ps(dot_row::<W, Q>(rows, row(t), &prepared), factors);
            store_one::<Q>(line, scores.add(t), count);
        }
    }
}

/// The scores of one row for `Q` queries, before their factors.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C; `row` is one of `rows`.
#[inline(always)]
unsafe fn dot_row<W: Whole, const Q: usize>(
    rows: &Rows<'_>,
    row: *const u8,
    queries: &Queries<Q>,
) -> __m128 {
    // SAFETY: by contract; a row has `dim / 32` blocks.
    unsafe {
        let mut sums = [_mm256_setzero_ps(); BATCH];
        for block in 0..rows.dim / BLOCK {
            let (low, high) = (W::half(rows, row, block, 0), W::half(rows, row, block, 1));
            let scale = W::scale(rows, row, block);
            let integers = queries.integers.as_ptr().add(2 * block).cast::<__m256i>();
            let sums_of = queries.sums.as_ptr().add(block).cast::<__m256>();
            for q in 0..Q {
                let low = _mm256_madd_epi16(low, *integers.add(q));
                let high = _mm256_madd_epi16(high, *integers.add(Q + q));
                let products = _mm256_add_epi32(low, high);
                let products = _mm256_cvtepi32_ps(products);
                sums[q] = match W::FACTOR {
                    Factor::One => _mm256_add_ps(products, sums[q]),
                    _ => _mm256_fmadd_ps(products, scale, sums[q]),
                };
            }
            if W::HAS_MINIMUM {
                let minimum = W::minimum(rows, row, block);
                for q in 0..Q {
                    sums[q] = _mm256_fmadd_ps(minimum, *sums_of.add(q), sums[q]);
                }
            }
        }
        sum_each(sums)
    }
}

/// Adds weighted rows to outputs.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn axpy<W: Whole>(rows: &Rows<'_>, weights: &[f32], outputs: &mut [f32]) {
    if rows.count == 0 {
        return;
    }
    let batches = weights.chunks(BATCH * rows.count).zip(outputs.chunks_mut(BATCH * rows.dim));
    for (weights, outputs) in batches {
        if rows.dim > MAX_DIM {
            decoded::axpy::<W>(rows, weights, outputs);
            continue;
        }
        match outputs.len() / rows.dim {
            1 => axpy_batch::<W, 1>(rows, weights, outputs),
            2 => axpy_batch::<W, 2>(rows, weights, outputs),
            3 => axpy_batch::<W, 3>(rows, weights, outputs),
            _ => axpy_batch::<W, 4>(rows, weights, outputs),
        }
    }
}

/// A few rows with their weights; what is missing to a whole tile has weight 0.
struct Tile<const Q: usize> {
    starts: [*const u8; TILE],
    count: usize,
    weights: [[f32; TILE]; Q],
}

/// Weights times scales, for every block of a row.
struct Scaled<const Q: usize> {
    /// Pairs of 16-bit integers for the rows `2 p` and `2 p + 1`.
    pairs: [[[MaybeUninit<__m256i>; TILE / 16]; Q]; MAX_DIM / BLOCK],
    /// What the integers must be multiplied with again.
    factors: [f32; Q],
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn axpy_batch<W: Whole, const Q: usize>(rows: &Rows<'_>, weights: &[f32], outputs: &mut [f32]) {
    for first in (0..rows.count).step_by(TILE) {
        let count = TILE.min(rows.count - first);
        let mut tile = Tile { starts: [std::ptr::null(); TILE], count, weights: [[0.0; TILE]; Q] };
        for (t, start) in tile.starts.iter_mut().enumerate() {
            let t = first + t.min(count - 1);
            // SAFETY: `Rows::check` proved that the row lies in the bytes.
            *start = unsafe { rows.bytes.as_ptr().add(t * rows.stride) };
        }
        for (q, weights) in weights.chunks_exact(rows.count).enumerate() {
            tile.weights[q][..count].copy_from_slice(&weights[first..first + count]);
        }
        let ahead = if first == 0 { rows.ahead } else { &[] };
        add_tile::<W, Q>(rows, &tile, ahead, outputs);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_tile<W: Whole, const Q: usize>(
    rows: &Rows<'_>,
    tile: &Tile<Q>,
    ahead: &[u8],
    outputs: &mut [f32],
) {
    let mut scaled = Scaled {
        pairs: [const { [const { [const { MaybeUninit::uninit() }; TILE / 16] }; Q] };
            MAX_DIM / BLOCK],
        factors: [0.0; Q],
    };
    // SAFETY: the rows of the tile have these blocks; outputs are `[Q, dim]`.
    unsafe {
        if !scale_weights::<W, Q>(rows, tile, &mut scaled) {
            for block in 0..rows.dim / BLOCK {
                add_exactly::<W, Q>(rows, tile, block, outputs);
            }
            return;
        }
        let mut ahead = Ahead::new(ahead, rows.dim / BLOCK * 2);
        for block in 0..rows.dim / BLOCK {
            let mut bias = [0.0; Q];
            if W::HAS_MINIMUM {
                bias = sum_minima::<W, Q>(rows, tile, block);
            }
            for half in 0..2 {
                ahead.fetch();
                let target = outputs.as_mut_ptr().add(block * BLOCK + half * 16);
                add_half::<W, Q>(rows, tile, &scaled, (block, half), &bias, target);
            }
        }
    }
}

/// Weights times the scales of all blocks as integers; `false` if integers cannot stand for them.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C; the rows of the tile have `dim / 32` blocks.
#[inline(always)]
unsafe fn scale_weights<W: Whole, const Q: usize>(
    rows: &Rows<'_>,
    tile: &Tile<Q>,
    scaled: &mut Scaled<Q>,
) -> bool {
    /// No sum over a tile may leave 32 bits.
    const fn limit(largest: i32) -> i32 {
        let limit = i32::MAX / (largest * TILE as i32);
        if limit < 32767 { limit } else { 32767 }
    }
    let blocks = match W::FACTOR {
        Factor::Block => rows.dim / BLOCK,
        Factor::One | Factor::Row => 1,
    };
    // Whole pairs of runs of eight rows.
    let runs = tile.count.div_ceil(16) * 2;
    // SAFETY: by contract; a tile has four runs.
    unsafe {
        let mut products =
            [const { [const { [const { MaybeUninit::uninit() }; TILE / 8] }; Q] }; MAX_DIM / BLOCK];
        let mut most = [_mm256_setzero_si256(); Q];
        for (block, products) in products[..blocks].iter_mut().enumerate() {
            for run in 0..runs {
                let starts = &*tile.starts.as_ptr().add(run * 8).cast::<[*const u8; 8]>();
                let scales = W::scales(rows, starts, block);
                for q in 0..Q {
                    let weights = _mm256_loadu_ps(tile.weights[q].as_ptr().add(run * 8));
                    let product = _mm256_mul_ps(weights, scales);
                    products[q][run].write(product);
                    // Magnitudes order like their bits, NaN above infinity.
                    let bits = _mm256_castps_si256(product);
                    let bits = _mm256_and_si256(bits, _mm256_set1_epi32(i32::MAX));
                    most[q] = _mm256_max_epi32(most[q], bits);
                }
            }
        }
        let limit = const { limit(W::LARGEST) } as f32;
        let mut inverse = [_mm256_setzero_ps(); Q];
        for q in 0..Q {
            let largest = largest_lane(most[q]);
            if largest == 0.0 {
                continue;
            }
            if !(largest > TINY && largest < HUGE) {
                return false;
            }
            scaled.factors[q] = largest / limit;
            inverse[q] = _mm256_set1_ps(limit / largest);
        }
        for (products, pairs) in products[..blocks].iter().zip(&mut scaled.pairs) {
            for q in 0..Q {
                for run in (0..runs).step_by(2) {
                    let low = _mm256_mul_ps(products[q][run].assume_init(), inverse[q]);
                    let high = _mm256_mul_ps(products[q][run + 1].assume_init(), inverse[q]);
                    pairs[q][run / 2].write(round_16(low, high));
                }
            }
        }
        true
    }
}

/// The largest of eight magnitudes given by their bits.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn largest_lane(bits: __m256i) -> f32 {
    // SAFETY: by contract.
    unsafe {
        let x = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256::<1>(bits));
        let x = _mm_max_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
        let x = _mm_max_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x));
        f32::from_bits(_mm_cvtsi128_si32(x) as u32)
    }
}

/// For each output, the sum of weights times minima.
///
/// # Safety
/// As for `scale_weights`.
#[inline(always)]
unsafe fn sum_minima<W: Whole, const Q: usize>(
    rows: &Rows<'_>,
    tile: &Tile<Q>,
    block: usize,
) -> [f32; Q] {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [_mm256_setzero_ps(); Q];
        for run in 0..tile.count.div_ceil(8) {
            let starts = &*tile.starts.as_ptr().add(run * 8).cast::<[*const u8; 8]>();
            let minima = W::minima(rows, starts, block);
            for q in 0..Q {
                let weights = _mm256_loadu_ps(tile.weights[q].as_ptr().add(run * 8));
                sums[q] = _mm256_fmadd_ps(weights, minima, sums[q]);
            }
        }
        let mut bias = [0.0; Q];
        for q in 0..Q {
            bias[q] = sum_lanes(sums[q]);
        }
        bias
    }
}

/// Adds 16 channels of the rows of a tile.
///
/// # Safety
/// The CPU has AVX2 and FMA; `target` is where the channels are in the first of `Q` outputs, which
/// are `dim` apart.
#[inline(always)]
unsafe fn add_half<W: Whole, const Q: usize>(
    rows: &Rows<'_>,
    tile: &Tile<Q>,
    scaled: &Scaled<Q>,
    (block, half): (usize, usize),
    bias: &[f32; Q],
    target: *mut f32,
) {
    // SAFETY: by contract. Rows beyond the last repeat it with weight 0.
    unsafe {
        let mut sums = [[_mm256_setzero_si256(); 2]; Q];
        let block_of_weights = if W::FACTOR == Factor::Block { block } else { 0 };
        let pairs = scaled.pairs.as_ptr().add(block_of_weights).cast::<[i32; TILE / 2]>();
        for pair in 0..tile.count.div_ceil(2) {
            let even = W::half(rows, *tile.starts.get_unchecked(2 * pair), block, half);
            let odd = W::half(rows, *tile.starts.get_unchecked(2 * pair + 1), block, half);
            let low = _mm256_unpacklo_epi16(even, odd);
            let high = _mm256_unpackhi_epi16(even, odd);
            for q in 0..Q {
                let weights = _mm256_set1_epi32(*(*pairs.add(q)).as_ptr().add(pair));
                sums[q][0] = _mm256_add_epi32(sums[q][0], _mm256_madd_epi16(low, weights));
                sums[q][1] = _mm256_add_epi32(sums[q][1], _mm256_madd_epi16(high, weights));
            }
        }
        for q in 0..Q {
            let [low, high] = sums[q];
            let factor = _mm256_set1_ps(scaled.factors[q]);
            let bias = _mm256_set1_ps(bias[q]);
            // Unpacking works in halves of 128 bits: put the quarters back in order.
            let parts = [
                _mm256_permute2x128_si256::<0x20>(low, high),
                _mm256_permute2x128_si256::<0x31>(low, high),
            ];
            for (i, part) in parts.into_iter().enumerate() {
                let target = target.add(q * rows.dim + 8 * i);
                let old = _mm256_add_ps(_mm256_loadu_ps(target), bias);
                _mm256_storeu_ps(target, _mm256_fmadd_ps(_mm256_cvtepi32_ps(part), factor, old));
            }
        }
    }
}

/// Adds a block of the rows of a tile without rounding weights.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C; the rows of the tile have the block.
#[cold]
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_exactly<W: Whole, const Q: usize>(
    rows: &Rows<'_>,
    tile: &Tile<Q>,
    block: usize,
    outputs: &mut [f32],
) {
    for t in 0..tile.count {
        let mut values = [0i16; BLOCK];
        let (mut scale, mut minimum) = ([0.0; 8], [0.0; 8]);
        // SAFETY: by contract.
        unsafe {
            let row = tile.starts[t];
            for half in 0..2 {
                let target = values.as_mut_ptr().add(16 * half);
                _mm256_storeu_si256(target.cast(), W::half(rows, row, block, half));
            }
            _mm256_storeu_ps(scale.as_mut_ptr(), W::scale(rows, row, block));
            _mm256_storeu_ps(minimum.as_mut_ptr(), W::minimum(rows, row, block));
        }
        for (q, output) in outputs.chunks_exact_mut(rows.dim).enumerate() {
            for (x, value) in output[block * BLOCK..].iter_mut().zip(values) {
                *x += tile.weights[q][t] * (f32::from(value) * scale[0] + minimum[0]);
            }
        }
    }
}
