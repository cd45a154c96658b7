//! Layouts of encoded rows, and the loops over them that every level provides.
//!
//! A row of `dim` elements is a run of blocks of 32 elements. Integers are little endian, `d`, `s`
//! and `m` are f16, and code `j` of a block means element `j`:
//!
//! ```text
//! Q8_0     block  d, i8[32]                       x = d * q
//! Q4_0     block  d, u8[16]                       x = d * q - 8 * d
//! Codes4   block  u8[16]: element j low, j + 16 high nibble of byte j          x = q
//! Codes2   block  u8[8]:  elements j, j + 8, j + 16, j + 24 from bit 0 of byte j   x = q
//! Affine4  row    Codes4 blocks, then (s, m) for each group of channels       x = s * q + m
//! Affine2  row    Codes2 blocks, then (s, m) for each group of channels       x = s * q + m
//! Q4_1     block  d, m, u8[16]                    x = d * q + m
//! Q5_0     block  d, u32 of fifth bits, u8[16]    x = d * q - 16 * d
//! Q5_1     block  d, m, u32 of fifth bits, u8[16] x = d * q + m
//! Iq4Nl    block  d, u8[16]                       x = d * K[q]
//! Mxfp4    block  e, u8[16]                       x = 2^(e - 127) * E2M1[q]
//! Nvfp4    64 elements: 4 scales E4M3, then for each 16 elements 8 bytes: element j in the low,
//!          j + 8 in the high nibble of byte j     x = scale * E2M1[q]
//! Int8     row    i8[dim], scale f32              x = scale * q
//! Int4     row    Codes4 blocks, s f32, m f32     x = s * q + m
//! E4m3     row    u8[dim], scale f32              x = scale * E4M3[q]
//! E5m2     row    u8[dim], scale f32              x = scale * E5M2[q]
//! Tq2..4   row    a stream of codes, lowest bits first, then n f16      x = n * levels[q]
//! ```

use super::prepared::IntegerKernels;

/// Elements of a block.
pub const BLOCK: usize = 32;

/// How the elements of a row are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// ggml's 8-bit blocks.
    Q8_0,
    /// ggml's 4-bit blocks.
    Q4_0,
    /// 4-bit codes with a scale and a minimum for each group of channels.
    Affine4,
    /// 2-bit codes with a scale and a minimum for each group of channels.
    Affine2,
    /// Bare 4-bit codes.
    Codes4,
    /// Bare 2-bit codes.
    Codes2,
    /// ggml's 4-bit blocks with a minimum.
    Q4_1,
    /// ggml's 5-bit blocks.
    Q5_0,
    /// ggml's 5-bit blocks with a minimum.
    Q5_1,
    /// ggml's 4-bit blocks with levels that are not evenly spaced.
    Iq4Nl,
    /// OCP microscaling: 4-bit floats with a power of two for each 32.
    Mxfp4,
    /// 4-bit floats with an 8-bit float for each 16.
    Nvfp4,
    /// 8-bit integers with an f32 scale for each row.
    Int8,
    /// 4-bit integers with an f32 scale and minimum for each row.
    Int4,
    /// 2-bit Lloyd-Max levels with a norm for each row.
    Tq2,
    /// 3-bit Lloyd-Max levels with a norm for each row.
    Tq3,
    /// 4-bit Lloyd-Max levels with a norm for each row.
    Tq4,
    /// 8-bit floats with 3 bits of fraction and an f32 scale for each row.
    E4m3,
    /// 8-bit floats with 2 bits of fraction and an f32 scale for each row.
    E5m2,
}

impl Format {
    /// How many formats there are.
    pub const COUNT: usize = 22;

    /// Bytes of a row; `group` is the number of channels that share metadata in affine formats.
    pub const fn row_bytes(self, dim: usize, group: usize) -> usize {
        match self {
            Self::F32 => dim * 4,
            Self::F16 | Self::Bf16 => dim * 2,
            Self::Q8_0 => dim / BLOCK * 34,
            Self::Q4_0 => dim / BLOCK * 18,
            Self::Affine4 => dim / 2 + dim.div_ceil(group) * 4,
            Self::Affine2 => dim / 4 + dim.div_ceil(group) * 4,
            Self::Codes4 => dim / 2,
            Self::Codes2 => dim / 4,
            Self::Q4_1 => dim / BLOCK * 20,
            Self::Q5_0 => dim / BLOCK * 22,
            Self::Q5_1 => dim / BLOCK * 24,
            Self::Iq4Nl => dim / BLOCK * 18,
            Self::Mxfp4 => dim / BLOCK * 17,
            Self::Nvfp4 => dim / 64 * 36,
            Self::Int8 | Self::E4m3 | Self::E5m2 => dim + 4,
            Self::Int4 => dim / 2 + 8,
            Self::Tq2 => dim / 4 + 2,
            Self::Tq3 => dim / 8 * 3 + 2,
            Self::Tq4 => dim / 2 + 2,
        }
    }

    /// What the elements of a row must be a multiple of.
    pub const fn multiple(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Nvfp4 => 64,
            _ => BLOCK,
        }
    }
}

/// The levels of `Iq4Nl`.
pub(super) const IQ4_NL: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The levels of E2M1, doubled, which makes them integers.
pub(super) const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The value of an E4M3 number without sign; NaN is not one of them.
pub(super) fn e4m3(byte: u8) -> f32 {
    let (exponent, fraction) = (byte >> 3 & 15, f32::from(byte & 7));
    match exponent {
        0 => fraction / 512.0,
        _ => f32::from_bits((u32::from(exponent) + 120) << 23) * (1.0 + fraction / 8.0),
    }
}

