//! `MXFP4`: blocks of 32 elements along the channels, 17 bytes each.
//!
//! ```text
//! e = floor(log2(max |x|)) - 2        q = E2M1 number nearest to x / 2^e        x = 2^e * q
//! block = e + 127, u8[16]: q[j] in the low and q[j + 16] in the high nibble of byte j
//! E2M1 = 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, in the order of their codes
//! ```
//!
//! Ties go to the smaller magnitude. Every finite magnitude has a scale; above 6 * 2^e codes saturate.

use super::Entry;
use super::token::TokenQuantizer;
use crate::simd::Format;

pub(super) static ENTRY: Entry = Entry {
    name: "mxfp4",
    summary: "4.25 bits: 4-bit floats, a power of two for each 32 channels",
    paper: "OCP Microscaling Formats 1.0; bytes as ggml MXFP4",
    params: &[],
    aliases: &[],
    examples: &["mxfp4"],
    create: |_, _, kernels| TokenQuantizer::coded("mxfp4", Format::Mxfp4, kernels),
};
