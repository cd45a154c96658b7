//! Budgets: how the allowance of a layer, or of all layers, is spread over KV heads.

use std::fmt::Debug;

use super::{HeadScores, LayerInput};
use crate::error::Result;
use crate::registry::{StageEntry, registry};
use crate::shape::{LaneWidth, Needs};

pub(super) use preferences::divide;

registry! {
    /// Every budget, in the order of the documentation.
    pub static BUDGETS: Entry = { uniform, adakv, global, compose, pyramid, preferences, lukv, headkv, }
}

/// What a budget over layers knows of one head.
#[derive(Debug, Clone, Copy)]
pub struct LayerShare {
    /// Index of the layer.
    pub layer: usize,
    /// Layers of the model.
    pub num_layers: usize,
    /// Tokens of the head.
    pub len: usize,
    /// What the allowance is before the budget.
    pub share: usize,
}

/// Spreads an allowance.
pub trait Budget: Debug + Send + Sync {
    /// What the engine has to hand over.
    fn needs(&self) -> Needs {
        Needs::NONE
    }

    /// Queries of each head to remember.
    fn query_window(&self) -> usize {
        0
    }

    /// How much of the allowance of all layers together this one should have, in proportion to the
    /// others; `None` if it keeps its own. Only asked of budgets over all layers.
    fn preference(&self, _layer: &LayerInput<'_>) -> Result<Option<f64>> {
        Ok(None)
    }

    /// The allowance of a head of this layer; possibly more than the head has. The same for all
    /// layers unless a budget says otherwise.
    fn layer_share(&self, at: &LayerShare) -> usize {
        at.share
    }

    /// Tokens that each head of a layer keeps, at most as many as it has. `shares[h]` is the
    /// allowance of head `h`, which may be more than it has; heads of different lengths may use what
    /// others leave.
    fn spread(&self, layer: usize, scores: &[HeadScores], shares: &[usize]) -> Result<Vec<usize>>;

    /// The same for all layers at once, for budgets over all layers: `counts[l]` heads of layer `l`, one
    /// layer after the other.
    fn spread_layers(
        &self,
        _counts: &[usize],
        scores: &[HeadScores],
        shares: &[usize],
    ) -> Result<Vec<usize>> {
        self.spread(0, scores, shares)
    }

    /// Whether heads of different layers compete: then `spread_layers` is called instead of `spread`.
    fn is_global(&self) -> bool {
        false
    }

    /// Tokens that a head keeps whatever the others have.
    fn safeguard(&self, _head: &HeadScores, _share: usize) -> usize {
        0
    }

    /// The coarsest lanes that can express what this budget chooses; `Sequence` if it leaves every
    /// head its share.
    fn lane_width(&self) -> LaneWidth;
}

/// How the registry describes a budget.
pub type Entry = StageEntry<dyn Budget>;
