//! Sealing: a full block gets its final format, once, when its tokens have left the residual window.
//!
//! ```text
//! | first: stay open | sealed | sealed | ... | residual window: open | tail |
//! ```

use super::{Lane, Positions, Sequence, Span};
use crate::cache::OPEN;

impl Sequence {
    /// Seals every full block that nobody shares, unless it holds tokens of the residual window.
    pub(super) fn seal_full(&mut self) {
        self.fit_bases();
        let block_size = self.cache.config().block_size;
        let cells = self.cache.config().lane_width.cells(&self.cache.config().shape);
        let limit = self.residual_start();
        let bases = self.bases.as_deref();
        let waits = self.awaits_bases();
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            let basis = |cell, side| bases.and_then(|bases| bases.get(index * cells + cell, side));
            let last = lane.spans.len().saturating_sub(1);
            for i in lane.first_open..lane.spans.len() {
                let span = &mut lane.spans[i];
                if !span.sealed {
                    // Only the last block has rows that are not written.
                    let is_full = i < last || span.end() == block_size;
                    if !is_full || span.last_position() >= limit {
                        break;
                    }
                    let format = self.cache.format_of(index, span.position(0));
                    if format == OPEN {
                        span.sealed = true;
                    } else if waits {
                        break;
                    } else if let Some(view) = self.cache.seal(span.block, &basis) {
                        span.block.view = view;
                        span.sealed = true;
                    }
                }
                lane.first_open += usize::from(span.sealed && i == lane.first_open);
            }
        }
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
