//! Which spans of a lane a head attends to, and the explicit lists that say so.
//!
//! ```text
//! lane       0 1 2 3 4 5 6 7      spans; 6 and 7 hold the planned tokens
//! list         1     4            from `select`, for one layer and KV head
//! walk         1     4   6 7      what attention visits; offsets count rows of the walk
//! ```

use crate::error::{Result, ensure};
use crate::sequence::Span;

/// Spans in order, with the rows before each.
#[derive(Debug, Clone, Copy)]
pub(super) struct Walk<'a> {
    /// Every span of the lane.
    pub(super) spans: &'a [Span],
    /// The index in the lane of the first row of each span.
    pub(super) starts: &'a [usize],
    /// Rows of the lane.
    pub(super) len: usize,
    /// The spans to visit, if not all of them.
    pub(super) chosen: Option<Chosen<'a>>,
}

/// Spans chosen from a lane.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chosen<'a> {
    /// Indices of spans, ascending.
    spans: &'a [u32],
    /// Chosen rows before each of them.
    offsets: &'a [usize],
    /// Chosen rows.
    rows: usize,
}

/// A list of spans of a lane.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    spans: Vec<u32>,
    offsets: Vec<usize>,
    rows: usize,
}

impl Clone for Blocks {
    fn clone(&self) -> Self {
        Self { spans: self.spans.clone(), offsets: self.offsets.clone(), rows: self.rows }
    }

    fn clone_from(&mut self, other: &Self) {
        self.spans.clone_from(&other.spans);
        self.offsets.clone_from(&other.offsets);
        self.rows = other.rows;
    }
}

impl Blocks {
    pub(super) fn clear(&mut self) {
        self.spans.clear();
        self.offsets.clear();
        self.rows = 0;
    }

    /// Adds spans of a lane, ascending.
    pub(super) fn extend(&mut self, lane: &[Span], spans: impl Iterator<Item = u32>) {
        for span in spans {
            self.spans.push(span);
            self.offsets.push(self.rows);
            self.rows += lane[span as usize].count as usize;
        }
    }

    /// The list for a walk.
    pub(super) fn chosen(&self) -> Chosen<'_> {
        Chosen { spans: &self.spans, offsets: &self.offsets, rows: self.rows }
    }
}

/// One stop of a walk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stop<'a> {
    pub(super) span: &'a Span,
    /// The index in the lane of its first row.
    pub(super) index: usize,
    /// Rows of the walk before it.
    pub(super) offset: usize,
}

impl<'a> Walk<'a> {
    /// Rows of the walk.
    pub(super) fn rows(&self) -> usize {
        self.chosen.map_or(self.len, |chosen| chosen.rows)
    }

    /// Stops of the walk.
    pub(super) fn num_stops(&self) -> usize {
        self.chosen.map_or(self.spans.len(), |chosen| chosen.spans.len())
    }

    pub(super) fn stop(&self, i: usize) -> Stop<'a> {
        let Some(chosen) = self.chosen else {
            return Stop { span: &self.spans[i], index: self.starts[i], offset: self.starts[i] };
        };
        let span = chosen.spans[i] as usize;
        let (index, offset) = (self.starts[span], chosen.offsets[i]);
        Stop { span: &self.spans[span], index, offset }
    }

    /// The stop that holds row `row` of the walk, or the number of stops.
    pub(super) fn stop_of(&self, row: usize) -> usize {
        let offsets = self.chosen.map_or(self.starts, |chosen| chosen.offsets);
        if row >= self.rows() {
            return offsets.len();
        }
        offsets.partition_point(|offset| *offset <= row) - 1
    }
}

/// The lists of one layer for every head of the batch; not in use until filled.
#[derive(Debug, Default)]
pub(super) struct Selection {
    in_use: bool,
    /// For each head of each sequence, the end of its run in `spans` and its rows.
    heads: Vec<(usize, usize)>,
    spans: Vec<u32>,
    offsets: Vec<usize>,
}

impl Selection {
    /// Back to all blocks.
    pub(super) fn clear(&mut self) {
        self.in_use = false;
        self.heads.clear();
        self.spans.clear();
        self.offsets.clear();
    }

    /// Adds the list of the next head: `list` and the spans of the last `num_queries` rows.
    pub(super) fn push(&mut self, lane: Walk<'_>, num_queries: usize, list: &[u32]) -> Result<()> {
        let num_spans = lane.spans.len();
        check_list(list, num_spans)?;
        let tail = lane.stop_of(lane.len - num_queries) as u32;
        let mut rows = 0;
        for span in list.iter().copied().filter(|span| *span < tail).chain(tail..num_spans as u32) {
            self.spans.push(span);
            self.offsets.push(rows);
            rows += lane.spans[span as usize].count as usize;
        }
        self.heads.push((self.spans.len(), rows));
        Ok(())
    }

    /// Puts the pushed lists to use.
    pub(super) fn apply(&mut self) {
        self.in_use = true;
    }

    /// The list of a head, if there are lists.
    pub(super) fn head(&self, head: usize) -> Option<Chosen<'_>> {
        if !self.in_use {
            return None;
        }
        let start = if head == 0 { 0 } else { self.heads[head - 1].0 };
        let (end, rows) = self.heads[head];
        Some(Chosen { spans: &self.spans[start..end], offsets: &self.offsets[start..end], rows })
    }
}

/// Refuses a list of blocks of a lane that is not one.
pub(super) fn check_list(list: &[u32], num_spans: usize) -> Result<()> {
    for (i, block) in list.iter().enumerate() {
        ensure!(
            (*block as usize) < num_spans,
            InvalidArgument,
            "blocks[{i}] is {block}, the lane has {num_spans} blocks"
        );
        ensure!(
            i == 0 || list[i - 1] < *block,
            InvalidArgument,
            "blocks[{i}] is {block} after {}; a list must ascend",
            list[i - 1]
        );
    }
    Ok(())
}
