//! 8-bit integers with one scale for each token and head.
//!
//! ```text
//! s = max |x| / 127 as f32        q = x / s, rounded half to even        x = s * q
//! row = q[dim] as i8, s
//! ```
//!
//! The scale is f32: every finite magnitude is held.

use super::Entry;
use super::token::TokenQuantizer;
use crate::simd::Format;

pub(super) static ENTRY: Entry = Entry {
    name: "int8",
    summary: "8 bits and an f32 scale for each token and head",
    paper: "vLLM int8_per_token_head",
    params: &[],
    aliases: &[],
    examples: &["int8"],
    create: |_, _, kernels| TokenQuantizer::coded("int8", Format::Int8, kernels),
};
