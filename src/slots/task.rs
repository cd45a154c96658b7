//! One task: queries of some KV heads against one part of the rows.
//!
//! Rows come in groups (blocks of slots, or runs of the engine's own memory). A group nobody sees
//! is skipped, and only the queries that see some of it take part.

use std::cell::RefCell;
use std::ops::Range;

use super::attend::{Masked, Options};
use crate::attention::States;
use crate::attention::decoded::DECODE_FROM;
use crate::quantizer::{Cell, Quantizer};
use crate::simd::{self, Format, IntegerQueries, Rows};

/// Rows that are read together.
pub(super) struct Group<'a> {
    pub(super) key: Source<'a>,
    pub(super) value: Source<'a>,
    pub(super) rows: usize,
    pub(super) order: Order<'a>,
    /// Which rows are there, one bit each; all bits if all are.
    pub(super) live: u64,
    /// Whether a weight of 0 may fail to silence a row.
    pub(super) is_wild: bool,
}

pub(super) enum Source<'a> {
    Encoded(&'a dyn Quantizer, Cell<'a>),
    Plain(Format, Rows<'a>),
}

/// Where the rows of a group are in the mask; beyond its end they are hidden.
pub(super) enum Order<'a> {
    /// In a run.
    From(usize),
    /// Here and there.
    List(&'a [u32]),
}

/// Buffers of a thread. They only grow, so a steady state allocates nothing.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    heads: Vec<HeadScratch>,
    /// The mask of the group at hand, `[queries, mask heads, rows]`.
    mask: Vec<f32>,
    /// Which queries see which rows of it: at least all of those that any of them sees.
    seen: (Range<usize>, Range<usize>),
    scores: Vec<f32>,
    decoded: Vec<f32>,
}

/// What belongs to one KV head.
#[derive(Debug, Default)]
struct HeadScratch {
    /// Scaled queries, `[queries, group, key_dim]`.
    queries: Vec<f32>,
    /// The same in the space of the format at hand.
    prepared: Vec<f32>,
    /// The same as integers.
    integers: IntegerQueries,
    /// The state of one format.
    part: States,
    /// The state of all formats.
    total: States,
}

/// Runs `body` with the buffers of this thread.
pub(super) fn with_scratch(body: impl FnOnce(&mut Scratch)) {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = RefCell::default();
    }
    SCRATCH.with_borrow_mut(body);
}

/// Queries of some KV heads and one part of the rows.
pub(super) struct Task<'a> {
    pub(super) call: &'a Masked<'a>,
    pub(super) queries: Range<usize>,
    pub(super) heads: Range<usize>,
    pub(super) part: usize,
    pub(super) num_parts: usize,
    /// Query heads of a KV head.
    pub(super) group: usize,
    pub(super) key_dim: usize,
    pub(super) value_dim: usize,
    pub(super) scratch: &'a mut Scratch,
}

