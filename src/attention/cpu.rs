//! The CPU path of one layer: tasks, spans, online softmax, merge.

use std::cell::RefCell;

use super::Options;
use super::plan::{Plan, Planned, PlannedLane, Task};
use super::state::States;
use crate::cache::Cache;
use crate::device::tensor::{Tensor, TensorMut};
use crate::quantizer::Side;
use crate::sequence::Span;
use crate::shape::Needs;
use crate::simd;

/// One call of `run`.
pub(super) struct Call<'a> {
    pub(super) cache: &'a Cache,
    pub(super) plan: &'a Plan,
    pub(super) layer: usize,
    pub(super) options: &'a Options<'a>,
}

/// Buffers of a thread. They only grow, so a steady state allocates nothing.
#[derive(Debug, Default)]
struct Scratch {
    /// Scaled queries, `[tile, group, dim]`.
    queries: Vec<f32>,
    /// Queries in the space of the format at hand.
    prepared: Vec<f32>,
    /// Logits and then probabilities of one span, `[tile * group, rows]`.
    scores: Vec<f32>,
    /// The state of one format.
    part: States,
    /// The state of all formats.
    total: States,
    /// Log-sum-exp of each row.
    lse: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A task with everything it refers to.
struct Job<'a> {
    task: Task,
    sequence: &'a Planned,
    lane: &'a PlannedLane,
    spans: &'a [Span],
    cell: usize,
    group: usize,
    dim: usize,
}

