//! Attention under the engine's own mask.
//!
//! ```text
//! logit[q, t] = softcap(scale * Q[q] . K[t]) + slope[head] * mask[q, t]
//! O[q] = sum over t of softmax(logit[q])[t] * V[t]
//! ```
//!
//! Here is who does what; [`super::task`] does it.

use std::ops::Range;

use parking_lot::RwLock;

use super::dense::Dense;
use super::lane::{Block, Lane};
use super::task::{Group, Order, Source, Task, with_scratch};
use super::{Slots, SlotsConfig, check_shape};
use crate::attention::States;
use crate::attention::decoded::DECODE_FROM;
use crate::attention::split::{Split, num_parts};
use crate::device::tensor::{Tensor, TensorMut};
use crate::error::{Result, ensure};
use crate::quantizer::Cell;

/// Rows of a group of the engine's own memory.
const DENSE_ROWS: usize = 64;

/// Queries that are always attended together, however many heads share a KV head.
const FEW_QUERIES: usize = 8;

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
    /// Where the workers of this call meet. Without it they share heads, but not the rows of a head.
    pub meeting: Option<&'a Meeting>,
}

/// Where the workers of one call meet that share the rows of a head.
#[derive(Debug, Default)]
pub struct Meeting(RwLock<Vec<Split>>);

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

/// What a worker does at a time.
struct Share {
    queries: Range<usize>,
    /// KV heads.
    heads: Range<usize>,
    /// Which part of the rows.
    part: usize,
}

/// What there is to do.
struct Work {
    num_queries: usize,
    /// Queries of a share.
    tile: usize,
    num_heads: usize,
    num_parts: usize,
}

