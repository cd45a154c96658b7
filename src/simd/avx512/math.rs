//! Loops over plain f32 vectors, and sums across lanes.

use std::arch::x86_64::*;

use crate::simd::softmax::exp::{COEFFICIENTS, HIGHEST, LN2_HIGH, LN2_LOW, LOWEST};
use crate::simd::{Softmax, softmax};

/// Lanes of a vector.
pub(super) const LANES: usize = 16;

/// The lanes of a last vector of `rest` elements.
#[inline(always)]
pub(super) const fn mask(rest: usize) -> __mmask16 {
    if rest < LANES { (1 << rest) - 1 } else { u16::MAX }
}

#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [_mm512_setzero_ps(); 4];
    for (a, b) in a.chunks(4 * LANES).zip(b.chunks(4 * LANES)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.chunks(LANES).zip(b.chunks(LANES))) {
            *sum = _mm512_fmadd_ps(load(a), load(b), *sum);
        }
    }
    let [a, b, c, d] = sums;
    _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)))
}

#[target_feature(enable = "avx512f")]
pub(super) fn axpy(factor: f32, x: &[f32], y: &mut [f32]) {
    let factor = _mm512_set1_ps(factor);
    for (x, y) in x.chunks(LANES).zip(y.chunks_mut(LANES)) {
        let sum = _mm512_fmadd_ps(factor, load(x), load(y));
        store(y, sum);
    }
}

#[target_feature(enable = "avx512f")]
pub(super) fn scale(values: &mut [f32], factor: f32) {
    let factor = _mm512_set1_ps(factor);
    for x in values.chunks_mut(LANES) {
        let product = _mm512_mul_ps(load(x), factor);
        store(x, product);
    }
}

#[target_feature(enable = "avx512f")]
pub(super) fn max(values: &[f32]) -> f32 {
    let lowest = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut most = lowest;
    for x in values.chunks(LANES) {
        // SAFETY: as many lanes as values are read.
        let x = unsafe { _mm512_mask_loadu_ps(lowest, mask(x.len()), x.as_ptr()) };
        // With a NaN first, max answers its second operand: NaN is passed over.
        most = _mm512_max_ps(x, most);
    }
    _mm512_reduce_max_ps(most)
}

#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn exp_sub(scores: &mut [f32], max: f32) -> f32 {
    let maxima = _mm512_set1_ps(max);
    let mut sum = _mm512_setzero_ps();
    for x in scores.chunks_mut(LANES) {
        let e = exp(_mm512_sub_ps(load(x), maxima));
        store(x, e);
        sum = _mm512_mask_add_ps(sum, mask(x.len()), sum, e);
    }
    _mm512_reduce_add_ps(sum)
}

/// Rows of logits whose sums across lanes are made together.
const ROWS: usize = 4;

#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn weigh(scores: &mut [f32], softmax: &mut Softmax<'_>) {
    let n = scores.len() / softmax.max.len();
    let rows = softmax.max.chunks_mut(ROWS).zip(softmax.sum.chunks_mut(ROWS));
    let mut rest = scores;
    for ((max, sum), factor) in rows.zip(softmax.factor.chunks_mut(ROWS)) {
        let (scores, others) = rest.split_at_mut(max.len() * n);
        let mut some = Softmax { max, sum, factor };
        if !weigh_rows(n, scores, &mut some) {
            weigh_each(scores, &mut some);
        }
        rest = others;
    }
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512dq")]
fn weigh_each(scores: &mut [f32], softmax: &mut Softmax<'_>) {
    softmax::weigh!(scores, softmax, max, exp_sub);
}

