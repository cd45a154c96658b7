//! The mean rotation of positions that are still to come.

use crate::error::{Result, bail};
use crate::policy::LayerInput;
use crate::shape::{Rope, RopeStyle};

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

    /// The elements of pair `i`.
    fn pair(&self, i: usize) -> (usize, usize) {
        match self.rope.style {
            RopeStyle::Half => (i, i + self.pairs.len()),
            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
        }
    }

    /// Rotates a row in place.
    pub(super) fn apply(&self, row: &mut [f32]) {
        for (i, (cos, sin)) in self.pairs.iter().enumerate() {
            let (a, b) = self.pair(i);
            let (x, y) = (row[a], row[b]);
            row[a] = x * cos - y * sin;
            row[b] = x * sin + y * cos;
        }
    }

    /// `R C R'` of the symmetric `matrix` `[dim, dim]`.
    pub(super) fn apply_both_sides(&self, matrix: &mut [f32], dim: usize) {
        matrix.chunks_exact_mut(dim).for_each(|row| self.apply(row));
        for (i, (cos, sin)) in self.pairs.iter().enumerate() {
            let (a, b) = self.pair(i);
            for c in 0..dim {
                let (x, y) = (matrix[a * dim + c], matrix[b * dim + c]);
                matrix[a * dim + c] = x * cos - y * sin;
                matrix[b * dim + c] = x * sin + y * cos;
            }
        }
    }
}
