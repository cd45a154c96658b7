//! Caches whose blocks are in the memory of a CUDA device. The layout is that of the host: blocks of
//! cells, K side before V side. Only the device reads and writes them.

use std::borrow::Cow;
use std::sync::Arc;

use super::rows::SIDES;
use super::{Block, BlockView, Cache, CacheConfig, Exact, Format, OPEN};
use crate::device::cuda::{DeviceMemory, Gpu};
use crate::device::layout::{self, Sealed};
use crate::dtype::DType;
use crate::error::{Result, bail, ensure};
use crate::quantizer::{Cell, Side};

/// Blocks on a device start at multiples of this, so that a page table of 32-bit numbers reaches a
/// terabyte: page `i` starts `i * PAGE_BYTES` bytes behind the start of the memory.
pub const PAGE_BYTES: usize = 256;

/// Refuses what no kernel can do, with the value and the limit.
pub(super) fn check(config: &CacheConfig) -> Result<()> {
    let (shape, block_size) = (&config.shape, config.block_size);
    let (dim, group) = (shape.head_dim, shape.group());
    ensure!(
        [64, 128, 256].contains(&dim),
        Unsupported,
        "head_dim is {dim}, must be 64, 128 or 256 on a CUDA device"
    );
    ensure!(
        [16, 32, 64].contains(&block_size),
        Unsupported,
        "block_size is {block_size}, must be 16, 32 or 64 on a CUDA device"
    );
    ensure!(
        group <= 16,
        Unsupported,
        "a KV head has {group} query heads, on a CUDA device it can have at most 16"
    );
    let Some(memory) = &config.memory else { return Ok(()) };
    ensure!(
        memory.exact == Exact::default(),
        Unsupported,
        "skip_layers, first and residual are not supported on a CUDA device yet"
    );
    ensure!(memory.demoted.is_empty(), Unsupported, "rows on a CUDA device cannot be demoted yet");
    let open = memory.open.name();
    ensure!(
        memory.open != DType::F32,
        Unsupported,
        "dtype is {open}, must be f16 or bf16 on a CUDA device"
    );
    Ok(())
}

/// How kernels read the sealed blocks; `None` if these are raw.
pub(super) fn sealed_layout(config: &CacheConfig, formats: &[Format]) -> Result<Option<Sealed>> {
    let (Some(_), Some(format)) = (&config.device, formats.get(1)) else { return Ok(None) };
    let dim = config.shape.head_dim;
    let layouts = [&format.key, &format.value].map(|side| layout_of(&side.spec(), dim));
    let [Some(key), Some(value)] = layouts else {
        bail!(
            Unsupported,
            "keys are kept as {} and values as {}, on a CUDA device both must be int8, int4, \
             fp8(e4m3), or kivi with group at least 64 and head_dim, or not be quantized",
            format.key.spec(),
            format.value.spec()
        );
    };
    ensure!(
        key == value,
        Unsupported,
        "keys are kept as {} and values as {}, on a CUDA device both must be the same",
        format.key.spec(),
        format.value.spec()
    );
    ensure!(
        config.block_size == layout::TOKENS,
        Unsupported,
        "block_size is {}, must be {} for quantized blocks on a CUDA device",
        config.block_size,
        layout::TOKENS
    );
    ensure!(dim <= 128, Unsupported, "head_dim is {dim}, must be 64 or 128 for quantized blocks");
    Ok(Some(key))
}

fn layout_of(spec: &str, dim: usize) -> Option<Sealed> {
    Some(match spec {
        "int8" => Sealed::Int8,
        "int4" => Sealed::Int4,
        "fp8(e4m3)" => Sealed::Fp8E4m3,
        _ => {
            let rest = spec.strip_prefix("kivi(bits=")?;
            let (bits, group) = rest.strip_suffix(')')?.split_once(", group=")?;
            let group: usize = group.parse().ok()?;
            match bits {
                _ if group < dim.max(layout::TOKENS) => return None,
                "4" => Sealed::Kivi4,
                _ => Sealed::Kivi2,
            }
        }
    })
}

