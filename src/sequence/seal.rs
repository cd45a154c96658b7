//! Sealing: a full block gets its final format, once, when its tokens have left the residual window.
//!
//! ```text
//! | first: stay open | sealed | sealed | ... | residual window: open | tail |
//! ```

use super::{Lane, Positions, Sequence, Span};
use crate::cache::{Block, OPEN};

impl Sequence {
    /// Seals every full block that nobody shares, unless it holds tokens of the residual window.
    pub(super) fn seal_full(&mut self) {
        self.fit_bases();
        let due = self.due_blocks();
        if !due.is_empty() {
            let blocks: Vec<Block> =
                due.iter().map(|(lane, span)| self.lanes[*lane].spans[*span].block).collect();
            let cells = self.cache.config().lane_width.cells(&self.cache.config().shape);
            let bases = self.bases.as_deref();
            let basis = |i: usize, cell, side| {
                bases.and_then(|bases| bases.get(due[i].0 * cells + cell, side))
            };
            let views = self.cache.seal(&blocks, &basis);
            for ((lane, span), view) in due.iter().zip(views) {
                let span = &mut self.lanes[*lane].spans[*span];
                if let Some(view) = view {
                    span.block.view = view;
                    span.sealed = true;
                }
            }
        }
        for lane in &mut self.lanes {
            let open = lane.spans.iter().skip(lane.first_open);
            lane.first_open += open.take_while(|span| span.sealed).count();
        }
    }

    /// The lane and span of each block that is to be encoded. Those that are full and stay in the open format
    /// are sealed as they are.
    fn due_blocks(&mut self) -> Vec<(usize, usize)> {
        let block_size = self.cache.config().block_size;
        let limit = self.residual_start();
        let waits = self.awaits_bases();
        let mut due = Vec::new();
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            let last = lane.spans.len().saturating_sub(1);
            for i in lane.first_open..lane.spans.len() {
                let span = &mut lane.spans[i];
                if span.sealed {
                    continue;
                }
                // Only the last block has rows that are not written.
                let is_full = i < last || span.end() == block_size;
                if !is_full || span.last_position() >= limit {
                    break;
                }
                if self.cache.format_of(index, span.position(0)) == OPEN {
                    span.sealed = true;
                } else if waits {
                    break;
                } else {
                    due.push((index, i));
                }
            }
        }
        due
    }

    /// The position of the first committed token of the residual window.
    pub(super) fn residual_start(&self) -> i32 {
        self.committed.saturating_sub(self.cache.config().exact().residual) as i32
    }

    /// The format of a block of lane `index` with rows of these positions, ascending, and whether it is
    /// sealed in it.
    pub(super) fn format_of_rows(&self, index: usize, positions: &[i32]) -> (usize, bool) {
        let is_full = positions.len() == self.cache.config().block_size;
        match (positions.first(), positions.last()) {
            (Some(first), Some(last)) if is_full && *last < self.residual_start() => {
                let format = self.cache.format_of(index, *first);
                if format != OPEN && self.awaits_bases() { (OPEN, false) } else { (format, true) }
            }
            _ => (OPEN, false),
        }
    }
}

impl Lane {
    /// After rows were dropped: `next` is the position of the next token. An open tail whose last rows
    /// were evicted before is closed, because its next row stands for an earlier position.
    pub(super) fn close_gap(&mut self, next: i32) {
        self.first_open = self.first_open.min(self.spans.len());
        if let Some(Span { positions: Positions::From(start), first, count, sealed, .. }) =
            self.spans.last_mut()
            && !*sealed
        {
            *sealed = *start + (*first + *count) as i32 != next;
        }
    }
}
