//! Budgets: how the allowance of a layer, or of all layers, is spread over KV heads.

use std::fmt::Debug;
use std::ops::Range;

use super::{HeadScores, LayerInput};
use crate::error::Result;
use crate::registry::{StageEntry, registry};
use crate::shape::{LaneWidth, Needs};

registry! {
    /// Every budget, in the order of the documentation.
    pub static BUDGETS: Entry = { uniform, adakv, global, compose, pyramid, preferences, squeeze, lukv, headkv, }
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

/// What a budget over all layers knows of the heads of a model, one layer after the other.
#[derive(Debug, Clone, Copy)]
pub struct Model<'a> {
    /// Heads of each layer.
    pub counts: &'a [usize],
    /// Tokens of each head.
    pub lens: &'a [usize],
    /// What the allowance of each head is before the budget.
    pub shares: &'a [usize],
}

impl Model<'_> {
    /// The heads of each layer.
    fn layers(&self) -> impl Iterator<Item = Range<usize>> {
        self.counts.iter().scan(0, |start, count| {
            *start += count;
            Some(*start - count..*start)
        })
    }

    /// Tokens that each layer can have beyond one for each of its heads.
    fn rooms(&self) -> Vec<usize> {
        let room = |len: &usize| len.saturating_sub(1);
        self.layers().map(|heads| self.lens[heads].iter().map(room).sum()).collect()
    }

    /// The allowance of each head: one token, and an even part of what its layer is given. What one head
    /// has no tokens for goes to the others.
    fn to_heads(self, given: &[usize]) -> Vec<usize> {
        let mut out = Vec::with_capacity(self.lens.len());
        for (heads, given) in self.layers().zip(given) {
            let rooms: Vec<usize> =
                self.lens[heads].iter().map(|len| len.saturating_sub(1)).collect();
            let even = vec![1.0; rooms.len()];
            out.extend(pour(*given, &even, &rooms).into_iter().map(|given| given + 1));
        }
        out
    }
}

/// Pours `amount` into vessels in proportion to their weights; what does not fit into one goes to the
/// others. All of it is given out unless all are full.
fn pour(amount: usize, weights: &[f64], rooms: &[usize]) -> Vec<usize> {
    let mut given = vec![0usize; rooms.len()];
    let mut left = amount;
    let mut open: Vec<usize> = (0..rooms.len()).filter(|i| rooms[*i] > 0).collect();
    while left > 0 && !open.is_empty() {
        let sum: f64 = open.iter().map(|i| weights[*i]).sum();
        let is_usable = sum > 0.0 && sum.is_finite();
        let (mut part, mut before, start) = (0.0, 0, left);
        for i in &open {
            part += if is_usable { weights[*i] / sum } else { 1.0 / open.len() as f64 };
            // Rounding the running sum hands out all of it.
            let until = ((part * start as f64 + 1e-6) as usize).min(start);
            let fits = (until - before).min(rooms[*i] - given[*i]);
            before = until;
            given[*i] += fits;
            left -= fits;
        }
        if left == start {
            // Too little for anybody's part.
            given[open[0]] += 1;
            left -= 1;
        }
        open.retain(|i| given[*i] < rooms[*i]);
    }
    given
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

    /// A number for a layer by which [`Self::divide`] compares it with the others; `None` if it keeps its
    /// own allowance. Only asked of budgets over all layers.
    fn preference(&self, _layer: &LayerInput<'_>) -> Result<Option<f64>> {
        Ok(None)
    }

    /// Divides the sum of the allowances of all heads among them anew. Each head gets at least one token,
    /// and what a layer has no tokens for goes to the others. In proportion to the preferences of the
    /// layers, unless a budget says otherwise.
    fn divide(&self, model: &Model<'_>, preferences: &[f64]) -> Vec<usize> {
        let left = model.shares.iter().sum::<usize>().saturating_sub(model.lens.len());
        model.to_heads(&pour(left, preferences, &model.rooms()))
    }

    /// The allowance of a head of this layer; possibly more than the head has. The same for all
    /// layers unless a budget says otherwise.
    fn layer_share(&self, at: &LayerShare) -> usize {
        at.share
    }

    /// Tokens that each head of a layer keeps, at most as many as it has. `shares[h]` is the
    /// allowance of head `h`, which may be more than it has; heads of different lengths may use what
    /// others leave. Each head keeps its own allowance unless a budget says otherwise.
    fn spread(&self, _layer: usize, scores: &[HeadScores], shares: &[usize]) -> Result<Vec<usize>> {
        Ok(scores.iter().zip(shares).map(|(head, share)| head.scores.len().min(*share)).collect())
    }

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
