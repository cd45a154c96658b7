//! Compaction: a lane keeps the rows that a policy chose and frees the blocks of the others.
//!
//! Blocks never change. If the survivors of each block are one run and few blocks are left partly
//! used, spans are trimmed: nothing is copied, which is all that sink-and-recent policies need.
//! Otherwise survivors are gathered into new blocks: as bytes where the format allows it, through
//! f32 where it does not. Other sequences that share the old blocks do not notice.

use std::ops::Range;
use std::sync::Arc;

use super::{Lane, Positions, Sequence, Span};
use crate::cache::rows::SIDES;
use crate::cache::{Block, Cache, OPEN};
use crate::error::{Result, ensure};
use crate::quantizer::Side;
use crate::shape::KeepSet;

/// Partly used blocks that a trim may leave before a gather is the better choice.
const TRIM_SLACK: usize = 2;

/// Where a surviving row is now.
#[derive(Debug, Clone, Copy)]
struct Source {
    span: u32,
    row: u32,
}

impl Sequence {
    /// Keeps the rows of lane `index` that `keep` names, given as indices into the lane. Fails
    /// without a change if new blocks are needed and none is free.
    pub fn compact(&mut self, index: usize, keep: &KeepSet) -> Result<()> {
        self.compact_with(index, keep, &[])
    }

    /// As [`Self::compact`]; `values[cell]`, if not empty, are the values of the surviving rows of that
    /// cell of the lane from now on, `[keep, head_dim]`.
    pub fn compact_with(
        &mut self,
        index: usize,
        keep: &KeepSet,
        values: &[Vec<f32>],
    ) -> Result<()> {
        self.ensure_present()?;
        ensure!(
            self.reserved == 0,
            InvalidState,
            "{} tokens are reserved; commit or truncate before compaction",
            self.reserved
        );
        ensure!(self.has_memory(), Unsupported, "a sequence of a pool holds no rows to compact");
        let len = self.lanes[index].len();
        ensure!(
            keep.end() <= len,
            InvalidArgument,
            "the keep set ends at {}, the lane has {len} rows",
            keep.end()
        );
        if keep.len() == len {
            return Ok(());
        }
        let trimmed = if values.is_empty() { self.trim(index, keep) } else { None };
        let lane = match trimmed {
            Some(lane) => lane,
            None => self.gather(index, keep, values)?,
        };
        self.install(index, lane, keep, len);
        Ok(())
    }

    /// Makes `lane` the new lane `index`, lets go of the blocks it no longer uses and lets the
    /// observations follow.
    fn install(&mut self, index: usize, lane: Lane, keep: &KeepSet, len: usize) {
        if self.lossless {
            self.leave_prefix();
        }
        let old = std::mem::replace(&mut self.lanes[index], lane);
        // Spans keep their order, so one walk over both lists finds the blocks that are gone.
        let mut kept = self.lanes[index].spans.iter().map(|span| span.block.id).peekable();
        let ids = old.spans.iter().map(|span| span.block.id);
        let gone: Vec<_> = ids.filter(|id| kept.next_if_eq(id).is_none()).collect();
        self.cache.release(gone.into_iter(), std::iter::empty());

        let shape = self.cache.config().shape;
        let mut heads = 0;
        for layer in 0..shape.num_layers {
            for head in 0..shape.num_kv_heads {
                if self.locate(layer, head).0 != index {
                    continue;
                }
                heads += 1;
                if let Some(observation) = &self.observation {
                    observation.head(layer, head).lock().keep(keep, len);
                }
            }
        }
        let evicted = heads * (len - keep.len());
        self.evicted += evicted as u64;
        Cache::count(&self.cache.counters.tokens_evicted, evicted);
        self.touch();
    }

