//! Leverage scores of keys: rows that the span of all keys could not do without.
//!
//! ```text
//! X        = (keys before RoPE - their mean) S / sqrt(sketch),  S of standard normal draws
//! lev[j]   = x[j]' (X'X + 0.01 I)^-1 x[j]
//! score[j] = lev[j] with mean 0 and deviation 1 over all heads of the layer
//! ```
//!
//! The sketch makes the matrix small. Draws depend on the seed, the layer and the head; a file can
//! supply them instead, as tensors `layers.L.sketch` of `[num_kv_heads, head_dim, sketch]`.

use super::linalg::{self, standardize};
use super::noise;
use super::{Entry, Score};
use crate::error::{Result, bail};
use crate::policy::weights::Weights;
use crate::policy::{HeadInput, HeadScores, LayerInput};
use crate::registry::{Args, Domain, Param};
use crate::shape::{Needs, Rope};
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "leverage",
    summary: "keeps keys that the others cannot stand in for",
    paper: "Compactor, arXiv 2507.08143",
    params: &[SKETCH, SEED, FILE],
    needs: Needs::KEYS.union(Needs::ROPE),
    examples: &["leverage | keep(0.5)", "leverage(sketch=16, seed=1) | adakv | keep(0.25)"],
    create: |args| Ok(Box::new(Leverage(Sketch::new(args)?))),
};

pub(super) const SKETCH: Param = Param {
    name: "sketch",
    help: "columns of the sketch",
    domain: Domain::Int { default: 48, min: 1, max: 1024 },
};
pub(super) const SEED: Param = Param {
    name: "seed",
    help: "what the draws depend on",
    domain: Domain::Int { default: 0, min: 0, max: 1 << 48 },
};
pub(super) const FILE: Param =
    Param { name: "file", help: "a safetensors file with the sketch", domain: Domain::File };

#[derive(Debug)]
struct Leverage(Sketch);

impl Score for Leverage {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let scores = self.0.score(layer, |head| 0..head.positions.len())?;
        Ok(scores.into_iter().map(HeadScores::open).collect())
    }
}

/// Where the sketch comes from.
#[derive(Debug)]
pub(super) struct Sketch {
    columns: usize,
    seed: u64,
    file: Option<Weights>,
}

impl Sketch {
    pub(super) fn new(args: &Args) -> Result<Self> {
        Ok(Self {
            columns: args.count("sketch"),
            seed: args.int("seed") as u64,
            file: Weights::optional(args, "file")?,
        })
    }

    /// The standardized leverage of the tokens `part` of each head.
    pub(super) fn score(
        &self,
        layer: &LayerInput<'_>,
        part: impl Fn(&HeadInput<'_>) -> std::ops::Range<usize>,
    ) -> Result<Vec<Vec<f32>>> {
        let Some(rope) = layer.rope else {
            bail!(InvalidArgument, "leverage needs the rotation of the model");
        };
        let mut scores = Vec::with_capacity(layer.heads.len());
        for (h, head) in layer.heads.iter().enumerate() {
            let sketch = self.matrix(layer, h)?;
            let range = part(head);
            let keys = &head.keys[range.start * layer.head_dim..range.end * layer.head_dim];
            let keys = centred(keys, &head.positions[range], layer.head_dim, rope);
            let rows = self.project(&keys, layer.head_dim, &sketch);
            scores.push(linalg::leverage(&rows, self.columns, &[], 1e-2));
        }
        standardize(&mut scores);
        Ok(scores)
    }

    /// `[columns, dim]`: the transposed sketch of a head.
    fn matrix(&self, layer: &LayerInput<'_>, head: usize) -> Result<Vec<f32>> {
        let (dim, columns) = (layer.head_dim, self.columns);
        let element: Box<dyn Fn(usize, usize) -> f32> = match &self.file {
            Some(file) => {
                let name = format!("layers.{}.sketch", layer.layer);
                let all = file.tensor(&name, &[layer.heads.len(), dim, columns])?;
                Box::new(move |row, column| all[(head * dim + row) * columns + column])
            }
            None => {
                let place = noise::mix(noise::mix(self.seed) ^ layer.layer as u64) ^ head as u64;
                let place = noise::mix(place);
                Box::new(move |row, column| noise::normal(place ^ (row * columns + column) as u64))
            }
        };
        let scale = 1.0 / (columns as f32).sqrt();
        let at = |i: usize| element(i % dim, i / dim) * scale;
        Ok((0..dim * columns).map(at).collect())
    }

    fn project(&self, keys: &[f32], dim: usize, sketch: &[f32]) -> Vec<f32> {
        let kernels = simd::active();
        let rows = keys.chunks_exact(dim);
        rows.flat_map(|key| sketch.chunks_exact(dim).map(|column| kernels.dot_f32(key, column)))
            .collect()
    }
}

/// Keys turned back to position 0, less their mean.
fn centred(keys: &[f32], positions: &[i32], dim: usize, rope: &Rope) -> Vec<f32> {
    let kernels = simd::active();
    let mut keys = keys.to_vec();
    let mut mean = vec![0.0f32; dim];
    let weight = 1.0 / positions.len().max(1) as f32;
    for (key, position) in keys.chunks_exact_mut(dim).zip(positions) {
        rope.rotate(key, -position);
        kernels.axpy_f32(weight, key, &mut mean);
    }
    keys.chunks_exact_mut(dim).for_each(|key| kernels.axpy_f32(-1.0, &mean, key));
    keys
}
