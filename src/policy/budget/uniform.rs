//! Every head keeps the same number of tokens.

use super::{Budget, Entry};
use crate::shape::{LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "uniform",
    summary: "the same number of tokens for every head",
    paper: "",
    params: &[],
    needs: Needs::NONE,
    examples: &["snapkv | uniform | keep(0.25)"],
    create: |_| Ok(Box::new(Uniform)),
};

#[derive(Debug)]
struct Uniform;

impl Budget for Uniform {
    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Sequence
    }
}
