//! PQCache: tokens by product quantization of their keys.
//!
//! ```text
//! key        = `parts` subvectors, each of which is the nearest of 2^bits centroids
//! logit[h,t] = sum over the parts of q[h, part] . centroid[part, code[t, part]] / sqrt(d)
//! score      = sum over the tokens t of the block and the query heads h of softmax over t of logit
//! ```
//!
//! Centroids come from k-means over the keys of the first blocks (a sample of [`SAMPLE`] of them, from
//! evenly spaced ones), and stay; the codes of later tokens are found when their block is sealed. The
//! authors take single tokens from outside of the GPU.

use super::{Entry, Index, NewBlocks, Reach, Selector, reach};
use crate::registry::{Domain, Param};
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "pqcache",
    summary: "decode reads the blocks with the most attention by product-quantized keys",
    paper: "PQCache, arXiv 2407.12820",
    params: PARAMS,
    needs: Needs::NONE,
    examples: &["pqcache(tokens=2k)", "pqcache(tokens=64, sink=0, bits=4)"],
    create: |args| {
        Ok(Box::new(PqCache {
            reach: Reach::from_args(args),
            parts: args.count("parts"),
            centroids: 1 << args.count("bits"),
        }))
    },
};

const PARAMS: &[Param] = &{
    let [tokens, sink, recent, dense] = reach(2048, 32, 32, 0);
    let parts = Param {
        name: "parts",
        help: "subvectors of a key, at most head_dim",
        domain: Domain::Int { default: 2, min: 1, max: 64 },
    };
    let bits = Param {
        name: "bits",
        help: "bits of a code",
        domain: Domain::Int { default: 6, min: 1, max: 8 },
    };
    [tokens, sink, recent, dense, parts, bits]
};

/// Most keys that centroids are made from.
const SAMPLE: usize = 4096;
/// Rounds of k-means.
const ROUNDS: usize = 8;

#[derive(Debug)]
struct PqCache {
    reach: Reach,
    parts: usize,
    centroids: usize,
}

#[derive(Debug, Clone)]
struct Codes {
    dim: usize,
    num_centroids: usize,
    /// Where each part of a key starts, and the end.
    bounds: Vec<usize>,
    /// For each part, `[num_centroids, width]`; empty before the first block.
    centroids: Vec<Vec<f32>>,
    /// `[tokens, parts]`.
    codes: Vec<u8>,
    /// For each block, the token after its last.
    ends: Vec<u32>,
    logits: Vec<f32>,
}

impl Selector for PqCache {
    fn reach(&self) -> Reach {
        self.reach
    }

    fn index(&self, dim: usize) -> Box<dyn Index> {
        let parts = self.parts.min(dim);
        Box::new(Codes {
            dim,
            num_centroids: self.centroids,
            bounds: (0..=parts).map(|part| part * dim / parts).collect(),
            centroids: Vec::new(),
            codes: Vec::new(),
            ends: Vec::new(),
            logits: Vec::new(),
        })
    }
}

impl Index for Codes {
    fn extend(&mut self, blocks: &NewBlocks<'_>) {
        if self.centroids.is_empty() {
            self.learn(blocks.keys);
        }
        for key in blocks.keys.chunks_exact(self.dim) {
            for (part, centroids) in self.bounds.windows(2).zip(&self.centroids) {
                self.codes.push(nearest(centroids, &key[part[0]..part[1]]) as u8);
            }
        }
        let mut end = self.ends.last().copied().unwrap_or(0);
        self.ends.extend(blocks.rows.iter().map(|rows| {
            end += rows;
            end
        }));
    }

    fn truncate(&mut self, blocks: usize) {
        self.ends.truncate(blocks);
        let tokens = self.ends.last().map_or(0, |end| *end as usize);
        self.codes.truncate(tokens * self.parts());
    }

