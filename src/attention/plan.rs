//! The plan of one step: a snapshot of block tables, and tasks with their costs.

use std::ops::Range;
use std::sync::Arc;

use super::cascade::Cascade;
use super::choose::Choice;
use super::split;
use super::tasks::{Extent, Task, Tasks};
use super::walk::{Selection, Walk};
use crate::cache::Cache;
use crate::error::{Result, ensure};
use crate::quantizer::basis::Bases;
use crate::sequence::{Observation, Replay, Sequence, Shared, Span};
use crate::shape::{ModelShape, Needs};

/// Queries of one task. Enough to reuse a dequantized row many times, few enough to keep the
/// accumulators of a group in the first-level cache.
const TILE: usize = 16;

/// Everything `append` and `run` need. Buffers are reused from step to step.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) sequences: Vec<Planned>,
    pub(super) lanes: Vec<PlannedLane>,
    pub(super) spans: Vec<Span>,
    /// For each span, the rows of its lane before it.
    pub(super) starts: Vec<usize>,
    /// Explicit block lists, for each layer.
    selections: Vec<Selection>,
    /// What selectors choose, for each head of each sequence.
    pub(super) choices: Vec<Choice>,
    /// Every sequence for itself.
    pub(super) tasks: Tasks,
    /// Shared rows once for all, and the rest.
    pub(super) cascade: Cascade,
    pub(super) num_tokens: usize,
}

/// One sequence of the batch.
#[derive(Debug)]
pub(super) struct Planned {
    shared: Arc<Shared>,
    epoch: u64,
    /// First of its lanes in the plan.
    first_lane: usize,
    /// First of its rows in Q and O.
    pub(super) first_token: usize,
    pub(super) num_queries: usize,
    pub(super) reserved: usize,
    /// Tokens of the sequence, reserved ones included: the position after the last query.
    pub(super) num_tokens: usize,
    pub(super) cache_relative: bool,
    pub(super) observation: Option<Arc<Observation>>,
    /// The subspaces of blocks whose rows are coordinates.
    pub(super) bases: Option<Arc<Bases>>,
    /// What the reserved tokens replay, if they do.
    pub(super) replay: Option<Replay>,
    /// The group that it shares its first rows with.
    pub(super) group: Option<usize>,
}

/// One block table.
#[derive(Debug, Clone)]
pub(super) struct PlannedLane {
    pub(super) spans: Range<usize>,
    /// Rows.
    pub(super) len: usize,
    pub(super) evicted: i32,
}

impl Planned {
    /// One part of the head over all rows, for these queries.
    pub(super) fn task(&self, sequence: usize, kv_head: usize, queries: Range<usize>) -> Task {
        Task {
            sequence,
            kv_head,
            first_query: queries.start,
            num_queries: queries.len(),
            extent: Extent::All,
            part: 0,
            num_parts: 1,
            num_meeting: 1,
            split: 0,
        }
    }

    /// Adds the tasks of the sequence, which is the `index`-th, for itself.
    pub(super) fn push_tasks(
        &self,
        index: usize,
        num_parts: usize,
        shape: &ModelShape,
        tasks: &mut Tasks,
    ) {
        for kv_head in 0..shape.num_kv_heads {
            for first in (0..self.num_queries).step_by(TILE) {
                let queries = first..self.num_queries.min(first + TILE);
                let vectors = queries.len() * shape.group();
                let task = self.task(index, kv_head, queries);
                let task = Task { num_parts, num_meeting: num_parts, ..task };
                tasks.push_parts(task, vectors, shape.value_row_dim());
            }
        }
    }
}

impl Plan {
    pub(super) fn clear(&mut self) {
        self.sequences.clear();
        self.lanes.clear();
        self.spans.clear();
        self.starts.clear();
        self.selections.iter_mut().for_each(Selection::clear);
        self.tasks.clear();
        self.cascade.clear();
        self.num_tokens = 0;
    }

