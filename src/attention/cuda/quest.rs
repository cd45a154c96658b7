//! Lists of blocks that the device makes itself, for sequences whose policy has the selector `quest`.
//!
//! ```text
//! plan  candidates of each head, room for its list in the page table, items as if it were there
//! run   Q, bounds --kvm_quest_score--> scores --kvm_topk--> pages of the list --> decode over it
//! ```
//!
//! How long a list is follows from the plan: the best `budget` of the candidates, and the blocks that are
//! always read. All candidates are full and in one format, so it does not matter for the items which are
//! chosen, and a captured graph serves later plans.
//!
//! Choices are those of the CPU (`attention/choose.rs`), but that bounds of quantized blocks are those of
//! the keys before they were encoded. A block that lost rows at its end to a rollback is always read here, and
//! so are the fewer blocks on one side of it.

use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;

use super::Reading;
use super::schedule::Segment;
use super::selected::chosen;
use super::table::{Builder, Lists, Table, TableLane, lanes_of_table};
use super::workspace::{Capacity, Limits, Workspace};
use crate::attention::choose::num_sealed;
use crate::cache::Cache;
use crate::device::cuda::params::{Quest as Score, Topk};
use crate::device::cuda::{DeviceTensor, Gpu, Kernel};
use crate::dtype::DType;
use crate::error::{Result, bail};
use crate::selector::Reach;
use crate::sequence::{Lane, Sequence};
use crate::shape::LaneWidth;

/// Blocks of an item of the kernel that scores: one for each thread.
const PART: usize = 128;

/// Words of an item of the kernel that scores, and of the one that makes lists.
const SCORE_WORDS: usize = 6;
const TOPK_WORDS: usize = 7;

/// What is chosen in a plan. Buffers are reused.
#[derive(Debug)]
pub(super) struct Quest {
    kernels: Option<[Kernel; 2]>,
    /// Places are those of `numbers`, `scores` and `lists`, one after the other; partial results are scores.
    pub(super) workspace: Workspace,
    tables: Vec<Choices>,
    /// The table of each layer, where somebody chooses.
    routes: Vec<Option<usize>>,
    room: Room,
}

/// The table of some layers.
#[derive(Debug, Default)]
struct Choices {
    lists: Lists,
    has: [bool; 2],
    /// The number of the block of each page of the lanes.
    numbers: Vec<u32>,
    score_items: Vec<u32>,
    topk_items: Vec<u32>,
    num_scores: usize,
    segments: Vec<Segment>,
}

/// What there is room for behind each other in the places of a table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Room {
    numbers: usize,
    score_items: usize,
    topk_items: usize,
}

/// What a head can choose of its lane.
#[derive(Debug, Clone)]
struct Candidates {
    blocks: Range<usize>,
    budget: usize,
}

impl Quest {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Self {
        let (tables, routes) = (Vec::new(), Vec::new());
        let workspace = Workspace::new(gpu, 1, size_of::<f32>());
        Self { kernels: None, workspace, tables, routes, room: Room::default() }
    }

    pub(super) fn clear(&mut self) {
        self.routes.clear();
    }

    /// The table of a layer in which some head chooses.
    pub(super) fn route(&self, layer: usize) -> Option<usize> {
        *self.routes.get(layer)?
    }

    /// Where kernels find a table. It is for runs without a window.
    pub(super) fn reading(&self, table: usize) -> Reading {
        Reading::new(&self.workspace, table, self.tables[table].has, u32::MAX)
    }