    fn score(&mut self, queries: &[f32], scores: &mut [f32]) {
        scores.fill(0.0);
        let kernels = simd::active();
        let mut logits = std::mem::take(&mut self.logits);
        for query in queries.chunks_exact(self.dim) {
            self.logits(query, &mut logits);
            let max = kernels.max(&logits);
            let sum = kernels.exp_sub(&mut logits, max);
            let mut start = 0;
            for (score, end) in scores.iter_mut().zip(&self.ends) {
                let tokens = &logits[start..*end as usize];
                *score += tokens.iter().sum::<f32>() / sum;
                start = *end as usize;
            }
        }
        self.logits = logits;
    }

    fn fork(&self) -> Box<dyn Index> {
        Box::new(self.clone())
    }

    fn bytes(&self) -> usize {
        self.codes.len() + self.centroids.iter().map(|part| size_of_val(&part[..])).sum::<usize>()
    }
}

impl Codes {
    fn parts(&self) -> usize {
        self.bounds.len() - 1
    }

    /// The logit of each token for a query.
    fn logits(&self, query: &[f32], logits: &mut Vec<f32>) {
        let scale = 1.0 / (self.dim as f32).sqrt();
        let mut tables = Vec::with_capacity(self.parts() * self.num_centroids);
        for (part, centroids) in self.bounds.windows(2).zip(&self.centroids) {
            let query = &query[part[0]..part[1]];
            let product = |row: &[f32]| simd::active().dot_f32(row, query) * scale;
            tables.extend(centroids.chunks_exact(query.len()).map(product));
        }
        let tables: Vec<&[f32]> = tables.chunks_exact(self.num_centroids).collect();
        logits.clear();
        let logit = |codes: &[u8]| {
            codes.iter().zip(&tables).map(|(code, table)| table[usize::from(*code)]).sum::<f32>()
        };
        logits.extend(self.codes.chunks_exact(self.parts()).map(logit));
    }

    /// Makes centroids by k-means, from evenly spaced keys as the first guess.
    fn learn(&mut self, keys: &[f32]) {
        let tokens = keys.len() / self.dim;
        let sampled = tokens.min(SAMPLE);
        for part in self.bounds.windows(2) {
            let width = part[1] - part[0];
            let mut sample = Vec::with_capacity(sampled * width);
            for i in 0..sampled {
                let key = &keys[i * tokens / sampled * self.dim..][..self.dim];
                sample.extend_from_slice(&key[part[0]..part[1]]);
            }
            let first = |c: usize| &sample[c * sampled / self.num_centroids * width..][..width];
            let mut centroids: Vec<f32> =
                (0..self.num_centroids).flat_map(first).copied().collect();
            for _ in 0..ROUNDS {
                refine(&mut centroids, &sample, width);
            }
            self.centroids.push(centroids);
        }
    }
}

/// One round of k-means; a centroid that nobody is nearest to stays.
fn refine(centroids: &mut [f32], sample: &[f32], width: usize) {
    let mut sums = vec![0.0f32; centroids.len()];
    let mut counts = vec![0u32; centroids.len() / width];
    for row in sample.chunks_exact(width) {
        let code = nearest(centroids, row);
        counts[code] += 1;
        simd::active().axpy_f32(1.0, row, &mut sums[code * width..][..width]);
    }
    for ((centroid, sum), count) in
        centroids.chunks_exact_mut(width).zip(sums.chunks_exact(width)).zip(counts)
    {
        if count > 0 {
            centroid.iter_mut().zip(sum).for_each(|(x, sum)| *x = sum / count as f32);
        }
    }
}

/// The nearest centroid; the first of equals.
fn nearest(centroids: &[f32], row: &[f32]) -> usize {
    let distance = |centroid: &[f32]| -> f32 {
        centroid.iter().zip(row).map(|(a, b)| (a - b) * (a - b)).sum()
    };
    let mut best = (0, f32::INFINITY);
    for (code, centroid) in centroids.chunks_exact(row.len()).enumerate() {
        let distance = distance(centroid);
        if distance < best.1 {
            best = (code, distance);
        }
    }
    best.0
}
