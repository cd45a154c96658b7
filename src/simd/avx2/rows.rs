//! Decoding of any format, and sums over rows that are decoded first, a few at a time: for formats
//! without loops of their own, and for values that those cannot take.

use std::arch::x86_64::*;

use super::format::{F32, Format};
use super::raw;
use crate::simd::rows::Rows;

/// Decoded elements on the stack.
const BUFFER: usize = 4096;

/// Most rows, and most queries or outputs, of a step.
const STEP: usize = 16;

/// `scores[q, t] = queries[q] . rows[t]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot<F: Format>(rows: &Rows<'_>, queries: &[f32], scores: &mut [f32]) {
    let (dim, count) = (rows.dim, rows.count);
    let mut part = [0.0; STEP * STEP];
    for_each_step::<F>(rows, |first, decoded| {
        for (i, queries) in queries.chunks(STEP * dim).enumerate() {
            let part = &mut part[..queries.len() / dim * decoded.count];
            raw::dot::<F32>(decoded, queries, part);
            for (q, part) in part.chunks_exact(decoded.count).enumerate() {
                let at = (i * STEP + q) * count + first;
                scores[at..at + decoded.count].copy_from_slice(part);
            }
        }
    });
}

/// `outputs[q] += sum over t of weights[q, t] * rows[t]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn axpy<F: Format>(rows: &Rows<'_>, weights: &[f32], outputs: &mut [f32]) {
    let (dim, count) = (rows.dim, rows.count);
    let mut part = [0.0; STEP * STEP];
    for_each_step::<F>(rows, |first, decoded| {
        for (i, outputs) in outputs.chunks_mut(STEP * dim).enumerate() {
            let part = &mut part[..outputs.len() / dim * decoded.count];
            for (q, part) in part.chunks_exact_mut(decoded.count).enumerate() {
                let at = (i * STEP + q) * count + first;
                part.copy_from_slice(&weights[at..at + decoded.count]);
            }
            raw::axpy::<F32>(decoded, part, outputs);
        }
    });
}

/// Hands a few decoded rows after the other to `each`, with the index of the first.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn for_each_step<F: Format>(rows: &Rows<'_>, mut each: impl FnMut(usize, &Rows<'_>)) {
    let (mut stack, mut heap) = ([0.0; BUFFER], Vec::new());
    let buffer = if rows.dim <= BUFFER {
        &mut stack[..]
    } else {
        heap.resize(rows.dim, 0.0);
        &mut heap[..]
    };
    let step = (buffer.len() / rows.dim).min(STEP);
    for first in (0..rows.count).step_by(step) {
        let some = step.min(rows.count - first);
        let decoded = &mut buffer[..some * rows.dim];
        decode::<F>(&Rows { bytes: rows.row(first), count: some, ..*rows }, decoded);
        each(first, &Rows::of_f32(decoded, rows.dim));
    }
}

/// The rows as f32, `[count, dim]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn decode<F: Format>(rows: &Rows<'_>, out: &mut [f32]) {
    for (t, out) in out.chunks_exact_mut(rows.dim).enumerate() {
        let row = rows.row(t).as_ptr();
        let (vectors, rest) = out.as_chunks_mut::<8>();
        for (block, parts) in vectors.chunks_mut(4).enumerate() {
            // SAFETY: row `t` and the parts lie in the bytes.
            unsafe {
                let open = F::open(rows, row, block);
                for (part, out) in parts.iter_mut().enumerate() {
                    let mut x = open.part(part);
                    if F::SCALED {
                        x = _mm256_mul_ps(x, _mm256_set1_ps(F::row_scale(rows, row)));
                    }
                    _mm256_storeu_ps(out.as_mut_ptr(), x);
                }
            }
        }
        for (i, x) in rest.iter_mut().enumerate() {
            // SAFETY: row `t` and the column lie in the bytes.
            *x = unsafe { F::open(rows, row, 0).element(rows.dim / 8 * 8 + i) };
        }
    }
}