    /// The lane with trimmed spans, if that is possible without wasting blocks.
    fn trim(&self, index: usize, keep: &KeepSet) -> Option<Lane> {
        let old = &self.lanes[index];
        let block_size = self.cache.config().block_size;
        let mut lane = Lane { spans: Vec::new(), evicted: old.evicted };
        let mut ranges = keep.ranges().iter().cloned().peekable();
        let (mut start, mut evicted) = (0, 0);
        for (i, span) in old.spans.iter().enumerate() {
            let end = start + span.count as usize;
            let inside = runs_within(&mut ranges, start..end);
            let run = match inside.as_slice() {
                [] => None,
                [run] => Some(run.clone()),
                _ => return None,
            };
            // Later rows go behind the last row of the open tail, which therefore has to stay.
            let is_open_tail = i + 1 == old.spans.len() && !span.sealed;
            match run {
                Some(run) if is_open_tail && run.end < end => return None,
                Some(run) => {
                    let skipped = run.start - start;
                    let mut kept = span.clone();
                    kept.first += skipped as u32;
                    kept.count = run.len() as u32;
                    kept.evicted_before += (evicted + skipped) as i32;
                    lane.spans.push(kept);
                    evicted += span.count as usize - run.len();
                }
                None => evicted += span.count as usize,
            }
            start = end;
        }
        lane.evicted += evicted as i32;
        let enough = keep.len().div_ceil(block_size) + TRIM_SLACK;
        (lane.spans.len() <= enough).then_some(lane)
    }

    /// The lane with its survivors copied into new blocks: full ones sealed, the rest open.
    fn gather(&self, index: usize, keep: &KeepSet, values: &[Vec<f32>]) -> Result<Lane> {
        let cache = &self.cache;
        let block_size = cache.config().block_size;
        let old = &self.lanes[index];
        let sources = sources(old, keep);
        let (full, rest) = (sources.len() / block_size, sources.len() % block_size);
        let mut blocks = Vec::new();
        cache.allocate(full, cache.sealed_format(), &mut blocks)?;
        if rest > 0
            && let Err(error) = cache.allocate(1, OPEN, &mut blocks)
        {
            cache.release(blocks.iter().map(|block| block.id), std::iter::empty());
            return Err(error);
        }
        let evicted = old.evicted + (old.len() - sources.len()) as i32;
        let mut lane = Lane { spans: Vec::with_capacity(blocks.len()), evicted };
        for (i, (rows, block)) in sources.chunks(block_size).zip(blocks).enumerate() {
            self.fill(index, rows, block, i * block_size, evicted, values);
            lane.spans.push(Span {
                block,
                first: 0,
                count: rows.len() as u32,
                sealed: rows.len() == block_size,
                evicted_before: evicted,
                positions: self.positions_of(old, rows),
            });
        }
        Ok(lane)
    }

    /// Copies `sources` into `block`; the first of them gets index `start` in the lane.
    fn fill(
        &self,
        lane: usize,
        sources: &[Source],
        block: Block,
        start: usize,
        evicted: i32,
        values: &[Vec<f32>],
    ) {
        let cache = &self.cache;
        let spans = &self.lanes[lane].spans;
        let dim = cache.config().shape.head_dim;
        let cells = cache.config().lane_width.cells(&cache.config().shape);
        let target = block.view.format();
        let is_full = sources.len() == cache.config().block_size;
        let mut rows = vec![0.0; sources.len() * dim];
        for cell in 0..cells {
            for side in SIDES {
                let new = values.get(cell).filter(|new| side == Side::Value && !new.is_empty());
                let as_bytes = new.is_none()
                    && (side == Side::Value || !self.config.cache_relative)
                    && sources.iter().all(|source| {
                        let format = spans[source.span as usize].block.view.format();
                        cache.moves_as_bytes(format, target, side)
                    });
                if as_bytes {
                    for (row, source) in sources.iter().enumerate() {
                        let view = &spans[source.span as usize].block.view;
                        cache.move_row((view, source.row as usize), (&block.view, row), cell, side);
                    }
                    continue;
                }
                match new {
                    Some(new) => rows.copy_from_slice(&new[start * dim..][..sources.len() * dim]),
                    None => self.decode_sources(lane, sources, cell, side, &mut rows),
                }
                if side == Side::Key && self.config.cache_relative {
                    self.rotate_sources(lane, sources, start, evicted, &mut rows);
                }
                if is_full {
                    cache.encode_cell(&block.view, cell, side, &rows);
                } else {
                    for (row, values) in rows.chunks_exact(dim).enumerate() {
                        cache.write_row(&block.view, cell, side, row, values);
                    }
                }
            }
        }
    }

