//! ChunkKV: whole runs of tokens stay or go, the same for all heads of a layer.
//!
//! ```text
//! score of a chunk = mean over its tokens of the sum over heads of their scores
//! keep             = the best chunks as long as they fit the allowance
//! ```
//!
//! A chunk with a protected token comes first. If not even the best chunk fits, its best tokens stay.

use super::{Context, Entry, Map, Scores, decide};
use crate::error::Result;
use crate::policy::HeadScores;
use crate::policy::select::{ranks, top};
use crate::registry::{Domain, Param};
use crate::shape::{KeepSet, LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "chunk",
    summary: "keeps or drops whole runs of tokens",
    paper: "ChunkKV, arXiv 2502.00299",
    params: &[Param {
        name: "len",
        help: "tokens of a chunk",
        domain: Domain::Int { default: 20, min: 1, max: 1 << 20 },
    }],
    needs: Needs::NONE,
    examples: &["snapkv | chunk(len=20) | keep(0.5)", "keydiff | chunk | keep_tokens(256)"],
    create: |args| Ok(Box::new(Chunk { len: args.count("len") })),
};

#[derive(Debug)]
struct Chunk {
    len: usize,
}

impl Map for Chunk {
    fn lane_width(&self, _before: LaneWidth) -> LaneWidth {
        LaneWidth::Layer
    }

    fn decides(&self) -> bool {
        true
    }

    fn map(&self, context: &Context<'_>, scores: &mut Scores) -> Result<()> {
        decide(context, scores, |tokens, n| self.choose(tokens, n));
        Ok(())
    }
}

impl Chunk {
    /// At most `n` tokens, fewer than there are.
    fn choose(&self, tokens: &HeadScores, n: usize) -> KeepSet {
        let mean = |chunk: &[f32]| chunk.iter().sum::<f32>() / chunk.len() as f32;
        let chunks = HeadScores {
            scores: tokens.scores.chunks(self.len).map(mean).collect(),
            protected: tokens
                .protected
                .chunks(self.len)
                .map(|chunk| chunk.contains(&true))
                .collect(),
        };
        let mut order = ranks(&chunks);
        order.sort_unstable_by(|a, b| b.cmp(a));
        let range =
            |chunk: usize| chunk * self.len..((chunk + 1) * self.len).min(tokens.scores.len());
        let (mut kept, mut left) = (Vec::new(), n);
        for rank in order {
            let chunk = range(rank.index());
            if chunk.len() > left {
                if kept.is_empty() {
                    let part = HeadScores {
                        scores: tokens.scores[chunk.clone()].to_vec(),
                        protected: tokens.protected[chunk.clone()].to_vec(),
                    };
                    let best = top(&part, n);
                    return KeepSet::from_indices(best.iter().map(|i| chunk.start + i));
                }
                break;
            }
            left -= chunk.len();
            kept.push(chunk);
        }
        kept.sort_unstable_by_key(|chunk| chunk.start);
        let mut set = KeepSet::default();
        kept.into_iter().for_each(|chunk| set.push_range(chunk));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(len: usize, scores: &[f32], protected: &[usize], n: usize) -> Vec<usize> {
        let protected = (0..scores.len()).map(|i| protected.contains(&i)).collect();
        let tokens = HeadScores { scores: scores.to_vec(), protected };
        Chunk { len }.choose(&tokens, n).iter().collect()
    }

    #[test]
    fn the_best_chunks_that_fit() {
        let scores = [1.0, 0.0, 5.0, 5.0, 9.0, 0.0, 0.5];
        assert_eq!(choose(2, &scores, &[], 4), [2, 3, 4, 5]);
        assert_eq!(choose(2, &scores, &[], 5), [2, 3, 4, 5]);
        assert_eq!(choose(2, &scores, &[6], 5), [2, 3, 4, 5, 6]);
        assert_eq!(choose(2, &scores, &[6], 2), [6]);
        assert_eq!(choose(1, &scores, &[], 3), [2, 3, 4]);
    }

    #[test]
    fn a_chunk_that_does_not_fit_leaves_its_best_tokens() {
        assert_eq!(choose(4, &[1.0, 3.0, 2.0, 0.0, 1.0], &[], 2), [1, 2]);
        assert_eq!(choose(4, &[1.0, 3.0, 2.0, 0.0, 1.0], &[3], 2), [1, 3]);
        assert_eq!(choose(99, &[1.0, 3.0, 2.0], &[], 1), [1]);
    }
}