    /// Makes the tables of a batch, whose heads read all blocks in `all`. Answers the partial results that
    /// they take. The context is current.
    pub(super) fn make(
        &mut self,
        cache: &Cache,
        batch: &[(&Sequence, usize)],
        all: &[Table],
        builder: &mut Builder,
    ) -> Result<Capacity> {
        self.routes.clear();
        let mut needed = Capacity::default();
        if batch.iter().all(|(sequence, n)| reach(sequence, *n).is_none()) {
            return Ok(needed);
        }
        let config = cache.config();
        let mut last: Option<(Vec<bool>, Option<usize>)> = None;
        let mut num_tables = 0;
        for layer in 0..config.shape.num_layers {
            let index = if all.len() == 1 { 0 } else { layer };
            let num_lanes = lanes_of_table(config);
            let lanes = index * num_lanes..(index + 1) * num_lanes;
            let chooses = |(sequence, n): &(&Sequence, usize)| {
                let Some(reach) = reach(sequence, *n) else { return false };
                let budget = reach.budget(config.block_size);
                let is_long = |lane: &Lane| lane.spans.len() > budget;
                layer >= reach.dense && sequence.lanes()[lanes.clone()].iter().any(is_long)
            };
            let who: Vec<bool> = batch.iter().map(chooses).collect();
            if !who.contains(&true) {
                self.routes.push(None);
                continue;
            }
            // Layers of the same lanes and choosers have the same table.
            let is_same = config.lane_width == LaneWidth::Sequence;
            if let Some((_, route)) = last.as_ref().filter(|last| is_same && last.0 == who) {
                self.routes.push(*route);
                continue;
            }
            if self.tables.len() == num_tables {
                self.tables.push(Choices::default());
            }
            let table = &mut self.tables[num_tables];
            let route = table.make(cache, batch, &who, (index, &all[index]), builder)?;
            let route = route.then_some(num_tables);
            num_tables += usize::from(route.is_some());
            if route.is_some() {
                needed = needed.max(&builder.partials());
            }
            self.routes.push(route);
            last = Some((who, route));
        }
        if num_tables > 0 && self.kernels.is_none() {
            self.kernels = Some(load(cache)?);
        }
        self.tables.truncate(num_tables.max(1));
        Ok(needed)
    }

    /// Queues the copy of the tables.
    pub(super) fn send(&mut self, limits: &Limits) -> Result<()> {
        if self.routes.iter().all(Option::is_none) {
            return Ok(());
        }
        let Capacity { items, prompts, .. } = limits.capacity;
        let slots = limits.num_blocks * limits.heads_per_block;
        // The lists of heads are behind all blocks.
        let pages = limits.num_blocks + slots;
        let mut needed = Capacity { items, prompts, pages, slots, ..Capacity::default() };
        self.room = self.room.max(&Room::of(limits));
        for table in &self.tables {
            self.room = self.room.max(&Room {
                numbers: table.numbers.len(),
                score_items: table.score_items.len() / SCORE_WORDS,
                topk_items: table.topk_items.len() / TOPK_WORDS,
            });
            let slots = Capacity { slots: table.num_scores, ..Capacity::default() };
            needed = needed.max(&table.lists.capacity()).max(&slots);
        }
        needed.places = self.room.words().div_ceil(2);
        self.workspace.set_tables(self.tables.len());
        self.workspace.reserve(&needed)?;
        let (layout, room, tables) = (self.workspace.layout, self.room, &self.tables);
        self.workspace.write(|words| {
            for (words, table) in words.chunks_exact_mut(layout.words).zip(tables) {
                table.lists.put(words, &layout);
                let places = &mut words[layout.places..][..room.words()];
                // Items that are not there have nothing to do.
                places.fill(0);
                places[..table.numbers.len()].copy_from_slice(&table.numbers);
                places[room.score_at()..][..table.score_items.len()]
                    .copy_from_slice(&table.score_items);
                places[room.topk_at()..][..table.topk_items.len()]
                    .copy_from_slice(&table.topk_items);
            }
            tables.iter().map(|table| table.lists.pages.len()).max().unwrap_or(0)
        })
    }

