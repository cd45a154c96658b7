//! What `nuq` and `gear` share: groups of tokens with codes, outliers and a low-rank matrix.
//!
//! ```text
//! x = s * level[q] + m + sum over j < rank of A[t, j] * B[j, c]        outliers: x as f16
//! group = s f16[n] | m f16[n] | levels f16[2^bits] | A f16[t, rank] | B f16[rank, dim]
//!       | position u16[k] | outlier f16[k] | codes, a stream, lowest bits first
//! ```
//!
//! A group is `group` tokens, the last one may be shorter. Its n vectors are its channels for keys
//! and its tokens for values. The k outliers are the elements farthest from the mean of their
//! vector, which replaces them before the rest is coded; position is `t * dim + c`. Levels are
//! stored if they are fitted, and are the codes themselves otherwise.
//!
//! Magnitudes saturate at 65504. Everything is plain arithmetic in a fixed order, so that bytes and
//! decoded values are the same everywhere.

use std::fmt::Write;
use std::ops::Range;

use super::low_rank::approximate;
use super::{Cell, Granularity, Quantizer, Side, check_shape, scratch, unpacked};
use crate::error::{Result, ensure};
use crate::registry::{Args, Domain, Param};
use crate::simd::{BLOCK, Format, Kernels, Rows, sanitize};

pub(super) const BITS: Param = Param {
    name: "bits",
    help: "bits of a code",
    domain: Domain::Int { default: 4, min: 2, max: 4 },
};

pub(super) const GROUP: Param = Param {
    name: "group",
    help: "tokens of a group",
    domain: Domain::Int { default: 64, min: 8, max: 256 },
};

/// The parameter for the share of outliers.
pub(super) const fn outliers(default: f64) -> Param {
    Param {
        name: "outliers",
        help: "share of the elements that are kept in f16",
        domain: Domain::Real { default, min: 0.0, max: 0.1 },
    }
}

/// What a code means before scale and minimum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Levels {
    /// 0, 1, 2, ...: evenly spaced from the minimum of the vector on.
    Even,
    /// Numbers in -1..=1 fitted to the group, around the middle of the vector.
    Fitted,
}

#[derive(Debug)]
pub(super) struct Grouped {
    spec: String,
    side: Side,
    bits: usize,
    group: usize,
    outliers: f64,
    rank: usize,
    levels: Levels,
    kernels: &'static Kernels,
}

/// Largest magnitude of an f16.
const LIMIT: f32 = 65504.0;

impl Grouped {
    /// Parameters are `bits`, `group`, `outliers` and possibly `rank`, in this order.
    pub(super) fn new(
        name: &str,
        params: &[Param],
        args: &Args,
        side: Side,
        levels: Levels,
        kernels: &'static Kernels,
    ) -> Result<Self> {
        let mut spec = format!("{name}(bits={}", args.count("bits"));
        for param in &params[1..] {
            let default = match param.domain {
                Domain::Int { default, .. } => default as f64,
                Domain::Real { default, .. } => default,
                _ => continue,
            };
            if args.real(param.name) != default {
                let _ = write!(spec, ", {}={}", param.name, args.real(param.name));
            }
        }
        spec.push(')');
        let has_rank = params.iter().any(|param| param.name == "rank");
        Ok(Self {
            spec,
            side,
            bits: args.count("bits"),
            group: args.count("group"),
            outliers: args.real("outliers"),
            rank: if has_rank { args.count("rank") } else { 0 },
            levels,
            kernels,
        })
    }

    fn layout(&self, tokens: usize, dim: usize) -> Layout {
        let vectors = match self.side {
            Side::Key => dim,
            Side::Value => tokens,
        };
        let stored_levels = if self.levels == Levels::Fitted { 1 << self.bits } else { 0 };
        let outliers = ((tokens * dim) as f64 * self.outliers).ceil() as usize;
        let mut end = 0;
        let mut next = |bytes: usize| {
            end += bytes;
            end - bytes..end
        };
        Layout {
            s: next(vectors * 2),
            m: next(vectors * 2),
            levels: next(stored_levels * 2),
            a: next(tokens * self.rank * 2),
            b: next(self.rank * dim * 2),
            positions: next(outliers * 2),
            outliers: next(outliers * 2),
            codes: next(tokens * dim * self.bits / 8),
        }
    }

    /// Values of the metadata of a group, decoded.
    fn metadata_len(&self, dim: usize) -> usize {
        2 * dim.max(self.group) + self.rank * (self.group + dim)
    }

    /// The vector of element `c` of token `t`.
    fn vector(&self, t: usize, c: usize) -> usize {
        match self.side {
            Side::Key => c,
            Side::Value => t,
        }
    }

