//! Blocks of the formats with levels of their own, with fifth bits or with metadata for a row.

use std::arch::x86_64::*;

use super::format::{Codes4, Format, broadcast_f16, no_tail};
use crate::simd::rows::{E2M1, IQ4_NL, Rows, e4m3, e8m0_half, tq_levels};

/// Codes with a scale and an offset.
#[derive(Clone, Copy)]
pub(in crate::simd) struct Q4_1 {
    codes: Codes4,
    d: __m256,
    m: __m256,
}

impl Format for Q4_1 {
    #[inline(always)]
    unsafe fn open(_: &Rows<'_>, row: *const u8, block: usize) -> Self {
        // SAFETY: a block is 20 bytes: two f16 and 16 bytes of codes.
        unsafe {
            let at = row.add(block * 20);
            Self { codes: Codes4(at.add(4)), d: broadcast_f16(at), m: broadcast_f16(at.add(2)) }
        }
    }

    #[inline(always)]
    unsafe fn part(self, part: usize) -> __m256 {
        // SAFETY: values only. Exact before the addition, so fusing changes nothing.
        unsafe { _mm256_fmadd_ps(self.codes.part(part), self.d, self.m) }
    }

    no_tail!();
}

/// Nibbles and fifth bits.
#[derive(Clone, Copy)]
struct Codes5 {
    nibbles: *const u8,
    fifth: __m256i,
}

impl Codes5 {
    /// # Safety
    /// `at` points to 4 bytes of fifth bits and 16 bytes of nibbles; the CPU has AVX2.
    #[inline(always)]
    unsafe fn open(at: *const u8) -> Self {
        // SAFETY: by contract.
        unsafe {
            let fifth = _mm256_set1_epi32(at.cast::<i32>().read_unaligned());
            Self { nibbles: at.add(4), fifth }
        }
    }

    /// # Safety
    /// As for `open`.
    #[inline(always)]
    unsafe fn part(self, part: usize) -> __m256 {
        // SAFETY: 8 of the 16 bytes.
        unsafe {
            let bytes = _mm_loadl_epi64(self.nibbles.add(part % 2 * 8).cast());
            let bytes = _mm256_cvtepu8_epi32(bytes);
            let low = match part {
                0 | 1 => _mm256_and_si256(bytes, _mm256_set1_epi32(15)),
                _ => _mm256_srli_epi32::<4>(bytes),
            };
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let first = _mm256_set1_epi32(part as i32 * 8);
            let bit = _mm256_srlv_epi32(self.fifth, _mm256_add_epi32(lanes, first));
            let bit = _mm256_and_si256(_mm256_slli_epi32::<4>(bit), _mm256_set1_epi32(16));
            _mm256_cvtepi32_ps(_mm256_or_si256(low, bit))
        }
    }
}

#[derive(Clone, Copy)]
pub(in crate::simd) struct Q5_0 {
    codes: Codes5,
    d: __m256,
    offset: __m256,
}

impl Format for Q5_0 {
    #[inline(always)]
    unsafe fn open(_: &Rows<'_>, row: *const u8, block: usize) -> Self {
        // SAFETY: a block is 22 bytes: an f16, fifth bits and nibbles.
        unsafe {
            let at = row.add(block * 22);
            let d = broadcast_f16(at);
            let offset = _mm256_mul_ps(d, _mm256_set1_ps(-16.0));
            Self { codes: Codes5::open(at.add(2)), d, offset }
        }
    }

    #[inline(always)]
    unsafe fn part(self, part: usize) -> __m256 {
        // SAFETY: values only.
        unsafe { _mm256_fmadd_ps(self.codes.part(part), self.d, self.offset) }
    }

    no_tail!();
}

#[derive(Clone, Copy)]
pub(in crate::simd) struct Q5_1 {
    codes: Codes5,
    d: __m256,
    m: __m256,
}

impl Format for Q5_1 {
    #[inline(always)]
    unsafe fn open(_: &Rows<'_>, row: *const u8, block: usize) -> Self {
        // SAFETY: a block is 24 bytes: two f16, fifth bits and nibbles.
        unsafe {
            let at = row.add(block * 24);
            let (d, m) = (broadcast_f16(at), broadcast_f16(at.add(2)));
            Self { codes: Codes5::open(at.add(4)), d, m }
        }
    }

    #[inline(always)]
    unsafe fn part(self, part: usize) -> __m256 {
        // SAFETY: values only.
        unsafe { _mm256_fmadd_ps(self.codes.part(part), self.d, self.m) }
    }

    no_tail!();
}

