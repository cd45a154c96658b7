//! Low rank: the rows of a head, kept by their coordinates in a subspace.
//!
//! ```text
//! row ~ sum over i of c[i] up[i],   c = down row          up, down [rank, dim], c [rank]
//! q . row ~ (up q) . c              outputs: sum over t of p[t] row[t] ~ up' (sum of p[t] c[t])
//! ```
//!
//! So attention never builds a row again: queries are turned into the subspace once, outputs are turned
//! back once, and everything between has vectors of `rank` elements, in any format. The price is that keys
//! are taken as the cache holds them, after RoPE, where they need a few dimensions more (Loki, arXiv
//! 2406.02542).
//!
//! A basis comes from a file (EigenAttention, arXiv 2408.05646; Palu's values, arXiv 2407.21118) or is fitted
//! to the rows of a prompt, as ShadowKV does it (arXiv 2410.21465), but for each head by itself.

use super::low_rank::start;
use crate::error::{Result, ensure};
use crate::simd;

/// Multiplications by the covariance: the energy outside of the subspace changes little after a few.
const ITERATIONS: usize = 12;

/// The subspace of one side of one head.
#[derive(Debug, Clone, PartialEq)]
pub struct Basis {
    dim: usize,
    up: Vec<f32>,
    /// As `up` if absent: then its rows are orthonormal.
    down: Option<Vec<f32>>,
}

/// The subspaces of all heads of a model.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Bases {
    /// For each layer and KV head, those of keys and values, where they are kept so.
    heads: Vec<[Option<Basis>; 2]>,
}

impl Bases {
    /// For each layer and KV head in order, those of keys and values.
    pub fn new(heads: Vec<[Option<Basis>; 2]>) -> Self {
        Self { heads }
    }

    /// That of one side of head `index`, counted over all layers.
    pub fn get(&self, index: usize, side: super::Side) -> Option<&Basis> {
        self.heads[index][side as usize].as_ref()
    }

    /// Bytes of all matrices.
    pub fn bytes(&self) -> usize {
        self.heads.iter().flatten().flatten().map(Basis::bytes).sum()
    }
}

impl Basis {
    /// From matrices `[rank, dim]`; without `down` the rows of `up` must be orthonormal.
    pub fn new(dim: usize, up: Vec<f32>, down: Option<Vec<f32>>) -> Result<Self> {
        let is_finite = up.iter().chain(down.iter().flatten()).all(|x| x.is_finite());
        ensure!(is_finite, InvalidArgument, "a basis has elements that are not finite");
        let basis = Self { dim, up, down };
        if basis.down.is_none() {
            let error = basis.orthonormality_error();
            ensure!(
                (0.0..1e-2).contains(&error),
                InvalidArgument,
                "the rows of a basis without a projection of its own must be orthonormal; they are off by \
                 {error:.3}"
            );
        }
        Ok(basis)
    }

    /// The subspace of `rank` dimensions with most of the energy of `rows [n, dim]`. Rows with elements
    /// that are not finite do not count.
    pub fn fit(rows: &[f32], dim: usize, rank: usize) -> Self {
        let covariance = covariance(rows, dim);
        let mut up = start(rank * dim);
        orthonormalise(&mut up, dim);
        let kernels = simd::active();
        let mut next = vec![0.0; up.len()];
        for _ in 0..ITERATIONS {
            next.fill(0.0);
            for (out, row) in next.chunks_exact_mut(dim).zip(up.chunks_exact(dim)) {
                for (x, column) in row.iter().zip(covariance.chunks_exact(dim)) {
                    kernels.axpy_f32(*x, column, out);
                }
            }
            // What is left of directions without energy is no more than noise: those stay.
            std::mem::swap(&mut up, &mut next);
            orthonormalise(&mut up, dim);
        }
        Self { dim, up, down: None }
    }

    /// Dimensions of the subspace.
    pub fn rank(&self) -> usize {
        self.up.len() / self.dim
    }

    /// Coordinates of `rows [n, dim]`, `[n, rank]`.
    pub fn project(&self, rows: &[f32], out: &mut Vec<f32>) {
        multiply(self.down.as_deref().unwrap_or(&self.up), self.dim, rows, out);
    }

