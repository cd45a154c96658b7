//! ggml's `Q4_1`: blocks of 32 elements along the channels, 20 bytes each.
//!
//! ```text
//! d = (max - min) / 15 as f16        m = min as f16
//! q = min(15, floor((x - min) / d + 0.5))        x = d * q + m
//! block = d, m, u8[16]: q[j] in the low and q[j + 16] in the high nibble of byte j
//! ```
//!
//! The codes use the unrounded d and minimum, as ggml does. Magnitudes saturate at 65504.

use super::Entry;
use super::token::TokenQuantizer;
use crate::simd::Format;

pub(super) static ENTRY: Entry = Entry {
    name: "q4_1",
    summary: "5 bits: blocks of 32 along the channels, f16 scale and minimum, 4-bit codes",
    paper: "ggml Q4_1, byte compatible",
    params: &[],
    aliases: &[],
    examples: &["q4_1"],
    create: |_, _, kernels| TokenQuantizer::coded("q4_1", Format::Q4_1, kernels),
};
