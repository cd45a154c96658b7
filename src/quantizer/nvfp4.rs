//! `NVFP4`: 16 elements along the channels share a scale; 64 are 36 bytes.
//!
//! ```text
//! s = max |x| / 6 as E4M3        q = E2M1 number nearest to x / s        x = s * q
//! 64 elements = s[0..4], then for each 16 elements u8[8]: q[j] low, q[j + 8] high nibble of byte j
//! ```
//!
//! There is no global scale: magnitudes saturate at 2688, and below 0.006 they decode to 0.

use super::Entry;
use super::token::TokenQuantizer;
use crate::simd::Format;

pub(super) static ENTRY: Entry = Entry {
    name: "nvfp4",
    summary: "4.5 bits: 4-bit floats, an 8-bit float for each 16 channels",
    paper: "NVIDIA NVFP4; layout of ggml",
    params: &[],
    aliases: &[],
    examples: &["nvfp4"],
    create: |_, _, kernels| TokenQuantizer::coded("nvfp4", Format::Nvfp4, kernels),
};
