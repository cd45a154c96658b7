//! Entropy-gated ChunkKV: an important chunk whose scores are spiky leaves only its best tokens.
//!
//! ```text
//! H[c]  = entropy of the scores of chunk c as a distribution / log(its tokens)
//! in order of falling chunk scores, while the allowance lasts:
//!   chunks of at least the median score and less than the median entropy keep `low` tokens,
//!   the others all
//! the best of the tokens left over fill the allowance
//! ```
//!
//! Scores are sums over the heads of a layer. A protected token counts as 1 above the best.

use super::{Context, Entry, Map, Scores, decide};
use crate::error::{Result, ensure};
use crate::policy::HeadScores;
use crate::policy::select::{ranks, top};
use crate::registry::{Domain, Param};
use crate::shape::{KeepSet, LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "entropy_chunk",
    summary: "keeps whole runs of tokens, but of spiky ones only the best tokens",
    paper: "EntropyGatedChunkKV of kvpress 0.5.5, after ChunkKV, arXiv 2502.00299",
    params: &[
        Param {
            name: "len",
            help: "tokens of a chunk, more than low",
            domain: Domain::Int { default: 10, min: 2, max: 1 << 20 },
        },
        Param {
            name: "low",
            help: "tokens that an important but spiky chunk keeps",
            domain: Domain::Int { default: 4, min: 1, max: 1 << 20 },
        },
    ],
    needs: Needs::NONE,
    examples: &["snapkv | entropy_chunk(len=10, low=4) | keep(0.5)"],
    create: |args| {
        let (len, low) = (args.count("len"), args.count("low"));
        ensure!(low < len, InvalidArgument, "entropy_chunk: low is {low}, must be below len {len}");
        Ok(Box::new(EntropyChunk { len, low }))
    },
};

/// Keeps logarithms and quotients finite.
const EPSILON: f32 = 1e-12;

#[derive(Debug)]
struct EntropyChunk {
    len: usize,
    low: usize,
}

impl Map for EntropyChunk {
    fn lane_width(&self, _before: LaneWidth) -> LaneWidth {
        LaneWidth::Layer
    }

    fn decides(&self) -> bool {
        true
    }

    fn map(&self, context: &Context<'_>, scores: &mut Scores) -> Result<()> {
        let open = |head: &HeadScores| {
            let pairs = head.scores.iter().zip(&head.protected);
            pairs.filter(|pair| !pair.1).map(|pair| *pair.0).fold(f32::NEG_INFINITY, f32::max)
        };
        let best = scores.heads.iter().map(open).fold(f32::NEG_INFINITY, f32::max);
        let highest = if best.is_finite() { best + 1.0 } else { 1.0 };
        for head in &mut scores.heads {
            for (score, protected) in head.scores.iter_mut().zip(&head.protected) {
                *score = if *protected { highest } else { *score };
            }
        }
        decide(context, scores, |tokens, n| self.choose(tokens, n));
        Ok(())
    }
}

impl EntropyChunk {
    fn choose(&self, tokens: &HeadScores, n: usize) -> KeepSet {
        let len = tokens.scores.len();
        let chunks = || tokens.scores.chunks(self.len);
        let means: Vec<f32> =
            chunks().map(|chunk| chunk.iter().sum::<f32>() / chunk.len() as f32).collect();
        let entropies: Vec<f32> = chunks().map(entropy).collect();
        let (high, spiky) = (median(&means), median(&entropies));
        let mut order = ranks(&HeadScores::open(means.clone()));
        order.sort_unstable_by(|a, b| b.cmp(a));
        let (mut kept, mut left) = (vec![false; len], n);
        for chunk in order.into_iter().map(|rank| rank.index()) {
            let range = chunk * self.len..((chunk + 1) * self.len).min(len);
            let mut count = range.len().min(left);
            if means[chunk] >= high && entropies[chunk] < spiky {
                count = count.min(self.low);
            }
            let part = part(tokens, range.clone());
            top(&part, count).iter().for_each(|i| kept[range.start + i] = true);
            left -= count;
        }
        let rest: Vec<usize> = (0..len).filter(|i| !kept[*i]).collect();
        let scores = rest.iter().map(|i| tokens.scores[*i]).collect();
        let protected = rest.iter().map(|i| tokens.protected[*i]).collect();
        top(&HeadScores { scores, protected }, left).iter().for_each(|i| kept[rest[i]] = true);
        KeepSet::from_indices((0..len).filter(|i| kept[*i]))
    }
}

fn part(tokens: &HeadScores, range: std::ops::Range<usize>) -> HeadScores {
    HeadScores {
        scores: tokens.scores[range.clone()].to_vec(),
        protected: tokens.protected[range].to_vec(),
    }
}

/// The entropy of scores, moved up if some are negative, as a part of the largest possible one.
fn entropy(scores: &[f32]) -> f32 {
    if scores.len() == 1 {
        return 0.0;
    }
    let least = scores.iter().copied().fold(0.0, f32::min);
    let total: f32 = scores.iter().map(|score| score - least).sum::<f32>() + EPSILON;
    let term = |score: &f32| {
        let p = (score - least) / total;
        -p * (p + EPSILON).ln()
    };
    (scores.iter().map(term).sum::<f32>() / (scores.len() as f32).ln()).clamp(0.0, 1.0)
}

/// The lower median.
fn median(values: &[f32]) -> f32 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f32::total_cmp);
    sorted[(sorted.len() - 1) / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spiky_chunks_leave_room_for_others() {
        let map = EntropyChunk { len: 3, low: 1 };
        let scores = vec![9.0, 0.0, 0.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1];
        let tokens = HeadScores::open(scores);
        let kept: Vec<usize> = map.choose(&tokens, 5).iter().collect();
        assert_eq!(kept, [0, 3, 4, 5, 6]);
        assert!(entropy(&[1.0, 1.0, 1.0]) > 0.999 && entropy(&[1.0, 0.0, 0.0]) < 1e-6);
        assert_eq!(entropy(&[-3.0]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0, 4.0]), 2.0);
    }
}
