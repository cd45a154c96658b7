//! Double Sparsity: tokens by a few channels of their keys.
//!
//! ```text
//! channels     = those with the largest sum of k[c]^2 over the first blocks, `dim / part` of them
//! label[t]     = k[t] on these channels
//! score        = max over the tokens t of the block and the query heads h of the group
//!                of q[h] on these channels . label[t]
//! ```
//!
//! The authors find the channels offline, by |q| |k| over a calibration set; here the prompt itself is
//! the calibration, by keys alone. Labels are in f16, theirs have 4 bits.

use super::rows::BlockRows;
use super::{Entry, Index, NewBlocks, Reach, Selector, count, reach};
use crate::order::ordered;
use crate::registry::Param;
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "doublesparsity",
    summary: "decode reads the blocks of the tokens that match best on a few channels",
    paper: "Double Sparsity, arXiv 2408.07092",
    params: PARAMS,
    needs: Needs::NONE,
    examples: &["doublesparsity(tokens=2k)", "doublesparsity(tokens=64, dense=0, part=4)"],
    create: |args| {
        Ok(Box::new(DoubleSparsity { reach: Reach::from_args(args), part: args.count("part") }))
    },
};

const PARAMS: &[Param] = &{
    let [tokens, sink, recent, dense] = reach(2048, 0, 0, 2);
    [tokens, sink, recent, dense, count("part", "one channel of so many is a label", 16, 1)]
};

#[derive(Debug)]
struct DoubleSparsity {
    reach: Reach,
    part: usize,
}

#[derive(Debug, Clone)]
struct Labels {
    dim: usize,
    /// The channels, ascending; none before the first block.
    channels: Vec<usize>,
    count: usize,
    rows: BlockRows,
    queries: Vec<f32>,
}

impl Selector for DoubleSparsity {
    fn reach(&self) -> Reach {
        self.reach
    }

    fn index(&self, dim: usize) -> Box<dyn Index> {
        let count = (dim / self.part).max(1);
        let rows = BlockRows::new(count);
        Box::new(Labels { dim, channels: Vec::new(), count, rows, queries: Vec::new() })
    }
}

impl Index for Labels {
    fn extend(&mut self, blocks: &NewBlocks<'_>) {
        if self.channels.is_empty() {
            self.channels = strongest(blocks.keys, self.dim, self.count);
        }
        for (keys, _) in blocks.each(self.dim) {
            let mut labels = Vec::with_capacity(keys.len() / self.dim * self.count);
            for key in keys.chunks_exact(self.dim) {
                labels.extend(self.channels.iter().map(|c| key[*c]));
            }
            self.rows.push(&labels);
        }
    }

    fn truncate(&mut self, blocks: usize) {
        self.rows.truncate(blocks);
    }

    fn score(&mut self, queries: &[f32], scores: &mut [f32]) {
        self.queries.clear();
        for query in queries.chunks_exact(self.dim) {
            self.queries.extend(self.channels.iter().map(|c| query[*c]));
        }
        self.rows.multiply(&self.queries);
        self.rows.largest(scores);
    }

    fn fork(&self) -> Box<dyn Index> {
        Box::new(self.clone())
    }

    fn bytes(&self) -> usize {
        self.rows.bytes()
    }
}

/// The channels of the most energy, ascending.
fn strongest(keys: &[f32], dim: usize, count: usize) -> Vec<usize> {
    let mut energy = vec![0.0f32; dim];
    for key in keys.chunks_exact(dim) {
        energy.iter_mut().zip(key).for_each(|(sum, x)| *sum += x * x);
    }
    let mut channels: Vec<usize> = (0..dim).collect();
    channels.sort_by_key(|c| std::cmp::Reverse(ordered(energy[*c])));
    channels.truncate(count);
    channels.sort_unstable();
    channels
}