impl Call<'_> {
    pub(super) fn run(
        &self,
        query: &Tensor<'_>,
        output: &TensorMut<'_>,
        lse: Option<&TensorMut<'_>>,
        worker: usize,
        num_workers: usize,
    ) {
        SCRATCH.with_borrow_mut(|scratch| {
            for task in self.plan.share(self.layer, worker, num_workers) {
                let job = self.job(self.plan.tasks[task]);
                self.attend(&job, query, scratch);
                write_out(&job, scratch, output, lse);
                self.observe(&job, query, scratch);
            }
        });
    }

    fn job(&self, task: Task) -> Job<'_> {
        let shape = &self.cache.config().shape;
        let sequence = &self.plan.sequences[task.sequence];
        let (lane, cell) = self.cache.config().lane_width.locate(shape, self.layer, task.kv_head);
        let (lane, spans) = self.plan.lane(sequence, lane);
        Job { task, sequence, lane, spans, cell, group: shape.group(), dim: shape.head_dim }
    }

    /// Fills `scratch.total` and `scratch.lse`.
    fn attend(&self, job: &Job<'_>, query: &Tensor<'_>, scratch: &mut Scratch) {
        let rows = job.rows();
        scratch.queries.resize(rows * job.dim, 0.0);
        let scale = self.options.scale_for(job.dim);
        for row in 0..rows {
            let target = &mut scratch.queries[row * job.dim..][..job.dim];
            query.read(job.token(row), job.q_head(row), target);
            target.iter_mut().for_each(|x| *x *= scale);
        }
        scratch.total.reset(rows, job.dim);
        for format in 0..self.cache.formats().len() {
            if job.spans.iter().any(|span| span.block.view.format() == format) {
                self.attend_format(job, format, scratch);
                let value = self.cache.formats()[format].side(Side::Value);
                value.finish_outputs(job.dim, &mut scratch.part.out);
                scratch.total.merge(&scratch.part);
            }
        }
        scratch.lse.clear();
        for row in 0..rows {
            if let Some(sinks) = self.options.sinks {
                scratch.total.add_sink(row, sinks[job.q_head(row)]);
            }
            let lse = scratch.total.finish(row);
            scratch.lse.push(lse);
        }
    }

    /// Attends to the spans in one format.
    fn attend_format(&self, job: &Job<'_>, format: usize, scratch: &mut Scratch) {
        scratch.part.reset(job.rows(), job.dim);
        let kernels = simd::active();
        let value = self.cache.formats()[format].side(Side::Value);
        self.visit(job, Some(format), scratch, |span, scores, scratch| {
            let rows = span.rows.len();
            for (i, row) in scores.chunks_exact_mut(rows).enumerate() {
                let max = kernels.max(row);
                if max == f32::NEG_INFINITY {
                    row.fill(0.0);
                    continue;
                }
                scratch.part.raise(i, max);
                scratch.part.sum[i] += kernels.exp_sub(row, scratch.part.max[i]);
            }
            value.axpy(
                &self.cache.cell(&span.span.block.view, job.cell, Side::Value, span.rows.clone()),
                scores,
                &mut scratch.part.out,
            );
        });
    }

    /// Hands the logits of each visible span, `[rows of the job, rows of the span]`, to `each`;
    /// invisible ones are negative infinity. Only spans of `format`, if one is given.
    fn visit(
        &self,
        job: &Job<'_>,
        format: Option<usize>,
        scratch: &mut Scratch,
        mut each: impl FnMut(&Visible<'_>, &mut [f32], &mut Scratch),
    ) {
        let mut scores = std::mem::take(&mut scratch.scores);
        let mut ready: Option<(usize, i32)> = None;
        let mut start = 0;
        for span in job.spans {
            let index = start;
            start += span.count as usize;
            let this = span.block.view.format();
            if format.is_some_and(|format| format != this) {
                continue;
            }
            let Some(visible) = self.visible(job, span, index) else { continue };
            let shift = job.shift(span);
            if ready != Some((this, shift)) {
                self.prepare(job, this, shift, &scratch.queries, &mut scratch.prepared);
                ready = Some((this, shift));
            }
            let key = self.cache.formats()[this].side(Side::Key);
            let rows = visible.rows.len();
            scores.resize(job.rows() * rows, 0.0);
            let cell = self.cache.cell(&span.block.view, job.cell, Side::Key, visible.rows.clone());
            key.dot(&cell, &scratch.prepared, &mut scores);
            self.shape_logits(job, &visible, &mut scores);
            each(&visible, &mut scores, scratch);
        }
        scratch.scores = scores;
    }

    /// Queries in the space of `format`, turned back by `shift` positions.
    fn prepare(
        &self,
        job: &Job<'_>,
        format: usize,
        shift: i32,
        queries: &[f32],
        prepared: &mut Vec<f32>,
    ) {
        prepared.clear();
        prepared.extend_from_slice(queries);
        if let Some(rope) = &self.cache.config().rope
            && shift != 0
        {
            prepared.chunks_exact_mut(job.dim).for_each(|row| rope.rotate(row, -shift));
        }
        self.cache.formats()[format].side(Side::Key).prepare_queries(job.dim, prepared);
    }

    /// The rows of a span that some query of the job may see. `index` is its first row in the lane.
    fn visible<'a>(&self, job: &Job<'_>, span: &'a Span, index: usize) -> Option<Visible<'a>> {
        let last = job.last_index(job.task.num_queries - 1);
        let count = (span.count as usize).min((last + 1).saturating_sub(index));
        let mut skip = 0;
        if self.options.sliding_window > 0 {
            // Distances shrink along a span; the first query of the tile sees furthest back.
            let window = i64::from(self.options.sliding_window);
            let seen = |i: &usize| job.distance(0, span, index, *i) < window;
            skip = (0..count).find(seen).unwrap_or(count);
        }
        let first = span.first as usize;
        (skip < count).then(|| Visible {
            span,
            index: index + skip,
            rows: first + skip..first + count,
        })
    }

    /// Soft cap, ALiBi, causality and sliding window, in this order.
    fn shape_logits(&self, job: &Job<'_>, visible: &Visible<'_>, scores: &mut [f32]) {
        let Options { softcap, sliding_window, alibi_slopes, .. } = *self.options;
        let rows = visible.rows.len();
        let offset = visible.rows.start - visible.span.first as usize;
        let span_index = visible.index - offset;
        for (row, scores) in scores.chunks_exact_mut(rows).enumerate() {
            let query = row / job.group;
            if softcap > 0.0 {
                scores.iter_mut().for_each(|score| *score = softcap * (*score / softcap).tanh());
            }
            let distance = |i: usize| job.distance(query, visible.span, span_index, offset + i);
            if let Some(slopes) = alibi_slopes {
                let slope = slopes[job.q_head(row)];
                for (i, score) in scores.iter_mut().enumerate() {
                    *score -= slope * distance(i) as f32;
                }
            }
            let seen = (job.last_index(query) + 1).saturating_sub(visible.index).min(rows);
            scores[seen..].fill(f32::NEG_INFINITY);
            if sliding_window > 0 {
                let hidden = |i: &usize| distance(*i) >= i64::from(sliding_window);
                (0..seen).take_while(hidden).for_each(|i| scores[i] = f32::NEG_INFINITY);
            }
        }
    }

    /// Hands what the policy wants to know to the sequence.
    fn observe(&self, job: &Job<'_>, query: &Tensor<'_>, scratch: &mut Scratch) {
        let Some(observation) = &job.sequence.observation else { return };
        let needs = observation.needs();
        if needs.contains(Needs::QUERY_WINDOW) {
            let mut head = observation.head(self.layer, job.task.kv_head).lock();
            let newest = job.sequence.num_queries.saturating_sub(observation.window());
            for i in 0..job.task.num_queries {
                if job.task.first_query + i < newest {
                    continue;
                }
                scratch.prepared.resize(job.group * job.dim, 0.0);
                for (g, row) in scratch.prepared.chunks_exact_mut(job.dim).enumerate() {
                    query.read(job.token(i * job.group), job.task.kv_head * job.group + g, row);
                }
                head.push_query(observation.window(), job.position(i), &scratch.prepared);
            }
        }
        if needs.contains(Needs::COLUMN_SUM) {
            self.add_column_sums(job, scratch);
        }
    }

    /// Second pass: probabilities from the log-sum-exp, exact without having been kept.
    fn add_column_sums(&self, job: &Job<'_>, scratch: &mut Scratch) {
        let Some(observation) = &job.sequence.observation else { return };
        let kernels = simd::active();
        let mut head = observation.head(self.layer, job.task.kv_head).lock();
        if head.column_sums.len() < job.lane.len {
            head.column_sums.resize(job.lane.len, 0.0);
        }
        self.visit(job, None, scratch, |visible, scores, scratch| {
            let rows = visible.rows.len();
            for (row, scores) in scores.chunks_exact_mut(rows).enumerate() {
                kernels.exp_sub(scores, scratch.lse[row]);
                let sums = &mut head.column_sums[visible.index..][..rows];
                sums.iter_mut().zip(scores).for_each(|(sum, p)| *sum += *p);
            }
        });
    }
}

