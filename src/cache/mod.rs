//! The cache: blocks with memory behind them. The only writer of block bytes.
//!
//! One reader-writer lock guards the pool, the memory and the table from block to bytes. It is taken
//! for batches of blocks, never for a token: a sequence keeps views of its blocks and reads and
//! writes through them without it. Prefix lookups and retains share it.

mod bounds;
mod config;
mod device;
mod format;
pub mod rows;
mod seal;
mod slab;
mod states;
mod transfer;
mod view;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock, RwLockWriteGuard};

pub use bounds::BoundsLayout;
pub use config::{CacheConfig, DeviceConfig, Exact, LowRank, MemoryFormats};
pub use device::PAGE_BYTES;
pub use format::Format;
pub use states::{DEFAULT_SNAPSHOTS, RecurrentConfig, RecurrentState, StateStats};
pub use transfer::{HostBlock, RowMove};
pub use view::BlockView;

use self::slab::Slab;
use self::states::States;
use crate::block::prefix::{self, Digest};
use crate::block::{BlockId, BlockPool, EntryId, Released};
use crate::device::cuda::DeviceMemory;
use crate::error::{Result, bail, ensure};
use crate::evictor;
use crate::quantizer::basis::{Bases, Basis};
use crate::quantizer::{self, Quantizer, Side};
use crate::shape::ModelShape;

/// Index of the open format in [`Cache::formats`].
pub const OPEN: usize = 0;

/// Takes the bytes of prefix entries that are about to be reclaimed. Called without any lock.
pub trait Offload: std::fmt::Debug + Send + Sync {
    /// `blocks` holds the bytes of the entry's block in every lane, in lane order.
    fn offload(&self, digest: &Digest, blocks: &[&[u8]]);
    /// `bytes` are those of the state after the last token of the entry.
    fn offload_state(&self, digest: &Digest, bytes: &[u8]);
}

/// A block that a sequence refers to: its name and its bytes.
#[derive(Debug, Clone, Copy)]
pub struct Block {
    /// The name.
    pub id: BlockId,
    /// The bytes; empty in a cache without memory.
    pub view: BlockView,
}

/// Blocks with memory, shared by every sequence made from it. Any thread.
#[derive(Debug)]
pub struct Cache {
    config: CacheConfig,
    formats: Vec<Format>,
    sealed: usize,
    root: Digest,
    offload: Mutex<Option<Arc<dyn Offload>>>,
    /// The memory of the blocks, if it is on a device.
    device: Option<Arc<DeviceMemory>>,
    /// What seals blocks on the device, if sealed ones are not raw.
    sealer: Option<device::Sealer>,
    /// What reads and moves rows on the device, once somebody has.
    transfers: Mutex<Option<transfer::Transfers>>,
    /// Of keys on the device, once somebody chooses blocks by them.
    bounds: OnceLock<bounds::Bounds>,
    state: RwLock<State>,
    /// Of recurrent layers. Its lock is taken last.
    states: Option<Mutex<States>>,
    /// Counters that sequences add to.
    pub counters: Counters,
}

/// Monotonic counters.
#[derive(Debug, Default)]
pub struct Counters {
    /// Tokens committed, over all sequences.
    pub tokens_appended: AtomicU64,
    /// (layer, head) rows that policies evicted.
    pub tokens_evicted: AtomicU64,
    /// Tokens asked for in prefix matches.
    pub prefix_query_tokens: AtomicU64,
    /// Tokens found in prefix matches.
    pub prefix_hit_tokens: AtomicU64,
    /// Live sequences.
    pub num_sequences: AtomicU64,
}

#[derive(Debug)]
struct State {
    pool: BlockPool,
    slab: Option<Slab>,
    views: Vec<BlockView>,
    idle_bytes: AtomicUsize,
    peak_bytes: AtomicUsize,
}

