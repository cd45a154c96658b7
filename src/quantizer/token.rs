//! What all formats with independent rows share: everything but the encoding.

use std::sync::Arc;

use super::{Cell, Granularity, Quantizer, check_shape};
use crate::error::Result;
use crate::simd::{BLOCK, Format, IntegerQueries, Kernels, Rows};

/// Encodes rows of whole blocks: kernels, values, width of a row, bytes.
pub(super) type Encode = fn(&TokenQuantizer, &[f32], usize, &mut [u8]);

/// A quantizer whose rows are one of the kernels' row formats.
#[derive(Debug)]
pub(super) struct TokenQuantizer {
    pub(super) spec: String,
    pub(super) format: Format,
    /// Channels that share metadata, in affine formats.
    pub(super) group: usize,
    pub(super) kernels: &'static Kernels,
    pub(super) encode: Encode,
}

impl TokenQuantizer {
    /// A format without parameters.
    pub(super) fn plain(
        spec: &str,
        format: Format,
        kernels: &'static Kernels,
        encode: Encode,
    ) -> Result<Arc<dyn Quantizer>> {
        Ok(Arc::new(Self { spec: spec.into(), format, group: BLOCK, kernels, encode }))
    }

    /// A format without parameters that `Kernels::encode_rows` encodes.
    pub(super) fn coded(
        spec: &str,
        format: Format,
        kernels: &'static Kernels,
    ) -> Result<Arc<dyn Quantizer>> {
        Self::plain(spec, format, kernels, |this, rows, dim, out| {
            this.kernels.encode_rows(this.format, rows, dim, out);
        })
    }

    fn rows<'a>(&self, cell: &Cell<'a>) -> Rows<'a> {
        let stride = self.format.row_bytes(cell.dim, self.group);
        let Cell { bytes, tokens, dim, ref rows, ahead } = *cell;
        assert_eq!(bytes.len(), tokens * stride, "{}: [{tokens}, {dim}] cell", self.spec);
        assert!(rows.end <= tokens, "{}: rows {rows:?} of {tokens}", self.spec);
        let bytes = &bytes[rows.start * stride..rows.end * stride];
        Rows { bytes, stride, count: rows.len(), dim, group: self.group, ahead }
    }
}

impl Quantizer for TokenQuantizer {
    fn spec(&self) -> String {
        self.spec.clone()
    }

    fn granularity(&self) -> Granularity {
        Granularity::Token
    }

    fn check(&self, tokens: usize, dim: usize) -> Result<()> {
        check_shape(&self.spec, tokens, dim, self.format.multiple())
    }

    fn bytes(&self, tokens: usize, dim: usize) -> usize {
        tokens * self.format.row_bytes(dim, self.group)
    }

    fn encode(&self, rows: &[f32], dim: usize, out: &mut [u8]) {
        assert_eq!(out.len(), self.bytes(rows.len() / dim, dim), "{}: out", self.spec);
        (self.encode)(self, rows, dim, out);
    }

    fn decode(&self, cell: &Cell<'_>, out: &mut [f32]) {
        self.kernels.decode(self.format, &self.rows(cell), out);
    }

    fn dot(&self, cell: &Cell<'_>, queries: &[f32], scores: &mut [f32]) {
        self.kernels.dot(self.format, &self.rows(cell), queries, scores);
    }

    fn takes_many(&self, dim: usize) -> bool {
        self.kernels.takes_many(self.format, dim)
    }

    fn encode_queries(&self, dim: usize, queries: &[f32], out: &mut IntegerQueries) {
        self.kernels.prepare(self.format, dim, queries, out);
    }

    fn dot_prepared(
        &self,
        cell: &Cell<'_>,
        queries: (&[f32], &IntegerQueries),
        scores: &mut [f32],
    ) {
        self.kernels.dot_prepared(self.format, &self.rows(cell), queries, scores);
    }

    fn axpy(&self, cell: &Cell<'_>, weights: &[f32], outputs: &mut [f32]) {
        self.kernels.axpy(self.format, &self.rows(cell), weights, outputs);
    }
}
