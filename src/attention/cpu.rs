//! The CPU path of one layer: tasks, spans, online softmax, merge.

use std::cell::RefCell;

use super::Options;
use super::choose::ChoiceScratch;
use super::decoded::DECODE_FROM;
use super::job::{Job, Piece};
use super::plan::{Plan, Planned};
use super::received::Weights;
use super::state::States;
use super::tasks::{Extent, Task, Tasks};
use super::walk::Blocks;
use crate::cache::{Cache, OPEN};
use crate::device::tensor::{Tensor, TensorMut};
use crate::quantizer::basis::Basis;
use crate::quantizer::{Cell, Quantizer, Side};
use crate::sequence::{FIRST_STATISTIC, MAX_DRAFTS, QueryStatistics, Span};
use crate::shape::Needs;
use crate::simd::{self, Format, IntegerQueries, Rows};

/// One call of `run`.
pub(super) struct Call<'a> {
    pub(super) cache: &'a Cache,
    pub(super) plan: &'a Plan,
    pub(super) layer: usize,
    pub(super) options: &'a Options<'a>,
}

/// Buffers of a thread. They only grow, so a steady state allocates nothing.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Scaled queries, `[tile, group, dim]`.
    pub(super) queries: Vec<f32>,
    pub(super) rows: RowScratch,
    /// The state of one format.
    part: States,
    /// Outputs on their way out of a subspace.
    restored: Vec<f32>,
    /// The state of all formats.
    pub(super) total: States,
    /// The state of the queries of several sequences.
    pub(super) shared: States,
    /// Log-sum-exp of each row.
    pub(super) lse: Vec<f32>,
    /// The queries of a group as they came, `[group, dim]`.
    pub(super) observed: Vec<f32>,
    /// The weights of all rows, if the policy wants to know them.
    pub(super) weights: Weights,
    /// The blocks that a selector has chosen.
    blocks: Blocks,
    choice: ChoiceScratch,
}

