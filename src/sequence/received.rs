//! What cached rows receive from single queries, until it is known whether these queries count.
//!
//! The query of a reserved token may be one of a draft that is never committed. Its probabilities wait
//! here, by position, and a commit adds those of the tokens that became real.

use crate::shape::{KeepSet, Needs};
use crate::simd;

/// Most reserved tokens whose queries are told apart: drafts. More are a piece of a prompt, whose
/// queries count at once.
pub const MAX_DRAFTS: usize = 64;

/// Probabilities of one KV head, each summed over the query heads of the group.
#[derive(Debug, Clone, Default)]
pub struct Received {
    /// Over all queries that count so far, for each row.
    pub sums: Vec<f32>,
    /// Of the last query that counts, if the policy asks for it.
    last: Vec<f32>,
    /// Of queries of reserved tokens, by ascending position.
    pending: Vec<(i32, Vec<f32>)>,
    /// Buffers that are used again.
    spare: Vec<Vec<f32>>,
}

impl Received {
    /// Probabilities that the last query gave each row, `[rows]`; empty if none counts yet.
    pub fn last(&self) -> &[f32] {
        &self.last
    }

    /// Makes room for what the query at `position` gives each of `rows` rows. Layers of a model that
    /// share the keys of one layer all add to it.
    pub fn start(&mut self, position: i32, rows: usize) {
        let place = self.pending.partition_point(|(other, _)| *other < position);
        if self.pending.get(place).is_some_and(|(other, _)| *other == position) {
            return;
        }
        let mut row = self.spare.pop().unwrap_or_default();
        row.clear();
        row.resize(rows, 0.0);
        self.pending.insert(place, (position, row));
    }

    /// The probabilities of the query at `position`, if they were started.
    pub fn pending(&mut self, position: i32) -> Option<&mut Vec<f32>> {
        let place = self.pending.binary_search_by_key(&position, |(other, _)| *other).ok()?;
        Some(&mut self.pending[place].1)
    }

    /// Tokens below `limit` are real now: their queries count for what is asked, the others never.
    pub fn commit(&mut self, limit: i32, asked: Needs) {
        for (position, mut row) in self.pending.drain(..) {
            if position < limit && asked.contains(Needs::COLUMN_SUM) {
                add_rows(&mut self.sums, &row);
            }
            if position < limit && asked.contains(Needs::LAST_ROW) {
                std::mem::swap(&mut self.last, &mut row);
            }
            self.spare.push(row);
        }
    }

    /// Adds what the first rows have received.
    pub fn add(&mut self, rows: &[f32]) {
        add_rows(&mut self.sums, rows);
    }

    /// Keeps what surviving rows of a lane of `len` rows received.
    pub fn keep(&mut self, keep: &KeepSet, len: usize) {
        for plane in [&mut self.sums, &mut self.last] {
            keep_rows(plane, keep, len, 0.0);
        }
    }

    /// Row `i` is now what row `order[i]` of `len` was.
    pub fn reorder(&mut self, order: &[u32], len: usize) {
        for plane in [&mut self.sums, &mut self.last] {
            reorder_rows(plane, order, len, 0.0);
        }
    }

    /// Forgets rows from `len` on, and the last query if it is among the tokens that are gone.
    pub fn truncate_rows(&mut self, len: usize) {
        self.sums.truncate(len);
        self.pending.iter_mut().for_each(|(_, row)| row.truncate(len));
        if self.last.len() > len {
            self.last.clear();
        }
    }
}

/// Adds to the sums of the first rows, of which new ones begin at 0.
fn add_rows(sums: &mut Vec<f32>, rows: &[f32]) {
    sums.resize(sums.len().max(rows.len()), 0.0);
    simd::active().axpy_f32(1.0, rows, &mut sums[..rows.len()]);
}

/// Keeps the surviving elements of a plane with one element for each of `len` rows, of which missing
/// ones are `missing`. An empty plane stays empty.
pub(super) fn keep_rows(plane: &mut Vec<f32>, keep: &KeepSet, len: usize, missing: f32) {
    if plane.is_empty() {
        return;
    }
    plane.resize(len, missing);
    let mut end = 0;
    for range in keep.ranges() {
        plane.copy_within(range.clone(), end);
        end += range.len();
    }
    plane.truncate(end);
}

/// Element `i` of a plane becomes what element `order[i]` of `len` was, of which missing ones are
/// `missing`. An empty plane stays empty.
pub(super) fn reorder_rows(plane: &mut Vec<f32>, order: &[u32], len: usize, missing: f32) {
    if plane.is_empty() {
        return;
    }
    plane.resize(len, missing);
    *plane = order.iter().map(|row| plane[*row as usize]).collect();
}
