//! Encoding, bit for bit as the scalar level does it: multiplications and additions are not fused.

use std::arch::x86_64::*;

use super::math::load;
use crate::simd::rows::{BLOCK, Format};
use crate::simd::scalar::{Q4_0_LIMIT, Q8_0_LIMIT, reciprocal};
use crate::simd::{encode_affine, sanitize};

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn f16(values: &[f32], out: &mut [u8]) {
    let (vectors, rest) = values.as_chunks::<8>();
    let (packed, packed_rest) = out.split_at_mut(vectors.len() * 16);
    for (x, out) in vectors.iter().zip(packed.as_chunks_mut::<16>().0) {
        let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load(x));
        store_128(out, halves);
    }
    for (x, out) in rest.iter().zip(packed_rest.as_chunks_mut().0) {
        *out = half::f16::from_f32(*x).to_le_bytes();
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn bf16(values: &[f32], out: &mut [u8]) {
    let (vectors, rest) = values.as_chunks::<8>();
    let (packed, packed_rest) = out.split_at_mut(vectors.len() * 16);
    for (x, out) in vectors.iter().zip(packed.as_chunks_mut::<16>().0) {
        let x = load(x);
        let bits = _mm256_castps_si256(x);
        let upper = _mm256_srli_epi32::<16>(bits);
        let odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
        let bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, bias));
        let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
        let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        let words = _mm256_blendv_epi8(rounded, quiet, is_nan);
        let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(words, words));
        store_128(out, _mm256_castsi256_si128(packed));
    }
    for (x, out) in rest.iter().zip(packed_rest.as_chunks_mut().0) {
        *out = half::bf16::from_f32(*x).to_le_bytes();
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q8_0(values: &[f32], out: &mut [u8]) {
    for (values, out) in values.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<34>().0) {
        let x = load_block(values, Q8_0_LIMIT);
        let d = largest(x) / 127.0;
        let inverse = _mm256_set1_ps(reciprocal(d));
        let mut codes = [_mm256_setzero_si256(); 4];
        for (codes, x) in codes.iter_mut().zip(x) {
            *codes = round_half_away(_mm256_mul_ps(x, inverse));
        }
        let [a, b, c, e] = codes;
        let words = (_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, e));
        // The packs work within 128-bit lanes; the permutation puts their dwords in order.
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        let bytes = _mm256_packs_epi16(words.0, words.1);
        let bytes = _mm256_permutevar8x32_epi32(bytes, order);
        out[..2].copy_from_slice(&f16_of(d));
        // SAFETY: `out` has 32 bytes after the scale.
        unsafe { _mm256_storeu_si256(out[2..].as_mut_ptr().cast(), bytes) };
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q4_0(values: &[f32], out: &mut [u8]) {
    for (values, out) in values.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<18>().0) {
        let x = load_block(values, Q4_0_LIMIT);
        let d = signed(x) / -8.0;
        let inverse = _mm256_set1_ps(reciprocal(d));
        let mut codes = [_mm256_setzero_si256(); 4];
        for (codes, x) in codes.iter_mut().zip(x) {
            let code = _mm256_add_ps(_mm256_mul_ps(x, inverse), _mm256_set1_ps(8.5));
            *codes = _mm256_min_epi32(_mm256_cvttps_epi32(code), _mm256_set1_epi32(15));
        }
        let [a, b, c, e] = codes;
        // Low nibbles are elements 0..16, high nibbles 16..32.
        let first = _mm256_or_si256(a, _mm256_slli_epi32::<4>(c));
        let second = _mm256_or_si256(b, _mm256_slli_epi32::<4>(e));
        let words = _mm256_permute4x64_epi64::<0b1101_1000>(_mm256_packus_epi32(first, second));
        let low = _mm256_castsi256_si128(words);
        let bytes = _mm_packus_epi16(low, _mm256_extracti128_si256::<1>(words));
        out[..2].copy_from_slice(&f16_of(d));
        // SAFETY: `out` has 16 bytes after the scale.
        unsafe { _mm_storeu_si128(out[2..].as_mut_ptr().cast(), bytes) };
    }
}

/// The loops of every level, compiled for this one.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rows(format: Format, values: &[f32], dim: usize, out: &mut [u8]) {
    crate::simd::encode::rows(format, values, dim, out);
}

/// As above.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn all_within(values: &[f32], limit: f32) -> bool {
    crate::simd::encode::fits(values, limit)
}

/// As above.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn channel_ranges(values: &[f32], low: &mut [f32], high: &mut [f32]) {
    encode_affine::channel_ranges(values, low, high);
}

/// As above.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn group_ranges(row: &[f32], group: usize, low: &mut [f32], high: &mut [f32]) {
    for ((values, low), high) in row.chunks(group).zip(low).zip(high) {
        let mut lows = [_mm256_set1_ps(f32::INFINITY); 4];
        let mut highs = [_mm256_set1_ps(f32::NEG_INFINITY); 4];
        for block in values.as_chunks().0 {
            let x = vectors(block);
            for i in 0..4 {
                lows[i] = _mm256_min_ps(x[i], lows[i]);
                highs[i] = _mm256_max_ps(x[i], highs[i]);
            }
        }
        (*low, *high) = reduce(lows, highs);
    }
}

