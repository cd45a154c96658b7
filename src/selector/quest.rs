//! Quest: blocks whose keys could match a query best, by an upper bound.
//!
//! ```text
//! low[c], high[c] = the least and the most of channel c of the keys of the block
//! bound[h]        = sum over c of max(q[h, c] * low[c], q[h, c] * high[c])  >=  q[h] . k  for each k
//! score           = max over the query heads h of the group of bound[h]
//! ```
//!
//! The sum is a product of `[high, low]` with the positive and the negative part of the query. The
//! bounds are kept in f16, `4 * head_dim` bytes for a block, so a block should have 32 tokens or more:
//! with 16 the bounds alone are an eighth of the keys. The authors choose for each query head, and
//! leave the first two layers dense; here the group shares one choice.

use half::f16;

use super::rows::BlockRows;
use super::{Entry, Index, NewBlocks, Reach, Selector, reach};
use crate::registry::Param;
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "quest",
    summary: "decode reads the blocks whose keys could match best, by their least and most in each \
              channel",
    paper: "Quest, arXiv 2406.10774",
    params: PARAMS,
    needs: Needs::NONE,
    examples: &["quest(tokens=2k)", "snapkv | keep(0.5) | quest(tokens=64, dense=0)"],
    create: |args| Ok(Box::new(Quest(Reach::from_args(args)))),
};

const PARAMS: &[Param] = &reach(1024, 0, 0, 2);

#[derive(Debug)]
struct Quest(Reach);

#[derive(Debug, Clone)]
struct Bounds {
    dim: usize,
    /// `[high, low]` of each block.
    rows: BlockRows,
    /// Positive and negative parts of the queries.
    parts: Vec<f32>,
}

impl Selector for Quest {
    fn reach(&self) -> Reach {
        self.0
    }

    fn index(&self, dim: usize) -> Box<dyn Index> {
        Box::new(Bounds { dim, rows: BlockRows::new(2 * dim), parts: Vec::new() })
    }
}

impl Index for Bounds {
    fn extend(&mut self, blocks: &NewBlocks<'_>) {
        let mut bounds = vec![0.0; 2 * self.dim];
        for (keys, _) in blocks.each(self.dim) {
            extremes(keys, &mut bounds);
            self.rows.push(&bounds);
        }
    }

    fn truncate(&mut self, blocks: usize) {
        self.rows.truncate(blocks);
    }

    fn score(&mut self, queries: &[f32], scores: &mut [f32]) {
        self.parts.clear();
        for query in queries.chunks_exact(self.dim) {
            self.parts.extend(query.iter().map(|x| x.max(0.0)));
            self.parts.extend(query.iter().map(|x| x.min(0.0)));
        }
        self.rows.multiply(&self.parts);
        self.rows.largest(scores);
    }

    fn fork(&self) -> Box<dyn Index> {
        Box::new(self.clone())
    }

    fn bytes(&self) -> usize {
        self.rows.bytes()
    }
}

/// The most and the least of each channel of `keys`, `[high, low][dim]`, passing over NaN; what is beyond f16 is
/// its end, because infinity times 0 would be no number.
pub(crate) fn extremes(keys: &[f32], out: &mut [f32]) {
    let dim = out.len() / 2;
    let (high, low) = out.split_at_mut(dim);
    high.fill(f32::NEG_INFINITY);
    low.fill(f32::INFINITY);
    for key in keys.chunks_exact(dim) {
        high.iter_mut().zip(key).for_each(|(high, x)| *high = high.max(*x));
        low.iter_mut().zip(key).for_each(|(low, x)| *low = low.min(*x));
    }
    let most = f16::MAX.to_f32();
    out.iter_mut().for_each(|x| *x = x.clamp(-most, most));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_beyond_f16_do_not_hide_their_block() {
        for huge in [1e6, f32::INFINITY] {
            let mut index = Bounds { dim: 2, rows: BlockRows::new(4), parts: Vec::new() };
            // Channel 0 is no good to this query, channel 1 is.
            let keys = [0.0, 1.0, 0.0, 2.0, huge, 3.0, 0.0, 4.0];
            index.extend(&NewBlocks { keys: &keys, rows: &[2, 2], received: &[] });
            let mut scores = [f32::NAN; 2];
            index.score(&[-1.0, 1.0], &mut scores);
            assert_eq!(scores, [2.0, 4.0]);
        }
    }
}
