//! Budgets: how the allowance of a layer is spread over its KV heads.

use std::fmt::Debug;

use super::HeadScores;
use crate::error::Result;
use crate::registry::{Args, Param, registry};
use crate::shape::LaneWidth;

registry! {
    /// Every budget, in the order of the documentation.
    pub static BUDGETS: Entry = { uniform, adakv, }
}

/// Spreads an allowance.
pub trait Budget: Debug + Send + Sync {
    /// Tokens that each head keeps, at most as many as it has. `shares[h]` is the allowance of head
    /// `h`, which may be more than it has; heads of different lengths may use what others leave.
    fn spread(&self, scores: &[HeadScores], shares: &[usize]) -> Vec<usize>;

    /// The coarsest lanes that can express what this budget chooses; `Sequence` if it leaves every
    /// head its share.
    fn lane_width(&self) -> LaneWidth;
}

/// How the registry describes a budget.
#[derive(Debug)]
pub struct Entry {
    /// Name in specs.
    pub name: &'static str,
    /// One line for the documentation.
    pub summary: &'static str,
    /// Where it is from.
    pub paper: &'static str,
    /// Parameters in positional order.
    pub params: &'static [Param],
    /// Pipelines that tests and benches visit.
    pub examples: &'static [&'static str],
    /// Makes the budget.
    pub create: fn(&Args) -> Result<Box<dyn Budget>>,
}
