//! The Hadamard transform, in the order of butterflies of the scalar level: the order decides the
//! rounding, so runs of 64 values are finished in registers without changing it.

use std::arch::x86_64::*;

use super::math::{load, store};
use crate::simd::scalar;

/// Vectors of a run that fits into registers.
const RUN: usize = 8;

#[target_feature(enable = "avx2")]
pub(super) fn hadamard(values: &mut [f32], size: usize) {
    if size < 8 {
        return scalar::hadamard(values, size);
    }
    let factor = _mm256_set1_ps(scalar::hadamard_factor(size));
    let vectors = values.as_chunks_mut::<8>().0;
    if size < 8 * RUN {
        return small(vectors, size / 8, factor);
    }
    let one = _mm256_set1_ps(1.0);
    let last = if size == 8 * RUN { factor } else { one };
    for run in vectors.as_chunks_mut::<RUN>().0 {
        run_of_64(run, last);
    }
    let mut half = RUN;
    while half < size / 8 {
        let last = if 2 * half == size / 8 { factor } else { one };
        for pair in vectors.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                let (x, y) = (load(a), load(b));
                store(a, _mm256_mul_ps(_mm256_add_ps(x, y), last));
                store(b, _mm256_mul_ps(_mm256_sub_ps(x, y), last));
            }
        }
        half *= 2;
    }
}

/// All butterflies of 64 values, times `factor`.
#[inline]
#[target_feature(enable = "avx2")]
fn run_of_64(run: &mut [[f32; 8]; RUN], factor: __m256) {
    let mut x = [_mm256_setzero_ps(); RUN];
    for (x, values) in x.iter_mut().zip(&*run) {
        *x = hadamard_8(load(values));
    }
    for half in [1, 2, 4] {
        for i in 0..RUN {
            if i & half == 0 {
                let (a, b) = (x[i], x[i + half]);
                x[i] = _mm256_add_ps(a, b);
                x[i + half] = _mm256_sub_ps(a, b);
            }
        }
    }
    for (values, x) in run.iter_mut().zip(x) {
        store(values, _mm256_mul_ps(x, factor));
    }
}

/// Sizes of one to four vectors.
#[target_feature(enable = "avx2")]
fn small(vectors: &mut [[f32; 8]], size: usize, factor: __m256) {
    for run in vectors.chunks_exact_mut(size) {
        let mut x = [_mm256_setzero_ps(); RUN / 2];
        for (x, values) in x.iter_mut().zip(&*run) {
            *x = hadamard_8(load(values));
        }
        let mut half = 1;
        while half < size {
            for i in (0..size).filter(|i| i & half == 0) {
                let (a, b) = (x[i], x[i + half]);
                x[i] = _mm256_add_ps(a, b);
                x[i + half] = _mm256_sub_ps(a, b);
            }
            half *= 2;
        }
        for (values, x) in run.iter_mut().zip(x) {
            store(values, _mm256_mul_ps(x, factor));
        }
    }
}

/// The butterflies 1, 2 and 4 inside one vector: each lane adds its partner to itself, negated in
/// the upper lane of a pair.
#[inline]
#[target_feature(enable = "avx2")]
fn hadamard_8(x: __m256) -> __m256 {
    let upper = |bits: [i32; 8]| {
        let [a, b, c, d, e, f, g, h] = bits.map(|bit| bit << 31);
        _mm256_castsi256_ps(_mm256_setr_epi32(a, b, c, d, e, f, g, h))
    };
    let negate = |x, bits| _mm256_xor_ps(x, upper(bits));
    let swapped = _mm256_permute_ps::<0b1011_0001>(x);
    let x = _mm256_add_ps(swapped, negate(x, [0, 1, 0, 1, 0, 1, 0, 1]));
    let swapped = _mm256_permute_ps::<0b0100_1110>(x);
    let x = _mm256_add_ps(swapped, negate(x, [0, 0, 1, 1, 0, 0, 1, 1]));
    let swapped = _mm256_permute2f128_ps::<1>(x, x);
    _mm256_add_ps(swapped, negate(x, [0, 0, 0, 0, 1, 1, 1, 1]))
}