    pub(super) fn fill(&mut self, cache: &Arc<Cache>, batch: &[(&Sequence, usize)]) -> Result<()> {
        for (i, (sequence, num_queries)) in batch.iter().enumerate() {
            let check = self.check_sequence(cache, sequence, *num_queries);
            check.map_err(|error| error.within(format!("sequence {i} of the batch")))?;
            self.push_sequence(sequence, *num_queries);
        }
        self.push_tasks(cache);
        Ok(())
    }

    /// Checks and notes the sequences alone: what rows there are, a device is told by other means.
    pub(super) fn fill_for_device(
        &mut self,
        cache: &Arc<Cache>,
        batch: &[(&Sequence, usize)],
    ) -> Result<()> {
        for (i, (sequence, num_queries)) in batch.iter().enumerate() {
            let check = self.check_sequence(cache, sequence, *num_queries);
            check.map_err(|error| error.within(format!("sequence {i} of the batch")))?;
            self.note_sequence(sequence, *num_queries, 0);
        }
        Ok(())
    }

    fn check_sequence(&self, cache: &Arc<Cache>, sequence: &Sequence, n: usize) -> Result<()> {
        sequence.ensure_present()?;
        ensure!(Arc::ptr_eq(sequence.cache(), cache), InvalidArgument, "it is of another cache");
        let repeated =
            self.sequences.iter().any(|other| Arc::ptr_eq(&other.shared, sequence.shared()));
        ensure!(!repeated, InvalidArgument, "it is in the batch twice");
        let tokens = sequence.num_tokens() + sequence.num_reserved();
        ensure!(
            (1..=tokens).contains(&n),
            InvalidArgument,
            "num_queries is {n}, must be in 1..={tokens}"
        );
        // The last n rows of a lane must be those of the last n tokens: a query sees what comes
        // before its own row.
        let first = (tokens - n) as i32;
        for (i, lane) in sequence.lanes().iter().enumerate() {
            let kept = rows_from(first, &lane.spans);
            ensure!(
                kept == n,
                InvalidArgument,
                "num_queries is {n}, but a policy has left {kept} of these tokens in lane {i}"
            );
        }
        ensure!(
            !sequence.config().cache_relative || cache.config().rope.is_some(),
            Unsupported,
            "cache relative positions need the rotation of the model (ROPE)"
        );
        Ok(())
    }

    fn push_sequence(&mut self, sequence: &Sequence, num_queries: usize) {
        let first_lane = self.lanes.len();
        for lane in sequence.lanes() {
            let start = self.spans.len();
            self.spans.extend(lane.spans.iter().cloned());
            let spans = start..self.spans.len();
            let mut len = 0;
            for span in &lane.spans {
                self.starts.push(len);
                len += span.count as usize;
            }
            self.lanes.push(PlannedLane { spans, len, evicted: lane.evicted });
        }
        self.note_sequence(sequence, num_queries, first_lane);
    }

    fn note_sequence(&mut self, sequence: &Sequence, num_queries: usize, first_lane: usize) {
        self.sequences.push(Planned {
            shared: sequence.shared().clone(),
            epoch: sequence.shared().epoch(),
            first_lane,
            first_token: self.num_tokens,
            num_queries,
            reserved: sequence.num_reserved(),
            num_tokens: sequence.num_tokens() + sequence.num_reserved(),
            cache_relative: sequence.config().cache_relative,
            observation: sequence.observation().cloned(),
            bases: sequence.bases().cloned(),
            replay: sequence.observation().and_then(|seen| seen.replay()),
            group: None,
        });
        self.num_tokens += num_queries;
    }

    fn push_tasks(&mut self, cache: &Cache) {
        let shape = &cache.config().shape;
        let mut tasks = std::mem::take(&mut self.tasks);
        for (i, sequence) in self.sequences.iter().enumerate() {
            sequence.push_tasks(i, self.num_parts(cache, sequence), shape, &mut tasks);
        }
        self.tasks = tasks;
        self.push_cascade(cache);
        self.selections.resize_with(shape.num_layers, Selection::default);
        self.reset_choices(shape.num_kv_heads);
        for layer in 0..shape.num_layers {
            self.count_costs(cache, layer);
        }
    }

