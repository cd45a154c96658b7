//! Scores of rows of integers for many queries: a product of matrices. 32 rows are unpacked and turned
//! once, so that a row is in each lane; then eight queries at a time meet them.

#![expect(clippy::needless_range_loop, reason = "indices into two register arrays at once")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::integer::{BATCH, MAX_DIM, Padded, multiply_add};
use super::math::{LANES, mask};
use super::queries::{PAIRS, Queries, batch};
use super::words::Words;
use crate::simd::ahead::Ahead;
use crate::simd::avx2::Factor;
use crate::simd::prepared::IntegerQueries;
use crate::simd::rows::{BLOCK, Format, Rows};

/// Queries from which on unpacking rows once for all pays.
pub(super) const MANY: usize = 16;

/// Most blocks of a row.
const BLOCKS: usize = MAX_DIM / BLOCK;

/// `W` times 16 rows.
struct Turned<const W: usize> {
    /// What must be taken from the words.
    offset: i32,
    /// For each block and pair of elements.
    words: [[MaybeUninit<[__m512i; W]>; PAIRS]; BLOCKS],
    /// For each block.
    scales: [MaybeUninit<[__m512; W]>; BLOCKS],
    /// For each block, if the format has minima.
    minima: [MaybeUninit<[__m512; W]>; BLOCKS],
}

impl<const W: usize> Turned<W> {
    const fn new(offset: i32) -> Self {
        Self {
            offset,
            words: [const { [const { MaybeUninit::uninit() }; PAIRS] }; BLOCKS],
            scales: [const { MaybeUninit::uninit() }; BLOCKS],
            minima: [const { MaybeUninit::uninit() }; BLOCKS],
        }
    }
}

/// `scores[q, t] = queries[q] . rows[t]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")]
pub(super) fn dot<F: Words>(
    format: Format,
    rows: &Rows<'_>,
    queries: &IntegerQueries,
    scores: &mut [f32],
) {
    let count = rows.count;
    let mut copies = MaybeUninit::uninit();
    let padded = Padded::new(format, rows, (0, count), &mut copies);
    let mut ahead = Ahead::new(rows.ahead, count.div_ceil(LANES) * rows.dim / BLOCK);
    let mut first = 0;
    while first + LANES < count {
        dot_rows::<F, 2>(rows, (&padded, first), queries, scores, &mut ahead);
        first += 2 * LANES;
    }
    if first < count {
        dot_rows::<F, 1>(rows, (&padded, first), queries, scores, &mut ahead);
    }
}

/// Scores of `W` times 16 rows, as far as there are so many.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")]
fn dot_rows<F: Words, const W: usize>(
    rows: &Rows<'_>,
    (padded, first): (&Padded, usize),
    queries: &IntegerQueries,
    scores: &mut [f32],
    ahead: &mut Ahead,
) {
    let count = rows.count;
    let mut turned = Turned::<W>::new(F::OFFSET);
    // SAFETY: rows are padded to a multiple of 16, and have these blocks; scores are `[n, count]`.
    unsafe {
        for wide in 0..W {
            turn::<F, W>(rows, (padded, first + wide * LANES), wide, &mut turned, ahead);
        }
        let target = (&mut scores[first..], count);
        match (F::FACTOR == Factor::Block, F::HAS_MINIMUM) {
            (true, true) => meet_all::<W, true, true>(rows.dim, &turned, queries, target),
            (true, false) => meet_all::<W, true, false>(rows.dim, &turned, queries, target),
            (false, true) => meet_all::<W, false, true>(rows.dim, &turned, queries, target),
            (false, false) => meet_all::<W, false, false>(rows.dim, &turned, queries, target),
        }
    }
}

/// Writes the scores of all queries, rows of `count`, of which the first that is given is that of the
/// first turned row. From here on code is the same for all formats with scales for each block (`B`) or
/// for each row, and with or without minima (`M`).
///
/// # Safety
/// The CPU has the features of `dot`; rows of `dim` elements are turned.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")]
unsafe fn meet_all<const W: usize, const B: bool, const M: bool>(
    dim: usize,
    turned: &Turned<W>,
    queries: &IntegerQueries,
    (scores, count): (&mut [f32], usize),
) {
    let n = scores.len().div_ceil(count);
    // As many as the last query has.
    let rows = scores.len() - (n - 1) * count;
    let masks = std::array::from_fn(|wide| mask(rows.saturating_sub(wide * LANES)));
    let blocks = dim / BLOCK;
    for q in (0..n).step_by(2 * BATCH) {
        let one = batch(queries, dim, q / BATCH);
        // SAFETY: by contract.
        unsafe {
            let target = (scores.as_mut_ptr().add(q * count), count, n - q);
            if n - q > BATCH {
                let both = [one, batch(queries, dim, q / BATCH + 1)];
                meet::<2, W, B, M>(blocks, turned, &both, &masks, target);
            } else {
                meet::<1, W, B, M>(blocks, turned, &[one], &masks, target);
            }
        }
    }
}

