//! Quantizers: the numeric format of the K side or the V side of a block.
//!
//! A *cell* is the part of a block that belongs to one layer and one KV head: `tokens` key rows and
//! `tokens` value rows of `dim` elements. A quantizer encodes one side of one cell:
//!
//! ```text
//! rows f32 [tokens, dim] --encode--> bytes(tokens, dim) --decode / dot / axpy--> f32
//! ```
//!
//! Encoded bytes and decoded values are identical on every SIMD level.
//!
//! # Values that a format cannot hold
//! Raw formats follow IEEE 754: NaN and infinities are kept, and what exceeds f16 becomes infinite.
//! Formats with a scale look at the values that share it (a block of 32, or a KIVI group; with
//! `had+`, the row first): NaN becomes 0, an infinity becomes the largest finite magnitude among
//! them with its sign, and finite magnitudes saturate where the f16 scale would overflow: 8.3e6 in
//! `q8_0`, 5.2e5 in `q4_0`, 65504 in `kivi`; the other formats name theirs. So one bad value cannot
//! turn its neighbours into NaN.
//! Values too small for an f16 scale decode to 0 (`kivi`: to the minimum of their group).
//!
//! To add a quantizer: one file with an `ENTRY`, and one word in the list below. Parsing, the
//! listing from C, `tests/quantizers.rs`, the bench row and the README table follow from it.

mod grouped;
mod low_rank;
mod scratch;
mod token;
mod unpacked;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Result, ensure};
use crate::registry::{Args, Param, find, registry, resolve};
use crate::simd::{self, IntegerQueries, Kernels};
use crate::spec::{self, Stage};

registry! {
    /// Every quantizer, in the order of the documentation.
    pub static QUANTIZERS: Entry = {
        raw_f32, raw_f16, raw_bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl, fp8, mxfp4, nvfp4, int8,
        int4, tq, kivi, nuq, gear, qjl, had
    }
}

pub(crate) use had::PREFIX as ROTATION;

/// Which side of the cache a quantizer stores. Some formats group K and V along different axes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// Keys.
    Key,
    /// Values.
    Value,
}

/// The smallest unit that can be encoded alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Granularity {
    /// Rows are independent: an encoded cell is the concatenation of its encoded rows, each
    /// `bytes(1, dim)` long. Rows can be copied between blocks without decoding.
    Token,
    /// Rows share metadata: a cell is encoded as a whole and cannot lose single rows.
    Block,
}

/// One side of one encoded cell, and the rows of it that a call is about.
#[derive(Debug, Clone)]
pub struct Cell<'a> {
    /// The encoded bytes, `bytes(tokens, dim)` long.
    pub bytes: &'a [u8],
    /// Rows the cell was encoded with.
    pub tokens: usize,
    /// Elements of a row.
    pub dim: usize,
    /// Rows to use, inside `0..tokens`.
    pub rows: Range<usize>,
    /// Bytes that will be wanted after this call; only a hint, and may be empty.
    pub ahead: &'a [u8],
}

/// A numeric format for one side of a cell.
///
/// Shapes must have passed [`Self::check`]; lengths that do not fit the shape panic.
pub trait Quantizer: Debug + Send + Sync {
    /// The spec that makes this quantizer again, such as `had+q4_0` or `kivi(bits=2)`.
    fn spec(&self) -> String;

    /// What can be encoded alone.
    fn granularity(&self) -> Granularity;

    /// Checks that cells of this shape can be encoded; the error names the limit.
    fn check(&self, tokens: usize, dim: usize) -> Result<()>;

    /// Bytes of an encoded cell side of a checked shape.
    fn bytes(&self, tokens: usize, dim: usize) -> usize;

    /// Bits that one element takes, metadata included, in a cell of a checked, non-empty shape.
    fn bits_per_element(&self, tokens: usize, dim: usize) -> f64 {
        (8 * self.bytes(tokens, dim)) as f64 / (tokens * dim) as f64
    }

    /// Encodes `rows` (`[tokens, dim]`) into `out`, which is `bytes(tokens, dim)` long.
    fn encode(&self, rows: &[f32], dim: usize, out: &mut [u8]);