/// A part of a span.
struct Visible<'a> {
    span: &'a Span,
    /// Index in the lane of the first of `rows`.
    index: usize,
    /// Rows of the block.
    rows: std::ops::Range<usize>,
}

impl Job<'_> {
    /// Query vectors of the task: `[num_queries, group]`.
    fn rows(&self) -> usize {
        self.task.num_queries * self.group
    }

    /// The row of Q and O of a query vector.
    fn token(&self, row: usize) -> usize {
        self.sequence.first_token + self.task.first_query + row / self.group
    }

    /// The query head of a query vector.
    fn q_head(&self, row: usize) -> usize {
        self.task.kv_head * self.group + row % self.group
    }

    /// The index in the lane of the token of a query of the task: the last it may see.
    fn last_index(&self, query: usize) -> usize {
        self.lane.len - self.sequence.num_queries + self.task.first_query + query
    }

    /// The position of a query of the task.
    fn position(&self, query: usize) -> i32 {
        let from_end = self.sequence.num_queries - self.task.first_query - query;
        (self.sequence.num_tokens - from_end) as i32
    }

    /// How far row `i` of a span, whose first row has `index`, is behind a query.
    fn distance(&self, query: usize, span: &Span, index: usize, i: usize) -> i64 {
        if self.sequence.cache_relative {
            self.last_index(query) as i64 - (index + i) as i64
        } else {
            i64::from(self.position(query)) - i64::from(span.position(i))
        }
    }

    /// Positions by which a query is turned back so that the keys of `span` appear at their index.
    fn shift(&self, span: &Span) -> i32 {
        if self.sequence.cache_relative { self.lane.evicted - span.evicted_before } else { 0 }
    }
}

fn write_out(
    job: &Job<'_>,
    scratch: &Scratch,
    output: &TensorMut<'_>,
    lse: Option<&TensorMut<'_>>,
) {
    for (row, values) in scratch.total.out.chunks_exact(job.dim).enumerate() {
        output.write(job.token(row), job.q_head(row), values);
        if let Some(lse) = lse {
            lse.write(job.token(row), job.q_head(row), &scratch.lse[row..=row]);
        }
    }
}
