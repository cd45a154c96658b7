//! Ranks instead of scores: every head counts alike, whatever the scale of its scores.
//!
//! ```text
//! score'[j] = tokens of the head that score below j, as a part of all
//! ```
//!
//! For budgets that compare heads of scores without a common scale: `knorm | rank | adakv | keep(0.5)`
//! is uniform, and `znorm` keeps the shape of the scores.

use super::{Context, Entry, Map, Scores};
use crate::error::Result;
use crate::policy::select::ranks;
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "rank",
    summary: "scores become ranks inside their head",
    paper: "",
    params: &[],
    needs: Needs::NONE,
    examples: &["knorm | rank | adakv | keep(0.5)"],
    create: |_| Ok(Box::new(Rank)),
};

#[derive(Debug)]
struct Rank;

impl Map for Rank {
    fn map(&self, _context: &Context<'_>, scores: &mut Scores) -> Result<()> {
        for head in &mut scores.heads {
            let mut order = ranks(head);
            order.sort_unstable();
            let len = order.len() as f32;
            for (below, rank) in order.into_iter().enumerate() {
                head.scores[rank.index()] = below as f32 / len;
            }
        }
        Ok(())
    }
}
