//! Encoding, bit for bit as the scalar level does it: multiplications and additions are not fused.

use std::arch::x86_64::*;

use super::math::{load, mask};
use crate::simd::avx2::f16_of;
use crate::simd::rows::BLOCK;
use crate::simd::sanitize;
use crate::simd::scalar::{Q4_0_LIMIT, Q8_0_LIMIT, reciprocal};

/// Values of a block, finite and limited.
type Block = [__m512; 2];

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn f16(values: &[f32], out: &mut [u8]) {
    for (x, out) in values.chunks(16).zip(out.chunks_mut(32)) {
        let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load(x));
        // SAFETY: as many lanes as there are values are written.
        unsafe { _mm256_mask_storeu_epi16(out.as_mut_ptr().cast(), mask(x.len()), halves) };
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn q8_0(values: &[f32], out: &mut [u8]) {
    for (values, out) in values.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<34>().0) {
        let x = load_block(values, Q8_0_LIMIT);
        let largest = _mm512_max_ps(_mm512_abs_ps(x[0]), _mm512_abs_ps(x[1]));
        let d = _mm512_reduce_max_ps(largest) / 127.0;
        let inverse = _mm512_set1_ps(reciprocal(d));
        out[..2].copy_from_slice(&f16_of(d));
        for (x, out) in x.into_iter().zip(out[2..].as_chunks_mut::<16>().0) {
            let codes = round_half_away(_mm512_mul_ps(x, inverse));
            // SAFETY: sixteen bytes.
            unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtsepi32_epi8(codes)) };
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn q4_0(values: &[f32], out: &mut [u8]) {
    for (values, out) in values.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<18>().0) {
        let x = load_block(values, Q4_0_LIMIT);
        let d = signed(x) / -8.0;
        let inverse = _mm512_set1_ps(reciprocal(d));
        let mut codes = [_mm512_setzero_si512(); 2];
        for (codes, x) in codes.iter_mut().zip(x) {
            let code = _mm512_add_ps(_mm512_mul_ps(x, inverse), _mm512_set1_ps(8.5));
            *codes = _mm512_min_epi32(_mm512_cvttps_epi32(code), _mm512_set1_epi32(15));
        }
        // Low nibbles are elements 0..16, high nibbles 16..32.
        let bytes = _mm512_or_si512(codes[0], _mm512_slli_epi32::<4>(codes[1]));
        out[..2].copy_from_slice(&f16_of(d));
        // SAFETY: `out` has 16 bytes after the scale.
        unsafe { _mm_storeu_si128(out[2..].as_mut_ptr().cast(), _mm512_cvtepi32_epi8(bytes)) };
    }
}

/// The block as vectors, made finite and limited.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn load_block(values: &[f32; BLOCK], limit: f32) -> Block {
    let x = vectors(values);
    let limits = _mm512_set1_ps(limit);
    // True for NaN as well.
    let outside = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(_mm512_abs_ps(x[0]), limits)
        | _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(_mm512_abs_ps(x[1]), limits);
    if outside == 0 { x } else { limited(values, limit) }
}

#[cold]
#[target_feature(enable = "avx512f")]
fn limited(values: &[f32; BLOCK], limit: f32) -> Block {
    let mut values = *values;
    sanitize(&mut values, limit);
    vectors(&values)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn vectors(values: &[f32; BLOCK]) -> Block {
    // SAFETY: 32 values.
    unsafe { [_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values.as_ptr().add(16))] }
}

/// The first element of largest magnitude, with its sign.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn signed(x: Block) -> f32 {
    let most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x[0]), _mm512_abs_ps(x[1])));
    let most_everywhere = _mm512_set1_ps(most);
    let mut equal = [0u32; 2];
    let mut negative = [0u32; 2];
    for i in 0..2 {
        let is_most = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(_mm512_abs_ps(x[i]), most_everywhere);
        equal[i] = u32::from(is_most);
        negative[i] = u32::from(_mm512_movepi32_mask(_mm512_castps_si512(x[i])));
    }
    let first = (equal[0] | equal[1] << 16).trailing_zeros();
    let is_negative = (negative[0] | negative[1] << 16) >> first & 1 == 1;
    if is_negative && most != 0.0 { -most } else { most }
}

/// Rounds half away from zero: the number just below one half is added in the direction of the
/// sign, so that 0.49999997 stays below 1, and the sum is truncated.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn round_half_away(x: __m512) -> __m512i {
    let sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0));
    let half = _mm512_or_ps(_mm512_set1_ps(0.5f32.next_down()), sign);
    _mm512_cvttps_epi32(_mm512_add_ps(x, half))
}
