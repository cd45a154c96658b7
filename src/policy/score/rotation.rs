//! The mean rotation of positions that are still to come.

use crate::error::{Result, bail};
use crate::policy::LayerInput;
use crate::shape::Rope;

/// The mean of the rotations of a run of positions: each pair turns and shrinks.
#[derive(Debug)]
pub(super) struct MeanRotation<'a> {
    rope: &'a Rope,
    /// Mean cosine and sine of each pair.
    pairs: Vec<(f32, f32)>,
}

impl<'a> MeanRotation<'a> {
    /// Of the `count` positions after the tokens of a layer, for the score called `name`.
    pub(super) fn of_next(name: &str, layer: &LayerInput<'a>, count: usize) -> Result<Self> {
        let Some(rope) = layer.rope else {
            bail!(InvalidArgument, "{name} needs the rotation of the model");
        };
        let first = layer.sequence_len;
        let mean = |freq: &f32| {
            // In f64: angles of late positions are large.
            let turn = |i: usize| ((first + i) as f64 * f64::from(*freq)).sin_cos();
            let (sin, cos) = (0..count).map(turn).fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
            ((cos / count as f64) as f32, (sin / count as f64) as f32)
        };
        Ok(Self { rope, pairs: rope.inv_freq.iter().map(mean).collect() })
    }

    /// Rotates a row in place.
    pub(super) fn apply(&self, row: &mut [f32]) {
        for (i, (cos, sin)) in self.pairs.iter().enumerate() {
            let (a, b) = self.rope.pair(i);
            let (x, y) = (row[a], row[b]);
            row[a] = x * cos - y * sin;
            row[b] = x * sin + y * cos;
        }
    }

    /// `R C R'` of the symmetric `matrix` `[dim, dim]`.
    pub(super) fn apply_both_sides(&self, matrix: &mut [f32], dim: usize) {
        matrix.chunks_exact_mut(dim).for_each(|row| self.apply(row));
        for (i, (cos, sin)) in self.pairs.iter().enumerate() {
            let (a, b) = self.rope.pair(i);
            for c in 0..dim {
                let (x, y) = (matrix[a * dim + c], matrix[b * dim + c]);
                matrix[a * dim + c] = x * cos - y * sin;
                matrix[b * dim + c] = x * sin + y * cos;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::RopeStyle;

    /// `sum over c of m[a, c] row[c]` for each a, where `m` is the mean of the rotations, by hand.
    fn mean_rotated(rope: &Rope, row: &[f32], first: i32, count: i32) -> Vec<f64> {
        let mut mean = vec![0.0f64; row.len()];
        for position in first..first + count {
            let mut turned = row.to_vec();
            rope.rotate(&mut turned, position);
            for (sum, x) in mean.iter_mut().zip(turned) {
                *sum += f64::from(x) / f64::from(count);
            }
        }
        mean
    }

    #[test]
    fn it_is_the_mean_of_the_rotations_in_both_styles() {
        let dim = 12;
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 20.0;
        for style in [RopeStyle::Half, RopeStyle::Interleaved] {
            // The last two elements do not turn.
            let rope = Rope::new(style, dim - 2, 100.0);
            let layer = LayerInput { sequence_len: 77, rope: Some(&rope), ..Default::default() };
            let rotation = MeanRotation::of_next("a test", &layer, 9).unwrap();
            let mut row: Vec<f32> = (0..dim).map(value).collect();
            let expected = mean_rotated(&rope, &row, 77, 9);
            rotation.apply(&mut row);
            for (found, expected) in row.iter().zip(&expected) {
                assert!((f64::from(*found) - expected).abs() < 1e-5, "{style:?}");
            }
            // R (x x') R' is (R x)(R x)', whatever x; sums of such are every covariance.
            let x: Vec<f32> = (5..5 + dim).map(value).collect();
            let product = |i: usize| x[i / dim] * x[i % dim];
            let mut matrix: Vec<f32> = (0..dim * dim).map(product).collect();
            rotation.apply_both_sides(&mut matrix, dim);
            let turned = mean_rotated(&rope, &x, 77, 9);
            for (i, found) in matrix.iter().enumerate() {
                let expected = turned[i / dim] * turned[i % dim];
                assert!((f64::from(*found) - expected).abs() < 1e-4, "{style:?} {i}");
            }
        }
    }
}
