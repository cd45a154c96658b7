//! Loops over rows of small integers, in 16-bit arithmetic: two products, their sum and its sum with
//! 32-bit integers are one instruction.
//!
//! Queries, and weights times scales, become 16-bit integers of a common scale. What that rounds
//! away is 2^-15 of the largest query or weight (2^-13 for `tq`, whose integers are wider), far below
//! the error of any format that is stored so.
//!
//! ```text
//! dot    16 rows at a time, a row in each lane: no sum across lanes, scales of 16 rows in one vector
//! axpy   pairs of rows, a channel in each lane: output[c] += weight[t] * x[t, c] + weight[t + 1] * ...
//! ```
//!
//! Queries or weights that are not finite, or too large or small for it, take the float loops of the
//! AVX2 level.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::math::LANES;
use super::turn::Lanes;
use crate::simd::avx2::{HUGE, TINY};
use crate::simd::rows::{BLOCK, Format, Rows};

/// Queries or outputs of a batch.
pub(super) const BATCH: usize = 4;

/// Elements of the widest row that has room on the stack.
pub(super) const MAX_DIM: usize = 512;

/// Bytes of the longest of these rows.
const MAX_ROW: usize = MAX_DIM / BLOCK * 36;

/// The largest factor of integers up to `largest` with which no sum of `count` products leaves 32 bits.
pub(super) const fn limit(largest: i32, count: i32) -> f32 {
    let limit = i32::MAX / (largest * count);
    if limit < 32767 { limit as f32 } else { 32767.0 }
}

/// `largest` over `limit`, and its reciprocal, if integers can stand for values up to `largest`.
#[inline(always)]
pub(super) fn factor_of(largest: f32, limit: f32) -> Option<(f32, f32)> {
    (largest > TINY && largest < HUGE).then(|| (largest / limit, limit / largest))
}

/// The largest magnitude; magnitudes order like their bits, NaN above infinity.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn largest(values: &[f32]) -> f32 {
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
pub(super) unsafe fn round_16(low: __m512, high: __m512) -> __m512i {
    // SAFETY: by contract.
    unsafe {
        let low = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(low));
        let high = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(high));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
    }
}

/// Adds products of pairs of words. The intrinsic would be taken apart into a product and a sum.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) fn multiply_add(mut sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: values only.
    unsafe {
        std::arch::asm!("vpdpwssd {}, {}, {}", inout(zmm_reg) sum, in(zmm_reg) a, in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// A run of rows in groups of 16. If the last group is incomplete, it is copied, and its last row
/// stands for those that are missing.
pub(super) struct Padded {
    pub(super) whole: Lanes,
    /// Rows in complete groups.
    num_whole: usize,
    copies: *const u8,
}

/// Room for a group of copied rows.
pub(super) type Copies = MaybeUninit<[u8; LANES * MAX_ROW]>;

impl Padded {
    /// Rows `first..first + count`, at least one.
    #[inline(always)]
    pub(super) fn new(
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
    pub(super) fn lanes(&self, first: usize) -> Lanes {
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