    fn encode_group(&self, values: &mut [f32], dim: usize, out: &mut [u8]) {
        let layout = self.layout(values.len() / dim, dim);
        let vectors = layout.s.len() / 2;
        self.make_finite(values, dim, vectors);
        let positions = self.take_outliers(values, dim, &layout, out);
        let (s, m) = self.ranges(values, dim, vectors);
        self.put(&s, &mut out[layout.s.clone()]);
        self.put(&m, &mut out[layout.m.clone()]);
        let levels = match self.levels {
            Levels::Even => even_levels(),
            Levels::Fitted => {
                let levels = self.fit(values, dim, &s, &m);
                self.put(&levels[..1 << self.bits], &mut out[layout.levels.clone()]);
                levels
            }
        };
        // From here on values are what the codes leave over.
        let mut codes = vec![0; values.len()];
        for (t, (row, codes)) in values.chunks_mut(dim).zip(codes.chunks_mut(dim)).enumerate() {
            for (c, (x, code)) in row.iter_mut().zip(codes).enumerate() {
                let vector = self.vector(t, c);
                *code = nearest(&levels[..1 << self.bits], *x, s[vector], m[vector]);
                *x -= s[vector] * levels[usize::from(*code)] + m[vector];
            }
        }
        pack(self.bits, &codes, &mut out[layout.codes.clone()]);
        if self.rank > 0 {
            positions.iter().for_each(|position| values[*position] = 0.0);
            let (a, b) = approximate(values, dim, self.rank);
            self.put(&a, &mut out[layout.a.clone()]);
            self.put(&b, &mut out[layout.b.clone()]);
        }
    }

    /// Sanitizes each vector.
    fn make_finite(&self, values: &mut [f32], dim: usize, vectors: usize) {
        if values.iter().all(|x| x.abs() <= LIMIT) {
            return;
        }
        for vector in 0..vectors {
            match self.side {
                Side::Value => sanitize(&mut values[vector * dim..(vector + 1) * dim], LIMIT),
                Side::Key => {
                    let column = values.iter_mut().skip(vector).step_by(dim);
                    let mut column: Vec<f32> = column.map(|x| *x).collect();
                    sanitize(&mut column, LIMIT);
                    let places = values.iter_mut().skip(vector).step_by(dim);
                    places.zip(column).for_each(|(to, from)| *to = from);
                }
            }
        }
    }

    /// Stores the outliers, puts the mean of their vector in their place, and returns their
    /// positions in ascending order.
    fn take_outliers(
        &self,
        values: &mut [f32],
        dim: usize,
        layout: &Layout,
        out: &mut [u8],
    ) -> Vec<usize> {
        let vectors = layout.s.len() / 2;
        let count = layout.positions.len() / 2;
        if count == 0 {
            return Vec::new();
        }
        let mut means = vec![0.0f32; vectors];
        self.for_each_element(values, dim, |vector, x| means[vector] += x);
        let length = (values.len() / vectors) as f32;
        means.iter_mut().for_each(|mean| *mean /= length);
        // Distances that are not negative are ordered like their bits; of equals the first wins.
        let mut order = Vec::with_capacity(values.len());
        self.for_each_element(values, dim, |vector, x| {
            let distance = (x - means[vector]).abs().to_bits();
            order.push(u64::from(!distance) << 32 | order.len() as u64);
        });
        order.select_nth_unstable(count - 1);
        let mut positions: Vec<_> =
            order[..count].iter().map(|key| (key & 0xffff_ffff) as usize).collect();
        positions.sort_unstable();
        let outliers: Vec<f32> = positions.iter().map(|position| values[*position]).collect();
        self.put(&outliers, &mut out[layout.outliers.clone()]);
        let places = out[layout.positions.clone()].as_chunks_mut().0;
        for (place, position) in places.iter_mut().zip(&positions) {
            *place = (*position as u16).to_le_bytes();
            values[*position] = means[self.vector(position / dim, position % dim)];
        }
        positions
    }

    fn for_each_element(&self, values: &[f32], dim: usize, mut act: impl FnMut(usize, f32)) {
        for (t, row) in values.chunks_exact(dim).enumerate() {
            row.iter().enumerate().for_each(|(c, x)| act(self.vector(t, c), *x));
        }
    }

    /// Scale and minimum, or half range and middle, of each vector, as f16.
    fn ranges(&self, values: &[f32], dim: usize, vectors: usize) -> (Vec<f32>, Vec<f32>) {
        let (mut low, mut high) = (vec![f32::INFINITY; vectors], vec![f32::NEG_INFINITY; vectors]);
        self.for_each_element(values, dim, |vector, x| {
            low[vector] = low[vector].min(x);
            high[vector] = high[vector].max(x);
        });
        let top = ((1 << self.bits) - 1) as f32;
        let round = |x: f32| half::f16::from_f32(x).to_f32();
        for (low, high) in low.iter_mut().zip(&mut high) {
            (*high, *low) = match self.levels {
                Levels::Even => (round((*high - round(*low)).max(0.0) / top), round(*low)),
                Levels::Fitted => (round((*high - *low) * 0.5), round((*high + *low) * 0.5)),
            };
        }
        (high, low)
    }

