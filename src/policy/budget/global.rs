//! One allowance for all heads of all layers: the best tokens of the model stay.
//!
//! ```text
//! the allowances of all heads together go to the best tokens of all heads
//! ```
//!
//! For scores whose scale means the same in every layer, such as the probabilities of KVzip. Each
//! head keeps at least one token. The scores of all layers are held at once: 5 bytes for each token
//! of each KV head.

use super::adakv::compete;
use super::{Budget, Entry};
use crate::error::Result;
use crate::policy::HeadScores;
use crate::shape::{LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "global",
    summary: "heads of all layers compete for the allowance of the model",
    paper: "KVzip, arXiv 2505.23416",
    params: &[],
    needs: Needs::NONE,
    examples: &["h2o | global | keep(0.5)"],
    create: |_| Ok(Box::new(Global)),
};

#[derive(Debug)]
struct Global;

impl Budget for Global {
    fn spread(&self, _layer: usize, scores: &[HeadScores], shares: &[usize]) -> Result<Vec<usize>> {
        let safe = |(head, share): (&HeadScores, &usize)| {
            let protected = head.protected.iter().filter(|protected| **protected).count();
            protected.max(1).min(*share).min(head.scores.len())
        };
        Ok(compete(scores, shares, &scores.iter().zip(shares).map(safe).collect::<Vec<_>>()))
    }

    fn is_global(&self) -> bool {
        true
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Head
    }
}
