//! The heads of a layer keep the same tokens: each gets the mean of all scores.
//!
//! What is left of per-head memory is that of one table for each layer, which more kernels can read.

use super::{Context, Entry, Map, Scores, agreeing_heads, summed};
use crate::error::Result;
use crate::shape::{LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "agree",
    summary: "the heads of a layer keep the same tokens, by their mean score",
    paper: "",
    params: &[],
    needs: Needs::NONE,
    examples: &["knorm | agree | keep(0.5)"],
    create: |_| Ok(Box::new(Agree)),
};

#[derive(Debug)]
struct Agree;

impl Map for Agree {
    fn lane_width(&self, before: LaneWidth) -> LaneWidth {
        before.min(LaneWidth::Layer)
    }

    fn map(&self, context: &Context<'_>, scores: &mut Scores) -> Result<()> {
        for heads in agreeing_heads(context.layer) {
            let mut mean = summed(&scores.heads[heads.clone()]);
            mean.scores.iter_mut().for_each(|score| *score /= heads.len() as f32);
            scores.heads[heads].fill(mean);
        }
        Ok(())
    }
}
