//! What policies do with blocks on a device: the host reads rows of heads, and survivors move to other
//! blocks. Every call waits for what is queued.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use super::device::address;
use super::{BlockView, Cache, OPEN, PAGE_BYTES};
use crate::device::cuda::params::{CopyBlocks, MoveRows};
use crate::device::cuda::{DeviceMemory, Gpu, Kernel};
use crate::device::host::Arena;
use crate::device::layout::SideLayout;
use crate::error::Result;
use crate::quantizer::{Cell, Side};

/// Bytes of rows that the host gets at a time.
const ROW_BYTES: usize = 4 << 20;

/// Bytes of a list of what is copied or moved.
const LIST_BYTES: usize = 1 << 20;

/// Threads of a CTA of the kernels of `kernels/blocks.cu`.
const THREADS: u32 = 256;

/// A block in host memory with the layout that blocks have there.
#[derive(Debug)]
pub struct HostBlock {
    view: BlockView,
    /// Where the view looks.
    _memory: Arena,
}

impl HostBlock {
    /// The block, while this lives.
    pub fn view(&self) -> &BlockView {
        &self.view
    }
}

/// A row of all cells of an open block becomes a row of another.
#[derive(Debug, Clone, Copy)]
pub struct RowMove {
    /// The block and its row.
    pub from: (BlockView, u32),
    /// The block that nobody else sees yet, and its row.
    pub to: (BlockView, u32),
}

/// Kernels, and device memory for their lists and for rows on their way to the host.
#[derive(Debug)]
pub(super) struct Transfers {
    memory: DeviceMemory,
    copy_blocks: Kernel,
    move_rows: Kernel,
}

impl Transfers {
    fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        Ok(Self {
            memory: DeviceMemory::allocate(gpu, LIST_BYTES + ROW_BYTES)?,
            copy_blocks: gpu.kernel("kvm_copy_blocks", THREADS, 0)?,
            move_rows: gpu.kernel("kvm_move_rows", THREADS, 0)?,
        })
    }

    fn grid(&self) -> u32 {
        self.memory.gpu().num_sms() * self.copy_blocks.ctas_per_sm
    }

    /// The address of the rows.
    fn rows(&self) -> u64 {
        self.memory.address() + LIST_BYTES as u64
    }

    /// Collects pieces of memory of as many bytes each. The context is current.
    fn collect(&self, addresses: &[u64], bytes: usize, out: &mut [u8]) -> Result<()> {
        let most = ROW_BYTES.min(LIST_BYTES / 16 * bytes) / bytes;
        for (addresses, out) in addresses.chunks(most).zip(out.chunks_mut(most * bytes)) {
            let targets = (self.rows()..).step_by(bytes);
            let pairs = addresses.iter().zip(targets).flat_map(|(from, to)| [*from, to]);
            let list: Vec<u8> = pairs.flat_map(u64::to_le_bytes).collect();
            self.memory.write(self.memory.address(), &list)?;
            let (copies, num_copies) = (self.memory.address(), addresses.len() as u32);
            let params = CopyBlocks { copies, bytes: bytes as u64, num_copies };
            self.memory.gpu().launch(&self.copy_blocks, self.grid(), &params)?;
            self.memory.read(self.rows(), out)?;
        }
        Ok(())
    }
}

impl Cache {
    /// Runs `body` with what moves rows on the device, which is made when it is first needed. The cache is on
    /// a device.
    fn with_transfers<T>(
        &self,
        gpu: &Arc<Gpu>,
        body: impl FnOnce(&Transfers) -> Result<T>,
    ) -> Result<T> {
        let _entered = gpu.enter()?;
        gpu.ensure_not_capturing("run policies")?;
        let mut transfers = self.transfers.lock();
        match &*transfers {
            Some(transfers) => body(transfers),
            None => body(transfers.insert(Transfers::new(gpu)?)),
        }
    }

    /// One side of a cell of blocks on a device, as bytes of the host, one after the other.
    pub fn fetch_sides(&self, views: &[BlockView], cell: usize, side: Side) -> Result<Vec<u8>> {
        let Some(gpu) = self.gpu() else { return Ok(Vec::new()) };
        let range = |view: &BlockView| self.formats()[view.format()].range(cell, side);
        let mut bytes = vec![0; views.iter().map(|view| range(view).len()).sum()];
        self.with_transfers(gpu, |transfers| {
            let mut rest = &mut bytes[..];
            for views in views.chunk_by(|a, b| a.format() == b.format()) {
                let Range { start, end } = range(&views[0]);
                let (sides, after) = rest.split_at_mut(views.len() * (end - start));
                let at = |view: &BlockView| address(view) + start as u64;
                let addresses: Vec<u64> = views.iter().map(at).collect();
                transfers.collect(&addresses, end - start, sides)?;
                if let Some(layouts) = self.layouts_of(views[0].format()) {
                    let layout = &layouts[usize::from(side == Side::Value)];
                    for host in sides.chunks_exact_mut(end - start) {
                        let device = host.to_vec();
                        layout.to_host(&device, host);
                    }
                }
                rest = after;
            }
            Ok(())
        })?;
        Ok(bytes)
    }

