//! Compaction: a lane keeps the rows that a policy chose and frees the blocks of the others.
//!
//! Blocks never change. As long as few blocks are left partly used, spans are trimmed and split:
//! nothing is copied, which is all that sink-and-recent policies need, and spares those that evict a
//! token at each step from copying a lane each time. Otherwise survivors are gathered into new blocks:
//! as bytes where the format allows it, through f32 where it does not. Other sequences that share the
//! old blocks do not notice.

use std::ops::Range;
use std::sync::Arc;

use super::demote::Groups;
use super::{HeadObservation, Lane, Positions, Sequence, Span};
use crate::cache::{Block, BlockView, Cache, OPEN};
use crate::error::{Result, ensure};
use crate::quantizer::Side;
use crate::shape::KeepSet;

/// Blocks beyond what the survivors need that a trim may leave before a gather is the better choice;
/// for long lanes a sixteenth of what they need.
const TRIM_SLACK: usize = 2;

/// A block of a lane that rows are gathered into.
#[derive(Debug)]
pub(super) struct NewBlock<'a> {
    format: usize,
    sealed: bool,
    demoted: bool,
    pub(super) rows: &'a [Source],
    /// The index of the first of them in the lane.
    start: usize,
}

/// Where a surviving row is now.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source {
    pub(super) span: u32,
    pub(super) row: u32,
}

