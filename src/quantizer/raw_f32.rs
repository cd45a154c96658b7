//! Single precision: exact.

use super::Entry;
use super::token::TokenQuantizer;
use crate::simd::Format;

pub(super) static ENTRY: Entry = Entry {
    name: "f32",
    summary: "32 bits, exact",
    paper: "IEEE 754-2019 binary32",
    params: &[],
    aliases: &[],
    examples: &["f32"],
    create: |_, _, kernels| {
        TokenQuantizer::plain("f32", Format::F32, kernels, |_, rows, _, out| {
            for (bytes, x) in out.as_chunks_mut().0.iter_mut().zip(rows) {
                *bytes = x.to_le_bytes();
            }
        })
    },
};
