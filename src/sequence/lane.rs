//! Lanes: the block tables of a sequence.
//!
//! A lane is a list of spans. A span is a run of rows of one block that the sequence still needs;
//! the order of spans and rows is the order of positions. Policies drop rows by trimming spans or
//! by gathering survivors into new blocks; they never change a block that exists.
//!
//! A policy that demotes puts the rows of a lower format in front of the others. Positions ascend within
//! each span all the same, and among the spans that are not demoted.

use std::sync::Arc;

use crate::cache::Block;

/// Original positions of the rows of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Positions {
    /// Row `r` holds position `start + r`.
    From(i32),
    /// Row `r` holds `list[r]`; the list covers the whole block, and rows not written yet have
    /// the positions that they will get.
    List(Arc<[i32]>),
}

impl Positions {
    /// The position of `row`.
    pub fn at(&self, row: usize) -> i32 {
        match self {
            Self::From(start) => start + row as i32,
            Self::List(list) => list[row],
        }
    }
}

/// A run of rows of one block. Each span has a reference of its own to its block; those of one block
/// are neighbours in a lane.
#[derive(Debug, Clone)]
pub struct Span {
    /// The block.
    pub block: Block,
    /// First row.
    pub first: u32,
    /// Rows, at least 1.
    pub count: u32,
    /// Whether the block may no longer be written.
    pub sealed: bool,
    /// Whether the block holds what a policy has demoted; such spans come first in their lane.
    pub demoted: bool,
    /// Rows evicted from this lane at lower positions; what `cache_relative` attention
    /// subtracts from a position to get the index inside the cache.
    pub evicted_before: i32,
    /// Original positions of the rows of the block.
    pub positions: Positions,
}

impl Span {
    /// The row after the last.
    pub fn end(&self) -> usize {
        (self.first + self.count) as usize
    }

    /// The position of the `i`-th row of the span.
    pub fn position(&self, i: usize) -> i32 {
        self.positions.at(self.first as usize + i)
    }

    /// The position of the last row.
    pub fn last_position(&self) -> i32 {
        self.positions.at(self.end() - 1)
    }

    /// Rows at positions below `limit`. Positions ascend within a span.
    pub fn rows_below(&self, limit: i32) -> usize {
        let count = self.count as usize;
        match &self.positions {
            Positions::From(start) => {
                let below = i64::from(limit) - i64::from(*start) - i64::from(self.first);
                below.clamp(0, count as i64) as usize
            }
            Positions::List(list) => {
                list[self.first as usize..self.end()].partition_point(|position| *position < limit)
            }
        }
    }
}

/// One block table.
#[derive(Debug, Clone, Default)]
pub struct Lane {
    /// Runs of rows in order.
    pub spans: Vec<Span>,
    /// Rows evicted so far.
    pub evicted: i32,
    /// Every span before this one is sealed.
    pub(super) first_open: usize,
}

impl Lane {
    /// A lane of these spans.
    pub(super) fn new(spans: Vec<Span>, evicted: i32) -> Self {
        Self { spans, evicted, first_open: 0 }
    }

    /// Rows of all spans.
    pub fn len(&self) -> usize {
        self.spans.iter().map(|span| span.count as usize).sum()
    }

    /// The leading spans that are demoted.
    pub fn num_demoted_spans(&self) -> usize {
        self.spans.partition_point(|span| span.demoted)
    }

    /// Rows that are demoted.
    pub fn num_demoted(&self) -> usize {
        let demoted = &self.spans[..self.num_demoted_spans()];
        demoted.iter().map(|span| span.count as usize).sum()
    }

    /// The rows of a lane with demoted ones by ascending position; `None` for others, which are in this
    /// order already.
    pub fn order(&self) -> Option<Vec<u32>> {
        if self.num_demoted_spans() == 0 {
            return None;
        }
        let rows = self.spans.iter().flat_map(|span| span.first as usize..span.end());
        let spans = self.spans.iter().flat_map(|span| (0..span.count).map(move |_| span));
        let positions: Vec<i32> =
            spans.zip(rows).map(|(span, row)| span.positions.at(row)).collect();
        let mut order: Vec<u32> = (0..positions.len() as u32).collect();
        order.sort_unstable_by_key(|row| positions[*row as usize]);
        Some(order)
    }

