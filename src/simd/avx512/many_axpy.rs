//! Weighted sums of rows of integers for many outputs: a product of matrices. 32 rows are unpacked once;
//! then eight outputs at a time meet them.

#![expect(clippy::needless_range_loop, reason = "indices into two register arrays at once")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::integer::{MAX_DIM, Padded, factor_of, limit, multiply_add};
use super::math::{LANES, mask, sum_each};
use super::words::Words;
use crate::simd::ahead::Ahead;
use crate::simd::avx2::{Factor, HUGE};
use crate::simd::rows::{BLOCK, Format, RowKernels, Rows};

/// Outputs of a batch.
const BATCH: usize = 8;

/// Rows whose weights share a scale.
const TILE: usize = 32;

/// Most blocks of a row.
const BLOCKS: usize = MAX_DIM / BLOCK;

/// `R` times 16 rows. What is missing to them repeats the last row, with weight 0.
struct Tile<'a, const R: usize> {
    first: usize,
    count: usize,
    /// From the first row of the tile on; those of the next output are `rows.count` further.
    weights: &'a [f32],
    /// The largest integer that may stand for a weight.
    limit: f32,
    /// For each block, pairs of rows in the order of [`pack`], a channel in each lane.
    words: [[MaybeUninit<[__m512i; 2]>; TILE / 2]; BLOCKS],
    /// For each block that has scales of its own.
    scales: [MaybeUninit<[__m512; R]>; BLOCKS],
    /// The largest magnitude of the scales of each row.
    largest: [__m512; R],
    /// For each block, if the format has minima.
    minima: [MaybeUninit<[__m512; R]>; BLOCKS],
}

/// Weights times scales of a batch: for each block and output, pairs of 16-bit integers for two rows.
#[repr(align(64))]
struct Scaled {
    pairs: [[MaybeUninit<[i32; LANES]>; BATCH]; BLOCKS],
    /// What the integers must be multiplied with again.
    factors: [f32; BATCH],
}

