//! Counts of queries that ignore a token, for Scissorhands.

use super::cpu::{Call, RowScratch};
use super::job::Job;
use crate::sequence::Observation;
use crate::simd;

impl Call<'_> {
    /// Second pass: adds 1 for each query that gives a row less than an even share of what it sees, on
    /// the mean over the query heads of the group. Only the last `history` queries of the call count.
    pub(super) fn add_low_counts(
        &self,
        job: &Job<'_>,
        observation: &Observation,
        queries: &[f32],
        scratch: &mut RowScratch,
        lse: &[f32],
    ) {
        let kernels = simd::active();
        let first = job.sequence.num_queries.saturating_sub(observation.history());
        let mut head = observation.head(self.layer, job.task.kv_head).lock();
        if head.low_counts.len() < job.lane.len {
            head.low_counts.resize(job.lane.len, 0.0);
        }
        self.visit(job, None, queries, scratch, |piece, scores, _| {
            let rows = piece.rows.len();
            for (i, scores) in scores.chunks_exact_mut(job.group * rows).enumerate() {
                let query = piece.queries.start + i;
                if job.task.first_query + query < first {
                    continue;
                }
                for (g, scores) in scores.chunks_exact_mut(rows).enumerate() {
                    kernels.exp_sub(scores, lse[query * job.group + g]);
                }
                let limit = job.group as f32 / (job.last_index(query) + 1) as f32;
                let counts = &mut head.low_counts[piece.index..][..rows];
                for (j, count) in counts.iter_mut().enumerate() {
                    let sum: f32 = scores[j..].iter().step_by(rows).sum();
                    *count += if sum < limit { 1.0 } else { 0.0 };
                }
            }
        });
    }
}