/// The quantizers of these names for the keys and values of a model.
fn make_sides(
    shape: &ModelShape,
    key: &str,
    value: &str,
) -> Result<(Arc<dyn Quantizer>, Arc<dyn Quantizer>)> {
    let own = quantizer::create(key, Side::Key)?;
    let value_side = quantizer::create(value, Side::Value)?;
    if shape.stores_values() {
        return Ok((own, value_side));
    }
    ensure!(
        key == value,
        Unsupported,
        "values are the first elements of keys, which are {key}; they cannot be {value}"
    );
    Ok((own.clone(), own))
}

/// A snapshot of what a cache holds. Bytes are bytes of blocks, as allocated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Blocks in the pool.
    pub num_blocks: u64,
    /// Blocks nobody refers to.
    pub free_blocks: u64,
    /// Blocks that sequences refer to.
    pub used_blocks: u64,
    /// Blocks that only the prefix index refers to.
    pub idle_blocks: u64,
    /// Prefix entries.
    pub prefix_entries: u64,
    /// Bytes that sequences refer to.
    pub bytes_used: u64,
    /// Bytes that only the prefix index refers to.
    pub bytes_idle: u64,
    /// Bytes of memory taken from the system.
    pub bytes_committed: u64,
    /// Largest `bytes_used` since creation or the last reset.
    pub bytes_peak: u64,
    /// Prefix entries reclaimed since creation.
    pub evictions: u64,
    /// States of recurrent layers, which the bytes above do not count.
    pub states: StateStats,
}

impl Cache {
    /// Reserves everything the configuration asks for.
    pub fn new(config: CacheConfig) -> Result<Arc<Self>> {
        config.validate()?;
        if config.device.is_some() {
            device::check(&config)?;
        }
        let (formats, sealed) = Self::make_formats(&config)?;
        let sealer = device::Sealer::load(&config, &formats)?;
        let num_blocks = config.num_blocks;
        let evictor = evictor::create(&config.evictor, num_blocks)?;
        let limit = match (config.memory_limit, formats.first()) {
            (0, Some(open)) => num_blocks.saturating_mul(open.block_bytes),
            (limit, _) => limit,
        };
        let device = device::memory(&config, limit)?;
        let sizes: Vec<usize> = formats.iter().map(|format| format.block_bytes).collect();
        let slab = match &device {
            _ if sizes.is_empty() => None,
            Some(memory) => Some(Slab::on_device(&sizes, memory.clone())?),
            None => Some(Slab::new(&sizes, limit)?),
        };
        let state = State {
            pool: BlockPool::new(num_blocks, evictor),
            slab,
            views: vec![BlockView::none(); num_blocks],
            idle_bytes: AtomicUsize::new(0),
            peak_bytes: AtomicUsize::new(0),
        };
        let states = States::new(&config)?.map(Mutex::new);
        let root = prefix::root(
            config.block_size,
            config.salt,
            config.scope(&formats[..formats.len().min(sealed + 1)]).as_bytes(),
        );
        Ok(Arc::new(Self {
            config,
            formats,
            sealed,
            root,
            offload: Mutex::new(None),
            device,
            sealer,
            transfers: Mutex::default(),
            bounds: OnceLock::new(),
            state: RwLock::new(state),
            states,
            counters: Counters::default(),
        }))
    }

    /// The open format, then the sealed one unless it is the same, then those of demoted rows; and
    /// which is the sealed one.
    fn make_formats(config: &CacheConfig) -> Result<(Vec<Format>, usize)> {
        let Some(memory) = &config.memory else {
            return Ok((Vec::new(), OPEN));
        };
        let shape = &config.shape;
        let sizes = (config.lane_width.cells(shape), config.block_size);
        let alignment = if config.device.is_some() { PAGE_BYTES } else { 64 };
        let make = |key: &str, value: &str, ranks| {
            let (key, value) = make_sides(shape, key, value)?;
            Format::new(key, value, shape, ranks, sizes, alignment)
        };
        let whole = [None; 2];
        let mut formats = vec![make(memory.open.name(), memory.open.name(), whole)?];
        let mut index_of = |format: Format| {
            let found = formats.iter().position(|other| other.spec() == format.spec());
            found.unwrap_or_else(|| {
                formats.push(format);
                formats.len() - 1
            })
        };
        let sealed = make(&memory.key, &memory.value, memory.low_rank.ranks)?;
        let limit = sealed.block_bytes;
        let sealed = index_of(sealed);
        for [key, value] in &memory.demoted {
            let format = make(key, value, whole);
            let format = format.map_err(|error| error.within("demoted rows"))?;
            let bytes = format.block_bytes;
            ensure!(
                bytes <= limit,
                InvalidArgument,
                "blocks of demoted rows have {bytes} bytes, more than the {limit} of others"
            );
            index_of(format);
        }
        Ok((formats, sealed))
    }

