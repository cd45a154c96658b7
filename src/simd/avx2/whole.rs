//! Formats whose rows are small integers times a scale, as vectors of 16-bit integers.

use std::arch::x86_64::*;

use super::format::{Affine2, Affine4, Codes2, Codes4, Format, Q4_0, Q8_0, broadcast_f16};
use super::levels::{Int4, Int8, Iq4Nl, Mxfp4, Q4_1, Q5_0, Q5_1, look_up};
use crate::simd::rows::{BLOCK, E2M1, IQ4_NL, Rows, e8m0_half};

/// What the integers of a row are multiplied with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::simd) enum Factor {
    /// Nothing.
    One,
    /// A scale for each row.
    Row,
    /// A scale for each block of 32.
    Block,
}

/// Rows of blocks of 32 integers: element = integer * scale + minimum.
pub(in crate::simd) trait Whole: Format {
    const FACTOR: Factor;
    /// Whether blocks have a minimum.
    const HAS_MINIMUM: bool = false;
    /// The largest magnitude of an integer.
    const LARGEST: i32;

    /// Elements `16 * half..16 * half + 16` of a block.
    ///
    /// # Safety
    /// The CPU has AVX2, FMA and F16C; `row` is a row of this format that has the block.
    unsafe fn half(rows: &Rows<'_>, row: *const u8, block: usize, half: usize) -> __m256i;

    /// The scales of a block in eight rows; 1 where `FACTOR` is `One`.
    ///
    /// # Safety
    /// As for `half`.
    unsafe fn scales(_: &Rows<'_>, _: &[*const u8; 8], _block: usize) -> __m256 {
        // SAFETY: values only.
        unsafe { _mm256_set1_ps(1.0) }
    }

    /// The minima of a block in eight rows, if `HAS_MINIMUM`.
    ///
    /// # Safety
    /// As for `half`.
    unsafe fn minima(_: &Rows<'_>, _: &[*const u8; 8], _block: usize) -> __m256 {
        // SAFETY: values only.
        unsafe { _mm256_setzero_ps() }
    }

    /// The scale of a block of one row in every lane.
    ///
    /// # Safety
    /// As for `half`.
    unsafe fn scale(_: &Rows<'_>, _: *const u8, _block: usize) -> __m256 {
        // SAFETY: values only.
        unsafe { _mm256_set1_ps(1.0) }
    }

    /// The minimum of a block of one row in every lane.
    ///
    /// # Safety
    /// As for `half`.
    unsafe fn minimum(_: &Rows<'_>, _: *const u8, _block: usize) -> __m256 {
        // SAFETY: values only.
        unsafe { _mm256_setzero_ps() }
    }
}

/// Eight f16 at one distance from the start of each row.
///
/// # Safety
/// The CPU has F16C and AVX; there are two bytes at each place.
#[inline(always)]
pub(super) unsafe fn gather_f16(starts: &[*const u8; 8], distance: usize) -> __m256 {
    // SAFETY: by contract.
    unsafe {
        let at = |i: usize| starts[i].add(distance).cast::<i16>().read_unaligned();
        let halves = _mm_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
        _mm256_cvtph_ps(halves)
    }
}

/// 16 nibbles, low or high.
///
/// # Safety
/// The CPU has AVX2; `at` points to 16 bytes.
#[inline(always)]
unsafe fn nibbles(at: *const u8, half: usize) -> __m256i {
    // SAFETY: by contract.
    unsafe {
        let bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(at.cast()));
        match half {
            0 => _mm256_and_si256(bytes, _mm256_set1_epi16(15)),
            _ => _mm256_srli_epi16::<4>(bytes),
        }
    }
}

