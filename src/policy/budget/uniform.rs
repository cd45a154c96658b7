//! Every head keeps the same number of tokens.

use super::{Budget, Entry};
use crate::policy::HeadScores;
use crate::shape::LaneWidth;

pub(super) static ENTRY: Entry = Entry {
    name: "uniform",
    summary: "the same number of tokens for every head",
    paper: "",
    params: &[],
    create: |_| Ok(Box::new(Uniform)),
};

#[derive(Debug)]
struct Uniform;

impl Budget for Uniform {
    fn spread(&self, _scores: &[HeadScores], alone: &[usize]) -> Vec<usize> {
        alone.to_vec()
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Sequence
    }
}
