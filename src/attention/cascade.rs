//! Shared prefixes: the rows that several sequences of a plan have in common are read once for all.
//!
//! ```text
//! sequence a   P P P P P P a a        P: the same blocks at the head of the lanes
//! sequence b   P P P P P P b
//! tile         queries of a and b over P, in parts      -> a state for each query
//! rest         queries of a over a a, of b over b       -> merged with those by log-sum-exp
//! ```
//!
//! A group are the sequences whose lanes have the same block at row [`MIN_ROWS`]; it shares the longest
//! common run of rows from there back to the first, in each lane on its own. A plan with groups has a
//! second list of tasks. A run takes it unless what it does depends on where a query is (a sliding
//! window, ALiBi) or the layer reads chosen blocks. Sequences stay out of groups if their queries must
//! know each row: with a selector, a replay, or a policy that wants to know what rows receive.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::cpu::{Call, Scratch};
use super::plan::{Plan, Planned};
use super::split;
use super::tasks::{Extent, Task, Tasks};
use crate::cache::Cache;
use crate::device::tensor::{Tensor, TensorMut};
use crate::sequence::Span;
use crate::shape::Needs;

/// Rows that are worth a group.
pub(super) const MIN_ROWS: usize = 128;

/// Most queries of a sequence of a group. More have enough work for each row by themselves.
const MAX_QUERIES: usize = 8;

/// Queries of a tile.
const TILE: usize = 16;

/// What a plan shares, and what runs have made of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PlanStatistics {
    /// Groups of sequences that start with the same blocks.
    pub shared_groups: usize,
    /// Sequences in groups.
    pub shared_sequences: usize,
    /// Rows that a group shares, of its longest lane, summed over groups.
    pub shared_rows: usize,
    /// Tasks over shared rows that workers have done since the plan was made.
    pub shared_tasks_run: u64,
}

/// The groups of a plan and its tasks if they are made use of.
#[derive(Debug, Default)]
pub(super) struct Cascade {
    groups: Vec<Group>,
    members: Vec<Member>,
    tiles: Vec<Tile>,
    /// Rows of Q and O of the queries of all tiles.
    tokens: Vec<usize>,
    pub(super) tasks: Tasks,
    num_run: AtomicU64,
}

/// Sequences that share rows.
#[derive(Debug)]
struct Group {
    members: Range<usize>,
    /// Shared rows of each lane.
    rows: Vec<usize>,
    /// Parts of the shared rows.
    num_parts: usize,
}

/// A sequence of a group.
#[derive(Debug, Clone, Copy)]
struct Member {
    sequence: usize,
    /// Its task for the first part of the rest, for KV head 0; the heads meet in consecutive places.
    task: Task,
}

/// Members of a group whose queries are together no more than `TILE`.
#[derive(Debug)]
struct Tile {
    group: usize,
    members: Range<usize>,
    tokens: Range<usize>,
}

