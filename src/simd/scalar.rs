//! Plain Rust: the level for every CPU, and the reference that the others are compared with.

use half::{bf16, f16};

use super::rows::{BLOCK, Format, RowKernels, Rows};
use super::scalar_levels::{E4m3, E5m2, Int4, Int8, Iq4Nl, Mxfp4, Nvfp4, Q4_1, Q5_0, Q5_1, Tq};
use super::{Kernels, Softmax, encode, encode_affine, sanitize, softmax};

pub(super) static KERNELS: Kernels = Kernels {
    name: "scalar",
    is_available: || true,
    rows: [
        row_kernels::<F32>(),
        row_kernels::<F16>(),
        row_kernels::<Bf16>(),
        row_kernels::<Q8_0>(),
        row_kernels::<Q4_0>(),
        row_kernels::<Affine<4>>(),
        row_kernels::<Affine<2>>(),
        row_kernels::<Codes<4>>(),
        row_kernels::<Codes<2>>(),
        row_kernels::<Q4_1>(),
        row_kernels::<Q5_0>(),
        row_kernels::<Q5_1>(),
        row_kernels::<Iq4Nl>(),
        row_kernels::<Mxfp4>(),
        row_kernels::<Nvfp4>(),
        row_kernels::<Int8>(),
        row_kernels::<Int4>(),
        row_kernels::<Tq<2>>(),
        row_kernels::<Tq<3>>(),
        row_kernels::<Tq<4>>(),
        row_kernels::<E4m3>(),
        row_kernels::<E5m2>(),
    ],
    encode_f16,
    encode_bf16,
    encode_q8_0: |values, out| encode_blocks(values, out, encode_q8_0_block),
    encode_q4_0: |values, out| encode_blocks(values, out, encode_q4_0_block),
    encode_rows: |format, values, dim, out| encode::rows(format, values, dim, out),
    all_within: |values, limit| encode::fits(values, limit),
    channel_ranges: |values, low, high| encode_affine::channel_ranges(values, low, high),
    group_ranges: |row, group, low, high| encode_affine::group_ranges(row, group, low, high),
    encode_codes: |bits, values, inverse, m, out| {
        encode_affine::codes(bits, values, inverse, m, out);
    },
    dot_f32,
    axpy_f32,
    scale: |values, factor| values.iter_mut().for_each(|x| *x *= factor),
    max,
    exp_sub,
    weigh,
    hadamard,
};

const fn row_kernels<R: Row>() -> RowKernels {
    RowKernels { dot: dot::<R>, axpy: axpy::<R>, decode: decode::<R>, integers: None }
}

/// Decoding of one format.
pub(super) trait Row {
    /// Decodes the elements of `row` from `at`, a multiple of 32, on: at most one block.
    fn block(rows: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]);
}

fn dot<R: Row>(rows: &Rows<'_>, queries: &[f32], scores: &mut [f32]) {
    scores.fill(0.0);
    for_each_block::<R>(rows, |t, at, block| {
        for (query, scores) in queries.chunks(rows.dim).zip(scores.chunks_mut(rows.count)) {
            scores[t] += dot_f32(block, &query[at..at + block.len()]);
        }
    });
}

fn axpy<R: Row>(rows: &Rows<'_>, weights: &[f32], outputs: &mut [f32]) {
    for_each_block::<R>(rows, |t, at, block| {
        for (weights, output) in weights.chunks(rows.count).zip(outputs.chunks_mut(rows.dim)) {
            axpy_f32(weights[t], block, &mut output[at..at + block.len()]);
        }
    });
}

fn decode<R: Row>(rows: &Rows<'_>, out: &mut [f32]) {
    for_each_block::<R>(rows, |t, at, block| {
        out[t * rows.dim + at..][..block.len()].copy_from_slice(block);
    });
}

fn for_each_block<R: Row>(rows: &Rows<'_>, mut act: impl FnMut(usize, usize, &[f32])) {
    let mut buffer = [0.0; BLOCK];
    for t in 0..rows.count {
        for at in (0..rows.dim).step_by(BLOCK) {
            let block = &mut buffer[..BLOCK.min(rows.dim - at)];
            R::block(rows, rows.row(t), at, block);
            act(t, at, block);
        }
    }
}

struct F32;
struct F16;
struct Bf16;
struct Q8_0;
struct Q4_0;
struct Codes<const BITS: usize>;
struct Affine<const BITS: usize>;

impl Row for F32 {
    fn block(_: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        for (x, bytes) in out.iter_mut().zip(row[at * 4..].as_chunks().0) {
            *x = f32::from_le_bytes(*bytes);
        }
    }
}

impl Row for F16 {
    fn block(_: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        for (x, bytes) in out.iter_mut().zip(row[at * 2..].as_chunks().0) {
            *x = f16::from_le_bytes(*bytes).to_f32();
        }
    }
}

impl Row for Bf16 {
    fn block(_: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        for (x, bytes) in out.iter_mut().zip(row[at * 2..].as_chunks().0) {
            *x = bf16::from_le_bytes(*bytes).to_f32();
        }
    }
}

impl Row for Q8_0 {
    fn block(_: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        let bytes = &row[at / BLOCK * 34..][..34];
        let d = f16_at(bytes, 0);
        for (x, q) in out.iter_mut().zip(&bytes[2..]) {
            *x = d * f32::from(q.cast_signed());
        }
    }
}