/// `bytes` bytes of device memory, ours or the engine's; `None` for a cache on the host.
pub(super) fn memory(config: &CacheConfig, bytes: usize) -> Result<Option<Arc<DeviceMemory>>> {
    let Some(device) = &config.device else { return Ok(None) };
    let memory = match device.memory {
        0 => DeviceMemory::allocate(&device.gpu, bytes)?,
        address => DeviceMemory::borrow(&device.gpu, address, bytes)?,
    };
    Ok(Some(Arc::new(memory)))
}

impl Cache {
    /// The device whose memory the blocks are in; `None` for the host.
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        self.device.as_ref().map(|memory| memory.gpu())
    }

    /// The address that pages count from; 0 for a cache on the host.
    pub fn device_base(&self) -> u64 {
        self.device.as_ref().map_or(0, |memory| memory.address())
    }

    /// The page at which a block on a device starts.
    pub fn page(&self, view: &BlockView) -> u32 {
        let offset = address(view) - self.device_base();
        (offset / PAGE_BYTES as u64) as u32
    }

    /// How kernels read the sealed blocks; `None` if these are raw or on the host.
    pub fn sealed_layout(&self) -> Option<Sealed> {
        self.layout
    }

    /// [`Cache::seal`] on a device, by way of the host: waits for the device.
    pub(super) fn seal_on_device(&self, block: Block, layout: Sealed) -> Option<BlockView> {
        let memory = self.device.as_ref()?;
        if self.is_shared(block.id) {
            return None;
        }
        let open = self.block_bytes(&block.view).ok()?;
        let (tokens, dim) = (self.config().block_size, self.config().shape.head_dim);
        let (from, to) = (&self.formats()[OPEN], &self.formats()[self.sealed_format()]);
        let mut sealed = vec![0; to.block_bytes];
        let mut rows = vec![0.0; tokens * dim];
        for cell in 0..self.config().lane_width.cells(&self.config().shape) {
            for side in SIDES {
                let bytes = &open[from.range(cell, side, tokens, dim)];
                let source = Cell { bytes, tokens, dim, rows: 0..tokens, ahead: &[] };
                from.side(side).decode(&source, &mut rows);
                let range = to.range(cell, side, tokens, dim);
                let mut encoded = vec![0; range.len()];
                to.side(side).encode(&rows, dim, &mut encoded);
                layout.to_device(dim, side == Side::Key, &encoded, &mut sealed[range]);
            }
        }
        self.replace(block, self.sealed_format(), |target| {
            // A failure is one of the device, which answers the same to all that follows.
            _ = memory.write(address(target), &sealed);
        })
    }

    /// Copies the bytes of a block over another of the same format.
    pub fn copy_block(&self, source: &BlockView, target: &BlockView) -> Result<()> {
        match &self.device {
            None => target.write(0..target.len()).copy_from_slice(source.bytes()),
            Some(memory) => {
                memory.copy_within(address(source), address(target), target.len())?;
            }
        }
        Ok(())
    }

    /// The bytes of a block; from a device they are fetched, which waits for all queued work.
    pub fn block_bytes<'a>(&self, view: &'a BlockView) -> Result<Cow<'a, [u8]>> {
        let Some(memory) = &self.device else { return Ok(Cow::Borrowed(view.bytes())) };
        let mut bytes = vec![0; view.len()];
        memory.read(address(view), &mut bytes)?;
        Ok(Cow::Owned(bytes))
    }

    /// Lets `fill` write the bytes of a block that nobody else sees yet.
    pub fn fill_block(
        &self,
        view: &BlockView,
        fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let Some(memory) = &self.device else { return fill(view.write(0..view.len())) };
        let mut bytes = vec![0; view.len()];
        fill(&mut bytes)?;
        memory.write(address(view), &bytes)
    }
}

fn address(view: &BlockView) -> u64 {
    view.address().addr().get() as u64
}
