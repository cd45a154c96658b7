//! ggml's `Q4_0`: blocks of 32 elements along the channels, 18 bytes each.
//!
//! ```text
//! d = m / -8 as f16, m the element of largest magnitude, the first of equals
//! q = min(15, floor(x / d + 8.5))        x = d * (q - 8)
//! block = d, u8[16]: q[j] in the low and q[j + 16] in the high nibble of byte j
//! ```
//!
//! The division uses the unrounded d, as ggml does. The sign of d makes the largest element exact.

use super::Entry;
use super::token::TokenQuantizer;
use crate::simd::Format;

pub(super) static ENTRY: Entry = Entry {
    name: "q4_0",
    summary: "4.5 bits: blocks of 32 along the channels, f16 scale, 4-bit codes",
    paper: "ggml Q4_0, byte compatible",
    params: &[],
    aliases: &[],
    examples: &["q4_0"],
    create: |_, _, kernels| {
        TokenQuantizer::plain("q4_0", Format::Q4_0, kernels, |this, rows, _, out| {
            this.kernels.encode_q4_0(rows, out);
        })
    },
};