    /// What queries `[n, dim]` are to coordinates, `[n, rank]`.
    pub fn project_queries(&self, queries: &[f32], out: &mut Vec<f32>) {
        multiply(&self.up, self.dim, queries, out);
    }

    /// Rows `[n, dim]` of their coordinates `[n, rank]`.
    pub fn restore(&self, coordinates: &[f32], out: &mut [f32]) {
        let kernels = simd::active();
        let (dim, rank) = (self.dim, self.rank());
        out.fill(0.0);
        for (row, out) in coordinates.chunks_exact(rank).zip(out.chunks_exact_mut(dim)) {
            for (x, up) in row.iter().zip(self.up.chunks_exact(dim)) {
                kernels.axpy_f32(*x, up, out);
            }
        }
    }

    /// Elements of a row.
    pub fn dim(&self) -> usize {
        self.dim
    }

    fn bytes(&self) -> usize {
        size_of::<f32>() * (self.up.len() + self.down.as_ref().map_or(0, Vec::len))
    }

    /// The largest element of `up up' - 1`.
    fn orthonormality_error(&self) -> f32 {
        let rows: Vec<&[f32]> = self.up.chunks_exact(self.dim).collect();
        let mut worst = 0.0f32;
        for (i, a) in rows.iter().enumerate() {
            for (j, b) in rows[..=i].iter().enumerate() {
                let expected = if i == j { 1.0 } else { 0.0 };
                worst = worst.max((dot(a, b) as f32 - expected).abs());
            }
        }
        worst
    }
}

/// `out[i, j] = rows[i] . matrix[j]`.
fn multiply(matrix: &[f32], dim: usize, rows: &[f32], out: &mut Vec<f32>) {
    let kernels = simd::active();
    out.clear();
    for row in rows.chunks_exact(dim) {
        out.extend(matrix.chunks_exact(dim).map(|direction| kernels.dot_f32(row, direction)));
    }
}

