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
//! ```

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
}

impl Format {
    /// How many formats there are.
    pub const COUNT: usize = 9;

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
        }
    }

    /// What the elements of a row must be a multiple of.
    pub const fn multiple(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            _ => BLOCK,
        }
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
}

impl<'a> Rows<'a> {
    /// Rows of plain f32, `[count, dim]`, for [`Format::F32`].
    pub fn of_f32(values: &'a [f32], dim: usize) -> Self {
        #[expect(unsafe_code, reason = "f32 as bytes")]
        // SAFETY: the same memory; every byte of an f32 is initialised and a byte has no alignment.
        let bytes =
            unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) };
        Self { bytes, stride: dim * 4, count: values.len() / dim, dim, group: BLOCK }
    }

    /// The bytes from the start of row `t` on.
    pub(super) fn row(&self, t: usize) -> &'a [u8] {
        &self.bytes[t * self.stride..]
    }

    /// Panics unless every row lies inside the bytes. The vector loops rely on it.
    pub(super) fn check(&self, format: Format) {
        let Self { bytes, stride, count, dim, group } = *self;
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
}