/// `2^(e - 128)`: the scale of `Mxfp4` for doubled levels.
pub(super) fn e8m0_half(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x20_0000 << e } else { (u32::from(e) - 1) << 23 })
}

/// Lloyd-Max levels of 2, 3 and 4 bits, each in a table of 16. Short ones repeat, so that a lookup
/// may leave stray bits above its code.
pub(super) type TqLevels = [[f32; 16]; 3];

/// Makes a table from the positive halves.
const fn tq_table(two: [f32; 2], three: [f32; 4], four: [f32; 8]) -> TqLevels {
    let mut levels = [[0.0; 16]; 3];
    let mut i = 0;
    while i < 16 {
        levels[0][i] = if i % 4 < 2 { -two[1 - i % 4] } else { two[i % 4 - 2] };
        levels[1][i] = if i % 8 < 4 { -three[3 - i % 8] } else { three[i % 8 - 4] };
        levels[2][i] = if i < 8 { -four[7 - i] } else { four[i - 8] };
        i += 1;
    }
    levels
}

/// The levels for coordinates of random directions in `dim` dimensions, times the root of `dim`: the
/// exact marginal for 64 and 128, otherwise its limit, the normal distribution.
pub(super) const fn tq_levels(dim: usize) -> &'static TqLevels {
    static TABLES: [TqLevels; 3] = [
        tq_table(
            [0.452_121, 1.4999788],
            [0.2437601, 0.7506742, 1.3293621, 2.1113292],
            [
                0.1273723, 0.3847728, 0.6505729, 0.9319873, 1.2395032, 1.5909488, 2.023_405,
                2.646_452,
            ],
        ),
        tq_table(
            [0.4524574, 1.5052014],
            [0.2444384, 0.7533643, 1.3366412, 2.13151],
            [
                0.127_898, 0.386_448, 0.6537175, 0.9372207, 1.247_909, 1.6044811, 2.0460523,
                2.688_967,
            ],
        ),
        tq_table(
            [0.45278, 1.5104176],
            [0.2450942, 0.7560053, 1.3439093, 2.1519457],
            [
                0.128_395, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172,
                2.7325896,
            ],
        ),
    ];
    match dim {
        64 => &TABLES[0],
        128 => &TABLES[1],
        _ => &TABLES[2],
    }
}

/// Encoded rows at equal distances.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The bytes, from the start of the first row to at least the end of the last.
    pub bytes: &'a [u8],
    /// Bytes from one row to the next.
    pub stride: usize,
    /// Number of rows.
    pub count: usize,
    /// Elements of a row.
    pub dim: usize,
    /// Channels that share a scale and a minimum in affine formats: 32 times a power of two. The
    /// last group of a row may be shorter. Other formats ignore it.
    pub group: usize,
    /// Bytes that will be wanted next: only a hint, which lets memory work while the CPU does.
    pub ahead: &'a [u8],
}

impl<'a> Rows<'a> {
    /// Rows of plain f32, `[count, dim]`, for [`Format::F32`].
    pub fn of_f32(values: &'a [f32], dim: usize) -> Self {
        #[expect(unsafe_code, reason = "f32 as bytes")]
        // SAFETY: the same memory; every byte of an f32 is initialised and a byte has no alignment.
        let bytes =
            unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) };
        Self { bytes, stride: dim * 4, count: values.len() / dim, dim, group: BLOCK, ahead: &[] }
    }

    /// The bytes from the start of row `t` on.
    pub(super) fn row(&self, t: usize) -> &'a [u8] {
        &self.bytes[t * self.stride..]
    }

    /// Panics unless every row lies inside the bytes. The vector loops rely on it.
    pub(super) fn check(&self, format: Format) {
        let Self { bytes, stride, count, dim, group, .. } = *self;
        assert!(
            dim > 0 && dim.is_multiple_of(format.multiple()),
            "{format:?} has no rows of {dim}"
        );
        let is_affine = matches!(format, Format::Affine4 | Format::Affine2);
        let group_fits = group.is_power_of_two() && group >= BLOCK;
        assert!(!is_affine || group_fits, "a group of {group} channels");
        let last = count.saturating_sub(1).checked_mul(stride);
        let end = last.and_then(|last| last.checked_add(format.row_bytes(dim, group)));
        let fits = count == 0 || end.is_some_and(|end| end <= bytes.len());
        assert!(fits, "{count} rows of {dim}, stride {stride}, in {} bytes", bytes.len());
    }

    /// Panics unless `wide` is `[n, dim]` and `narrow` is `[n, count]` for one `n`.
    pub(super) fn check_batch(
        &self,
        wide_name: &str,
        wide: usize,
        narrow_name: &str,
        narrow: usize,
    ) {
        let Self { count, dim, .. } = *self;
        assert_eq!(wide % dim, 0, "{wide_name} must be [n, {dim}]");
        let n = wide / dim;
        assert_eq!(narrow, n * count, "{narrow_name} must be [{n}, {count}]");
    }
}

/// The loops over rows of one format.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowKernels {
    /// Rows, queries, scores.
    pub(super) dot: fn(&Rows<'_>, &[f32], &mut [f32]),
    /// Rows, weights, outputs.
    pub(super) axpy: fn(&Rows<'_>, &[f32], &mut [f32]),
    /// Rows, decoded values.
    pub(super) decode: fn(&Rows<'_>, &mut [f32]),
    /// Loops over integers that want queries as such.
    pub(super) integers: Option<IntegerKernels>,
}
