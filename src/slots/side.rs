//! Keys or values of all blocks: where their bytes are and in which of two formats.
//!
//! Formats whose rows are independent are encoded row by row as they come. The others need all rows
//! of a block at once: until a block is full it is *open*, in f16, and then *sealed* for good.

use std::sync::Arc;

use crate::device::blocks::Blocks;
use crate::error::Result;
use crate::quantizer::{self, Cell, Granularity, Quantizer, Side};

/// Where one side of a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    index: u32,
    /// Index of its format; the last one is the sealed one.
    pub(super) format: u8,
}

/// One side of all blocks.
#[derive(Debug)]
pub(super) struct SideStore {
    pub(super) dim: usize,
    block_size: usize,
    /// `[open, sealed]`, or one format for both.
    formats: Vec<(Arc<dyn Quantizer>, Blocks)>,
}

impl SideStore {
    /// Storage in the format `spec` for at most `capacity` blocks, which `stay` if nothing evicts.
    pub(super) fn new(
        spec: &str,
        side: Side,
        block_size: usize,
        dim: usize,
        capacity: usize,
        stay: bool,
    ) -> Result<Self> {
        let sealed = quantizer::create(spec, side)?;
        let mut quantizers = vec![sealed];
        if quantizers[0].granularity() == Granularity::Block {
            quantizers.insert(0, quantizer::create("f16", side)?);
        }
        let mut formats = Vec::new();
        let last = quantizers.len() - 1;
        for (i, quantizer) in quantizers.into_iter().enumerate() {
            quantizer.check(block_size, dim)?;
            let bytes = quantizer.bytes(block_size, dim).next_multiple_of(64);
            formats.push((quantizer, Blocks::reserve(bytes, capacity, stay && i == last)?));
        }
        Ok(Self { dim, block_size, formats })
    }

    /// Rows of a block.
    pub(super) fn block_size(&self) -> usize {
        self.block_size
    }

    /// How many formats a reader meets.
    pub(super) fn num_formats(&self) -> usize {
        self.formats.len()
    }

    /// Whether a full block has to be sealed.
    pub(super) fn seals(&self) -> bool {
        self.formats.len() > 1
    }

    /// The format of a place.
    pub(super) fn quantizer(&self, format: usize) -> &dyn Quantizer {
        &*self.formats[format].0
    }

    /// A place for the rows of a new block.
    pub(super) fn open(&mut self) -> Result<Place> {
        Ok(Place { index: self.formats[0].1.allocate()?, format: 0 })
    }

    pub(super) fn release(&mut self, place: Place) {
        self.formats[usize::from(place.format)].1.release(place.index);
    }

    /// Whether single rows of the place can be written.
    pub(super) fn is_writable(&self, place: Place) -> bool {
        !self.seals() || place.format == 0
    }

    /// Encodes one row of a writable place.
    pub(super) fn write(&mut self, place: Place, row: usize, values: &[f32]) {
        let (quantizer, blocks) = &mut self.formats[usize::from(place.format)];
        let bytes = quantizer.bytes(1, self.dim);
        let out = &mut blocks.bytes_mut(place.index)[row * bytes..][..bytes];
        quantizer.encode(values, self.dim, out);
    }

    /// Moves one row between places of formats with independent rows, as bytes where possible.
    pub(super) fn move_row(&mut self, source: (Place, usize), target: (Place, usize)) {
        let is_same = source.0.format == target.0.format && self.is_writable(source.0);
        if is_same {
            let (quantizer, blocks) = &mut self.formats[usize::from(source.0.format)];
            let bytes = quantizer.bytes(1, self.dim);
            let row = blocks.bytes(source.0.index)[source.1 * bytes..][..bytes].to_vec();
            blocks.bytes_mut(target.0.index)[target.1 * bytes..][..bytes].copy_from_slice(&row);
            return;
        }
        let mut values = vec![0.0; self.dim];
        self.read(source.0, source.1, &mut values);
        self.write(target.0, target.1, &values);
    }

    /// Decodes one row.
    pub(super) fn read(&self, place: Place, row: usize, out: &mut [f32]) {
        let cell = Cell { rows: row..row + 1, ..self.cell(place) };
        self.quantizer(usize::from(place.format)).decode(&cell, out);
    }

    /// A block for its quantizer.
    pub(super) fn cell(&self, place: Place) -> Cell<'_> {
        let (quantizer, blocks) = &self.formats[usize::from(place.format)];
        let bytes = quantizer.bytes(self.block_size, self.dim);
        let bytes = &blocks.bytes(place.index)[..bytes];
        Cell { bytes, tokens: self.block_size, dim: self.dim, rows: 0..self.block_size, ahead: &[] }
    }

    /// Encodes a full open block in its final format.
    pub(super) fn seal(&mut self, place: Place) -> Result<Place> {
        let mut rows = vec![0.0; self.block_size * self.dim];
        self.quantizer(0).decode(&self.cell(place), &mut rows);
        let (quantizer, blocks) = &mut self.formats[1];
        let index = blocks.allocate()?;
        let bytes = quantizer.bytes(self.block_size, self.dim);
        quantizer.encode(&rows, self.dim, &mut blocks.bytes_mut(index)[..bytes]);
        self.release(place);
        Ok(Place { index, format: 1 })
    }

    /// A second place with the same bytes.
    pub(super) fn duplicate(&mut self, place: Place) -> Result<Place> {
        let blocks = &mut self.formats[usize::from(place.format)].1;
        let index = blocks.allocate()?;
        blocks.copy(place.index, index);
        Ok(Place { index, ..place })
    }

    pub(super) fn used_bytes(&self) -> usize {
        self.formats.iter().map(|(_, blocks)| blocks.used_bytes()).sum()
    }

    pub(super) fn peak_bytes(&self) -> usize {
        self.formats.iter().map(|(_, blocks)| blocks.peak_bytes()).sum()
    }
}
