//! Scores of raw rows for many queries: a product of matrices. 32 rows are turned once, so that a row
//! is in each lane and no sum goes across lanes; then eight queries at a time meet them.

#![expect(clippy::needless_range_loop, reason = "indices into two register arrays at once")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::integer::MAX_DIM;
use super::math::{LANES, mask};
use super::raw::Raw;
use super::turn::turn_quarters;
use crate::simd::ahead::Ahead;
use crate::simd::rows::Rows;

/// Queries from which on turning rows pays.
pub(super) const MANY: usize = 16;

/// Queries of a batch.
const BATCH: usize = 8;

/// Vectors of rows.
const WIDE: usize = 2;

/// Elements whose products are added up one after the other; longer sums would lose digits.
const RUN: usize = 128;

/// 32 turned rows: for each element, two vectors of rows.
type Turned = [MaybeUninit<[__m512; WIDE]>; MAX_DIM];

/// `scores[q, t] = queries[q] . rows[t]`; a row has at most `MAX_DIM` elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn dot<F: Raw>(rows: &Rows<'_>, queries: &[f32], scores: &mut [f32]) {
    let (dim, count) = (rows.dim, rows.count);
    let mut turned: Turned = [const { MaybeUninit::uninit() }; MAX_DIM];
    let mut ahead = Ahead::new(rows.ahead, count.div_ceil(LANES));
    for first in (0..count).step_by(WIDE * LANES) {
        for wide in 0..WIDE {
            ahead.fetch();
            turn::<F>(rows, first + wide * LANES, wide, &mut turned);
        }
        let some = (WIDE * LANES).min(count - first);
        let whole = queries.len() / dim / BATCH * BATCH;
        // SAFETY: `Rows::check` proved the lengths; the first `dim` elements have been turned.
        unsafe {
            for q in (0..whole).step_by(BATCH) {
                let queries = queries.as_ptr().add(q * dim);
                let scores = scores.as_mut_ptr().add(q * count + first);
                meet::<BATCH>(&turned, dim, queries, (scores, count, some));
            }
            for q in whole..queries.len() / dim {
                let queries = queries.as_ptr().add(q * dim);
                let scores = scores.as_mut_ptr().add(q * count + first);
                meet::<1>(&turned, dim, queries, (scores, count, some));
            }
        }
    }
}

/// Turns 16 rows from `first` on; the last row stands for those beyond it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn turn<F: Raw>(rows: &Rows<'_>, first: usize, wide: usize, turned: &mut Turned) {
    let mut starts = [std::ptr::null(); LANES];
    for (t, start) in starts.iter_mut().enumerate() {
        *start = rows.row((first + t).min(rows.count - 1)).as_ptr();
    }
    for element in (0..rows.dim).step_by(LANES) {
        let some = (rows.dim - element).min(LANES);
        // SAFETY: `Rows::check` proved that the rows lie in the bytes; a row has these elements.
        unsafe {
            let mut quarters = [_mm512_setzero_si512(); LANES];
            for (t, start) in starts.iter().enumerate() {
                let x = F::vector(start.add(element * F::BYTES), mask(some));
                quarters[t] = _mm512_castps_si512(x);
            }
            // Four rows in each quarter of 128 bits, and then the quarters themselves.
            for t in (0..LANES).step_by(4) {
                let four = [quarters[t], quarters[t + 1], quarters[t + 2], quarters[t + 3]];
                quarters[t..t + 4].copy_from_slice(&turn_quarters(four));
            }
            for i in 0..4 {
                let four = [quarters[i], quarters[4 + i], quarters[8 + i], quarters[12 + i]];
                for (j, x) in gather_quarters(four).into_iter().enumerate() {
                    if 4 * j + i < some {
                        let target = turned[element + 4 * j + i].as_mut_ptr().cast::<__m512>();
                        target.add(wide).write(_mm512_castsi512_ps(x));
                    }
                }
            }
        }
    }
}

/// Vector `j` of the result holds the `j`-th quarter of each vector.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn gather_quarters([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: by contract.
    unsafe {
        let ab_low = _mm512_shuffle_i32x4::<0b01_00_01_00>(a, b);
        let ab_high = _mm512_shuffle_i32x4::<0b11_10_11_10>(a, b);
        let cd_low = _mm512_shuffle_i32x4::<0b01_00_01_00>(c, d);
        let cd_high = _mm512_shuffle_i32x4::<0b11_10_11_10>(c, d);
        [
            _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_low, cd_low),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_low, cd_low),
            _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_high, cd_high),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_high, cd_high),
        ]
    }
}

/// Scores of `Q` queries for the turned rows.
///
/// # Safety
/// The CPU has AVX-512 F; `dim` elements are turned; queries are `[Q, dim]`; at `scores`, `some`
/// scores have room in each of `Q` rows that are `count` apart.
#[inline(always)]
unsafe fn meet<const Q: usize>(
    turned: &Turned,
    dim: usize,
    queries: *const f32,
    (scores, count, some): (*mut f32, usize, usize),
) {
    // SAFETY: by contract.
    unsafe {
        for first in (0..dim).step_by(RUN) {
            let mut sums = [[_mm512_setzero_ps(); WIDE]; Q];
            for i in first..dim.min(first + RUN) {
                let x = turned.get_unchecked(i).assume_init();
                for q in 0..Q {
                    let y = _mm512_set1_ps(*queries.add(q * dim + i));
                    for wide in 0..WIDE {
                        sums[q][wide] = _mm512_fmadd_ps(x[wide], y, sums[q][wide]);
                    }
                }
            }
            for q in 0..Q {
                for wide in 0..WIDE {
                    let rest = mask(some.saturating_sub(wide * LANES));
                    let target = scores.wrapping_add(q * count + wide * LANES);
                    let before = if first == 0 { 0 } else { rest };
                    let before = _mm512_maskz_loadu_ps(before, target);
                    _mm512_mask_storeu_ps(target, rest, _mm512_add_ps(before, sums[q][wide]));
                }
            }
        }
    }
}