/// As above.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn codes(bits: usize, values: &[f32], inverse: &[f32], m: &[f32], out: &mut [u8]) {
    encode_affine::codes(bits, values, inverse, m, out);
}

/// The block as vectors, made finite and limited.
#[inline]
#[target_feature(enable = "avx2")]
fn load_block(values: &[f32; BLOCK], limit: f32) -> [__m256; 4] {
    let x = vectors(values);
    let mut above = _mm256_setzero_ps();
    for x in x {
        // True for NaN as well.
        let outside = _mm256_cmp_ps::<_CMP_NLE_UQ>(absolute(x), _mm256_set1_ps(limit));
        above = _mm256_or_ps(above, outside);
    }
    if _mm256_movemask_ps(above) == 0 { x } else { limited(values, limit) }
}

#[cold]
#[target_feature(enable = "avx2")]
fn limited(values: &[f32; BLOCK], limit: f32) -> [__m256; 4] {
    let mut values = *values;
    sanitize(&mut values, limit);
    vectors(&values)
}

#[inline]
#[target_feature(enable = "avx2")]
fn vectors(values: &[f32; BLOCK]) -> [__m256; 4] {
    let parts = values.as_chunks::<8>().0;
    [load(&parts[0]), load(&parts[1]), load(&parts[2]), load(&parts[3])]
}

/// The smallest and the largest element.
#[inline]
#[target_feature(enable = "avx2")]
fn range(x: [__m256; 4]) -> (f32, f32) {
    reduce(x, x)
}

/// The smallest element of the first and the largest of the second argument.
#[inline]
#[target_feature(enable = "avx2")]
fn reduce(lows: [__m256; 4], highs: [__m256; 4]) -> (f32, f32) {
    let [a, b, c, d] = highs;
    let high = _mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d));
    let [a, b, c, d] = lows;
    let low = _mm256_min_ps(_mm256_min_ps(a, b), _mm256_min_ps(c, d));
    // Both maxima at once: of the elements, and of the negated ones.
    let low = _mm256_xor_ps(low, _mm256_set1_ps(-0.0));
    let high = _mm_max_ps(_mm256_castps256_ps128(high), _mm256_extractf128_ps::<1>(high));
    let low = _mm_max_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps::<1>(low));
    let both = _mm_max_ps(_mm_unpacklo_ps(high, low), _mm_unpackhi_ps(high, low));
    let both = _mm_max_ps(both, _mm_movehl_ps(both, both));
    (-_mm_cvtss_f32(_mm_movehdup_ps(both)), _mm_cvtss_f32(both))
}

/// The largest magnitude.
#[inline]
#[target_feature(enable = "avx2")]
fn largest(x: [__m256; 4]) -> f32 {
    let first = _mm256_max_ps(absolute(x[0]), absolute(x[1]));
    let second = _mm256_max_ps(absolute(x[2]), absolute(x[3]));
    super::math::largest_lane(_mm256_max_ps(first, second))
}

/// The first element of largest magnitude, with its sign.
#[inline]
#[target_feature(enable = "avx2")]
fn signed(x: [__m256; 4]) -> f32 {
    let (low, high) = range(x);
    if high == -low {
        return first_of_equals(x, high);
    }
    if high > -low { high } else { low }
}

/// The first element of magnitude `most`, with its sign; 0 for a zero block.
#[target_feature(enable = "avx2")]
fn first_of_equals(x: [__m256; 4], most: f32) -> f32 {
    if most == 0.0 {
        return 0.0;
    }
    for x in x {
        let equal = _mm256_cmp_ps::<_CMP_EQ_OQ>(absolute(x), _mm256_set1_ps(most));
        let lanes = _mm256_movemask_ps(equal);
        if lanes != 0 {
            let is_negative = _mm256_movemask_ps(x) >> lanes.trailing_zeros() & 1 == 1;
            return if is_negative { -most } else { most };
        }
    }
    most
}

#[inline]
#[target_feature(enable = "avx2")]
fn absolute(x: __m256) -> __m256 {
    _mm256_andnot_ps(_mm256_set1_ps(-0.0), x)
}

/// Rounds half away from zero: the number just below one half is added in the direction of the
/// sign, so that 0.49999997 stays below 1, and the sum is truncated.
#[inline]
#[target_feature(enable = "avx2")]
fn round_half_away(x: __m256) -> __m256i {
    let sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0));
    let half = _mm256_or_ps(_mm256_set1_ps(0.5f32.next_down()), sign);
    _mm256_cvttps_epi32(_mm256_add_ps(x, half))
}

#[inline]
#[target_feature(enable = "f16c")]
pub(in crate::simd) fn f16_of(x: f32) -> [u8; 2] {
    let half = _mm_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm_set_ss(x));
    (_mm_cvtsi128_si32(half) as u16).to_le_bytes()
}

#[inline]
#[target_feature(enable = "avx")]
fn store_128(out: &mut [u8; 16], bytes: __m128i) {
    // SAFETY: sixteen bytes.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), bytes) };
}
