//! How a block of 32 elements becomes four vectors of 8. A block is *opened* once (scale, packed
//! bytes) and its parts are made one at a time, which keeps few registers alive.

use std::arch::x86_64::*;

use crate::simd::rows::{BLOCK, Rows};

/// A format whose rows can be read as vectors of 8.
pub(in crate::simd) trait Format: Copy {
    /// Whether rows have a factor that the parts leave out, because it is cheaper to multiply the
    /// score or the weight of the row.
    const SCALED: bool = false;

    /// Opens block `block` of the row at `row`.
    ///
    /// # Safety
    /// The CPU has AVX2, FMA and F16C, and `row` is a row of `rows`. Raw formats may be opened at a
    /// last, incomplete block.
    unsafe fn open(rows: &Rows<'_>, row: *const u8, block: usize) -> Self;

    /// Elements `8 * part..8 * part + 8` of the block.
    ///
    /// # Safety
    /// As for `open`; the part lies inside the row.
    unsafe fn part(self, part: usize) -> __m256;

    /// One element, for the tails of raw rows.
    ///
    /// # Safety
    /// As for `open`; the column lies inside the row.
    unsafe fn element(self, column: usize) -> f32;

    /// The factor of a row, if `SCALED`.
    ///
    /// # Safety
    /// As for `open`.
    #[inline(always)]
    unsafe fn row_scale(_: &Rows<'_>, _: *const u8) -> f32 {
        1.0
    }
}

/// A format whose rows are plain numbers, one after the other, in rows of any length.
pub(super) trait Raw: Format {
    /// Elements `8 * i..8 * i + 8` of a row.
    ///
    /// # Safety
    /// As for `open`; the elements lie inside the row.
    unsafe fn vector(row: *const u8, i: usize) -> __m256;
}

/// A raw block is just where it starts.
macro_rules! raw {
    ($name:ident, $bytes:literal, $load:expr, $element:expr) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name(*const u8);

        impl Format for $name {
            #[inline(always)]
            unsafe fn open(_: &Rows<'_>, row: *const u8, block: usize) -> Self {
                // SAFETY: `block` starts inside the row.
                Self(unsafe { row.add(block * BLOCK * $bytes) })
            }

            #[inline(always)]
            unsafe fn part(self, part: usize) -> __m256 {
                // SAFETY: the part lies inside the row; loads are unaligned.
                unsafe { $load(self.0.add(part * 8 * $bytes)) }
            }

            #[inline(always)]
            unsafe fn element(self, column: usize) -> f32 {
                let at = self.0.wrapping_add(column * $bytes).cast::<[u8; $bytes]>();
                // SAFETY: the column lies inside the row, and bytes need no alignment.
                $element(unsafe { at.read() })
            }
        }

        impl Raw for $name {
            #[inline(always)]
            unsafe fn vector(row: *const u8, i: usize) -> __m256 {
                // SAFETY: by contract; loads are unaligned.
                unsafe { $load(row.add(i * 8 * $bytes)) }
            }
        }
    };
}

raw!(F32, 4, |at: *const u8| _mm256_loadu_ps(at.cast()), f32::from_le_bytes);
raw!(F16, 2, |at: *const u8| _mm256_cvtph_ps(_mm_loadu_si128(at.cast())), |bytes| {
    half::f16::from_le_bytes(bytes).to_f32()
});
raw!(Bf16, 2, |at: *const u8| widen_bf16(_mm_loadu_si128(at.cast())), |bytes| {
    half::bf16::from_le_bytes(bytes).to_f32()
});

#[inline]
#[target_feature(enable = "avx2")]
fn widen_bf16(halves: __m128i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
}

/// Blocks never have tails: the elements of their rows are a multiple of 32.
macro_rules! no_tail {
    () => {
        #[inline(always)]
        unsafe fn element(self, _: usize) -> f32 {
            unreachable!("a row of whole blocks has no tail")
        }
    };
}

pub(super) use no_tail;

#[derive(Clone, Copy)]
pub(in crate::simd) struct Q8_0 {
    d: __m256,
    codes: *const u8,
}

impl Format for Q8_0 {
    #[inline(always)]
    unsafe fn open(_: &Rows<'_>, row: *const u8, block: usize) -> Self {
        // SAFETY: a block is 34 bytes: the f16 scale and 32 codes.
        unsafe {
            let at = row.add(block * 34);
            Self { d: broadcast_f16(at), codes: at.add(2) }
        }
    }

    #[inline(always)]
    unsafe fn part(self, part: usize) -> __m256 {
        // SAFETY: 8 codes of the block.
        unsafe {
            let codes = _mm_loadl_epi64(self.codes.add(part * 8).cast());
            _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), self.d)
        }
    }

    no_tail!();
}