/// What it takes to read rows.
#[derive(Debug, Default)]
pub(super) struct RowScratch {
    /// Queries in the space of the format at hand.
    prepared: Vec<f32>,
    /// Queries on their way into a subspace.
    projected: Vec<f32>,
    /// The prepared ones as integers.
    integers: IntegerQueries,
    /// Logits and then probabilities of one piece, `[queries * group, rows]`.
    scores: Vec<f32>,
    /// Decoded rows of one piece, `[rows, dim]`.
    decoded: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
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
            let tasks = match self.cascades() {
                true => &self.plan.cascade.tasks,
                false => &self.plan.tasks,
            };
            for task in tasks.share(self.layer, worker, num_workers) {
                let task = tasks.list[task];
                if let Extent::Shared(tile) = task.extent {
                    self.run_shared(task, tile, (query, output, lse), scratch);
                    continue;
                }
                let mut blocks = std::mem::take(&mut scratch.blocks);
                let is_chosen = self.choose(task, query, &mut blocks, &mut scratch.choice);
                let mut job = self.job(task);
                if is_chosen {
                    job.walk.chosen = Some(blocks.chosen());
                }
                self.attend(&job, query, scratch);
                if self.arrive(&job, tasks, task.part, scratch) {
                    self.write(&job, (query, output, lse), scratch);
                }
                scratch.blocks = blocks;
            }
        });
    }

    /// Whether `scratch.total` is the state of all rows: it brings a part of them to the others, and the
    /// last to come takes the sum.
    pub(super) fn arrive(
        &self,
        job: &Job<'_>,
        tasks: &Tasks,
        part: usize,
        scratch: &mut Scratch,
    ) -> bool {
        let Task { num_meeting, split, .. } = job.task;
        num_meeting == 1
            || tasks.splits[split].arrive(self.layer, part, num_meeting, &mut scratch.total)
    }

    /// Writes the results of `scratch.total`, the state of all rows.
    pub(super) fn write(
        &self,
        job: &Job<'_>,
        (query, output, lse): (&Tensor<'_>, &TensorMut<'_>, Option<&TensorMut<'_>>),
        scratch: &mut Scratch,
    ) {
        self.finish(job, scratch);
        write_out(job, scratch, output, lse);
        self.observe(job, query, scratch);
    }

    pub(super) fn job(&self, task: Task) -> Job<'_> {
        let shape = &self.cache.config().shape;
        let sequence = &self.plan.sequences[task.sequence];
        let (_, cell) = self.cache.config().lane_width.locate(shape, self.layer, task.kv_head);
        let (lane, walk) = self.plan.walk(self.cache, self.layer, task.sequence, task.kv_head);
        let extent = self.plan.extent(self.cache, self.layer, &task);
        let tokens = match task.extent {
            Extent::Shared(tile) => self.plan.cascade.tile(tile).1,
            _ => &[],
        };
        let (group, dim, out_dim) = (shape.group(), shape.head_dim, shape.value_row_dim());
        Job { task, sequence, lane, walk, extent, tokens, cell, group, dim, out_dim }
    }

    /// Fills `scratch.total` with the state of the task's part of the rows.
    pub(super) fn attend(&self, job: &Job<'_>, query: &Tensor<'_>, scratch: &mut Scratch) {
        let rows = job.rows();
        scratch.queries.resize(rows * job.dim, 0.0);
        let scale = self.options.scale_for(job.dim);
        for (row, target) in scratch.queries.chunks_exact_mut(job.dim).enumerate() {
            query.read(job.token(row), job.q_head(row), target);
            target.iter_mut().for_each(|x| *x *= scale);
        }
        scratch.total.reset(rows, job.out_dim);
        scratch.weights.clear();
        let part = job.part();
        let stops = job.walk.stop_of(part.start)..job.walk.stop_of(part.end.saturating_sub(1)) + 1;
        let stops = stops.start..stops.end.min(job.walk.num_stops());
        for format in 0..self.cache.formats().len() {
            let is_in = |i| job.walk.stop(i).span.block.view.format() == format;
            if stops.clone().any(is_in) {
                self.attend_format(job, format, scratch);
                if let Some(basis) = self.basis(job.sequence, job.task.kv_head, Side::Value, format)
                {
                    scratch.part.restore(basis, &mut scratch.restored);
                }
                scratch.total.merge(&scratch.part);
            }
        }
    }

    /// Attends to the spans in one format: fills `scratch.part`.
    fn attend_format(&self, job: &Job<'_>, format: usize, scratch: &mut Scratch) {
        let Scratch { queries, rows, part, weights, .. } = scratch;
        let out_dim = self.cache.formats()[format].dim(Side::Value);
        part.reset(job.rows(), out_dim);
        let keeps_weights = job.keeps_weights();
        let kernels = simd::active();
        let value = self.cache.formats()[format].side(Side::Value);
        self.visit(job, Some(format), queries, rows, |piece, next, scores, decoded| {
            let first = piece.queries.start * job.group;
            part.weigh(first, piece.rows.len(), scores, kernels);
            if keeps_weights {
                weights.push(piece, scores, &part.max);
            }
            let view = &piece.span.block.view;
            let mut cell = self.cache.cell(view, job.cell, Side::Value, piece.rows.clone());
            cell.ahead = next;
            let end = piece.queries.end * job.group;
            let out = &mut part.out[first * out_dim..end * out_dim];
            if decodes_piece(job, piece, (value, out_dim), format) {
                kernels.axpy(Format::F32, &decode(value, &cell, decoded), scores, out);
            } else {
                value.axpy(&cell, scores, out);
            }
        });
        if !decodes(job, (value, out_dim)) {
            value.finish_outputs(out_dim, &mut part.out);
        }
    }

    /// Hands the logits of each visible piece, `[queries * group, rows]`, to `each`, with the values
    /// that come next and a buffer for decoded rows; invisible ones are negative infinity. Only spans
    /// of `format`, if given.
    pub(super) fn visit(
        &self,
        job: &Job<'_>,
        format: Option<usize>,
        queries: &[f32],
        scratch: &mut RowScratch,
        mut each: impl FnMut(&Piece<'_>, &[u8], &mut [f32], &mut Vec<f32>),
    ) {
        let RowScratch { prepared, projected, integers, scores, decoded } = scratch;
        let part = job.part();
        let mut ready: Option<(usize, i32)> = None;
        let mut following = job.walk.stop_of(part.start);
        while following < job.walk.num_stops() {
            let i = following;
            let stop = job.walk.stop(i);
            if stop.offset >= part.end {
                break;
            }
            let spans = self.spans_of_block(job, i);
            following += spans.len().max(1);
            let span = stop.span;
            let this = span.block.view.format();
            if format.is_some_and(|format| format != this) {
                continue;
            }
            let key = self.cache.formats()[this].side(Side::Key);
            let dim = self.cache.formats()[this].dim(Side::Key);
            let next = |side| self.bytes_of_stop(job, following, side);
            let shift = job.shift(span);
            for piece in job.pieces(stop, spans, self.options.sliding_window) {
                if ready != Some((this, shift)) {
                    self.turn(job, shift, queries, prepared);
                    if let Some(basis) = self.basis(job.sequence, job.task.kv_head, Side::Key, this)
                    {
                        basis.project_queries(prepared, projected);
                        std::mem::swap(prepared, projected);
                    }
                    integers.clear();
                    if !decodes(job, (key, dim)) {
                        key.prepare_queries(dim, prepared);
                        key.encode_queries(dim, prepared, integers);
                    }
                    ready = Some((this, shift));
                }
                let wide = job.group * dim;
                let queries = &prepared[piece.queries.start * wide..piece.queries.end * wide];
                scores.resize(piece.queries.len() * job.group * piece.rows.len(), 0.0);
                let view = &span.block.view;
                let mut cell = self.cache.cell(view, job.cell, Side::Key, piece.rows.clone());
                cell.ahead = next(Side::Key);
                if decodes_piece(job, &piece, (key, dim), this) {
                    let rows = decode(key, &cell, decoded);
                    simd::active().dot(Format::F32, &rows, queries, scores);
                } else {
                    key.dot_prepared(&cell, (queries, integers), scores);
                }
                self.shape_logits(job, &piece, scores);
                piece.hide_evicted(scores);
                each(&piece, next(Side::Value), scores, decoded);
            }
        }
    }

    /// The spans from stop `i` on that are of one block, if they are several and can be gone over as
    /// one: there is one query, and nothing depends on where each row was.
    fn spans_of_block<'a>(&self, job: &Job<'a>, i: usize) -> &'a [Span] {
        let Options { sliding_window, alibi_slopes, .. } = *self.options;
        let (walk, sequence) = (&job.walk, job.sequence);
        let observation = sequence.observation.as_ref();
        let is_plain = job.task.num_queries == 1
            && walk.chosen.is_none()
            && sliding_window == 0
            && alibi_slopes.is_none()
            && !sequence.cache_relative
            && !observation.is_some_and(|seen| seen.needs().contains(Needs::LOW_COUNT));
        let is_split = |pair: &[Span]| pair.len() == 2 && pair[0].block.id == pair[1].block.id;
        if !is_plain || !is_split(&walk.spans[i..(i + 2).min(walk.spans.len())]) {
            return &[];
        }
        let id = walk.spans[i].block.id;
        let count = walk.spans[i..].iter().take_while(|span| span.block.id == id).count();
        let last = i + count - 1;
        let rows = walk.starts[i]..walk.starts[last] + walk.spans[last].count as usize;
        let part = job.part();
        let fits = part.start <= rows.start && rows.end <= part.end.min(job.last_index(0) + 1);
        if fits { &walk.spans[i..=last] } else { &[] }
    }

    /// The subspace of one side of a head of the layer in blocks of `format`; `None` for whole rows.
    pub(super) fn basis<'a>(
        &self,
        sequence: &'a Planned,
        kv_head: usize,
        side: Side,
        format: usize,
    ) -> Option<&'a Basis> {
        let head = self.layer * self.cache.config().shape.num_kv_heads + kv_head;
        self.cache.basis(sequence.bases.as_deref(), head, side, format)
    }

    /// One side of what is at a stop of the walk, if there is one.
    fn bytes_of_stop<'a>(&'a self, job: &Job<'a>, i: usize, side: Side) -> &'a [u8] {
        if i >= job.walk.num_stops() {
            return &[];
        }
        self.cache.cell(&job.walk.stop(i).span.block.view, job.cell, side, 0..0).bytes
    }

    /// Queries turned back by `shift` positions.
    fn turn(&self, job: &Job<'_>, shift: i32, queries: &[f32], turned: &mut Vec<f32>) {
        turned.clear();
        turned.extend_from_slice(queries);
        if let Some(rope) = &self.cache.config().rope
            && shift != 0
        {
            turned.chunks_exact_mut(job.dim).for_each(|row| rope.rotate(row, -shift));
        }
    }

    /// Soft cap, ALiBi and sliding window, in this order; pieces are causal by themselves.
    fn shape_logits(&self, job: &Job<'_>, piece: &Piece<'_>, scores: &mut [f32]) {
        let Options { softcap, sliding_window, alibi_slopes, .. } = *self.options;
        if softcap == 0.0 && sliding_window == 0 && alibi_slopes.is_none() {
            return;
        }
        let first = piece.queries.start * job.group;
        for (row, scores) in scores.chunks_exact_mut(piece.rows.len()).enumerate() {
            let (row, query) = (first + row, piece.queries.start + row / job.group);
            if softcap > 0.0 {
                scores.iter_mut().for_each(|score| *score = softcap * (*score / softcap).tanh());
            }
            if let Some(slopes) = alibi_slopes {
                let slope = slopes[job.q_head(row)];
                for (i, score) in scores.iter_mut().enumerate() {
                    *score -= slope * job.distance(query, piece, i) as f32;
                }
            }
            if sliding_window > 0 {
                scores[..job.beyond(query, piece, sliding_window)].fill(f32::NEG_INFINITY);
            }
        }
    }

    /// Turns `scratch.total` into outputs and fills `scratch.lse`.
    fn finish(&self, job: &Job<'_>, scratch: &mut Scratch) {
        scratch.lse.clear();
        for row in 0..job.rows() {
            if let Some(sinks) = self.options.sinks {
                scratch.total.add_sink(row, sinks[job.q_head(row)]);
            }
            scratch.lse.push(scratch.total.finish(row));
        }
    }

    /// Hands what the policy wants to know to the sequence.
    fn observe(&self, job: &Job<'_>, query: &Tensor<'_>, scratch: &mut Scratch) {
        let Some(observation) = &job.sequence.observation else { return };
        if let Some(replay) = &job.sequence.replay {
            let Scratch { queries, rows, lse, .. } = scratch;
            return self.note_replay(job, observation, replay, queries, rows, lse);
        }
        let needs = observation.needs();
        if needs.contains(Needs::QUERY_WINDOW) {
            let mut head = observation.head(self.layer, job.task.kv_head).lock();
            // Any of a few drafts may turn out to be the last that counts.
            let newest = match job.sequence.num_queries <= MAX_DRAFTS {
                true => 0,
                false => job.sequence.num_queries.saturating_sub(observation.window()),
            };
            let observed = &mut scratch.observed;
            observed.resize(job.group * job.dim, 0.0);
            for i in newest.saturating_sub(job.task.first_query)..job.task.num_queries {
                for (g, row) in observed.chunks_exact_mut(job.dim).enumerate() {
                    query.read(job.token(i * job.group), job.q_head(g), row);
                    self.rescale(row);
                }
                head.push_query(observation.window(), job.position(i), observed);
            }
        }
        if needs.contains(Needs::QUERY_STATISTICS) {
            self.add_statistics(job, query, &mut scratch.observed);
        }
        if needs.contains(Needs::LOW_COUNT) {
            let Scratch { queries, rows, lse, .. } = &mut *scratch;
            self.add_low_counts(job, observation, queries, rows, lse);
        }
        if needs.0 & Needs::COLUMN_SUM.union(Needs::LAST_ROW).0 != 0 {
            self.note_received(job, observation, scratch);
        }
    }

    /// Policies divide by the root of the dimension whatever a layer does: where it does something else,
    /// they see queries of another length.
    fn rescale(&self, query: &mut [f32]) {
        if self.options.scale != 0.0 {
            let factor = self.options.scale * (query.len() as f32).sqrt();
            query.iter_mut().for_each(|x| *x *= factor);
        }
    }

    /// Adds the queries of the task, turned back to position 0, to the statistics of their heads.
    fn add_statistics(&self, job: &Job<'_>, query: &Tensor<'_>, rows: &mut Vec<f32>) {
        let Some(observation) = &job.sequence.observation else { return };
        let mut head = observation.head(self.layer, job.task.kv_head).lock();
        head.statistics.resize_with(job.group, QueryStatistics::default);
        let first = (0..job.task.num_queries).find(|i| job.position(*i) >= FIRST_STATISTIC);
        let Some(first) = first else { return };
        for (g, statistics) in head.statistics.iter_mut().enumerate() {
            rows.resize((job.task.num_queries - first) * job.dim, 0.0);
            for (i, row) in (first..).zip(rows.chunks_exact_mut(job.dim)) {
                query.read(job.token(i * job.group), job.q_head(g), row);
                self.rescale(row);
                if let Some(rope) = &self.cache.config().rope {
                    rope.rotate(row, -job.position(i));
                }
            }
            statistics.add(rows, job.dim);
        }
    }
}

