//! BUZZ: a beehive of segments, each of which sends its best tokens first.
//!
//! ```text
//! segments  = runs of `stride` tokens that are not protected
//! place[j]  = tokens of the segment of j with a better score
//! score'[j] = how j ranks by (place, score): all best ones of their segments, then all second ones, ...
//! ```
//!
//! So what stays is spread over the sequence: with a budget of one token for each segment these are the
//! local maxima. Sinks and the sliding window are those of the score before it; the authors take
//! accumulated attention, as H2O does, and run whenever enough new tokens are there: `every(n)`.

use super::{Context, Entry, Map, Scores};
use crate::error::Result;
use crate::policy::HeadScores;
use crate::policy::select::ranks;
use crate::registry::{Domain, Param};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "buzz",
    summary: "segments of tokens keep their best first, so that what stays is spread out",
    paper: "BUZZ, arXiv 2410.23079",
    params: &[Param {
        name: "stride",
        help: "tokens of a segment",
        domain: Domain::Int { default: 5, min: 1, max: 1 << 20 },
    }],
    needs: Needs::NONE,
    examples: &["every(16) | h2o(recent=32) | buzz(stride=5) | keep_tokens(128)"],
    create: |args| Ok(Box::new(Buzz { stride: args.count("stride") })),
};

#[derive(Debug)]
struct Buzz {
    stride: usize,
}

impl Map for Buzz {
    fn map(&self, _context: &Context<'_>, scores: &mut Scores) -> Result<()> {
        scores.heads.iter_mut().for_each(|head| self.reorder(head));
        Ok(())
    }
}

impl Buzz {
    fn reorder(&self, head: &mut HeadScores) {
        let mut segment_of = vec![None; head.scores.len()];
        let open = (0..head.scores.len()).filter(|i| !head.protected[*i]);
        for (n, i) in open.enumerate() {
            segment_of[i] = Some(n / self.stride);
        }
        let mut order = ranks(head);
        order.sort_unstable_by(|a, b| b.cmp(a));
        let mut places = vec![0u32; head.scores.len().div_ceil(self.stride)];
        let mut order: Vec<(u32, usize)> = order
            .into_iter()
            .filter_map(|rank| {
                let place = &mut places[segment_of[rank.index()]?];
                *place += 1;
                Some((*place, rank.index()))
            })
            .collect();
        // Stable: within a place the better score stays before.
        order.sort_by_key(|(place, _)| *place);
        for (n, (_, i)) in order.into_iter().enumerate() {
            head.scores[i] = -(n as f32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::select::top;

    #[test]
    fn segments_send_their_best_in_turn() {
        let scores = vec![9.0, 8.0, 7.0, 1.0, 2.0, 3.0, 5.0, 5.0, 0.0, 6.0];
        let mut head = HeadScores { protected: (0..10).map(|i| i == 9).collect(), scores };
        let original = head.clone();
        Buzz { stride: 3 }.reorder(&mut head);
        let kept = |n: usize| top(&head, n).iter().collect::<Vec<_>>();
        assert_eq!(kept(4), [0, 5, 6, 9], "the best of each segment and the protected one");
        assert_eq!(kept(6), [0, 1, 5, 6, 7, 9]);
        assert_eq!(kept(10).len(), 10);
        // One segment for all is the order of the scores.
        head = original.clone();
        Buzz { stride: 10 }.reorder(&mut head);
        for n in 0..10 {
            assert_eq!(top(&head, n), top(&original, n));
        }
    }
}
