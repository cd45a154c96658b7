//! The index of a selector over the blocks of one KV head, kept in step with its lane.

use super::Span;
use crate::selector::{Index, NewBlocks, Selector};
use crate::shape::KeepSet;

/// An index, and how many rows each of its blocks has.
#[derive(Debug)]
pub struct BlockIndex {
    index: Box<dyn Index>,
    rows: Vec<u32>,
}

impl Clone for BlockIndex {
    fn clone(&self) -> Self {
        Self { index: self.index.fork(), rows: self.rows.clone() }
    }
}

impl BlockIndex {
    /// An index without blocks for keys of `dim` elements.
    pub fn new(selector: &dyn Selector, dim: usize) -> Self {
        Self { index: selector.index(dim), rows: Vec::new() }
    }

    /// Makes the index one of exactly `spans`, which are the first of their lane and will not change.
    /// `read` decodes the keys of a span; `received` is what rows of the lane have received.
    pub fn follow(
        &mut self,
        spans: &[Span],
        dim: usize,
        received: &[f32],
        mut read: impl FnMut(&Span, &mut [f32]),
    ) {
        // Rows before the first that was evicted are what they were; but others may share their block.
        let is_same = |(rows, span): &(&u32, &Span)| **rows == span.count;
        let known = self.rows.iter().zip(spans).take_while(is_same).count();
        self.truncate(known);
        if known == spans.len() {
            return;
        }
        let before: u32 = self.rows.iter().sum();
        self.rows.extend(spans[known..].iter().map(|span| span.count));
        let rows = &self.rows[known..];
        let count: u32 = rows.iter().sum();
        let mut keys = vec![0.0; count as usize * dim];
        let mut rest = &mut keys[..];
        for span in &spans[known..] {
            let (keys, tail) = rest.split_at_mut(span.count as usize * dim);
            read(span, keys);
            rest = tail;
        }
        let received = received.get(before as usize..(before + count) as usize).unwrap_or(&[]);
        self.index.extend(&NewBlocks { keys: &keys, rows, received });
    }

    /// See [`Index::score`].
    pub fn score(&mut self, queries: &[f32], scores: &mut [f32]) {
        self.index.score(queries, scores);
    }

    /// Bytes of what it knows.
    pub fn bytes(&self) -> usize {
        self.index.bytes()
    }

    /// Forgets blocks that lose rows, and those behind them.
    pub(super) fn keep(&mut self, keep: &KeepSet) {
        let whole = keep.ranges().first().filter(|range| range.start == 0);
        self.truncate_rows(whole.map_or(0, |range| range.end));
    }

    /// Forgets blocks that reach beyond the first `len` rows.
    pub(super) fn truncate_rows(&mut self, len: usize) {
        let mut end = 0;
        let fits = |rows: &&u32| {
            end += **rows as usize;
            end <= len
        };
        let known = self.rows.iter().take_while(fits).count();
        self.truncate(known);
    }

    fn truncate(&mut self, blocks: usize) {
        if blocks < self.rows.len() {
            self.rows.truncate(blocks);
            self.index.truncate(blocks);
        }
    }
}
