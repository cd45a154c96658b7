//! Keys and values in the engine's own memory, row by row in the order of the mask.

use std::ops::Range;

use crate::error::{Result, ensure};
use crate::simd::{Format, Rows};

/// One side: rows of all heads at equal distances.
#[derive(Debug, Clone, Copy)]
pub struct Dense<'a> {
    /// The bytes from the first row of the first head to the last row of the last.
    pub bytes: &'a [u8],
    /// How elements are stored.
    pub format: Format,
    /// Rows of a head.
    pub num_rows: usize,
    /// Heads.
    pub num_heads: usize,
    /// Elements of a row.
    pub dim: usize,
    /// Bytes from a row to the next of the same head.
    pub row_stride: usize,
    /// Bytes from a head to the next.
    pub head_stride: usize,
}

impl<'a> Dense<'a> {
    /// Checks that every row lies inside the bytes.
    pub fn check(&self, name: &str) -> Result<()> {
        let Self { num_rows, num_heads, dim, row_stride, head_stride, .. } = *self;
        ensure!(
            num_rows > 0 && num_heads > 0 && dim > 0,
            InvalidArgument,
            "{name} has {num_rows} rows of {num_heads} heads of {dim} elements, none may be 0"
        );
        let row = self.format.row_bytes(dim, 32);
        let end = (num_rows - 1) * row_stride + (num_heads - 1) * head_stride + row;
        ensure!(
            end <= self.bytes.len(),
            InvalidArgument,
            "{name} ends at byte {end} of {}",
            self.bytes.len()
        );
        Ok(())
    }

    /// Rows of one head; `ahead` are the bytes to be read after them.
    pub(super) fn rows(
        &self,
        head: usize,
        start: usize,
        count: usize,
        ahead: &'a [u8],
    ) -> Rows<'a> {
        let first = head * self.head_stride + start * self.row_stride;
        let (bytes, stride, dim) = (&self.bytes[first..], self.row_stride, self.dim);
        Rows { bytes, stride, count, dim, group: 32, ahead }
    }

    /// What a head fetches of the next rows: its own, or, where heads lie side by side, its share of
    /// those of all heads, which are one run of bytes.
    pub(super) fn ahead(&self, head: usize, start: usize, count: usize) -> &'a [u8] {
        let rows = start * self.row_stride..(start + count) * self.row_stride;
        let bytes = |range: Range<usize>| {
            let len = self.bytes.len();
            &self.bytes[range.start.min(len)..range.end.min(len)]
        };
        if self.head_stride > self.row_stride {
            let first = head * self.head_stride;
            return bytes(first + rows.start..first + rows.end);
        }
        let piece = |i: usize| rows.start + rows.len() * i / self.num_heads;
        bytes(piece(head)..piece(head + 1))
    }
}
