//! Probabilities that rows receive, for H2O, TOVA and their kin.
//!
//! A single query has weighted all rows already, each piece against the maximum so far: what is left
//! of `exp(logit - lse)` is one factor for each piece and query head. More queries than one go over
//! the keys a second time, so that nobody has to hold `[queries, rows]`.

use super::cpu::{Call, Scratch};
use super::job::{Job, Piece};
use crate::sequence::{MAX_DRAFTS, Observation, Received};
use crate::shape::Needs;
use crate::simd::{self, Format, Rows};

/// Weights of the pieces of a task with one query.
#[derive(Debug, Default)]
pub(super) struct Weights {
    /// `exp(logit - maximum)` of each piece, `[group, rows]`, one piece after the other.
    values: Vec<f32>,
    /// Rows of each piece, evicted ones included, and whether a maximum rose with it.
    pieces: Vec<(usize, bool)>,
    /// The maximum of each query head since the last rise, `[rises, group]`.
    maxima: Vec<f32>,
    /// Where rows go: first column over all pieces, index in the lane, rows.
    runs: Vec<(usize, usize, usize)>,
    columns: usize,
    /// Probabilities by column.
    sums: Vec<f32>,
}

impl Weights {
    pub(super) fn clear(&mut self) {
        self.values.clear();
        self.pieces.clear();
        self.maxima.clear();
        self.runs.clear();
        self.columns = 0;
    }

    /// Adds a piece: its weights and what they are relative to.
    pub(super) fn push(&mut self, piece: &Piece<'_>, values: &[f32], maxima: &[f32]) {
        self.values.extend_from_slice(values);
        let last = self.maxima.len().saturating_sub(maxima.len());
        let rises = self.maxima[last..] != *maxima;
        if rises {
            self.maxima.extend_from_slice(maxima);
        }
        self.pieces.push((piece.rows.len(), rises));
        let mut index = piece.index;
        for span in piece.spans {
            let column = self.columns + span.first as usize - piece.rows.start;
            self.push_run(column, index, span.count as usize);
            index += span.count as usize;
        }
        if piece.spans.is_empty() {
            self.push_run(self.columns, index, piece.rows.len());
        }
        self.columns += piece.rows.len();
    }

    fn push_run(&mut self, column: usize, index: usize, rows: usize) {
        match self.runs.last_mut() {
            Some((first, at, count)) if *first + *count == column && *at + *count == index => {
                *count += rows;
            }
            _ => self.runs.push((column, index, rows)),
        }
    }

    /// Adds the probabilities of all query heads to `out`, `[rows of the lane]`.
    fn add_to(&mut self, out: &mut [f32], lse: &[f32], factors: &mut Vec<f32>) {
        let kernels = simd::active();
        self.sums.clear();
        self.sums.resize(self.columns, 0.0);
        let mut values = &self.values[..];
        let mut maxima = self.maxima.chunks_exact(lse.len());
        let mut column = 0;
        for (rows, rises) in &self.pieces {
            if *rises && let Some(maxima) = maxima.next() {
                factors.clear();
                // Where nothing was seen yet the weights are zeros, and the difference may be NaN.
                let factor = |(max, lse): (&f32, &f32)| match *max > f32::NEG_INFINITY {
                    true => (max - lse).exp(),
                    false => 0.0,
                };
                factors.extend(maxima.iter().zip(lse).map(factor));
            }
            // The weights of each query head are a row, of which the factors make one.
            let (weights, rest) = values.split_at(factors.len() * rows);
            let weights = Rows::of_f32(weights, *rows);
            kernels.axpy(Format::F32, &weights, factors, &mut self.sums[column..][..*rows]);
            values = rest;
            column += rows;
        }
        for (column, index, rows) in &self.runs {
            kernels.axpy_f32(1.0, &self.sums[*column..][..*rows], &mut out[*index..][..*rows]);
        }
    }
}

impl Job<'_> {
    /// Whether the weights of the task are worth keeping: its only query tells what rows receive.
    pub(super) fn keeps_weights(&self) -> bool {
        let asked = Needs::COLUMN_SUM.union(Needs::LAST_ROW);
        let observation = self.sequence.observation.as_ref();
        self.task.num_queries == 1
            && self.sequence.replay.is_none()
            && observation.is_some_and(|seen| seen.needs().0 & asked.0 != 0)
    }

    /// Whether the query waits for its token to be committed.
    fn is_pending(&self, query: usize, asked: Needs) -> bool {
        let from_end = self.sequence.num_tokens - self.position(query) as usize;
        let reserved = self.sequence.reserved;
        let is_last = from_end == 1 && asked.contains(Needs::LAST_ROW);
        from_end <= reserved && (reserved <= MAX_DRAFTS || is_last)
    }
}

impl Call<'_> {
    /// Adds what the queries of a task give each row.
    pub(super) fn note_received(
        &self,
        job: &Job<'_>,
        observation: &Observation,
        scratch: &mut Scratch,
    ) {
        let asked = observation.needs();
        let Scratch { queries, rows, lse, weights, observed, .. } = scratch;
        let mut head = observation.head(self.layer, job.task.kv_head).lock();
        let received = &mut head.received;
        let len = job.lane.len;
        if asked.contains(Needs::COLUMN_SUM) && received.sums.len() < len {
            received.sums.resize(len, 0.0);
        }
        for query in (0..job.task.num_queries).filter(|query| job.is_pending(*query, asked)) {
            received.start(job.position(query), len);
        }
        if job.task.num_queries == 1 {
            if let Some(sums) = target(job, received, 0, asked) {
                weights.add_to(sums, lse, observed);
            }
            return;
        }
        let counts =
            |query: &usize| asked.contains(Needs::COLUMN_SUM) || job.is_pending(*query, asked);
        if !(0..job.task.num_queries).any(|query| counts(&query)) {
            return;
        }
        let kernels = simd::active();
        self.visit(job, None, queries, rows, |piece, _, scores, _| {
            let (index, rows) = (piece.index, piece.rows.len());
            for (query, scores) in
                piece.queries.clone().zip(scores.chunks_exact_mut(job.group * rows))
            {
                let Some(sums) = target(job, received, query, asked) else { continue };
                for (g, scores) in scores.chunks_exact_mut(rows).enumerate() {
                    kernels.exp_sub(scores, lse[query * job.group + g]);
                    kernels.axpy_f32(1.0, scores, &mut sums[index..][..rows]);
                }
            }
        });
    }
}

/// Where the probabilities of a query of the task go, if anywhere.
fn target<'a>(
    job: &Job<'_>,
    received: &'a mut Received,
    query: usize,
    asked: Needs,
) -> Option<&'a mut Vec<f32>> {
    match job.is_pending(query, asked) {
        true => received.pending(job.position(query)),
        false => asked.contains(Needs::COLUMN_SUM).then_some(&mut received.sums),
    }
}
