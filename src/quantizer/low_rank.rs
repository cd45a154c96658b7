//! The low-rank matrix of `gear`: subspace iteration in plain arithmetic, so that every level
//! encodes the same bytes.

/// Multiplications by the matrix and its transpose: GEAR takes two, more cost little here.
const ITERATIONS: usize = 3;

/// `A [tokens, rank]` with orthonormal columns and `B [rank, dim]`, whose product is close to the
/// best approximation of that rank to `matrix [tokens, dim]`. Columns without a share are 0, and
/// `B` is limited to what f16 holds.
pub(super) fn approximate(matrix: &[f32], dim: usize, rank: usize) -> (Vec<f32>, Vec<f32>) {
    let tokens = matrix.len() / dim;
    let mut b = start(rank * dim);
    let mut a = vec![0.0; tokens * rank];
    for _ in 0..ITERATIONS {
        for (row, a) in matrix.chunks_exact(dim).zip(a.chunks_exact_mut(rank)) {
            for (a, b) in a.iter_mut().zip(b.chunks_exact(dim)) {
                *a = dot(row, b);
            }
        }
        orthonormalise(&mut a, rank);
        b.fill(0.0);
        for (row, a) in matrix.chunks_exact(dim).zip(a.chunks_exact(rank)) {
            for (a, b) in a.iter().zip(b.chunks_exact_mut(dim)) {
                b.iter_mut().zip(row).for_each(|(b, x)| *b += a * x);
            }
        }
    }
    b.iter_mut().for_each(|x| *x = x.clamp(-65504.0, 65504.0));
    (a, b)
}

/// Numbers in -1..1 without structure.
pub(super) fn start(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        // The generator of Numerical Recipes.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; 8];
    for (a, b) in a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum()
}

/// Modified Gram-Schmidt over the columns of `a [n, rank]`.
fn orthonormalise(a: &mut [f32], rank: usize) {
    for j in 0..rank {
        for i in 0..j {
            let shared: f64 =
                a.chunks_exact(rank).map(|row| f64::from(row[i]) * f64::from(row[j])).sum();
            a.chunks_exact_mut(rank).for_each(|row| row[j] -= shared as f32 * row[i]);
        }
        let square: f64 = a.chunks_exact(rank).map(|row| f64::from(row[j]).powi(2)).sum();
        let inverse = if square > 1e-60 { 1.0 / square.sqrt() } else { 0.0 };
        a.chunks_exact_mut(rank).for_each(|row| row[j] = (f64::from(row[j]) * inverse) as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_of_that_rank_is_found_exactly() {
        let (u, v) = (start(20 * 2), start(64 * 2));
        let matrix: Vec<f32> = (0..20 * 64)
            .map(|i| 9.0 * u[i / 64] * v[i % 64] + u[20 + i / 64] * v[64 + i % 64])
            .collect();
        let (a, b) = approximate(&matrix, 64, 2);
        for (i, x) in matrix.iter().enumerate() {
            let product = dot_columns(&a, &b, i / 64, i % 64);
            assert!((x - product).abs() < 1e-4, "{i}: {product} instead of {x}");
        }
    }

    fn dot_columns(a: &[f32], b: &[f32], t: usize, c: usize) -> f32 {
        (0..2).map(|j| a[t * 2 + j] * b[j * 64 + c]).sum()
    }

    #[test]
    fn nothing_is_approximated_by_nothing() {
        let (a, b) = approximate(&[0.0; 96], 32, 4);
        assert!(a.iter().chain(&b).all(|x| *x == 0.0));
    }
}
