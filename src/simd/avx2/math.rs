//! Loops over plain f32 vectors.

use std::arch::x86_64::*;

use crate::simd::softmax::exp::{COEFFICIENTS, HIGHEST, LN2_HIGH, LN2_LOW, LOWEST};
use crate::simd::{Softmax, scalar, softmax};

#[target_feature(enable = "avx2,fma")]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_vectors, a_rest) = a.as_chunks::<8>();
    let (b_vectors, b_rest) = b.as_chunks::<8>();
    let mut sums = [_mm256_setzero_ps(); 4];
    for (a, b) in a_vectors.chunks(4).zip(b_vectors.chunks(4)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum = _mm256_fmadd_ps(load(a), load(b), *sum);
        }
    }
    let sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
    sum_lanes(sum) + scalar::dot_f32(a_rest, b_rest)
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn axpy(factor: f32, x: &[f32], y: &mut [f32]) {
    let (x_vectors, x_rest) = x.as_chunks::<8>();
    let (y_vectors, y_rest) = y.as_chunks_mut::<8>();
    let factors = _mm256_set1_ps(factor);
    for (x, y) in x_vectors.iter().zip(y_vectors) {
        let sum = _mm256_fmadd_ps(factors, load(x), load(y));
        store(y, sum);
    }
    scalar::axpy_f32(factor, x_rest, y_rest);
}

/// The sum of the lanes of each of four vectors.
///
/// # Safety
/// The CPU has AVX.
#[inline(always)]
pub(super) unsafe fn sum_each([a, b, c, d]: [__m256; 4]) -> __m128 {
    // SAFETY: by contract.
    unsafe {
        let pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs))
    }
}

/// Writes the scores of four rows, each a vector of up to four queries, to `Q` rows of scores that
/// are `count` apart.
///
/// # Safety
/// The CPU has AVX; four scores fit at `target` in each of the `Q` rows.
#[inline(always)]
pub(super) unsafe fn store_four<const Q: usize>(
    mut lines: [__m128; 4],
    target: *mut f32,
    count: usize,
) {
    // SAFETY: by contract.
    unsafe {
        let [a, b, c, d] = &mut lines;
        _MM_TRANSPOSE4_PS(a, b, c, d);
        for (q, line) in lines.iter().enumerate().take(Q) {
            _mm_storeu_ps(target.add(q * count), *line);
        }
    }
}

/// As [`store_four`], for one row.
///
/// # Safety
/// The CPU has AVX; one score fits at `target` in each of the `Q` rows.
#[inline(always)]
pub(super) unsafe fn store_one<const Q: usize>(line: __m128, target: *mut f32, count: usize) {
    let mut values = [0.0; 4];
    // SAFETY: by contract.
    unsafe {
        _mm_storeu_ps(values.as_mut_ptr(), line);
        for (q, value) in values.iter().enumerate().take(Q) {
            *target.add(q * count) = *value;
        }
    }
}

#[target_feature(enable = "avx2")]
pub(super) fn scale(values: &mut [f32], factor: f32) {
    let (vectors, rest) = values.as_chunks_mut::<8>();
    let factors = _mm256_set1_ps(factor);
    for x in vectors {
        let product = _mm256_mul_ps(load(x), factors);
        store(x, product);
    }
    rest.iter_mut().for_each(|x| *x *= factor);
}

#[target_feature(enable = "avx2")]
pub(super) fn max(values: &[f32]) -> f32 {
    let (vectors, rest) = values.as_chunks::<8>();
    let mut most = _mm256_set1_ps(f32::NEG_INFINITY);
    for x in vectors {
        // With a NaN first, max answers its second operand: NaN is passed over.
        most = _mm256_max_ps(load(x), most);
    }
    rest.iter().copied().fold(largest_lane(most), f32::max)
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn exp_sub(scores: &mut [f32], max: f32) -> f32 {
    let (vectors, rest) = scores.as_chunks_mut::<8>();
    let maxima = _mm256_set1_ps(max);
    let mut sum = _mm256_setzero_ps();
    for x in vectors {
        let e = exp(_mm256_sub_ps(load(x), maxima));
        store(x, e);
        sum = _mm256_add_ps(sum, e);
    }
    sum_lanes(sum) + rest.iter_mut().map(|x| scalar::exp_one(x, max)).sum::<f32>()
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn weigh(scores: &mut [f32], softmax: &mut Softmax<'_>) {
    softmax::weigh!(scores, softmax, max, exp_sub);
}

/// `e^x`: see [`softmax::exp`].
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exp(x: __m256) -> __m256 {
    let underflows = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(LOWEST));
    // The operand order keeps NaN.
    let x = _mm256_max_ps(_mm256_set1_ps(LOWEST), x);
    let x = _mm256_min_ps(_mm256_set1_ps(HIGHEST), x);
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_mul_ps(
        x,
        _mm256_set1_ps(std::f32::consts::LOG2_E),
    ));
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_HIGH), x);
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_LOW), r);
    let [first, rest @ ..] = COEFFICIENTS;
    let mut p = _mm256_set1_ps(first);
    for coefficient in rest {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(coefficient));
    }
    let p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0)));
    let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent));
    _mm256_andnot_ps(underflows, _mm256_mul_ps(p, power))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn largest_lane(x: __m256) -> f32 {
    let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sum_lanes(x: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

#[inline]
#[target_feature(enable = "avx")]
pub(super) fn load(values: &[f32; 8]) -> __m256 {
    // SAFETY: eight values.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx")]
pub(super) fn store(out: &mut [f32; 8], x: __m256) {
    // SAFETY: eight values.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), x) };
}
