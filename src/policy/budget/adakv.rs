//! AdaKV: heads compete for the allowance of their layer.
//!
//! ```text
//! each head keeps its best int(floor * n) tokens, at least one (the safeguard);
//! the rest of the H * n tokens are the best of all heads together
//! ```
//!
//! This is the safeguard of kvpress; the authors' code blends budgets instead. Protected tokens are
//! part of what a head keeps. Ties go to the lower head, then to the lower position. Needs ragged
//! lanes. A head shorter than `n` leaves the difference to the others, so that running it again on
//! its own result changes nothing.

use super::{Budget, Entry};
use crate::error::Result;
use crate::policy::HeadScores;
use crate::policy::select::ranks;
use crate::registry::{Domain, Param};
use crate::shape::{LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "adakv",
    summary: "heads of a layer compete for its allowance",
    paper: "Ada-KV, arXiv 2407.11550",
    params: &[Param {
        name: "floor",
        help: "fraction of the uniform budget that every head keeps",
        domain: Domain::Real { default: 0.2, min: 0.0, max: 1.0 },
    }],
    needs: Needs::NONE,
    examples: &["snapkv | adakv(floor=0.2) | keep(0.25)", "h2o | adakv | keep_tokens(512)"],
    create: |args| Ok(Box::new(AdaKv { floor: args.real("floor") })),
};

#[derive(Debug)]
struct AdaKv {
    floor: f64,
}

/// A token outside the safeguard; greater is better.
type Contender = (u32, std::cmp::Reverse<(usize, usize)>);

impl Budget for AdaKv {
    fn spread(&self, _layer: usize, scores: &[HeadScores], shares: &[usize]) -> Result<Vec<usize>> {
        let safe = |(head, share): (&HeadScores, &usize)| self.safeguard(head, *share);
        Ok(compete(scores, shares, &scores.iter().zip(shares).map(safe).collect::<Vec<_>>()))
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Head
    }

    /// The floor, and what is protected.
    fn safeguard(&self, head: &HeadScores, share: usize) -> usize {
        let floor = ((share as f64 * self.floor + 1e-9) as usize).max(1);
        let protected = head.protected.iter().filter(|protected| **protected).count();
        floor.max(protected).min(share).min(head.scores.len())
    }
}

/// Spreads the sum of `shares`: head `h` keeps its best `safe[h]` tokens, and all heads compete for
/// what is left. Ties go to the lower head, then to the lower position.
pub(super) fn compete(scores: &[HeadScores], shares: &[usize], safe: &[usize]) -> Vec<usize> {
    let lens = scores.iter().map(|head| head.scores.len());
    let total = lens.sum::<usize>().min(shares.iter().sum());
    let mut contenders: Vec<Contender> = Vec::new();
    let mut budgets: Vec<usize> = Vec::with_capacity(scores.len());
    for (h, (head, safe)) in scores.iter().zip(safe).enumerate() {
        let safe = *safe;
        let mut ranks = ranks(head);
        if safe < ranks.len() {
            ranks.select_nth_unstable_by(safe, |a, b| b.cmp(a));
            let rest = ranks[safe..].iter();
            contenders
                .extend(rest.map(|rank| (rank.score(), std::cmp::Reverse((h, rank.index())))));
        }
        budgets.push(safe);
    }
    let left = total - budgets.iter().sum::<usize>();
    if left > 0 && left < contenders.len() {
        contenders.select_nth_unstable_by(left, |a, b| b.cmp(a));
    }
    contenders.iter().take(left).for_each(|(_, at)| budgets[at.0.0] += 1);
    budgets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(scores: &[f32]) -> HeadScores {
        HeadScores { scores: scores.to_vec(), protected: vec![false; scores.len()] }
    }

    #[test]
    fn the_better_head_gets_what_the_floor_leaves() {
        let heads = [head(&[9.0; 10]), head(&[1.0; 10])];
        assert_eq!(AdaKv { floor: 0.2 }.spread(0, &heads, &[5, 5]).unwrap(), [9, 1]);
        assert_eq!(AdaKv { floor: 0.0 }.spread(0, &heads, &[5, 5]).unwrap(), [9, 1]);
        assert_eq!(AdaKv { floor: 0.6 }.spread(0, &heads, &[5, 5]).unwrap(), [7, 3]);
        assert_eq!(AdaKv { floor: 1.0 }.spread(0, &heads, &[5, 5]).unwrap(), [5, 5]);
    }

    #[test]
    fn ties_go_to_the_lower_head() {
        let heads = [head(&[1.0; 8]), head(&[1.0; 8])];
        assert_eq!(AdaKv { floor: 0.25 }.spread(0, &heads, &[4, 4]).unwrap(), [7, 1]);
    }

    #[test]
    fn ragged_heads_keep_the_total_of_the_layer() {
        let heads = [head(&[9.0; 9]), head(&[1.0; 1]), head(&[2.0; 2])];
        assert_eq!(AdaKv { floor: 0.2 }.spread(0, &heads, &[4, 4, 4]).unwrap(), [9, 1, 2]);
        assert_eq!(AdaKv { floor: 0.2 }.spread(0, &heads, &[3, 3, 3]).unwrap(), [7, 1, 1]);
    }

    #[test]
    fn protected_tokens_are_never_traded() {
        let mut low = head(&[0.0; 10]);
        low.protected[6..].fill(true);
        assert_eq!(
            AdaKv { floor: 0.2 }.spread(0, &[head(&[9.0; 10]), low], &[5, 5]).unwrap(),
            [6, 4]
        );
    }

    #[test]
    fn empty_heads_and_no_heads_are_fine() {
        assert_eq!(AdaKv { floor: 0.2 }.spread(0, &[], &[]).unwrap(), [0usize; 0]);
        assert_eq!(
            AdaKv { floor: 0.2 }.spread(0, &[head(&[]), head(&[1.0])], &[3, 3]).unwrap(),
            [0, 1]
        );
    }
}
