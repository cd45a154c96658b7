//! Lists of blocks that the engine gives for a layer: a table of its own, in which each head has the blocks
//! that it reads, one after the other.
//!
//! ```text
//! lane       0 1 2 3 4 5 6 7      blocks; 6 and 7 hold the planned tokens
//! list         1     4
//! table        1     4   6 7      rows count from 0 without the gaps
//! ```
//!
//! So a short list is one item however scattered its blocks are. But row numbers do not tell distances
//! across a gap, which a sliding window goes by.

use std::sync::Arc;

use super::schedule::Segment;
use super::table::{Builder, Lists, Table, TableLane};
use super::workspace::{Capacity, Limits, Workspace};
use crate::attention::walk::check_list;
use crate::device::cuda::Gpu;
use crate::error::Result;

/// The lists of one layer for every head of the plan; not in use until sent.
#[derive(Debug)]
pub(super) struct Selected {
    in_use: bool,
    lists: Lists,
    /// Whether there are decode steps, and prompts.
    pub(super) has: [bool; 2],
    /// The widest sliding window in which no row is missing.
    pub(super) widest: u32,
    pub(super) workspace: Workspace,
    /// The segments of the head that is being made.
    segments: Vec<Segment>,
}

impl Selected {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Self {
        // Partial results are in the memory of the plan.
        let workspace = Workspace::new(gpu, 1, 0);
        let (lists, segments) = (Lists::default(), Vec::new());
        Self { in_use: false, lists, has: [false; 2], widest: u32::MAX, workspace, segments }
    }

    /// Back to all blocks.
    pub(super) fn clear(&mut self) {
        self.in_use = false;
    }

    /// Itself, if it is in use.
    pub(super) fn in_use(&self) -> Option<&Self> {
        self.in_use.then_some(self)
    }

    /// Makes the lists of `table`, which has every block: head `h` of sequence `s` reads those of `blocks`
    /// up to `ends[s * heads + h]`, and the blocks of the sequence's last `num_queries(s)` tokens.
    pub(super) fn fill(
        &mut self,
        table: &Table,
        heads: usize,
        num_queries: &dyn Fn(usize) -> usize,
        (ends, blocks): (&[u32], &[u32]),
        builder: &mut Builder,
    ) -> Result<()> {
        let num_sequences = ends.len() / heads;
        let heads_per_lane = heads * num_sequences / table.lanes.len().max(1);
        self.lists.pages.clear();
        self.widest = u32::MAX;
        builder.clear();
        let (mut start, mut token) = (0, 0);
        for sequence in 0..num_sequences {
            let n = num_queries(sequence);
            for head in 0..heads {
                let index = sequence * heads + head;
                let lane = &table.lanes[index / heads_per_lane];
                let list = &blocks[start..ends[index] as usize];
                start = ends[index] as usize;
                check_list(list, lane.pages.len()).map_err(|error| {
                    error.within(format!("sequence {sequence}, KV head {head}"))
                })?;
                self.push_head(table, lane, n, list, builder.block_size);
                builder.push((token, n, head), &self.segments, lane.len);
            }
            token += n;
        }
        builder.finish(&mut self.lists);
        self.has = builder.has();
        Ok(())
    }

    /// The segments of a head that reads `list` and the blocks of the last `n` rows.
    fn push_head(
        &mut self,
        table: &Table,
        lane: &TableLane,
        n: usize,
        list: &[u32],
        block_size: usize,
    ) {
        let tail = lane.block_of(&table.segments, lane.len - n, block_size) as u32;
        let before = &list[..list.partition_point(|block| *block < tail)];
        let all = before.iter().copied().chain(tail..lane.pages.len() as u32);
        let rows = chosen(table, lane, all, block_size, &mut self.lists.pages, &mut self.segments);
        let widest = match rows == lane.len {
            true => lane.widest,
            false => lane.widest.min((rows + 1).saturating_sub(n) as u32),
        };
        self.widest = self.widest.min(widest);
    }

    /// Queues the copy, and puts the lists to use.
    pub(super) fn send(&mut self, limits: &Limits) -> Result<()> {
        let Capacity { items, prompts, .. } = limits.capacity;
        let pages = limits.num_blocks * limits.heads_per_block;
        let most = Capacity { items, prompts, pages, ..Capacity::default() };
        self.workspace.reserve(&most.max(&Capacity { places: 0, ..self.lists.capacity() }))?;
        let (layout, lists) = (self.workspace.layout, &self.lists);
        self.workspace.write(|words| {
            lists.put(words, &layout);
            lists.pages.len()
        })?;
        self.in_use = true;
        Ok(())
    }
}

/// Appends the pages of blocks of a lane, ascending, to `pages`, and makes `out` their segments: as few as can
/// be. Answers how many rows at the end follow each other in the lane without a gap.
pub(super) fn chosen(
    table: &Table,
    lane: &TableLane,
    blocks: impl Iterator<Item = u32>,
    block_size: usize,
    pages: &mut Vec<u32>,
    out: &mut Vec<Segment>,
) -> usize {
    let size = block_size as u32;
    let mut segments = table.segments[lane.segments.clone()].iter().peekable();
    let (mut rows, mut next_index) = (0, None);
    out.clear();
    for block in blocks {
        let page = lane.pages.start + block as usize;
        // Segments lie end to end, as their blocks do.
        let is_before = |s: &&Segment| (s.first_page + s.rows.end.div_ceil(size)) as usize <= page;
        while segments.next_if(|segment| is_before(segment)).is_some() {}
        let Some(segment) = segments.peek() else { break };
        let start = (page as u32 - segment.first_page) * size;
        let from = segment.rows.start.max(start)..segment.rows.end.min(start + size);
        let (first, is_sealed) = (from.start - start, from.start < segment.sealed_end);
        let index = segment.shift + i64::from(from.start);
        let continues = out.last().is_some_and(|last| {
            last.rows.end.is_multiple_of(size)
                && first == 0
                && (!is_sealed || last.sealed_end == last.rows.end)
        });
        if !continues {
            let first_page = pages.len() as u32;
            out.push(Segment { first_page, rows: first..first, sealed_end: 0, shift: 0 });
        }
        pages.push(table.lists.pages[page]);
        if let Some(last) = out.last_mut() {
            // Queries see all rows before the blocks that they are in themselves, which are the last.
            last.shift = index - i64::from(last.rows.end);
            last.rows.end += from.len() as u32;
            if is_sealed {
                last.sealed_end = last.rows.end;
            }
        }
        rows = if next_index == Some(index) { rows + from.len() } else { from.len() };
        next_index = Some(index + from.len() as i64);
    }
    rows
}
