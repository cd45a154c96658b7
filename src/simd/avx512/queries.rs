//! Queries as integers.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::integer::{BATCH, MAX_DIM, factor_of, largest, limit, round_16};
use super::math::LANES;
use super::turn::turn_quarters;
use super::words::Words;
use crate::simd::rows::BLOCK;

/// Pairs of words of a block.
pub(super) const PAIRS: usize = BLOCK / 2;

/// Up to four queries as integers; what is missing is 0.
pub(super) struct Queries {
    /// For each block, pairs of words in the order of `Words::columns`, one for each query.
    pub(super) integers: [MaybeUninit<[[i32; BATCH]; PAIRS]>; MAX_DIM / BLOCK],
    /// For each block, the sum of the integers.
    pub(super) sums: [MaybeUninit<[i32; BATCH]>; MAX_DIM / BLOCK],
    /// What the integers must be multiplied with again.
    pub(super) factors: [f32; BATCH],
}

impl Queries {
    /// `false` if integers cannot stand for a query.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) fn fill<W: Words, const Q: usize>(&mut self, dim: usize, queries: &[f32]) -> bool {
        let limit = const { limit(W::LARGEST, BLOCK as i32) };
        let mut inverse = [_mm512_setzero_ps(); Q];
        for (q, query) in queries.chunks_exact(dim).enumerate().take(Q) {
            let Some((factor, reciprocal)) = factor_of(largest(query), limit) else { return false };
            self.factors[q] = factor;
            inverse[q] = _mm512_set1_ps(reciprocal);
        }
        // SAFETY: queries are `[Q, dim]`, a block is two vectors, and an order has 32 words.
        unsafe {
            let order = _mm512_loadu_si512(const { turned(W::ORDER) }.as_ptr().cast());
            for block in 0..dim / BLOCK {
                let mut words = [_mm512_setzero_si512(); BATCH];
                for q in 0..Q {
                    let at = queries.as_ptr().add(q * dim + block * BLOCK);
                    let low = _mm512_mul_ps(_mm512_loadu_ps(at), inverse[q]);
                    let high = _mm512_mul_ps(_mm512_loadu_ps(at.add(LANES)), inverse[q]);
                    words[q] = _mm512_permutexvar_epi16(order, round_16(low, high));
                }
                let words = turn_quarters(words);
                let target = self.integers[block].as_mut_ptr().cast::<__m512i>();
                for (i, words) in words.into_iter().enumerate() {
                    _mm512_storeu_si512(target.add(i), words);
                }
                if W::OFFSET != 0 || W::HAS_MINIMUM {
                    let target = self.sums[block].as_mut_ptr();
                    _mm_storeu_si128(target.cast(), sum_words(words));
                }
            }
        }
        true
    }
}

/// The order that [`turn_quarters`] makes into `order`: its vector `i` has the elements `4 j + i`.
const fn turned(order: [u16; BLOCK]) -> [u16; BLOCK] {
    let mut before = [0; BLOCK];
    let mut i = 0;
    while i < BLOCK {
        let pair = i / 2;
        before[2 * (pair % 4 * 4 + pair / 4) + i % 2] = order[i];
        i += 1;
    }
    before
}

/// For each lane of a quarter, the sum of its words in all quarters and vectors.
///
/// # Safety
/// The CPU has AVX-512 F and BW.
#[inline(always)]
unsafe fn sum_words(words: [__m512i; 4]) -> __m128i {
    // SAFETY: by contract.
    unsafe {
        let ones = _mm512_set1_epi16(1);
        let mut sum = _mm512_setzero_si512();
        for words in words {
            sum = _mm512_add_epi32(sum, _mm512_madd_epi16(words, ones));
        }
        let half = _mm512_extracti64x4_epi64::<1>(sum);
        let sum = _mm256_add_epi32(_mm512_castsi512_si256(sum), half);
        _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum))
    }
}
