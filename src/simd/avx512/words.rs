//! Formats whose rows are small integers times a scale, as vectors of pairs of 16-bit integers.
//!
//! ```text
//! columns   16 rows, one in each lane; vector p holds two elements of the block, as ORDER says
//! pair      two rows, one channel in each lane; vector h holds channels 16 h to 16 h + 15
//! ```

use std::arch::x86_64::*;

use crate::simd::avx2::Whole;
use crate::simd::rows::{BLOCK, Rows};

use super::turn::{Lanes, turn_16};

/// Rows of blocks of 32 integers: element = (integer - OFFSET) * scale + minimum.
pub(super) trait Words: Whole {
    /// What must be taken from the integers of `columns`.
    const OFFSET: i32 = 0;

    /// Words `2 p` and `2 p + 1` are the elements in vector `p` of `columns`.
    const ORDER: [u16; BLOCK];

    /// A block of 16 rows: 16 vectors of two elements for each row.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW, DQ, VL, VBMI; the lanes are rows of this format with the block.
    unsafe fn columns(rows: &Rows<'_>, lanes: Lanes, block: usize) -> [__m512i; 16];

    /// A block of two rows, without offset: for each channel an element of each row.
    ///
    /// # Safety
    /// As for `columns`.
    unsafe fn pair(rows: &Rows<'_>, even: *const u8, odd: *const u8, block: usize) -> [__m512i; 2];

    /// The scales of a block in 16 rows; 1 where `FACTOR` is `One`.
    ///
    /// # Safety
    /// As for `columns`.
    unsafe fn scales_of_16(_: &Rows<'_>, _: Lanes, _block: usize) -> __m512 {
        // SAFETY: values only.
        unsafe { _mm512_set1_ps(1.0) }
    }

    /// The minima of a block in 16 rows, if `HAS_MINIMUM`.
    ///
    /// # Safety
    /// As for `columns`.
    unsafe fn minima_of_16(_: &Rows<'_>, _: Lanes, _block: usize) -> __m512 {
        // SAFETY: values only.
        unsafe { _mm512_setzero_ps() }
    }
}

/// 16 f16 at one distance from the start of each row.
///
/// # Safety
/// The CPU has AVX-512 F; there are two bytes at each place.
#[inline(always)]
pub(super) unsafe fn gather_f16(lanes: Lanes, distance: usize) -> __m512 {
    // SAFETY: by contract.
    unsafe {
        let at = |i: usize| lanes.at(i, distance).cast::<i16>().read_unaligned();
        let low = _mm_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
        let high = _mm_setr_epi16(at(8), at(9), at(10), at(11), at(12), at(13), at(14), at(15));
        _mm512_cvtph_ps(_mm256_set_m128i(high, low))
    }
}

/// 16 integers of 32 bits at one distance from the start of each row.
///
/// # Safety
/// The CPU has AVX-512 F; there are four bytes at each place.
#[inline(always)]
pub(super) unsafe fn gather_i32(lanes: Lanes, distance: usize) -> __m512i {
    // SAFETY: by contract.
    unsafe { of_each(|i| lanes.at(i, distance).cast::<i32>().read_unaligned()) }
}

/// 16 integers.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
pub(super) unsafe fn of_each(x: impl Fn(usize) -> i32) -> __m512i {
    // SAFETY: values only.
    unsafe {
        _mm512_setr_epi32(
            x(0),
            x(1),
            x(2),
            x(3),
            x(4),
            x(5),
            x(6),
            x(7),
            x(8),
            x(9),
            x(10),
            x(11),
            x(12),
            x(13),
            x(14),
            x(15),
        )
    }
}

/// The order of elements when each four bytes give some vectors: part `i` of the bytes `4 d` to
/// `4 d + 3` holds the elements of byte `4 d + i % 2` and the byte two further, and bytes hold
/// elements `next` apart.
pub(super) const fn order_of_bytes(parts: usize, next: usize) -> [u16; BLOCK] {
    let mut order = [0; BLOCK];
    let mut i = 0;
    while i < BLOCK {
        let (pair, word) = (i / 2, i % 2);
        let (d, part) = (pair / parts, pair % parts);
        order[i] = (part / 2 * next + 4 * d + part % 2 + 2 * word) as u16;
        i += 1;
    }
    order
}

/// Nibbles, elements 0 to 15 low and 16 to 31 high.
pub(super) const NIBBLES: [u16; BLOCK] = order_of_bytes(4, 16);

/// For `vpermb`: word `r` of lane `c` comes from byte `first + c % modulo / divide` of row `r`, whose
/// bytes are `apart`; the byte goes into the low (0) or the high half (1) of the word.
#[derive(Clone, Copy)]
pub(super) struct Places {
    pub(super) apart: usize,
    pub(super) first: usize,
    pub(super) modulo: usize,
    pub(super) divide: usize,
    pub(super) half: usize,
}

impl Places {
    pub(super) const fn table(self) -> [u8; 64] {
        let mut table = [0; 64];
        let mut c = 0;
        while c < 16 {
            let byte = self.first + c % self.modulo / self.divide;
            table[4 * c + self.half] = byte as u8;
            table[4 * c + 2 + self.half] = (byte + self.apart) as u8;
            c += 1;
        }
        table
    }
}

/// For shifts of words: both words of lane `c` by `step * (c / divide % modulo)`, plus `first`.
pub(super) const fn shifts(first: u16, step: u16, divide: u16, modulo: u16) -> [u16; 32] {
    let mut shifts = [0; 32];
    let mut i = 0;
    while i < 32 {
        shifts[i] = first + step * (i as u16 / 2 / divide % modulo);
        i += 1;
    }
    shifts
}

/// 64 bytes of a table.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
pub(super) unsafe fn constant<T, const N: usize>(table: &'static [T; N]) -> __m512i {
    const { assert!(size_of::<T>() * N == 64, "a table of 64 bytes") };
    // SAFETY: 64 bytes.
    unsafe { _mm512_loadu_si512(table.as_ptr().cast()) }
}

/// 16 bytes of each of two rows.
///
/// # Safety
/// The CPU has AVX-512 F; there are 16 bytes.
#[inline(always)]
pub(super) unsafe fn two_rows(even: *const u8, odd: *const u8) -> __m512i {
    // SAFETY: by contract.
    unsafe {
        let (even, odd) = (_mm_loadu_si128(even.cast()), _mm_loadu_si128(odd.cast()));
        _mm512_castsi256_si512(_mm256_set_m128i(odd, even))
    }
}

/// The bytes of nibbles of 16 rows as words whose lowest four bits count, in the order `NIBBLES`.
///
/// # Safety
/// The CPU has AVX-512 F and BW; there are 16 bytes of nibbles at each place.
#[inline(always)]
pub(super) unsafe fn nibble_columns(lanes: Lanes, distance: usize) -> [__m512i; 16] {
    // SAFETY: by contract.
    unsafe {
        let bytes = turn_16(lanes, distance);
        let mut columns = [bytes[0]; 16];
        for d in 0..4 {
            columns[4 * d] = bytes[d];
            columns[4 * d + 1] = _mm512_srli_epi16::<8>(bytes[d]);
            columns[4 * d + 2] = _mm512_srli_epi16::<4>(bytes[d]);
            columns[4 * d + 3] = _mm512_srli_epi16::<12>(bytes[d]);
        }
        columns
    }
}

/// The bytes of nibbles of two rows, once for low and once for high nibbles.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VBMI; there are 16 bytes of nibbles in both rows.
#[inline(always)]
pub(super) unsafe fn nibble_pair(even: *const u8, odd: *const u8) -> [__m512i; 2] {
    static PLACES: [u8; 64] =
        Places { apart: 16, first: 0, modulo: 16, divide: 1, half: 0 }.table();
    // SAFETY: by contract.
    unsafe {
        let places = constant(&PLACES);
        let words = _mm512_maskz_permutexvar_epi8(LOW_BYTES, places, two_rows(even, odd));
        [words, _mm512_srli_epi16::<4>(words)]
    }
}

/// The low bytes of words.
pub(super) const LOW_BYTES: __mmask64 = 0x5555_5555_5555_5555;

/// The `bits` lowest bits of each word.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
pub(super) unsafe fn lowest<const N: usize>(mut words: [__m512i; N], bits: u32) -> [__m512i; N] {
    for x in &mut words {
        // SAFETY: values only.
        *x = unsafe { _mm512_and_si512(*x, _mm512_set1_epi16((1 << bits) - 1)) };
    }
    words
}

/// What each word finds in a table by its five lowest bits.
///
/// # Safety
/// The CPU has AVX-512 F and BW.
#[inline(always)]
pub(super) unsafe fn look_up<const N: usize>(
    mut words: [__m512i; N],
    table: &'static [i16; 32],
) -> [__m512i; N] {
    for x in &mut words {
        // SAFETY: values only.
        *x = unsafe { _mm512_permutexvar_epi16(*x, constant(table)) };
    }
    words
}

/// Takes an offset away.
///
/// # Safety
/// The CPU has AVX-512 F and BW.
#[inline(always)]
pub(super) unsafe fn minus(mut words: [__m512i; 2], offset: i16) -> [__m512i; 2] {
    for x in &mut words {
        // SAFETY: values only.
        *x = unsafe { _mm512_sub_epi16(*x, _mm512_set1_epi16(offset)) };
    }
    words
}
