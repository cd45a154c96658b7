//! Attention under the engine's own mask.
//!
//! ```text
//! logit[q, t] = softcap(scale * Q[q] . K[t]) + slope[head] * mask[q, t]
//! O[q] = sum over t of softmax(logit[q])[t] * V[t]
//! ```
//!
//! Rows come in groups (blocks of slots, or runs of the engine's own memory). A group nobody sees
//! is skipped, and only the queries that see some of it take part.

use std::cell::RefCell;
use std::ops::Range;

use super::dense::Dense;
use super::lane::Block;
use super::{Slots, SlotsConfig, check_shape};
use crate::attention::States;
use crate::attention::decoded::DECODE_FROM;
use crate::device::tensor::{Tensor, TensorMut};
use crate::error::{Result, ensure};
use crate::quantizer::{Cell, Quantizer};
use crate::simd::{self, Format, Rows};

/// Rows of a group of the engine's own memory.
const DENSE_ROWS: usize = 64;

/// What a layer does to its logits.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// Factor of `q . k`; 0 means 1 / sqrt(dim).
    pub scale: f32,
    /// Logits become `softcap * tanh(logit / softcap)`; 0 means off.
    pub softcap: f32,
    /// A learned logit for each query head, an extra term of the denominator.
    pub sinks: Option<&'a [f32]>,
    /// Factor of the mask for each query head; `None` means 1.
    pub mask_slopes: Option<&'a [f32]>,
}

/// One call: queries, outputs, and who sees what.
#[derive(Debug, Clone, Copy)]
pub struct Masked<'a> {
    /// `[queries, num_q_heads, key_dim]`.
    pub query: Tensor<'a>,
    /// `[queries, num_q_heads, value_dim]`.
    pub output: TensorMut<'a>,
    /// `[queries, 1 or num_q_heads, visible]`, added to the logits: negative infinity hides.
    /// Without it everything is visible.
    pub mask: Option<Tensor<'a>>,
    /// Settings.
    pub options: Options<'a>,
}

/// Rows that are read together.
struct Group<'a> {
    key: Source<'a>,
    value: Source<'a>,
    rows: usize,
    order: Order<'a>,
    /// Whether a weight of 0 may fail to silence a row.
    is_wild: bool,
}

enum Source<'a> {
    Encoded(&'a dyn Quantizer, Cell<'a>),
    Plain(Format, Rows<'a>),
}

/// Where the rows of a group are in the mask.
enum Order<'a> {
    From(usize),
    /// Slots of the rows, of which those in the bit set are live.
    Slots(&'a [u32], u64),
}

#[derive(Debug, Default)]
struct Scratch {
    queries: Vec<f32>,
    prepared: Vec<f32>,
    mask: Vec<f32>,
    scores: Vec<f32>,
    decoded: Vec<f32>,
    part: States,
    total: States,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The part of the work that one task does: queries of one KV head.
struct Task<'a> {
    call: &'a Masked<'a>,
    head: usize,
    queries: Range<usize>,
    group: usize,
    key_dim: usize,
    value_dim: usize,
}

impl Slots {
    /// Attends to the slots of `stream` that the mask covers. All workers together do the work.
    pub fn attend(
        &self,
        stream: usize,
        call: &Masked<'_>,
        worker: usize,
        num_workers: usize,
    ) -> Result<()> {
        let SlotsConfig { num_q_heads, num_kv_heads, key_dim, value_dim, num_slots, .. } =
            self.config;
        self.check_stream(stream, "stream")?;
        let span = call.mask.map_or(num_slots, |mask| mask.shape()[2]);
        ensure!(
            span <= num_slots,
            InvalidArgument,
            "mask covers {span} slots, a stream has {num_slots}"
        );
        call.check(num_q_heads, key_dim, value_dim)?;
        let formats = self.sides[0].num_formats().max(self.sides[1].num_formats());
        let num_formats = if formats > 1 { 4 } else { 1 };
        run(call, num_kv_heads, (key_dim, value_dim), worker, num_workers, |task, scratch| {
            let lane = &self.streams[stream].lanes[task.head];
            for format in 0..num_formats {
                // A block may have sealed its keys and not yet its values.
                let wanted = [format & 1, format >> 1];
                let found = |block: &&Block| {
                    block
                        .places
                        .iter()
                        .zip(wanted)
                        .all(|(place, format)| usize::from(place.format) == format)
                };
                let mut blocks = lane.blocks().filter(found).peekable();
                if blocks.peek().is_none() {
                    continue;
                }
                let [key, value] = [0, 1].map(|side| self.sides[side].quantizer(wanted[side]));
                let groups = blocks.map(|block| self.group(block, span));
                task.pass(groups, Some((key, value)), scratch);
            }
        })
    }

