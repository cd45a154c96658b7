//! Maps: what happens to scores before a budget is spread over heads.
//!
//! A map either changes scores and protection, or decides what stays itself (`chunk` keeps whole
//! runs of tokens); nothing but the allowance may follow a map that decides.

mod subset;

use std::fmt::Debug;

use super::budget::Budget;
use super::{HeadScores, LayerInput};
use crate::error::Result;
use crate::registry::{StageEntry, registry};
use crate::shape::{KeepSet, LaneWidth, Needs};

use subset::Subset;

registry! {
    /// Every map, in the order of the documentation.
    pub static MAPS: Entry = {
        protect, pool, vnorm, rank, znorm, agree, buzz, critical, chunk, entropy_chunk, quota, blockwise,
    }
}

/// Scores of a layer on their way to keep sets.
#[derive(Debug, Clone, Default)]
pub struct Scores {
    /// One for each KV head.
    pub heads: Vec<HeadScores>,
    /// What a map has settled for the stages after it.
    pub decision: Decision,
}

/// What is settled before the budget.
#[derive(Debug, Clone, Default)]
pub enum Decision {
    /// Nothing.
    #[default]
    Open,
    /// How many tokens each head keeps.
    Budgets(Vec<usize>),
    /// Which tokens each head keeps.
    Kept(Vec<KeepSet>),
}

/// What a map may look at besides the scores.
pub struct Context<'a> {
    /// The layer.
    pub layer: &'a LayerInput<'a>,
    /// The allowance of each head, possibly more than it has.
    pub shares: &'a [usize],
    /// The budget that follows.
    pub budget: &'a dyn Budget,
    /// Scores of another input by the stages before this map.
    pub earlier: &'a Earlier<'a>,
}

/// Runs the stages before a map on an input with the given allowances.
pub type Earlier<'a> = dyn Fn(&LayerInput<'_>, &[usize]) -> Result<Scores> + 'a;

/// Changes scores.
pub trait Map: Debug + Send + Sync {
    /// What the engine has to hand over.
    fn needs(&self) -> Needs {
        Needs::NONE
    }

    /// The coarsest lanes that can express the scores after it, if `before` can those before it.
    fn lane_width(&self, before: LaneWidth) -> LaneWidth {
        before
    }

    /// Whether it settles what stays.
    fn decides(&self) -> bool {
        false
    }

    /// Whether it looks at what the budget after it makes of a layer.
    fn reads_budget(&self) -> bool {
        false
    }

    /// Whether it scores parts of a head by themselves, which scores of query windows cannot.
    fn splits(&self) -> bool {
        false
    }

    /// Changes `scores`.
    fn map(&self, context: &Context<'_>, scores: &mut Scores) -> Result<()>;
}

/// How the registry describes a map.
pub type Entry = StageEntry<dyn Map>;

impl Debug for Context<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("shares", &self.shares).finish_non_exhaustive()
    }
}

/// Heads that have to agree: all of a layer if they hold the same tokens, else each one alone.
fn agreeing_heads(layer: &LayerInput<'_>) -> Vec<std::ops::Range<usize>> {
    let is_even = layer.heads.windows(2).all(|pair| pair[0].positions == pair[1].positions);
    match (is_even, layer.heads.len()) {
        (true, n) if n > 0 => std::iter::once(0..n).collect(),
        (_, n) => (0..n).map(|head| head..head + 1).collect(),
    }
}

/// The scores of heads that agree, summed; a token is protected if any of them protects it.
fn summed(heads: &[HeadScores]) -> HeadScores {
    let mut sum = heads[0].clone();
    for head in &heads[1..] {
        sum.scores.iter_mut().zip(&head.scores).for_each(|(sum, score)| *sum += score);
        sum.protected.iter_mut().zip(&head.protected).for_each(|(any, one)| *any |= one);
    }
    sum
}

/// Decides for each group of heads that have to agree: `choose` answers at most `n` tokens.
fn decide(
    context: &Context<'_>,
    scores: &mut Scores,
    choose: impl Fn(&HeadScores, usize) -> KeepSet,
) {
    let mut kept = Vec::with_capacity(scores.heads.len());
    for heads in agreeing_heads(context.layer) {
        let n = context.shares[heads.start];
        let len = scores.heads[heads.start].scores.len();
        let set = match n >= len {
            true => KeepSet::all(len),
            false => choose(&summed(&scores.heads[heads.clone()]), n),
        };
        kept.extend(std::iter::repeat_n(set, heads.len()));
    }
    scores.decision = Decision::Kept(kept);
}
