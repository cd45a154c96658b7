//! Replay: what tokens that repeat the prompt read of it, for KVzip.
//!
//! ```text
//! S        = sinks, the replayed tokens, and the tokens that replay, causal among themselves
//! P[t, j]  = softmax over j in S of the logits of query t
//! maxima[h, j] = max over t of P[t, j] / |hidden state of t|, for each query head h
//! ```
//!
//! The outputs of attention are those over everything; only the probabilities are of `S`. Lengths of
//! hidden states count as 1 unless they were handed over.

use std::ops::Range;

use super::cpu::{Call, RowScratch};
use super::job::{Job, Piece};
use crate::sequence::{Observation, Replay};
use crate::simd;

impl Call<'_> {
    /// Second and third pass: sums of `S`, then the maxima.
    pub(super) fn note_replay(
        &self,
        job: &Job<'_>,
        observation: &Observation,
        replay: &Replay,
        queries: &[f32],
        scratch: &mut RowScratch,
        lse: &[f32],
    ) {
        let kernels = simd::active();
        let reserved = (job.sequence.num_tokens - job.sequence.reserved) as i32;
        let norms = observation.replay_norms(self.layer).read();
        let mut sums = vec![0.0f32; job.rows()];
        self.visit(job, None, queries, scratch, |piece, scores, _| {
            let first = piece.queries.start * job.group;
            let members = [0..replay.sinks, replay.tokens.clone(), reserved..i32::MAX]
                .map(|p| within(piece, p));
            for (row, scores) in scores.chunks_exact_mut(piece.rows.len()).enumerate() {
                for members in &members {
                    let scores = &mut scores[members.clone()];
                    sums[first + row] += kernels.exp_sub(scores, lse[first + row]);
                }
            }
        });
        let mut head = observation.head(self.layer, job.task.kv_head).lock();
        head.replay_maxima.resize(job.group, Vec::new());
        for plane in &mut head.replay_maxima {
            plane.resize(job.lane.len, f32::NAN);
        }
        self.visit(job, None, queries, scratch, |piece, scores, _| {
            let first = piece.queries.start * job.group;
            let replayed = within(piece, replay.tokens.clone());
            for (row, scores) in scores.chunks_exact_mut(piece.rows.len()).enumerate() {
                let row = first + row;
                let scores = &mut scores[replayed.clone()];
                kernels.exp_sub(scores, lse[row]);
                let index = (job.position(row / job.group) - reserved) as usize;
                let scale = 1.0 / (sums[row] * norms.get(index).copied().unwrap_or(1.0));
                let first = piece.index + replayed.start;
                let plane = &mut head.replay_maxima[row % job.group][first..];
                plane.iter_mut().zip(&*scores).for_each(|(most, p)| *most = most.max(p * scale));
            }
        });
    }
}

/// The rows of a piece at these positions, counted from its first.
fn within(piece: &Piece<'_>, positions: Range<i32>) -> Range<usize> {
    let below = |limit: i32| {
        let (mut low, mut high) = (0, piece.rows.len());
        while low < high {
            let i = low.midpoint(high);
            if piece.position(i) < limit { low = i + 1 } else { high = i }
        }
        low
    };
    let start = below(positions.start);
    start..below(positions.end).max(start)
}
