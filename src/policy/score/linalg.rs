//! Leverage: how much of a direction one row alone supplies.

use crate::simd;

/// `x' A^-1 x` for the rows `x` of `rows` `[n, dim]`, with `A = ridge I + sum of w[j] x[j] x[j]'`
/// and `w` 1 if empty.
///
/// `A = L L'` is factored in f64, then `x' A^-1 x = |L^-1 x|^2`: a sum of squares, where nothing
/// cancels. Rows that are not finite make all of it NaN.
pub(super) fn leverage(rows: &[f32], dim: usize, weights: &[f32], ridge: f64) -> Vec<f32> {
    let mut gram = gram(rows, dim, weights);
    for i in 0..dim {
        gram[i * dim + i] += ridge;
    }
    let Some(factor) = inverse_factor(&mut gram, dim) else {
        return vec![f32::NAN; rows.len() / dim];
    };
    let kernels = simd::active();
    let leverage = |row: &[f32]| {
        let parts = factor.chunks_exact(dim).enumerate();
        parts.map(|(i, f)| kernels.dot_f32(&f[..=i], &row[..=i]).powi(2)).sum::<f32>()
    };
    rows.chunks_exact(dim).map(leverage).collect()
}

/// `sum of w[j] x[j] x[j]'`: tiles of rows in f32, the sum of tiles in f64.
fn gram(rows: &[f32], dim: usize, weights: &[f32]) -> Vec<f64> {
    const TILE: usize = 64;
    let kernels = simd::active();
    let mut total = vec![0.0f64; dim * dim];
    let mut tile = vec![0.0f32; dim * dim];
    for (start, rows) in (0..).step_by(TILE).zip(rows.chunks(TILE * dim)) {
        tile.fill(0.0);
        for (j, row) in rows.chunks_exact(dim).enumerate() {
            let weight = weights.get(start + j).copied().unwrap_or(1.0);
            for (x, out) in row.iter().zip(tile.chunks_exact_mut(dim)) {
                kernels.axpy_f32(weight * x, row, out);
            }
        }
        total.iter_mut().zip(&tile).for_each(|(sum, x)| *sum += f64::from(*x));
    }
    total
}

/// `L^-1` of the positive definite `A = L L'` `[dim, dim]`, which is overwritten; `None` if it is not.
fn inverse_factor(a: &mut [f64], dim: usize) -> Option<Vec<f32>> {
    for j in 0..dim {
        for i in j..dim {
            let (above, row) = (&a[j * dim..][..j], &a[i * dim..][..j]);
            let known: f64 = above.iter().zip(row).map(|(x, y)| x * y).sum();
            let rest = a[i * dim + j] - known;
            if i == j {
                if rest.is_nan() || rest <= 0.0 {
                    return None;
                }
                a[i * dim + j] = rest.sqrt();
            } else {
                a[i * dim + j] = rest / a[j * dim + j];
            }
        }
    }
    let mut inverse = vec![0.0f64; dim * dim];
    for i in 0..dim {
        let pivot = a[i * dim + i];
        for j in 0..=i {
            let unit = if i == j { 1.0 } else { 0.0 };
            let known: f64 = (j..i).map(|k| a[i * dim + k] * inverse[k * dim + j]).sum();
            inverse[i * dim + j] = (unit - known) / pivot;
        }
    }
    Some(inverse.into_iter().map(|x| x as f32).collect())
}

/// Moves and scales the scores of all heads of a layer together to mean 0 and deviation 1.
pub(super) fn standardize(heads: &mut [Vec<f32>]) {
    let all = || heads.iter().flatten().map(|x| f64::from(*x));
    let count = all().count();
    if count < 2 {
        return heads.iter_mut().flatten().for_each(|x| *x = 0.0);
    }
    let mean = all().sum::<f64>() / count as f64;
    let squares: f64 = all().map(|x| (x - mean) * (x - mean)).sum();
    let deviation = (squares / (count - 1) as f64).sqrt().max(1e-6);
    let scale = |x: &mut f32| *x = ((f64::from(*x) - mean) / deviation) as f32;
    heads.iter_mut().flatten().for_each(scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Solves `a x = b` by Gauss.
    fn solve(mut a: Vec<f64>, mut b: Vec<f64>) -> Vec<f64> {
        let n = b.len();
        for i in 0..n {
            for r in i + 1..n {
                let f = a[r * n + i] / a[i * n + i];
                (0..n).for_each(|c| a[r * n + c] -= f * a[i * n + c]);
                b[r] -= f * b[i];
            }
        }
        for i in (0..n).rev() {
            let known: f64 = (i + 1..n).map(|c| a[i * n + c] * b[c]).sum();
            b[i] = (b[i] - known) / a[i * n + i];
        }
        b
    }

    #[test]
    fn leverage_agrees_with_elimination_in_f64() {
        for (n, dim) in [(1, 1), (5, 3), (70, 12), (130, 33)] {
            let rows: Vec<f32> =
                (0..n * dim).map(|i| ((i * 37 % 101) as f32 - 50.0) / 20.0).collect();
            let weights: Vec<f32> = (0..n).map(|i| 0.1 + (i % 7) as f32).collect();
            let mut a = vec![0.0; dim * dim];
            for (j, row) in rows.chunks_exact(dim).enumerate() {
                for r in 0..dim {
                    for c in 0..dim {
                        a[r * dim + c] +=
                            f64::from(weights[j]) * f64::from(row[r]) * f64::from(row[c]);
                    }
                }
            }
            (0..dim).for_each(|i| a[i * dim + i] += 0.5);
            let found = leverage(&rows, dim, &weights, 0.5);
            for (row, found) in rows.chunks_exact(dim).zip(found) {
                let row: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
                let x = solve(a.clone(), row.clone());
                let expected: f64 = row.iter().zip(x).map(|(a, b)| a * b).sum();
                assert!(
                    (f64::from(found) - expected).abs() < 1e-5 * expected.max(1e-3),
                    "{n} {dim}"
                );
            }
        }
        assert!(leverage(&[f32::NAN, 1.0], 2, &[], 1.0)[0].is_nan());
    }

    #[test]
    fn standardized_scores_have_mean_0_and_deviation_1() {
        let mut heads = vec![vec![1.0, 2.0], vec![6.0]];
        standardize(&mut heads);
        let sum: f32 = heads.iter().flatten().sum();
        let squares: f32 = heads.iter().flatten().map(|x| x * x).sum();
        assert!(sum.abs() < 1e-6 && (squares - 2.0).abs() < 1e-5);
        let mut flat = vec![vec![3.0; 4], vec![]];
        standardize(&mut flat);
        assert_eq!(flat, [vec![0.0; 4], vec![]]);
    }
}