    /// Queues the choice of a layer by its queries. The context is current.
    pub(super) fn launch(
        &self,
        cache: &Cache,
        layer: usize,
        table: usize,
        query: &DeviceTensor,
    ) -> Result<()> {
        let (Some([score, topk]), Some(bounds), Some(gpu)) =
            (&self.kernels, cache.bounds(), cache.gpu())
        else {
            bail!(Internal, "blocks are chosen by bounds that nobody keeps");
        };
        let config = cache.config();
        let (_, cell) = config.lane_width.locate(&config.shape, layer, 0);
        let is_per_head = config.lane_width == LaneWidth::Head;
        let (workspace, layout, room) = (&self.workspace, &self.workspace.layout, &self.room);
        let at = |word: usize| workspace.address(table, layout.places + word);
        let pages = workspace.address(table, layout.pages);
        let params = Score {
            q: query.address,
            bounds: bounds.base + (cell * bounds.cell * 2) as u64,
            slots: at(0),
            scores: workspace.partials(),
            items: at(room.score_at()),
            q_token: query.strides[0] as i64,
            q_head: query.strides[1] as i64,
            bounds_slot: bounds.block as i64,
            // Heads with a lane of their own are told apart by their blocks.
            bounds_head: if is_per_head { 0 } else { bounds.cell as i64 },
            num_items: room.score_items as u32,
            group: config.shape.group() as u32,
            dim: config.shape.head_dim as u32,
        };
        let grid = |kernel: &Kernel, items: u32| items.min(gpu.num_sms() * kernel.ctas_per_sm);
        gpu.launch(score, grid(score, params.num_items), &params)?;
        let params = Topk {
            scores: workspace.partials(),
            pages,
            blocks: 0,
            list_pages: pages,
            items: at(room.topk_at()),
            num_items: room.topk_items as u32,
        };
        gpu.launch(topk, grid(topk, params.num_items), &params)
    }

    /// Adds what a captured graph relies on.
    pub(super) fn hash(&self, hasher: &mut impl Hasher) {
        if self.routes.iter().any(Option::is_some) {
            self.tables.iter().for_each(|table| table.has.hash(hasher));
            (&self.routes, self.room, self.workspace.generation).hash(hasher);
        }
    }
}

impl Room {
    /// For every plan within limits.
    fn of(limits: &Limits) -> Self {
        let heads = limits.num_sequences * limits.num_kv_heads;
        Self {
            numbers: limits.num_blocks,
            score_items: limits.num_blocks * limits.heads_per_block / PART + heads,
            topk_items: heads,
        }
    }

    /// Room for both, with some to grow.
    fn max(&self, other: &Self) -> Self {
        let grow = |a: usize, b: usize| a.max(b).next_power_of_two();
        Self {
            numbers: grow(self.numbers, other.numbers),
            score_items: grow(self.score_items, other.score_items),
            topk_items: grow(self.topk_items, other.topk_items),
        }
    }

    fn score_at(&self) -> usize {
        self.numbers
    }

    fn topk_at(&self) -> usize {
        self.score_at() + self.score_items * SCORE_WORDS
    }

    fn words(&self) -> usize {
        self.topk_at() + self.topk_items * TOPK_WORDS
    }
}

impl Choices {
    /// Makes the lists of the sequences `who` choose; false if there is nothing to choose.
    fn make(
        &mut self,
        cache: &Cache,
        batch: &[(&Sequence, usize)],
        who: &[bool],
        (index, all): (usize, &Table),
        builder: &mut Builder,
    ) -> Result<bool> {
        let config = cache.config();
        let num_lanes = lanes_of_table(config);
        let heads = config.shape.num_kv_heads;
        self.lists.pages.clone_from(&all.lists.pages);
        self.numbers.clear();
        self.numbers.resize(all.lists.pages.len(), 0);
        self.score_items.clear();
        self.topk_items.clear();
        self.num_scores = 0;
        builder.clear();
        let (mut token, mut starts) = (0, Vec::new());
        for (i, (sequence, n)) in batch.iter().enumerate() {
            let reach = reach(sequence, *n).filter(|_| who[i]);
            for head in 0..heads {
                let of_table = head * num_lanes / heads;
                let lane = &all.lanes[i * num_lanes + of_table];
                let spans = &sequence.lanes()[index * num_lanes + of_table];
                let is_first = head == of_table * heads / num_lanes;
                let chosen =
                    reach.and_then(|reach| choose(spans, reach, config.block_size, &mut starts));
                let Some(chosen) = chosen else {
                    let segments = &all.segments[lane.segments.clone()];
                    builder.push((token, *n, head), segments, lane.len);
                    continue;
                };
                if is_first {
                    let numbers = &mut self.numbers[lane.pages.clone()];
                    let ids = spans.spans.iter().map(|span| span.block.id.0);
                    numbers.iter_mut().zip(ids).for_each(|(number, id)| *number = id);
                    let blocks = spans.spans[chosen.blocks.clone()].iter().map(|span| span.block);
                    cache.ensure_bounds(blocks)?;
                }
                self.push_head(all, lane, (token, head), &chosen, builder.block_size);
                builder.push((token, *n, head), &self.segments, lane.len);
            }
            token += n;
        }
        builder.finish(&mut self.lists);
        self.has = builder.has();
        Ok(!self.topk_items.is_empty())
    }

