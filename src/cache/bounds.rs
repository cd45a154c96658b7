//! Bounds of the keys of full blocks on a device, for policies that choose blocks by them (`quest`):
//! `[high, low][head_dim]` in f16 for each cell, in device memory beside the blocks.
//!
//! ```text
//! open block --sealed, or first asked for--> bounds, by the number of the block
//! ```
//!
//! A block keeps them as long as somebody refers to it, so forks and prefixes share them. They are made of open
//! rows, before these are encoded. Blocks that are encoded already, because they come from a store or were
//! sealed before anybody chose by bounds, are decoded by the host, which waits for the device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Block, BlockView, Cache, OPEN};
use crate::block::BlockId;
use crate::device::cuda::params::QuestBounds;
use crate::device::cuda::{DeviceMemory, Gpu, Kernel};
use crate::error::Result;
use crate::quantizer::Side;
use crate::selector::extremes;
use crate::simd;

/// Threads of the kernel, whose warps do a cell each.
const THREADS: usize = 256;

/// The bounds of all blocks.
#[derive(Debug)]
pub(super) struct Bounds {
    memory: DeviceMemory,
    kernel: Kernel,
    /// Whether a block has them, by its number.
    known: Box<[AtomicBool]>,
}

/// Where bounds are, in bytes and elements.
#[derive(Debug, Clone, Copy)]
pub struct BoundsLayout {
    /// The device address of those of block 0, cell 0.
    pub base: u64,
    /// Elements from block to block, by their numbers.
    pub block: usize,
    /// Elements from cell to cell.
    pub cell: usize,
}

impl Bounds {
    fn new(cache: &Cache, gpu: &Arc<Gpu>) -> Result<Self> {
        let num_blocks = cache.config().num_blocks;
        let bytes = num_blocks.saturating_mul(cache.bounds_of_block() * 2);
        let memory = DeviceMemory::allocate(gpu, bytes);
        let open = cache.formats()[OPEN].key.spec();
        let kernel = gpu.kernel(&format!("kvm_quest_bounds_{open}"), THREADS as u32, 0)?;
        let known = (0..num_blocks).map(|_| AtomicBool::new(false)).collect();
        Ok(Self { memory: memory.map_err(|error| error.within("bounds of keys"))?, kernel, known })
    }

    /// Forgets what a block held, because it is going to hold something else.
    fn forget(&self, block: BlockId) {
        self.known[block.0 as usize].store(false, Ordering::Release);
    }
}

impl Cache {
    /// Forgets the bounds of a block, because some of its rows are going to be written again.
    pub fn forget_bounds(&self, block: BlockId) {
        self.bounds.get().iter().for_each(|bounds| bounds.forget(block));
    }

    /// From now on blocks on a device have bounds. The first time it takes memory for those of all.
    pub fn keep_bounds(&self) -> Result<()> {
        let is_due = self.bounds.get().is_none() && !self.formats().is_empty();
        let Some(gpu) = self.gpu().filter(|_| is_due) else { return Ok(()) };
        let _entered = gpu.enter()?;
        gpu.ensure_not_capturing("create a sequence that chooses blocks")?;
        // Who comes second drops what it has made.
        _ = self.bounds.set(Bounds::new(self, gpu)?);
        Ok(())
    }

    /// Where bounds are; `None` if nobody has asked for them.
    pub fn bounds(&self) -> Option<BoundsLayout> {
        let base = self.bounds.get()?.memory.address();
        let cell = 2 * self.config().shape.head_dim;
        Some(BoundsLayout { base, block: self.bounds_of_block(), cell })
    }

    /// Makes the bounds of those of `blocks`, full and sealed, that have none. The context is current.
    pub fn ensure_bounds(&self, blocks: impl Iterator<Item = Block>) -> Result<()> {
        let Some(bounds) = self.bounds.get() else { return Ok(()) };
        let is_new = |block: &Block| !bounds.known[block.id.0 as usize].load(Ordering::Acquire);
        let mut new: Vec<Block> = blocks.filter(is_new).collect();
        if new.is_empty() {
            return Ok(());
        }
        new.sort_unstable_by_key(|block| (block.view.format() != OPEN, block.id.0));
        new.dedup_by_key(|block| block.id.0);
        let num_open = new.partition_point(|block| block.view.format() == OPEN);
        let (open, encoded) = new.split_at(num_open);
        self.queue_bounds(open.iter().map(|block| (block.id, &block.view)))?;
        self.bound_encoded(bounds, encoded)
    }