    fn decode_sources(
        &self,
        lane: usize,
        sources: &[Source],
        cell: usize,
        side: Side,
        rows: &mut [f32],
    ) {
        let dim = self.cache.config().shape.head_dim;
        let spans = &self.lanes[lane].spans;
        let mut at = 0;
        // Neighbouring rows of one block are decoded together.
        for run in sources.chunk_by(|a, b| a.span == b.span && a.row + 1 == b.row) {
            let view = &spans[run[0].span as usize].block.view;
            let range = run[0].row as usize..run[0].row as usize + run.len();
            let out = &mut rows[at * dim..][..run.len() * dim];
            self.cache.read_rows(view, cell, side, range, out);
            at += run.len();
        }
    }

    /// Turns keys so that their phases close up: row `start + i` of the new lane gets the phase
    /// `start + i + evicted`, which ends right before the position of the next token.
    fn rotate_sources(
        &self,
        lane: usize,
        sources: &[Source],
        start: usize,
        evicted: i32,
        rows: &mut [f32],
    ) {
        let Some(rope) = &self.cache.config().rope else { return };
        let dim = self.cache.config().shape.head_dim;
        let spans = &self.lanes[lane].spans;
        let mut first_index = Vec::with_capacity(spans.len());
        let mut index = 0;
        for span in spans {
            first_index.push(index);
            index += span.count as i32;
        }
        for (i, (source, row)) in sources.iter().zip(rows.chunks_exact_mut(dim)).enumerate() {
            let span = &spans[source.span as usize];
            let old = first_index[source.span as usize] + (source.row - span.first) as i32;
            let phase = old + span.evicted_before;
            let wanted = (start + i) as i32 + evicted;
            if wanted != phase {
                rope.rotate(row, wanted - phase);
            }
        }
    }

    /// Positions of gathered rows, followed by those that the next tokens will have.
    fn positions_of(&self, old: &Lane, rows: &[Source]) -> Positions {
        let known = rows
            .iter()
            .map(|source| old.spans[source.span as usize].positions.at(source.row as usize));
        let next = (self.committed as i32)..;
        let list: Arc<[i32]> = known.chain(next).take(self.cache.config().block_size).collect();
        Positions::List(list)
    }
}

/// The parts of `ranges` inside `window`; a range that crosses its end is left for the next call.
fn runs_within(
    ranges: &mut std::iter::Peekable<impl Iterator<Item = Range<usize>>>,
    window: Range<usize>,
) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    while let Some(range) = ranges.peek() {
        if range.start >= window.end {
            break;
        }
        runs.push(range.start.max(window.start)..range.end.min(window.end));
        if range.end > window.end {
            break;
        }
        ranges.next();
    }
    runs
}

/// Every surviving row in order.
fn sources(lane: &Lane, keep: &KeepSet) -> Vec<Source> {
    let mut sources = Vec::with_capacity(keep.len());
    let mut ranges = keep.ranges().iter().cloned().peekable();
    let mut start = 0;
    for (i, span) in lane.spans.iter().enumerate() {
        let end = start + span.count as usize;
        for run in runs_within(&mut ranges, start..end) {
            let row = |index: usize| (index - start) as u32 + span.first;
            sources.extend(run.map(|index| Source { span: i as u32, row: row(index) }));
        }
        start = end;
    }
    sources
}
