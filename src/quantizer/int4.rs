//! 4-bit integers with one scale and minimum for each token and head.
//!
//! ```text
//! m = min x as f32        s = (max x - m) / 15 as f32
//! q = (x - m) / s, rounded half to even        x = s * q + m
//! row = codes, 16 bytes for each 32 channels, then s, m
//! ```
//!
//! One outlier channel widens the range of its row: use `had+int4`. Magnitudes saturate at 8.5e37.

use super::Entry;
use super::token::TokenQuantizer;
use crate::simd::Format;

pub(super) static ENTRY: Entry = Entry {
    name: "int4",
    summary: "4 bits, an f32 scale and minimum for each token and head; best as had+int4",
    paper: "vLLM int4_per_token_head",
    params: &[],
    aliases: &[],
    examples: &["int4"],
    create: |_, _, kernels| TokenQuantizer::coded("int4", Format::Int4, kernels),
};
