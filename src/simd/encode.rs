//! Encoding of whole rows in plain Rust, which every level compiles for its own instructions: all
//! loops have fixed lengths, and nothing is fused, so that bytes agree bit for bit.
//!
//! Layouts are those of `rows.rs`. A row or block is made finite first (`sanitize`).

#![expect(unsafe_code, reason = "conversions to integers without saturation")]

use half::f16;

use super::rows::{BLOCK, Format, IQ4_NL, tq_levels};
use super::sanitize;
use super::scalar::reciprocal;

type Block = [f32; BLOCK];

/// Encodes rows of `dim` values; `out` is as long as the rows in this format.
///
/// Inlined, so that the caller's target features apply.
#[inline(always)]
pub(super) fn rows(format: Format, values: &[f32], dim: usize, out: &mut [u8]) {
    match format {
        Format::Q4_1 => blocks(values, out, affine::<4, 20>),
        Format::Q5_0 => blocks(values, out, q5_0),
        Format::Q5_1 => blocks(values, out, affine::<5, 24>),
        Format::Iq4Nl => blocks(values, out, iq4_nl),
        Format::Mxfp4 => blocks(values, out, mxfp4),
        Format::Nvfp4 => {
            for (block, out) in values.as_chunks::<64>().0.iter().zip(out.as_chunks_mut().0) {
                nvfp4(block, out);
            }
        }
        Format::Int8
        | Format::Int4
        | Format::E4m3
        | Format::E5m2
        | Format::Tq2
        | Format::Tq3
        | Format::Tq4 => {
            let out = out.chunks_exact_mut(format.row_bytes(dim, BLOCK));
            let mut buffer = [0.0; super::MAX_ROW];
            for (row, out) in values.chunks_exact(dim).zip(out) {
                let row_buffer = &mut buffer[..dim];
                row_buffer.copy_from_slice(row);
                match format {
                    Format::Int8 => int8(row_buffer, out),
                    Format::Int4 => int4(row_buffer, out),
                    Format::E4m3 => fp8::<3>(row_buffer, out, 448.0),
                    Format::E5m2 => fp8::<2>(row_buffer, out, 57344.0),
                    Format::Tq2 => tq::<2>(row_buffer, out),
                    Format::Tq3 => tq::<3>(row_buffer, out),
                    _ => tq::<4>(row_buffer, out),
                }
            }
        }
        _ => panic!("{format:?} has an encoder of its own"),
    }
}

#[inline(always)]
fn blocks<const N: usize>(values: &[f32], out: &mut [u8], encode: impl Fn(&Block, &mut [u8; N])) {
    for (block, out) in values.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        encode(block, out);
    }
}

/// Whether all magnitudes are at most `limit`; false for NaN.
#[inline(always)]
pub(super) fn fits(values: &[f32], limit: f32) -> bool {
    let mut all = true;
    for x in values {
        all &= x.abs() <= limit;
    }
    all
}

#[inline(always)]
fn finite<const N: usize>(values: &[f32; N], limit: f32) -> [f32; N] {
    let mut block = *values;
    if !fits(&block, limit) {
        sanitize(&mut block, limit);
    }
    block
}

/// Smallest and largest of finite values, in eight lanes, which compilers make one vector.
#[inline(always)]
pub(super) fn range(values: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([f32::INFINITY; 8], [f32::NEG_INFINITY; 8]);
    for part in values.as_chunks::<8>().0 {
        for i in 0..8 {
            low[i] = smaller(part[i], low[i]);
            high[i] = larger(part[i], high[i]);
        }
    }
    (low.iter().copied().fold(low[0], f32::min), high.iter().copied().fold(high[0], f32::max))
}

/// As [`range`], of a block. The two differ in what compilers make vectors of.
#[inline(always)]
fn block_range(values: &Block) -> (f32, f32) {
    let (mut low, mut high) = ([f32::INFINITY; 8], [f32::NEG_INFINITY; 8]);
    for part in values.as_chunks::<8>().0 {
        for i in 0..8 {
            low[i] = smaller(part[i], low[i]);
            high[i] = larger(part[i], high[i]);
        }
    }
    let (mut lowest, mut highest) = (low[0], high[0]);
    for i in 1..8 {
        lowest = smaller(low[i], lowest);
        highest = larger(high[i], highest);
    }
    (lowest, highest)
}