impl Task<'_> {
    /// Query vectors of a KV head.
    fn rows(&self) -> usize {
        self.queries.len() * self.group
    }

    /// Whether rows of a format, or plain ones, are decoded. Then queries and outputs are not in its
    /// space.
    fn decodes(&self, side: Option<&dyn Quantizer>, dim: usize) -> bool {
        self.rows() >= DECODE_FROM && !side.is_some_and(|side| side.takes_many(dim))
    }

    /// The query and the query head of a query vector of a KV head.
    fn place(&self, head: usize, row: usize) -> (usize, usize) {
        (self.queries.start + row / self.group, head * self.group + row % self.group)
    }

    pub(super) fn begin(&mut self) {
        let Options { scale, .. } = self.call.options;
        let scale = if scale == 0.0 { 1.0 / (self.key_dim as f32).sqrt() } else { scale };
        let rows = self.rows();
        if self.scratch.heads.len() < self.heads.end {
            self.scratch.heads.resize_with(self.heads.end, HeadScratch::default);
        }
        for head in self.heads.clone() {
            let mut queries = std::mem::take(&mut self.scratch.heads[head].queries);
            queries.resize(rows * self.key_dim, 0.0);
            for (row, target) in queries.chunks_exact_mut(self.key_dim).enumerate() {
                let (query, q_head) = self.place(head, row);
                self.call.query.read(query, q_head, target);
                target.iter_mut().for_each(|x| *x *= scale);
            }
            self.scratch.heads[head].queries = queries;
            self.scratch.heads[head].total.reset(rows, self.value_dim);
        }
    }

    pub(super) fn end(&mut self) {
        for head in self.heads.clone() {
            let total = &mut self.scratch.heads[head].total;
            if let Some(meeting) = self.call.options.meeting
                && self.num_parts > 1
                && !meeting.arrive(head, self.part, self.num_parts, total)
            {
                continue;
            }
            for row in 0..self.rows() {
                let (query, q_head) = self.place(head, row);
                let total = &mut self.scratch.heads[head].total;
                if let Some(sinks) = self.call.options.sinks {
                    total.add_sink(row, sinks[q_head]);
                }
                total.finish(row);
                let out = &total.out[row * self.value_dim..][..self.value_dim];
                self.call.output.write(query, q_head, out);
            }
        }
    }

    /// Starts on rows of one format of keys, or on plain ones.
    pub(super) fn open(&mut self, head: usize, key: Option<&dyn Quantizer>) {
        let (rows, decodes) = (self.rows(), self.decodes(key, self.key_dim));
        let HeadScratch { queries, prepared, integers, part, .. } = &mut self.scratch.heads[head];
        part.reset(rows, self.value_dim);
        prepared.clone_from(queries);
        integers.clear();
        if let Some(key) = key.filter(|_| !decodes) {
            key.prepare_queries(self.key_dim, prepared);
            key.encode_queries(self.key_dim, prepared, integers);
        }
    }

    /// Adds what was found since [`Self::open`], with values of one format, to the total.
    pub(super) fn close(&mut self, head: usize, value: Option<&dyn Quantizer>) {
        let decodes = self.decodes(value, self.value_dim);
        let HeadScratch { part, total, .. } = &mut self.scratch.heads[head];
        if let Some(value) = value.filter(|_| !decodes) {
            value.finish_outputs(self.value_dim, &mut part.out);
        }
        total.merge(part);
    }

    /// Attends to the rows of a group whose mask has been read.
    pub(super) fn attend(&mut self, head: usize, group: &Group<'_>) {
        let (queries, rows) = self.scratch.seen.clone();
        if !group.is_wild {
            if !queries.is_empty() {
                self.attend_rows(head, group, rows, queries);
            }
            return;
        }
        // Each query on its own, and each of its rows on its own.
        for query in queries {
            for row in rows.clone() {
                let first = self.mask_index(query, 0, group.rows) + row;
                let mask = &self.scratch.mask;
                let is_seen = |h: usize| mask[first + h * group.rows] != f32::NEG_INFINITY;
                if (0..self.mask_heads()).any(is_seen) {
                    self.attend_rows(head, group, row..row + 1, query..query + 1);
                }
            }
        }
    }

    /// Heads with a mask of their own, of a KV head.
    pub(super) fn mask_heads(&self) -> usize {
        match &self.call.mask {
            Some(mask) if mask.shape()[1] > 1 => self.group,
            _ => 1,
        }
    }

    fn mask_index(&self, query: usize, head: usize, rows: usize) -> usize {
        (query * self.mask_heads() + head % self.mask_heads()) * rows
    }

    /// Reads the mask of a group and finds which queries and rows of it take part.
    pub(super) fn read_mask(&mut self, head: usize, group: &Group<'_>) {
        let mut mask = std::mem::take(&mut self.scratch.mask);
        let wide = self.mask_heads() * group.rows;
        mask.resize(self.queries.len() * wide, 0.0);
        let (mut queries, mut rows) = (0..0, group.rows..0);
        for (query, out) in mask.chunks_exact_mut(wide).enumerate() {
            for (h, row) in out.chunks_exact_mut(group.rows).enumerate() {
                self.read_mask_row(head, group, query, h, row);
                let is_seen = |x: &f32| *x != f32::NEG_INFINITY;
                let Some(first) = row.iter().position(is_seen) else { continue };
                let last = row.iter().rposition(is_seen).unwrap_or(first);
                rows = rows.start.min(first)..rows.end.max(last + 1);
                queries = if queries.is_empty() { query } else { queries.start }..query + 1;
            }
        }
        self.scratch.mask = mask;
        self.scratch.seen = (queries, rows);
    }

    fn read_mask_row(
        &self,
        head: usize,
        group: &Group<'_>,
        query: usize,
        h: usize,
        row: &mut [f32],
    ) {
        let query = self.queries.start + query;
        let head = if self.mask_heads() > 1 { head * self.group + h } else { 0 };
        match (&group.order, &self.call.mask) {
            (_, None) => row.fill(0.0),
            (Order::From(start), Some(mask)) => {
                let shown = row.len().min(mask.shape()[2].saturating_sub(*start));
                let (shown, beyond) = row.split_at_mut(shown);
                if !shown.is_empty() {
                    mask.read_part(query, head, *start, shown);
                }
                beyond.fill(f32::NEG_INFINITY);
            }
            (Order::List(slots), Some(mask)) => {
                mask.gather(query, head, slots, f32::NEG_INFINITY, row);
            }
        }
        if group.live != u64::MAX {
            for (i, x) in row.iter_mut().enumerate() {
                if group.live >> i & 1 == 0 {
                    *x = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Scores `rows` of a group for `queries` of the task, and adds their values.
    fn attend_rows(
        &mut self,
        head: usize,
        group: &Group<'_>,
        rows: Range<usize>,
        queries: Range<usize>,
    ) {
        let (count, first) = (rows.len(), queries.start * self.group);
        let vectors = queries.len() * self.group;
        let mut scores = std::mem::take(&mut self.scratch.scores);
        scores.resize(vectors * count, 0.0);
        let decodes_key = self.decodes(group.key.quantizer(), self.key_dim);
        let decodes_value = self.decodes(group.value.quantizer(), self.value_dim);
        let Scratch { heads, decoded, .. } = &mut *self.scratch;
        let HeadScratch { prepared, integers, .. } = &heads[head];
        let q = &prepared[first * self.key_dim..][..vectors * self.key_dim];
        group.key.dot(rows.clone(), (q, integers), &mut scores, decodes_key.then_some(decoded));
        for (i, scores) in scores.chunks_exact_mut(count).enumerate() {
            let row = first + i;
            let (query, q_head) = (row / self.group, row % self.group);
            let start = self.mask_index(query, q_head, group.rows) + rows.start;
            self.shape_logits(head, row, &self.scratch.mask[start..][..count], scores);
        }
        self.scratch.heads[head].part.weigh(first, count, &mut scores, simd::active());
        let Scratch { heads, decoded, .. } = &mut *self.scratch;
        let out = &mut heads[head].part.out[first * self.value_dim..][..vectors * self.value_dim];
        group.value.axpy(rows, &scores, out, decodes_value.then_some(decoded));
        self.scratch.scores = scores;
    }

    fn shape_logits(&self, head: usize, row: usize, mask: &[f32], scores: &mut [f32]) {
        let Options { softcap, mask_slopes, .. } = self.call.options;
        if softcap > 0.0 {
            scores.iter_mut().for_each(|score| *score = softcap * (*score / softcap).tanh());
        }
        let slope = mask_slopes.map_or(1.0, |slopes| slopes[self.place(head, row).1]);
        for (score, mask) in scores.iter_mut().zip(mask) {
            // Hidden is hidden, also if the key is NaN or the slope 0.
            *score = match *mask == f32::NEG_INFINITY {
                true => f32::NEG_INFINITY,
                false => *score + slope * mask,
            };
        }
    }
}

impl<'a> Source<'a> {
    fn quantizer(&self) -> Option<&'a dyn Quantizer> {
        match self {
            Self::Encoded(quantizer, _) => Some(*quantizer),
            Self::Plain(..) => None,
        }
    }

    /// `scores[i, t] = queries[i] . row[t]`; with `decoded` through rows as f32.
    fn dot(
        &self,
        rows: Range<usize>,
        (queries, integers): (&[f32], &IntegerQueries),
        scores: &mut [f32],
        decoded: Option<&mut Vec<f32>>,
    ) {
        let Some(decoded) = decoded else {
            return match self {
                Self::Encoded(quantizer, cell) => {
                    let cell = Cell { rows, ..cell.clone() };
                    quantizer.dot_prepared(&cell, (queries, integers), scores);
                }
                Self::Plain(format, all) => {
                    simd::active().dot(*format, &part(all, rows), queries, scores);
                }
            };
        };
        simd::active().dot(Format::F32, &self.decode(rows, decoded), queries, scores);
    }

    /// `outputs[i] += sum over t of weights[i, t] * row[t]`.
    fn axpy(
        &self,
        rows: Range<usize>,
        weights: &[f32],
        outputs: &mut [f32],
        decoded: Option<&mut Vec<f32>>,
    ) {
        let Some(decoded) = decoded else {
            return match self {
                Self::Encoded(quantizer, cell) => {
                    quantizer.axpy(&Cell { rows, ..cell.clone() }, weights, outputs);
                }
                Self::Plain(format, all) => {
                    simd::active().axpy(*format, &part(all, rows), weights, outputs);
                }
            };
        };
        simd::active().axpy(Format::F32, &self.decode(rows, decoded), weights, outputs);
    }

    fn decode<'b>(&self, rows: Range<usize>, decoded: &'b mut Vec<f32>) -> Rows<'b> {
        let dim = match self {
            Self::Encoded(_, cell) => cell.dim,
            Self::Plain(_, all) => all.dim,
        };
        decoded.resize(rows.len() * dim, 0.0);
        match self {
            Self::Encoded(quantizer, cell) => {
                quantizer.decode(&Cell { rows, ..cell.clone() }, decoded);
            }
            Self::Plain(format, all) => simd::active().decode(*format, &part(all, rows), decoded),
        }
        Rows::of_f32(decoded, dim)
    }
}

fn part<'a>(all: &Rows<'a>, rows: Range<usize>) -> Rows<'a> {
    Rows { bytes: &all.bytes[rows.start * all.stride..], count: rows.len(), ..*all }
}
