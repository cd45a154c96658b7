//! Weighted sums of rows of integers, two rows at a time: see [`super::integer`].

#![expect(clippy::needless_range_loop, reason = "indices into two register arrays at once")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::integer::{BATCH, MAX_DIM, Padded, factor_of, limit};
use super::many_axpy;
use super::many_dot::MANY;
use super::math::{LANES, mask, sum_each};
use super::words::Words;
use crate::simd::ahead::Ahead;
use crate::simd::avx2::Factor;
use crate::simd::rows::{BLOCK, Format, RowKernels, Rows};

/// Rows whose weights share a scale.
const TILE: usize = 32;

/// `outputs[q] += sum over t of weights[q, t] * rows[t]`; `plain` takes what integers cannot.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")]
pub(super) fn axpy<W: Words>(
    (format, plain): (Format, &RowKernels),
    rows: &Rows<'_>,
    weights: &[f32],
    outputs: &mut [f32],
) {
    let count = rows.count;
    if count == 0 {
        return;
    }
    if rows.dim > MAX_DIM {
        return (plain.axpy)(rows, weights, outputs);
    }
    if outputs.len() / rows.dim >= MANY {
        return many_axpy::axpy::<W>((format, plain), rows, weights, outputs);
    }
    let batches = weights.chunks(BATCH * count).zip(outputs.chunks_mut(BATCH * rows.dim));
    for (weights, outputs) in batches {
        for first in (0..count).step_by(TILE) {
            let count = TILE.min(count - first);
            let mut copies = MaybeUninit::uninit();
            let padded = Padded::new(format, rows, (first, count), &mut copies);
            let tile = Tile { first, count, padded, weights: &weights[first..] };
            match outputs.len() / rows.dim {
                1 => add_tile::<W, 1>(plain, rows, &tile, outputs),
                2 => add_tile::<W, 2>(plain, rows, &tile, outputs),
                3 => add_tile::<W, 3>(plain, rows, &tile, outputs),
                _ => add_tile::<W, 4>(plain, rows, &tile, outputs),
            }
        }
    }
}

/// A few rows with their weights. What is missing to a whole run of 16 repeats the last row, with
/// weight 0.
struct Tile<'a> {
    first: usize,
    count: usize,
    padded: Padded,
    /// From the first row of the tile on; those of the next output are `rows.count` further.
    weights: &'a [f32],
}

impl Tile<'_> {
    /// The weights of rows `16 * run..16 * run + 16` for an output.
    ///
    /// # Safety
    /// The CPU has AVX-512 F; weights are those of this tile.
    #[inline(always)]
    unsafe fn weights_of(&self, rows: &Rows<'_>, q: usize, run: usize) -> __m512 {
        let mask = mask(self.count.saturating_sub(run * LANES));
        let at = self.weights.as_ptr().wrapping_add(q * rows.count + run * LANES);
        // SAFETY: by contract; only weights of rows of the tile are read.
        unsafe { _mm512_maskz_loadu_ps(mask, at) }
    }
}