/// `outputs[q] += sum over t of weights[q, t] * rows[t]`; `plain` takes what integers cannot.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")]
pub(super) fn axpy<F: Words>(
    (format, plain): (Format, &RowKernels),
    rows: &Rows<'_>,
    weights: &[f32],
    outputs: &mut [f32],
) {
    for first in (0..rows.count).step_by(TILE) {
        let count = TILE.min(rows.count - first);
        if count > LANES {
            add_tile::<F, 2>((format, plain), rows, (first, count), weights, outputs);
        } else {
            add_tile::<F, 1>((format, plain), rows, (first, count), weights, outputs);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")]
fn add_tile<F: Words, const R: usize>(
    (format, plain): (Format, &RowKernels),
    rows: &Rows<'_>,
    (first, count): (usize, usize),
    weights: &[f32],
    outputs: &mut [f32],
) {
    let mut tile = Tile::<R> {
        first,
        count,
        weights: &weights[first..],
        limit: const { limit(F::LARGEST, TILE as i32) },
        words: [const { [const { MaybeUninit::uninit() }; TILE / 2] }; BLOCKS],
        scales: [const { MaybeUninit::uninit() }; BLOCKS],
        largest: [_mm512_setzero_ps(); R],
        minima: [const { MaybeUninit::uninit() }; BLOCKS],
    };
    // SAFETY: the rows of the tile have these blocks; outputs are `[n, dim]`, weights `[n, count]`.
    unsafe {
        tile.unpack::<F>(format, rows);
        match (F::FACTOR == Factor::Block, F::HAS_MINIMUM) {
            (true, true) => tile.add_all::<true, true>(plain, rows, outputs),
            (true, false) => tile.add_all::<true, false>(plain, rows, outputs),
            (false, true) => tile.add_all::<false, true>(plain, rows, outputs),
            (false, false) => tile.add_all::<false, false>(plain, rows, outputs),
        }
    }
}

/// Adds the rows of a tile to one output without rounding weights.
#[cold]
#[inline(never)]
fn add_plainly<const R: usize>(
    plain: &RowKernels,
    rows: &Rows<'_>,
    tile: &Tile<'_, R>,
    q: usize,
    output: &mut [f32],
) {
    let some = Rows { bytes: rows.row(tile.first), count: tile.count, ahead: &[], ..*rows };
    (plain.axpy)(&some, &tile.weights[q * rows.count..][..tile.count], output);
}

impl<const R: usize> Tile<'_, R> {
    /// # Safety
    /// The CPU has the features of `axpy`; the rows of the tile are rows of this format.
    #[inline(always)]
    unsafe fn unpack<F: Words>(&mut self, format: Format, rows: &Rows<'_>) {
        let blocks = rows.dim / BLOCK;
        let mut copies = MaybeUninit::uninit();
        let padded = Padded::new(format, rows, (self.first, self.count), &mut copies);
        let ahead = if self.first == 0 { rows.ahead } else { &[] };
        let mut ahead = Ahead::new(ahead, R * LANES / 2);
        // SAFETY: by contract.
        unsafe {
            for place in 0..R * LANES / 2 {
                ahead.fetch();
                let even = row_of_place::<R>(place);
                let at = |t: usize| padded.whole.at(t.min(self.count - 1), 0);
                let (even, odd) = (at(even), at(even + 1));
                for block in 0..blocks {
                    self.words[block][place].write(F::pair(rows, even, odd, block));
                }
            }
            for run in 0..R {
                let lanes = padded.lanes(run * LANES);
                for block in 0..blocks {
                    if F::FACTOR == Factor::Block || block == 0 {
                        let scales = F::scales_of_16(rows, lanes, block);
                        let magnitude = _mm512_abs_ps(scales);
                        // Magnitudes order like their bits, NaN above infinity.
                        self.largest[run] = _mm512_castsi512_ps(_mm512_max_epi32(
                            _mm512_castps_si512(self.largest[run]),
                            _mm512_castps_si512(magnitude),
                        ));
                        self.scales[block].as_mut_ptr().cast::<__m512>().add(run).write(scales);
                    }
                    if F::HAS_MINIMUM {
                        let minima = F::minima_of_16(rows, lanes, block);
                        self.minima[block].as_mut_ptr().cast::<__m512>().add(run).write(minima);
                    }
                }
            }
        }
    }

    /// The weights of an output.
    ///
    /// # Safety
    /// The CPU has AVX-512 F; weights are those of this tile.
    #[inline(always)]
    unsafe fn weights_of(&self, rows: &Rows<'_>, q: usize) -> [__m512; R] {
        // SAFETY: by contract; only weights of rows of the tile are read.
        unsafe {
            let mut weights = [_mm512_setzero_ps(); R];
            for run in 0..R {
                let mask = mask(self.count.saturating_sub(run * LANES));
                let at = self.weights.as_ptr().wrapping_add(q * rows.count + run * LANES);
                weights[run] = _mm512_maskz_loadu_ps(mask, at);
            }
            weights
        }
    }

    /// Adds the tile to all outputs. From here on code is the same for all formats with scales for each
    /// block (`B`) or for each row, and with or without minima (`M`).
    ///
    /// # Safety
    /// The CPU has the features of `axpy`; the tile is unpacked; there are weights for the outputs.
    #[inline(never)]
    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni"
    )]
    unsafe fn add_all<const B: bool, const M: bool>(
        &self,
        plain: &RowKernels,
        rows: &Rows<'_>,
        outputs: &mut [f32],
    ) {
        let n = outputs.len() / rows.dim;
        let mut q = 0;
        while q < n {
            // SAFETY: by contract.
            let some = unsafe {
                let target = outputs.as_mut_ptr().add(q * rows.dim);
                match n - q {
                    BATCH.. => self.add::<BATCH, B, M>(rows, q, target).then_some(BATCH),
                    4.. => self.add::<4, B, M>(rows, q, target).then_some(4),
                    _ => self.add::<1, B, M>(rows, q, target).then_some(1),
                }
            };
            if some.is_none() {
                add_plainly(plain, rows, self, q, &mut outputs[q * rows.dim..][..rows.dim]);
            }
            q += some.unwrap_or(1);
        }
    }

    /// Adds the tile to `N` outputs from `q` on, which are at `target`; `false` if nothing was done
    /// because integers cannot stand for the weights of one.
    ///
    /// # Safety
    /// As for `add_all`; there are `N` outputs.
    #[inline(always)]
    unsafe fn add<const N: usize, const B: bool, const M: bool>(
        &self,
        rows: &Rows<'_>,
        q: usize,
        target: *mut f32,
    ) -> bool {
        let mut scaled = Scaled {
            pairs: [const { [const { MaybeUninit::uninit() }; BATCH] }; BLOCKS],
            factors: [0.0; BATCH],
        };
        // SAFETY: by contract.
        unsafe {
            for n in 0..N {
                if !self.scale_weights::<B>(rows, q + n, n, &mut scaled) {
                    return false;
                }
            }
            for block in 0..rows.dim / BLOCK {
                let bias = if M { self.sum_minima::<N>(rows, q, block) } else { [0.0; LANES] };
                let target = target.add(block * BLOCK);
                self.add_block::<N, B, M>(rows, (block, &bias), &scaled, target);
            }
        }
        true
    }

    /// Weights of output `q` times the scales of all blocks as integers, in place `n` of a batch;
    /// `false` if integers cannot stand for them.
    ///
    /// # Safety
    /// As for `add`.
    #[inline(always)]
    unsafe fn scale_weights<const B: bool>(
        &self,
        rows: &Rows<'_>,
        q: usize,
        n: usize,
        scaled: &mut Scaled,
    ) -> bool {
        let blocks = if B { rows.dim / BLOCK } else { 1 };
        // SAFETY: by contract.
        unsafe {
            let mut weights = self.weights_of(rows, q);
            let mut most = _mm512_setzero_si512();
            for run in 0..R {
                let magnitude = _mm512_abs_ps(_mm512_mul_ps(weights[run], self.largest[run]));
                most = _mm512_max_epi32(most, _mm512_castps_si512(magnitude));
            }
            let largest = f32::from_bits(_mm512_reduce_max_epi32(most) as u32);
            let mut inverse = 0.0;
            if largest != 0.0 {
                let Some((factor, reciprocal)) = factor_of(largest, self.limit) else {
                    return false;
                };
                (scaled.factors[n], inverse) = (factor, reciprocal);
            }
            // A weight may be large where its scale is small.
            let mut fits = u16::MAX;
            for weight in &mut weights {
                *weight = _mm512_mul_ps(*weight, _mm512_set1_ps(inverse));
                let magnitude = _mm512_abs_ps(*weight);
                fits &= _mm512_cmp_ps_mask::<_CMP_LT_OQ>(magnitude, _mm512_set1_ps(HUGE));
            }
            if fits != u16::MAX {
                return false;
            }
            for block in 0..blocks {
                let scales = self.scales.get_unchecked(block).assume_init_ref();
                let target = scaled.pairs.get_unchecked_mut(block)[n].as_mut_ptr();
                pack::<R>(&weights, scales, target.cast());
            }
        }
        true
    }

    /// For each of `N` outputs, the sum of weights times minima.
    ///
    /// # Safety
    /// As for `add`.
    #[inline(always)]
    unsafe fn sum_minima<const N: usize>(
        &self,
        rows: &Rows<'_>,
        q: usize,
        block: usize,
    ) -> [f32; LANES] {
        // SAFETY: by contract.
        unsafe {
            let minima = self.minima.get_unchecked(block).assume_init_ref();
            let mut sums = [_mm512_setzero_ps(); LANES];
            for n in 0..N {
                for (weights, minima) in self.weights_of(rows, q + n).into_iter().zip(minima) {
                    sums[n] = _mm512_fmadd_ps(weights, *minima, sums[n]);
                }
            }
            let mut bias = [0.0; LANES];
            _mm512_storeu_ps(bias.as_mut_ptr(), sum_each(sums));
            bias
        }
    }

    /// Adds a block of the rows to `N` outputs.
    ///
    /// # Safety
    /// As for `add`; `target` is where the block is in the first of the outputs.
    #[inline(always)]
    unsafe fn add_block<const N: usize, const B: bool, const M: bool>(
        &self,
        rows: &Rows<'_>,
        (block, bias): (usize, &[f32; LANES]),
        scaled: &Scaled,
        target: *mut f32,
    ) {
        // SAFETY: by contract.
        unsafe {
            let mut sums = [[_mm512_setzero_si512(); 2]; N];
            let with_scales = if B { block } else { 0 };
            let pairs = scaled.pairs.get_unchecked(with_scales).as_ptr().cast::<i32>();
            let words = self.words.get_unchecked(block);
            for place in 0..R * LANES / 2 {
                let x = words[place].assume_init();
                for n in 0..N {
                    let y = _mm512_set1_epi32(*pairs.add(n * LANES + place));
                    for half in 0..2 {
                        sums[n][half] = multiply_add(sums[n][half], x[half], y);
                    }
                }
            }
            for n in 0..N {
                let factor = _mm512_set1_ps(scaled.factors[n]);
                for half in 0..2 {
                    let target = target.add(n * rows.dim + half * LANES);
                    let mut old = _mm512_loadu_ps(target);
                    if M {
                        old = _mm512_add_ps(old, _mm512_set1_ps(bias[n]));
                    }
                    let sum = _mm512_cvtepi32_ps(sums[n][half]);
                    _mm512_storeu_ps(target, _mm512_fmadd_ps(sum, factor, old));
                }
            }
        }
    }
}

/// The even row of the pair that [`pack`] puts in a place.
const fn row_of_place<const R: usize>(place: usize) -> usize {
    match R {
        1 => 2 * place,
        _ => place / 4 * 4 + place % 2 * 2 + place / 2 % 2 * LANES,
    }
}

/// Writes products of weights and scales, rounded to pairs of 16-bit integers.
///
/// # Safety
/// The CPU has AVX-512 F and BW; there is room for a pair of each two rows.
#[inline(always)]
unsafe fn pack<const R: usize>(weights: &[__m512; R], scales: &[__m512; R], target: *mut __m512i) {
    // SAFETY: by contract.
    unsafe {
        let first = _mm512_cvtps_epi32(_mm512_mul_ps(weights[0], scales[0]));
        if R == 1 {
            _mm256_storeu_si256(target.cast(), _mm512_cvtepi32_epi16(first));
            return;
        }
        let second = _mm512_cvtps_epi32(_mm512_mul_ps(weights[R - 1], scales[R - 1]));
        _mm512_storeu_si512(target, _mm512_packs_epi32(first, second));
    }
}
