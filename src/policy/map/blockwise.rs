//! Block by block: survivors so far and the next tokens compete for the allowance.
//!
//! ```text
//! kept = the first n tokens
//! for each next block of `len` tokens: kept = the best n of kept and block, scored together
//! ```
//!
//! What KeyDiff does to a prompt that never fits into memory as a whole.

use super::{Context, Decision, Entry, Map, Scores, Subset};
use crate::error::Result;
use crate::policy::select::top;
use crate::registry::{Domain, Param};
use crate::shape::{KeepSet, LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "blockwise",
    summary: "scores survivors with each next block, as if the prompt never fit",
    paper: "KeyDiff, arXiv 2504.15364",
    params: &[Param {
        name: "len",
        help: "tokens of a block",
        domain: Domain::Int { default: 128, min: 1, max: 1 << 30 },
    }],
    needs: Needs::NONE,
    examples: &["keydiff | blockwise(128) | keep_tokens(256)"],
    create: |args| Ok(Box::new(Blockwise { len: args.count("len") })),
};

#[derive(Debug)]
struct Blockwise {
    len: usize,
}

impl Map for Blockwise {
    fn lane_width(&self, _before: LaneWidth) -> LaneWidth {
        LaneWidth::Head
    }

    fn decides(&self) -> bool {
        true
    }

    fn splits(&self) -> bool {
        true
    }

    fn map(&self, context: &Context<'_>, scores: &mut Scores) -> Result<()> {
        let heads = &context.layer.heads;
        let shares: Vec<usize> = heads
            .iter()
            .zip(context.shares)
            .map(|(head, n)| head.positions.len().min(*n))
            .collect();
        let mut kept: Vec<Vec<usize>> = shares.iter().map(|n| (0..*n).collect()).collect();
        let mut next = shares.clone();
        let is_open = |next: &[usize]| {
            heads.iter().zip(next).any(|(head, next)| *next < head.positions.len())
        };
        while is_open(&next) {
            for ((kept, next), head) in kept.iter_mut().zip(&mut next).zip(heads) {
                let end = next.saturating_add(self.len).min(head.positions.len());
                kept.extend(*next..end);
                *next = end;
            }
            let part = Subset::new(context.layer, &kept);
            let scored = (context.earlier)(&part.input(context.layer), &shares)?;
            for (h, kept) in kept.iter_mut().enumerate() {
                let best = top(&scored.heads[h], shares[h]);
                *kept = best.iter().map(|i| kept[i]).collect();
            }
        }
        scores.decision = Decision::Kept(kept.into_iter().map(KeepSet::from_indices).collect());
        Ok(())
    }
}
