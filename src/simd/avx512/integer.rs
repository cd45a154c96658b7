//! Loops over rows of small integers, in 16-bit arithmetic: two products, their sum and its sum with
//! 32-bit integers are one instruction.
//!
//! Queries, and weights times scales, become 16-bit integers of a common scale. What that rounds
//! away is 2^-15 of the largest query or weight, far below the error of any format that is stored so.
//!
//! ```text
//! dot    16 rows at a time, a row in each lane: no sum across lanes, scales of 16 rows in one vector
//! axpy   pairs of rows, a channel in each lane: output[c] += weight[t] * x[t, c] + weight[t + 1] * ...
//! ```
//!
//! Queries or weights that are not finite, or too large or small for it, take the float loops of the
//! AVX2 level.

#![expect(clippy::needless_range_loop, reason = "indices into two register arrays at once")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::math::{Ahead, LANES, mask, sum_each};
use super::turn::{Lanes, turn_quarters};
use super::words::Words;
use crate::simd::avx2::{Factor, HUGE, TINY};
use crate::simd::rows::{BLOCK, Format, RowKernels, Rows};

/// Queries or outputs of a batch.
const BATCH: usize = 4;

/// Rows whose weights share a scale.
const TILE: usize = 32;

/// Elements of the widest row that has room on the stack.
const MAX_DIM: usize = 512;

/// Bytes of the longest of these rows.
const MAX_ROW: usize = MAX_DIM / BLOCK * 36;

/// Pairs of words of a block.
const PAIRS: usize = BLOCK / 2;

/// `scores[q, t] = queries[q] . rows[t]`; `plain` takes what integers cannot.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")]
pub(super) fn dot<W: Words>(
    (format, plain): (Format, &RowKernels),
    rows: &Rows<'_>,
    queries: &[f32],
    scores: &mut [f32],
) {
    if rows.count == 0 {
        return;
    }
    let batches = queries.chunks(BATCH * rows.dim).zip(scores.chunks_mut(BATCH * rows.count));
    for (queries, scores) in batches {
        let done = rows.dim <= MAX_DIM
            && match queries.len() / rows.dim {
                1 => dot_batch::<W, 1>(format, rows, queries, scores),
                2 => dot_batch::<W, 2>(format, rows, queries, scores),
                3 => dot_batch::<W, 3>(format, rows, queries, scores),
                _ => dot_batch::<W, 4>(format, rows, queries, scores),
            };
        if !done {
            (plain.dot)(rows, queries, scores);
        }
    }
}

/// Up to four queries as integers; what is missing is 0.
struct Queries {
    /// For each block, pairs of words in the order of `Words::columns`, one for each query.
    integers: [MaybeUninit<[[i32; BATCH]; PAIRS]>; MAX_DIM / BLOCK],
    /// For each block, the sum of the integers.
    sums: [MaybeUninit<[i32; BATCH]>; MAX_DIM / BLOCK],
    /// What the integers must be multiplied with again.
    factors: [f32; BATCH],
}

impl Queries {
    /// `false` if integers cannot stand for a query.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn fill<W: Words, const Q: usize>(&mut self, dim: usize, queries: &[f32]) -> bool {
        let limit = const { limit(W::LARGEST, BLOCK as i32) };
        let mut inverse = [_mm512_setzero_ps(); Q];
        for (q, query) in queries.chunks_exact(dim).enumerate().take(Q) {
            let Some((factor, reciprocal)) = factor_of(largest(query), limit) else { return false };
            self.factors[q] = factor;
            inverse[q] = _mm512_set1_ps(reciprocal);
        }
        // SAFETY: queries are `[Q, dim]`, a block is two vectors, and an order has 32 words.
        unsafe {
            let order = _mm512_loadu_si512(const { turned(W::ORDER) }.as_ptr().cast());
            for block in 0..dim / BLOCK {
                let mut words = [_mm512_setzero_si512(); BATCH];
                for q in 0..Q {
                    let at = queries.as_ptr().add(q * dim + block * BLOCK);
                    let low = _mm512_mul_ps(_mm512_loadu_ps(at), inverse[q]);
                    let high = _mm512_mul_ps(_mm512_loadu_ps(at.add(LANES)), inverse[q]);
                    words[q] = _mm512_permutexvar_epi16(order, round_16(low, high));
                }
                let words = turn_quarters(words);
                let target = self.integers[block].as_mut_ptr().cast::<__m512i>();
                for (i, words) in words.into_iter().enumerate() {
                    _mm512_storeu_si512(target.add(i), words);
                }
                if W::OFFSET != 0 || W::HAS_MINIMUM {
                    let target = self.sums[block].as_mut_ptr();
                    _mm_storeu_si128(target.cast(), sum_words(words));
                }
            }
        }
        true
    }
}

