//! Attention on a CUDA device: the same plan, append and run as on the CPU.
//!
//! ```text
//! plan     block tables -> page tables, shares of all CTAs, places of new rows -> one async copy
//! append   one launch: K, V -> rows of open blocks
//! run      one launch: Q -> attend over pages -> merge parts -> O, LSE
//!          and one more if the batch has both decode steps and prompts, which another kernel does
//! ```
//!
//! `append` and `run` only launch; everything they need from the host was copied by `plan`. The
//! number of CTAs is that of the device whatever the batch is: what each of them does is read from
//! the plan's tables, so a captured graph serves every plan with the same [`Cuda::graph_key`].
//!
//! There is one table for all layers, or one for each layer if their lanes differ.

mod kernels;
mod notes;
mod schedule;
mod workspace;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use self::kernels::{Decoders, Variant, is_prompt, load_prefill, prefill_rows, tile_of};
use self::notes::Notes;
use self::schedule::{Schedule, Segment, segments};
use self::workspace::{Capacity, NOTE_WORDS, Workspace};
use super::{DeviceOptions, check_shape};
use crate::cache::{Cache, CacheConfig, Format, OPEN, PAGE_BYTES};
use crate::device::cuda::params::{Append, Decode, Item};
use crate::device::cuda::{DeviceTensor, Gpu, Kernel};
use crate::dtype::DType;
use crate::error::{Error, Kind, Result, ensure};
use crate::quantizer::Side;
use crate::sequence::{Lane, Sequence};
use crate::shape::LaneWidth;

/// Threads of the kernel that appends.
const APPEND_THREADS: usize = 256;

/// Plans and runs attention over blocks in device memory.
#[derive(Debug)]
pub(super) struct Cuda {
    gpu: Arc<Gpu>,
    dtype: DType,
    /// For keys and values of each type.
    append: [(DType, Kernel); 3],
    decode: Decoders,
    prefill: Kernel,
    workspace: Workspace,
    notes: Notes,
    schedule: Schedule,
    prompts: Schedule,
    segments: Vec<Segment>,
    /// The segments of each lane of the table that is being made.
    lanes: Vec<std::ops::Range<usize>>,
    pages: Vec<Vec<u32>>,
    places: Vec<Vec<u32>>,
    items: Vec<Vec<u32>>,
    prompt_items: Vec<Vec<u32>>,
    /// The kernel that the plan runs.
    variant: Variant,
    /// Whether there are decode steps, and prompts.
    has: [bool; 2],
    num_tokens: usize,
    /// The widest sliding window that each table allows: kernels count rows, so no row may be missing in it.
    widest: Vec<u32>,
    /// The widest sliding window of a run so far.
    window: AtomicU32,
}

impl Cuda {
    /// Loads the kernels that this cache needs; the first time the driver compiles them.
    pub(super) fn new(cache: &Cache, gpu: &Arc<Gpu>) -> Result<Self> {
        let config = cache.config();
        let (dim, group) = (config.shape.head_dim, config.shape.group());
        let Some(memory) = &config.memory else {
            return Err(Error::new(Kind::Unsupported, "the cache has no memory to attend to"));
        };
        let dtype = memory.open;
        let append = |from: DType| -> Result<(DType, Kernel)> {
            let name = format!("kvm_append_{}_{}", from.name(), dtype.name());
            Ok((from, gpu.kernel(&name, APPEND_THREADS as u32, 0)?))
        };
        let num_tables = match config.lane_width {
            LaneWidth::Sequence => 1,
            LaneWidth::Layer | LaneWidth::Head => config.shape.num_layers,
        };
        Ok(Self {
            gpu: gpu.clone(),
            dtype,
            append: [append(DType::F16)?, append(DType::Bf16)?, append(DType::F32)?],
            decode: match cache.sealed_layout() {
                None => Decoders::load(gpu, dtype, dim, group)?,
                Some(layout) => Decoders::load_quantized(gpu, layout, dim, group)?,
            },
            prefill: load_prefill(gpu, dtype, dim)?,
            workspace: Workspace::new(gpu, num_tables, 16 * (dim + 4) * 4),
            notes: Notes::default(),
            schedule: Schedule::default(),
            prompts: Schedule::default(),
            segments: Vec::new(),
            lanes: Vec::new(),
            pages: vec![Vec::new(); num_tables],
            places: vec![Vec::new(); num_tables],
            items: vec![Vec::new(); num_tables],
            prompt_items: vec![Vec::new(); num_tables],
            variant: Variant::default(),
            has: [false; 2],
            num_tokens: 0,
            widest: vec![u32::MAX; num_tables],
            window: AtomicU32::new(0),
        })
    }

