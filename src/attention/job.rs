//! What one task sees: which rows of which spans, at which distance.
//!
//! ```text
//!            rows of the lane
//! query 0    0 0 s s s                 s: shared piece, all queries of the task at once
//! query 1      1 s s s 1               0, 1, 2: pieces of one query, at the start of a sliding window
//! query 2        s s s 2 2             and at the end of what a query sees
//! ```
//!
//! Every query of a piece may see every row of it. So a row is never weighted with 0 to hide it from
//! another query: 0 times NaN would not hide it. The one exception are
//! rows that a policy has evicted between others of their block: whoever split the span has made sure
//! that their values are finite, and such a piece goes over them rather than be many short ones.

use std::ops::Range;

use super::plan::{Planned, PlannedLane};
use super::tasks::{Extent, Task};
use super::walk::{Stop, Walk};
use crate::sequence::Span;

/// A task with everything it refers to.
pub(super) struct Job<'a> {
    pub(super) task: Task,
    pub(super) sequence: &'a Planned,
    pub(super) lane: &'a PlannedLane,
    pub(super) walk: Walk<'a>,
    /// The rows that the task is a part of, unless they are those of the walk.
    pub(super) extent: Range<usize>,
    /// The rows of Q and O of the queries of several sequences.
    pub(super) tokens: &'a [usize],
    pub(super) cell: usize,
    pub(super) group: usize,
    /// Elements of a query and of a key.
    pub(super) dim: usize,
    /// Elements of a row of values, and of what is summed up: no less than an output has.
    pub(super) out_dim: usize,
}

/// Rows of a span, or of all spans of a block, and the queries of the task that see them.
#[derive(Debug, Clone)]
pub(super) struct Piece<'a> {
    pub(super) span: &'a Span,
    /// Index in the lane of the first row.
    pub(super) index: usize,
    /// Rows of the block, those that were evicted between spans included.
    pub(super) rows: Range<usize>,
    /// All spans of the piece if they are several, for tasks of one query; else empty.
    pub(super) spans: &'a [Span],
    /// Queries of the task.
    pub(super) queries: Range<usize>,
}

impl<'a> Piece<'a> {
    /// The piece of several spans of one block, the first of which is at `index`, for the only query.
    fn of_spans(spans: &'a [Span], index: usize) -> Self {
        let rows = spans[0].first as usize..spans[spans.len() - 1].end();
        Self { span: &spans[0], index, rows, spans, queries: 0..1 }
    }

    /// Some rows of the piece, counted from its first; `None` if there are none.
    fn part(&self, rows: Range<usize>) -> Option<Self> {
        let Range { start, end } = rows;
        let rows = self.rows.start + start..self.rows.start + end;
        let queries = self.queries.clone();
        (start < end).then(|| Self { index: self.index + start, rows, queries, ..*self })
    }

    /// The same for one of the queries.
    fn of_query(&self, query: usize, rows: Range<usize>) -> Option<Self> {
        self.part(rows).map(|part| Self { queries: query..query + 1, ..part })
    }

    /// Hides evicted rows: their logits in `scores`, `[n, rows]`, become negative infinity.
    pub(super) fn hide_evicted(&self, scores: &mut [f32]) {
        for pair in self.spans.windows(2) {
            let gap = pair[0].end() - self.rows.start..pair[1].first as usize - self.rows.start;
            for row in scores.chunks_exact_mut(self.rows.len()) {
                row[gap.clone()].fill(f32::NEG_INFINITY);
            }
        }
    }

    /// The position of the `i`-th row.
    pub(super) fn position(&self, i: usize) -> i32 {
        self.span.positions.at(self.rows.start + i)
    }
}

impl<'a> Job<'a> {
    /// Query vectors of the task: `[num_queries, group]`.
    pub(super) fn rows(&self) -> usize {
        self.task.num_queries * self.group
    }

    /// The row of Q and O of a query vector.
    pub(super) fn token(&self, row: usize) -> usize {
        match self.task.extent {
            Extent::Shared(_) => self.tokens[row / self.group],
            _ => self.sequence.first_token + self.task.first_query + row / self.group,
        }
    }

    /// The query head of a query vector.
    pub(super) fn q_head(&self, row: usize) -> usize {
        self.task.kv_head * self.group + row % self.group
    }

    /// The position of a query of the task.
    pub(super) fn position(&self, query: usize) -> i32 {
        let from_end = self.sequence.num_queries - self.task.first_query - query;
        (self.sequence.num_tokens - from_end) as i32
    }