/// Weights times scales of the rows of a tile, for every block of a row that has scales of its own.
struct Scaled<const Q: usize> {
    /// Pairs of 16-bit integers for the rows `2 p` and `2 p + 1`.
    pairs: [[[MaybeUninit<i32>; TILE / 2]; Q]; MAX_DIM / BLOCK],
    /// What the integers must be multiplied with again.
    factors: [f32; Q],
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")]
fn add_tile<W: Words, const Q: usize>(
    plain: &RowKernels,
    rows: &Rows<'_>,
    tile: &Tile<'_>,
    outputs: &mut [f32],
) {
    let mut scaled = Scaled {
        pairs: [const { [const { [const { MaybeUninit::uninit() }; TILE / 2] }; Q] };
            MAX_DIM / BLOCK],
        factors: [0.0; Q],
    };
    // SAFETY: the rows of the tile have these blocks; outputs are `[Q, dim]`.
    unsafe {
        if !scale_weights::<W, Q>(rows, tile, &mut scaled) {
            return add_plainly::<Q>(plain, rows, tile, outputs);
        }
        let blocks = rows.dim / BLOCK;
        let ahead = if tile.first == 0 { rows.ahead } else { &[] };
        let mut ahead = Ahead::new(ahead, blocks * tile.count.div_ceil(2));
        for block in 0..blocks {
            let bias =
                if W::HAS_MINIMUM { sum_minima::<W, Q>(rows, tile, block) } else { [0.0; Q] };
            let target = outputs.as_mut_ptr().add(block * BLOCK);
            add_block::<W, Q>(rows, tile, &scaled, block, &bias, target, &mut ahead);
        }
    }
}

/// Adds the rows of a tile without rounding weights.
#[cold]
#[inline(never)]
fn add_plainly<const Q: usize>(
    plain: &RowKernels,
    rows: &Rows<'_>,
    tile: &Tile<'_>,
    outputs: &mut [f32],
) {
    let some = Rows { bytes: rows.row(tile.first), count: tile.count, ahead: &[], ..*rows };
    for (q, output) in outputs.chunks_exact_mut(rows.dim).enumerate() {
        (plain.axpy)(&some, &tile.weights[q * rows.count..][..tile.count], output);
    }
}

/// Weights times the scales of all blocks as integers; `false` if integers cannot stand for them.
///
/// # Safety
/// The CPU has the features of `axpy`; the rows of the tile have `dim / 32` blocks.
#[inline(always)]
unsafe fn scale_weights<W: Words, const Q: usize>(
    rows: &Rows<'_>,
    tile: &Tile<'_>,
    scaled: &mut Scaled<Q>,
) -> bool {
    const RUNS: usize = TILE / LANES;
    let blocks = if W::FACTOR == Factor::Block { rows.dim / BLOCK } else { 1 };
    let runs = tile.count.div_ceil(LANES);
    // SAFETY: by contract.
    unsafe {
        let mut products = [[[MaybeUninit::<__m512>::uninit(); RUNS]; Q]; MAX_DIM / BLOCK];
        let mut most = [_mm512_setzero_si512(); Q];
        for run in 0..runs {
            let mut weights = [_mm512_setzero_ps(); Q];
            for q in 0..Q {
                weights[q] = tile.weights_of(rows, q, run);
            }
            for block in 0..blocks {
                let scales = W::scales_of_16(rows, tile.padded.lanes(run * LANES), block);
                for q in 0..Q {
                    let product = _mm512_mul_ps(weights[q], scales);
                    products[block][q][run].write(product);
                    // Magnitudes order like their bits, NaN above infinity.
                    let bits = _mm512_castps_si512(product);
                    let bits = _mm512_and_si512(bits, _mm512_set1_epi32(i32::MAX));
                    most[q] = _mm512_max_epi32(most[q], bits);
                }
            }
        }
        let limit = const { limit(W::LARGEST, TILE as i32) };
        let mut inverse = [_mm512_setzero_ps(); Q];
        for q in 0..Q {
            let largest = f32::from_bits(_mm512_reduce_max_epi32(most[q]) as u32);
            if largest == 0.0 {
                continue;
            }
            let Some((factor, reciprocal)) = factor_of(largest, limit) else { return false };
            scaled.factors[q] = factor;
            inverse[q] = _mm512_set1_ps(reciprocal);
        }
        for block in 0..blocks {
            for q in 0..Q {
                for run in 0..runs {
                    let product = _mm512_mul_ps(products[block][q][run].assume_init(), inverse[q]);
                    let words = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(product));
                    let target = scaled.pairs[block][q].as_mut_ptr().add(run * LANES / 2);
                    _mm256_storeu_si256(target.cast(), words);
                }
            }
        }
        true
    }
}

/// For each output, the sum of weights times minima.
///
/// # Safety
/// As for `scale_weights`.
#[inline(always)]
unsafe fn sum_minima<W: Words, const Q: usize>(
    rows: &Rows<'_>,
    tile: &Tile<'_>,
    block: usize,
) -> [f32; Q] {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); LANES];
        for run in 0..tile.count.div_ceil(LANES) {
            let minima = W::minima_of_16(rows, tile.padded.lanes(run * LANES), block);
            for q in 0..Q {
                sums[q] = _mm512_fmadd_ps(tile.weights_of(rows, q, run), minima, sums[q]);
            }
        }
        let mut bias = [0.0; LANES];
        _mm512_storeu_ps(bias.as_mut_ptr(), sum_each(sums));
        let mut some = [0.0; Q];
        some.copy_from_slice(&bias[..Q]);
        some
    }
}

/// Adds a block of the rows of a tile.
///
/// # Safety
/// The CPU has the features of `axpy`; `target` is where the block is in the first of `Q` outputs,
/// which are `dim` apart.
#[inline(always)]
unsafe fn add_block<W: Words, const Q: usize>(
    rows: &Rows<'_>,
    tile: &Tile<'_>,
    scaled: &Scaled<Q>,
    block: usize,
    bias: &[f32; Q],
    target: *mut f32,
    ahead: &mut Ahead,
) {
    // SAFETY: by contract. Rows beyond the last repeat it with weight 0.
    unsafe {
        let mut sums = [[_mm512_setzero_si512(); 2]; Q];
        let with_scales = if W::FACTOR == Factor::Block { block } else { 0 };
        let pairs = scaled.pairs.get_unchecked(with_scales);
        for pair in 0..tile.count.div_ceil(2) {
            ahead.fetch();
            let even = tile.padded.whole.at(2 * pair, 0);
            let odd = tile.padded.whole.at((2 * pair + 1).min(tile.count - 1), 0);
            let words = W::pair(rows, even, odd, block);
            for q in 0..Q {
                let weights = _mm512_set1_epi32(pairs[q].get_unchecked(pair).assume_init());
                for half in 0..2 {
                    sums[q][half] = _mm512_dpwssd_epi32(sums[q][half], words[half], weights);
                }
            }
        }
        for q in 0..Q {
            let factor = _mm512_set1_ps(scaled.factors[q]);
            for half in 0..2 {
                let target = target.add(q * rows.dim + half * LANES);
                let old = _mm512_add_ps(_mm512_loadu_ps(target), _mm512_set1_ps(bias[q]));
                let sum = _mm512_cvtepi32_ps(sums[q][half]);
                _mm512_storeu_ps(target, _mm512_fmadd_ps(sum, factor, old));
            }
        }
    }
}