impl Source {
    pub(super) fn position(&self, lane: &Lane) -> i32 {
        lane.spans[self.span as usize].positions.at(self.row as usize)
    }
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
        self.ensure_compactable()?;
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
        if let Some(observation) = &self.observation {
            observation.fetch_sums()?;
        }
        ensure!(
            values.is_empty() || self.lanes[index].num_demoted_spans() == 0,
            Unsupported,
            "values of lanes with demoted rows cannot change"
        );
        ensure!(
            values.is_empty() || self.cache.gpu().is_none(),
            Unsupported,
            "values of rows on a CUDA device cannot change yet"
        );
        let trimmed = if values.is_empty() { self.trim(index, keep) } else { None };
        if let Some(lane) = trimmed {
            self.install(index, lane, len, |head| head.keep(keep, len));
            return Ok(());
        }
        let groups = Groups::new(&self.lanes[index], keep, &[], self.cache.config().block_size);
        let lane = self.gather(index, &groups, OPEN, values)?;
        match groups.order(&self.lanes[index]) {
            Some(order) => self.install(index, lane, len, |head| head.reorder(&order, len)),
            None => self.install(index, lane, len, |head| head.keep(keep, len)),
        }
        Ok(())
    }

    /// Refuses what cannot lose or move rows now.
    pub(super) fn ensure_compactable(&self) -> Result<()> {
        self.ensure_present()?;
        ensure!(
            self.reserved == 0,
            InvalidState,
            "{} tokens are reserved; commit or truncate before compaction",
            self.reserved
        );
        ensure!(self.has_memory(), Unsupported, "a sequence of a pool holds no rows to compact");
        Ok(())
    }

    /// Makes `lane` the new lane `index`, which had `len` rows, lets go of the blocks it no longer uses
    /// and lets the observations `follow`.
    pub(super) fn install(
        &mut self,
        index: usize,
        lane: Lane,
        len: usize,
        follow: impl Fn(&mut HeadObservation),
    ) {
        if self.lossless {
            self.leave_prefix();
        }
        let old = std::mem::replace(&mut self.lanes[index], lane);
        // Spans that stay keep their order and come before new ones, and those of a block are neighbours. So
        // one walk over both lists finds the references that are gone, or that split spans have besides.
        let mut kept = self.lanes[index].spans.iter().map(|span| span.block.id).peekable();
        let (mut gone, mut more) = (Vec::new(), Vec::new());
        for spans in old.spans.chunk_by(|a, b| a.block.id == b.block.id) {
            let id = spans[0].block.id;
            let mut left = spans.len();
            while kept.next_if_eq(&id).is_some() {
                match left {
                    0 => more.push(id),
                    _ => left -= 1,
                }
            }
            gone.extend(std::iter::repeat_n(id, left));
        }
        if !more.is_empty() {
            self.cache.retain(more);
        }
        if !gone.is_empty() {
            self.cache.release(gone.into_iter(), std::iter::empty());
        }

        let heads = self.follow_lane(index, follow);
        let evicted = heads * (len - self.lanes[index].len());
        self.evicted += evicted as u64;
        Cache::count(&self.cache.counters.tokens_evicted, evicted);
        self.touch();
    }

    /// The lane with trimmed and split spans, if that is possible without wasting blocks.
    fn trim(&self, index: usize, keep: &KeepSet) -> Option<Lane> {
        let old = &self.lanes[index];
        let block_size = self.cache.config().block_size;
        let needed = keep.len().div_ceil(block_size);
        // Splits are for a few rows at a time; where whole blocks can be had, a gather has them.
        let rows: usize = old.spans.iter().map(|span| span.count as usize).sum();
        let may_split = rows - keep.len() < block_size;
        let slack = TRIM_SLACK.max(needed / 16);
        let mut lane = Lane::new(Vec::with_capacity(old.spans.len() + 1), old.evicted);
        let mut ranges = keep.ranges().iter().cloned().peekable();
        let (mut start, mut evicted, mut blocks) = (0, 0, 0);
        for (i, span) in old.spans.iter().enumerate() {
            let end = start + span.count as usize;
            let (before, mut next) = (lane.spans.len(), start);
            for run in runs_within(&mut ranges, start..end) {
                evicted += run.start - next;
                next = run.end;
                let mut kept = span.clone();
                kept.first += (run.start - start) as u32;
                kept.count = run.len() as u32;
                kept.evicted_before += evicted as i32;
                lane.spans.push(kept);
            }
            evicted += end - next;
            if i < old.first_open {
                lane.first_open = lane.spans.len();
            }
            // Later rows go behind the last row of the open tail, and an open block is sealed through
            // its span, which therefore has to stay one.
            let runs = lane.spans.len() - before;
            let is_open_tail = i + 1 == old.spans.len() && !span.sealed;
            let is_split = runs > 1 && (!span.sealed || !may_split);
            if is_split || is_open_tail && runs == 1 && next < end {
                return None;
            }
            let last = before.checked_sub(1).map(|last| lane.spans[last].block.id);
            let is_new = last != Some(span.block.id);
            blocks += usize::from(is_new && runs > 0);
            start = end;
        }
        lane.evicted += evicted as i32;
        let few = blocks <= needed + slack && lane.spans.len() <= 4 * needed + slack;
        (few && self.gaps_are_finite(index, &lane)).then_some(lane)
    }

    /// Whether the values of rows that `lane` loses from between others of their block are finite:
    /// attention goes over such rows with a weight of 0. On a device it does not look at them.
    fn gaps_are_finite(&self, index: usize, lane: &Lane) -> bool {
        if self.cache.gpu().is_some() {
            return true;
        }
        let is_same = |a: &Span, b: &Span| a.block.id == b.block.id;
        let mut blocks = self.lanes[index].spans.chunk_by(is_same);
        lane.spans.chunk_by(is_same).filter(|spans| spans.len() > 1).all(|spans| {
            let Some(old) = blocks.find(|old| is_same(&old[0], &spans[0])) else { return true };
            let gaps = spans.windows(2).map(|pair| pair[0].end()..pair[1].first as usize);
            let mut lost = gaps.flat_map(|gap| {
                let part =
                    move |span: &Span| gap.start.max(span.first as usize)..gap.end.min(span.end());
                old.iter().map(part)
            });
            lost.all(|rows| rows.is_empty() || self.values_are_finite(index, &spans[0].block, rows))
        })
    }

    fn values_are_finite(&self, lane: usize, block: &Block, rows: Range<usize>) -> bool {
        let shape = &self.cache.config().shape;
        let mut values = vec![0.0f32; rows.len() * shape.value_row_dim()];
        (0..self.cache.config().lane_width.cells(shape)).all(|cell| {
            let basis = self.basis(lane, cell, Side::Value, block.view.format());
            let rows = rows.clone();
            self.cache.read_rows(&block.view, cell, Side::Value, rows, basis, &mut values);
            values.iter().all(|x| x.is_finite())
        })
    }

    /// The lane with rows copied into new blocks: those of `groups.low` in the format `low`, or in the
    /// demoted format they have; of the others full blocks before the residual window are sealed.
    pub(super) fn gather(
        &self,
        index: usize,
        groups: &Groups,
        low: usize,
        values: &[Vec<f32>],
    ) -> Result<Lane> {
        let old = &self.lanes[index];
        let block_size = self.cache.config().block_size;
        let positions_of = |rows: &[Source]| -> Vec<i32> {
            rows.iter().map(|source| source.position(old)).collect()
        };
        let is_on_device = self.cache.gpu().is_some();
        let mut plan: Vec<NewBlock<'_>> = Vec::new();
        let mut start = groups.whole.len() * block_size;
        for rows in groups.low.chunks(block_size) {
            let span = &old.spans[rows[0].span as usize];
            let format = if span.demoted { span.block.view.format() } else { low };
            plan.push(NewBlock { format, sealed: true, demoted: true, rows, start });
            start += rows.len();
        }
        for rows in groups.high.chunks(block_size) {
            let mut format = self.format_of_rows(index, &positions_of(rows));
            if is_on_device {
                format = self.format_on_device(index, format, rows);
            }
            let (format, sealed) = format;
            plan.push(NewBlock { format, sealed, demoted: false, rows, start });
            start += rows.len();
        }
        let formats: Vec<usize> = plan.iter().map(|new| new.format).collect();
        let mut blocks = Vec::new();
        self.cache.allocate_each(&formats, &mut blocks)?;
        let evicted = old.evicted + (old.len() - groups.len(old)) as i32;
        if is_on_device {
            if let Err(error) = self.fill_on_device(index, &plan, &blocks, evicted) {
                self.cache.release(blocks.iter().map(|block| block.id), std::iter::empty());
                return Err(error);
            }
        } else {
            let views: Vec<_> = old.spans.iter().map(|span| span.block.view).collect();
            for (new, block) in plan.iter().zip(&blocks) {
                self.fill(index, new, &block.view, &views, evicted, values);
            }
        }
        let mut spans: Vec<Span> = groups.whole.iter().map(|i| old.spans[*i].clone()).collect();
        for (NewBlock { sealed, demoted, rows, .. }, block) in plan.into_iter().zip(blocks) {
            let (count, positions) = (rows.len() as u32, self.positions_of(old, rows));
            let evicted_before = evicted;
            spans.push(Span { block, first: 0, count, sealed, demoted, evicted_before, positions });
        }
        Ok(Lane::new(spans, evicted))
    }

    /// Copies rows into the block `view` of the host. `views` are the blocks of the spans of the lane.
    pub(super) fn fill(
        &self,
        lane: usize,
        new: &NewBlock<'_>,
        view: &BlockView,
        views: &[BlockView],
        evicted: i32,
        values: &[Vec<f32>],
    ) {
        let cache = &self.cache;
        let &NewBlock { rows: sources, start, .. } = new;
        let cells = cache.config().lane_width.cells(&cache.config().shape);
        let target = view.format();
        let is_full = sources.len() == cache.config().block_size;
        let mut rows = Vec::new();
        for cell in 0..cells {
            for &side in cache.sides() {
                let dim = cache.formats()[OPEN].dim(side);
                rows.resize(sources.len() * dim, 0.0);
                let new = values.get(cell).filter(|new| side == Side::Value && !new.is_empty());
                let as_bytes = new.is_none()
                    && (side == Side::Value || !self.config.cache_relative)
                    && sources.iter().all(|source| {
                        let format = views[source.span as usize].format();
                        cache.moves_as_bytes(format, target, side)
                    });
                if as_bytes {
                    for (row, source) in sources.iter().enumerate() {
                        let source = (&views[source.span as usize], source.row as usize);
                        cache.move_row(source, (view, row), cell, side);
                    }
                    continue;
                }
                match new {
                    Some(new) => rows.copy_from_slice(&new[start * dim..][..sources.len() * dim]),
                    None => self.decode_sources(lane, sources, views, (cell, side), &mut rows),
                }
                if side == Side::Key && self.config.cache_relative {
                    self.rotate_sources(lane, sources, start, evicted, &mut rows);
                }
                if is_full {
                    let basis = self.basis(lane, cell, side, target);
                    cache.encode_cell(view, cell, side, &rows, basis);
                } else {
                    for (row, values) in rows.chunks_exact(dim).enumerate() {
                        cache.write_row(view, cell, side, row, values);
                    }
                }
            }
        }
    }

    fn decode_sources(
        &self,
        lane: usize,
        sources: &[Source],
        views: &[BlockView],
        (cell, side): (usize, Side),
        rows: &mut [f32],
    ) {
        let dim = rows.len() / sources.len();
        let mut at = 0;
        // Neighbouring rows of one block are decoded together.
        for run in sources.chunk_by(|a, b| a.span == b.span && a.row + 1 == b.row) {
            let view = &views[run[0].span as usize];
            let range = run[0].row as usize..run[0].row as usize + run.len();
            let out = &mut rows[at * dim..][..run.len() * dim];
            let basis = self.basis(lane, cell, side, view.format());
            self.cache.read_rows(view, cell, side, range, basis, out);
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
        let known = rows.iter().map(|source| source.position(old));
        let next = (self.committed as i32)..;
        let list: Arc<[i32]> = known.chain(next).take(self.cache.config().block_size).collect();
        Positions::List(list)
    }
}

/// The parts of `ranges` inside `window`; a range that crosses its end is left for the next call.
fn runs_within(
    ranges: &mut std::iter::Peekable<impl Iterator<Item = Range<usize>>>,
    window: Range<usize>,
) -> impl Iterator<Item = Range<usize>> {
    let mut is_over = false;
    std::iter::from_fn(move || {
        let range = ranges.peek().filter(|range| range.start < window.end && !is_over)?.clone();
        is_over = range.end > window.end;
        if !is_over {
            ranges.next();
        }
        Some(range.start.max(window.start)..range.end.min(window.end))
    })
}

/// Every surviving row in order.
pub(super) fn sources(lane: &Lane, keep: &KeepSet) -> Vec<Source> {
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