    fn group<'a>(&'a self, block: &'a Block, span: usize) -> Group<'a> {
        let rows = block.slots.len();
        let source = |side: usize| {
            let place = block.places[side];
            let cell = Cell { rows: 0..rows, ..self.sides[side].cell(place) };
            Source::Encoded(self.sides[side].quantizer(usize::from(place.format)), cell)
        };
        let first = block.slots[0] as usize;
        let is_run = block.live.count_ones() as usize == rows
            && first + rows <= span
            && block.slots.iter().enumerate().all(|(i, slot)| *slot as usize == first + i);
        let order = match is_run {
            true => Order::From(first),
            false => Order::Slots(&block.slots, block.live),
        };
        Group { key: source(0), value: source(1), rows, order, is_wild: block.is_wild }
    }
}

impl Dense<'_> {
    /// Attends to `key` and `value` in the engine's own memory.
    pub fn attend(
        key: &Self,
        value: &Self,
        num_q_heads: usize,
        call: &Masked<'_>,
        worker: usize,
        num_workers: usize,
    ) -> Result<()> {
        key.check("key")?;
        value.check("value")?;
        ensure!(
            key.num_rows == value.num_rows && key.num_heads == value.num_heads,
            InvalidArgument,
            "key has {} rows of {} heads, value has {} of {}",
            key.num_rows,
            key.num_heads,
            value.num_rows,
            value.num_heads
        );
        ensure!(
            num_q_heads > 0 && num_q_heads.is_multiple_of(key.num_heads),
            InvalidArgument,
            "query has {num_q_heads} heads, must be a multiple of the {} of key",
            key.num_heads
        );
        call.check(num_q_heads, key.dim, value.dim)?;
        if let Some(mask) = &call.mask {
            ensure!(
                mask.shape()[2] == key.num_rows,
                InvalidArgument,
                "mask covers {} rows, key has {}",
                mask.shape()[2],
                key.num_rows
            );
        }
        let dims = (key.dim, value.dim);
        run(call, key.num_heads, dims, worker, num_workers, |task, scratch| {
            let groups = (0..key.num_rows).step_by(DENSE_ROWS).map(|start| {
                let rows = DENSE_ROWS.min(key.num_rows - start);
                Group {
                    key: Source::Plain(key.format, key.rows(task.head, start, rows)),
                    value: Source::Plain(value.format, value.rows(task.head, start, rows)),
                    rows,
                    order: Order::From(start),
                    is_wild: false,
                }
            });
            task.pass(groups, None, scratch);
        })
    }
}

impl Masked<'_> {
    fn check(&self, num_q_heads: usize, key_dim: usize, value_dim: usize) -> Result<()> {
        let [queries, ..] = self.query.shape();
        check_shape("query", self.query.shape(), [queries, num_q_heads, key_dim])?;
        check_shape("output", self.output.shape(), [queries, num_q_heads, value_dim])?;
        if let Some(mask) = &self.mask {
            let [_, heads, span] = mask.shape();
            let heads = if heads == 1 { 1 } else { num_q_heads };
            check_shape("mask", mask.shape(), [queries, heads, span])?;
        }
        Ok(())
    }
}