impl Meeting {
    /// Brings the state of one part of a head. The last to come gets the merged state in its place
    /// and `true`.
    pub(super) fn arrive(
        &self,
        head: usize,
        part: usize,
        num_parts: usize,
        state: &mut States,
    ) -> bool {
        if self.0.read().len() <= head {
            let mut splits = self.0.write();
            let len = splits.len().max(head + 1);
            splits.resize_with(len, Split::default);
        }
        self.0.read()[head].arrive(0, part, num_parts, state)
    }
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
        let lanes = &self.streams[stream].lanes;
        let longest = lanes.iter().map(Lane::num_rows).max().unwrap_or(0);
        let dims = (key_dim, value_dim);
        run(call, num_kv_heads, dims, longest, (worker, num_workers), |task| {
            for head in task.heads.clone() {
                self.attend_lane(task, head, &lanes[head]);
            }
        })
    }

    fn attend_lane(&self, task: &mut Task<'_>, head: usize, lane: &Lane) {
        let formats = self.sides[0].num_formats().max(self.sides[1].num_formats());
        for format in 0..if formats > 1 { 4 } else { 1 } {
            // A block may have sealed its keys and not yet its values.
            let wanted = [format & 1, format >> 1];
            let found = |block: &&Block| {
                let mut places = block.places.iter().zip(wanted);
                places.all(|(place, format)| usize::from(place.format) == format)
            };
            let mut blocks = lane.blocks(task.part, task.num_parts).filter(found).peekable();
            if blocks.peek().is_none() {
                continue;
            }
            let [key, value] = [0, 1].map(|side| self.sides[side].quantizer(wanted[side]));
            task.open(head, Some(key));
            while let Some(block) = blocks.next() {
                let next = blocks.peek().map_or(&[][..], |next| self.bytes(next, 0));
                let group = self.group(block, next);
                task.read_mask(head, &group);
                task.attend(head, &group);
            }
            task.close(head, Some(value));
        }
    }

    /// The rows of a block; `next` are the keys to be read after it.
    fn group<'a>(&'a self, block: &'a Block, next: &'a [u8]) -> Group<'a> {
        let rows = block.slots.len();
        let source = |side: usize, ahead| {
            let place = block.places[side];
            let cell = Cell { rows: 0..rows, ahead, ..self.sides[side].cell(place) };
            Source::Encoded(self.sides[side].quantizer(usize::from(place.format)), cell)
        };
        let order = match block.slots.run() {
            Some(first) => Order::From(first),
            None => Order::List(block.slots.list()),
        };
        let (key, value) = (source(0, self.bytes(block, 1)), source(1, next));
        let is_whole = block.live.count_ones() as usize == rows;
        let live = if is_whole { u64::MAX } else { block.live };
        Group { key, value, rows, order, live, is_wild: block.is_wild }
    }

    fn bytes(&self, block: &Block, side: usize) -> &[u8] {
        self.sides[side].cell(block.places[side]).bytes
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
        let (dims, rows) = ((key.dim, value.dim), key.num_rows);
        run(call, key.num_heads, dims, rows, (worker, num_workers), |task| {
            Self::attend_rows(task, key, value);
        })
    }

    /// All heads of the task take turns, so that memory where they lie side by side is read in order.
    fn attend_rows(task: &mut Task<'_>, key: &Self, value: &Self) {
        task.heads.clone().for_each(|head| task.open(head, None));
        let end = key.num_rows * (task.part + 1) / task.num_parts;
        let mut start = key.num_rows * task.part / task.num_parts;
        while start < end {
            let rows = DENSE_ROWS.min(end - start);
            for head in task.heads.clone() {
                let source = |side: &Self| {
                    let ahead = side.ahead(head, start + rows, DENSE_ROWS);
                    Source::Plain(side.format, side.rows(head, start, rows, ahead))
                };
                let (key, value, order) = (source(key), source(value), Order::From(start));
                let group = Group { key, value, rows, order, live: u64::MAX, is_wild: false };
                if head == task.heads.start || task.mask_heads() > 1 {
                    task.read_mask(head, &group);
                }
                task.attend(head, &group);
            }
            start += rows;
        }
        task.heads.clone().for_each(|head| task.close(head, None));
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

/// Runs the tasks of one worker over up to `rows` rows of each head.
fn run(
    call: &Masked<'_>,
    num_heads: usize,
    (key_dim, value_dim): (usize, usize),
    rows: usize,
    (worker, num_workers): (usize, usize),
    mut attend: impl FnMut(&mut Task<'_>),
) -> Result<()> {
    ensure!(
        worker < num_workers,
        InvalidArgument,
        "worker is {worker}, must be below num_workers {num_workers}"
    );
    let [num_queries, num_q_heads, _] = call.query.shape();
    let group = num_q_heads / num_heads;
    let tile = (DECODE_FROM / group).max(FEW_QUERIES);
    let is_split = call.options.meeting.is_some() && (1..=tile).contains(&num_queries);
    let num_parts = if is_split { num_parts(rows, num_queries) } else { 1 };
    let work = Work { num_queries, tile, num_heads, num_parts };
    with_scratch(|scratch| {
        work.share(worker, num_workers, |Share { queries, heads, part }| {
            let mut task =
                Task { call, queries, heads, part, num_parts, group, key_dim, value_dim, scratch };
            task.begin();
            attend(&mut task);
            task.end();
        });
    });
    Ok(())
}

impl Work {
    /// Hands the shares of a worker to `each`. All shares take about equally long.
    fn share(&self, worker: usize, num_workers: usize, mut each: impl FnMut(Share)) {
        let Self { num_queries, tile, num_heads, num_parts } = *self;
        if num_queries > tile {
            // Late tiles of a causal mask see more: neighbours in the order go to different workers.
            let num_tiles = num_queries.div_ceil(tile);
            for i in (worker..num_tiles * num_heads).step_by(num_workers) {
                let (first, head) = (i / num_heads * tile, i % num_heads);
                let queries = first..num_queries.min(first + tile);
                each(Share { queries, heads: head..head + 1, part: 0 });
            }
            return;
        }
        let whole = num_parts / num_workers * num_workers;
        for part in (worker..whole).step_by(num_workers) {
            each(Share { queries: 0..num_queries, heads: 0..num_heads, part });
        }
        // The heads of the parts that are left, in a row of which each worker gets a piece.
        let left = (num_parts - whole) * num_heads;
        let mut next = left * worker / num_workers;
        let end = left * (worker + 1) / num_workers;
        while next < end {
            let (part, head) = (whole + next / num_heads, next % num_heads);
            let heads = head..num_heads.min(head + end - next);
            next += heads.len();
            each(Share { queries: 0..num_queries, heads, part });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_everything_once_and_evenly() {
        for (num_queries, num_heads, num_parts) in
            [(1, 8, 16), (1, 8, 1), (3, 1, 5), (2, 5, 4), (40, 3, 1)]
        {
            for num_workers in [1, 2, 3, 7, 20] {
                let work = Work { num_queries, tile: 16, num_heads, num_parts };
                let mut seen = vec![0; num_queries * num_heads * num_parts];
                let mut most = 0;
                for worker in 0..num_workers {
                    let mut count = 0;
                    work.share(worker, num_workers, |Share { queries, heads, part }| {
                        for (query, head) in
                            queries.flat_map(|q| heads.clone().map(move |h| (q, h)))
                        {
                            seen[(query * num_heads + head) * num_parts + part] += 1;
                            count += 1;
                        }
                    });
                    most = most.max(count);
                }
                assert!(seen.iter().all(|n| *n == 1));
                let shares = num_queries.div_ceil(16) * num_heads * num_parts;
                assert!(most <= shares.div_ceil(num_workers) * num_queries.min(16));
            }
        }
    }
}
