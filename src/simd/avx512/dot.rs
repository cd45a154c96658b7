//! Scores of rows of integers, 16 rows at a time: see [`super::integer`].

#![expect(clippy::needless_range_loop, reason = "indices into two register arrays at once")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::integer::{BATCH, MAX_DIM, Padded};
use super::many_dot::{self, MANY};
use super::math::{LANES, mask};
use super::queries::{PAIRS, Queries, Room, batch};
use super::turn::Lanes;
use super::words::Words;
use crate::simd::ahead::Ahead;
use crate::simd::avx2::Factor;
use crate::simd::prepared::IntegerQueries;
use crate::simd::rows::{BLOCK, Format, RowKernels, Rows};

/// `scores[q, t] = queries[q] . rows[t]`; `plain` takes what integers cannot.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")]
pub(super) fn dot<W: Words>(
    (format, plain): (Format, &RowKernels),
    rows: &Rows<'_>,
    queries: &[f32],
    scores: &mut [f32],
) {
    if rows.count == 0 {
        return;
    }
    let (dim, fits) = (rows.dim, rows.dim <= MAX_DIM);
    let batches = queries.chunks(BATCH * dim).zip(scores.chunks_mut(BATCH * rows.count));
    for (queries, scores) in batches {
        let mut room = Room::new();
        let made = match queries.len() / dim {
            _ if !fits => None,
            1 => room.fill::<W, 1>(dim, queries),
            2 => room.fill::<W, 2>(dim, queries),
            3 => room.fill::<W, 3>(dim, queries),
            _ => room.fill::<W, 4>(dim, queries),
        };
        match made {
            Some(queries) => dot_batch::<W>(format, rows, &queries, scores),
            None => (plain.dot)(rows, queries, scores),
        }
    }
}

/// The same for queries that [`prepare`](super::queries::prepare) has made.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")]
pub(super) fn dot_prepared<W: Words>(
    format: Format,
    rows: &Rows<'_>,
    queries: &IntegerQueries,
    scores: &mut [f32],
) {
    if rows.count == 0 {
        return;
    }
    if scores.len() / rows.count >= MANY {
        return many_dot::dot::<W>(format, rows, queries, scores);
    }
    for (i, scores) in scores.chunks_mut(BATCH * rows.count).enumerate() {
        dot_batch::<W>(format, rows, &batch(queries, rows.dim, i), scores);
    }
}