    /// The last rows whose positions follow each other without a gap.
    pub fn rows_without_gap(&self) -> usize {
        let (mut rows, mut next) = (0, None);
        for span in self.spans.iter().rev() {
            let last = span.last_position();
            if next.is_some_and(|next| last + 1 != next) {
                break;
            }
            // Positions ascend, so that before a gap all are lower than they would be without.
            let count = span.count as usize;
            let is_behind = |i: &usize| (last - span.position(*i)) as usize == count - 1 - i;
            let own = (0..count).rev().take_while(is_behind).count();
            rows += own;
            if own < count {
                break;
            }
            next = Some(span.position(0));
        }
        rows
    }

    /// After tokens at positions of `next` and above were dropped: evicted rows among them count no more.
    /// Rows of a span were all moved by the same number, so if indices matter (`is_relative`) those that
    /// come do not go to an open block whose rows were moved by another.
    pub(super) fn forget_evicted(&mut self, next: i32, is_relative: bool) {
        self.evicted = next - self.len() as i32;
        if let Some(tail) = self.spans.last_mut().filter(|_| is_relative) {
            tail.sealed |= tail.evicted_before != self.evicted;
        }
    }

    /// The blocks of the lane, each once.
    pub fn blocks(&self) -> impl Iterator<Item = &Block> {
        let groups = self.spans.chunk_by(|a, b| a.block.id == b.block.id);
        groups.map(|spans| &spans[0].block)
    }

    /// Whether the lane holds no row.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Rows that can still be written into the last block.
    pub fn room(&self, block_size: usize) -> usize {
        match self.spans.last() {
            Some(tail) if !tail.sealed => block_size - tail.end(),
            _ => 0,
        }
    }

    /// The last `n` rows as runs `(span, first row, rows)` in order. `n` is at most [`Self::len`].
    pub fn tail(spans: &[Span], n: usize) -> impl Iterator<Item = (&Span, usize, usize)> {
        let mut start = spans.len();
        let mut found = 0;
        while found < n {
            start -= 1;
            found += spans[start].count as usize;
        }
        let mut skip = found - n;
        spans[start..].iter().map(move |span| {
            let skipped = std::mem::take(&mut skip);
            (span, span.first as usize + skipped, span.count as usize - skipped)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::BlockId;
    use crate::cache::BlockView;

    fn span(positions: Positions, first: u32, count: u32) -> Span {
        let block = Block { id: BlockId(0), view: BlockView::none() };
        Span { block, first, count, sealed: true, demoted: false, evicted_before: 0, positions }
    }

    #[test]
    fn rows_count_until_a_position_is_missing() {
        let list = |positions: &[i32]| Positions::List(positions.into());
        let rows = |spans: &[Span]| Lane::new(spans.to_vec(), 0).rows_without_gap();
        let tail = span(Positions::From(8), 0, 5);
        assert_eq!(rows(&[]), 0);
        assert_eq!(rows(std::slice::from_ref(&tail)), 5);
        // Positions 3, 5, 6, 7, then 8 to 12; of the first block some rows.
        let gathered = list(&[1, 3, 5, 6, 7]);
        assert_eq!(rows(&[span(gathered.clone(), 1, 4), tail.clone()]), 8);
        assert_eq!(rows(&[span(gathered.clone(), 2, 3), tail.clone()]), 8);
        assert_eq!(rows(&[span(gathered, 0, 4), tail.clone()]), 5, "7 is missing");
        assert_eq!(rows(&[span(list(&[7, 9]), 0, 2), span(Positions::From(10), 0, 1)]), 2);
        assert_eq!(rows(&[span(Positions::From(0), 2, 6), tail]), 11);
    }
}
