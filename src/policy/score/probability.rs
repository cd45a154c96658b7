//! Attention probabilities of a few queries, row by row: the primitive behind window scores.

/// For each of the last queries (`[n, dim]`, the last of them at the last key) computes its causal
/// attention over `keys` (`[T, dim]`, `T >= n`) and hands the row to `visit` with its index.
/// Columns that the query may not see are 0.
pub fn window_probabilities(
    keys: &[f32],
    queries: &[f32],
    dim: usize,
    mut visit: impl FnMut(usize, &[f32]),
) {
    let len = keys.len() / dim;
    let num_queries = queries.len() / dim;
    let scale = 1.0 / (dim as f32).sqrt();
    let mut row = vec![0.0f32; len];
    for (t, query) in queries.chunks_exact(dim).enumerate() {
        let visible = len + t + 1 - num_queries;
        for (score, key) in row.iter_mut().zip(keys.chunks_exact(dim)).take(visible) {
            *score = scale * dot(query, key);
        }
        row[visible..].fill(0.0);
        softmax(&mut row[..visible]);
        visit(t, &row);
    }
}

/// Eight partial sums let the compiler use vector registers, and are more accurate than one.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + tail
}

fn softmax(row: &mut [f32]) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0f64;
    for score in row.iter_mut() {
        *score = (*score - max).exp();
        sum += f64::from(*score);
    }
    let scale = (1.0 / sum) as f32;
    row.iter_mut().for_each(|p| *p *= scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_causal_and_sum_to_one() {
        let dim = 12;
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 25.0;
        let keys: Vec<f32> = (0..9 * dim).map(value).collect();
        let queries: Vec<f32> = (0..3 * dim).map(|i| value(i + 5)).collect();
        let mut rows = 0;
        window_probabilities(&keys, &queries, dim, |t, row| {
            let visible = 7 + t;
            assert!(row[visible..].iter().all(|p| *p == 0.0));
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
            let logit = |j: usize| {
                let key = &keys[j * dim..][..dim];
                let dot: f32 = queries[t * dim..][..dim].iter().zip(key).map(|(a, b)| a * b).sum();
                dot / (dim as f32).sqrt()
            };
            let ratio = (logit(1) - logit(0)).exp();
            assert!((row[1] / row[0] - ratio).abs() < 1e-4 * ratio);
            rows += 1;
        });
        assert_eq!(rows, 3);
    }
}