/// The order that [`turn_quarters`] makes into `order`: its vector `i` has the elements `4 j + i`.
const fn turned(order: [u16; BLOCK]) -> [u16; BLOCK] {
    let mut before = [0; BLOCK];
    let mut i = 0;
    while i < BLOCK {
        let pair = i / 2;
        before[2 * (pair % 4 * 4 + pair / 4) + i % 2] = order[i];
        i += 1;
    }
    before
}

/// For each lane of a quarter, the sum of its words in all quarters and vectors.
///
/// # Safety
/// The CPU has AVX-512 F and BW.
#[inline(always)]
unsafe fn sum_words(words: [__m512i; 4]) -> __m128i {
    // SAFETY: by contract.
    unsafe {
        let ones = _mm512_set1_epi16(1);
        let mut sum = _mm512_setzero_si512();
        for words in words {
            sum = _mm512_add_epi32(sum, _mm512_madd_epi16(words, ones));
        }
        let half = _mm512_extracti64x4_epi64::<1>(sum);
        let sum = _mm256_add_epi32(_mm512_castsi512_si256(sum), half);
        _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum))
    }
}

/// The largest factor of integers up to `largest` with which no sum of `count` products leaves 32 bits.
const fn limit(largest: i32, count: i32) -> f32 {
    let limit = i32::MAX / (largest * count);
    if limit < 32767 { limit as f32 } else { 32767.0 }
}

/// `largest` over `limit`, and its reciprocal, if integers can stand for values up to `largest`.
#[inline(always)]
fn factor_of(largest: f32, limit: f32) -> Option<(f32, f32)> {
    (largest > TINY && largest < HUGE).then(|| (largest / limit, limit / largest))
}

/// The largest magnitude; magnitudes order like their bits, NaN above infinity.
#[inline]
#[target_feature(enable = "avx512f")]
fn largest(values: &[f32]) -> f32 {
    let mut most = _mm512_setzero_si512();
    for x in values.as_chunks::<LANES>().0 {
        // SAFETY: a vector of values.
        let bits = unsafe { _mm512_loadu_si512(x.as_ptr().cast()) };
        most = _mm512_max_epi32(most, _mm512_and_si512(bits, _mm512_set1_epi32(i32::MAX)));
    }
    f32::from_bits(_mm512_reduce_max_epi32(most) as u32)
}

/// Two vectors rounded to integers of 16 bits, in order.
///
/// # Safety
/// The CPU has AVX-512 F and BW.
#[inline(always)]
unsafe fn round_16(low: __m512, high: __m512) -> __m512i {
    // SAFETY: by contract.
    unsafe {
        let low = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(low));
        let high = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(high));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
    }
}

