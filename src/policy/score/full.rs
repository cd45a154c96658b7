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
    needs: Needs::NONE,
    examples: &["full", "full | quant(k=had+q4_0, v=q4_0)"],
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

    fn events(&self, _allowance: Allowance) -> &'static [Event] {
        &[]
    }

    fn own_allowance(&self) -> Option<Allowance> {
        Some(Allowance::All)
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        Ok(layer.heads.iter().map(HeadScores::equal).collect())
    }
}