    /// k-means over a histogram of the normalised values.
    fn fit(&self, values: &[f32], dim: usize, s: &[f32], m: &[f32]) -> [f32; 16] {
        const BINS: usize = 256;
        let mut histogram = [0u32; BINS];
        self.for_each_element(values, dim, |vector, x| {
            if s[vector] > 0.0 {
                let place = ((x - m[vector]) / s[vector] + 1.0) * (BINS as f32 / 2.0);
                histogram[(place as usize).min(BINS - 1)] += 1;
            }
        });
        let count = 1 << self.bits;
        let mut levels = [0.0; 16];
        for (i, level) in levels[..count].iter_mut().enumerate() {
            *level = (2 * i + 1) as f32 / count as f32 - 1.0;
        }
        for _ in 0..16 {
            let mut sums = [(0.0f32, 0u32); 16];
            for (bin, weight) in histogram.iter().enumerate() {
                let x = (2 * bin + 1) as f32 / BINS as f32 - 1.0;
                let (sum, total) = &mut sums[usize::from(nearest(&levels[..count], x, 1.0, 0.0))];
                *sum += x * *weight as f32;
                *total += weight;
            }
            for (level, (sum, total)) in levels.iter_mut().zip(sums) {
                *level = if total > 0 { sum / total as f32 } else { *level };
            }
        }
        levels.map(|level| half::f16::from_f32(level).to_f32())
    }

    fn put(&self, values: &[f32], out: &mut [u8]) {
        self.kernels.encode_f16(values, out);
    }

    fn get(&self, bytes: &[u8], out: &mut [f32]) {
        let rows =
            Rows { bytes, stride: bytes.len(), count: 1, dim: out.len(), group: BLOCK, ahead: &[] };
        if !out.is_empty() {
            self.kernels.decode(Format::F16, &rows, out);
        }
    }

    /// Decodes rows of `cell` into `out`; `buffer` holds the metadata of a group.
    fn decode_rows(
        &self,
        cell: &Cell<'_>,
        rows: Range<usize>,
        out: &mut [f32],
        buffer: &mut [f32],
    ) {
        let (dim, group) = (cell.dim, self.group);
        assert_eq!(cell.bytes.len(), self.bytes(cell.tokens, dim), "{}: cell", self.spec);
        assert!(rows.end <= cell.tokens, "{}: rows {rows:?} of {}", self.spec, cell.tokens);
        let full = self.layout(group, dim).codes.end;
        let mut start = rows.start;
        while start < rows.end {
            let first = start / group * group;
            let end = rows.end.min(first + group);
            let tokens = group.min(cell.tokens - first);
            let bytes = &cell.bytes[first / group * full..];
            let out = &mut out[(start - rows.start) * dim..(end - rows.start) * dim];
            self.decode_group(bytes, (tokens, dim), start - first..end - first, out, buffer);
            start = end;
        }
    }

    fn decode_group(
        &self,
        bytes: &[u8],
        (tokens, dim): (usize, usize),
        rows: Range<usize>,
        out: &mut [f32],
        buffer: &mut [f32],
    ) {
        let layout = self.layout(tokens, dim);
        let vectors = layout.s.len() / 2;
        let (s, buffer) = buffer.split_at_mut(vectors);
        let (m, buffer) = buffer.split_at_mut(vectors);
        let (a, buffer) = buffer.split_at_mut(tokens * self.rank);
        let b = &mut buffer[..self.rank * dim];
        self.get(&bytes[layout.s.clone()], s);
        self.get(&bytes[layout.m.clone()], m);
        self.get(&bytes[layout.a.clone()], a);
        self.get(&bytes[layout.b.clone()], b);
        let mut levels = even_levels();
        if self.levels == Levels::Fitted {
            self.get(&bytes[layout.levels.clone()], &mut levels[..1 << self.bits]);
        }
        let codes = &bytes[layout.codes.clone()];
        let stride = dim * self.bits / 8;
        for (t, out) in rows.clone().zip(out.chunks_exact_mut(dim)) {
            unpack(self.bits, &codes[t * stride..(t + 1) * stride], &levels, out);
            match self.side {
                Side::Key => {
                    for ((x, s), m) in out.iter_mut().zip(&*s).zip(&*m) {
                        *x = s * *x + m;
                    }
                }
                Side::Value => out.iter_mut().for_each(|x| *x = s[t] * *x + m[t]),
            }
            for (factor, b) in a[t * self.rank..].iter().zip(b.chunks_exact(dim)) {
                out.iter_mut().zip(b).for_each(|(x, b)| *x += factor * b);
            }
        }
        let positions = bytes[layout.positions].as_chunks().0;
        let outliers = bytes[layout.outliers].as_chunks().0;
        for (position, outlier) in positions.iter().zip(outliers) {
            let position = usize::from(u16::from_le_bytes(*position));
            // Bytes from elsewhere may name any position.
            if let Some(x) = position.checked_sub(rows.start * dim).and_then(|i| out.get_mut(i)) {
                *x = half::f16::from_le_bytes(*outlier).to_f32();
            }
        }
    }
}

