//! From scores to keep sets: shared by every pipeline.

use super::{HeadInput, HeadScores, LayerInput, Phase};
use crate::error::Result;
use crate::shape::KeepSet;

impl Phase {
    /// What each head of a layer keeps.
    pub(super) fn select(&self, layer: &LayerInput<'_>) -> Result<Vec<KeepSet>> {
        let alone = self.alone(layer);
        let scores = self.score.score(layer, &alone)?;
        let budget = self.budget.spread(&scores, &alone);
        let keep = |(head, n): (&HeadScores, &usize)| top(head, *n);
        Ok(scores.iter().zip(&budget).map(keep).collect())
    }

    /// The scores of a layer.
    pub(super) fn score(&self, layer: &LayerInput<'_>) -> Result<Vec<HeadScores>> {
        self.score.score(layer, &self.alone(layer))
    }

    /// What each head would keep without a budget stage.
    fn alone(&self, layer: &LayerInput<'_>) -> Vec<usize> {
        let allowance = self.score.allowance(self.allowance);
        let alone = |head: &HeadInput<'_>| allowance.of(head.positions.len(), layer.sequence_len);
        layer.heads.iter().map(alone).collect()
    }
}

/// The `n` best tokens of a head, protected ones first.
fn top(head: &HeadScores, n: usize) -> KeepSet {
    if n >= head.scores.len() {
        return KeepSet::all(head.scores.len());
    }
    let mut kept = ranked(head);
    kept.truncate(n);
    kept.sort_unstable();
    KeepSet::from_indices(kept)
}

/// Tokens from best to worst: protected ones, then by score, NaN last; ties go to the lower
/// position, except among protected tokens, of which the latest matter most when not all fit.
pub(super) fn ranked(head: &HeadScores) -> Vec<usize> {
    let mut order: Vec<usize> = (0..head.scores.len()).collect();
    let key = |i: usize| {
        let score = head.scores[i];
        if score.is_nan() { f32::NEG_INFINITY } else { score }
    };
    order.sort_unstable_by(|&a, &b| {
        let by_score = || key(b).total_cmp(&key(a)).then(a.cmp(&b));
        head.protected[b].cmp(&head.protected[a]).then_with(by_score)
    });
    order
}