    /// The index of the format of these quantizers, if blocks can have it.
    pub fn find_format(&self, key: &str, value: &str) -> Result<Option<usize>> {
        let (key, value) = make_sides(&self.config.shape, key, value)?;
        let spec = (key.spec(), value.spec());
        Ok(self.formats.iter().position(|format| format.spec() == spec))
    }

    /// What the cache was made from.
    pub fn config(&self) -> &CacheConfig {
        &self.config
    }

    /// Every format a block can be in; [`OPEN`] is the first. Empty without memory.
    pub fn formats(&self) -> &[Format] {
        &self.formats
    }

    /// Index of the format that full blocks are sealed in.
    pub fn sealed_format(&self) -> usize {
        self.sealed
    }

    /// What is kept of sealed blocks as coordinates, if anything is.
    pub fn low_rank(&self) -> Option<&LowRank> {
        let memory = self.config.memory.as_ref()?;
        (!memory.low_rank.is_none()).then_some(&memory.low_rank)
    }

    /// Which of `bases` rows of one side of a head, counted over layers, are coordinates in, in blocks of
    /// `format`; `None` for whole rows.
    pub fn basis<'a>(
        &self,
        bases: Option<&'a Bases>,
        head: usize,
        side: Side,
        format: usize,
    ) -> Option<&'a Basis> {
        bases.filter(|_| self.formats[format].is_low_rank)?.get(head, side)
    }

    /// Index of the format that a full block of `lane` is sealed in whose first row has `position`.
    pub fn format_of(&self, lane: usize, position: i32) -> usize {
        let is_first = i64::from(position) < self.config.exact().first as i64;
        if is_first || self.config.skips(lane) { OPEN } else { self.sealed }
    }

    /// Whether blocks of `lane` stay in the open format because of their layer.
    pub fn skips(&self, lane: usize) -> bool {
        self.config.skips(lane)
    }

    /// The digest of the empty prefix.
    pub fn root(&self) -> &Digest {
        &self.root
    }

    /// Where the bytes of reclaimed prefix entries go.
    pub fn set_offload(&self, offload: Option<Arc<dyn Offload>>) {
        *self.offload.lock() = offload;
    }

    /// Appends `n` blocks in `format` to `out`, or none. Reclaims idle prefix entries if needed.
    pub fn allocate(&self, n: usize, format: usize, out: &mut Vec<Block>) -> Result<()> {
        if n == 0 {
            return Ok(());
        }
        let mut ids = Vec::with_capacity(n);
        let mut state = self.reclaim(n, format)?;
        state.pool.allocate(n, &mut ids)?;
        let start = out.len();
        for id in ids {
            let view = match &mut state.slab {
                None => Some(BlockView::none()),
                Some(slab) => slab.allocate(format),
            };
            let Some(view) = view else {
                state.pool.release(id);
                for block in out.drain(start..) {
                    state.release(block.id);
                }
                bail!(OutOfMemory, "no address space is left for a block of format {format}");
            };
            state.views[id.0 as usize] = view;
            self.forget_bounds(id);
            out.push(Block { id, view });
        }
        state.note_peak();
        Ok(())
    }

    /// Appends one block in each of `formats` to `out`, or none.
    pub fn allocate_each(&self, formats: &[usize], out: &mut Vec<Block>) -> Result<()> {
        let start = out.len();
        for run in formats.chunk_by(|a, b| a == b) {
            if let Err(error) = self.allocate(run.len(), run[0], out) {
                self.release(out.drain(start..).map(|block| block.id), std::iter::empty());
                return Err(error);
            }
        }
        Ok(())
    }

    /// Reclaims idle entries until `n` blocks of `format` can be allocated under the lock that it
    /// returns. Their bytes are offloaded without the lock.
    fn reclaim(&self, n: usize, format: usize) -> Result<RwLockWriteGuard<'_, State>> {
        loop {
            let mut state = self.state.write();
            let has_blocks = state.pool.num_free() >= n;
            if has_blocks && state.slab.as_ref().is_none_or(|slab| slab.fits(format, n)) {
                return Ok(state);
            }
            let Some((digest, blocks)) = state.pool.begin_eviction() else {
                let free = state.pool.num_free();
                ensure!(
                    has_blocks,
                    OutOfBlocks,
                    "need {n} blocks, {free} of {} are free and none is idle",
                    state.pool.num_blocks()
                );
                bail!(OutOfBlocks, "{n} more blocks would exceed the memory limit");
            };
            let views: Vec<_> = blocks.iter().map(|id| state.views[id.0 as usize]).collect();
            drop(state);
            if let Some(head) = blocks.first() {
                self.drop_kept(*head, &digest);
            }
            let offload = self.offload.lock().clone();
            if let Some(offload) = offload {
                // What cannot be fetched from a device is lost, as it would be without a store.
                let bytes: Result<Vec<_>> =
                    views.iter().map(|view| self.stored_bytes(view)).collect();
                if let Ok(bytes) = bytes {
                    offload
                        .offload(&digest, &bytes.iter().map(|bytes| &**bytes).collect::<Vec<_>>());
                }
            }
            self.state.write().finish_eviction(&blocks);
        }
    }

    /// Adds a reference to each block.
    pub fn retain(&self, ids: impl IntoIterator<Item = BlockId>) {
        let state = self.state.read();
        for id in ids {
            let was_idle = state.pool.retain(id);
            state.count_hold(id, was_idle);
        }
        state.note_peak();
    }

    /// Drops a reference to each block and a hold on each entry, both last first.
    pub fn release(
        &self,
        ids: impl DoubleEndedIterator<Item = BlockId>,
        entries: impl DoubleEndedIterator<Item = EntryId>,
    ) {
        let mut state = self.state.write();
        entries.rev().for_each(|entry| state.pool.unhold(entry));
        ids.rev().for_each(|id| state.release(id));
    }

    /// Adds a hold on each entry; a fork shares its parent's.
    pub fn hold(&self, entries: impl IntoIterator<Item = EntryId>) {
        let mut state = self.state.write();
        let mut held = Vec::new();
        for entry in entries {
            held.clear();
            state.pool.hold(entry, &mut held);
            // The fork refers to the blocks through its own lanes already.
            for (id, was_idle) in &held {
                state.count_hold(*id, *was_idle);
                state.release(*id);
            }
        }
    }

    /// Whether anybody else refers to `block`.
    pub fn is_shared(&self, block: BlockId) -> bool {
        self.state.read().pool.refs(block) > 1
    }

    /// Gives `block`, which nobody else refers to, other bytes in the format `format`; `fill`
    /// writes them while the old ones can still be read. `None`, and no change, if the block is
    /// shared or no memory is left.
    pub fn replace(
        &self,
        block: Block,
        format: usize,
        fill: impl FnOnce(&BlockView),
    ) -> Option<BlockView> {
        let target = {
            let mut state = self.state.write();
            if state.pool.refs(block.id) > 1 {
                return None;
            }
            state.slab.as_mut()?.allocate(format)?
        };
        fill(&target);
        let mut state = self.state.write();
        state.views[block.id.0 as usize] = target;
        if let Some(slab) = &mut state.slab {
            slab.free(block.view);
        }
        state.note_peak();
        Some(target)
    }

    /// Makes one block for each lane the entry for `digest`. See [`BlockPool::register`].
    pub fn register(&self, digest: &Digest, blocks: &[BlockId]) -> Option<EntryId> {
        self.state.write().pool.register(digest, blocks)
    }

    /// Finds the entry for `digest` and holds it: its blocks, in lane order, are appended to `out`
    /// with a reference each.
    pub fn find(&self, digest: &Digest, out: &mut Vec<Block>) -> Option<EntryId> {
        let state = self.state.read();
        let entry = state.pool.lookup(digest)?;
        let mut held = Vec::with_capacity(self.config.num_lanes());
        state.pool.hold(entry, &mut held);
        for (id, was_idle) in held {
            state.count_hold(id, was_idle);
            out.push(Block { id, view: state.views[id.0 as usize] });
        }
        state.note_peak();
        Some(entry)
    }

    /// What the cache holds now.
    pub fn stats(&self) -> CacheStats {
        let state = self.state.read();
        let (pool, slab) = (&state.pool, state.slab.as_ref());
        let (blocks, free, idle) = (pool.num_blocks(), pool.num_free(), pool.num_idle());
        CacheStats {
            num_blocks: blocks as u64,
            free_blocks: free as u64,
            used_blocks: (blocks - free - idle) as u64,
            idle_blocks: idle as u64,
            prefix_entries: pool.num_entries() as u64,
            bytes_used: state.used_bytes() as u64,
            bytes_idle: state.idle_bytes.load(Ordering::Relaxed) as u64,
            bytes_committed: slab.map_or(0, |slab| slab.committed_bytes() as u64),
            bytes_peak: state.peak_bytes.load(Ordering::Relaxed) as u64,
            evictions: pool.evictions(),
            states: self.state_stats(),
        }
    }

    /// Starts a new peak at what is used now.
    pub fn reset_peak(&self) {
        let state = self.state.write();
        state.peak_bytes.store(state.used_bytes(), Ordering::Relaxed);
        self.reset_state_peak();
    }

    /// Checks every invariant of the pool and its memory; for tests and debugging. O(blocks).
    pub fn check_integrity(&self) {
        let state = self.state.read();
        state.pool.check_integrity();
        self.check_states(|digest| state.pool.lookup(digest).map(|entry| entry.0));
        let Some(slab) = &state.slab else { return };
        let referred = |(id, _): &(usize, &BlockView)| state.pool.refs(BlockId(*id as u32)) > 0;
        let bytes = state.views.iter().enumerate().filter(referred).map(|(_, view)| view.len());
        assert_eq!(bytes.sum::<usize>(), slab.used_bytes(), "blocks and memory disagree");
    }

    /// Adds to a counter.
    pub fn count(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }
}