    /// How far row `i` of a piece is behind a query.
    pub(super) fn distance(&self, query: usize, piece: &Piece<'_>, i: usize) -> i64 {
        if self.sequence.cache_relative {
            self.last_index(query) as i64 - (piece.index + i) as i64
        } else {
            i64::from(self.position(query)) - i64::from(piece.position(i))
        }
    }

    /// Rows of a piece, from its first, that are at a distance of `window` or more.
    pub(super) fn beyond(&self, query: usize, piece: &Piece<'_>, window: u32) -> usize {
        // Distances fall along a piece.
        let is_beyond = |i: usize| self.distance(query, piece, i) >= i64::from(window);
        let (mut low, mut high) = (0, piece.rows.len());
        while low < high {
            let i = low.midpoint(high);
            if is_beyond(i) { low = i + 1 } else { high = i }
        }
        low
    }

    /// Positions by which a query is turned back so that the keys of `span` appear at their index.
    pub(super) fn shift(&self, span: &Span) -> i32 {
        if self.sequence.cache_relative { self.lane.evicted - span.evicted_before } else { 0 }
    }

    /// The pieces of a span, or the one of several `spans` of its block.
    pub(super) fn pieces(
        &self,
        stop: Stop<'a>,
        spans: &'a [Span],
        window: u32,
    ) -> impl Iterator<Item = Piece<'a>> {
        let whole = (!spans.is_empty()).then(|| Piece::of_spans(spans, stop.index));
        let single = whole.is_none().then(|| self.pieces_of_span(stop, window));
        whole.into_iter().chain(single.into_iter().flatten())
    }

    fn pieces_of_span(&self, stop: Stop<'a>, window: u32) -> impl Iterator<Item = Piece<'a>> {
        let num_queries = self.task.num_queries;
        let shared_end = self.last_index(0) + 1;
        let hidden = move |query, piece: &Piece<'_>| match window {
            0 => 0,
            _ => self.beyond(query, piece, window),
        };
        let own = move |query| {
            let rows = shared_end..self.last_index(query) + 1;
            let piece = self.piece(stop, rows, query..query + 1)?;
            let first = hidden(query, &piece);
            let rows = first..piece.rows.len();
            piece.of_query(query, rows)
        };
        let is_diagonal = stop.index + stop.span.count as usize > shared_end;
        let owners = if is_diagonal { 1..num_queries } else { 0..0 };
        let all = self.piece(stop, 0..shared_end, 0..num_queries);
        // The last query's window starts last.
        let first = all.as_ref().map_or(0, |all| hidden(num_queries - 1, all));
        let shared = all.as_ref().and_then(|all| all.part(first..all.rows.len()));
        let lookers = if first > 0 { 0..num_queries - 1 } else { 0..0 };
        let before = lookers.filter_map(move |query| {
            let all = all.as_ref()?;
            all.of_query(query, hidden(query, all)..first)
        });
        before.chain(shared).chain(owners.filter_map(own))
    }

    /// The rows `lane_rows` of the lane that lie in the span and in the task's part.
    fn piece(
        &self,
        Stop { span, index, offset }: Stop<'a>,
        lane_rows: Range<usize>,
        queries: Range<usize>,
    ) -> Option<Piece<'a>> {
        let part = self.part();
        let start = index + part.start.saturating_sub(offset);
        let start = start.max(lane_rows.start);
        let end = index + (span.count as usize).min(part.end.saturating_sub(offset));
        let end = end.min(lane_rows.end);
        if start >= end {
            return None;
        }
        let row = |i: usize| span.first as usize + i - index;
        Some(Piece { span, index: start, rows: row(start)..row(end), spans: &[], queries })
    }

    /// The index in the lane of the token of a query of the task: the last it may see.
    pub(super) fn last_index(&self, query: usize) -> usize {
        if let Extent::Shared(_) = self.task.extent {
            return self.lane.len - 1; // Shared rows are before all queries.
        }
        self.lane.len - self.sequence.num_queries + self.task.first_query + query
    }

    /// The rows of the walk that the task attends to.
    pub(super) fn part(&self) -> Range<usize> {
        let Task { part, num_parts, .. } = self.task;
        let Range { start, end } = match self.task.extent {
            Extent::All => 0..self.walk.rows(),
            _ => self.extent.clone(),
        };
        let edge = |part| start + part * (end - start) / num_parts;
        edge(part)..edge(part + 1)
    }
}