/// Blocks that start with an f16 scale, and perhaps an f16 minimum after it.
macro_rules! scaled {
    ($bytes:literal) => {
        const FACTOR: Factor = Factor::Block;

        #[inline(always)]
        unsafe fn scales(_: &Rows<'_>, starts: &[*const u8; 8], block: usize) -> __m256 {
            // SAFETY: a block starts with its f16 scale.
            unsafe { gather_f16(starts, block * $bytes) }
        }

        #[inline(always)]
        unsafe fn scale(_: &Rows<'_>, row: *const u8, block: usize) -> __m256 {
            // SAFETY: as above.
            unsafe { broadcast_f16(row.add(block * $bytes)) }
        }
    };
    ($bytes:literal, with minimum) => {
        scaled!($bytes);
        const HAS_MINIMUM: bool = true;

        #[inline(always)]
        unsafe fn minima(_: &Rows<'_>, starts: &[*const u8; 8], block: usize) -> __m256 {
            // SAFETY: the minimum follows the scale.
            unsafe { gather_f16(starts, block * $bytes + 2) }
        }

        #[inline(always)]
        unsafe fn minimum(_: &Rows<'_>, row: *const u8, block: usize) -> __m256 {
            // SAFETY: as above.
            unsafe { broadcast_f16(row.add(block * $bytes + 2)) }
        }
    };
}

impl Whole for Q8_0 {
    const LARGEST: i32 = 128;
    scaled!(34);

    #[inline(always)]
    unsafe fn half(_: &Rows<'_>, row: *const u8, block: usize, half: usize) -> __m256i {
        // SAFETY: a block is its scale and 32 codes.
        unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(row.add(block * 34 + 2 + half * 16).cast())) }
    }
}

impl Whole for Q4_0 {
    const LARGEST: i32 = 8;
    scaled!(18);

    #[inline(always)]
    unsafe fn half(_: &Rows<'_>, row: *const u8, block: usize, half: usize) -> __m256i {
        // SAFETY: a block is its scale and 16 bytes of codes.
        unsafe { _mm256_sub_epi16(nibbles(row.add(block * 18 + 2), half), _mm256_set1_epi16(8)) }
    }
}

impl Whole for Q4_1 {
    const LARGEST: i32 = 15;
    scaled!(20, with minimum);

    #[inline(always)]
    unsafe fn half(_: &Rows<'_>, row: *const u8, block: usize, half: usize) -> __m256i {
        // SAFETY: a block is two f16 and 16 bytes of codes.
        unsafe { nibbles(row.add(block * 20 + 4), half) }
    }
}

/// 16 nibbles with their fifth bits; `at` points to the 4 bytes of fifth bits.
///
/// # Safety
/// The CPU has AVX2; 16 bytes of nibbles follow the fifth bits.
#[inline(always)]
unsafe fn five_bits(at: *const u8, half: usize) -> __m256i {
    // SAFETY: by contract.
    unsafe {
        let fifth = _mm256_set1_epi16(at.add(2 * half).cast::<i16>().read_unaligned());
        let own = _mm256_setr_epi16(
            1,
            2,
            4,
            8,
            16,
            32,
            64,
            128,
            256,
            512,
            1024,
            2048,
            4096,
            8192,
            16384,
            i16::MIN,
        );
        let is_set = _mm256_cmpeq_epi16(_mm256_and_si256(fifth, own), own);
        let fifth = _mm256_and_si256(is_set, _mm256_set1_epi16(16));
        _mm256_or_si256(nibbles(at.add(4), half), fifth)
    }
}

impl Whole for Q5_0 {
    const LARGEST: i32 = 16;
    scaled!(22);

    #[inline(always)]
    unsafe fn half(_: &Rows<'_>, row: *const u8, block: usize, half: usize) -> __m256i {
        // SAFETY: a block is an f16, fifth bits and nibbles.
        unsafe { _mm256_sub_epi16(five_bits(row.add(block * 22 + 2), half), _mm256_set1_epi16(16)) }
    }
}

impl Whole for Q5_1 {
    const LARGEST: i32 = 31;
    scaled!(24, with minimum);

    #[inline(always)]
    unsafe fn half(_: &Rows<'_>, row: *const u8, block: usize, half: usize) -> __m256i {
        // SAFETY: a block is two f16, fifth bits and nibbles.
        unsafe { five_bits(row.add(block * 24 + 4), half) }
    }
}