    /// Makes room for every plan of so many sequences, queries, and blocks of a layer.
    pub(super) fn reserve(
        &mut self,
        cache: &Cache,
        num_sequences: usize,
        num_queries: usize,
        num_blocks: usize,
    ) -> Result<()> {
        let _entered = self.gpu.enter()?;
        self.gpu.ensure_not_capturing("reserve")?;
        let config = cache.config();
        let heads = config.shape.num_kv_heads;
        let grids = self.decode.kernels.iter().map(|(variant, _)| self.grid_of(*variant));
        let grid = grids.max().unwrap_or(1) as usize;
        let tiles = num_sequences + num_queries.div_ceil((16 / config.shape.group()).max(1));
        let lists = lanes_of_table(config);
        // A cut adds an item, and a head that was cut has two parts more than it has whole shares.
        self.workspace.reserve(&Capacity {
            items: tiles * heads + 2 * grid,
            prompts: tiles * heads + self.prefill_grid() as usize,
            places: num_queries * lists,
            notes: num_queries,
            pages: num_blocks,
            slots: 2 * grid,
            tickets: grid,
        })
    }

    /// Makes the tables of a batch and queues their copy.
    pub(super) fn plan(&mut self, cache: &Cache, batch: &[(&Sequence, usize)]) -> Result<()> {
        let _entered = self.gpu.enter()?;
        self.gpu.ensure_not_capturing("plan")?;
        let (group, heads) = (cache.config().shape.group(), cache.config().shape.num_kv_heads);
        let queries = batch.iter().map(|(_, n)| *n);
        let steps = queries.clone().filter(|n| !is_prompt(*n, group));
        // Tiles of 16 columns read the rows half as often where 8 are too few.
        let has_16_columns = group > 8 || steps.clone().any(|n| n * group > 8);
        let tile = tile_of(has_16_columns, group);
        let tiles = steps.map(|n| n.div_ceil(tile)).sum::<usize>() * heads;
        let is_wide = tiles < 2 * self.gpu.num_sms() as usize;
        self.variant = self.decode.choose(Variant { has_16_columns, is_wide });
        self.num_tokens = queries.sum();
        self.has = [false; 2];
        self.notes.plan(&self.gpu, batch)?;
        let notes = self.notes.words.len() / NOTE_WORDS;
        let mut needed = Capacity { notes, ..Capacity::default() };
        for table in 0..self.items.len() {
            self.make_table(cache, batch, table);
            self.make_places(cache, batch, table);
            let schedule = &self.schedule;
            needed.items = needed.items.max(schedule.num_words() / Item::WORDS);
            needed.prompts = needed.prompts.max(self.prompts.num_words() / Item::WORDS);
            needed.places = needed.places.max(self.places[table].len() / 2);
            needed.pages = needed.pages.max(self.pages[table].len());
            needed.slots = needed.slots.max(schedule.num_slots as usize);
            needed.tickets = needed.tickets.max(schedule.num_tickets as usize);
        }
        self.workspace.reserve(&needed)?;
        let Self { items, prompt_items, places, notes, pages, workspace, .. } = self;
        let layout = workspace.layout;
        workspace.write(|words| {
            for (i, table) in words.chunks_exact_mut(layout.words).take(items.len()).enumerate() {
                let mut put = |at: usize, list: &[u32]| {
                    table[at..][..list.len()].copy_from_slice(list);
                };
                put(0, &items[i]);
                put(layout.prompts, &prompt_items[i]);
                put(layout.places, &places[i]);
                put(layout.pages, &pages[i]);
                if i == 0 {
                    put(layout.notes, &notes.words);
                }
            }
            pages.iter().map(Vec::len).max().unwrap_or(0)
        })
    }

