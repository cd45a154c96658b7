//! TurboQuant rows as integers: streams of codes, looked up in tables of 16-bit levels. The table has
//! 32 places and levels repeat in it, so what stands above a code in its word does not count.

use std::arch::x86_64::*;

use super::turn::{Lanes, turn_8, turn_12, turn_16};
use super::words::{Places, Words, constant, gather_f16, look_up, shifts, two_rows};
use crate::simd::avx2::{TQ_UNIT, Tq};
use crate::simd::rows::{BLOCK, Rows, tq_levels};

impl<const BITS: usize> Words for Tq<BITS> {
    const ORDER: [u16; BLOCK] = match BITS {
        2 => order_of_words(8),
        3 => THREE,
        _ => order_of_words(4),
    };

    #[inline(always)]
    unsafe fn columns(rows: &Rows<'_>, lanes: Lanes, block: usize) -> [__m512i; 16] {
        let at = block * 4 * BITS;
        // SAFETY: the codes of the block.
        unsafe {
            let words = match BITS {
                2 => shifted::<2, 8>(turn_8(lanes, at), 2),
                3 => three_bits(turn_12(lanes, at)),
                _ => shifted::<4, 4>(turn_16(lanes, at), 4),
            };
            look_up(words, levels::<BITS>(rows.dim))
        }
    }

    #[inline(always)]
    unsafe fn pair(rows: &Rows<'_>, even: *const u8, odd: *const u8, block: usize) -> [__m512i; 2] {
        let at = block * 4 * BITS;
        // SAFETY: as above.
        unsafe {
            let words = match BITS {
                2 => two_bits_pair(even.add(at), odd.add(at)),
                3 => three_bits_pair(even.add(at), odd.add(at)),
                _ => four_bits_pair(even.add(at), odd.add(at)),
            };
            look_up(words, levels::<BITS>(rows.dim))
        }
    }

    #[inline(always)]
    unsafe fn scales_of_16(rows: &Rows<'_>, lanes: Lanes, _: usize) -> __m512 {
        // SAFETY: the norm follows the codes.
        unsafe {
            let norms = gather_f16(lanes, rows.dim * BITS / 8);
            _mm512_mul_ps(norms, _mm512_set1_ps(1.0 / TQ_UNIT))
        }
    }
}

/// Levels as integers, as often as they fit.
#[inline(always)]
fn levels<const BITS: usize>(dim: usize) -> &'static [i16; 32] {
    static TABLES: [[[i16; 32]; 3]; 3] = [tables(64), tables(128), tables(1)];
    let table = match dim {
        64 => 0,
        128 => 1,
        _ => 2,
    };
    &TABLES[table][BITS - 2]
}

const fn tables(dim: usize) -> [[i16; 32]; 3] {
    let levels = tq_levels(dim);
    let mut tables = [[0; 32]; 3];
    let mut i = 0;
    while i < 3 * 32 {
        let level = levels[i / 32][i % 16];
        let half = if level < 0.0 { -0.5 } else { 0.5 };
        tables[i / 32][i % 32] = (level * TQ_UNIT + half) as i16;
        i += 1;
    }
    tables
}

/// When each word of 16 bits holds `parts` codes, one after the other.
const fn order_of_words(parts: usize) -> [u16; BLOCK] {
    let mut order = [0; BLOCK];
    let mut i = 0;
    while i < BLOCK {
        let (pair, word) = (i / 2, i % 2);
        order[i] = (pair / parts * 2 * parts + word * parts + pair % parts) as u16;
        i += 1;
    }
    order
}

/// Words shifted down by none to all but one of their codes.
///
/// # Safety
/// The CPU has AVX-512 F and BW.
#[inline(always)]
unsafe fn shifted<const N: usize, const PARTS: usize>(
    words: [__m512i; N],
    bits: u32,
) -> [__m512i; 16] {
    let mut columns = [words[0]; 16];
    for d in 0..N {
        for part in 0..PARTS {
            // SAFETY: values only.
            columns[PARTS * d + part] = unsafe {
                let by = _mm_cvtsi32_si128((bits * part as u32) as i32);
                _mm512_srl_epi16(words[d], by)
            };
        }
    }
    columns
}

/// Codes 10 and 21 reach over the end of four bytes: the others of each four bytes come in pairs, and
/// these two come last.
const THREE: [u16; BLOCK] = {
    let mut order = [0; BLOCK];
    let mut i = 0;
    while i < 30 {
        order[i] = (i / 10 * 11 + i % 10) as u16;
        i += 1;
    }
    order[30] = 10;
    order[31] = 21;
    order
};

/// For `vpmultishiftqb`: two codes of each of two rows, for every vector but the last.
static THREE_SHIFTS: [i64; 15] = {
    let mut shifts = [0; 15];
    let mut i = 0;
    while i < 60 {
        let (vector, row, word) = (i / 4, i / 2 % 2, i % 2);
        let from = THREE[2 * vector + word] as i64 * 3 - vector as i64 / 5 * 32;
        shifts[vector] |= (from + row as i64 * 32) << (16 * (i % 4));
        i += 1;
    }
    shifts
};