/// `sum over rows of row row'`, `[dim, dim]`, over the largest element of any row.
fn covariance(rows: &[f32], dim: usize) -> Vec<f32> {
    let kernels = simd::active();
    let mut covariance = vec![0.0; dim * dim];
    let is_finite = |row: &&[f32]| row.iter().all(|x| x.is_finite());
    let finite = || rows.chunks_exact(dim).filter(is_finite);
    let most = finite().flatten().fold(0.0f32, |most, x| most.max(x.abs()));
    if most == 0.0 {
        return covariance;
    }
    let mut scaled = vec![0.0; dim];
    for row in finite() {
        scaled.iter_mut().zip(row).for_each(|(scaled, x)| *scaled = x / most);
        for (x, out) in scaled.iter().zip(covariance.chunks_exact_mut(dim)) {
            kernels.axpy_f32(*x, &scaled, out);
        }
    }
    covariance
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Gram-Schmidt over rows, twice for each, with axes in place of rows that depend on others.
fn orthonormalise(rows: &mut [f32], dim: usize) {
    let mut axis = 0;
    for i in 0..rows.len() / dim {
        let (before, rest) = rows.split_at_mut(i * dim);
        let row = &mut rest[..dim];
        while !normalise_against(before, row, dim) {
            row.fill(0.0);
            row[axis % dim] = 1.0;
            axis += 1;
        }
    }
}

/// Takes the directions of `before` from `row` and makes it 1 long; `false` if next to nothing is left.
fn normalise_against(before: &[f32], row: &mut [f32], dim: usize) -> bool {
    let length = dot(row, row).sqrt();
    if length == 0.0 || !length.is_finite() {
        return false;
    }
    row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    for _ in 0..2 {
        for other in before.chunks_exact(dim) {
            let shared = dot(other, row) as f32;
            simd::active().axpy_f32(-shared, other, row);
        }
    }
    let left = dot(row, row).sqrt();
    row.iter_mut().for_each(|x| *x = (f64::from(*x) / left) as f32);
    left > 1e-5
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `n` rows inside a subspace of `rank` dimensions, times `scale`.
    fn rows_of_rank(n: usize, dim: usize, rank: usize, scale: f32) -> Vec<f32> {
        let numbers = start(rank * dim + n * rank);
        let (directions, weights) = numbers.split_at(rank * dim);
        let mut rows = vec![0.0; n * dim];
        for (row, weights) in rows.chunks_exact_mut(dim).zip(weights.chunks_exact(rank)) {
            for (weight, direction) in weights.iter().zip(directions.chunks_exact(dim)) {
                row.iter_mut().zip(direction).for_each(|(x, d)| *x += scale * weight * d);
            }
        }
        rows
    }

    fn error(basis: &Basis, rows: &[f32]) -> f64 {
        let (mut coordinates, mut restored) = (Vec::new(), vec![0.0; rows.len()]);
        basis.project(rows, &mut coordinates);
        basis.restore(&coordinates, &mut restored);
        let difference: Vec<f32> = rows.iter().zip(&restored).map(|(a, b)| a - b).collect();
        (dot(&difference, &difference) / dot(rows, rows)).sqrt()
    }

    #[test]
    fn rows_of_that_rank_are_found_whatever_their_size() {
        for scale in [1.0, 1e-15, 1e15] {
            let mut rows = rows_of_rank(50, 48, 5, scale);
            for rank in [5, 6, 48] {
                let basis = Basis::fit(&rows, 48, rank);
                assert_eq!(basis.rank(), rank);
                assert!(basis.orthonormality_error() < 1e-5, "rank {rank}, scale {scale}");
                assert!(error(&basis, &rows) < 1e-5, "rank {rank}, scale {scale}");
            }
            assert!(error(&Basis::fit(&rows, 48, 2), &rows) > 0.1);
            let clean = Basis::fit(&rows, 48, 5);
            rows.extend_from_slice(&[f32::NAN; 48]);
            assert_eq!(Basis::fit(&rows, 48, 5), clean);
        }
    }

    #[test]
    fn the_subspace_is_the_best_one() {
        // Independent directions, each with its own energy: the best are the first.
        let (dim, n) = (16, 4000);
        let mut rows = start(n * dim);
        for row in rows.chunks_exact_mut(dim) {
            row.iter_mut().enumerate().for_each(|(i, x)| *x *= 0.6f32.powi(i as i32));
        }
        let basis = Basis::fit(&rows, dim, 4);
        let outside = |rows: &[f32]| -> f64 {
            rows.chunks_exact(dim).map(|row| dot(&row[4..], &row[4..])).sum()
        };
        let best = (outside(&rows) / dot(&rows, &rows)).sqrt();
        let found = error(&basis, &rows);
        assert!(found < 1.01 * best, "{found} instead of {best}");
    }

    #[test]
    fn nothing_to_fit_gives_a_basis_all_the_same() {
        for rows in [vec![], vec![0.0; 3 * 8], vec![f32::INFINITY; 8]] {
            assert!(Basis::fit(&rows, 8, 4).orthonormality_error() < 1e-6);
        }
    }

    #[test]
    fn queries_meet_coordinates_as_they_meet_rows() {
        let rows = rows_of_rank(20, 32, 6, 1.0);
        let fitted = Basis::fit(&rows, 32, 6);
        // Any other coordinates do as well, with a projection that fits them.
        let double: Vec<f32> = fitted.up.iter().map(|x| 2.0 * x).collect();
        let half = fitted.up.iter().map(|x| 0.5 * x).collect();
        let scaled = Basis::new(32, double.clone(), Some(half)).unwrap();
        assert!(Basis::new(32, double, None).is_err());
        assert!(Basis::new(32, vec![f32::NAN; 32], None).is_err());
        let queries = start(3 * 32);
        for basis in [fitted, scaled] {
            let (mut coordinates, mut turned) = (Vec::new(), Vec::new());
            basis.project(&rows, &mut coordinates);
            basis.project_queries(&queries, &mut turned);
            for (query, turned) in queries.chunks_exact(32).zip(turned.chunks_exact(6)) {
                for (row, c) in rows.chunks_exact(32).zip(coordinates.chunks_exact(6)) {
                    assert!((dot(query, row) - dot(turned, c)).abs() < 1e-4);
                }
            }
        }
    }
}
