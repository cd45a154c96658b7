//! ShadowKV's choice: blocks by landmarks, the mean keys of short runs of tokens.
//!
//! ```text
//! landmark[i] = mean of the keys of run i of `chunk` tokens
//! p[h, i]     = softmax over i of q[h] . landmark[i] / sqrt(d)
//! score       = max over the runs i of the block and the query heads h of the group of p[h, i]
//! ```
//!
//! Runs that their landmark stands for badly (by the smallest cosine of it with one of their keys) are
//! outliers: the blocks of the worst ones are always read. The authors keep keys in a low-rank form and
//! values outside of the GPU; here both are in host memory already, in the format of the cache.

use super::rows::BlockRows;
use super::{Entry, Index, NewBlocks, Reach, Selector, count, reach};
use crate::order::ordered;
use crate::registry::Param;
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "shadowkv",
    summary: "decode reads the blocks whose mean keys match best, and those that means cannot stand \
              for",
    paper: "ShadowKV, arXiv 2410.21465",
    params: PARAMS,
    needs: Needs::NONE,
    examples: &["shadowkv(tokens=2k)", "shadowkv(tokens=64, dense=0, outliers=2)"],
    create: |args| {
        Ok(Box::new(ShadowKv {
            reach: Reach::from_args(args),
            chunk: args.count("chunk"),
            outliers: args.count("outliers"),
        }))
    },
};

const PARAMS: &[Param] = &{
    let [tokens, sink, recent, dense] = reach(2048, 0, 32, 0);
    let chunk = count("chunk", "tokens of a run", 8, 1);
    [tokens, sink, recent, dense, chunk, count("outliers", "outliers that are read", 48, 0)]
};

#[derive(Debug)]
struct ShadowKv {
    reach: Reach,
    chunk: usize,
    outliers: usize,
}

#[derive(Debug, Clone)]
struct Landmarks {
    dim: usize,
    chunk: usize,
    outliers: usize,
    rows: BlockRows,
    /// For each block, the smallest cosine of a key with its landmark, of each run.
    cosines: Vec<Vec<f32>>,
}

impl Selector for ShadowKv {
    fn reach(&self) -> Reach {
        self.reach
    }

    fn index(&self, dim: usize) -> Box<dyn Index> {
        let Self { chunk, outliers, .. } = *self;
        let rows = BlockRows::new(dim);
        Box::new(Landmarks { dim, chunk, outliers, rows, cosines: Vec::new() })
    }
}

impl Index for Landmarks {
    fn extend(&mut self, blocks: &NewBlocks<'_>) {
        for (keys, _) in blocks.each(self.dim) {
            let (mut landmarks, mut cosines) = (Vec::new(), Vec::new());
            for run in keys.chunks(self.chunk * self.dim) {
                let landmark = mean(run, self.dim);
                cosines.push(smallest_cosine(run, &landmark));
                landmarks.extend(landmark);
            }
            self.rows.push(&landmarks);
            self.cosines.push(cosines);
        }
    }

    fn truncate(&mut self, blocks: usize) {
        self.rows.truncate(blocks);
        self.cosines.truncate(blocks);
    }

    fn score(&mut self, queries: &[f32], scores: &mut [f32]) {
        let runs = self.cosines.iter().map(Vec::len).sum::<usize>().max(1);
        let (kernels, scale) = (simd::active(), 1.0 / (self.dim as f32).sqrt());
        for row in self.rows.multiply(queries).chunks_exact_mut(runs) {
            kernels.scale(row, scale);
            let max = kernels.max(row);
            let sum = kernels.exp_sub(row, max);
            kernels.scale(row, 1.0 / sum);
        }
        self.rows.largest(scores);
        for block in self.outliers() {
            scores[block] = f32::INFINITY;
        }
    }

    fn fork(&self) -> Box<dyn Index> {
        Box::new(self.clone())
    }

    fn bytes(&self) -> usize {
        let runs: usize = self.cosines.iter().map(Vec::len).sum();
        self.rows.bytes() + runs * size_of::<f32>()
    }
}

impl Landmarks {
    /// The blocks of the worst runs; some may be named twice.
    fn outliers(&self) -> Vec<usize> {
        let blocks = self.cosines.iter().enumerate();
        let mut runs: Vec<(u32, usize)> =
            blocks.flat_map(|(b, runs)| runs.iter().map(move |x| (ordered(*x), b))).collect();
        if runs.len() > self.outliers && self.outliers > 0 {
            runs.select_nth_unstable(self.outliers - 1);
        }
        runs.truncate(self.outliers);
        runs.into_iter().map(|(_, block)| block).collect()
    }
}

fn mean(keys: &[f32], dim: usize) -> Vec<f32> {
    let mut mean = vec![0.0; dim];
    for key in keys.chunks_exact(dim) {
        simd::active().axpy_f32((dim as f32) / keys.len() as f32, key, &mut mean);
    }
    mean
}

fn smallest_cosine(keys: &[f32], landmark: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| simd::active().dot_f32(a, b);
    let norm = dot(landmark, landmark);
    let cosine = |key: &[f32]| dot(key, landmark) / (norm * dot(key, key)).sqrt().max(1e-12);
    keys.chunks_exact(landmark.len()).map(cosine).fold(f32::INFINITY, f32::min)
}
