//! KIVI: asymmetric codes of 2 or 4 bits, keys per channel, values per token.
//!
//! ```text
//! m = min x as f16        s = (max x - m) / (2^bits - 1) as f16
//! q = (x - m) / s, clamped to 0..=2^bits - 1, rounded half to even        x = s * q + m
//! ```
//!
//! Minimum and maximum are those of a group: for keys, `group` consecutive tokens of one channel,
//! because keys have outlier channels; for values, `group` consecutive channels of one token. The
//! last group is shorter when tokens or channels do not divide. A group without range has s = 0 and
//! q = 0. Codes refer to the rounded s and m, so their rounding costs little.
//!
//! Layout of a key cell, for each group of `t` tokens: `s` f16 `[dim]`, `m` f16 `[dim]`, codes
//! `[t, dim]`. Layout of a value row: codes `[dim]`, then `(s, m)` f16 for each group. Both pack
//! codes in blocks of 32 channels (`simd::Format`). Keys score with the scale folded into the query:
//!
//! ```text
//! q . k[t] = (q * s) . codes[t] + q . m
//! ```

use std::ops::Range;
use std::sync::Arc;

use super::token::TokenQuantizer;
use super::{Cell, Entry, Granularity, Quantizer, Side, check_shape, scratch};
use crate::error::{Result, ensure};
use crate::registry::{Args, Domain, Param};
use crate::simd::{BLOCK, Format, Kernels, Rows, sanitize};

pub(super) static ENTRY: Entry = Entry {
    name: "kivi",
    summary: "2 or 4 bits: keys per channel, values per token, f16 scale and minimum",
    paper: "KIVI, arXiv 2402.02750",
    params: &[
        Param {
            name: "bits",
            help: "bits of a code: 2 or 4",
            domain: Domain::Int { default: 2, min: 2, max: 4 },
        },
        Param {
            name: "group",
            help: "elements that share a scale: 32, 64, 128 or 256",
            domain: Domain::Int { default: DEFAULT_GROUP, min: 32, max: 256 },
        },
    ],
    aliases: &[("kivi2", "kivi(bits=2)"), ("kivi4", "kivi(bits=4)")],
    examples: &[
        "kivi(bits=2)",
        "kivi(bits=4)",
        "kivi(bits=2, group=128)",
        "kivi(bits=4, group=64)",
    ],
    create,
};

const DEFAULT_GROUP: i64 = 32;

/// Largest magnitude of a minimum in f16.
const LIMIT: f32 = 65504.0;

/// Queries or outputs that share a pass over a group.
const BATCH: usize = 8;

fn create(args: &Args, side: Side, kernels: &'static Kernels) -> Result<Arc<dyn Quantizer>> {
    let (bits, group) = (args.count("bits"), args.count("group"));
    ensure!(bits != 3, InvalidArgument, "bits is 3, must be 2 or 4");
    ensure!(
        group.is_power_of_two(),
        InvalidArgument,
        "group is {group}, must be 32, 64, 128 or 256"
    );
    let spec = match args.int("group") {
        DEFAULT_GROUP => format!("kivi(bits={bits})"),
        _ => format!("kivi(bits={bits}, group={group})"),
    };
    Ok(match side {
        Side::Key => Arc::new(Keys { spec, bits, group, kernels }),
        Side::Value => {
            let format = if bits == 4 { Format::Affine4 } else { Format::Affine2 };
            Arc::new(TokenQuantizer { spec, format, group, kernels, encode: encode_values })
        }
    })
}

fn encode_values(this: &TokenQuantizer, rows: &[f32], dim: usize, out: &mut [u8]) {
    let bits = if this.format == Format::Affine4 { 4 } else { 2 };
    let groups = dim.div_ceil(this.group);
    let row_bytes = this.format.row_bytes(dim, this.group);
    scratch::with(3 * groups + 3 * dim, |buffer| {
        let (ranges, buffer) = buffer.split_at_mut(3 * groups);
        let (values, wide) = buffer.split_at_mut(dim);
        for (row, out) in rows.chunks_exact(dim).zip(out.chunks_exact_mut(row_bytes)) {
            let mut row = row;
            if !this.kernels.all_within(row, LIMIT) {
                values.copy_from_slice(row);
                values.chunks_mut(this.group).for_each(|group| sanitize(group, LIMIT));
                row = values;
            }
            let (codes, metadata) = out.split_at_mut(dim * bits / 8);
            let (low, high) = ranges[..2 * groups].split_at_mut(groups);
            this.kernels.group_ranges(row, this.group, low, high);
            let affine = affine(this.kernels, bits, ranges);
            // Pairs of s and m.
            let pairs = &mut wide[..2 * groups];
            for (i, pair) in pairs.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                *pair = [affine.s[i], affine.m[i]];
            }
            this.kernels.encode_f16(pairs, metadata);
            let (inverse, m) = wide.split_at_mut(dim);
            for (i, inverse) in inverse.chunks_mut(this.group).enumerate() {
                inverse.fill(affine.inverse[i]);
            }
            for (i, m) in m.chunks_mut(this.group).enumerate() {
                m.fill(affine.m[i]);
            }
            this.kernels.encode_codes(bits, row, inverse, m, codes);
        }
    });
}

