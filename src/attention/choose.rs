//! What a selector of the spec makes of the query of a decode step: the list of blocks to read.
//!
//! The list of a head is made by whichever worker first comes to one of its parts, and is good for
//! that run of the layer alone. Before that, the index is brought up to date with the lane: a step
//! adds at most a block to it.

use std::ops::Range;

use parking_lot::Mutex;

use super::cpu::Call;
use super::plan::{Plan, Planned};
use super::tasks::Task;
use super::walk::{Blocks, Walk};
use crate::device::tensor::Tensor;
use crate::order::ordered;
use crate::quantizer::Side;
use crate::selector::{Reach, Selector};
use crate::sequence::{BlockIndex, Span};

/// The list of one head of one sequence.
#[derive(Debug, Default)]
pub(super) struct Choice(Mutex<Chosen>);

#[derive(Debug, Default)]
struct Chosen {
    /// The layer it is for, and the parts that have yet to take it.
    layer: usize,
    left: usize,
    /// Whether it is not everything.
    is_part: bool,
    blocks: Blocks,
}

/// Buffers of a thread.
#[derive(Debug, Default)]
pub(super) struct ChoiceScratch {
    /// The queries of the group, `[group, dim]`.
    queries: Vec<f32>,
    scores: Vec<f32>,
    /// Score and index of the candidates, to rank them.
    order: Vec<u64>,
}

impl Planned {
    /// The selector for a layer, if the step reads by one there. More queries than one read all.
    pub(super) fn selector(&self, layer: usize) -> Option<&dyn Selector> {
        let observation = self.observation.as_ref().filter(|_| self.num_queries == 1)?;
        let selector = observation.selector().filter(|_| self.replay.is_none())?;
        (layer >= selector.reach().dense).then_some(&**selector)
    }
}

impl Reach {
    /// Most rows of a lane of `len` that a step reads, about.
    pub(super) fn limit(&self, len: usize) -> usize {
        let Self { tokens, sink, recent, .. } = *self;
        len.min(tokens.saturating_add(sink).saturating_add(recent))
    }

    /// The blocks that are chosen, of so many tokens each.
    pub(super) fn budget(&self, block_size: usize) -> usize {
        (self.tokens / block_size).max(1)
    }

    /// The blocks of a lane of `len` rows that a step of one query chooses among, where the first `sealed` can
    /// be; `starts` are the rows before each block.
    pub(super) fn candidates(&self, starts: &[usize], sealed: usize, len: usize) -> Range<usize> {
        let tail = starts.len() - 1;
        let first = starts[..tail].partition_point(|start| *start < self.sink);
        let recent = (len - 1).saturating_sub(self.recent);
        let end = starts.partition_point(|start| *start <= recent) - 1;
        first..end.min(sealed).max(first)
    }
}

/// Leading blocks that can be chosen: those that are not sealed may still change, and the last holds the step
/// itself.
pub(super) fn num_sealed(spans: &[Span]) -> usize {
    spans[..spans.len() - 1].iter().take_while(|span| span.sealed).count()
}

impl Plan {
    /// Forgets the lists of the last plan and makes room for those of this.
    pub(super) fn reset_choices(&mut self, num_kv_heads: usize) {
        self.choices.resize_with(self.sequences.len() * num_kv_heads, Choice::default);
        self.choices.iter_mut().for_each(|choice| choice.0.get_mut().left = 0);
    }
}

impl Call<'_> {
    /// Fills `blocks` with what the task's head reads in this run. False if that is everything, or
    /// what the engine has said.
    pub(super) fn choose(
        &self,
        task: Task,
        query: &Tensor<'_>,
        blocks: &mut Blocks,
        scratch: &mut ChoiceScratch,
    ) -> bool {
        let sequence = &self.plan.sequences[task.sequence];
        let Some(selector) = sequence.selector(self.layer) else { return false };
        if self.options.sliding_window > 0 {
            return false; // It bounds what is read already.
        }
        let heads = self.cache.config().shape.num_kv_heads;
        let mut chosen = self.plan.choices[task.sequence * heads + task.kv_head].0.lock();
        if chosen.left == 0 || chosen.layer != self.layer {
            chosen.is_part = self.make_list(task, selector, query, &mut chosen.blocks, scratch);
            (chosen.layer, chosen.left) = (self.layer, task.num_parts);
        }
        chosen.left -= 1;
        if chosen.is_part {
            blocks.clone_from(&chosen.blocks);
        }
        chosen.is_part
    }

    /// Makes the list; false if it would be everything.
    fn make_list(
        &self,
        task: Task,
        selector: &dyn Selector,
        query: &Tensor<'_>,
        blocks: &mut Blocks,
        scratch: &mut ChoiceScratch,
    ) -> bool {
        let (lane, walk) = self.plan.walk(self.cache, self.layer, task.sequence, task.kv_head);
        if walk.chosen.is_some() {
            return false;
        }
        let reach = selector.reach();
        let sealed = num_sealed(walk.spans);
        let candidates = reach.candidates(walk.starts, sealed, lane.len);
        let budget = reach.budget(self.cache.config().block_size);
        if candidates.len() <= budget {
            return false;
        }
        self.score(task, selector, &walk, sealed, query, scratch);
        let ChoiceScratch { scores, order, .. } = scratch;
        order.clear();
        // Ties go to the earlier block.
        let rank = |i: usize| u64::from(ordered(scores[i])) << 32 | u64::from(!(i as u32));
        order.extend(candidates.clone().map(rank));
        order.select_nth_unstable_by(budget - 1, |a, b| b.cmp(a));
        order.truncate(budget);
        order.iter_mut().for_each(|rank| *rank = u64::from(!(*rank as u32)));
        order.sort_unstable();
        blocks.clear();
        let chosen = order.iter().map(|i| *i as u32);
        let spans = (0..candidates.start as u32).chain(chosen);
        blocks.extend(walk.spans, spans.chain(candidates.end as u32..walk.spans.len() as u32));
        true
    }

    /// Fills `scratch.scores` for the first `sealed` blocks.
    fn score(
        &self,
        task: Task,
        selector: &dyn Selector,
        walk: &Walk<'_>,
        sealed: usize,
        query: &Tensor<'_>,
        scratch: &mut ChoiceScratch,
    ) {
        let shape = &self.cache.config().shape;
        let (dim, group) = (shape.head_dim, shape.group());
        let ChoiceScratch { queries, scores, .. } = scratch;
        let sequence = &self.plan.sequences[task.sequence];
        queries.resize(group * dim, 0.0);
        for (g, row) in queries.chunks_exact_mut(dim).enumerate() {
            query.read(sequence.first_token, task.kv_head * group + g, row);
        }
        scores.clear();
        scores.resize(sealed, 0.0);
        let Some(observation) = &sequence.observation else { return };
        let (_, cell) = self.cache.config().lane_width.locate(shape, self.layer, task.kv_head);
        let mut head = observation.head(self.layer, task.kv_head).lock();
        let head = &mut *head;
        let index = head.index.get_or_insert_with(|| BlockIndex::new(selector, dim));
        index.follow(&walk.spans[..sealed], dim, &head.received.sums, |span, keys| {
            let rows = span.first as usize..span.end();
            let view = &span.block.view;
            let basis = self.basis(sequence, task.kv_head, Side::Key, view.format());
            self.cache.read_rows(view, cell, Side::Key, rows, basis, keys);
        });
        index.score(queries, scores);
    }
}