impl Cascade {
    pub(super) fn clear(&mut self) {
        self.groups.clear();
        self.members.clear();
        self.tiles.clear();
        self.tokens.clear();
        self.tasks.clear();
        *self.num_run.get_mut() = 0;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    pub(super) fn statistics(&self) -> PlanStatistics {
        PlanStatistics {
            shared_groups: self.groups.len(),
            shared_sequences: self.members.len(),
            shared_rows: self.groups.iter().map(Group::longest).sum(),
            shared_tasks_run: self.num_run.load(Ordering::Relaxed),
        }
    }

    /// Shared rows of a lane of a group.
    pub(super) fn rows(&self, group: usize, lane: usize) -> usize {
        self.groups[group].rows[lane]
    }

    /// The group of a tile and the rows of Q and O of its queries.
    pub(super) fn tile(&self, tile: usize) -> (usize, &[usize]) {
        let tile = &self.tiles[tile];
        (tile.group, &self.tokens[tile.tokens.clone()])
    }
}

impl Group {
    fn longest(&self) -> usize {
        self.rows.iter().copied().max().unwrap_or(0)
    }
}

impl Planned {
    /// Whether nothing but the outputs of its queries depends on single rows.
    fn may_share(&self) -> bool {
        let each_row = Needs::COLUMN_SUM.union(Needs::LAST_ROW).union(Needs::LOW_COUNT);
        let is_plain = self
            .observation
            .as_ref()
            .is_none_or(|seen| seen.needs().0 & each_row.0 == 0 && seen.selector().is_none());
        is_plain && self.num_queries <= MAX_QUERIES && !self.cache_relative && self.replay.is_none()
    }
}

impl Plan {
    /// Finds groups and makes the tasks of a run that uses them.
    pub(super) fn push_cascade(&mut self, cache: &Cache) {
        self.find_groups(cache.config().num_lanes());
        if self.cascade.is_empty() {
            return;
        }
        for group in 0..self.cascade.groups.len() {
            self.push_tiles(cache, group);
        }
        let shape = &cache.config().shape;
        for i in 0..self.sequences.len() {
            if self.sequences[i].group.is_none() {
                let parts = self.num_parts(cache, &self.sequences[i]);
                self.sequences[i].push_tasks(i, parts, shape, &mut self.cascade.tasks);
            }
        }
        for member in 0..self.cascade.members.len() {
            self.push_rest(cache, member);
        }
    }

    /// Sequences with the same block at the row that is worth a group are one.
    fn find_groups(&mut self, num_lanes: usize) {
        let mut candidates: Vec<_> = (0..self.sequences.len())
            .filter(|i| self.sequences[*i].may_share())
            .filter_map(|i| Some((self.deep_block(i)?, i)))
            .collect();
        candidates.sort_unstable();
        for chunk in candidates.chunk_by(|a, b| a.0 == b.0).filter(|chunk| chunk.len() > 1) {
            let members = || chunk.iter().map(|(_, i)| *i);
            let rows: Vec<_> =
                (0..num_lanes).map(|lane| self.common_rows(members(), lane)).collect();
            let group = Group { members: 0..0, rows, num_parts: 1 };
            if group.longest() < MIN_ROWS {
                continue;
            }
            let index = self.cascade.groups.len();
            let first = self.cascade.members.len();
            for sequence in members() {
                self.sequences[sequence].group = Some(index);
                let task = self.sequences[sequence].task(sequence, 0, 0..0);
                self.cascade.members.push(Member { sequence, task });
            }
            let num_parts = split::num_shared_parts(group.longest());
            let members = first..self.cascade.members.len();
            self.cascade.groups.push(Group { members, num_parts, ..group });
        }
    }

    /// The block of the first lane of a sequence that holds the row that is worth a group.
    fn deep_block(&self, sequence: usize) -> Option<u32> {
        let sequence = &self.sequences[sequence];
        let (lane, spans) = self.lane(sequence, 0);
        let starts = &self.starts[lane.spans.clone()];
        let span = starts.partition_point(|start| *start < MIN_ROWS);
        (lane.len >= MIN_ROWS + sequence.num_queries).then(|| spans[span - 1].block.id.0)
    }

    /// The rows at the head of a lane that are the same in all `members`, and before all queries.
    fn common_rows(&self, mut members: impl Iterator<Item = usize>, lane: usize) -> usize {
        let Some(leader) = members.next() else { return 0 };
        let seen = |i: usize| {
            let sequence = &self.sequences[i];
            let (lane, spans) = self.lane(sequence, lane);
            (lane.len - sequence.num_queries, spans)
        };
        let (mut rows, leading) = seen(leader);
        for member in members {
            let (before, spans) = seen(member);
            rows = rows.min(before).min(common_rows(leading, spans));
        }
        rows
    }

