//! ggml's `Q5_0`: blocks of 32 elements along the channels, 22 bytes each.
//!
//! ```text
//! d = m / -16 as f16, m the element of largest magnitude, the first of equals
//! q = min(31, floor(x / d + 16.5))        x = d * (q - 16)
//! block = d, u32 of fifth bits, u8[16]: low four bits of q[j] and q[j + 16] in byte j
//! ```
//!
//! The division uses the unrounded d, as ggml does. Magnitudes saturate at 1.0e6.

use super::Entry;
use super::token::TokenQuantizer;
use crate::simd::Format;

pub(super) static ENTRY: Entry = Entry {
    name: "q5_0",
    summary: "5.5 bits: blocks of 32 along the channels, f16 scale, 5-bit codes",
    paper: "ggml Q5_0, byte compatible",
    params: &[],
    aliases: &[],
    examples: &["q5_0"],
    create: |_, _, kernels| TokenQuantizer::coded("q5_0", Format::Q5_0, kernels),
};