/// `false` if nothing was done because integers cannot stand for a query.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")]
fn dot_batch<W: Words, const Q: usize>(
    format: Format,
    rows: &Rows<'_>,
    queries: &[f32],
    scores: &mut [f32],
) -> bool {
    let count = rows.count;
    let mut prepared = Queries {
        integers: [const { MaybeUninit::uninit() }; MAX_DIM / BLOCK],
        sums: [const { MaybeUninit::uninit() }; MAX_DIM / BLOCK],
        factors: [0.0; BATCH],
    };
    if !prepared.fill::<W, Q>(rows.dim, queries) {
        return false;
    }
    let mut copies = MaybeUninit::uninit();
    let padded = Padded::new(format, rows, (0, count), &mut copies);
    let mut ahead = Ahead::new(rows.ahead, count.div_ceil(LANES));
    for first in (0..count).step_by(LANES) {
        ahead.fetch();
        let lanes = padded.lanes(first);
        // SAFETY: `Rows::check` proved that these rows lie in the bytes; scores are `[Q, count]`.
        unsafe {
            let sums = dot_lanes::<W, Q>(rows, lanes, &prepared);
            for q in 0..Q {
                let sum = _mm512_mul_ps(sums[q], _mm512_set1_ps(prepared.factors[q]));
                let target = scores.as_mut_ptr().add(q * count + first);
                _mm512_mask_storeu_ps(target, mask(count - first), sum);
            }
        }
    }
    true
}

/// Adds products of pairs of words to `Q` sums: of `a`, and of one pair for each sum, the same in
/// every lane. The intrinsic would be taken apart into a product and a sum, with two registers for
/// what here is an address.
///
/// # Safety
/// `b` points to `Q` pairs of words; `Q` is at most 4.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn add_products<const Q: usize>(sums: &mut [__m512i; Q], a: __m512i, b: *const i32) {
    macro_rules! products {
        ($($name:ident $i:literal $line:literal)*) => {
            std::arch::asm!(
                $($line,)* $($name = inout(zmm_reg) sums[$i],)* a = in(zmm_reg) a, b = in(reg) b,
                options(pure, readonly, nostack, preserves_flags)
            )
        };
    }
    // SAFETY: by contract.
    unsafe {
        match Q {
            1 => products!(p 0 "vpdpwssd {p}, {a}, dword ptr [{b}]{{1to16}}"),
            2 => products!(
                p 0 "vpdpwssd {p}, {a}, dword ptr [{b}]{{1to16}}"
                q 1 "vpdpwssd {q}, {a}, dword ptr [{b} + 4]{{1to16}}"),
            3 => products!(
                p 0 "vpdpwssd {p}, {a}, dword ptr [{b}]{{1to16}}"
                q 1 "vpdpwssd {q}, {a}, dword ptr [{b} + 4]{{1to16}}"
                r 2 "vpdpwssd {r}, {a}, dword ptr [{b} + 8]{{1to16}}"),
            _ => products!(
                p 0 "vpdpwssd {p}, {a}, dword ptr [{b}]{{1to16}}"
                q 1 "vpdpwssd {q}, {a}, dword ptr [{b} + 4]{{1to16}}"
                r 2 "vpdpwssd {r}, {a}, dword ptr [{b} + 8]{{1to16}}"
                s 3 "vpdpwssd {s}, {a}, dword ptr [{b} + 12]{{1to16}}"),
        }
    }
}