    /// Decodes rows of a side of a cell of a block in format `format` from its bytes.
    pub fn decode_side(
        &self,
        format: usize,
        side: Side,
        bytes: &[u8],
        rows: Range<usize>,
        out: &mut [f32],
    ) {
        let format = &self.formats()[format];
        let cell = Cell { bytes, tokens: format.tokens, dim: format.dim(side), rows, ahead: &[] };
        format.side(side).decode(&cell, out);
    }

    /// A block in host memory to write; its bytes are 0.
    pub fn host_block(&self, format: usize) -> Result<HostBlock> {
        let bytes = self.formats()[format].block_bytes;
        let memory = Arena::reserve(bytes)?;
        let view = BlockView::new(memory.address(0), bytes, format as u8);
        Ok(HostBlock { view, _memory: memory })
    }

    /// A copy of a block on a device.
    pub fn fetch_block(&self, view: &BlockView) -> Result<HostBlock> {
        let block = self.host_block(view.format())?;
        block.view.write(0..view.len()).copy_from_slice(&self.stored_bytes(view)?);
        Ok(block)
    }

    /// Copies a block of the host to one on a device that nobody else sees yet.
    pub fn store_block(&self, block: &HostBlock, view: &BlockView) -> Result<()> {
        self.fill_stored(view, block.view.bytes())
    }

    /// The bytes of a block as a store has them, wherever the block is: in the layout of the host. From a device
    /// they are fetched, which waits for all queued work.
    pub fn stored_bytes<'a>(&self, view: &'a BlockView) -> Result<Cow<'a, [u8]>> {
        let mut bytes = self.block_bytes(view)?;
        if let Some(layouts) = self.layouts_of(view.format()) {
            let device = bytes.clone();
            let host = bytes.to_mut();
            self.for_sides(view.format(), |range, side| {
                layouts[side].to_host(&device[range.clone()], &mut host[range]);
            });
        }
        Ok(bytes)
    }

    /// Writes such bytes into a block that nobody else sees yet.
    pub fn fill_stored(&self, view: &BlockView, bytes: &[u8]) -> Result<()> {
        self.fill_block(view, &mut |target| {
            target.copy_from_slice(bytes);
            if let Some(layouts) = self.layouts_of(view.format()) {
                self.for_sides(view.format(), |range, side| {
                    layouts[side].to_device(&bytes[range.clone()], &mut target[range]);
                });
            }
            Ok(())
        })
    }

    /// Moves rows between open blocks on a device.
    pub fn move_rows(&self, moves: &[RowMove]) -> Result<()> {
        let Some(gpu) = self.gpu().filter(|_| !moves.is_empty()) else { return Ok(()) };
        let (config, format) = (self.config(), &self.formats()[OPEN]);
        let (cells, dim) = (config.lane_width.cells(&config.shape), config.shape.head_dim);
        let start = |side| self.device_base() + format.range(0, side).start as u64;
        // The kernel counts its pieces in 32 bits.
        let most = (LIST_BYTES / 20).min(u32::MAX as usize / (cells * dim)).max(1);
        self.with_transfers(gpu, |transfers| {
            for moves in moves.chunks(most) {
                let words = moves.iter().flat_map(|RowMove { from, to }| {
                    [self.page(&from.0), from.1, self.page(&to.0), to.1, 0]
                });
                let list: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
                transfers.memory.write(transfers.memory.address(), &list)?;
                let params = MoveRows {
                    k: start(Side::Key),
                    v: start(Side::Value),
                    moves: transfers.memory.address(),
                    kv_block: PAGE_BYTES as i64 / 2,
                    kv_head: (format.key_bytes + format.value_bytes) as i64 / 2,
                    kv_token: dim as i64,
                    num_moves: moves.len() as u32,
                    num_heads: cells as u32,
                    dim: dim as u32,
                };
                gpu.launch_on_old_rows(&transfers.move_rows, transfers.grid(), &params)?;
            }
            Ok(())
        })
    }

    /// How keys and values of blocks of `format` are laid out on the device, if not as on the host.
    fn layouts_of(&self, format: usize) -> Option<&[SideLayout; 2]> {
        self.sealed_sides().filter(|_| format != OPEN)
    }

    /// The bytes of each side of each cell of a block, and whether they are keys, 0, or values, 1.
    fn for_sides(&self, format: usize, mut visit: impl FnMut(Range<usize>, usize)) {
        let format = &self.formats()[format];
        for cell in 0..self.config().lane_width.cells(&self.config().shape) {
            visit(format.range(cell, Side::Key), 0);
            visit(format.range(cell, Side::Value), 1);
        }
    }
}