    /// Fills the running sums of the costs of a layer.
    fn count_costs(&mut self, cache: &Cache, layer: usize) {
        let num_layers = cache.config().shape.num_layers;
        let mut tasks = std::mem::take(&mut self.tasks);
        tasks.count_costs(layer, num_layers, |task| self.cost(cache, layer, task));
        self.tasks = tasks;
        let mut tasks = std::mem::take(&mut self.cascade.tasks);
        tasks.count_costs(layer, num_layers, |task| self.cost(cache, layer, task));
        self.cascade.tasks = tasks;
    }

    /// Rows times queries, about.
    fn cost(&self, cache: &Cache, layer: usize, task: &Task) -> u64 {
        let sequence = &self.sequences[task.sequence];
        let (_, walk) = self.walk(cache, layer, task.sequence, task.kv_head);
        let extent = self.extent(cache, layer, task);
        let rows = match (sequence.selector(layer), task.extent) {
            (Some(selector), Extent::All) if walk.chosen.is_none() => {
                selector.reach().limit(walk.rows())
            }
            (_, Extent::All) => walk.rows(),
            _ => extent.len(),
        };
        let after = match task.extent {
            Extent::Shared(_) => 0,
            _ => sequence.num_queries - task.first_query - task.num_queries,
        };
        ((rows - after) * task.num_queries / task.num_parts) as u64 + 1
    }

    /// The rows of its lane that a task of some sort is about, if nothing was chosen from it.
    pub(super) fn extent(&self, cache: &Cache, layer: usize, task: &Task) -> Range<usize> {
        let config = cache.config();
        let (lane, _) = config.lane_width.locate(&config.shape, layer, task.kv_head);
        let sequence = &self.sequences[task.sequence];
        let len = self.lane(sequence, lane).0.len;
        match (task.extent, sequence.group) {
            (Extent::Shared(tile), _) => 0..self.cascade.rows(self.cascade.tile(tile).0, lane),
            (Extent::Rest, Some(group)) => self.cascade.rows(group, lane)..len,
            _ => 0..len,
        }
    }

    /// Whether a layer attends to chosen blocks.
    pub(super) fn selects(&self, layer: usize) -> bool {
        self.selections[layer].head(0).is_some()
    }

    /// See [`super::Attention::select`]: where the list of each head ends, and all of them, if they are fit
    /// to be used.
    pub(super) fn select(
        &mut self,
        cache: &Cache,
        layer: usize,
        lists: Result<(&[u32], &[u32])>,
    ) -> Result<()> {
        let ModelShape { num_layers, num_kv_heads: heads, .. } = cache.config().shape;
        // There are none before the first plan.
        self.selections.resize_with(num_layers, Selection::default);
        let mut selection = std::mem::take(&mut self.selections[layer]);
        selection.clear();
        let mut start = 0;
        let result = lists.and_then(|(ends, blocks)| {
            ends.iter().enumerate().try_for_each(|(i, end)| {
                let (sequence, head) = (i / heads, i % heads);
                let (_, mut lane) = self.walk(cache, layer, sequence, head);
                lane.chosen = None;
                let list = &blocks[start..*end as usize];
                start = *end as usize;
                let pushed = selection.push(lane, self.sequences[sequence].num_queries, list);
                pushed.map_err(|error| error.within(format!("sequence {sequence}, KV head {head}")))
            })
        });
        match result {
            Ok(()) => selection.apply(),
            Err(_) => selection.clear(),
        }
        self.selections[layer] = selection;
        self.count_costs(cache, layer);
        result
    }