    /// Adds what makes the list of a head, and its segments as if the first candidates were chosen.
    fn push_head(
        &mut self,
        all: &Table,
        lane: &TableLane,
        (token, head): (usize, usize),
        candidates: &Candidates,
        block_size: usize,
    ) {
        let Candidates { blocks, budget } = candidates;
        let (num_blocks, score) = (lane.pages.len(), self.num_scores);
        let first_page = lane.pages.start;
        for begin in blocks.clone().step_by(PART) {
            let end = blocks.end.min(begin + PART);
            let item = [token, head, first_page, begin, end, score];
            self.score_items.extend(item.map(|x| x as u32));
        }
        let list = self.lists.pages.len();
        let item = [score, blocks.start, blocks.end, num_blocks, *budget, first_page, list];
        self.topk_items.extend(item.map(|x| x as u32));
        self.num_scores += num_blocks;
        let read = (0..blocks.start + budget).chain(blocks.end..num_blocks).map(|i| i as u32);
        chosen(all, lane, read, block_size, &mut self.lists.pages, &mut self.segments);
    }
}

/// How much the selector of a sequence reads in a step of `n` queries; `None` if it reads all.
fn reach(sequence: &Sequence, n: usize) -> Option<Reach> {
    let selector = sequence.observation()?.selector().filter(|_| n == 1)?;
    Some(selector.reach())
}

/// What there is to choose in a lane: the most candidates in a row that are full and in one format.
fn choose(
    lane: &Lane,
    reach: Reach,
    block_size: usize,
    starts: &mut Vec<usize>,
) -> Option<Candidates> {
    starts.clear();
    let mut len = 0;
    for span in &lane.spans {
        starts.push(len);
        len += span.count as usize;
    }
    let all = reach.candidates(starts, num_sealed(&lane.spans), len);
    let mut best = all.start..all.start;
    let spans = &lane.spans[all.clone()];
    let mut start = all.start;
    let format = |i: usize| lane.spans[i].block.view.format();
    for (i, span) in (all.start..).zip(spans) {
        if span.count as usize != block_size {
            start = i + 1;
            continue;
        }
        if i > start && format(i) != format(start) {
            start = i;
        }
        if i + 1 - start > best.len() {
            best = start..i + 1;
        }
    }
    let budget = reach.budget(block_size);
    (best.len() > budget).then_some(Candidates { blocks: best, budget })
}

fn load(cache: &Cache) -> Result<[Kernel; 2]> {
    let (config, Some(gpu)) = (cache.config(), cache.gpu()) else {
        bail!(Internal, "choices of a cache in host memory");
    };
    let dtype = config.memory.as_ref().map_or(DType::F16, |memory| memory.open);
    let group = config.shape.group();
    let columns = [4, 8, 16].into_iter().find(|columns| group <= *columns).unwrap_or(16);
    let shared = 8 * columns * config.shape.head_dim;
    let name = format!("kvm_quest_score_{}_g{columns}", dtype.name());
    Ok([gpu.kernel(&name, PART as u32, shared as u32)?, gpu.kernel("kvm_topk", 512, 1032)?])
}