impl Whole for Iq4Nl {
    const LARGEST: i32 = 127;
    scaled!(18);

    #[inline(always)]
    unsafe fn half(_: &Rows<'_>, row: *const u8, block: usize, half: usize) -> __m256i {
        // SAFETY: a block is its scale and 16 bytes of codes.
        unsafe { _mm256_cvtepi8_epi16(look_up(&IQ4_NL, row.add(block * 18 + 2), half)) }
    }
}

impl Whole for Mxfp4 {
    const FACTOR: Factor = Factor::Block;
    const LARGEST: i32 = 12;

    #[inline(always)]
    unsafe fn half(_: &Rows<'_>, row: *const u8, block: usize, half: usize) -> __m256i {
        // SAFETY: a block is its exponent and 16 bytes of codes.
        unsafe { _mm256_cvtepi8_epi16(look_up(&E2M1, row.add(block * 17 + 1), half)) }
    }

    #[inline(always)]
    unsafe fn scales(_: &Rows<'_>, starts: &[*const u8; 8], block: usize) -> __m256 {
        let mut scales = [0.0; 8];
        for (scale, start) in scales.iter_mut().zip(starts) {
            // SAFETY: a block starts with its exponent.
            *scale = e8m0_half(unsafe { *start.add(block * 17) });
        }
        // SAFETY: eight values.
        unsafe { _mm256_loadu_ps(scales.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn scale(_: &Rows<'_>, row: *const u8, block: usize) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_set1_ps(e8m0_half(*row.add(block * 17))) }
    }
}

/// Eight f32 at one distance from the start of each row.
///
/// # Safety
/// The CPU has AVX; there are four bytes at each place.
#[inline(always)]
unsafe fn gather_f32(starts: &[*const u8; 8], distance: usize) -> __m256 {
    let mut values = [0.0f32; 8];
    for (value, start) in values.iter_mut().zip(starts) {
        // SAFETY: by contract.
        *value = unsafe { start.add(distance).cast::<f32>().read_unaligned() };
    }
    // SAFETY: eight values.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

/// One f32 in every lane.
///
/// # Safety
/// The CPU has AVX; `at` points to four bytes.
#[inline(always)]
unsafe fn broadcast_f32(at: *const u8) -> __m256 {
    // SAFETY: by contract.
    unsafe { _mm256_set1_ps(at.cast::<f32>().read_unaligned()) }
}

impl Whole for Int8 {
    const FACTOR: Factor = Factor::Row;
    const LARGEST: i32 = 128;

    #[inline(always)]
    unsafe fn half(_: &Rows<'_>, row: *const u8, block: usize, half: usize) -> __m256i {
        // SAFETY: 16 codes of the row.
        unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(row.add(block * BLOCK + half * 16).cast())) }
    }

    #[inline(always)]
    unsafe fn scales(rows: &Rows<'_>, starts: &[*const u8; 8], _: usize) -> __m256 {
        // SAFETY: the scale follows the codes.
        unsafe { gather_f32(starts, rows.dim) }
    }

    #[inline(always)]
    unsafe fn scale(rows: &Rows<'_>, row: *const u8, _: usize) -> __m256 {
        // SAFETY: as above.
        unsafe { broadcast_f32(row.add(rows.dim)) }
    }
}

impl Whole for Int4 {
    const FACTOR: Factor = Factor::Row;
    const HAS_MINIMUM: bool = true;
    const LARGEST: i32 = 15;

    #[inline(always)]
    unsafe fn half(_: &Rows<'_>, row: *const u8, block: usize, half: usize) -> __m256i {
        // SAFETY: a block is 16 bytes.
        unsafe { nibbles(row.add(block * 16), half) }
    }

    #[inline(always)]
    unsafe fn scales(rows: &Rows<'_>, starts: &[*const u8; 8], _: usize) -> __m256 {
        // SAFETY: scale and minimum follow the codes.
        unsafe { gather_f32(starts, rows.dim / 2) }
    }

    #[inline(always)]
    unsafe fn minima(rows: &Rows<'_>, starts: &[*const u8; 8], _: usize) -> __m256 {
        // SAFETY: as above.
        unsafe { gather_f32(starts, rows.dim / 2 + 4) }
    }

    #[inline(always)]
    unsafe fn scale(rows: &Rows<'_>, row: *const u8, _: usize) -> __m256 {
        // SAFETY: as above.
        unsafe { broadcast_f32(row.add(rows.dim / 2)) }
    }

    #[inline(always)]
    unsafe fn minimum(rows: &Rows<'_>, row: *const u8, _: usize) -> __m256 {
        // SAFETY: as above.
        unsafe { broadcast_f32(row.add(rows.dim / 2 + 4)) }
    }
}

impl Whole for Codes4 {
    const FACTOR: Factor = Factor::One;
    const LARGEST: i32 = 15;

    #[inline(always)]
    unsafe fn half(_: &Rows<'_>, row: *const u8, block: usize, half: usize) -> __m256i {
        // SAFETY: a block is 16 bytes.
        unsafe { nibbles(row.add(block * 16), half) }
    }
}

impl Whole for Codes2 {
    const FACTOR: Factor = Factor::One;
    const LARGEST: i32 = 3;

    #[inline(always)]
    unsafe fn half(_: &Rows<'_>, row: *const u8, block: usize, half: usize) -> __m256i {
        // SAFETY: a block is 8 bytes; elements 8 apart are 2 bits apart.
        unsafe {
            let bytes = _mm_loadl_epi64(row.add(block * 8).cast());
            let bytes = if half == 0 { bytes } else { _mm_srli_epi16::<4>(bytes) };
            let both = _mm_unpacklo_epi64(bytes, _mm_srli_epi16::<2>(bytes));
            _mm256_cvtepu8_epi16(_mm_and_si128(both, _mm_set1_epi8(3)))
        }
    }
}

/// Codes, then a scale and a minimum for each group of channels.
macro_rules! affine {
    ($name:ident, $codes:ident, $bits:literal) => {
        impl Whole for $name {
            const FACTOR: Factor = Factor::Block;
            const HAS_MINIMUM: bool = true;
            const LARGEST: i32 = <$codes as Whole>::LARGEST;

            #[inline(always)]
            unsafe fn half(rows: &Rows<'_>, row: *const u8, block: usize, half: usize) -> __m256i {
                // SAFETY: by contract.
                unsafe { <$codes as Whole>::half(rows, row, block, half) }
            }

            #[inline(always)]
            unsafe fn scales(rows: &Rows<'_>, starts: &[*const u8; 8], block: usize) -> __m256 {
                // SAFETY: metadata of all groups follow the codes.
                unsafe { gather_f16(starts, metadata_at(rows, block, $bits)) }
            }

            #[inline(always)]
            unsafe fn minima(rows: &Rows<'_>, starts: &[*const u8; 8], block: usize) -> __m256 {
                // SAFETY: as above.
                unsafe { gather_f16(starts, metadata_at(rows, block, $bits) + 2) }
            }

            #[inline(always)]
            unsafe fn scale(rows: &Rows<'_>, row: *const u8, block: usize) -> __m256 {
                // SAFETY: as above.
                unsafe { broadcast_f16(row.add(metadata_at(rows, block, $bits))) }
            }

            #[inline(always)]
            unsafe fn minimum(rows: &Rows<'_>, row: *const u8, block: usize) -> __m256 {
                // SAFETY: as above.
                unsafe { broadcast_f16(row.add(metadata_at(rows, block, $bits) + 2)) }
            }
        }
    };
}

affine!(Affine4, Codes4, 4);
affine!(Affine2, Codes2, 2);

/// Where the scale of the group of a block is in a row of codes of `bits` bits.
#[inline(always)]
pub(in crate::simd) fn metadata_at(rows: &Rows<'_>, block: usize, bits: usize) -> usize {
    // A group is 32 times a power of two, so a shift divides by it.
    let group = block >> (rows.group.trailing_zeros() - BLOCK.trailing_zeros());
    rows.dim * bits / 8 + group * 4
}
