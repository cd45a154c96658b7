//! Nibbles with a fifth bit.

use std::arch::x86_64::*;

use super::formats::scaled;
use super::turn::Lanes;
use super::words::{
    NIBBLES, Words, constant, gather_f16, gather_i32, lowest, minus, nibble_columns, nibble_pair,
};
use crate::simd::avx2::{Q5_0, Q5_1};
use crate::simd::rows::{BLOCK, Rows};

/// For `vpmultishiftqb` over fifth bits: bit `b` of a word of 32 bits to bit 4 of a byte. Two rows in
/// 64 bits; words `w` of the rows are `elements[w]`.
const fn fifth_of(elements: [u16; 2]) -> i64 {
    let mut shifts = 0;
    let mut i = 0;
    while i < 4 {
        let from = (i / 2 * 32 + elements[i % 2] as usize + 60) % 64;
        shifts |= (from as i64) << (16 * i);
        i += 1;
    }
    shifts
}

/// The fifth bits of `columns`, for each vector.
static FIFTH_OF_COLUMNS: [i64; 16] = {
    let mut shifts = [0; 16];
    let mut p = 0;
    while p < 16 {
        shifts[p] = fifth_of([NIBBLES[2 * p], NIBBLES[2 * p + 1]]);
        p += 1;
    }
    shifts
};

/// The fifth bits of `pair`, for each half: even row in the low, odd row in the high 32 bits.
static FIFTH_OF_PAIR: [[i64; 8]; 2] = {
    let mut shifts = [[0; 8]; 2];
    let mut i = 0;
    while i < 64 {
        // Word `i % 2` of channel `i / 2`.
        let (c, row) = (i / 2, i % 2);
        let from = (row * 32 + c + 60) % 64;
        shifts[c / 16][c % 16 / 2] |= (from as i64) << (c % 2 * 32 + row * 16);
        i += 1;
    }
    shifts
};

/// Nibbles with fifth bits before them.
macro_rules! five_bits {
    ($bytes:literal, $at:literal, $offset:literal) => {
        const OFFSET: i32 = $offset;
        const ORDER: [u16; BLOCK] = NIBBLES;

        #[inline(always)]
        unsafe fn columns(_: &Rows<'_>, lanes: Lanes, block: usize) -> [__m512i; 16] {
            let at = block * $bytes + $at;
            // SAFETY: fifth bits and nibbles of the block.
            unsafe {
                let fifth = gather_i32(lanes, at);
                let mut columns = lowest(nibble_columns(lanes, at + 4), 4);
                for (x, shifts) in columns.iter_mut().zip(FIFTH_OF_COLUMNS) {
                    *x = with_fifth(*x, _mm512_set1_epi64(shifts), fifth);
                }
                columns
            }
        }

        #[inline(always)]
        unsafe fn pair(
            _: &Rows<'_>,
            even: *const u8,
            odd: *const u8,
            block: usize,
        ) -> [__m512i; 2] {
            let at = block * $bytes + $at;
            // SAFETY: as above.
            unsafe {
                let (even, odd) = (even.add(at), odd.add(at));
                let low = even.cast::<u32>().read_unaligned();
                let high = odd.cast::<u32>().read_unaligned();
                let fifth = _mm512_set1_epi64(i64::from(low) | i64::from(high) << 32);
                let mut words = lowest(nibble_pair(even.add(4), odd.add(4)), 4);
                for (x, shifts) in words.iter_mut().zip(&FIFTH_OF_PAIR) {
                    *x = with_fifth(*x, constant(shifts), fifth);
                }
                if $offset == 0 { words } else { minus(words, $offset) }
            }
        }
    };
}

/// Adds bit 4 of each word from the places that `shifts` name.
///
/// # Safety
/// The CPU has AVX-512 F and VBMI.
#[inline(always)]
unsafe fn with_fifth(words: __m512i, shifts: __m512i, fifth: __m512i) -> __m512i {
    // SAFETY: values only.
    unsafe {
        let bits = _mm512_multishift_epi64_epi8(shifts, fifth);
        _mm512_or_si512(words, _mm512_and_si512(bits, _mm512_set1_epi16(16)))
    }
}

impl Words for Q5_0 {
    five_bits!(22, 2, 16);
    scaled!(22);
}

impl Words for Q5_1 {
    five_bits!(24, 4, 0);
    scaled!(24, with minimum);
}