/// Scale, minimum and the inverse of the scale of some groups; scale and minimum are f16 values, and
/// the inverse of 0 is 0, which gives code 0.
struct Affine<'a> {
    s: &'a [f32],
    m: &'a [f32],
    inverse: &'a [f32],
}

/// From `buffer [3, n]`, whose first two rows are the smallest and largest values.
fn affine<'a>(kernels: &Kernels, bits: usize, buffer: &'a mut [f32]) -> Affine<'a> {
    let n = buffer.len() / 3;
    let (m, rest) = buffer.split_at_mut(n);
    let (s, inverse) = rest.split_at_mut(n);
    round_to_f16(kernels, m);
    let top = ((1 << bits) - 1) as f32;
    for (s, m) in s.iter_mut().zip(&*m) {
        *s = (*s - m).max(0.0) / top;
    }
    round_to_f16(kernels, s);
    for (inverse, s) in inverse.iter_mut().zip(&*s) {
        *inverse = if *s == 0.0 { 0.0 } else { 1.0 / s };
    }
    Affine { s, m, inverse }
}

fn round_to_f16(kernels: &Kernels, values: &mut [f32]) {
    let mut bytes = [0; 512];
    for values in values.chunks_mut(256) {
        let bytes = &mut bytes[..2 * values.len()];
        kernels.encode_f16(values, bytes);
        let (stride, dim) = (bytes.len(), values.len());
        let rows = Rows { bytes, stride, count: 1, dim, group: BLOCK, ahead: &[] };
        kernels.decode(Format::F16, &rows, values);
    }
}

/// The key side.
#[derive(Debug)]
struct Keys {
    spec: String,
    bits: usize,
    group: usize,
    kernels: &'static Kernels,
}

/// The part of one group that a call is about.
struct Part<'a> {
    /// `s` and `m`, f16 `[2, dim]`.
    metadata: Rows<'a>,
    /// The codes of the wanted tokens.
    codes: Rows<'a>,
    /// Where these tokens are among the wanted rows of the cell.
    wanted: Range<usize>,
}

impl Keys {
    fn format(&self) -> Format {
        if self.bits == 4 { Format::Codes4 } else { Format::Codes2 }
    }

    fn group_bytes(&self, tokens: usize, dim: usize) -> usize {
        dim * 4 + tokens * dim * self.bits / 8
    }

    /// The groups that hold the wanted rows of `cell`.
    fn parts<'a>(&self, cell: &Cell<'a>) -> impl Iterator<Item = Part<'a>> {
        let Cell { bytes, tokens, dim, ref rows, ahead } = *cell;
        assert_eq!(bytes.len(), self.bytes(tokens, dim), "{}: [{tokens}, {dim}] cell", self.spec);
        assert!(rows.end <= tokens, "{}: rows {rows:?} of {tokens}", self.spec);
        let (group, full, rows) = (self.group, self.group_bytes(self.group, dim), rows.clone());
        let stride = dim * self.bits / 8;
        let groups =
            if rows.is_empty() { 0..0 } else { rows.start / group..rows.end.div_ceil(group) };
        groups.map(move |i| {
            let first = rows.start.max(i * group);
            let last = rows.end.min((i + 1) * group);
            let (metadata, codes) = bytes[i * full..].split_at(dim * 4);
            let codes = &codes[(first - i * group) * stride..(last - i * group) * stride];
            let row =
                |bytes, stride, count, ahead| Rows { bytes, stride, count, dim, group, ahead };
            // Once is enough.
            let ahead = if first == rows.start { ahead } else { &[] };
            Part {
                metadata: row(metadata, dim * 2, 2, &[]),
                codes: row(codes, stride, last - first, ahead),
                wanted: first - rows.start..last - rows.start,
            }
        })
    }

    fn encode_group(&self, rows: &[f32], dim: usize, out: &mut [u8]) {
        let (metadata, codes) = out.split_at_mut(dim * 4);
        scratch::with(3 * dim, |buffer| {
            let (low, high) = buffer[..2 * dim].split_at_mut(dim);
            self.kernels.channel_ranges(rows, low, high);
            let affine = affine(self.kernels, self.bits, buffer);
            let (s, m) = metadata.split_at_mut(dim * 2);
            self.kernels.encode_f16(affine.s, s);
            self.kernels.encode_f16(affine.m, m);
            self.kernels.encode_codes(self.bits, rows, affine.inverse, affine.m, codes);
        });
    }
}

