//! bfloat16: 16 bits, 8 of them significant, with the range of f32.

use super::Entry;
use super::token::TokenQuantizer;
use crate::simd::Format;

pub(super) static ENTRY: Entry = Entry {
    name: "bf16",
    summary: "16 bits, the range of f32",
    paper: "bfloat16: the upper half of IEEE 754 binary32",
    params: &[],
    aliases: &[],
    examples: &["bf16"],
    create: |_, _, kernels| {
        TokenQuantizer::plain("bf16", Format::Bf16, kernels, |this, rows, _, out| {
            this.kernels.encode_bf16(rows, out);
        })
    },
};