    /// Fills the lists of one table.
    fn make_table(&mut self, cache: &Cache, batch: &[(&Sequence, usize)], table: usize) {
        let config = cache.config();
        let shape = &config.shape;
        let num_lanes = lanes_of_table(config);
        let heads_per_lane = shape.num_kv_heads / num_lanes;
        let first_lane = table * num_lanes;
        let step_tile = tile_of(self.variant.has_16_columns, shape.group());
        let prompt_tile = prefill_rows(shape.head_dim) / shape.group();
        let (grid, unit) = (self.grid_of(self.variant), self.decode.rows(self.variant));
        let prompt_grid = self.prefill_grid();
        let pages = &mut self.pages[table];
        pages.clear();
        self.schedule.clear();
        self.prompts.clear();
        let page_of =
            |block: &crate::cache::Block| (cache.page(&block.view), block.view.format() != OPEN);
        let mut token = 0;
        self.widest[table] = u32::MAX;
        for (sequence, n) in batch {
            self.segments.clear();
            self.lanes.clear();
            for lane in &sequence.lanes()[first_lane..first_lane + num_lanes] {
                self.widest[table] = self.widest[table].min(widest_window(lane, *n));
                let start = self.segments.len();
                segments(lane, config.block_size, page_of, pages, &mut self.segments);
                self.lanes.push(start..self.segments.len());
            }
            for head in 0..shape.num_kv_heads {
                let lane = head / heads_per_lane;
                let len = sequence.lanes()[first_lane + lane].len() as i64;
                let segments = &self.segments[self.lanes[lane].clone()];
                // Parts are only merged by the kernel of decode steps.
                let is_prompt = is_prompt(*n, shape.group())
                    && segments.len() == 1
                    && segments[0].rows.start == 0
                    && segments[0].sealed_end == 0;
                let (tile, schedule) = match is_prompt {
                    true => (prompt_tile, &mut self.prompts),
                    false => (step_tile, &mut self.schedule),
                };
                for first in (0..*n).step_by(tile) {
                    let count = tile.min(n - first);
                    let seen = len - (n - first - count) as i64;
                    let queries = ((token + first) as u32, count as u32, head as u32);
                    schedule.push(queries, segments, seen, config.block_size as u32);
                }
            }
            token += n;
        }
        self.has[0] |= !self.schedule.is_empty();
        self.has[1] |= !self.prompts.is_empty();
        self.schedule.cut(grid, unit);
        self.prompts.deal(prompt_grid);
        let lists = [&mut self.items[table], &mut self.prompt_items[table]];
        for (items, schedule) in lists.into_iter().zip([&self.schedule, &self.prompts]) {
            items.resize(schedule.num_words(), 0);
            schedule.write(items);
        }
    }

    /// Fills the places of the new rows of one table, `[lane, token]`.
    fn make_places(&mut self, cache: &Cache, batch: &[(&Sequence, usize)], table: usize) {
        let num_lanes = lanes_of_table(cache.config());
        let first_lane = table * num_lanes;
        let places = &mut self.places[table];
        places.clear();
        for lane in first_lane..first_lane + num_lanes {
            for (sequence, n) in batch {
                for (span, first, count) in Lane::tail(&sequence.lanes()[lane].spans, *n) {
                    let page = cache.page(&span.block.view);
                    places.extend((first..first + count).flat_map(|row| [page, row as u32]));
                }
            }
        }
    }

    fn prefill_grid(&self) -> u32 {
        self.gpu.num_sms() * self.prefill.ctas_per_sm
    }

