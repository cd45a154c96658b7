//! Formats whose integers are nibbles, bytes, or codes of two bits.

use std::arch::x86_64::*;

use super::turn::{Lanes, turn_8, turn_16};
use super::words::{
    LOW_BYTES, NIBBLES, Places, Words, constant, gather_f16, gather_i32, look_up, lowest, minus,
    nibble_columns, nibble_pair, of_each, order_of_bytes, shifts,
};
use crate::simd::avx2::{
    Affine2, Affine4, Codes2, Codes4, Int4, Int8, Iq4Nl, Mxfp4, Q4_0, Q4_1, Q8_0, metadata_at,
};
use crate::simd::rows::{BLOCK, E2M1, IQ4_NL, Rows};

/// Blocks that start with an f16 scale, and perhaps an f16 minimum after it.
macro_rules! scaled {
    ($bytes:literal) => {
        #[inline(always)]
        unsafe fn scales_of_16(_: &Rows<'_>, lanes: Lanes, block: usize) -> __m512 {
            // SAFETY: a block starts with its f16 scale.
            unsafe { gather_f16(lanes, block * $bytes) }
        }
    };
    ($bytes:literal, with minimum) => {
        scaled!($bytes);

        #[inline(always)]
        unsafe fn minima_of_16(_: &Rows<'_>, lanes: Lanes, block: usize) -> __m512 {
            // SAFETY: the minimum follows the scale.
            unsafe { gather_f16(lanes, block * $bytes + 2) }
        }
    };
}

/// Blocks of nibbles at a distance from the start of the block, and what makes integers of them.
macro_rules! nibbles {
    ($bytes:literal, $at:literal, $offset:literal, $finish:ident($with:expr)) => {
        const OFFSET: i32 = $offset;
        const ORDER: [u16; BLOCK] = NIBBLES;

        #[inline(always)]
        unsafe fn columns(_: &Rows<'_>, lanes: Lanes, block: usize) -> [__m512i; 16] {
            // SAFETY: the nibbles of the block.
            unsafe { $finish(nibble_columns(lanes, block * $bytes + $at), $with) }
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
                let words = $finish(nibble_pair(even.add(at), odd.add(at)), $with);
                if $offset == 0 { words } else { minus(words, $offset) }
            }
        }
    };
}

pub(super) use scaled;

impl Words for Q4_0 {
    nibbles!(18, 2, 8, lowest(4));
    scaled!(18);
}

impl Words for Q4_1 {
    nibbles!(20, 4, 0, lowest(4));
    scaled!(20, with minimum);
}

impl Words for Codes4 {
    nibbles!(16, 0, 0, lowest(4));
}

impl Words for Int4 {
    nibbles!(16, 0, 0, lowest(4));

    #[inline(always)]
    unsafe fn scales_of_16(rows: &Rows<'_>, lanes: Lanes, _: usize) -> __m512 {
        // SAFETY: scale and minimum follow the codes.
        unsafe { _mm512_castsi512_ps(gather_i32(lanes, rows.dim / 2)) }
    }

    #[inline(always)]
    unsafe fn minima_of_16(rows: &Rows<'_>, lanes: Lanes, _: usize) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_castsi512_ps(gather_i32(lanes, rows.dim / 2 + 4)) }
    }
}

/// A table twice, so that the fifth bit does not count.
const fn twice(levels: &[i8; 16]) -> [i16; 32] {
    let mut table = [0; 32];
    let mut i = 0;
    while i < 32 {
        table[i] = levels[i % 16] as i16;
        i += 1;
    }
    table
}

static IQ4_NL_TWICE: [i16; 32] = twice(&IQ4_NL);
static E2M1_TWICE: [i16; 32] = twice(&E2M1);

impl Words for Iq4Nl {
    nibbles!(18, 2, 0, look_up(&IQ4_NL_TWICE));
    scaled!(18);
}

impl Words for Mxfp4 {
    nibbles!(17, 1, 0, look_up(&E2M1_TWICE));

    #[inline(always)]
    unsafe fn scales_of_16(_: &Rows<'_>, lanes: Lanes, block: usize) -> __m512 {
        // SAFETY: a block starts with its exponent.
        unsafe {
            let e = of_each(|i| i32::from(*lanes.at(i, block * 17)));
            // See `e8m0_half`.
            let normal = _mm512_slli_epi32::<23>(_mm512_sub_epi32(e, _mm512_set1_epi32(1)));
            let tiny = _mm512_sllv_epi32(_mm512_set1_epi32(0x20_0000), e);
            let is_tiny = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
            _mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, is_tiny, tiny))
        }
    }
}