    /// Parts of the rows of each head of a sequence: by its longest lane, so that all layers have
    /// the same tasks.
    pub(super) fn num_parts(&self, cache: &Cache, sequence: &Planned) -> usize {
        let observation = sequence.observation.as_ref();
        let whole = Needs::COLUMN_SUM.union(Needs::LAST_ROW).union(Needs::LOW_COUNT);
        let sums = observation.is_some_and(|seen| seen.needs().0 & whole.0 != 0);
        if sums || sequence.replay.is_some() {
            // Probabilities need the log-sum-exp of all rows, and who has it looks back at them.
            return 1;
        }
        let lanes = &self.lanes[sequence.first_lane..][..cache.config().num_lanes()];
        let longest = lanes.iter().map(|lane| lane.len).max().unwrap_or(0);
        // Leading layers may read all; most do as the last.
        let last = cache.config().shape.num_layers - 1;
        let read = sequence.selector(last).map(|selector| selector.reach().limit(longest));
        split::num_parts(read.unwrap_or(longest), sequence.num_queries)
    }

    /// The spans of a lane of a sequence.
    pub(super) fn lane(&self, sequence: &Planned, lane: usize) -> (&PlannedLane, &[Span]) {
        let lane = &self.lanes[sequence.first_lane + lane];
        (lane, &self.spans[lane.spans.clone()])
    }

    /// What a head of a sequence attends to in a layer, and the lane it is in.
    pub(super) fn walk(
        &self,
        cache: &Cache,
        layer: usize,
        sequence: usize,
        kv_head: usize,
    ) -> (&PlannedLane, Walk<'_>) {
        let shape = &cache.config().shape;
        let (lane, _) = cache.config().lane_width.locate(shape, layer, kv_head);
        let (lane, spans) = self.lane(&self.sequences[sequence], lane);
        let chosen = self.selections[layer].head(sequence * shape.num_kv_heads + kv_head);
        let starts = &self.starts[lane.spans.clone()];
        (lane, Walk { spans, starts, len: lane.len, chosen })
    }

    /// Fails if a sequence has changed or ended since the plan was made.
    pub(super) fn check_current(&self) -> Result<()> {
        for (i, sequence) in self.sequences.iter().enumerate() {
            ensure!(
                sequence.shared.epoch() == sequence.epoch,
                InvalidState,
                "sequence {i} of the batch has changed since the plan was made; plan again"
            );
        }
        Ok(())
    }

    /// Fails if the plan has queries for which no row is reserved.
    pub(super) fn check_reserved(&self) -> Result<()> {
        for (i, sequence) in self.sequences.iter().enumerate() {
            let n = sequence.num_queries;
            ensure!(
                n <= sequence.reserved,
                InvalidState,
                "sequence {i} of the batch has {n} queries but {} reserved tokens to append",
                sequence.reserved
            );
        }
        Ok(())
    }

    /// Fails if reserved rows of `layer` have not been written: they hold somebody else's bytes.
    pub(super) fn check_written(&self, layer: usize, num_kv_heads: usize) -> Result<()> {
        for (i, sequence) in self.sequences.iter().enumerate() {
            let written = sequence.shared.written(layer) / num_kv_heads;
            ensure!(
                written >= sequence.reserved,
                InvalidState,
                "layer {layer} of sequence {i} of the batch has {written} of {} reserved tokens \
                 written; append before run",
                sequence.reserved
            );
        }
        Ok(())
    }

    /// Notes that the rows of all heads of a layer were written.
    pub(super) fn note_layer(&self, layer: usize, num_kv_heads: usize) {
        for sequence in &self.sequences {
            sequence.shared.note_written(layer, sequence.num_queries * num_kv_heads);
        }
    }

    /// Notes written rows for `check_written`.
    pub(super) fn note_written(&self, sequence: usize, layer: usize, rows: usize) {
        self.sequences[sequence].shared.note_written(layer, rows);
    }
}

/// Rows of the last spans at positions of `first` and above, as far as these ascend without a row of a
/// lower position between them.
fn rows_from(first: i32, spans: &[Span]) -> usize {
    let (mut rows, mut next) = (0, i32::MAX);
    for span in spans.iter().rev() {
        let count = span.count as usize - span.rows_below(first);
        if span.last_position() >= next {
            break;
        }
        next = span.position(0);
        rows += count;
        if count < span.count as usize {
            break;
        }
    }
    rows
}