    /// Packs the members of a group into tiles and makes their tasks.
    fn push_tiles(&mut self, cache: &Cache, group: usize) {
        let shape = &cache.config().shape;
        let Cascade { groups, members, tiles, tokens, tasks, .. } = &mut self.cascade;
        let Group { members: range, num_parts, .. } = &groups[group];
        let queries = |member: &Member| self.sequences[member.sequence].num_queries;
        let total: usize = members[range.clone()].iter().map(queries).sum();
        let most = total.div_ceil(total.div_ceil(TILE));
        let mut next = range.start;
        while next < range.end {
            let (first, start) = (next, tokens.len());
            while next < range.end {
                let sequence = &self.sequences[members[next].sequence];
                let taken = tokens.len() - start;
                if taken > 0 && taken + sequence.num_queries > most {
                    break;
                }
                tokens.extend((0..sequence.num_queries).map(|i| sequence.first_token + i));
                next += 1;
            }
            let extent = Extent::Shared(tiles.len());
            let num_queries = tokens.len() - start;
            tiles.push(Tile { group, members: first..next, tokens: start..tokens.len() });
            let sequence = members[first].sequence;
            for kv_head in 0..shape.num_kv_heads {
                let task = self.sequences[sequence].task(sequence, kv_head, 0..num_queries);
                // Its parts meet those of the rest of each member, not each other.
                let task = Task { extent, num_parts: *num_parts, num_meeting: 1, ..task };
                tasks.push_parts(task, num_queries * shape.group(), shape.value_row_dim());
            }
        }
    }

    /// Makes the tasks of a member over the rows that it does not share.
    fn push_rest(&mut self, cache: &Cache, member: usize) {
        let shape = &cache.config().shape;
        let Member { sequence: index, .. } = self.cascade.members[member];
        let sequence = &self.sequences[index];
        let Some(group) = sequence.group else { return };
        let rest = |lane| self.lane(sequence, lane).0.len - self.cascade.rows(group, lane);
        let longest = (0..cache.config().num_lanes()).map(rest).max().unwrap_or(0);
        let num_parts = split::num_parts(longest, sequence.num_queries);
        let num_meeting = num_parts + self.cascade.groups[group].num_parts;
        let split = self.cascade.tasks.num_splits();
        let task = sequence.task(index, 0, 0..sequence.num_queries);
        let task = Task { extent: Extent::Rest, num_parts, num_meeting, split, ..task };
        self.cascade.members[member].task = task;
        for kv_head in 0..shape.num_kv_heads {
            let vectors = task.num_queries * shape.group();
            self.cascade.tasks.push_parts(Task { kv_head, ..task }, vectors, shape.value_row_dim());
        }
    }
}

impl Call<'_> {
    /// Whether shared rows are read once in this run.
    pub(super) fn cascades(&self) -> bool {
        let options = self.options;
        !self.plan.cascade.is_empty()
            && !options.no_cascade
            && options.sliding_window == 0
            && options.alibi_slopes.is_none()
            && !self.plan.selects(self.layer)
    }

    /// Attends to a part of shared rows and brings each member its share.
    pub(super) fn run_shared(
        &self,
        task: Task,
        tile: usize,
        (query, output, lse): (&Tensor<'_>, &TensorMut<'_>, Option<&TensorMut<'_>>),
        scratch: &mut Scratch,
    ) {
        let cascade = &self.plan.cascade;
        let job = self.job(task);
        self.attend(&job, query, scratch);
        std::mem::swap(&mut scratch.total, &mut scratch.shared);
        let mut first = 0;
        for member in &cascade.members[cascade.tiles[tile].members.clone()] {
            let split = member.task.split + task.kv_head;
            let own = self.job(Task { kv_head: task.kv_head, split, ..member.task });
            scratch.total.copy_rows_from(&scratch.shared, first..first + own.rows());
            first += own.rows();
            let part = own.task.num_parts + task.part;
            if self.arrive(&own, &cascade.tasks, part, scratch) {
                self.write(&own, (query, output, lse), scratch);
            }
        }
        cascade.num_run.fetch_add(1, Ordering::Relaxed);
    }
}

/// Rows at the head of two lanes that are the same rows of the same blocks.
fn common_rows(a: &[Span], b: &[Span]) -> usize {
    let mut rows = 0;
    for (a, b) in a.iter().zip(b) {
        if a.block.id != b.block.id || a.first != b.first {
            break;
        }
        rows += a.count.min(b.count) as usize;
        if a.count != b.count {
            break;
        }
    }
    rows
}
