//! Attention probabilities of a few queries: the primitive behind window scores.

use crate::error::{Result, ensure};
use crate::policy::{HeadInput, HeadScores, LayerInput};
use crate::simd::{self, Format, Kernels, Rows};

/// Keys that are multiplied with all queries while they are in the fastest cache.
const TILE: usize = 32;

/// The causal attention of one query head's last queries over one KV head, and its buffers.
#[derive(Debug)]
pub struct WindowProbabilities {
    kernels: &'static Kernels,
    rows: Vec<f32>,
    products: Vec<f32>,
}

impl WindowProbabilities {
    /// Buffers that run on `kernels`.
    pub fn new(kernels: &'static Kernels) -> Self {
        Self { kernels, rows: Vec::new(), products: Vec::new() }
    }

    /// `P[t, j] = softmax over j of queries[t] . keys[j] / sqrt(dim)` with `queries` `[n, dim]`,
    /// `keys` `[T, dim]` and the result `[n, T]`. Query `t` sees the keys `j < visible(t)`; the
    /// other columns are 0. A row whose scores hold NaN is NaN.
    pub fn compute(
        &mut self,
        keys: &[f32],
        queries: &[f32],
        dim: usize,
        visible: impl Fn(usize) -> usize,
    ) -> &[f32] {
        let len = keys.len() / dim;
        self.multiply(keys, queries, dim);
        let scale = 1.0 / (dim as f32).sqrt();
        for (t, row) in self.rows.chunks_exact_mut(len.max(1)).enumerate() {
            let (seen, hidden) = row.split_at_mut(visible(t).min(len));
            hidden.fill(0.0);
            self.kernels.scale(seen, scale);
            let max = self.kernels.max(seen);
            let sum = self.kernels.exp_sub(seen, max);
            self.kernels.scale(seen, 1.0 / sum);
        }
        &self.rows
    }

    /// `rows[t, j] = queries[t] . keys[j]`.
    fn multiply(&mut self, keys: &[f32], queries: &[f32], dim: usize) {
        let (len, num_queries) = (keys.len() / dim, queries.len() / dim);
        self.rows.resize(num_queries * len, 0.0);
        for (start, keys) in (0..len).step_by(TILE).zip(keys.chunks(TILE * dim)) {
            let count = keys.len() / dim;
            self.products.resize(num_queries * count, 0.0);
            let keys = Rows::of_f32(keys, dim);
            self.kernels.dot(Format::F32, &keys, queries, &mut self.products);
            for (t, products) in self.products.chunks_exact(count).enumerate() {
                self.rows[t * len + start..][..count].copy_from_slice(products);
            }
        }
    }
}

/// The last queries of a head and what they see of its tokens.
#[derive(Debug)]
pub(in crate::policy) struct QueryWindow<'a> {
    head: &'a HeadInput<'a>,
    dim: usize,
    /// Queries in the window, at least 1.
    pub(super) queries: usize,
    /// Tokens before the window; the others are protected.
    pub(super) old: usize,
}

impl<'a> QueryWindow<'a> {
    /// The scores that `score` gives the tokens before the last `w` queries of each head, of as many
    /// elements as there are tokens. Heads of at most `w` tokens stay whole. `name` is that of the
    /// stage. If fewer queries were observed, the window is as short as they are.
    pub(in crate::policy) fn score_heads(
        name: &str,
        w: usize,
        layer: &LayerInput<'_>,
        mut score: impl FnMut(&QueryWindow<'_>, &mut WindowProbabilities) -> Vec<f32>,
    ) -> Result<Vec<HeadScores>> {
        let mut probabilities = WindowProbabilities::new(simd::active());
        let mut one = |head: &HeadInput<'_>| {
            let len = head.positions.len();
            if len <= w {
                return Ok(HeadScores { scores: vec![0.0; len], protected: vec![true; len] });
            }
            let queries = head.num_queries.min(w);
            ensure!(queries > 0, InvalidState, "{name} has observed no queries of the last tokens");
            let mut window = QueryWindow { head, dim: layer.head_dim, queries, old: 0 };
            window.old = window.up_to(window.position(0) - 1);
            let scores = score(&window, &mut probabilities);
            Ok(HeadScores { scores, protected: (0..len).map(|i| i >= window.old).collect() })
        };
        layer.heads.iter().map(&mut one).collect()
    }

    /// Tokens of the head.
    pub(in crate::policy) fn len(&self) -> usize {
        self.head.positions.len()
    }