/// The weights of a few rows of `n` logits; `false` if nothing was done, because that is not how many
/// rows there are, a row is long, or one has nothing but NaN and negative infinity.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn weigh_rows(n: usize, scores: &mut [f32], softmax: &mut Softmax<'_>) -> bool {
    if softmax.max.len() != ROWS || !(1..=softmax::RUN).contains(&n) {
        return false;
    }
    let lowest = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut most = [lowest; ROWS];
    for (most, row) in most.iter_mut().zip(scores.chunks_exact(n)) {
        let (whole, rest) = row.as_chunks::<LANES>();
        for x in whole {
            // As in `max`.
            // SAFETY: a whole vector.
            *most = _mm512_max_ps(unsafe { _mm512_loadu_ps(x.as_ptr()) }, *most);
        }
        if !rest.is_empty() {
            // SAFETY: as many lanes as values are read.
            let x = unsafe { _mm512_mask_loadu_ps(lowest, mask(rest.len()), rest.as_ptr()) };
            *most = _mm512_max_ps(x, *most);
        }
    }
    // SAFETY: there are four rows.
    unsafe {
        let most = combine_four(most, |a, b| _mm512_max_ps(a, b));
        let lowest = _mm512_castps512_ps128(lowest);
        if _mm_movemask_ps(_mm_cmpeq_ps(most, lowest)) != 0 {
            return false;
        }
        let before = _mm_loadu_ps(softmax.max.as_ptr());
        let rises = _mm_cmpgt_ps(most, before);
        let max = _mm_blendv_ps(before, most, rises);
        let changes = _mm_andnot_ps(_mm_cmpeq_ps(before, lowest), rises);
        let mut factor = _mm_set1_ps(1.0);
        if _mm_movemask_ps(changes) != 0 {
            let change = exp(_mm512_castps128_ps512(_mm_sub_ps(before, max)));
            factor = _mm_blendv_ps(factor, _mm512_castps512_ps128(change), changes);
        }
        _mm_storeu_ps(softmax.max.as_mut_ptr(), max);
        _mm_storeu_ps(softmax.factor.as_mut_ptr(), factor);
        let mut sums = [_mm512_setzero_ps(); ROWS];
        for ((sum, max), row) in sums.iter_mut().zip(&*softmax.max).zip(scores.chunks_exact_mut(n))
        {
            let max = _mm512_set1_ps(*max);
            let (whole, rest) = row.as_chunks_mut::<LANES>();
            for x in whole {
                let e = exp(_mm512_sub_ps(_mm512_loadu_ps(x.as_ptr()), max));
                _mm512_storeu_ps(x.as_mut_ptr(), e);
                *sum = _mm512_add_ps(*sum, e);
            }
            if !rest.is_empty() {
                let e = exp(_mm512_sub_ps(load(rest), max));
                store(rest, e);
                *sum = _mm512_mask_add_ps(*sum, mask(rest.len()), *sum, e);
            }
        }
        let sums = combine_four(sums, |a, b| _mm512_add_ps(a, b));
        let before = _mm_mul_ps(_mm_loadu_ps(softmax.sum.as_ptr()), factor);
        _mm_storeu_ps(softmax.sum.as_mut_ptr(), _mm_add_ps(before, sums));
    }
    true
}

/// For each of four vectors, what its lanes are together.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn combine_four(
    [a, b, c, d]: [__m512; 4],
    with: impl Fn(__m512, __m512) -> __m512,
) -> __m128 {
    // SAFETY: by contract.
    unsafe {
        let ab = with(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let cd = with(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
        let each = with(low, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
        let halves = with(each, _mm512_shuffle_f32x4::<0b01_00_11_10>(each, each));
        _mm512_castps512_ps128(with(halves, _mm512_shuffle_f32x4::<0b10_11_00_01>(halves, halves)))
    }
}

/// `e^x`: see [`softmax::exp`].
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn exp(x: __m512) -> __m512 {
    // Not below: NaN is kept.
    let is_normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(LOWEST));
    let x = _mm512_min_ps(_mm512_set1_ps(HIGHEST), x);
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
        _mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)),
    );
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_HIGH), x);
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_LOW), r);
    let [first, rest @ ..] = COEFFICIENTS;
    let mut p = _mm512_set1_ps(first);
    for coefficient in rest {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
    }
    let p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0)));
    _mm512_maskz_scalef_ps(is_normal, p, n)
}

/// For each of 16 vectors, the sum of its lanes, in the order of the vectors.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
pub(super) unsafe fn sum_each(x: [__m512; 16]) -> __m512 {
    // SAFETY: by contract.
    unsafe {
        let a = sum_quarters(x[0], x[1], x[2], x[3]);
        let b = sum_quarters(x[4], x[5], x[6], x[7]);
        let c = sum_quarters(x[8], x[9], x[10], x[11]);
        let d = sum_quarters(x[12], x[13], x[14], x[15]);
        let halves = |a, b| {
            let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
            _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b))
        };
        let (ab, cd) = (halves(a, b), halves(c, d));
        let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd);
        _mm512_add_ps(even, _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd))
    }
}

/// In each quarter, the sums of that quarter of four vectors.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn sum_quarters(a: __m512, b: __m512, c: __m512, d: __m512) -> __m512 {
    // SAFETY: by contract.
    unsafe {
        let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
        _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)))
    }
}

/// Up to 16 values; the other lanes are 0.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load(values: &[f32]) -> __m512 {
    // SAFETY: as many lanes as values are read.
    unsafe { _mm512_maskz_loadu_ps(mask(values.len()), values.as_ptr()) }
}

/// Writes up to 16 values.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store(out: &mut [f32], x: __m512) {
    // SAFETY: as many lanes as there are values are written.
    unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), mask(out.len()), x) };
}