/// Where the parts of a group are.
struct Layout {
    s: Range<usize>,
    m: Range<usize>,
    levels: Range<usize>,
    a: Range<usize>,
    b: Range<usize>,
    positions: Range<usize>,
    outliers: Range<usize>,
    codes: Range<usize>,
}

fn even_levels() -> [f32; 16] {
    std::array::from_fn(|i| i as f32)
}

/// The code of the level nearest to `(x - m) / s`; 0 if `s` is.
fn nearest(levels: &[f32], x: f32, s: f32, m: f32) -> u8 {
    if s == 0.0 {
        return 0;
    }
    let normal = (x - m) / s;
    levels.windows(2).filter(|pair| normal > (pair[0] + pair[1]) * 0.5).count() as u8
}

/// Eight codes are `bits` bytes.
fn pack(bits: usize, codes: &[u8], out: &mut [u8]) {
    for (codes, out) in codes.as_chunks::<8>().0.iter().zip(out.chunks_exact_mut(bits)) {
        let stream =
            codes.iter().rev().fold(0u32, |stream, code| stream << bits | u32::from(*code));
        out.copy_from_slice(&stream.to_le_bytes()[..bits]);
    }
}

fn unpack(bits: usize, bytes: &[u8], levels: &[f32; 16], out: &mut [f32]) {
    for (out, bytes) in out.as_chunks_mut::<8>().0.iter_mut().zip(bytes.chunks_exact(bits)) {
        let stream = bytes.iter().rev().fold(0u32, |stream, byte| stream << 8 | u32::from(*byte));
        for (j, x) in out.iter_mut().enumerate() {
            *x = levels[(stream >> (j * bits)) as usize & ((1 << bits) - 1)];
        }
    }
}

impl Quantizer for Grouped {
    fn spec(&self) -> String {
        self.spec.clone()
    }

    fn granularity(&self) -> Granularity {
        Granularity::Block
    }

    fn check(&self, tokens: usize, dim: usize) -> Result<()> {
        check_shape(&self.spec, tokens, dim, BLOCK)?;
        let elements = self.group.min(tokens) * dim;
        ensure!(
            elements <= 1 << 16,
            InvalidArgument,
            "{}: a group of {} tokens of {dim} has {elements} elements, must be at most 65536",
            self.spec,
            self.group.min(tokens)
        );
        Ok(())
    }

    fn bytes(&self, tokens: usize, dim: usize) -> usize {
        let full = self.layout(self.group, dim).codes.end * (tokens / self.group);
        match tokens % self.group {
            0 => full,
            rest => full + self.layout(rest, dim).codes.end,
        }
    }

    fn encode(&self, rows: &[f32], dim: usize, out: &mut [u8]) {
        assert_eq!(out.len(), self.bytes(rows.len() / dim, dim), "{}: out", self.spec);
        let outs = out.chunks_mut(self.layout(self.group, dim).codes.end);
        scratch::with(rows.len().min(self.group * dim), |buffer| {
            for (rows, out) in rows.chunks(self.group * dim).zip(outs) {
                let values = &mut buffer[..rows.len()];
                values.copy_from_slice(rows);
                self.encode_group(values, dim, out);
            }
        });
    }

    fn decode(&self, cell: &Cell<'_>, out: &mut [f32]) {
        assert_eq!(out.len(), cell.rows.len() * cell.dim, "{}: out", self.spec);
        scratch::with(self.metadata_len(cell.dim), |buffer| {
            self.decode_rows(cell, cell.rows.clone(), out, buffer);
        });
    }

    fn dot(&self, cell: &Cell<'_>, queries: &[f32], scores: &mut [f32]) {
        let extra = self.metadata_len(cell.dim);
        unpacked::dot(self.kernels, cell, queries, scores, extra, |rows, out, buffer| {
            self.decode_rows(cell, rows, out, buffer);
        });
    }

    fn axpy(&self, cell: &Cell<'_>, weights: &[f32], outputs: &mut [f32]) {
        let extra = self.metadata_len(cell.dim);
        unpacked::axpy(self.kernels, cell, weights, outputs, extra, |rows, out, buffer| {
            self.decode_rows(cell, rows, out, buffer);
        });
    }
}