    /// CTAs of a decode kernel: as many as the device holds at a time.
    fn grid_of(&self, variant: Variant) -> u32 {
        self.gpu.num_sms() * self.decode.kernel(variant).ctas_per_sm
    }

    /// Queues the append of a layer. The rows of the plan are reserved.
    pub(super) fn append(
        &self,
        cache: &Cache,
        layer: usize,
        key: &DeviceTensor,
        value: &DeviceTensor,
    ) -> Result<()> {
        let shape = &cache.config().shape;
        let expected = [self.num_tokens, shape.num_kv_heads, shape.head_dim];
        for (name, tensor) in [("key", key), ("value", value)] {
            check_shape(name, tensor.shape, expected)?;
            tensor.check(name, key.dtype, 16)?;
        }
        if self.num_tokens == 0 {
            return Ok(());
        }
        let blocks = self.blocks(cache, layer);
        let params = Append {
            k: key.address,
            v: value.address,
            to_k: blocks.k,
            to_v: blocks.v,
            places: self.workspace.address(blocks.table, self.workspace.layout.places),
            k_token: key.strides[0] as i64,
            k_head: key.strides[1] as i64,
            v_token: value.strides[0] as i64,
            v_head: value.strides[1] as i64,
            kv_block: blocks.block_stride,
            kv_head: blocks.head_stride,
            kv_token: shape.head_dim as i64,
            place_token: 1,
            place_head: if blocks.head_stride == 0 { self.num_tokens as i64 } else { 0 },
            num_tokens: self.num_tokens as u32,
            num_kv_heads: shape.num_kv_heads as u32,
            dim: shape.head_dim as u32,
        };
        let chunks = expected.iter().product::<usize>() / 8;
        let most = self.gpu.num_sms() as usize * 8;
        let grid = chunks.div_ceil(APPEND_THREADS).clamp(1, most);
        let kernel = self.append.iter().find(|(dtype, _)| *dtype == key.dtype);
        let kernel = kernel.map_or(&self.append[0].1, |(_, kernel)| kernel);
        let _entered = self.gpu.enter()?;
        self.gpu.launch(kernel, grid as u32, &params)
    }

    /// Queues the attention of a layer.
    pub(super) fn run(
        &self,
        cache: &Cache,
        layer: usize,
        query: &DeviceTensor,
        output: &DeviceTensor,
        lse: Option<&DeviceTensor>,
        options: &DeviceOptions,
    ) -> Result<()> {
        let shape = &cache.config().shape;
        let expected = [self.num_tokens, shape.num_q_heads, shape.head_dim];
        for (name, tensor) in [("query", query), ("output", output)] {
            check_shape(name, tensor.shape, expected)?;
            tensor.check(name, self.dtype, 16)?;
        }
        if let Some(lse) = lse {
            check_shape("lse", lse.shape, [self.num_tokens, shape.num_q_heads, 1])?;
            lse.check("lse", DType::F32, 4)?;
            ensure!(
                lse.strides[1] == 1 || shape.num_q_heads == 1,
                Unsupported,
                "lse.strides[1] is {}, must be 1 on a CUDA device",
                lse.strides[1]
            );
        }
        let blocks = self.blocks(cache, layer);
        let (window, widest) = (options.common.sliding_window, self.widest[blocks.table]);
        self.window.fetch_max(window, Ordering::Relaxed);
        ensure!(
            window <= widest,
            Unsupported,
            "sliding_window is {window}, but policies have evicted tokens in it; on a CUDA device it can be \
             at most {widest} now"
        );
        let (workspace, layout) = (&self.workspace, &self.workspace.layout);
        let params = Decode {
            q: query.address,
            o: output.address,
            lse: lse.map_or(0, |lse| lse.address),
            sinks: options.sinks,
            pages: workspace.address(blocks.table, layout.pages),
            items: workspace.address(blocks.table, 0),
            partials: workspace.partials(),
            tickets: workspace.tickets(),
            k: blocks.k,
            v: blocks.v,
            sealed_k: blocks.sealed[0],
            sealed_v: blocks.sealed[1],
            q_token: query.strides[0] as i64,
            q_head: query.strides[1] as i64,
            o_token: output.strides[0] as i64,
            o_head: output.strides[1] as i64,
            lse_token: lse.map_or(0, |lse| lse.strides[0] as i64),
            kv_block: blocks.block_stride,
            kv_head: blocks.head_stride,
            kv_token: shape.head_dim as i64,
            sealed_block: PAGE_BYTES as i64,
            sealed_head: blocks.sealed_head,
            scale: options.common.scale_for(shape.head_dim),
            softcap: options.common.softcap,
            window: options.common.sliding_window,
            group: shape.group() as u32,
            block_size: cache.config().block_size as u32,
            rotates: cache.rotates(),
            is_bf16: u32::from(self.dtype == DType::Bf16),
        };
        let _entered = self.gpu.enter()?;
        let notes = workspace.address(0, layout.notes);
        self.notes.launch(&self.gpu, layer, query, notes, params.scale)?;
        let [has_steps, has_prompts] = self.has;
        if has_steps {
            let kernel = self.decode.kernel(self.variant);
            self.gpu.launch(kernel, self.grid_of(self.variant), &params)?;
        }
        if has_prompts {
            let items = workspace.address(blocks.table, layout.prompts);
            self.gpu.launch(&self.prefill, self.prefill_grid(), &Decode { items, ..params })?;
        }
        Ok(())
    }

