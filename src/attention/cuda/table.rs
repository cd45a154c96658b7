//! The tables that kernels go by, as the host makes them.

use std::ops::Range;

use super::kernels::is_prompt;
use super::schedule::{Schedule, Segment, segments};
use super::workspace::{Capacity, Layout};
use crate::cache::{Block, Cache, CacheConfig, OPEN};
use crate::device::cuda::params::Item;
use crate::sequence::{Lane, Sequence};
use crate::shape::LaneWidth;

/// What kernels are told of the blocks of a layer.
#[derive(Debug, Default)]
pub(super) struct Lists {
    pub(super) items: Vec<u32>,
    pub(super) prompts: Vec<u32>,
    pub(super) pages: Vec<u32>,
}

/// The table of one layer, or of all, whose heads read every block.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) lists: Lists,
    /// Page and row of each new row, `[lane, token]`.
    pub(super) places: Vec<u32>,
    /// The segments of all lanes.
    pub(super) segments: Vec<Segment>,
    /// `[sequence, lane]`.
    pub(super) lanes: Vec<TableLane>,
    /// The widest sliding window that it allows: kernels count rows, so no row may be missing in it.
    pub(super) widest: u32,
}

/// What a table has of a lane.
#[derive(Debug, Clone)]
pub(super) struct TableLane {
    pub(super) segments: Range<usize>,
    /// Its blocks in the list of pages.
    pub(super) pages: Range<usize>,
    /// Rows.
    pub(super) len: usize,
    /// The widest sliding window of its queries.
    pub(super) widest: u32,
}

impl Table {
    /// Makes the `index`-th table of a batch.
    pub(super) fn make(
        &mut self,
        cache: &Cache,
        batch: &[(&Sequence, usize)],
        index: usize,
        builder: &mut Builder,
    ) {
        let config = cache.config();
        let num_lanes = lanes_of_table(config);
        let heads_per_lane = config.shape.num_kv_heads / num_lanes;
        let lanes = index * num_lanes..(index + 1) * num_lanes;
        self.lists.pages.clear();
        self.segments.clear();
        self.lanes.clear();
        self.widest = u32::MAX;
        builder.clear();
        let mut token = 0;
        for (sequence, n) in batch {
            let first = self.lanes.len();
            sequence.lanes()[lanes.clone()].iter().for_each(|lane| self.push_lane(cache, lane, *n));
            for head in 0..config.shape.num_kv_heads {
                let lane = &self.lanes[first + head / heads_per_lane];
                let segments = &self.segments[lane.segments.clone()];
                builder.push((token, *n, head), segments, lane.len);
            }
            token += n;
        }
        builder.finish(&mut self.lists);
        self.make_places(cache, batch, lanes);
    }

    fn push_lane(&mut self, cache: &Cache, lane: &Lane, num_queries: usize) {
        let page_of = |block: &Block| (cache.page(&block.view), block.view.format() != OPEN);
        let pages = &mut self.lists.pages;
        let (first, first_page) = (self.segments.len(), pages.len());
        segments(lane, cache.config().block_size, page_of, pages, &mut self.segments);
        let widest = widest_window(lane, num_queries);
        self.widest = self.widest.min(widest);
        self.lanes.push(TableLane {
            segments: first..self.segments.len(),
            pages: first_page..pages.len(),
            len: lane.len(),
            widest,
        });
    }

    fn make_places(&mut self, cache: &Cache, batch: &[(&Sequence, usize)], lanes: Range<usize>) {
        self.places.clear();
        for lane in lanes {
            for (sequence, n) in batch {
                for (span, first, count) in Lane::tail(&sequence.lanes()[lane].spans, *n) {
                    let page = cache.page(&span.block.view);
                    self.places.extend((first..first + count).flat_map(|row| [page, row as u32]));
                }
            }
        }
    }
}

