//! Tasks of a plan, their costs, and how workers share them.

use std::ops::Range;

use super::split::Split;

/// A KV head of a sequence, a tile of its queries and a part of its rows; or the same for several
/// sequences and the rows that they share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Task {
    /// The sequence; of several the first.
    pub(super) sequence: usize,
    pub(super) kv_head: usize,
    /// The first query of its sequence. 0 for several sequences.
    pub(super) first_query: usize,
    pub(super) num_queries: usize,
    pub(super) extent: Extent,
    /// Which of `num_parts` equal parts of these rows.
    pub(super) part: usize,
    pub(super) num_parts: usize,
    /// Parts that meet, those of shared rows included.
    pub(super) num_meeting: usize,
    /// Where the parts meet, if there are several.
    pub(super) split: usize,
}

/// Rows of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// All rows.
    All,
    /// The rows behind those that the sequence shares with its group.
    Rest,
    /// The rows that the sequences of a tile of the cascade share.
    Shared(usize),
}

/// A list of tasks. Buffers are reused from step to step.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    pub(super) list: Vec<Task>,
    /// For each layer, the running sum of the costs of its tasks.
    costs: Vec<u64>,
    /// Meeting points; the first `num_splits` are in use.
    pub(super) splits: Vec<Split>,
    num_splits: usize,
}

impl Tasks {
    pub(super) fn clear(&mut self) {
        self.list.clear();
        self.costs.clear();
        self.num_splits = 0;
    }

    /// Adds `task` once for each of its parts, with a place to meet if more than one meet.
    pub(super) fn push_parts(&mut self, task: Task, vectors: usize, dim: usize) {
        let split = self.num_splits;
        if task.num_meeting > 1 {
            if self.splits.len() == split {
                self.splits.push(Split::default());
            }
            self.splits[split].reset(task.num_meeting, vectors, dim);
            self.num_splits += 1;
        }
        self.list.extend((0..task.num_parts).map(|part| Task { part, split, ..task }));
    }

    /// Meeting points in use.
    pub(super) fn num_splits(&self) -> usize {
        self.num_splits
    }

    /// Fills the costs of a layer of `num_layers`.
    pub(super) fn count_costs(
        &mut self,
        layer: usize,
        num_layers: usize,
        cost: impl Fn(&Task) -> u64,
    ) {
        self.costs.resize(num_layers * self.list.len(), 0);
        let mut sum = 0;
        let costs = self.costs[layer * self.list.len()..].iter_mut();
        for (total, task) in costs.zip(&self.list) {
            sum += cost(task);
            *total = sum;
        }
    }

    /// The tasks of `layer` that `worker` does: a run whose cost is close to its fair share.
    pub(super) fn share(&self, layer: usize, worker: usize, num_workers: usize) -> Range<usize> {
        let num_tasks = self.list.len();
        let costs = &self.costs[layer * num_tasks..][..num_tasks];
        let total = costs.last().copied().unwrap_or(0);
        // Worker w does the tasks whose middle falls into its share.
        let start_of = |worker: usize| {
            let limit = u128::from(total) * worker as u128 * 2;
            let middle = |i: usize| {
                let before = if i == 0 { 0 } else { costs[i - 1] };
                u128::from(before + costs[i]) * num_workers as u128
            };
            let (mut low, mut high) = (0, num_tasks);
            while low < high {
                let i = low.midpoint(high);
                if middle(i) < limit { low = i + 1 } else { high = i }
            }
            low
        };
        start_of(worker)..start_of(worker + 1)
    }
}