impl State {
    fn used_bytes(&self) -> usize {
        self.slab.as_ref().map_or(0, Slab::used_bytes) - self.idle_bytes.load(Ordering::Relaxed)
    }

    fn note_peak(&self) {
        self.peak_bytes.fetch_max(self.used_bytes(), Ordering::Relaxed);
    }

    fn count_hold(&self, id: BlockId, was_idle: bool) {
        if was_idle {
            let bytes = self.views[id.0 as usize].len();
            self.idle_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    fn release(&mut self, id: BlockId) {
        match self.pool.release(id) {
            Released::Used => {}
            Released::Idle => *self.idle_bytes.get_mut() += self.views[id.0 as usize].len(),
            Released::Freed => self.free_bytes(id),
        }
    }

    fn finish_eviction(&mut self, blocks: &[BlockId]) {
        for id in blocks {
            if self.pool.finish_eviction(*id) {
                *self.idle_bytes.get_mut() -= self.views[id.0 as usize].len();
                self.free_bytes(*id);
            }
        }
    }

    fn free_bytes(&mut self, id: BlockId) {
        let view = std::mem::replace(&mut self.views[id.0 as usize], BlockView::none());
        if let Some(slab) = &mut self.slab
            && !view.is_empty()
        {
            slab.free(view);
        }
    }
}