/// 16 bytes of a table, by the low (`half` 0) or the high nibbles at `at`.
///
/// # Safety
/// `at` points to 16 bytes; the CPU has AVX2.
#[inline(always)]
pub(super) unsafe fn look_up(table: &[i8; 16], at: *const u8, half: usize) -> __m128i {
    // SAFETY: by contract.
    unsafe {
        let bytes = _mm_loadu_si128(at.cast());
        let bytes = if half == 0 { bytes } else { _mm_srli_epi16::<4>(bytes) };
        let codes = _mm_and_si128(bytes, _mm_set1_epi8(15));
        _mm_shuffle_epi8(_mm_loadu_si128(table.as_ptr().cast()), codes)
    }
}

/// The low or the high eight bytes as numbers.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn widen(bytes: __m128i, high: bool) -> __m256 {
    // SAFETY: values only.
    unsafe {
        let bytes = if high { _mm_unpackhi_epi64(bytes, bytes) } else { bytes };
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))
    }
}

/// Bytes from a table, elements 0 to 15 and 16 to 31, and their scale.
macro_rules! table_of_bytes {
    ($name:ident, $bytes:literal, $levels:expr, $codes_at:literal, $scale:expr) => {
        #[derive(Clone, Copy)]
        pub(in crate::simd) struct $name {
            levels: [__m128i; 2],
            d: __m256,
        }

        impl Format for $name {
            #[inline(always)]
            unsafe fn open(_: &Rows<'_>, row: *const u8, block: usize) -> Self {
                // SAFETY: a block is its scale and 16 bytes of codes.
                unsafe {
                    let at = row.add(block * $bytes);
                    let codes = at.add($codes_at);
                    let levels = [look_up($levels, codes, 0), look_up($levels, codes, 1)];
                    Self { levels, d: $scale(at) }
                }
            }

            #[inline(always)]
            unsafe fn part(self, part: usize) -> __m256 {
                // SAFETY: values only.
                unsafe { _mm256_mul_ps(widen(self.levels[part / 2], part % 2 == 1), self.d) }
            }

            no_tail!();
        }
    };
}

table_of_bytes!(Iq4Nl, 18, &IQ4_NL, 2, broadcast_f16);
table_of_bytes!(Mxfp4, 17, &E2M1, 1, |at: *const u8| _mm256_set1_ps(e8m0_half(*at)));

/// Half of a block of 64: two parts of 16 elements with a scale each.
#[derive(Clone, Copy)]
pub(super) struct Nvfp4 {
    levels: [__m128i; 2],
    d: [f32; 2],
}

impl Format for Nvfp4 {
    #[inline(always)]
    unsafe fn open(_: &Rows<'_>, row: *const u8, block: usize) -> Self {
        // SAFETY: 64 elements are 36 bytes: 4 scales and 32 bytes of codes.
        unsafe {
            let at = row.add(block / 2 * 36);
            let scales = at.add(block % 2 * 2);
            let codes = at.add(4 + block % 2 * 16);
            let levels = [look_up(&E2M1, codes, 0), look_up(&E2M1, codes, 1)];
            Self { levels, d: [0.5 * e4m3(*scales), 0.5 * e4m3(*scales.add(1))] }
        }
    }

    #[inline(always)]
    unsafe fn part(self, part: usize) -> __m256 {
        // SAFETY: values only. Bytes 0 to 7 belong to the first 16 elements: low nibbles first.
        unsafe {
            let levels = widen(self.levels[part % 2], part / 2 == 1);
            _mm256_mul_ps(levels, _mm256_set1_ps(self.d[part / 2]))
        }
    }

    no_tail!();
}

/// # Safety
/// `at` points to an f32.
#[inline(always)]
unsafe fn read_f32(at: *const u8) -> f32 {
    // SAFETY: by contract; the read needs no alignment.
    unsafe { at.cast::<f32>().read_unaligned() }
}

#[derive(Clone, Copy)]
pub(in crate::simd) struct Int8(*const u8);

impl Format for Int8 {
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn open(_: &Rows<'_>, row: *const u8, block: usize) -> Self {
        // SAFETY: `block` starts inside the row.
        Self(unsafe { row.add(block * 32) })
    }

    #[inline(always)]
    unsafe fn part(self, part: usize) -> __m256 {
        // SAFETY: 8 codes of the block.
        unsafe { widen(_mm_loadl_epi64(self.0.add(part * 8).cast()), false) }
    }

    #[inline(always)]
    unsafe fn row_scale(rows: &Rows<'_>, row: *const u8) -> f32 {
        // SAFETY: the scale follows the codes.
        unsafe { read_f32(row.add(rows.dim)) }
    }