impl Row for Q4_0 {
    fn block(_: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        let bytes = &row[at / BLOCK * 18..][..18];
        let d = f16_at(bytes, 0);
        unpack::<4>(&bytes[2..], out);
        for x in out {
            // Like d * (q - 8) exact, and without a negative zero on any level.
            *x = d * *x - 8.0 * d;
        }
    }
}

impl<const BITS: usize> Row for Codes<BITS> {
    fn block(_: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        unpack::<BITS>(&row[at * BITS / 8..], out);
    }
}

impl<const BITS: usize> Row for Affine<BITS> {
    fn block(rows: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        unpack::<BITS>(&row[at * BITS / 8..], out);
        let metadata = &row[rows.dim * BITS / 8 + at / rows.group * 4..];
        let (s, m) = (f16_at(metadata, 0), f16_at(metadata, 2));
        for x in out {
            *x = s * *x + m;
        }
    }
}

/// The 32 codes of a block: with `w = 4 * BITS` bytes, element `j` is in byte `j % w`.
pub(super) fn unpack<const BITS: usize>(bytes: &[u8], out: &mut [f32]) {
    let width = 4 * BITS;
    for (part, out) in out.chunks_mut(width).enumerate() {
        for (x, byte) in out.iter_mut().zip(bytes) {
            *x = f32::from((byte >> (part * BITS)) & ((1 << BITS) - 1));
        }
    }
}

pub(super) fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn encode_f16(values: &[f32], out: &mut [u8]) {
    for (bytes, x) in out.as_chunks_mut().0.iter_mut().zip(values) {
        *bytes = f16::from_f32(*x).to_le_bytes();
    }
}

fn encode_bf16(values: &[f32], out: &mut [u8]) {
    for (bytes, x) in out.as_chunks_mut().0.iter_mut().zip(values) {
        *bytes = bf16::from_f32(*x).to_le_bytes();
    }
}

fn encode_blocks(values: &[f32], out: &mut [u8], encode: fn(&[f32; BLOCK], &mut [u8])) {
    let blocks = values.as_chunks().0;
    if blocks.is_empty() {
        return;
    }
    for (block, bytes) in blocks.iter().zip(out.chunks_exact_mut(out.len() / blocks.len())) {
        encode(block, bytes);
    }
}

/// Largest magnitude whose scale is a finite f16.
pub(super) const Q8_0_LIMIT: f32 = 127.0 * 65504.0;
/// Largest magnitude whose scale is a finite f16.
pub(super) const Q4_0_LIMIT: f32 = 8.0 * 65504.0;

fn encode_q8_0_block(block: &[f32; BLOCK], out: &mut [u8]) {
    let mut block = *block;
    sanitize(&mut block, Q8_0_LIMIT);
    let most = block.iter().map(|x| x.abs()).fold(0.0, f32::max);
    let d = most / 127.0;
    let inverse = reciprocal(d);
    out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (byte, x) in out[2..].iter_mut().zip(block) {
        *byte = ((x * inverse).round() as i8).cast_unsigned();
    }
}

fn encode_q4_0_block(block: &[f32; BLOCK], out: &mut [u8]) {
    let mut block = *block;
    sanitize(&mut block, Q4_0_LIMIT);
    let first = |best: f32, x: &f32| if x.abs() > best.abs() { *x } else { best };
    let d = block.iter().fold(0.0, first) / -8.0;
    let inverse = reciprocal(d);
    let code = |x: f32| ((x * inverse + 8.5) as u8).min(15);
    out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    let (low, high) = block.split_at(BLOCK / 2);
    for (byte, (low, high)) in out[2..].iter_mut().zip(low.iter().zip(high)) {
        *byte = code(*low) | code(*high) << 4;
    }
}

/// `1 / d`, or 0 when `d` is zero or so small that the quotient could overflow.
pub(super) fn reciprocal(d: f32) -> f32 {
    if d.abs() >= f32::MIN_POSITIVE { 1.0 / d } else { 0.0 }
}

/// Eight sums at once, so that the error of long sums stays small and compilers can vectorize.
pub(super) fn dot_f32(a: &[f32], b: &[f32]) -> f32 {
    let (a_chunks, a_rest) = a.as_chunks::<8>();
    let (b_chunks, b_rest) = b.as_chunks::<8>();
    let mut sums = [0.0f32; 8];
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

pub(super) fn axpy_f32(factor: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}

fn max(values: &[f32]) -> f32 {
    values.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

fn exp_sub(scores: &mut [f32], max: f32) -> f32 {
    scores.iter_mut().map(|x| exp_one(x, max)).sum()
}

fn weigh(scores: &mut [f32], softmax: &mut Softmax<'_>) {
    softmax::weigh!(scores, softmax, max, exp_sub);
}

/// One element of `exp_sub`, also the tail of the vector levels.
pub(super) fn exp_one(x: &mut f32, max: f32) -> f32 {
    let e = (*x - max).exp();
    *x = if e < f32::MIN_POSITIVE { 0.0 } else { e };
    *x
}

/// Butterflies in the order 1, 2, 4, ...: the order decides the rounding, so every level keeps it.
pub(super) fn hadamard(values: &mut [f32], size: usize) {
    let mut half = 1;
    while half < size {
        for pair in values.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let factor = hadamard_factor(size);
    values.iter_mut().for_each(|x| *x *= factor);
}

/// What makes the matrix of this size orthonormal.
pub(super) fn hadamard_factor(size: usize) -> f32 {
    1.0 / (size as f32).sqrt()
}

const _: () = assert!(Format::E5m2 as usize + 1 == Format::COUNT);