    /// Equal for two plans if a graph captured under one is right for the other.
    pub(super) fn graph_key(&self) -> u64 {
        let Variant { has_16_columns, is_wide } = self.variant;
        // A run in a window that tokens are missing in is refused, which a graph could not be.
        let window = self.window.load(Ordering::Relaxed);
        let is_narrow = self.widest.iter().any(|widest| *widest < window);
        let has_notes = self.notes.has_any();
        let bits = [has_16_columns, is_wide, self.has[0], self.has[1], is_narrow, has_notes];
        let launches = bits.into_iter().fold(0, |launches, bit| launches << 1 | u64::from(bit));
        u64::from(self.workspace.generation) << 38 | launches << 32 | self.num_tokens as u64
    }

    /// Where the rows of a layer are.
    fn blocks(&self, cache: &Cache, layer: usize) -> Blocks {
        let config = cache.config();
        let (shape, format) = (&config.shape, &cache.formats()[OPEN]);
        let (_, cell) = config.lane_width.locate(shape, layer, 0);
        let size = self.dtype.size();
        let sealed = &cache.formats()[cache.sealed_format()];
        let is_per_head = config.lane_width == LaneWidth::Head;
        let start = |format: &Format, side: Side| {
            cache.device_base() + format.range(cell, side).start as u64
        };
        let sealed_head = if is_per_head { 0 } else { sealed.key_bytes + sealed.value_bytes };
        let cell_stride = (format.key_bytes + format.value_bytes) / size;
        Blocks {
            k: start(format, Side::Key),
            v: start(format, Side::Value),
            sealed: [start(sealed, Side::Key), start(sealed, Side::Value)],
            sealed_head: sealed_head as i64,
            block_stride: (PAGE_BYTES / size) as i64,
            // Heads with a lane of their own are told apart by their pages.
            head_stride: if is_per_head { 0 } else { cell_stride as i64 },
            table: if self.items.len() == 1 { 0 } else { layer },
        }
    }
}

/// Addresses and strides, in elements, of the rows of a layer.
#[derive(Debug, Clone, Copy)]
struct Blocks {
    k: u64,
    v: u64,
    /// K and V of sealed blocks, and bytes from head to head there.
    sealed: [u64; 2],
    sealed_head: i64,
    block_stride: i64,
    head_stride: i64,
    table: usize,
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
fn lanes_of_table(config: &CacheConfig) -> usize {
    if config.lane_width == LaneWidth::Head { config.shape.num_kv_heads } else { 1 }
}