/// Blocks of bytes with a sign.
macro_rules! bytes {
    ($bytes:literal, $at:literal) => {
        const ORDER: [u16; BLOCK] = order_of_bytes(2, 0);

        #[inline(always)]
        unsafe fn columns(_: &Rows<'_>, lanes: Lanes, block: usize) -> [__m512i; 16] {
            // SAFETY: 32 codes of the block.
            unsafe {
                let mut columns = [_mm512_setzero_si512(); 16];
                for half in 0..2 {
                    let bytes = turn_16(lanes, block * $bytes + $at + half * 16);
                    for d in 0..4 {
                        let at = 8 * half + 2 * d;
                        let low = _mm512_slli_epi16::<8>(bytes[d]);
                        columns[at] = _mm512_srai_epi16::<8>(low);
                        columns[at + 1] = _mm512_srai_epi16::<8>(bytes[d]);
                    }
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
            const PLACES: Places = Places { apart: 32, first: 0, modulo: 16, divide: 1, half: 1 };
            static TABLES: [[u8; 64]; 2] = [PLACES.table(), Places { first: 16, ..PLACES }.table()];
            let at = block * $bytes + $at;
            // SAFETY: as above.
            unsafe {
                let even = _mm256_loadu_si256(even.add(at).cast());
                let odd = _mm256_loadu_si256(odd.add(at).cast());
                let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(even), odd);
                let first = _mm512_permutexvar_epi8(constant(&TABLES[0]), both);
                let second = _mm512_permutexvar_epi8(constant(&TABLES[1]), both);
                // What is in the low bytes is shifted out.
                [_mm512_srai_epi16::<8>(first), _mm512_srai_epi16::<8>(second)]
            }
        }
    };
}

impl Words for Q8_0 {
    bytes!(34, 2);
    scaled!(34);
}

impl Words for Int8 {
    bytes!(32, 0);

    #[inline(always)]
    unsafe fn scales_of_16(rows: &Rows<'_>, lanes: Lanes, _: usize) -> __m512 {
        // SAFETY: the scale follows the codes.
        unsafe { _mm512_castsi512_ps(gather_i32(lanes, rows.dim)) }
    }
}

impl Words for Codes2 {
    /// Elements 8 apart share a byte.
    const ORDER: [u16; BLOCK] = order_of_bytes(8, 8);

    #[inline(always)]
    unsafe fn columns(_: &Rows<'_>, lanes: Lanes, block: usize) -> [__m512i; 16] {
        // SAFETY: a block is 8 bytes.
        unsafe {
            let bytes = turn_8(lanes, block * 8);
            let mut columns = [bytes[0]; 16];
            for d in 0..2 {
                let x = bytes[d];
                columns[8 * d] = x;
                columns[8 * d + 1] = _mm512_srli_epi16::<8>(x);
                columns[8 * d + 2] = _mm512_srli_epi16::<2>(x);
                columns[8 * d + 3] = _mm512_srli_epi16::<10>(x);
                columns[8 * d + 4] = _mm512_srli_epi16::<4>(x);
                columns[8 * d + 5] = _mm512_srli_epi16::<12>(x);
                columns[8 * d + 6] = _mm512_srli_epi16::<6>(x);
                columns[8 * d + 7] = _mm512_srli_epi16::<14>(x);
            }
            lowest(columns, 2)
        }
    }

    #[inline(always)]
    unsafe fn pair(_: &Rows<'_>, even: *const u8, odd: *const u8, block: usize) -> [__m512i; 2] {
        static PLACES: [u8; 64] =
            Places { apart: 8, first: 0, modulo: 8, divide: 1, half: 0 }.table();
        static SHIFTS: [[u16; 32]; 2] = [shifts(0, 2, 8, 2), shifts(4, 2, 8, 2)];
        // SAFETY: as above.
        unsafe {
            let even = even.add(block * 8).cast::<i64>().read_unaligned();
            let odd = odd.add(block * 8).cast::<i64>().read_unaligned();
            let both = _mm512_castsi128_si512(_mm_set_epi64x(odd, even));
            let words = _mm512_maskz_permutexvar_epi8(LOW_BYTES, constant(&PLACES), both);
            let first = _mm512_srlv_epi16(words, constant(&SHIFTS[0]));
            lowest([first, _mm512_srlv_epi16(words, constant(&SHIFTS[1]))], 2)
        }
    }
}

/// Codes, then a scale and a minimum for each group of channels.
macro_rules! affine {
    ($name:ident, $codes:ident, $bits:literal) => {
        impl Words for $name {
            const ORDER: [u16; BLOCK] = <$codes as Words>::ORDER;

            #[inline(always)]
            unsafe fn columns(rows: &Rows<'_>, lanes: Lanes, block: usize) -> [__m512i; 16] {
                // SAFETY: by contract.
                unsafe { $codes::columns(rows, lanes, block) }
            }

            #[inline(always)]
            unsafe fn pair(
                rows: &Rows<'_>,
                even: *const u8,
                odd: *const u8,
                block: usize,
            ) -> [__m512i; 2] {
                // SAFETY: by contract.
                unsafe { <$codes as Words>::pair(rows, even, odd, block) }
            }

            #[inline(always)]
            unsafe fn scales_of_16(rows: &Rows<'_>, lanes: Lanes, block: usize) -> __m512 {
                // SAFETY: metadata of all groups follow the codes.
                unsafe { gather_f16(lanes, metadata_at(rows, block, $bits)) }
            }

            #[inline(always)]
            unsafe fn minima_of_16(rows: &Rows<'_>, lanes: Lanes, block: usize) -> __m512 {
                // SAFETY: as above.
                unsafe { gather_f16(lanes, metadata_at(rows, block, $bits) + 2) }
            }
        }
    };
}

affine!(Affine4, Codes4, 4);
affine!(Affine2, Codes2, 2);