/// Makes every channel of a group finite.
fn sanitize_channels(rows: &mut [f32], dim: usize) {
    for channel in 0..dim {
        let mut values: Vec<f32> = rows.iter().skip(channel).step_by(dim).copied().collect();
        sanitize(&mut values, LIMIT);
        rows.iter_mut().skip(channel).step_by(dim).zip(values).for_each(|(x, value)| *x = value);
    }
}

impl Quantizer for Keys {
    fn spec(&self) -> String {
        self.spec.clone()
    }

    fn granularity(&self) -> Granularity {
        Granularity::Block
    }

    fn check(&self, tokens: usize, dim: usize) -> Result<()> {
        check_shape(&self.spec, tokens, dim, BLOCK)
    }

    fn bytes(&self, tokens: usize, dim: usize) -> usize {
        tokens.div_ceil(self.group) * dim * 4 + tokens * dim * self.bits / 8
    }

    fn encode(&self, rows: &[f32], dim: usize, out: &mut [u8]) {
        assert_eq!(out.len(), self.bytes(rows.len() / dim, dim), "{}: out", self.spec);
        let outs = out.chunks_mut(self.group_bytes(self.group, dim));
        for (rows, out) in rows.chunks(self.group * dim).zip(outs) {
            if self.kernels.all_within(rows, LIMIT) {
                self.encode_group(rows, dim, out);
            } else {
                let mut rows = rows.to_vec();
                sanitize_channels(&mut rows, dim);
                self.encode_group(&rows, dim, out);
            }
        }
    }

    fn decode(&self, cell: &Cell<'_>, out: &mut [f32]) {
        let dim = cell.dim;
        assert_eq!(out.len(), cell.rows.len() * dim, "{}: out", self.spec);
        scratch::with(2 * dim, |metadata| {
            for part in self.parts(cell) {
                self.kernels.decode(Format::F16, &part.metadata, metadata);
                let (s, m) = metadata.split_at(dim);
                let out = &mut out[part.wanted.start * dim..part.wanted.end * dim];
                self.kernels.decode(self.format(), &part.codes, out);
                for row in out.chunks_exact_mut(dim) {
                    for ((x, s), m) in row.iter_mut().zip(s).zip(m) {
                        *x = s * *x + m;
                    }
                }
            }
        });
    }

    fn dot(&self, cell: &Cell<'_>, queries: &[f32], scores: &mut [f32]) {
        let (dim, count) = (cell.dim, cell.rows.len());
        assert_eq!(queries.len() / dim * count, scores.len(), "{}: scores", self.spec);
        scratch::with((2 + BATCH) * dim + BATCH * self.group, |buffer| {
            let (metadata, buffer) = buffer.split_at_mut(2 * dim);
            let (folded, group_scores) = buffer.split_at_mut(BATCH * dim);
            for part in self.parts(cell) {
                self.kernels.decode(Format::F16, &part.metadata, metadata);
                let (s, m) = metadata.split_at(dim);
                let wanted = part.wanted.len();
                let batches = queries.chunks(BATCH * dim).zip(scores.chunks_mut(BATCH * count));
                for (queries, scores) in batches {
                    for (folded, query) in folded.chunks_mut(dim).zip(queries.chunks(dim)) {
                        for ((folded, q), s) in folded.iter_mut().zip(query).zip(s) {
                            *folded = q * s;
                        }
                    }
                    let folded = &folded[..queries.len()];
                    let group_scores = &mut group_scores[..queries.len() / dim * wanted];
                    self.kernels.dot(self.format(), &part.codes, folded, group_scores);
                    let pairs = scores.chunks_mut(count).zip(group_scores.chunks(wanted));
                    for ((scores, group_scores), query) in pairs.zip(queries.chunks(dim)) {
                        let bias = self.kernels.dot_f32(query, m);
                        let scores = &mut scores[part.wanted.clone()];
                        scores
                            .iter_mut()
                            .zip(group_scores)
                            .for_each(|(to, from)| *to = from + bias);
                    }
                }
            }
        });
    }

    fn axpy(&self, cell: &Cell<'_>, weights: &[f32], outputs: &mut [f32]) {
        let (dim, count) = (cell.dim, cell.rows.len());
        assert_eq!(outputs.len() / dim * count, weights.len(), "{}: weights", self.spec);
        scratch::with(3 * dim, |buffer| {
            let (metadata, sum) = buffer.split_at_mut(2 * dim);
            for part in self.parts(cell) {
                self.kernels.decode(Format::F16, &part.metadata, metadata);
                let (s, m) = metadata.split_at(dim);
                for (weights, output) in weights.chunks(count).zip(outputs.chunks_mut(dim)) {
                    let weights = &weights[part.wanted.clone()];
                    sum.fill(0.0);
                    self.kernels.axpy(self.format(), &part.codes, weights, sum);
                    let total: f32 = weights.iter().sum();
                    let columns = output.iter_mut().zip(&*sum).zip(s.iter().zip(m));
                    columns.for_each(|((x, sum), (s, m))| *x += s * sum + m * total);
                }
            }
        });
    }
}