/// 32 nibbles: 16 bytes, whose low halves are the first parts. Parts 0 and 2, 1 and 3 come from the
/// same bytes: taken in that order, only one vector of bytes needs a register.
#[derive(Clone, Copy)]
pub(in crate::simd) struct Codes4(pub(super) *const u8);

impl Format for Codes4 {
    #[inline(always)]
    unsafe fn open(_: &Rows<'_>, row: *const u8, block: usize) -> Self {
        // SAFETY: a block is 16 bytes.
        unsafe { Self(row.add(block * 16)) }
    }

    #[inline(always)]
    unsafe fn part(self, part: usize) -> __m256 {
        // SAFETY: 8 of the 16 bytes.
        unsafe {
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(self.0.add(part % 2 * 8).cast()));
            _mm256_cvtepi32_ps(match part {
                0 | 1 => _mm256_and_si256(bytes, _mm256_set1_epi32(15)),
                _ => _mm256_srli_epi32::<4>(bytes),
            })
        }
    }

    no_tail!();
}

/// 32 codes of 2 bits: byte `j` in lane `j`.
#[derive(Clone, Copy)]
pub(in crate::simd) struct Codes2(__m256i);

impl Format for Codes2 {
    #[inline(always)]
    unsafe fn open(_: &Rows<'_>, row: *const u8, block: usize) -> Self {
        // SAFETY: a block is 8 bytes.
        unsafe { Self(_mm256_cvtepu8_epi32(_mm_loadl_epi64(row.add(block * 8).cast()))) }
    }

    #[inline(always)]
    unsafe fn part(self, part: usize) -> __m256 {
        // SAFETY: values only.
        unsafe {
            let shifted = match part {
                0 => self.0,
                1 => _mm256_srli_epi32::<2>(self.0),
                2 => _mm256_srli_epi32::<4>(self.0),
                _ => _mm256_srli_epi32::<6>(self.0),
            };
            _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(3)))
        }
    }

    no_tail!();
}

/// `d * (q - 8)` as `d * q - 8 * d`, which is exact as well: d has 11 significant bits.
#[derive(Clone, Copy)]
pub(in crate::simd) struct Q4_0 {
    codes: Codes4,
    d: __m256,
    offset: __m256,
}

impl Format for Q4_0 {
    #[inline(always)]
    unsafe fn open(_: &Rows<'_>, row: *const u8, block: usize) -> Self {
        // SAFETY: a block is 18 bytes: the f16 scale and 16 bytes of codes.
        unsafe {
            let at = row.add(block * 18);
            let d = broadcast_f16(at);
            let offset = _mm256_mul_ps(d, _mm256_set1_ps(-8.0));
            Self { codes: Codes4(at.add(2)), d, offset }
        }
    }

    #[inline(always)]
    unsafe fn part(self, part: usize) -> __m256 {
        // SAFETY: values only.
        unsafe { _mm256_fmadd_ps(self.codes.part(part), self.d, self.offset) }
    }

    no_tail!();
}

/// Codes with the scale and the minimum of their group of channels.
#[derive(Clone, Copy)]
pub(in crate::simd) struct Affine<C> {
    codes: C,
    s: __m256,
    m: __m256,
}

pub(in crate::simd) type Affine4 = Affine<Codes4>;
pub(in crate::simd) type Affine2 = Affine<Codes2>;

/// Bits of a code.
trait Width {
    const BITS: usize;
}

impl Width for Codes4 {
    const BITS: usize = 4;
}

impl Width for Codes2 {
    const BITS: usize = 2;
}

impl<C: Format + Width> Format for Affine<C> {
    #[inline(always)]
    unsafe fn open(rows: &Rows<'_>, row: *const u8, block: usize) -> Self {
        // A group is 32 times a power of two, so a shift divides by it.
        let group = block >> (rows.group.trailing_zeros() - BLOCK.trailing_zeros());
        // SAFETY: the metadata of all groups follow the codes of the row.
        unsafe {
            let pair = row.add(rows.dim * C::BITS / 8 + group * 4).cast::<i32>().read_unaligned();
            let pair = _mm_cvtph_ps(_mm_cvtsi32_si128(pair));
            let m = _mm256_broadcastss_ps(_mm_movehdup_ps(pair));
            Self { codes: C::open(rows, row, block), s: _mm256_broadcastss_ps(pair), m }
        }
    }

    #[inline(always)]
    unsafe fn part(self, part: usize) -> __m256 {
        // SAFETY: values only.
        unsafe { _mm256_fmadd_ps(self.codes.part(part), self.s, self.m) }
    }

    no_tail!();
}

/// One f16 in every lane.
///
/// # Safety
/// The CPU has AVX2 and F16C, and `at` points to two bytes.
#[inline(always)]
pub(super) unsafe fn broadcast_f16(at: *const u8) -> __m256 {
    // SAFETY: by contract.
    unsafe { _mm256_cvtph_ps(_mm_set1_epi16(at.cast::<i16>().read_unaligned())) }
}
