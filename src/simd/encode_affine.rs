//! KIVI's encoding in plain Rust, which every level compiles for its own instructions; nothing is
//! fused, so that bytes agree bit for bit. Values are finite.
//!
//! The caller rounds scales and minima to f16 between the two steps: first [`ranges`], then
//! [`codes`].

use super::encode::{larger, range, smaller};
use super::rows::BLOCK;

/// Adding it rounds half to even and leaves an integer of up to 22 bits in the low bits.
const ROUND: f32 = 8_388_608.0;

/// Smallest and largest value of each channel of `values [tokens, dim]`; `dim` is a multiple of 32.
#[inline(always)]
pub(super) fn channel_ranges(values: &[f32], low: &mut [f32], high: &mut [f32]) {
    let dim = low.len();
    let blocks = low.as_chunks_mut::<BLOCK>().0.iter_mut().zip(high.as_chunks_mut::<BLOCK>().0);
    for (i, (low, high)) in blocks.enumerate() {
        // Copies, which stay in registers over all tokens.
        let (mut lows, mut highs) = ([f32::INFINITY; BLOCK], [f32::NEG_INFINITY; BLOCK]);
        for row in values.chunks_exact(dim) {
            let block = &row.as_chunks::<BLOCK>().0[i];
            for j in 0..BLOCK {
                lows[j] = smaller(block[j], lows[j]);
                highs[j] = larger(block[j], highs[j]);
            }
        }
        (*low, *high) = (lows, highs);
    }
}

/// Smallest and largest value of each run of `group` channels of one row; the last may be shorter.
/// All are multiples of 32.
#[inline(always)]
pub(super) fn group_ranges(row: &[f32], group: usize, low: &mut [f32], high: &mut [f32]) {
    for ((values, low), high) in row.chunks(group).zip(low).zip(high) {
        (*low, *high) = range(values);
    }
}

/// Codes of `values [tokens, dim]`, blocks of 32 as `Codes4` or `Codes2`. `inverse` and `m` have an
/// element for each channel.
#[inline(always)]
pub(super) fn codes(bits: usize, values: &[f32], inverse: &[f32], m: &[f32], out: &mut [u8]) {
    match bits {
        4 => codes_of::<4, 16>(values, inverse, m, out),
        _ => codes_of::<2, 8>(values, inverse, m, out),
    }
}

#[inline(always)]
fn codes_of<const BITS: usize, const WIDTH: usize>(
    values: &[f32],
    inverse: &[f32],
    m: &[f32],
    out: &mut [u8],
) {
    let top = ((1 << BITS) - 1) as f32;
    let row_bytes = m.len() * BITS / 8;
    for (row, out) in values.chunks_exact(m.len()).zip(out.chunks_exact_mut(row_bytes)) {
        let metadata = inverse.as_chunks::<BLOCK>().0.iter().zip(m.as_chunks::<BLOCK>().0);
        let blocks = row.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<WIDTH>().0);
        for ((block, out), (inverse, m)) in blocks.zip(metadata) {
            let mut codes = [0; BLOCK];
            for j in 0..BLOCK {
                let x = (block[j] - m[j]) * inverse[j];
                codes[j] = (smaller(larger(x, 0.0), top) + ROUND).to_bits();
            }
            for j in 0..WIDTH {
                let mut byte = 0;
                for part in 0..8 / BITS {
                    byte |= (codes[part * WIDTH + j] & ((1 << BITS) - 1)) << (part * BITS);
                }
                out[j] = byte as u8;
            }
        }
    }
}
