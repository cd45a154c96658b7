//! Rows of a block: written while it is open, decoded, moved to another block.

use std::ops::Range;

use super::{BlockView, Cache, OPEN};
use crate::quantizer::basis::Basis;
use crate::quantizer::{Cell, Granularity, Side};

/// Both sides.
const SIDES: [Side; 2] = [Side::Key, Side::Value];

impl Cache {
    /// Encodes one row into an open block.
    pub fn write_row(&self, view: &BlockView, cell: usize, side: Side, row: usize, values: &[f32]) {
        debug_assert_eq!(view.format(), OPEN, "only open blocks are written");
        let quantizer = self.formats()[OPEN].side(side);
        quantizer.encode(values, values.len(), view.write(self.row_range(OPEN, cell, side, row)));
    }

    /// The sides that have rows of their own.
    pub fn sides(&self) -> &'static [Side] {
        if self.config().shape.stores_values() { &SIDES } else { &SIDES[..1] }
    }

    /// Decodes rows of one cell side into `out`, `[rows, dim]` with the `dim` of the side's rows; those
    /// that are coordinates are restored by their `basis`.
    pub fn read_rows(
        &self,
        view: &BlockView,
        cell: usize,
        side: Side,
        rows: Range<usize>,
        basis: Option<&Basis>,
        out: &mut [f32],
    ) {
        let format = &self.formats()[view.format()];
        let Some(basis) = basis else {
            return format.side(side).decode(&self.cell(view, cell, side, rows), out);
        };
        let mut coordinates = vec![0.0; rows.len() * basis.rank()];
        format.side(side).decode(&self.cell(view, cell, side, rows), &mut coordinates);
        basis.restore(&coordinates, out);
    }

    /// One side of one cell, ready for a quantizer.
    pub fn cell<'a>(
        &self,
        view: &'a BlockView,
        cell: usize,
        side: Side,
        rows: Range<usize>,
    ) -> Cell<'a> {
        let format = &self.formats()[view.format()];
        let bytes = view.read(format.range(cell, side));
        Cell { bytes, tokens: format.tokens, dim: format.dim(side), rows, ahead: &[] }
    }

    /// Encodes a whole cell side, `[block_size, dim]`, into a block nobody else sees yet; with a `basis`
    /// the coordinates of its rows.
    pub fn encode_cell(
        &self,
        view: &BlockView,
        cell: usize,
        side: Side,
        rows: &[f32],
        basis: Option<&Basis>,
    ) {
        let format = &self.formats()[view.format()];
        let out = view.write(format.range(cell, side));
        let mut coordinates = Vec::new();
        let rows = match basis {
            None => rows,
            Some(basis) => {
                basis.project(rows, &mut coordinates);
                &coordinates
            }
        };
        format.side(side).encode(rows, format.dim(side), out);
    }

    /// Whether a row of `side` can move from format `source` to `target` as bytes.
    pub fn moves_as_bytes(&self, source: usize, target: usize, side: Side) -> bool {
        source == target && self.formats()[source].side(side).granularity() == Granularity::Token
    }

    /// Copies the encoded bytes of one row between blocks for which [`Self::moves_as_bytes`] holds.
    pub fn move_row(
        &self,
        source: (&BlockView, usize),
        target: (&BlockView, usize),
        cell: usize,
        side: Side,
    ) {
        let format = source.0.format();
        let from = self.row_range(format, cell, side, source.1);
        let to = self.row_range(format, cell, side, target.1);
        target.0.write(to).copy_from_slice(source.0.read(from));
    }

    fn row_range(&self, format: usize, cell: usize, side: Side, row: usize) -> Range<usize> {
        let format = &self.formats()[format];
        let bytes = format.side(side).bytes(1, format.dim(side));
        let start = format.range(cell, side).start + row * bytes;
        start..start + bytes
    }
}
