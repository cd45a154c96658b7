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
//! There is one table for all layers, or one for each layer if their lanes differ; and one more for each layer
//! whose blocks the engine selects.

mod kernels;
mod notes;
mod quest;
mod schedule;
mod selected;
mod sums;
mod table;
mod workspace;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use self::kernels::{Decoders, Variant, is_prompt, load_prefill, prefill_rows, tile_of};
use self::notes::Notes;
use self::quest::Quest;
use self::selected::Selected;
use self::sums::Sums;
use self::table::{Builder, Table, lanes_of_table};
use self::workspace::{Capacity, Limits, NOTE_WORDS, Workspace};
use super::{DeviceOptions, check_shape};
use crate::cache::{Cache, Format, OPEN, PAGE_BYTES};
use crate::device::cuda::params::{Append, Decode};
use crate::device::cuda::{DeviceTensor, Gpu, Kernel};
use crate::dtype::DType;
use crate::error::{Error, Kind, Result, ensure};
use crate::quantizer::Side;
use crate::sequence::Sequence;
use crate::shape::{LaneWidth, ModelShape};

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
    sums: Sums,
    builder: Builder,
    /// One for all layers, or one for each.
    tables: Vec<Table>,
    /// The lists of blocks of each layer that the engine has given.
    selected: Vec<Selected>,
    /// The lists of blocks that selectors make.
    quest: Quest,
    limits: Limits,
    /// The kernel that the plan runs.
    variant: Variant,
    /// Whether there are decode steps, and prompts.
    has: [bool; 2],
    num_tokens: usize,
    /// The widest sliding window of a run of each layer so far.
    windows: Vec<AtomicU32>,
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
            sums: Sums::new(gpu, num_tables),
            builder: Builder::default(),
            tables: (0..num_tables).map(|_| Table::default()).collect(),
            selected: (0..config.shape.num_layers).map(|_| Selected::new(gpu)).collect(),
            quest: Quest::new(gpu),
            limits: Limits::default(),
            variant: Variant::default(),
            has: [false; 2],
            num_tokens: 0,
            windows: (0..config.shape.num_layers).map(|_| AtomicU32::new(0)).collect(),
        })
    }

    /// Fails while the stream is being captured into a graph.
    pub(super) fn check_not_capturing(&self, what: &str) -> Result<()> {
        let _entered = self.gpu.enter()?;
        self.gpu.ensure_not_capturing(what)
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
        let config = cache.config();
        let heads = config.shape.num_kv_heads;
        let grids = self.decode.kernels.iter().map(|(variant, _)| self.grid_of(*variant));
        let grid = grids.max().unwrap_or(1) as usize;
        let tiles = num_sequences + num_queries.div_ceil((16 / config.shape.group()).max(1));
        let lists = lanes_of_table(config);
        self.clear();
        // A cut adds an item, and a head that was cut has two parts more than it has whole shares.
        let capacity = Capacity {
            items: tiles * heads + 2 * grid,
            prompts: tiles * heads + self.prefill_grid() as usize,
            places: num_queries * lists,
            notes: num_queries,
            pages: num_blocks,
            slots: 2 * grid,
            tickets: grid,
        };
        self.workspace.reserve(&capacity)?;
        self.limits = Limits {
            num_sequences,
            num_queries,
            num_kv_heads: heads,
            num_blocks,
            heads_per_block: heads / lists,
            capacity,
        };
        Ok(())
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
        let is_wide = 2 * tiles < 3 * self.gpu.num_sms() as usize;
        self.variant = self.decode.choose(Variant { has_16_columns, is_wide });
        self.num_tokens = queries.sum();
        self.has = [false; 2];
        self.selected.iter_mut().for_each(Selected::clear);
        self.builder.group = group;
        self.builder.block_size = cache.config().block_size;
        self.builder.tiles = [tile, prefill_rows(cache.config().shape.head_dim) / group];
        self.builder.grids = [self.grid_of(self.variant), self.prefill_grid()];
        self.builder.unit = self.decode.rows(self.variant);
        self.notes.plan(&self.gpu, batch)?;
        let notes = self.notes.words.len() / NOTE_WORDS;
        let mut needed = Capacity { notes, ..Capacity::default() };
        for (i, table) in self.tables.iter_mut().enumerate() {
            table.make(cache, batch, i, &mut self.builder);
            let [has_steps, has_prompts] = self.builder.has();
            self.has = [self.has[0] | has_steps, self.has[1] | has_prompts];
            let places = Capacity { places: table.places.len() / 2, ..Capacity::default() };
            needed = needed.max(&table.lists.capacity()).max(&self.builder.partials()).max(&places);
        }
        let partials = self.quest.make(cache, batch, &self.tables, &mut self.builder)?;
        self.workspace.reserve(&needed.max(&partials))?;
        self.send_tables()?;
        self.quest.send(&self.limits)?;
        self.sums.plan(&self.gpu, cache, batch, &self.tables, &self.limits)
    }

    /// Queues the copy of the tables.
    fn send_tables(&mut self) -> Result<()> {
        let layout = self.workspace.layout;
        let (tables, notes) = (&self.tables, &self.notes.words);
        self.workspace.write(|words| {
            words[layout.notes..][..notes.len()].copy_from_slice(notes);
            for (words, table) in words.chunks_exact_mut(layout.words).zip(tables) {
                table.lists.put(words, &layout);
                words[layout.places..][..table.places.len()].copy_from_slice(&table.places);
            }
            tables.iter().map(|table| table.lists.pages.len()).max().unwrap_or(0)
        })
    }

    /// Restricts a layer of the plan to lists of blocks. See [`super::Attention::select`].
    pub(super) fn select(
        &mut self,
        cache: &Cache,
        layer: usize,
        num_queries: &dyn Fn(usize) -> usize,
        lists: Result<(&[u32], &[u32])>,
    ) -> Result<()> {
        self.selected[layer].clear();
        let _entered = self.gpu.enter()?;
        self.gpu.ensure_not_capturing("select")?;
        let lists = lists?;
        if lists.0.is_empty() {
            return Ok(()); // There is no plan, or one of nothing.
        }
        ensure!(
            !self.sums.has_any(),
            Unsupported,
            "policies ask for what queries give each row; on a CUDA device no blocks can be selected then"
        );
        let table = &self.tables[self.table_of(layer)];
        let heads = cache.config().shape.num_kv_heads;
        self.selected[layer].fill(table, heads, num_queries, lists, &mut self.builder)?;
        // Partial results are in the memory of the plan.
        let resent = match self.workspace.reserve(&self.builder.partials()) {
            Ok(false) => Ok(()),
            Ok(true) => self.send_tables(),
            Err(error) => Err(error),
        };
        if resent.is_err() {
            self.clear();
            return resent;
        }
        self.selected[layer].send(&self.limits)
    }

    /// Forgets the plan.
    pub(super) fn clear(&mut self) {
        (self.has, self.num_tokens) = ([false; 2], 0);
        self.selected.iter_mut().for_each(Selected::clear);
        self.quest.clear();
        self.sums.clear();
    }

    fn table_of(&self, layer: usize) -> usize {
        if self.tables.len() == 1 { 0 } else { layer }
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
        self.check_tensors(shape, query, output, lse)?;
        let blocks = self.blocks(cache, layer);
        let window = options.common.sliding_window;
        self.windows[layer].fetch_max(window, Ordering::Relaxed);
        let choice = self.choice(layer).filter(|_| window == 0);
        let (table, reason) = match choice {
            Some(choice) => (self.quest.reading(choice), ""),
            None => self.reading(layer),
        };
        ensure!(
            window <= table.widest,
            Unsupported,
            "sliding_window is {window}, but {reason} in it; on a CUDA device it can be at most {} now",
            table.widest
        );
        let workspace = &self.workspace;
        let params = Decode {
            q: query.address,
            o: output.address,
            lse: lse.map_or(0, |lse| lse.address),
            sinks: options.sinks,
            pages: table.pages,
            items: table.items,
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
        if let Some(choice) = choice {
            self.quest.launch(cache, layer, choice, query)?;
        }
        let params = match lse {
            None if self.sums.has_any() => {
                Decode { lse: self.sums.lse(), lse_token: shape.num_q_heads as i64, ..params }
            }
            _ => params,
        };
        let notes = workspace.address(0, workspace.layout.notes);
        self.notes.launch(&self.gpu, layer, query, notes, params.scale)?;
        self.launch(&table, choice.is_some(), &params)?;
        self.sums.launch(&self.gpu, layer, self.table_of(layer), &params)
    }

    /// Queues the kernels of both kinds of queries. The context is current.
    fn launch(&self, table: &Reading, is_chosen: bool, params: &Decode) -> Result<()> {
        let [has_steps, has_prompts] = table.has;
        if has_steps {
            let mut kernel = self.gpu.after_old_rows(self.decode.kernel(self.variant));
            if is_chosen {
                // It reads its list before it waits.
                kernel = kernel.after_previous();
            }
            self.gpu.launch(&kernel, self.grid_of(self.variant), params)?;
        }
        if has_prompts {
            let params = Decode { items: table.prompts, ..*params };
            self.gpu.launch(&self.prefill, self.prefill_grid(), &params)?;
        }
        Ok(())
    }

    fn check_tensors(
        &self,
        shape: &ModelShape,
        query: &DeviceTensor,
        output: &DeviceTensor,
        lse: Option<&DeviceTensor>,
    ) -> Result<()> {
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
        Ok(())
    }

    /// The table of choices of a layer; lists of the engine come before them. Sliding windows bound what is read
    /// already.
    fn choice(&self, layer: usize) -> Option<usize> {
        self.quest.route(layer).filter(|_| self.selected[layer].in_use().is_none())
    }

    /// The table that a layer goes by, and what may be missing there.
    fn reading(&self, layer: usize) -> (Reading, &'static str) {
        let (workspace, index, has, widest, reason) = match self.selected[layer].in_use() {
            Some(lists) => {
                let Selected { workspace, has, widest, .. } = lists;
                (workspace, 0, *has, *widest, "blocks are not selected")
            }
            None => {
                let index = self.table_of(layer);
                let widest = self.tables[index].widest;
                (&self.workspace, index, self.has, widest, "policies have evicted tokens")
            }
        };
        (Reading::new(workspace, index, has, widest), reason)
    }

    /// Equal for two plans if a graph captured under one is right for the other.
    pub(super) fn graph_key(&self) -> u64 {
        let Variant { has_16_columns, is_wide } = self.variant;
        let mut hasher = DefaultHasher::new();
        let (generation, notes) = (self.workspace.generation, self.notes.has_any());
        let sums = self.sums.has_any().then(|| self.sums.generation());
        (has_16_columns, is_wide, self.num_tokens, generation, notes, sums).hash(&mut hasher);
        // A run in a window that tokens are missing in is refused, which a graph could not be.
        for (layer, window) in self.windows.iter().enumerate() {
            let Reading { items, prompts, pages, has, widest } = self.reading(layer).0;
            let is_narrow = widest < window.load(Ordering::Relaxed);
            (items, prompts, pages, has, is_narrow, self.choice(layer)).hash(&mut hasher);
        }
        self.quest.hash(&mut hasher);
        hasher.finish()
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
            table: self.table_of(layer),
        }
    }
}

/// The addresses of a table, and what is in it.
#[derive(Debug, Clone, Copy)]
struct Reading {
    items: u64,
    prompts: u64,
    pages: u64,
    /// Whether there are decode steps, and prompts.
    has: [bool; 2],
    /// The widest sliding window that it allows.
    widest: u32,
}

impl Reading {
    fn new(workspace: &Workspace, index: usize, has: [bool; 2], widest: u32) -> Self {
        let layout = &workspace.layout;
        let at = |word| workspace.address(index, word);
        let [items, prompts, pages] = [0, layout.prompts, layout.pages].map(at);
        Self { items, prompts, pages, has, widest }
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
