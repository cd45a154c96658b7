//! ggml's `Q8_0`: blocks of 32 elements along the channels, 34 bytes each.
//!
//! ```text
//! d = max |x| / 127 as f16        q = x / d, rounded half away from zero        x = d * q
//! block = d, q[0..32] as i8
//! ```
//!
//! The division uses the unrounded d, as ggml does.

use super::Entry;
use super::token::TokenQuantizer;
use crate::simd::Format;

pub(super) static ENTRY: Entry = Entry {
    name: "q8_0",
    summary: "8.5 bits: blocks of 32 along the channels, f16 scale, 8-bit codes",
    paper: "ggml Q8_0, byte compatible",
    params: &[],
    aliases: &[],
    examples: &["q8_0"],
    create: |_, _, kernels| {
        TokenQuantizer::plain("q8_0", Format::Q8_0, kernels, |this, rows, _, out| {
            this.kernels.encode_q8_0(rows, out);
        })
    },
};
