//! Quantizers: the numeric format of the K side or the V side of a block.
//!
//! A *cell* is the part of a block that belongs to one layer and one KV head: `tokens` key rows and
//! `tokens` value rows of `dim` elements. A quantizer encodes one side of one cell:
//!
//! ```text
//! rows f32 [tokens, dim] --encode--> bytes(tokens, dim) --decode / dot / axpy--> f32
//! ```
//!
//! Encoded bytes are identical on every SIMD level. NaN encodes as 0 in formats that cannot hold
//! it, infinities saturate; raw formats keep both.
//!
//! To add a quantizer: one file with an `ENTRY`, and one word in the list below. Parsing, the
//! listing from C, `tests/quantizers.rs`, the bench row and the README table follow from it.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::registry::{Args, Member, Param, registry};
use crate::spec;

registry! {
    /// Every quantizer, in the order of the documentation.
    pub static QUANTIZERS: Entry = { }
}

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
}

/// A numeric format for one side of a cell.
pub trait Quantizer: Debug + Send + Sync {
    /// The spec that makes this quantizer again, such as `had+q4_0` or `kivi(bits=2)`.
    fn spec(&self) -> String;

    /// What can be encoded alone.
    fn granularity(&self) -> Granularity;

    /// Checks that cells of this shape can be encoded; the error names the limit.
    fn check(&self, tokens: usize, dim: usize) -> Result<()>;

    /// Bytes of an encoded cell side of a checked shape.
    fn bytes(&self, tokens: usize, dim: usize) -> usize;

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
    /// Makes the quantizer for one side.
    pub create: fn(&Args, Side) -> Result<Arc<dyn Quantizer>>,
}

impl Member for Entry {
    fn name(&self) -> &'static str {
        self.name
    }

    fn params(&self) -> &'static [Param] {
        self.params
    }
}

/// Makes the quantizer that `text` names, for one side: `q8_0`, `kivi(bits=2)`, `had+q4_0`.
pub fn create(text: &str, side: Side) -> Result<Arc<dyn Quantizer>> {
    let text = QUANTIZERS
        .iter()
        .flat_map(|entry| entry.aliases)
        .find_map(|(alias, full)| (*alias == text.trim()).then_some(*full))
        .unwrap_or(text);
    let stage = spec::parse_stage(text)?;
    let entry = crate::registry::find("quantizer", QUANTIZERS, &stage)?;
    (entry.create)(&crate::registry::resolve(entry.params, &stage)?, side)
}
