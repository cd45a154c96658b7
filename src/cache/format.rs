//! Formats: how the cells of a block are laid out.
//!
//! ```text
//! block = cell 0 | cell 1 | ...           one cell for each (layer, KV head) of the lane
//! cell  = K side, key.bytes(block_size, head_dim) | V side, value.bytes(block_size, head_dim)
//! ```

use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::quantizer::{Granularity, Quantizer, Side};

/// A pair of quantizers and the sizes that follow from them.
#[derive(Debug, Clone)]
pub struct Format {
    /// The format of keys.
    pub key: Arc<dyn Quantizer>,
    /// The format of values.
    pub value: Arc<dyn Quantizer>,
    /// Bytes of the K side of a cell.
    pub key_bytes: usize,
    /// Bytes of the V side of a cell.
    pub value_bytes: usize,
    /// Bytes of a block.
    pub block_bytes: usize,
}

impl Format {
    /// Sizes for blocks of `cells` cells of `block_size` rows of `head_dim` elements; blocks are
    /// multiples of `alignment`.
    pub(super) fn new(
        key: Arc<dyn Quantizer>,
        value: Arc<dyn Quantizer>,
        cells: usize,
        (block_size, head_dim): (usize, usize),
        alignment: usize,
    ) -> Result<Self> {
        key.check(block_size, head_dim).map_err(|error| error.within("keys"))?;
        value.check(block_size, head_dim).map_err(|error| error.within("values"))?;
        let key_bytes = key.bytes(block_size, head_dim);
        let value_bytes = value.bytes(block_size, head_dim);
        // Rows of f16 and f32 need their alignment at every cell and block.
        let key_bytes = key_bytes.next_multiple_of(4);
        let value_bytes = value_bytes.next_multiple_of(4);
        let block_bytes = (cells * (key_bytes + value_bytes)).next_multiple_of(alignment);
        Ok(Self { key, value, key_bytes, value_bytes, block_bytes })
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

    /// The bytes of one side of `cell` inside a block, for cells of `block_size` x `head_dim`.
    pub fn range(&self, cell: usize, side: Side, block_size: usize, dim: usize) -> Range<usize> {
        let start = cell * (self.key_bytes + self.value_bytes);
        let start = match side {
            Side::Key => start,
            Side::Value => start + self.key_bytes,
        };
        start..start + self.side(side).bytes(block_size, dim)
    }

    /// Whether every row of both sides can be encoded and moved alone.
    pub fn is_token_granular(&self) -> bool {
        [&self.key, &self.value].iter().all(|side| side.granularity() == Granularity::Token)
    }
}
