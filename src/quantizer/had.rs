//! `had+X`: rows are rotated by a Hadamard matrix before the quantizer X encodes them.
//!
//! ```text
//! encode(k H)        q . k = (q H) . (k H)        sum w v = (sum w (v H)) H        H H = 1
//! ```
//!
//! H is the orthonormal Sylvester matrix of the largest power of two that divides `dim`, repeated
//! along the row. It spreads outlier channels over all others, which halves the error of formats
//! that share a scale along the channels. Queries are rotated once a step, outputs once; stored rows
//! are never rotated back, except by `decode`.

use std::sync::Arc;

use super::{Cell, Entry, Granularity, Quantizer, scratch, tq};
use crate::error::{Result, bail, ensure};
use crate::simd::{IntegerQueries, Kernels, sanitize};
use crate::spec::Stage;

pub(super) static ENTRY: Entry = Entry {
    name: PREFIX,
    summary: "prefix: rotates rows by a Hadamard matrix before another quantizer encodes them",
    paper: "QuaRot, arXiv 2404.00456",
    params: &[],
    aliases: &[],
    examples: &["had+q8_0", "had+q4_0", "had+int4", "had+kivi(bits=2)", "had+f16"],
    create: |_, _, _| bail!(InvalidArgument, "{NEEDS_INNER}"),
};

/// What the spec of a rotated quantizer starts with.
pub(crate) const PREFIX: &str = "had+";

const NEEDS_INNER: &str = "had+ is a prefix of another quantizer, such as had+q4_0";

/// The stage after the prefix; `None` without one.
pub(super) fn inner(stage: &Stage) -> Result<Option<Stage>> {
    let Some(name) = stage.name.strip_prefix(PREFIX) else {
        return Ok(None);
    };
    let column = stage.column + PREFIX.len();
    ensure!(!name.is_empty(), InvalidArgument, "column {column}: {NEEDS_INNER}");
    ensure!(
        !name.starts_with(PREFIX),
        InvalidArgument,
        "column {column}: had+ is given twice, which would undo it"
    );
    Ok(Some(Stage { name: name.into(), args: stage.args.clone(), column }))
}

/// Puts the rotation before `inner`.
pub(super) fn wrap(
    inner: Arc<dyn Quantizer>,
    kernels: &'static Kernels,
) -> Result<Arc<dyn Quantizer>> {
    ensure!(
        !inner.spec().starts_with(tq::NAME),
        InvalidArgument,
        "{}: it rotates by itself, a second rotation would undo that",
        inner.spec()
    );
    Ok(rotated(format!("{PREFIX}{}", inner.spec()), inner, kernels))
}

/// The rotation before `inner`, called `spec`.
pub(super) fn rotated(
    spec: String,
    inner: Arc<dyn Quantizer>,
    kernels: &'static Kernels,
) -> Arc<dyn Quantizer> {
    Arc::new(Hadamard { spec, inner, kernels })
}

#[derive(Debug)]
struct Hadamard {
    spec: String,
    inner: Arc<dyn Quantizer>,
    kernels: &'static Kernels,
}

/// Rows are limited to this before the rotation, whose sums then stay finite.
const LIMIT: f32 = f32::MAX / 4096.0;

fn sanitize_row(row: &mut [f32]) {
    if !row.iter().all(|x| x.abs() <= LIMIT) {
        sanitize(row, LIMIT);
    }
}

impl Hadamard {
    fn rotate(&self, dim: usize, rows: &mut [f32]) {
        self.kernels.hadamard(rows, 1 << dim.trailing_zeros());
    }
}

impl Quantizer for Hadamard {
    fn spec(&self) -> String {
        self.spec.clone()
    }

    fn granularity(&self) -> Granularity {
        self.inner.granularity()
    }

    fn check(&self, tokens: usize, dim: usize) -> Result<()> {
        ensure!(
            dim.is_multiple_of(2),
            InvalidArgument,
            "{}: dim is {dim}, must be even",
            self.spec()
        );
        self.inner.check(tokens, dim)
    }

    fn bytes(&self, tokens: usize, dim: usize) -> usize {
        self.inner.bytes(tokens, dim)
    }

    fn encode(&self, rows: &[f32], dim: usize, out: &mut [u8]) {
        assert_eq!(out.len(), self.bytes(rows.len() / dim, dim), "{}: out", self.spec);
        // Few rows at a time stay in the first level cache.
        let some = match self.granularity() {
            Granularity::Token => 16,
            Granularity::Block => (rows.len() / dim).max(1),
        };
        scratch::with(rows.len().min(some * dim), |rotated| {
            let outs = out.chunks_mut(self.inner.bytes(some, dim));
            for (rows, out) in rows.chunks(some * dim).zip(outs) {
                let rotated = &mut rotated[..rows.len()];
                rotated.copy_from_slice(rows);
                if !self.kernels.all_within(rotated, LIMIT) {
                    rotated.chunks_mut(dim).for_each(sanitize_row);
                }
                self.rotate(dim, rotated);
                self.inner.encode(rotated, dim, out);
            }
        });
    }

    fn decode(&self, cell: &Cell<'_>, out: &mut [f32]) {
        self.inner.decode(cell, out);
        self.rotate(cell.dim, out);
    }

    fn prepare_queries(&self, dim: usize, queries: &mut [f32]) {
        self.rotate(dim, queries);
        self.inner.prepare_queries(dim, queries);
    }

    fn finish_outputs(&self, dim: usize, outputs: &mut [f32]) {
        self.inner.finish_outputs(dim, outputs);
        self.rotate(dim, outputs);
    }

    fn dot(&self, cell: &Cell<'_>, queries: &[f32], scores: &mut [f32]) {
        self.inner.dot(cell, queries, scores);
    }

    fn takes_many(&self, dim: usize) -> bool {
        self.inner.takes_many(dim)
    }

    fn encode_queries(&self, dim: usize, queries: &[f32], out: &mut IntegerQueries) {
        self.inner.encode_queries(dim, queries, out);
    }

    fn dot_prepared(
        &self,
        cell: &Cell<'_>,
        queries: (&[f32], &IntegerQueries),
        scores: &mut [f32],
    ) {
        self.inner.dot_prepared(cell, queries, scores);
    }

    fn axpy(&self, cell: &Cell<'_>, weights: &[f32], outputs: &mut [f32]) {
        self.inner.axpy(cell, weights, outputs);
    }
}