/// The scores of a batch, of which there are as many as queries.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")]
fn dot_batch<W: Words>(format: Format, rows: &Rows<'_>, queries: &Queries, scores: &mut [f32]) {
    match scores.len() / rows.count {
        1 => dot_rows::<W, 1>(format, rows, queries, scores),
        2 => dot_rows::<W, 2>(format, rows, queries, scores),
        3 => dot_rows::<W, 3>(format, rows, queries, scores),
        _ => dot_rows::<W, 4>(format, rows, queries, scores),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")]
fn dot_rows<W: Words, const Q: usize>(
    format: Format,
    rows: &Rows<'_>,
    queries: &Queries,
    scores: &mut [f32],
) {
    let count = rows.count;
    let mut copies = MaybeUninit::uninit();
    let padded = Padded::new(format, rows, (0, count), &mut copies);
    let mut ahead = Ahead::new(rows.ahead, count.div_ceil(LANES) * rows.dim / BLOCK);
    for first in (0..count).step_by(LANES) {
        let lanes = padded.lanes(first);
        // SAFETY: `Rows::check` proved that these rows lie in the bytes; scores are `[Q, count]`.
        unsafe {
            let sums = dot_lanes::<W, Q>(rows, lanes, queries, &mut ahead);
            for q in 0..Q {
                let sum = _mm512_mul_ps(sums[q], _mm512_set1_ps(queries.factors[q]));
                let target = scores.as_mut_ptr().add(q * count + first);
                _mm512_mask_storeu_ps(target, mask(count - first), sum);
            }
        }
    }
}

/// Adds products of pairs of words to `Q` sums: of `a`, and of one pair for each sum, the same in
/// every lane. The intrinsic would be taken apart into a product and a sum, with two registers for
/// what here is an address.
///
/// # Safety
/// `b` points to `Q` pairs of words; `Q` is at most 4.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn add_products<const Q: usize>(sums: &mut [__m512i; Q], a: __m512i, b: *const i32) {
    macro_rules! products {
        ($($name:ident $i:literal $line:literal)*) => {
            std::arch::asm!(
                $($line,)* $($name = inout(zmm_reg) sums[$i],)* a = in(zmm_reg) a, b = in(reg) b,
                options(pure, readonly, nostack, preserves_flags)
            )
        };
    }
    // SAFETY: by contract.
    unsafe {
        match Q {
            1 => products!(p 0 "vpdpwssd {p}, {a}, dword ptr [{b}]{{1to16}}"),
            2 => products!(
                p 0 "vpdpwssd {p}, {a}, dword ptr [{b}]{{1to16}}"
                q 1 "vpdpwssd {q}, {a}, dword ptr [{b} + 4]{{1to16}}"),
            3 => products!(
                p 0 "vpdpwssd {p}, {a}, dword ptr [{b}]{{1to16}}"
                q 1 "vpdpwssd {q}, {a}, dword ptr [{b} + 4]{{1to16}}"
                r 2 "vpdpwssd {r}, {a}, dword ptr [{b} + 8]{{1to16}}"),
            _ => products!(
                p 0 "vpdpwssd {p}, {a}, dword ptr [{b}]{{1to16}}"
                q 1 "vpdpwssd {q}, {a}, dword ptr [{b} + 4]{{1to16}}"
                r 2 "vpdpwssd {r}, {a}, dword ptr [{b} + 8]{{1to16}}"
                s 3 "vpdpwssd {s}, {a}, dword ptr [{b} + 12]{{1to16}}"),
        }
    }
}

/// The scores of 16 rows for `Q` queries, before their factors.
///
/// # Safety
/// The CPU has the features of `dot`; `lanes` are rows of `rows`, and queries are as long.
#[inline(always)]
unsafe fn dot_lanes<W: Words, const Q: usize>(
    rows: &Rows<'_>,
    lanes: Lanes,
    queries: &Queries,
    ahead: &mut Ahead,
) -> [__m512; Q] {
    // SAFETY: by contract; a row has `dim / 32` blocks.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); Q];
        // What a scale of the whole row still has to be multiplied with.
        let mut unscaled = [_mm512_setzero_ps(); Q];
        for block in 0..rows.dim / BLOCK {
            ahead.fetch();
            let lanes = lanes.hidden();
            let scales = match W::FACTOR {
                Factor::Block => W::scales_of_16(rows, lanes, block),
                _ => _mm512_setzero_ps(),
            };
            let columns = W::columns(rows, lanes, block);
            let mut products = [_mm512_setzero_si512(); Q];
            // Only written, and only read, where a format needs them.
            let sums_of = queries.sums.add(block).cast::<i32>();
            if W::OFFSET != 0 {
                for q in 0..Q {
                    products[q] = _mm512_set1_epi32(-W::OFFSET * *sums_of.add(q));
                }
            }
            let integers = queries.integers.add(block).cast::<[i32; BATCH]>();
            for pair in 0..PAIRS {
                add_products::<Q>(&mut products, columns[pair], integers.add(pair).cast());
            }
            if W::FACTOR == Factor::Block {
                for q in 0..Q {
                    let products = _mm512_cvtepi32_ps(products[q]);
                    sums[q] = _mm512_fmadd_ps(products, scales, sums[q]);
                }
            } else {
                for q in 0..Q {
                    unscaled[q] = _mm512_add_ps(unscaled[q], _mm512_cvtepi32_ps(products[q]));
                }
            }
            if W::HAS_MINIMUM {
                let minima = W::minima_of_16(rows, lanes, block);
                for q in 0..Q {
                    let sum = _mm512_set1_ps(*sums_of.add(q) as f32);
                    sums[q] = _mm512_fmadd_ps(minima, sum, sums[q]);
                }
            }
        }
        if W::FACTOR != Factor::Block {
            let scales = W::scales_of_16(rows, lanes, 0);
            for q in 0..Q {
                sums[q] = _mm512_fmadd_ps(unscaled[q], scales, sums[q]);
            }
        }
        sums
    }
}