    /// Decodes the rows of `cell` into `out` (`[rows, dim]`).
    fn decode(&self, cell: &Cell<'_>, out: &mut [f32]);

    /// Turns queries (`[n, dim]`) into the space that [`Self::dot`] expects, in place.
    fn prepare_queries(&self, _dim: usize, _queries: &mut [f32]) {}

    /// Turns accumulated outputs (`[n, dim]`) of [`Self::axpy`] back, in place.
    fn finish_outputs(&self, _dim: usize, _outputs: &mut [f32]) {}

    /// `scores[i, t] = queries[i] . row[t]` for prepared queries `[n, dim]`, where `t` counts the
    /// rows of `cell` and `scores` is `[n, rows]`. Overwrites.
    fn dot(&self, cell: &Cell<'_>, queries: &[f32], scores: &mut [f32]);

    /// Whether [`Self::dot_prepared`] and [`Self::axpy`] are faster for many queries than to decode rows
    /// and to go on in f32.
    fn takes_many(&self, _dim: usize) -> bool {
        false
    }

    /// Makes of prepared queries what [`Self::dot_prepared`] can make use of, once for many cells.
    fn encode_queries(&self, _dim: usize, _queries: &[f32], out: &mut IntegerQueries) {
        out.clear();
    }

    /// As [`Self::dot`], with what [`Self::encode_queries`] has made of the same queries.
    fn dot_prepared(
        &self,
        cell: &Cell<'_>,
        (queries, _): (&[f32], &IntegerQueries),
        scores: &mut [f32],
    ) {
        self.dot(cell, queries, scores);
    }

    /// `outputs[i] += sum over t of weights[i, t] * row[t]`, with `weights` `[n, rows]` and
    /// `outputs` `[n, dim]`. [`Self::finish_outputs`] completes the sum.
    fn axpy(&self, cell: &Cell<'_>, weights: &[f32], outputs: &mut [f32]);
}

/// How the registry describes a quantizer.
#[derive(Debug)]
pub struct Entry {
    /// Name in specs.
    pub name: &'static str,
    /// One line for the documentation.
    pub summary: &'static str,
    /// Paper or specification.
    pub paper: &'static str,
    /// Parameters in positional order.
    pub params: &'static [Param],
    /// Short names: `("kivi2", "kivi(bits=2)")`.
    pub aliases: &'static [(&'static str, &'static str)],
    /// Specs that tests and benches visit.
    pub examples: &'static [&'static str],
    /// Makes the quantizer for one side, running on one level of kernels.
    pub create: fn(&Args, Side, &'static Kernels) -> Result<Arc<dyn Quantizer>>,
}

/// Makes the quantizer that `text` names, for one side: `q8_0`, `kivi(bits=2)`, `had+q4_0`.
pub fn create(text: &str, side: Side) -> Result<Arc<dyn Quantizer>> {
    create_on(text, side, simd::active())
}

/// Like [`create`], on a chosen level of kernels.
pub fn create_on(text: &str, side: Side, kernels: &'static Kernels) -> Result<Arc<dyn Quantizer>> {
    create_stage(&spec::parse_stage(text)?, side, kernels)
}

fn create_stage(
    stage: &Stage,
    side: Side,
    kernels: &'static Kernels,
) -> Result<Arc<dyn Quantizer>> {
    if let Some(inner) = had::inner(stage)? {
        return had::wrap(create_stage(&inner, side, kernels)?, kernels);
    }
    let mut aliases = QUANTIZERS.iter().flat_map(|entry| entry.aliases);
    if let Some((alias, full)) = aliases.find(|(alias, _)| *alias == stage.name) {
        let column = stage.column;
        ensure!(
            stage.args.is_empty(),
            InvalidArgument,
            "column {column}: {alias:?} is short for {full:?} and takes no arguments"
        );
        return create_on(full, side, kernels);
    }
    let entry = find("quantizer", QUANTIZERS, stage)?;
    (entry.create)(&resolve(entry.params, stage)?, side, kernels)
}

/// Most elements of a row: well above any head, small enough for any scratch buffer.
pub const MAX_DIM: usize = 4096;

/// Most rows of a cell.
pub const MAX_TOKENS: usize = 1 << 20;

/// The checks that every format shares; `dim` must be a multiple of `multiple`.
fn check_shape(spec: &str, tokens: usize, dim: usize, multiple: usize) -> Result<()> {
    ensure!(
        (1..=MAX_DIM).contains(&dim),
        InvalidArgument,
        "{spec}: dim is {dim}, must be in 1..={MAX_DIM}"
    );
    ensure!(
        dim.is_multiple_of(multiple),
        InvalidArgument,
        "{spec}: dim is {dim}, must be a multiple of {multiple}"
    );
    ensure!(
        tokens <= MAX_TOKENS,
        InvalidArgument,
        "{spec}: tokens is {tokens}, must be at most {MAX_TOKENS}"
    );
    Ok(())
}
