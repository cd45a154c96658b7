//! Everything stays: the reference that others are compared with.

use super::{Entry, Score};
use crate::error::Result;
use crate::policy::{Allowance, Event, HeadScores, LayerInput};
use crate::shape::{LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "full",
    summary: "keeps every token",
    paper: "",
    params: &[],
    create: |_| Ok(Box::new(Full)),
};

#[derive(Debug)]
struct Full;

impl Score for Full {
    fn needs(&self) -> Needs {
        Needs::NONE
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Sequence
    }

    fn events(&self) -> &'static [Event] {
        &[]
    }

    fn allowance(&self, _asked: Allowance) -> Allowance {
        Allowance::All
    }

    fn score(&self, layer: &LayerInput<'_>, _budget: &[usize]) -> Result<Vec<HeadScores>> {
        Ok(layer.heads.iter().map(HeadScores::equal).collect())
    }
}