    /// Positions of the tokens of the head.
    pub(super) fn positions(&self) -> &'a [i32] {
        self.head.positions
    }

    /// The position of query `t` of the window.
    pub(super) fn position(&self, t: usize) -> i64 {
        let last = self.head.positions[self.len() - 1];
        i64::from(last) - (self.queries - 1 - t) as i64
    }

    /// Calls `each` with the probabilities `[queries, T]` of each query head of the group.
    pub(super) fn for_each_query_head(
        &self,
        probabilities: &mut WindowProbabilities,
        mut each: impl FnMut(usize, &[f32]),
    ) {
        let HeadInput { keys, queries, num_queries, .. } = *self.head;
        for (g, queries) in queries.chunks_exact(num_queries * self.dim).enumerate() {
            let last = &queries[(num_queries - self.queries) * self.dim..];
            let visible = |t| self.up_to(self.position(t));
            each(g, probabilities.compute(keys, last, self.dim, visible));
        }
    }

    /// `[T]`: for each token before the window, the sum of what the queries of all query heads give it,
    /// query `t` of the window times `weight(t)`; 0 for the window.
    pub(super) fn weighted_sums(
        &self,
        probabilities: &mut WindowProbabilities,
        weight: impl Fn(usize) -> f32,
    ) -> Vec<f32> {
        let mut sums = vec![0.0f32; self.len()];
        self.for_each_query_head(probabilities, |_, rows| {
            for (t, row) in rows.chunks_exact(self.len()).enumerate() {
                let weight = weight(t);
                sums[..self.old].iter_mut().zip(row).for_each(|(sum, p)| *sum += weight * p);
            }
        });
        sums
    }

    /// Over the queries of the window, mean and variance of what they give each token before it, on the
    /// mean over the query heads: `[old]` each.
    pub(in crate::policy) fn moments(
        &self,
        probabilities: &mut WindowProbabilities,
    ) -> (Vec<f32>, Vec<f32>) {
        let mut rows = vec![0.0f32; self.queries * self.old];
        let mut group = 0;
        self.for_each_query_head(probabilities, |_, all| {
            group += 1;
            for (sums, row) in rows.chunks_exact_mut(self.old.max(1)).zip(all.chunks(self.len())) {
                sums.iter_mut().zip(row).for_each(|(sum, p)| *sum += p);
            }
        });
        let scale = 1.0 / (self.queries * group.max(1)) as f32;
        let mut mean = vec![0.0f32; self.old];
        for row in rows.chunks_exact(self.old.max(1)) {
            mean.iter_mut().zip(row).for_each(|(mean, sum)| *mean += sum * scale);
        }
        let mut variance = vec![0.0f32; self.old];
        for row in rows.chunks_exact(self.old.max(1)) {
            for ((variance, sum), mean) in variance.iter_mut().zip(row).zip(&mean) {
                let deviation = sum / group.max(1) as f32 - mean;
                *variance += deviation * deviation / self.queries as f32;
            }
        }
        (mean, variance)
    }

    /// Tokens up to a position. Those of the window may have been evicted, so what a query sees goes
    /// by position.
    fn up_to(&self, last: i64) -> usize {
        self.head.positions.partition_point(|position| i64::from(*position) <= last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + seed) * 37 % 101) as f32 - 50.0) / 20.0).collect()
    }

    /// One row in f64, the obvious way.
    fn slow(keys: &[f32], query: &[f32], visible: usize) -> Vec<f64> {
        let dim = query.len();
        let logit = |key: &[f32]| {
            let dot: f64 = key.iter().zip(query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            dot / (dim as f64).sqrt()
        };
        let logits: Vec<f64> = keys.chunks_exact(dim).take(visible).map(logit).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
        logits.iter().map(|x| (x - max).exp() / sum).collect()
    }

    #[test]
    fn rows_agree_with_f64_on_every_level_and_size() {
        for kernels in simd::available() {
            let mut window = WindowProbabilities::new(kernels);
            for (len, n, dim) in [(1, 1, 1), (31, 3, 12), (32, 9, 64), (33, 1, 80), (200, 17, 8)] {
                let (keys, queries) = (values(len * dim, 0), values(n * dim, 5));
                let visible = |t: usize| len + t + 1 - n;
                let rows = window.compute(&keys, &queries, dim, visible);
                assert_eq!(rows.len(), n * len);
                for (t, row) in rows.chunks_exact(len).enumerate() {
                    let expected = slow(&keys, &queries[t * dim..][..dim], visible(t));
                    for (j, p) in row.iter().enumerate() {
                        let expected = expected.get(j).copied().unwrap_or(0.0);
                        let error = (f64::from(*p) - expected).abs();
                        assert!(error <= 5e-6 * expected, "{len} {n} {dim} {t} {j}: {p}");
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_to_see_and_bad_values_do_not_panic() {
        let mut window = WindowProbabilities::new(simd::active());
        assert!(window.compute(&[], &[1.0, 2.0], 2, |_| 0).is_empty());
        assert!(window.compute(&[1.0, 2.0], &[], 2, |_| 1).is_empty());
        assert_eq!(window.compute(&[1.0, 2.0], &[1.0, 2.0], 2, |_| 0), [0.0]);
        let rows = window.compute(&[f32::NAN, 1.0, 2.0], &[1.0], 1, |_| 3);
        assert!(rows.iter().all(|p| p.is_nan()));
        _ = window.compute(&[f32::INFINITY, f32::MAX], &[f32::MAX], 1, |_| 2);
    }
}