/// One instruction, unlike `f32::min`, which cares for NaN.
#[inline(always)]
pub(super) fn smaller(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

/// As [`smaller`].
#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    let (low, high) = range(values);
    // Of zeros, -0 could win.
    larger(high, -low).abs()
}

/// The first element of largest magnitude, with its sign.
#[inline(always)]
fn signed_largest(values: &Block) -> f32 {
    let (low, high) = block_range(values);
    if high == -low {
        return values.iter().copied().find(|x| x.abs() == high).unwrap_or(0.0);
    }
    if high > -low { high } else { low }
}

/// The integer part.
#[inline(always)]
fn truncate(x: f32) -> i32 {
    // SAFETY: callers have finite values, limited and scaled to a few times the largest code.
    unsafe { x.to_int_unchecked() }
}

#[inline(always)]
fn put_f16(out: &mut [u8], at: usize, x: f32) {
    out[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
}

/// Nibbles: element `j` low, `j + 16` high.
#[inline(always)]
fn put_nibbles(out: &mut [u8], codes: &[i32; BLOCK]) {
    for j in 0..BLOCK / 2 {
        out[j] = ((codes[j] & 15) | ((codes[j + 16] & 15) << 4)) as u8;
    }
}

/// Bit 4 of each code, element 0 in the lowest bit.
#[inline(always)]
fn fifth_bits(codes: &[i32; BLOCK]) -> [u8; 4] {
    let mut bits = 0u32;
    for (j, code) in codes.iter().enumerate() {
        bits |= ((*code as u32 >> 4) & 1) << j;
    }
    bits.to_le_bytes()
}

/// Largest magnitude whose scale or minimum is a finite f16.
const AFFINE_LIMIT: f32 = 65504.0;

#[inline(always)]
fn affine<const BITS: usize, const N: usize>(block: &Block, out: &mut [u8; N]) {
    let top = (1 << BITS) - 1;
    let block = finite(block, AFFINE_LIMIT);
    let (low, high) = block_range(&block);
    let d = (high - low) / top as f32;
    let inverse = reciprocal(d);
    let mut codes = [0; BLOCK];
    for j in 0..BLOCK {
        codes[j] = truncate((block[j] - low) * inverse + 0.5).min(top);
    }
    put_f16(out, 0, d);
    put_f16(out, 2, low);
    if BITS == 5 {
        out[4..8].copy_from_slice(&fifth_bits(&codes));
    }
    put_nibbles(&mut out[N - 16..], &codes);
}

#[inline(always)]
fn q5_0(block: &Block, out: &mut [u8; 22]) {
    let block = finite(block, 16.0 * 65504.0);
    let d = signed_largest(&block) / -16.0;
    let inverse = reciprocal(d);
    let mut codes = [0; BLOCK];
    for j in 0..BLOCK {
        codes[j] = truncate(block[j] * inverse + 16.5).min(31);
    }
    put_f16(out, 0, d);
    out[2..6].copy_from_slice(&fifth_bits(&codes));
    put_nibbles(&mut out[6..], &codes);
}

/// The scale that fits the codes best in the squares of the values, weighted by their squares.
#[inline(always)]
fn iq4_nl(block: &Block, out: &mut [u8; 18]) {
    let block = finite(block, 127.0 * 32752.0);
    let inverse = reciprocal(signed_largest(&block) / -127.0);
    let mut codes = [0; BLOCK];
    for pair in IQ4_NL.windows(2) {
        let middle = (f32::from(pair[0]) + f32::from(pair[1])) * 0.5;
        for j in 0..BLOCK {
            codes[j] += i32::from(block[j] * inverse >= middle);
        }
    }
    let (mut above, mut below) = (0.0, 0.0);
    for j in 0..BLOCK {
        // Squares of normalised values, which cannot overflow.
        let x = block[j] * inverse;
        let level = f32::from(IQ4_NL[codes[j] as usize]);
        above += x * x * level * block[j];
        below += x * x * level * level;
    }
    put_f16(out, 0, if below > 0.0 { above / below } else { 0.0 });
    put_nibbles(&mut out[2..], &codes);
}

/// Codes of E2M1 for values whose scale is 1: the smaller magnitude on a tie.
#[inline(always)]
fn e2m1<const N: usize>(scaled: &[f32; N]) -> [i32; N] {
    let mut codes = [0; N];
    for j in 0..N {
        let x = scaled[j].abs();
        let mut code = i32::from(x > 0.25) + i32::from(x > 0.75) + i32::from(x > 1.25);
        code += i32::from(x > 1.75) + i32::from(x > 2.5) + i32::from(x > 3.5);
        code += i32::from(x > 5.0);
        let sign = i32::from(scaled[j] < 0.0) & i32::from(code > 0);
        codes[j] = code | sign << 3;
    }
    codes
}

#[inline(always)]
fn mxfp4(block: &Block, out: &mut [u8; 17]) {
    let block = finite(block, f32::MAX);
    let most = largest(&block);
    let e = ((most.to_bits() >> 23) as i32 - 2).max(0);
    // 2^(127 - e), a normal number for every exponent that a finite value can have.
    let inverse = f32::from_bits(((254 - e) as u32) << 23);
    let mut scaled = [0.0; BLOCK];
    for j in 0..BLOCK {
        scaled[j] = block[j] * inverse;
    }
    out[0] = e as u8;
    put_nibbles(&mut out[1..], &e2m1(&scaled));
}

/// Largest magnitude that a scale of UE4M3 reaches.
const NVFP4_LIMIT: f32 = 6.0 * 448.0;

#[inline(always)]
fn nvfp4(block: &[f32; 64], out: &mut [u8; 36]) {
    let block = finite(block, NVFP4_LIMIT);
    for (i, part) in block.as_chunks::<16>().0.iter().enumerate() {
        let scale = e4m3_of(largest(part) / 6.0);
        let inverse = reciprocal(super::rows::e4m3(scale));
        let mut scaled = [0.0; 16];
        for j in 0..16 {
            scaled[j] = part[j] * inverse;
        }
        let codes = e2m1(&scaled);
        out[i] = scale;
        for j in 0..8 {
            out[4 + i * 8 + j] = (codes[j] | codes[j + 8] << 4) as u8;
        }
    }
}

/// Rounds a number in 0..=448 to E4M3, half to even.
#[inline(always)]
fn e4m3_of(x: f32) -> u8 {
    float_8::<3>(x)
}

/// Rounds a number that is not negative, and at most the largest of the type, to 8 bits with
/// `FRACTION` bits of fraction, half to even.
#[inline(always)]
fn float_8<const FRACTION: u32>(x: f32) -> u8 {
    // Bias of the exponent, of 7 - FRACTION bits; 2^(1 - bias) is the smallest normal number.
    let bias = (1 << (6 - FRACTION)) - 1;
    let drop = 23 - FRACTION;
    // Denormals count multiples of 2^(1 - bias - FRACTION).
    let per_step = f32::from_bits((127 + bias - 1 + FRACTION) << 23);
    let small = (x * per_step + ROUND).to_bits() & 0xff;
    let bits = x.to_bits();
    let rounded = bits.wrapping_add((1 << (drop - 1)) - 1 + (bits >> drop & 1));
    let normal = (rounded >> drop).wrapping_sub((127 - bias) << FRACTION);
    let is_small = x < f32::from_bits((128 - bias) << 23);
    (if is_small { small } else { normal }) as u8
}

/// Adding it rounds half to even and leaves an integer of up to 22 bits in the low bits.
const ROUND: f32 = 12_582_912.0;

#[inline(always)]
fn int8(row: &mut [f32], out: &mut [u8]) {
    // 127 times the rounded scale must not overflow.
    let limit = f32::MAX / 2.0;
    if !fits(row, limit) {
        sanitize(row, limit);
    }
    let scale = largest(row) / 127.0;
    let divisor = if scale >= f32::MIN_POSITIVE { scale } else { f32::INFINITY };
    let (codes, metadata) = out.split_at_mut(row.len());
    for (code, x) in codes.iter_mut().zip(row.iter()) {
        *code = (x / divisor + ROUND).to_bits() as u8;
    }
    metadata.copy_from_slice(&scale.to_le_bytes());
}

#[inline(always)]
fn fp8<const FRACTION: u32>(row: &mut [f32], out: &mut [u8], top: f32) {
    let limit = f32::MAX / 4.0;
    if !fits(row, limit) {
        sanitize(row, limit);
    }
    let scale = largest(row) / top;
    let divisor = if scale >= f32::MIN_POSITIVE { scale } else { f32::INFINITY };
    let (codes, metadata) = out.split_at_mut(row.len());
    for (code, x) in codes.iter_mut().zip(row.iter()) {
        let x = x / divisor;
        let magnitude = x.abs();
        let magnitude = if magnitude > top { top } else { magnitude };
        *code = float_8::<FRACTION>(magnitude) | u8::from(x < 0.0) << 7;
    }
    metadata.copy_from_slice(&scale.to_le_bytes());
}

#[inline(always)]
fn int4(row: &mut [f32], out: &mut [u8]) {
    let limit = f32::MAX / 4.0;
    if !fits(row, limit) {
        sanitize(row, limit);
    }
    let (low, high) = range(row);
    let scale = (high - low) / 15.0;
    let divisor = if scale >= f32::MIN_POSITIVE { scale } else { f32::INFINITY };
    let (packed, metadata) = out.split_at_mut(row.len() / 2);
    for (block, out) in row.as_chunks::<BLOCK>().0.iter().zip(packed.chunks_exact_mut(16)) {
        let mut codes = [0; BLOCK];
        for j in 0..BLOCK {
            let x = ((block[j] - low) / divisor).min(15.0);
            codes[j] = (x + ROUND).to_bits() as i32;
        }
        put_nibbles(out, &codes);
    }
    metadata[..4].copy_from_slice(&scale.to_le_bytes());
    metadata[4..].copy_from_slice(&low.to_le_bytes());
}

/// Largest magnitude of a rotated row: the corrected norm stays a finite f16.
const TQ_LIMIT: f32 = 32768.0;

#[inline(always)]
fn sum_of_squares(values: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    for part in values.as_chunks::<8>().0 {
        for i in 0..8 {
            sums[i] += part[i] * part[i];
        }
    }
    sums.iter().sum()
}

#[inline(always)]
fn tq<const BITS: usize>(row: &mut [f32], out: &mut [u8]) {
    if !fits(row, TQ_LIMIT) {
        sanitize(row, TQ_LIMIT);
    }
    let levels = &tq_levels(row.len())[BITS - 2];
    let levels = &levels[..1 << BITS];
    let dim = row.len() as f32;
    let norm = sum_of_squares(row).sqrt();
    let inverse = reciprocal(norm) * dim.sqrt();
    let (packed, metadata) = out.split_at_mut(row.len() * BITS / 8);
    let mut squares = 0.0;
    for (block, out) in row.as_chunks::<BLOCK>().0.iter().zip(packed.chunks_exact_mut(4 * BITS)) {
        let mut codes = [0; BLOCK];
        let mut values = [levels[0]; BLOCK];
        for pair in levels.windows(2) {
            let middle = (pair[0] + pair[1]) * 0.5;
            for j in 0..BLOCK {
                let above = block[j] * inverse > middle;
                codes[j] += i32::from(above);
                values[j] = if above { pair[1] } else { values[j] };
            }
        }
        squares += sum_of_squares(&values);
        for (codes, out) in codes.as_chunks::<8>().0.iter().zip(out.chunks_exact_mut(BITS)) {
            let mut bits = 0u32;
            for (i, code) in codes.iter().enumerate() {
                bits |= (*code as u32) << (i * BITS);
            }
            out.copy_from_slice(&bits.to_le_bytes()[..BITS]);
        }
    }
    put_f16(metadata, 0, norm / squares.sqrt());
}
