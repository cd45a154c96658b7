//! Queries in the form that loops over rows of integers want, made once for many rows.

use super::rows::{Format, Rows};

/// Queries as integers for the rows of one format. There are none where a level makes no use of them,
/// or where integers cannot stand for a query: it is not finite, or too large or too small.
#[derive(Debug, Default)]
pub struct IntegerQueries {
    /// The format, the elements of a query, and how many there are.
    shape: Option<(Format, usize, usize)>,
    /// Words, sums and factors in the order of the level that made them.
    pub(super) words: Vec<i32>,
    pub(super) sums: Vec<i32>,
    pub(super) factors: Vec<f32>,
}

impl IntegerQueries {
    /// Forgets the queries.
    pub fn clear(&mut self) {
        self.shape = None;
    }

    pub(super) fn set_shape(&mut self, format: Format, dim: usize, count: usize) {
        self.shape = Some((format, dim, count));
    }

    /// Whether there are `count` queries for these rows.
    pub(super) fn fits(&self, format: Format, rows: &Rows<'_>, count: usize) -> bool {
        self.shape == Some((format, rows.dim, count))
    }
}

/// The loops of a level that want queries as integers.
#[derive(Debug, Clone, Copy)]
pub(super) struct IntegerKernels {
    /// Elements of a query, queries, room for them; `false` if integers cannot stand for one.
    pub(super) prepare: fn(usize, &[f32], &mut IntegerQueries) -> bool,
    /// Rows, queries, scores.
    pub(super) dot: fn(&Rows<'_>, &IntegerQueries, &mut [f32]),
    /// Elements of the longest query.
    pub(super) max_dim: usize,
}