    /// Queues the kernels that make bounds of full open blocks, if anybody asks for bounds. The context is
    /// current.
    pub(super) fn queue_bounds<'a>(
        &self,
        blocks: impl Iterator<Item = (BlockId, &'a BlockView)>,
    ) -> Result<()> {
        let (Some(bounds), Some(gpu)) = (self.bounds.get(), self.gpu()) else { return Ok(()) };
        let (config, open) = (self.config(), &self.formats()[OPEN]);
        let num_cells = config.lane_width.cells(&config.shape) as u32;
        let mut params = QuestBounds {
            k: self.device_base() + open.range(0, Side::Key).start as u64,
            bounds: bounds.memory.address(),
            cell: ((open.key_bytes + open.value_bytes) / 2) as i64,
            num_blocks: 0,
            num_cells,
            block_size: config.block_size as u32,
            dim: config.shape.head_dim as u32,
            blocks: [[0; 2]; QuestBounds::BLOCKS],
        };
        let mut blocks = blocks.peekable();
        while blocks.peek().is_some() {
            params.num_blocks = 0;
            for (to, (id, view)) in params.blocks.iter_mut().zip(&mut blocks) {
                *to = [self.page(view), id.0];
                params.num_blocks += 1;
            }
            let most = gpu.num_sms() * bounds.kernel.ctas_per_sm;
            let ctas = (params.num_blocks * num_cells).div_ceil(THREADS as u32 / 32);
            gpu.launch(&bounds.kernel, ctas.min(most), &params)?;
            for [_, id] in &params.blocks[..params.num_blocks as usize] {
                bounds.known[*id as usize].store(true, Ordering::Release);
            }
        }
        Ok(())
    }

    /// Makes bounds of encoded blocks on the host.
    fn bound_encoded(&self, bounds: &Bounds, blocks: &[Block]) -> Result<()> {
        let dim = self.config().shape.head_dim;
        let num_cells = self.config().lane_width.cells(&self.config().shape);
        for blocks in blocks.chunks(64).flat_map(|blocks| blocks.chunk_by(is_alike)) {
            let views: Vec<BlockView> = blocks.iter().map(|block| block.view).collect();
            let format = views[0].format();
            let mut bytes = vec![vec![0; self.bounds_of_block() * 2]; blocks.len()];
            let mut rows = vec![0.0; self.config().block_size * dim];
            let mut highs_lows = vec![0.0; 2 * dim];
            for cell in 0..num_cells {
                let sides = self.fetch_sides(&views, cell, Side::Key)?;
                let of_block = sides.chunks_exact(sides.len() / blocks.len());
                for (bytes, side) in bytes.iter_mut().zip(of_block) {
                    let all = 0..self.config().block_size;
                    self.decode_side(format, Side::Key, side, all, &mut rows);
                    extremes(&rows, &mut highs_lows);
                    let range = cell * 4 * dim..(cell + 1) * 4 * dim;
                    simd::active().encode_f16(&highs_lows, &mut bytes[range]);
                }
            }
            for (block, bytes) in blocks.iter().zip(&bytes) {
                let at = block.id.0 as u64 * bytes.len() as u64;
                bounds.memory.write(bounds.memory.address() + at, bytes)?;
                bounds.known[block.id.0 as usize].store(true, Ordering::Release);
            }
        }
        Ok(())
    }

    /// Elements of the bounds of a block.
    fn bounds_of_block(&self) -> usize {
        let shape = &self.config().shape;
        self.config().lane_width.cells(shape) * 2 * shape.head_dim
    }
}

fn is_alike(a: &Block, b: &Block) -> bool {
    a.view.format() == b.view.format()
}