/// Unpacks and turns 16 rows.
///
/// # Safety
/// The CPU has the features of `dot`; a group of 16 starts with row `first`.
#[inline(always)]
unsafe fn turn<F: Words, const W: usize>(
    rows: &Rows<'_>,
    (padded, first): (&Padded, usize),
    wide: usize,
    turned: &mut Turned<W>,
    ahead: &mut Ahead,
) {
    let lanes = padded.lanes(first);
    // SAFETY: by contract; a row has `dim / 32` blocks.
    unsafe {
        for block in 0..rows.dim / BLOCK {
            ahead.fetch();
            let lanes = lanes.hidden();
            for (pair, x) in F::columns(rows, lanes, block).into_iter().enumerate() {
                turned.words[block][pair].as_mut_ptr().cast::<__m512i>().add(wide).write(x);
            }
            if F::FACTOR == Factor::Block || block == 0 {
                let scales = turned.scales[block].as_mut_ptr().cast::<__m512>();
                scales.add(wide).write(F::scales_of_16(rows, lanes, block));
            }
            if F::HAS_MINIMUM {
                let minima = turned.minima[block].as_mut_ptr().cast::<__m512>();
                minima.add(wide).write(F::minima_of_16(rows, lanes, block));
            }
        }
    }
}

/// Writes the scores of `N` batches of queries.
///
/// # Safety
/// The CPU has the features of `dot`; `blocks` blocks are turned and in the queries; at the target,
/// there is room for the scores of the masks in each of as many rows as there are queries, which are
/// `count` apart.
#[inline(always)]
unsafe fn meet<const N: usize, const W: usize, const B: bool, const M: bool>(
    blocks: usize,
    turned: &Turned<W>,
    queries: &[Queries; N],
    masks: &[__mmask16; W],
    (target, count, some): (*mut f32, usize, usize),
) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [[[_mm512_setzero_ps(); W]; BATCH]; N];
        for block in 0..blocks {
            let products = multiply::<N, W>(block, turned, queries);
            let scales = turned.scales.get_unchecked(block);
            for n in 0..N {
                let sums_of = queries[n].sums.add(block).cast::<i32>();
                for q in 0..BATCH {
                    for wide in 0..W {
                        let sum = &mut sums[n][q][wide];
                        let product = _mm512_cvtepi32_ps(products[n][q][wide]);
                        *sum = match B {
                            true => _mm512_fmadd_ps(product, scales.assume_init()[wide], *sum),
                            false => _mm512_add_ps(product, *sum),
                        };
                        if M && B {
                            let minimum = turned.minima.get_unchecked(block).assume_init()[wide];
                            let factor = _mm512_set1_ps(*sums_of.add(q) as f32);
                            *sum = _mm512_fmadd_ps(minimum, factor, *sum);
                        }
                    }
                }
            }
        }
        for n in 0..N {
            for q in 0..BATCH.min(some - n * BATCH) {
                let factor = _mm512_set1_ps(queries[n].factors[q]);
                for wide in 0..W {
                    let mut sum = sums[n][q][wide];
                    if !B {
                        sum = scale_row::<W, M>(blocks, turned, &queries[n], (q, wide), sum);
                    }
                    let target = target.add((n * BATCH + q) * count).wrapping_add(wide * LANES);
                    _mm512_mask_storeu_ps(target, masks[wide], _mm512_mul_ps(sum, factor));
                }
            }
        }
    }
}

/// Scales and minima of whole rows.
///
/// # Safety
/// As for `meet`.
#[inline(always)]
unsafe fn scale_row<const W: usize, const M: bool>(
    blocks: usize,
    turned: &Turned<W>,
    queries: &Queries,
    (q, wide): (usize, usize),
    sum: __m512,
) -> __m512 {
    // SAFETY: by contract.
    unsafe {
        let mut bias = _mm512_setzero_ps();
        if M {
            for block in 0..blocks {
                let factor = _mm512_set1_ps((*queries.sums.add(block))[q] as f32);
                bias = _mm512_fmadd_ps(turned.minima[block].assume_init()[wide], factor, bias);
            }
        }
        _mm512_fmadd_ps(sum, turned.scales[0].assume_init()[wide], bias)
    }
}

/// Products of a block, added up.
///
/// # Safety
/// As for `meet`.
#[inline(always)]
unsafe fn multiply<const N: usize, const W: usize>(
    block: usize,
    turned: &Turned<W>,
    queries: &[Queries; N],
) -> [[[__m512i; W]; BATCH]; N] {
    // SAFETY: by contract.
    unsafe {
        let mut products = [[[_mm512_setzero_si512(); W]; BATCH]; N];
        for n in 0..N {
            let sums = queries[n].sums.add(block).cast::<i32>();
            for q in 0..BATCH {
                products[n][q] = [_mm512_set1_epi32(-turned.offset * *sums.add(q)); W];
            }
        }
        let words = turned.words.get_unchecked(block);
        let integers: [_; N] =
            std::array::from_fn(|n| queries[n].integers.add(block).cast::<[i32; BATCH]>());
        for pair in 0..PAIRS {
            let x = words[pair].assume_init();
            for n in 0..N {
                let y = integers[n].add(pair).cast::<i32>();
                for q in 0..BATCH {
                    let y = _mm512_set1_epi32(*y.add(q));
                    for wide in 0..W {
                        products[n][q][wide] = multiply_add(products[n][q][wide], x[wide], y);
                    }
                }
            }
        }
        products
    }
}
