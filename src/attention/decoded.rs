//! Rows that are decoded once and then used as f32, when many queries share them.

/// Query vectors from which on this pays, instead of dequantizing rows again for each batch; not for
/// formats that take many queries as they are (`Quantizer::takes_many`). With 64 vectors it saves 1 %
/// (`had+q4_0`) to 9 % (`q4_0`) of the time (AVX2); with 32 it loses up to 14 %.
pub(crate) const DECODE_FROM: usize = 64;
