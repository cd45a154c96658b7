//! What the engine hands over to the policy of a sequence: hidden states, and the prompt once more.

use std::ops::Range;
use std::sync::Arc;

use super::Session;
use crate::device::tensor::Tensor;
use crate::error::{Result, bail, ensure};
use crate::sequence::{Observation, Replay, cosine};
use crate::shape::Needs;

impl Session {
    /// Says that the tokens reserved from now on repeat `tokens` of the prompt: what they read of it is
    /// noted, and a commit of none of them ends the replay.
    pub fn replay(&mut self, tokens: Range<usize>) -> Result<()> {
        self.sequence.ensure_present()?;
        let (len, reserved) = (self.sequence.num_tokens(), self.sequence.num_reserved());
        ensure!(
            reserved == 0 && !self.decoding,
            InvalidState,
            "{reserved} tokens are reserved and the prompt has {}ended; replay before its end",
            if self.decoding { "" } else { "not " }
        );
        ensure!(
            tokens.start < tokens.end && tokens.end <= len,
            InvalidArgument,
            "tokens {}..{} of a sequence of {len}, must be at least one of them",
            tokens.start,
            tokens.end
        );
        let Some(observation) = self.sequence.observation().filter(|_| self.needs(Needs::REPLAY))
        else {
            bail!(InvalidState, "the policy {} needs no replay", self.policy.spec());
        };
        let sinks = self.policy.replay_sinks().min(tokens.start) as i32;
        self.sequence.ensure_snapshot("a replay changes the state of recurrent layers")?;
        let tokens = tokens.start as i32..tokens.end as i32;
        observation.set_replay(Some(Replay { tokens, sinks }));
        Ok(())
    }

    fn needs(&self, need: Needs) -> bool {
        self.policy.needs().contains(need)
    }

    /// Whether reserved tokens replay the prompt.
    pub(super) fn is_replaying(&self) -> bool {
        self.sequence.observation().is_some_and(|seen| seen.replay().is_some())
    }

    /// Refuses to end a replay that is incomplete, or to commit its tokens.
    pub(super) fn end_replay(&mut self, n: usize) -> Result<()> {
        ensure!(n == 0, InvalidState, "{n} tokens of a replay cannot be committed, only 0");
        let reserved = self.sequence.num_reserved();
        let Some(observation) = self.sequence.observation() else { return Ok(()) };
        if self.needs(Needs::REPLAY_HIDDEN) {
            for layer in 0..self.sequence.cache().config().shape.num_layers {
                let seen = observation.replay_norms(layer).read().len();
                ensure!(
                    seen == reserved,
                    InvalidState,
                    "layer {layer} has hidden states of {seen} of {reserved} replaying tokens"
                );
            }
        }
        self.sequence.commit(0, None)?;
        if let Some(observation) = self.sequence.observation() {
            observation.set_replay(None);
        }
        Ok(())
    }

    /// Hands over the hidden states `[reserved tokens, 1, width]` of a layer: the input of its
    /// attention after the norm. A policy without a gate does not look at them.
    pub fn observe_hidden(&mut self, layer: usize, hidden: &Tensor<'_>) -> Result<()> {
        self.sequence.ensure_present()?;
        let shape = self.sequence.cache().config().shape;
        let [tokens, width] = self.check_rows(layer, "hidden", hidden)?;
        let asked = Needs::HIDDEN.union(Needs::REPLAY_HIDDEN);
        let is_asked = |seen: &&Arc<Observation>| seen.needs().0 & asked.0 != 0;
        let Some(observation) = self.sequence.observation().filter(is_asked) else {
            return Ok(());
        };
        let mut rows = vec![0.0; tokens * width];
        for (token, row) in rows.chunks_exact_mut(width).enumerate() {
            hidden.read(token, 0, row);
        }
        if self.is_replaying() {
            let norm = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>().sqrt();
            *observation.replay_norms(layer).write() = rows.chunks_exact(width).map(norm).collect();
            return Ok(());
        }
        if !self.needs(Needs::HIDDEN) {
            return Ok(());
        }
        let scores = self.policy.gate(layer, shape.num_kv_heads, &rows, width)?;
        for (head, scores) in scores.chunks_exact(tokens).enumerate() {
            let (lane, _) = self.sequence.locate(layer, head);
            let first = self.sequence.lanes()[lane].len() - tokens;
            observation.head(layer, head).lock().put_gate_scores(first, scores);
        }
        Ok(())
    }

    /// Hands over the residual stream `[reserved tokens, 1, width]` that a layer reads, and what its
    /// attention adds to it. Tokens after the prompt, and policies that do not compare the two, have no
    /// use for them.
    pub fn observe_residual(
        &mut self,
        layer: usize,
        hidden: &Tensor<'_>,
        added: &Tensor<'_>,
    ) -> Result<()> {
        self.sequence.ensure_present()?;
        let [tokens, width] = self.check_rows(layer, "hidden", hidden)?;
        let other = self.check_rows(layer, "added", added)?;
        ensure!(
            other == [tokens, width],
            InvalidArgument,
            "added has the shape {other:?}, must have that of hidden, {:?}",
            [tokens, width]
        );
        let Some(observation) = self.sequence.observation().filter(|_| self.compares_residuals())
        else {
            return Ok(());
        };
        let mut rows = vec![0.0; 2 * width];
        let (before, delta) = rows.split_at_mut(width);
        observation.residual(layer).lock().put((0..tokens).map(|token| {
            hidden.read(token, 0, before);
            added.read(token, 0, delta);
            cosine(before, delta)
        }));
        Ok(())
    }

    /// Whether what attention does to the residual stream of reserved tokens counts.
    fn compares_residuals(&self) -> bool {
        self.needs(Needs::RESIDUAL) && !self.decoding && !self.is_replaying()
    }

    /// Rows and elements of a matrix with a row for each reserved token.
    fn check_rows(&self, layer: usize, name: &str, rows: &Tensor<'_>) -> Result<[usize; 2]> {
        let ([tokens, _, width], reserved) = (rows.shape(), self.sequence.num_reserved());
        let layers = self.sequence.cache().config().shape.num_layers;
        ensure!(layer < layers, InvalidArgument, "layer is {layer}, the model has {layers}");
        ensure!(
            tokens == reserved && tokens > 0 && width > 0,
            InvalidArgument,
            "{name} has the shape [{tokens}, {width}], must have a row for each of {reserved} reserved \
             tokens"
        );
        Ok([tokens, width])
    }

    /// Refuses a commit of tokens whose hidden states the policy needs and has not seen.
    pub(super) fn check_observed(&self, n: usize) -> Result<()> {
        let Some(observation) = self.sequence.observation() else { return Ok(()) };
        let shape = self.sequence.cache().config().shape;
        let (residuals, hidden) = (self.compares_residuals(), self.needs(Needs::HIDDEN));
        for layer in (0..shape.num_layers).filter(|_| residuals) {
            let seen = observation.residual(layer).lock().num_pending();
            ensure!(
                seen >= n,
                InvalidState,
                "layer {layer} has residual streams of {seen} of {n} tokens; the policy needs them all"
            );
        }
        for layer in (0..shape.num_layers).filter(|_| hidden) {
            let (lane, _) = self.sequence.locate(layer, 0);
            let first = self.sequence.lanes()[lane].len() - self.sequence.num_reserved();
            let seen = observation.head(layer, 0).lock().gate_scores.len().saturating_sub(first);
            ensure!(
                seen >= n,
                InvalidState,
                "layer {layer} has hidden states of {seen} of {n} tokens; the policy needs them all"
            );
        }
        Ok(())
    }
}
