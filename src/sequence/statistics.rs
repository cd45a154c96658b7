//! Running mean and covariance of the queries of one head: what a policy may know of all queries
//! without keeping any.

use crate::simd;

/// Statistics of the queries of one query head, before RoPE.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct QueryStatistics {
    count: usize,
    /// `[dim]`.
    mean: Vec<f32>,
    /// Products of deviations from the mean, summed over queries, `[dim, dim]`.
    spread: Vec<f32>,
}

impl QueryStatistics {
    /// Adds the queries `rows` `[n, dim]`, which become their deviations from their own mean. Whole
    /// tiles are merged by their means, so that nothing cancels.
    pub fn add(&mut self, rows: &mut [f32], dim: usize) {
        let added = rows.len() / dim;
        if added == 0 {
            return;
        }
        self.mean.resize(dim, 0.0);
        self.spread.resize(dim * dim, 0.0);
        let kernels = simd::active();
        let mut mean = vec![0.0f32; dim];
        for row in rows.chunks_exact(dim) {
            kernels.axpy_f32(1.0 / added as f32, row, &mut mean);
        }
        for row in rows.chunks_exact_mut(dim) {
            kernels.axpy_f32(-1.0, &mean, row);
            self.add_product(row, 1.0);
        }
        let total = self.count + added;
        kernels.axpy_f32(-1.0, &self.mean, &mut mean);
        let weight = self.count as f32 * (added as f32 / total as f32);
        self.add_product(&mean, weight);
        kernels.axpy_f32(added as f32 / total as f32, &mean, &mut self.mean);
        self.count = total;
    }

    /// `spread += weight * row rowᵀ`.
    fn add_product(&mut self, row: &[f32], weight: f32) {
        let kernels = simd::active();
        for (x, out) in row.iter().zip(self.spread.chunks_exact_mut(row.len())) {
            kernels.axpy_f32(weight * x, row, out);
        }
    }

    /// Queries seen.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The mean `[dim]`; empty before the first query.
    pub fn mean(&self) -> &[f32] {
        &self.mean
    }

    /// The population covariance `[dim, dim]`; empty before the first query.
    pub fn covariance(&self) -> impl Iterator<Item = f32> + '_ {
        let scale = 1.0 / self.count.max(1) as f32;
        self.spread.iter().map(move |sum| sum * scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_agree_with_the_textbook_in_f64() {
        let (dim, n) = (12, 200);
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 20.0 + 30.0;
        let rows: Vec<f32> = (0..n * dim).map(value).collect();
        let mut found = QueryStatistics::default();
        let mut start = 0;
        for tile in [1, 16, 7, 0, 100, 76] {
            found.add(&mut rows[start * dim..][..tile * dim].to_vec(), dim);
            start += tile;
        }
        assert_eq!((found.count(), start), (n, n));
        let mean = |c: usize| {
            rows.iter().skip(c).step_by(dim).map(|x| f64::from(*x)).sum::<f64>() / n as f64
        };
        let means: Vec<f64> = (0..dim).map(mean).collect();
        for (c, mean) in found.mean().iter().enumerate() {
            assert!((f64::from(*mean) - means[c]).abs() < 1e-4, "{c}");
        }
        for (i, covariance) in found.covariance().enumerate() {
            let (a, b) = (i / dim, i % dim);
            let product =
                |row: &[f32]| (f64::from(row[a]) - means[a]) * (f64::from(row[b]) - means[b]);
            let expected = rows.chunks_exact(dim).map(product).sum::<f64>() / n as f64;
            assert!((f64::from(covariance) - expected).abs() < 1e-3, "{a} {b}: {covariance}");
        }
    }

    #[test]
    fn nothing_seen_is_nothing_known() {
        let mut found = QueryStatistics::default();
        found.add(&mut [], 4);
        assert_eq!(found, QueryStatistics::default());
        assert_eq!((found.mean(), found.covariance().count()), (&[][..], 0));
    }
}
