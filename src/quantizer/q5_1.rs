//! ggml's `Q5_1`: blocks of 32 elements along the channels, 24 bytes each.
//!
//! ```text
//! d = (max - min) / 31 as f16        m = min as f16
//! q = min(31, floor((x - min) / d + 0.5))        x = d * q + m
//! block = d, m, u32 of fifth bits, u8[16]: low four bits of q[j] and q[j + 16] in byte j
//! ```
//!
//! The codes use the unrounded d and minimum, as ggml does. Magnitudes saturate at 65504.

use super::Entry;
use super::token::TokenQuantizer;
use crate::simd::Format;

pub(super) static ENTRY: Entry = Entry {
    name: "q5_1",
    summary: "6 bits: blocks of 32 along the channels, f16 scale and minimum, 5-bit codes",
    paper: "ggml Q5_1, byte compatible",
    params: &[],
    aliases: &[],
    examples: &["q5_1"],
    create: |_, _, kernels| TokenQuantizer::coded("q5_1", Format::Q5_1, kernels),
};
