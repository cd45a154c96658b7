//! InfLLM: blocks by a few tokens that represent them.
//!
//! ```text
//! representatives = the `tops` tokens of the block that have received the most attention
//! score           = mean over the query heads h of the group and the representatives r of q[h] . k[r]
//! ```
//!
//! The authors choose representatives by the attention of the queries that follow in the local window;
//! here it is that of all queries seen when the block is summarised, which is after the prompt for its
//! blocks. They give all chosen tokens one relative distance; here tokens keep their positions. Blocks
//! that are not chosen stay in host memory.

use super::rows::BlockRows;
use super::{Entry, Index, NewBlocks, Reach, Selector, count, reach};
use crate::order::ordered;
use crate::registry::Param;
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "infllm",
    summary: "decode reads the blocks whose most attended tokens match best, sinks and a window",
    paper: "InfLLM, arXiv 2402.04617",
    params: PARAMS,
    needs: Needs::COLUMN_SUM,
    examples: &["infllm", "infllm(tokens=64, sink=16, recent=32, tops=2)"],
    create: |args| Ok(Box::new(InfLlm { reach: Reach::from_args(args), tops: args.count("tops") })),
};

const PARAMS: &[Param] = &{
    let [tokens, sink, recent, dense] = reach(2048, 128, 4096, 0);
    [tokens, sink, recent, dense, count("tops", "tokens that represent a block", 4, 1)]
};

#[derive(Debug)]
struct InfLlm {
    reach: Reach,
    tops: usize,
}

#[derive(Debug, Clone)]
struct Representatives {
    dim: usize,
    tops: usize,
    /// The mean of the representatives of each block: the mean of products is a product of means.
    rows: BlockRows,
    query: Vec<f32>,
}

impl Selector for InfLlm {
    fn reach(&self) -> Reach {
        self.reach
    }

    fn needs(&self) -> Needs {
        Needs::COLUMN_SUM
    }

    fn index(&self, dim: usize) -> Box<dyn Index> {
        let rows = BlockRows::new(dim);
        Box::new(Representatives { dim, tops: self.tops, rows, query: Vec::new() })
    }
}

impl Index for Representatives {
    fn extend(&mut self, blocks: &NewBlocks<'_>) {
        for (keys, received) in blocks.each(self.dim) {
            let mut order: Vec<usize> = (0..keys.len() / self.dim).collect();
            let attention = |i: &usize| received.get(*i).map_or(0, |x| ordered(*x));
            order.sort_by_key(|i| std::cmp::Reverse(attention(i)));
            order.truncate(self.tops);
            let mut mean = vec![0.0f32; self.dim];
            for i in &order {
                let key = &keys[i * self.dim..][..self.dim];
                mean.iter_mut().zip(key).for_each(|(sum, x)| *sum += x / order.len() as f32);
            }
            self.rows.push(&mean);
        }
    }

    fn truncate(&mut self, blocks: usize) {
        self.rows.truncate(blocks);
    }

    fn score(&mut self, queries: &[f32], scores: &mut [f32]) {
        self.query.clear();
        self.query.resize(self.dim, 0.0);
        let group = (queries.len() / self.dim) as f32;
        for query in queries.chunks_exact(self.dim) {
            self.query.iter_mut().zip(query).for_each(|(sum, x)| *sum += x / group);
        }
        scores.copy_from_slice(self.rows.multiply(&self.query));
    }

    fn fork(&self) -> Box<dyn Index> {
        Box::new(self.clone())
    }

    fn bytes(&self) -> usize {
        self.rows.bytes()
    }
}