/// Whether rows of a format and a length are decoded. Then queries and outputs are not in its space.
fn decodes(job: &Job<'_>, (side, dim): (&dyn Quantizer, usize)) -> bool {
    job.rows() >= DECODE_FROM && !side.takes_many(dim)
}

/// The same for the rows of a piece: the open format is raw and has no space of its own, so single
/// queries take it as it is.
fn decodes_piece(
    job: &Job<'_>,
    piece: &Piece<'_>,
    side: (&dyn Quantizer, usize),
    format: usize,
) -> bool {
    decodes(job, side) && !(format == OPEN && piece.queries.len() == 1)
}

/// The rows of `cell` as f32.
fn decode<'a>(side: &dyn Quantizer, cell: &Cell<'_>, decoded: &'a mut Vec<f32>) -> Rows<'a> {
    decoded.resize(cell.rows.len() * cell.dim, 0.0);
    side.decode(cell, decoded);
    Rows::of_f32(decoded, cell.dim)
}

fn write_out(
    job: &Job<'_>,
    scratch: &Scratch,
    output: &TensorMut<'_>,
    lse: Option<&TensorMut<'_>>,
) {
    let value_dim = output.shape()[2];
    for (row, values) in scratch.total.out.chunks_exact(job.out_dim).enumerate() {
        output.write(job.token(row), job.q_head(row), &values[..value_dim]);
        if let Some(lse) = lse {
            lse.write(job.token(row), job.q_head(row), &scratch.lse[row..=row]);
        }
    }
}
