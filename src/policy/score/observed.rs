//! ObservedAttention: the probability that a token received, for each query that could see it.
//!
//! ```text
//! score[j] = mean over the group's heads of (sum over t of P[t, j]) / (T - position[j])
//! ```
//!
//! H2O without its bias towards early tokens, which more queries have seen.

use super::{Entry, Score, per_head};
use crate::error::Result;
use crate::policy::{HeadScores, LayerInput};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "observed",
    summary: "keeps tokens by the mean attention of the queries that could see them",
    paper: "ObservedAttention of kvpress, after H2O, arXiv 2306.14048",
    params: &[],
    needs: Needs::COLUMN_SUM,
    examples: &["observed | keep(0.5)"],
    create: |_| Ok(Box::new(Observed)),
};

#[derive(Debug)]
struct Observed;

impl Score for Observed {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        Ok(per_head(layer, |head| {
            let score = |(i, position): (usize, &i32)| {
                let observers = layer.sequence_len.saturating_sub(*position as usize).max(1);
                let sum = head.column_sums.get(i).copied().unwrap_or(0.0);
                sum / layer.group as f32 / observers as f32
            };
            HeadScores::open(head.positions.iter().enumerate().map(score).collect())
        }))
    }
}
