//! ggml's `IQ4_NL`: blocks of 32 elements along the channels, 18 bytes each.
//!
//! ```text
//! q = the level K[q] nearest to x / d0, d0 = m / -127, m the element of largest magnitude
//! d = sum x^2 K[q] x / sum x^2 K[q]^2 as f16        x = d * K[q]
//! block = d, u8[16]: q[j] in the low and q[j + 16] in the high nibble of byte j
//! ```
//!
//! The 16 levels are denser around 0. Codes are not chosen again for the fitted d.
//! Magnitudes saturate at 4.1e6.

use super::Entry;
use super::token::TokenQuantizer;
use crate::simd::Format;

pub(super) static ENTRY: Entry = Entry {
    name: "iq4_nl",
    summary: "4.5 bits: like q4_0 with levels that are denser around 0",
    paper: "ggml IQ4_NL, byte compatible",
    params: &[],
    aliases: &[],
    examples: &["iq4_nl"],
    create: |_, _, kernels| TokenQuantizer::coded("iq4_nl", Format::Iq4Nl, kernels),
};