impl TableLane {
    /// The index of the block that holds a row of the lane.
    pub(super) fn block_of(&self, segments: &[Segment], row: usize, block_size: usize) -> usize {
        let row = row as i64;
        let is_behind = |segment: &&Segment| i64::from(segment.rows.end) + segment.shift <= row;
        let segments = &segments[self.segments.clone()];
        let Some(segment) = segments.iter().find(|segment| !is_behind(segment)) else {
            return self.pages.len();
        };
        let block = (row - segment.shift) as usize / block_size;
        segment.first_page as usize + block - self.pages.start
    }
}

/// Shares out the work of a table.
#[derive(Debug, Default)]
pub(super) struct Builder {
    pub(super) group: usize,
    pub(super) block_size: usize,
    /// Queries that decode steps, and prompts, attend together.
    pub(super) tiles: [usize; 2],
    /// CTAs of the kernels of both.
    pub(super) grids: [u32; 2],
    /// Rows that a CTA of a decode step does at a time.
    pub(super) unit: u32,
    steps: Schedule,
    prompts: Schedule,
}

impl Builder {
    pub(super) fn clear(&mut self) {
        self.steps.clear();
        self.prompts.clear();
    }

    /// Adds the `n` queries of a KV head, the first of which is row `token` of Q, which attend to `segments`
    /// of a lane of `len` rows.
    pub(super) fn push(
        &mut self,
        (token, n, head): (usize, usize, usize),
        segments: &[Segment],
        len: usize,
    ) {
        // Parts are only merged by the kernel of decode steps.
        let is_prompt = is_prompt(n, self.group)
            && segments.len() == 1
            && segments[0].rows.start == 0
            && segments[0].sealed_end == 0;
        let (tile, schedule) = match is_prompt {
            true => (self.tiles[1], &mut self.prompts),
            false => (self.tiles[0], &mut self.steps),
        };
        for first in (0..n).step_by(tile) {
            let count = tile.min(n - first);
            let seen = len as i64 - (n - first - count) as i64;
            let queries = ((token + first) as u32, count as u32, head as u32);
            let fresh = len as i64 - n as i64;
            schedule.push(queries, segments, (seen, fresh), self.block_size as u32);
        }
    }

    /// Deals out what was pushed.
    pub(super) fn finish(&mut self, lists: &mut Lists) {
        self.steps.cut(self.grids[0], self.unit);
        self.prompts.deal(self.grids[1]);
        let both = [(&mut lists.items, &self.steps), (&mut lists.prompts, &self.prompts)];
        for (items, schedule) in both {
            items.resize(schedule.num_words(), 0);
            schedule.write(items);
        }
    }

    /// Whether there are decode steps, and prompts.
    pub(super) fn has(&self) -> [bool; 2] {
        [!self.steps.is_empty(), !self.prompts.is_empty()]
    }

    /// The partial results and tickets that it takes.
    pub(super) fn partials(&self) -> Capacity {
        Capacity {
            slots: self.steps.num_slots as usize,
            tickets: self.steps.num_tickets as usize,
            ..Capacity::default()
        }
    }
}

impl Lists {
    /// Writes them into a table of this layout.
    pub(super) fn put(&self, words: &mut [u32], layout: &Layout) {
        let lists =
            [(0, &self.items), (layout.prompts, &self.prompts), (layout.pages, &self.pages)];
        for (at, list) in lists {
            words[at..][..list.len()].copy_from_slice(list);
        }
    }

    /// The room that they take.
    pub(super) fn capacity(&self) -> Capacity {
        Capacity {
            items: self.items.len() / Item::WORDS,
            prompts: self.prompts.len() / Item::WORDS,
            pages: self.pages.len(),
            ..Capacity::default()
        }
    }
}

/// The widest window in which each of the last `n` queries of a lane sees as many rows as positions.
fn widest_window(lane: &Lane, n: usize) -> u32 {
    if lane.evicted == 0 {
        return u32::MAX;
    }
    match lane.rows_without_gap() {
        rows if rows == lane.len() => u32::MAX,
        rows => (rows + 1).saturating_sub(n) as u32,
    }
}

/// Lanes whose blocks a table lists: one, or one for each KV head of a layer.
pub(super) fn lanes_of_table(config: &CacheConfig) -> usize {
    if config.lane_width == LaneWidth::Head { config.shape.num_kv_heads } else { 1 }
}
