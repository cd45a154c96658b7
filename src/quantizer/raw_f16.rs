//! Half precision: 16 bits, 11 of them significant, up to 65504. The usual format of open blocks.

use super::Entry;
use super::token::TokenQuantizer;
use crate::simd::Format;

pub(super) static ENTRY: Entry = Entry {
    name: "f16",
    summary: "16 bits, IEEE half precision",
    paper: "IEEE 754-2019 binary16",
    params: &[],
    aliases: &[],
    examples: &["f16"],
    create: |_, _, kernels| {
        TokenQuantizer::plain("f16", Format::F16, kernels, |this, rows, _, out| {
            this.kernels.encode_f16(rows, out);
        })
    },
};