/// The scores of 16 rows for `Q` queries, before their factors.
///
/// # Safety
/// The CPU has the features of `dot`; `lanes` are rows of `rows`.
#[inline(always)]
unsafe fn dot_lanes<W: Words, const Q: usize>(
    rows: &Rows<'_>,
    lanes: Lanes,
    queries: &Queries,
) -> [__m512; Q] {
    // SAFETY: by contract; a row has `dim / 32` blocks.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); Q];
        // What a scale of the whole row still has to be multiplied with.
        let mut unscaled = [_mm512_setzero_ps(); Q];
        for block in 0..rows.dim / BLOCK {
            let lanes = lanes.hidden();
            let scales = match W::FACTOR {
                Factor::Block => W::scales_of_16(rows, lanes, block),
                _ => _mm512_setzero_ps(),
            };
            let columns = W::columns(rows, lanes, block);
            let mut products = [_mm512_setzero_si512(); Q];
            // Only written, and only read, where a format needs them.
            let sums_of = queries.sums.get_unchecked(block).as_ptr().cast::<i32>();
            if W::OFFSET != 0 {
                for q in 0..Q {
                    products[q] = _mm512_set1_epi32(-W::OFFSET * *sums_of.add(q));
                }
            }
            let integers = queries.integers.get_unchecked(block).as_ptr().cast::<[i32; BATCH]>();
            for pair in 0..PAIRS {
                add_products::<Q>(&mut products, columns[pair], integers.add(pair).cast());
            }
            if W::FACTOR == Factor::Block {
                for q in 0..Q {
                    let products = _mm512_cvtepi32_ps(products[q]);
                    sums[q] = _mm512_fmadd_ps(products, scales, sums[q]);
                }
            } else {
                for q in 0..Q {
                    unscaled[q] = _mm512_add_ps(unscaled[q], _mm512_cvtepi32_ps(products[q]));
                }
            }
            if W::HAS_MINIMUM {
                let minima = W::minima_of_16(rows, lanes, block);
                for q in 0..Q {
                    let sum = _mm512_set1_ps(*sums_of.add(q) as f32);
                    sums[q] = _mm512_fmadd_ps(minima, sum, sums[q]);
                }
            }
        }
        if W::FACTOR != Factor::Block {
            let scales = W::scales_of_16(rows, lanes, 0);
            for q in 0..Q {
                sums[q] = _mm512_fmadd_ps(unscaled[q], scales, sums[q]);
            }
        }
        sums
    }
}

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

/// A run of rows in groups of 16. If the last group is incomplete, it is copied, and its last row
/// stands for those that are missing.
struct Padded {
    whole: Lanes,
    /// Rows in complete groups.
    num_whole: usize,
    copies: *const u8,
}

/// Room for a group of copied rows.
type Copies = MaybeUninit<[u8; LANES * MAX_ROW]>;

impl Padded {
    /// Rows `first..first + count`, at least one.
    #[inline(always)]
    fn new(
        format: Format,
        rows: &Rows<'_>,
        (first, count): (usize, usize),
        copies: &mut Copies,
    ) -> Self {
        let whole = Lanes { start: rows.row(first).as_ptr(), stride: rows.stride };
        let num_whole = count / LANES * LANES;
        if num_whole < count {
            let last = Lanes { start: whole.at(num_whole, 0), ..whole };
            let row = format.row_bytes(rows.dim, rows.group);
            copy_last(last, count - num_whole, row, copies);
        }
        Self { whole, num_whole, copies: copies.as_ptr().cast() }
    }

    /// The group of 16 that starts with row `first`.
    #[inline(always)]
    fn lanes(&self, first: usize) -> Lanes {
        if first < self.num_whole {
            return Lanes { start: self.whole.at(first, 0), ..self.whole };
        }
        Lanes { start: self.copies, stride: MAX_ROW }
    }
}

/// Copies `some` rows of `row` bytes, the last of them as often as needed.
#[cold]
fn copy_last(rows: Lanes, some: usize, row: usize, copies: &mut Copies) {
    assert!(row <= MAX_ROW, "a row of {row} bytes");
    let target = copies.as_mut_ptr().cast::<u8>();
    for t in 0..LANES {
        let from = rows.at(t.min(some - 1), 0);
        // SAFETY: `Rows::check` proved that the row lies in the bytes; there is room for 16.
        unsafe { target.add(t * MAX_ROW).copy_from_nonoverlapping(from, row) };
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
        let mut ahead = Ahead::new(ahead, blocks);
        for block in 0..blocks {
            ahead.fetch();
            let bias =
                if W::HAS_MINIMUM { sum_minima::<W, Q>(rows, tile, block) } else { [0.0; Q] };
            let target = outputs.as_mut_ptr().add(block * BLOCK);
            add_block::<W, Q>(rows, tile, &scaled, block, &bias, target);
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
) {
    // SAFETY: by contract. Rows beyond the last repeat it with weight 0.
    unsafe {
        let mut sums = [[_mm512_setzero_si512(); 2]; Q];
        let with_scales = if W::FACTOR == Factor::Block { block } else { 0 };
        let pairs = scaled.pairs.get_unchecked(with_scales);
        for pair in 0..tile.count.div_ceil(2) {
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