/// Runs the tasks of one worker.
fn run(
    call: &Masked<'_>,
    num_kv_heads: usize,
    (key_dim, value_dim): (usize, usize),
    worker: usize,
    num_workers: usize,
    attend: impl Fn(&Task<'_>, &mut Scratch),
) -> Result<()> {
    ensure!(
        worker < num_workers,
        InvalidArgument,
        "worker is {worker}, must be below num_workers {num_workers}"
    );
    let [num_queries, num_q_heads, _] = call.query.shape();
    let group = num_q_heads / num_kv_heads;
    let tile = (DECODE_FROM / group).max(1);
    let num_tiles = num_queries.div_ceil(tile);
    SCRATCH.with_borrow_mut(|scratch| {
        // Late tiles of a causal mask see more: neighbours in the order go to different workers.
        for i in (worker..num_tiles * num_kv_heads).step_by(num_workers) {
            let (tile_index, head) = (i / num_kv_heads, i % num_kv_heads);
            let queries = tile_index * tile..((tile_index + 1) * tile).min(num_queries);
            let task = Task { call, head, queries, group, key_dim, value_dim };
            task.begin(scratch);
            attend(&task, scratch);
            task.end(scratch);
        }
    });
    Ok(())
}

impl Task<'_> {
    fn rows(&self) -> usize {
        self.queries.len() * self.group
    }

    fn decodes(&self) -> bool {
        self.rows() >= DECODE_FROM
    }

    fn begin(&self, scratch: &mut Scratch) {
        let Options { scale, .. } = self.call.options;
        let scale = if scale == 0.0 { 1.0 / (self.key_dim as f32).sqrt() } else { scale };
        scratch.queries.resize(self.rows() * self.key_dim, 0.0);
        for (row, target) in scratch.queries.chunks_exact_mut(self.key_dim).enumerate() {
            let (query, head) = self.place(row);
            self.call.query.read(query, head, target);
            target.iter_mut().for_each(|x| *x *= scale);
        }
        scratch.total.reset(self.rows(), self.value_dim);
    }

    /// The query and the query head of a query vector.
    fn place(&self, row: usize) -> (usize, usize) {
        (self.queries.start + row / self.group, self.head * self.group + row % self.group)
    }

    fn end(&self, scratch: &mut Scratch) {
        let total = &mut scratch.total;
        for row in 0..self.rows() {
            let (query, head) = self.place(row);
            if let Some(sinks) = self.call.options.sinks {
                total.add_sink(row, sinks[head]);
            }
            total.finish(row);
            self.call.output.write(
                query,
                head,
                &total.out[row * self.value_dim..][..self.value_dim],
            );
        }
    }

    /// Attends to groups of one pair of formats and adds the result to the total.
    fn pass<'a>(
        &self,
        groups: impl Iterator<Item = Group<'a>>,
        formats: Option<(&dyn Quantizer, &dyn Quantizer)>,
        scratch: &mut Scratch,
    ) {
        scratch.part.reset(self.rows(), self.value_dim);
        scratch.prepared.clear();
        scratch.prepared.extend_from_slice(&scratch.queries);
        let formats = formats.filter(|_| !self.decodes());
        if let Some((key, _)) = formats {
            key.prepare_queries(self.key_dim, &mut scratch.prepared);
        }
        for group in groups {
            self.read_group(&group, scratch);
        }
        if let Some((_, value)) = formats {
            value.finish_outputs(self.value_dim, &mut scratch.part.out);
        }
        scratch.total.merge(&scratch.part);
    }

    fn read_group(&self, group: &Group<'_>, scratch: &mut Scratch) {
        let Some(seen) = self.read_mask(group, &mut scratch.mask) else { return };
        if !group.is_wild {
            self.attend(group, 0..group.rows, seen, scratch);
            return;
        }
        // Each query on its own, and each of its rows on its own.
        for query in seen {
            for row in 0..group.rows {
                let first = self.mask_index(query, 0, group.rows) + row;
                let heads = self.mask_heads();
                let visible =
                    (0..heads).any(|h| scratch.mask[first + h * group.rows] != f32::NEG_INFINITY);
                if visible {
                    self.attend(group, row..row + 1, query..query + 1, scratch);
                }
            }
        }
    }

    /// Heads with a mask of their own.
    fn mask_heads(&self) -> usize {
        match &self.call.mask {
            Some(mask) if mask.shape()[1] > 1 => self.group,
            _ => 1,
        }
    }

    fn mask_index(&self, query: usize, head: usize, rows: usize) -> usize {
        (query * self.mask_heads() + head % self.mask_heads()) * rows
    }

    /// Fills `out` with the mask of the group, `[queries, mask heads, rows]`, and answers which
    /// queries of the task see any of it.
    fn read_mask(&self, group: &Group<'_>, out: &mut Vec<f32>) -> Option<Range<usize>> {
        let heads = self.mask_heads();
        let wide = heads * group.rows;
        out.resize(self.queries.len() * wide, 0.0);
        let mut seen: Option<Range<usize>> = None;
        for (query, rows) in out.chunks_exact_mut(wide).enumerate() {
            for (h, row) in rows.chunks_exact_mut(group.rows).enumerate() {
                self.read_mask_row(group, self.queries.start + query, h, row);
            }
            if rows.iter().any(|x| *x != f32::NEG_INFINITY) {
                seen = Some(seen.map_or(query, |seen| seen.start)..query + 1);
            }
        }
        seen
    }

    fn read_mask_row(&self, group: &Group<'_>, query: usize, h: usize, row: &mut [f32]) {
        let head = if self.mask_heads() > 1 { self.head * self.group + h } else { 0 };
        match (&group.order, &self.call.mask) {
            (Order::From(start), Some(mask)) => mask.read_part(query, head, *start, row),
            (Order::From(_), None) => row.fill(0.0),
            (Order::Slots(slots, live), mask) => {
                for (i, (x, slot)) in row.iter_mut().zip(*slots).enumerate() {
                    *x = f32::NEG_INFINITY;
                    if live >> i & 1 == 0 {
                        continue;
                    }
                    match mask {
                        None => *x = 0.0,
                        Some(mask) if (*slot as usize) < mask.shape()[2] => {
                            let x = std::slice::from_mut(x);
                            mask.read_part(query, head, *slot as usize, x);
                        }
                        Some(_) => {}
                    }
                }
            }
        }
    }

    /// Scores `rows` of a group for `queries` of the task, and adds their values.
    fn attend(
        &self,
        group: &Group<'_>,
        rows: Range<usize>,
        queries: Range<usize>,
        scratch: &mut Scratch,
    ) {
        let Scratch { prepared, mask, scores, decoded, part, .. } = scratch;
        let (count, first) = (rows.len(), queries.start * self.group);
        let vectors = queries.len() * self.group;
        scores.resize(vectors * count, 0.0);
        let q = &prepared[first * self.key_dim..][..vectors * self.key_dim];
        let decodes = self.decodes();
        group.key.dot(rows.clone(), q, scores, decodes.then_some(&mut *decoded));
        let kernels = simd::active();
        for (i, scores) in scores.chunks_exact_mut(count).enumerate() {
            let row = first + i;
            let (query, head) = (row / self.group, row % self.group);
            let mask = &mask[self.mask_index(query, head, group.rows)..][rows.clone()];
            self.shape_logits(row, mask, scores);
            part.weigh(row, scores, kernels);
        }
        let out = &mut part.out[first * self.value_dim..][..vectors * self.value_dim];
        group.value.axpy(rows, scores, out, decodes.then_some(decoded));
    }

    fn shape_logits(&self, row: usize, mask: &[f32], scores: &mut [f32]) {
        let Options { softcap, mask_slopes, .. } = self.call.options;
        if softcap > 0.0 {
            scores.iter_mut().for_each(|score| *score = softcap * (*score / softcap).tanh());
        }
        let slope = mask_slopes.map_or(1.0, |slopes| slopes[self.place(row).1]);
        for (score, mask) in scores.iter_mut().zip(mask) {
            // Hidden is hidden, also if the key is NaN or the slope 0.
            *score = match *mask == f32::NEG_INFINITY {
                true => f32::NEG_INFINITY,
                false => *score + slope * mask,
            };
        }
    }
}

impl Source<'_> {
    /// `scores[i, t] = queries[i] . row[t]`; with `decoded` through rows as f32.
    fn dot(
        &self,
        rows: Range<usize>,
        queries: &[f32],
        scores: &mut [f32],
        decoded: Option<&mut Vec<f32>>,
    ) {
        let Some(decoded) = decoded else {
            return match self {
                Self::Encoded(quantizer, cell) => {
                    quantizer.dot(&Cell { rows, ..cell.clone() }, queries, scores);
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

    fn decode<'a>(&self, rows: Range<usize>, decoded: &'a mut Vec<f32>) -> Rows<'a> {
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
