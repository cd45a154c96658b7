//! Scores: how important each cached token is.

mod linalg;
mod noise;
mod probability;
mod rotation;

use std::fmt::Debug;

use super::{Allowance, Event, HeadInput, HeadScores, LayerInput};
use crate::error::{Result, bail};
use crate::registry::{StageEntry, registry};
use crate::shape::{KeepSet, LaneWidth, Needs};

pub(super) use probability::QueryWindow;
pub use probability::WindowProbabilities;

/// The query window of scores that read all queries of the prompt.
pub const ALL_QUERIES: usize = 1 << 24;

registry! {
    /// Every score, in the order of the documentation.
    pub static SCORES: Entry = {
        full, stream, snapkv, h2o, scissorhands, tova, keydiff, expected, knorm, lagkv, cur,
        observed, finch, capkv, leverage, noncausal, compactor, qfilter, kvzip, kvzap, fastkvzip,
        duo, simlayer, fastgen, nacl, cake, pyramidinfer, keyformer, random,
    }
}

/// How important tokens are.
pub trait Score: Debug + Send + Sync {
    /// What the engine has to hand over.
    fn needs(&self) -> Needs;

    /// What it can do with instead of its needs.
    fn shortcut(&self) -> Option<Needs> {
        None
    }

    /// Queries of each head to remember.
    fn query_window(&self) -> usize {
        0
    }

    /// The latest queries of each call of attention that count for low counts.
    fn history(&self) -> usize {
        0
    }

    /// Leading tokens that take part in every replay.
    fn replay_sinks(&self) -> usize {
        0
    }

    /// The coarsest lanes that can express what this score chooses: those of single heads, unless
    /// heads are sure to agree.
    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Head
    }

    /// The moments at which it acts with this allowance when the spec does not say: once, when the
    /// prompt ends, unless the score is made for steps.
    fn events(&self, _allowance: Allowance) -> &'static [Event] {
        &[Event::PrefillEnd]
    }

    /// Whether survivors form a few runs, which lanes can trim without touching blocks.
    fn keeps_runs(&self) -> bool {
        false
    }

    /// The allowance if the score has one of its own. A spec then may not say another one.
    fn own_allowance(&self) -> Option<Allowance> {
        None
    }

    /// Lanes of at most so many tokens stay whole, whatever the allowance: a prompt inside the
    /// protected window has nothing to lose.
    fn keeps_whole(&self) -> usize {
        0
    }

    /// The best `n` of `len` tokens, at once, if nothing but their order matters: such policies run
    /// at each step and must not cost a look at each token.
    fn top(&self, _len: usize, _n: usize) -> Option<KeepSet> {
        None
    }

    /// What a head of `len` tokens keeps, at once, if its place in the model says it all.
    fn fixed(
        &self,
        _layer: usize,
        _num_layers: usize,
        _head: usize,
        _len: usize,
    ) -> Option<KeepSet> {
        None
    }

    /// The scores that hidden states `[n, width]` of a layer give the keys and values made of them,
    /// `[num_heads, n]`. Only asked of scores that need hidden states; they find the result in
    /// `gate_scores`, which follows its tokens.
    fn gate(
        &self,
        _layer: usize,
        _num_heads: usize,
        _hidden: &[f32],
        _width: usize,
    ) -> Result<Vec<f32>> {
        bail!(Internal, "the score has no gate")
    }

    /// Scores for every head of a layer. Lengths have been checked. `budgets[h]` is what head `h`
    /// keeps if no budget stage moves it, at most its length: protect no more than that.
    fn score(&self, layer: &LayerInput<'_>, budgets: &[usize]) -> Result<Vec<HeadScores>>;
}

/// How the registry describes a score.
pub type Entry = StageEntry<dyn Score>;

/// The scores of each head, one after the other.
fn per_head(
    layer: &LayerInput<'_>,
    score: impl Fn(&HeadInput<'_>) -> HeadScores,
) -> Vec<HeadScores> {
    layer.heads.iter().map(score).collect()
}
