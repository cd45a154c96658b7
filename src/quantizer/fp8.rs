//! 8-bit floats with one scale for each token and head.
//!
//! ```text
//! s = max |x| / top as f32        q = x / s as E4M3 or E5M2, rounded half to even        x = s * q
//! row = u8[dim], then s
//! E4M3: 4 bits of exponent, 3 of fraction, top 448        E5M2: 5 and 2 bits, top 57344
//! ```
//!
//! The scale makes the largest element exact, and keeps small rows away from denormal codes.
//! Magnitudes saturate at 8.5e37.

use super::Entry;
use super::token::TokenQuantizer;
use crate::registry::{Domain, Param};
use crate::simd::Format;

pub(super) static ENTRY: Entry = Entry {
    name: "fp8",
    summary: "8-bit floats, an f32 scale for each token and head",
    paper: "FP8 Formats for Deep Learning, arXiv 2209.05433; vLLM fp8_per_token_head",
    params: &[Param {
        name: "type",
        help: "e4m3 (more fraction) or e5m2 (more range)",
        domain: Domain::Choice(&["e4m3", "e5m2"]),
    }],
    aliases: &[("fp8_e4m3", "fp8(e4m3)"), ("fp8_e5m2", "fp8(e5m2)")],
    examples: &["fp8(e4m3)", "fp8(e5m2)"],
    create: |args, _, kernels| match args.text("type") {
        "e5m2" => TokenQuantizer::coded("fp8(e5m2)", Format::E5m2, kernels),
        _ => TokenQuantizer::coded("fp8(e4m3)", Format::E4m3, kernels),
    },
};
