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
        let is_in = |piece: &Piece<'_>, i: usize| replay.includes(piece.position(i), reserved);
        self.visit(job, None, queries, scratch, |piece, scores, _| {
            let first = piece.queries.start * job.group;
            for (row, scores) in scores.chunks_exact_mut(piece.rows.len()).enumerate() {
                kernels.exp_sub(scores, lse[first + row]);
                let members = scores.iter().enumerate().filter(|(i, _)| is_in(piece, *i));
                sums[first + row] += members.map(|(_, p)| p).sum::<f32>();
            }
        });
        let mut head = observation.head(self.layer, job.task.kv_head).lock();
        head.replay_maxima.resize(job.group, Vec::new());
        for plane in &mut head.replay_maxima {
            plane.resize(job.lane.len, f32::NAN);
        }
        self.visit(job, None, queries, scratch, |piece, scores, _| {
            let first = piece.queries.start * job.group;
            for (row, scores) in scores.chunks_exact_mut(piece.rows.len()).enumerate() {
                let row = first + row;
                kernels.exp_sub(scores, lse[row]);
                let index = (job.position(row / job.group) - reserved) as usize;
                let scale = 1.0 / (sums[row] * norms.get(index).copied().unwrap_or(1.0));
                let plane = &mut head.replay_maxima[row % job.group][piece.index..];
                for (i, (most, p)) in plane.iter_mut().zip(&*scores).enumerate() {
                    if replay.tokens.contains(&piece.position(i)) {
                        *most = most.max(p * scale);
                    }
                }
            }
        });
    }
}
