//! Queries as integers.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::integer::{BATCH, MAX_DIM, factor_of, largest, limit, round_16};
use super::math::LANES;
use super::turn::turn_quarters;
use super::words::Words;
use crate::simd::prepared::IntegerQueries;
use crate::simd::rows::BLOCK;

/// Pairs of words of a block.
pub(super) const PAIRS: usize = BLOCK / 2;

/// A block of a batch: pairs of words in the order of `Words::columns`, one for each query.
type Block = [[i32; BATCH]; PAIRS];

/// Up to four queries as integers; what is missing is 0.
#[derive(Clone, Copy)]
pub(super) struct Queries {
    /// For each block of a query.
    pub(super) integers: *const Block,
    /// For each block, the sum of the integers, if the format needs it.
    pub(super) sums: *const [i32; BATCH],
    /// What the integers must be multiplied with again.
    pub(super) factors: [f32; BATCH],
}

/// Room for a batch.
pub(super) struct Room {
    integers: [MaybeUninit<Block>; MAX_DIM / BLOCK],
    sums: [MaybeUninit<[i32; BATCH]>; MAX_DIM / BLOCK],
}

impl Room {
    pub(super) const fn new() -> Self {
        Self {
            integers: [const { MaybeUninit::uninit() }; MAX_DIM / BLOCK],
            sums: [const { MaybeUninit::uninit() }; MAX_DIM / BLOCK],
        }
    }

    /// Makes integers of `Q` queries of at most `MAX_DIM` elements; `None` if that cannot be.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) fn fill<W: Words, const Q: usize>(
        &mut self,
        dim: usize,
        queries: &[f32],
    ) -> Option<Queries> {
        let (integers, sums) = (self.integers.as_mut_ptr().cast(), self.sums.as_mut_ptr().cast());
        // SAFETY: there is room for a row of `MAX_DIM` elements, which is not longer.
        let factors = unsafe { fill::<W, Q>(dim, queries, integers, sums)? };
        Some(Queries { integers, sums, factors })
    }
}

/// Makes integers of all queries, a batch after the other; `false` if that cannot be.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn prepare<W: Words>(dim: usize, queries: &[f32], out: &mut IntegerQueries) -> bool {
    let blocks = dim / BLOCK;
    let batches = (queries.len() / dim).div_ceil(BATCH);
    out.words.resize(batches * blocks * PAIRS * BATCH, 0);
    out.sums.resize(batches * blocks * BATCH, 0);
    out.factors.resize(batches * BATCH, 0.0);
    let rooms = out.words.chunks_exact_mut(blocks * PAIRS * BATCH);
    let rooms = rooms.zip(out.sums.chunks_exact_mut(blocks * BATCH));
    let rooms = rooms.zip(out.factors.chunks_exact_mut(BATCH));
    for (queries, ((words, sums), factors)) in queries.chunks(BATCH * dim).zip(rooms) {
        let (words, sums) = (words.as_mut_ptr().cast(), sums.as_mut_ptr().cast());
        // SAFETY: a batch has `blocks` blocks, and there is room for so many.
        let made = unsafe {
            match queries.len() / dim {
                1 => fill::<W, 1>(dim, queries, words, sums),
                2 => fill::<W, 2>(dim, queries, words, sums),
                3 => fill::<W, 3>(dim, queries, words, sums),
                _ => fill::<W, 4>(dim, queries, words, sums),
            }
        };
        let Some(made) = made else { return false };
        factors.copy_from_slice(&made);
    }
    true
}

/// A batch of what [`prepare`] has made.
pub(super) fn batch(queries: &IntegerQueries, dim: usize, index: usize) -> Queries {
    let blocks = dim / BLOCK;
    let mut factors = [0.0; BATCH];
    factors.copy_from_slice(&queries.factors[index * BATCH..][..BATCH]);
    Queries {
        integers: queries.words[index * blocks * PAIRS * BATCH..].as_ptr().cast(),
        sums: queries.sums[index * blocks * BATCH..].as_ptr().cast(),
        factors,
    }
}

/// Writes integers of `Q` queries and answers their factors; `None` if integers cannot stand for one.
///
/// # Safety
/// There is room for `dim / 32` blocks.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn fill<W: Words, const Q: usize>(
    dim: usize,
    queries: &[f32],
    integers: *mut Block,
    sums: *mut [i32; BATCH],
) -> Option<[f32; BATCH]> {
    let limit = const { limit(W::LARGEST, BLOCK as i32) };
    let mut factors = [0.0; BATCH];
    let mut inverse = [_mm512_setzero_ps(); Q];
    for (q, query) in queries.chunks_exact(dim).enumerate().take(Q) {
        let largest = largest(query);
        if largest != 0.0 {
            let (factor, reciprocal) = factor_of(largest, limit)?;
            factors[q] = factor;
            inverse[q] = _mm512_set1_ps(reciprocal);
        }
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
            let target = integers.add(block).cast::<__m512i>();
            for (i, words) in words.into_iter().enumerate() {
                _mm512_storeu_si512(target.add(i), words);
            }
            if W::OFFSET != 0 || W::HAS_MINIMUM {
                _mm_storeu_si128(sums.add(block).cast(), sum_words(words));
            }
        }
    }
    Some(factors)
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