/// # Safety
/// The CPU has AVX-512 F, BW, VBMI and VBMI2.
#[inline(always)]
unsafe fn three_bits(words: [__m512i; 3]) -> [__m512i; 16] {
    // SAFETY: values only.
    unsafe {
        let mut columns = [words[0]; 16];
        for (i, shifts) in THREE_SHIFTS.into_iter().enumerate() {
            columns[i] = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(shifts), words[i / 5]);
        }
        let tenth = _mm512_shrdi_epi32::<30>(words[0], words[1]);
        let other = _mm512_shrdi_epi32::<31>(words[1], words[2]);
        columns[15] = _mm512_mask_blend_epi16(0xaaaa_aaaa, tenth, _mm512_slli_epi32::<16>(other));
        columns
    }
}

/// # Safety
/// The CPU has AVX-512 F, BW and VBMI; there are 8 bytes of codes in both rows.
#[inline(always)]
unsafe fn two_bits_pair(even: *const u8, odd: *const u8) -> [__m512i; 2] {
    const PLACES: Places = Places { apart: 8, first: 0, modulo: 16, divide: 4, half: 0 };
    static TABLES: [[u8; 64]; 2] = [PLACES.table(), Places { first: 4, ..PLACES }.table()];
    static SHIFTS: [u16; 32] = shifts(0, 2, 1, 4);
    // SAFETY: by contract.
    unsafe {
        let even = even.cast::<i64>().read_unaligned();
        let odd = odd.cast::<i64>().read_unaligned();
        let both = _mm512_castsi128_si512(_mm_set_epi64x(odd, even));
        spread(both, &TABLES, &SHIFTS)
    }
}

/// # Safety
/// The CPU has AVX-512 F, BW and VBMI; there are 16 bytes of codes in both rows.
#[inline(always)]
unsafe fn four_bits_pair(even: *const u8, odd: *const u8) -> [__m512i; 2] {
    const PLACES: Places = Places { apart: 16, first: 0, modulo: 16, divide: 2, half: 0 };
    static TABLES: [[u8; 64]; 2] = [PLACES.table(), Places { first: 8, ..PLACES }.table()];
    static SHIFTS: [u16; 32] = shifts(0, 4, 1, 2);
    // SAFETY: by contract.
    unsafe { spread(two_rows(even, odd), &TABLES, &SHIFTS) }
}

/// Puts the byte of its code into each word and shifts it down.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VBMI.
#[inline(always)]
unsafe fn spread(
    both: __m512i,
    places: &'static [[u8; 64]; 2],
    shifts: &'static [u16; 32],
) -> [__m512i; 2] {
    // SAFETY: values only.
    unsafe {
        let first = _mm512_permutexvar_epi8(constant(&places[0]), both);
        let second = _mm512_permutexvar_epi8(constant(&places[1]), both);
        let shifts = constant(shifts);
        [_mm512_srlv_epi16(first, shifts), _mm512_srlv_epi16(second, shifts)]
    }
}

/// For each half of a block: for two channels, the two bytes of each row that hold their codes.
static THREE_PLACES: [[u8; 64]; 2] = {
    let mut tables = [[0; 64]; 2];
    let mut i = 0;
    while i < 64 {
        // Byte `i % 2` of row `i / 2 % 2` for the channels `c` and `c + 1`.
        let c = i / 4 * 2;
        let from = c * 3 / 8 + i % 2;
        tables[c / 16][c % 16 * 4 + i / 2 % 2 * 4 + i % 2] = (from + i / 2 % 2 * 16) as u8;
        i += 1;
    }
    tables
};

/// For `vpmultishiftqb` over these bytes.
static THREE_PAIR: [[i64; 8]; 2] = {
    let mut shifts = [[0; 8]; 2];
    let mut i = 0;
    while i < 64 {
        let (c, row) = (i / 2, i % 2);
        let from = c * 3 - c / 2 * 6 / 8 * 8 + row * 32;
        shifts[c / 16][c % 16 / 2] |= (from as i64) << (c % 2 * 32 + row * 16);
        i += 1;
    }
    shifts
};

/// # Safety
/// The CPU has AVX-512 F, VL and VBMI; there are 12 bytes of codes in both rows.
#[inline(always)]
unsafe fn three_bits_pair(even: *const u8, odd: *const u8) -> [__m512i; 2] {
    // SAFETY: by contract; no more than three times four bytes are read.
    unsafe {
        let even = _mm_maskz_loadu_epi32(0b111, even.cast());
        let odd = _mm_maskz_loadu_epi32(0b111, odd.cast());
        let both = _mm512_castsi256_si512(_mm256_set_m128i(odd, even));
        let mut words = [both; 2];
        for half in 0..2 {
            let bytes = _mm512_permutexvar_epi8(constant(&THREE_PLACES[half]), both);
            words[half] = _mm512_multishift_epi64_epi8(constant(&THREE_PAIR[half]), bytes);
        }
        words
    }
}