    no_tail!();
}

/// 8-bit floats, made f16 by shifts: E4M3 then lacks a factor of 2^8, which the scale takes.
macro_rules! floats_of_8_bits {
    ($name:ident, $factor:literal, $to_f16:expr) => {
        #[derive(Clone, Copy)]
        pub(in crate::simd) struct $name(*const u8);

        impl Format for $name {
            const SCALED: bool = true;

            #[inline(always)]
            unsafe fn open(_: &Rows<'_>, row: *const u8, block: usize) -> Self {
                // SAFETY: `block` starts inside the row.
                Self(unsafe { row.add(block * 32) })
            }

            #[inline(always)]
            unsafe fn part(self, part: usize) -> __m256 {
                // SAFETY: 8 codes of the block.
                unsafe {
                    let bytes = _mm_loadl_epi64(self.0.add(part * 8).cast());
                    _mm256_cvtph_ps($to_f16(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes)))
                }
            }

            #[inline(always)]
            unsafe fn row_scale(rows: &Rows<'_>, row: *const u8) -> f32 {
                // SAFETY: the scale follows the codes.
                unsafe { $factor * read_f32(row.add(rows.dim)) }
            }

            no_tail!();
        }
    };
}

floats_of_8_bits!(E5m2, 1.0, |words| words);
floats_of_8_bits!(E4m3, 256.0, |words| {
    let sign = _mm_and_si128(words, _mm_set1_epi16(i16::MIN));
    let rest = _mm_and_si128(_mm_srli_epi16::<1>(words), _mm_set1_epi16(0x3fff));
    _mm_or_si128(sign, rest)
});

#[derive(Clone, Copy)]
pub(in crate::simd) struct Int4 {
    codes: Codes4,
    s: __m256,
    m: __m256,
}

impl Format for Int4 {
    #[inline(always)]
    unsafe fn open(rows: &Rows<'_>, row: *const u8, block: usize) -> Self {
        // SAFETY: scale and minimum follow the codes.
        unsafe {
            let metadata = row.add(rows.dim / 2);
            let (s, m) = (read_f32(metadata), read_f32(metadata.add(4)));
            let (s, m) = (_mm256_set1_ps(s), _mm256_set1_ps(m));
            Self { codes: Codes4(row.add(block * 16)), s, m }
        }
    }

    #[inline(always)]
    unsafe fn part(self, part: usize) -> __m256 {
        // SAFETY: values only. Not fused: the product is not exact, and levels must agree.
        unsafe { _mm256_add_ps(_mm256_mul_ps(self.codes.part(part), self.s), self.m) }
    }

    no_tail!();
}

/// Eight codes are `BITS` bytes of the stream: each lane shifts its own code down and looks it up
/// by the three lowest bits, which needs no mask; four bits take two tables.
#[derive(Clone, Copy)]
pub(in crate::simd) struct Tq<const BITS: usize> {
    codes: *const u8,
    levels: [__m256; 2],
}

impl<const BITS: usize> Format for Tq<BITS> {
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn open(rows: &Rows<'_>, row: *const u8, block: usize) -> Self {
        let levels = tq_levels(rows.dim)[BITS - 2].as_ptr();
        // SAFETY: `block` starts inside the row; a table has 16 levels.
        unsafe {
            let levels = [_mm256_loadu_ps(levels), _mm256_loadu_ps(levels.add(8))];
            Self { codes: row.add(block * 4 * BITS), levels }
        }
    }

    #[inline(always)]
    unsafe fn part(self, part: usize) -> __m256 {
        let step = BITS as i32;
        // SAFETY: 4 bytes from the part on lie in the row, because the norm follows the codes.
        unsafe {
            let bits = self.codes.add(part * BITS).cast::<i32>().read_unaligned();
            let shifts = _mm256_mullo_epi32(
                _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                _mm256_set1_epi32(step),
            );
            let codes = _mm256_srlv_epi32(_mm256_set1_epi32(bits), shifts);
            let low = _mm256_permutevar8x32_ps(self.levels[0], codes);
            if BITS < 4 {
                return low;
            }
            let high = _mm256_permutevar8x32_ps(self.levels[1], codes);
            let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            _mm256_blendv_ps(low, high, fourth)
        }
    }

    #[inline(always)]
    unsafe fn row_scale(rows: &Rows<'_>, row: *const u8) -> f32 {
        // SAFETY: the norm follows the codes.
        unsafe {
            let norm = row.add(rows.dim * BITS / 8).cast::<u16>().read_unaligned();
            _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(norm))))
        }
    }

    no_tail!();
}
