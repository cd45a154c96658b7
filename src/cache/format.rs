//! Formats: how the cells of a block are laid out.
//!
//! ```text
//! block = cell 0 | cell 1 | ...           one cell for each (layer, KV head) of the lane
//! cell  = K side, key.bytes(block_size, head_dim) | V side, value.bytes(block_size, value_dim)
//! ```
//!
//! Where values are the first elements of keys (MLA), there is no V side: who reads values reads keys.

use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::quantizer::{Granularity, Quantizer, Side};
use crate::shape::ModelShape;

/// A pair of quantizers and the sizes that follow from them.
#[derive(Debug, Clone)]
pub struct Format {
    /// The format of keys.
    pub key: Arc<dyn Quantizer>,
    /// The format of values; that of keys if values are in keys.
    pub value: Arc<dyn Quantizer>,
    /// Bytes of the K side of a cell.
    pub key_bytes: usize,
    /// Bytes of the V side of a cell; 0 if values are in keys.
    pub value_bytes: usize,
    /// Rows of a cell.
    pub tokens: usize,
    key_dim: usize,
    value_dim: usize,
    /// Bytes of a block.
    pub block_bytes: usize,
}

impl Format {
    /// Sizes for blocks of `cells` cells of `tokens` rows; blocks are multiples of `alignment`.
    pub(super) fn new(
        key: Arc<dyn Quantizer>,
        value: Arc<dyn Quantizer>,
        shape: &ModelShape,
        (cells, tokens): (usize, usize),
        alignment: usize,
    ) -> Result<Self> {
        let (key_dim, value_dim) = (shape.head_dim, shape.value_row_dim());
        key.check(tokens, key_dim).map_err(|error| error.within("keys"))?;
        value.check(tokens, value_dim).map_err(|error| error.within("values"))?;
        let key_bytes = key.bytes(tokens, key_dim);
        let value_bytes = if shape.stores_values() { value.bytes(tokens, value_dim) } else { 0 };
        // Rows of f16 and f32 need their alignment at every cell and block.
        let key_bytes = key_bytes.next_multiple_of(4);
        let value_bytes = value_bytes.next_multiple_of(4);
        let block_bytes = (cells * (key_bytes + value_bytes)).next_multiple_of(alignment);
        Ok(Self { key, value, key_bytes, value_bytes, tokens, key_dim, value_dim, block_bytes })
    }

    /// The specs of both quantizers.
    pub fn spec(&self) -> (String, String) {
        (self.key.spec(), self.value.spec())
    }

    /// The quantizer of one side.
    pub fn side(&self, side: Side) -> &dyn Quantizer {
        match side {
            Side::Key => &*self.key,
            Side::Value => &*self.value,
        }
    }

    /// Elements of a row of one side.
    pub fn dim(&self, side: Side) -> usize {
        match side {
            Side::Key => self.key_dim,
            Side::Value => self.value_dim,
        }
    }

    /// The bytes of one side of `cell` inside a block.
    pub fn range(&self, cell: usize, side: Side) -> Range<usize> {
        let start = cell * (self.key_bytes + self.value_bytes);
        let start = match side {
            Side::Value if self.value_bytes > 0 => start + self.key_bytes,
            _ => start,
        };
        start..start + self.side(side).bytes(self.tokens, self.dim(side))
    }

    /// Whether every row of both sides can be encoded and moved alone.
    pub fn is_token_granular(&self) -> bool {
        [&self.key, &self.value].iter().all(|side| side.granularity() == Granularity::Token)
    }
}
