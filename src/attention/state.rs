//! The mergeable state of attention: an unnormalised output with its maximum and its denominator.
//!
//! ```text
//! m = max logit     l = sum exp(logit - m)     o = sum exp(logit - m) v
//! merge:  m = max(m1, m2),  x = x1 exp(m1 - m) + x2 exp(m2 - m)  for x in l, o
//! ```
//!
//! The empty state has `m = -inf`; it must never meet another `-inf` in a subtraction.

use std::ops::Range;

use crate::quantizer::basis::Basis;
use crate::simd::{Kernels, Softmax};

/// `rows` states, each with an output of `dim` elements.
#[derive(Debug, Default)]
pub(crate) struct States {
    pub(crate) max: Vec<f32>,
    pub(crate) sum: Vec<f32>,
    pub(crate) out: Vec<f32>,
    /// What `out` was last multiplied with.
    factor: Vec<f32>,
    dim: usize,
}

impl States {
    /// Makes `rows` empty states.
    pub(crate) fn reset(&mut self, rows: usize, dim: usize) {
        self.dim = dim;
        self.max.clear();
        self.max.resize(rows, f32::NEG_INFINITY);
        self.sum.clear();
        self.sum.resize(rows, 0.0);
        self.out.clear();
        self.out.resize(rows * dim, 0.0);
        self.factor.resize(rows, 1.0);
    }

    /// Makes every state empty again.
    pub(crate) fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.out.fill(0.0);
    }

    /// Becomes a copy of `other`, in the memory that is there if it is enough.
    pub(crate) fn copy_from(&mut self, other: &Self) {
        self.dim = other.dim;
        self.max.clone_from(&other.max);
        self.sum.clone_from(&other.sum);
        self.out.clone_from(&other.out);
    }

    /// Becomes a copy of some rows of `other`.
    pub(crate) fn copy_rows_from(&mut self, other: &Self, rows: Range<usize>) {
        self.reset(0, other.dim);
        self.max.extend_from_slice(&other.max[rows.clone()]);
        self.sum.extend_from_slice(&other.sum[rows.clone()]);
        self.out.extend_from_slice(&other.out[rows.start * other.dim..rows.end * other.dim]);
    }

    /// Raises the maximum of a row to at least `max` and scales what it holds.
    pub(crate) fn raise(&mut self, row: usize, max: f32) {
        let old = self.max[row];
        if max <= old {
            return;
        }
        self.max[row] = max;
        if old == f32::NEG_INFINITY {
            return; // Nothing to scale yet.
        }
        let factor = (old - max).exp();
        self.sum[row] *= factor;
        self.out[row * self.dim..][..self.dim].iter_mut().for_each(|x| *x *= factor);
    }

    /// Turns logits of the rows from `first` on, `[rows, n]`, into weights, `exp(logit - maximum)`, and
    /// adds them to the denominators. The values times these weights are then the caller's to add to
    /// `out`.
    pub(crate) fn weigh(&mut self, first: usize, n: usize, scores: &mut [f32], kernels: &Kernels) {
        let rows = first..first + scores.len() / n;
        let mut softmax = Softmax {
            max: &mut self.max[rows.clone()],
            sum: &mut self.sum[rows.clone()],
            factor: &mut self.factor[rows.clone()],
        };
        kernels.weigh(scores, &mut softmax);
        for row in rows {
            if self.factor[row] != 1.0 {
                let out = &mut self.out[row * self.dim..][..self.dim];
                kernels.scale(out, self.factor[row]);
            }
        }
    }

    /// Turns outputs in a subspace into outputs; `buffer` is for them.
    pub(crate) fn restore(&mut self, basis: &Basis, buffer: &mut Vec<f32>) {
        buffer.resize(self.max.len() * basis.dim(), 0.0);
        basis.restore(&self.out, buffer);
        std::mem::swap(&mut self.out, buffer);
        self.dim = basis.dim();
    }

    /// Adds the states of `other`.
    pub(crate) fn merge(&mut self, other: &Self) {
        for row in 0..self.max.len() {
            if other.max[row] == f32::NEG_INFINITY {
                continue;
            }
            self.raise(row, other.max[row]);
            let factor = (other.max[row] - self.max[row]).exp();
            self.sum[row] += factor * other.sum[row];
            let range = row * self.dim..(row + 1) * self.dim;
            for (x, y) in self.out[range.clone()].iter_mut().zip(&other.out[range]) {
                *x += factor * y;
            }
        }
    }

    /// Adds a logit that has no value: a learned sink.
    pub(crate) fn add_sink(&mut self, row: usize, logit: f32) {
        if logit == f32::NEG_INFINITY {
            return;
        }
        self.raise(row, logit);
        self.sum[row] += (logit - self.max[row]).exp();
    }

    /// Divides by the denominator; answers the log-sum-exp. An empty row becomes zeros.
    pub(crate) fn finish(&mut self, row: usize) -> f32 {
        let out = &mut self.out[row * self.dim..][..self.dim];
        if self.max[row] == f32::NEG_INFINITY {
            out.fill(0.0);
            return f32::NEG_INFINITY;
        }
        let factor = 1.0 / self.sum[row];
        out.iter_mut().for_each(|x| *x *= factor);
        self.max[row] + self.sum[row].ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_parts_equals_the_whole_and_empty_parts_change_nothing() {
        let logits = [3.0f32, -1.0, 80.0, 79.5];
        let add = |states: &mut States, logit: f32, value: f32| {
            states.raise(0, logit);
            let p = (logit - states.max[0]).exp();
            states.sum[0] += p;
            states.out[0] += p * value;
        };
        let make = |range: Range<usize>| {
            let mut states = States::default();
            states.reset(1, 1);
            range.for_each(|i| add(&mut states, logits[i], i as f32));
            states
        };
        let mut whole = make(0..4);
        let mut merged = make(0..2);
        merged.merge(&make(2..4));
        merged.merge(&make(0..0));
        let (a, b) = (whole.finish(0), merged.finish(0));
        assert!((a - b).abs() < 1e-5 && (whole.out[0] - merged.out[0]).abs() < 1e-5);
        let mut empty = make(0..0);
        empty.merge(&make(0..0));
        assert_eq!((empty.finish(0), empty.out[0]), (f32::NEG_INFINITY, 0.0));
        empty.add_sink(0, -2.0);
        assert_eq!(empty.finish(0), -2.0);
    }
}
