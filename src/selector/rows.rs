//! Rows in f16 that stand for blocks: what most indexes are made of.

use crate::simd::{self, Format, Rows};

/// Some rows for each block.
#[derive(Debug, Clone)]
pub(super) struct BlockRows {
    width: usize,
    bytes: Vec<u8>,
    /// For each block, the row after its last.
    ends: Vec<u32>,
    /// Products of queries and rows.
    products: Vec<f32>,
}

impl BlockRows {
    /// No blocks; rows will have `width` elements.
    pub(super) fn new(width: usize) -> Self {
        Self { width, bytes: Vec::new(), ends: Vec::new(), products: Vec::new() }
    }

    /// Adds a block with its rows, `[n, width]`, n at least 1.
    pub(super) fn push(&mut self, rows: &[f32]) {
        let start = self.bytes.len();
        self.bytes.resize(start + rows.len() * 2, 0);
        simd::active().encode_f16(rows, &mut self.bytes[start..]);
        self.ends.push((self.bytes.len() / 2 / self.width) as u32);
    }

    /// Forgets all but the first `blocks`.
    pub(super) fn truncate(&mut self, blocks: usize) {
        self.ends.truncate(blocks);
        self.bytes.truncate(self.num_rows() * self.width * 2);
    }

    /// Bytes of the rows.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// `queries[i] . row[t]`, `[n, rows]`, for queries `[n, width]`.
    pub(super) fn multiply(&mut self, queries: &[f32]) -> &mut [f32] {
        let (width, count) = (self.width, self.num_rows());
        self.products.resize(queries.len() / width * count, 0.0);
        let rows = Rows {
            bytes: &self.bytes,
            stride: width * 2,
            count,
            dim: width,
            group: width,
            ahead: &[],
        };
        simd::active().dot(Format::F16, &rows, queries, &mut self.products);
        &mut self.products
    }

    /// Takes for each block the largest of the products of its rows over all queries.
    pub(super) fn largest(&self, scores: &mut [f32]) {
        scores.fill(f32::NEG_INFINITY);
        for products in self.products.chunks_exact(self.num_rows().max(1)) {
            let mut start = 0;
            for (score, end) in scores.iter_mut().zip(&self.ends) {
                let rows = &products[start..*end as usize];
                *score = rows.iter().copied().fold(*score, f32::max);
                start = *end as usize;
            }
        }
    }

    fn num_rows(&self) -> usize {
        self.ends.last().map_or(0, |end| *end as usize)
    }
}
