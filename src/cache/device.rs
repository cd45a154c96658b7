//! Caches whose blocks are in the memory of a CUDA device. The layout is that of the host: blocks of
//! cells, K side before V side. Only the device reads and writes them.

use std::borrow::Cow;
use std::sync::Arc;

use super::{BlockView, Cache, CacheConfig};
use crate::device::cuda::{DeviceMemory, Gpu};
use crate::dtype::DType;
use crate::error::{Result, ensure};

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
    let open = memory.open;
    ensure!(
        open != DType::F32,
        Unsupported,
        "dtype is {}, must be f16 or bf16 on a CUDA device",
        open.name()
    );
    for (side, spec) in [("keys", &memory.key), ("values", &memory.value)] {
        ensure!(
            spec == open.name(),
            Unsupported,
            "{side} are kept as {spec}, on a CUDA device they must be {}, the dtype of the cache",
            open.name()
        );
    }
    Ok(())
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
