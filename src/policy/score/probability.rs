//! Attention probabilities of a few queries: the primitive behind window scores.

use crate::simd::{Format, Kernels, Rows};

/// Keys that are multiplied with all queries while they are in the fastest cache.
const TILE: usize = 32;

/// The causal attention of one query head's last queries over one KV head, and its buffers.
#[derive(Debug)]
pub struct WindowProbabilities {
    kernels: &'static Kernels,
    rows: Vec<f32>,
    tile: Vec<u8>,
    products: Vec<f32>,
}

impl WindowProbabilities {
    /// Buffers that run on `kernels`.
    pub fn new(kernels: &'static Kernels) -> Self {
        Self { kernels, rows: Vec::new(), tile: Vec::new(), products: Vec::new() }
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
            self.tile.clear();
            self.tile.extend(keys.iter().flat_map(|x| x.to_le_bytes()));
            let count = keys.len() / dim;
            let rows = Rows { bytes: &self.tile, stride: dim * 4, count, dim, group: dim };
            self.products.resize(num_queries * count, 0.0);
            self.kernels.dot(Format::F32, &rows, queries, &mut self.products);
            for (t, products) in self.products.chunks_exact(count).enumerate() {
                self.rows[t * len + start..][..count].copy_from_slice(products);
            }
        }
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
