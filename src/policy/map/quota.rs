//! Each chunk of a prompt keeps its own share, scored by itself.
//!
//! ```text
//! chunk [a, b) of T tokens keeps n b / T - n a / T tokens, rounded down each
//! ```
//!
//! What is important far from the others stays in reach, and a chunk can be scored before the next
//! one is read.

use super::{Context, Decision, Entry, Map, Scores, Subset};
use crate::error::Result;
use crate::policy::HeadInput;
use crate::policy::select::top;
use crate::registry::{Domain, Param};
use crate::shape::{KeepSet, LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "quota",
    summary: "each chunk of the prompt keeps its own share",
    paper: "ChunkPress of kvpress; Finch, arXiv 2408.00167",
    params: &[Param {
        name: "len",
        help: "tokens of a chunk",
        domain: Domain::Int { default: 1024, min: 1, max: 1 << 30 },
    }],
    needs: Needs::NONE,
    examples: &["knorm | quota(len=128) | keep(0.5)"],
    create: |args| Ok(Box::new(Quota { len: args.count("len") })),
};

#[derive(Debug)]
struct Quota {
    len: usize,
}

impl Map for Quota {
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
        let longest = heads.iter().map(|head| head.positions.len()).max().unwrap_or(0);
        let mut kept = vec![KeepSet::default(); heads.len()];
        for start in (0..longest).step_by(self.len) {
            let end = start.saturating_add(self.len);
            let range = |head: &HeadInput<'_>| {
                let len = head.positions.len();
                start.min(len)..end.min(len)
            };
            let ranges: Vec<_> = heads.iter().map(range).collect();
            let quotas: Vec<usize> = ranges
                .iter()
                .zip(heads.iter().zip(context.shares))
                .map(|(range, (head, share))| {
                    let len = head.positions.len();
                    let up_to =
                        |i: usize| (i as u128 * (*share).min(len) as u128) / len.max(1) as u128;
                    (up_to(range.end) - up_to(range.start)) as usize
                })
                .collect();
            let indices: Vec<Vec<usize>> =
                ranges.iter().map(|range| range.clone().collect()).collect();
            let part = Subset::new(context.layer, &indices);
            let scored = (context.earlier)(&part.input(context.layer), &quotas)?;
            for (h, kept) in kept.iter_mut().enumerate() {
                for index in top(&scored.heads[h], quotas[h]).iter() {
                    let index = start + index;
                    kept.push_range(index..index + 1);
                }
            }
        }
        scores.decision = Decision::Kept(kept);
        Ok(())
    }
}
