//! Caches whose blocks are in the memory of a CUDA device. The layout is that of the host: blocks of
//! cells, K side before V side. Only the device reads and writes them.

use std::borrow::Cow;
use std::sync::Arc;

use super::{BlockView, Cache, CacheConfig, Format};
use crate::device::cuda::params::Seal;
use crate::device::cuda::{DeviceMemory, Gpu, Kernel};
use crate::device::layout::{self, Codes, Sealed, SideLayout};
use crate::dtype::DType;
use crate::error::{Result, bail, ensure};
use crate::quantizer::ROTATION;
use crate::shape::Values;

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
        shape.values == Values::Own(dim),
        Unsupported,
        "values must have rows of their own of head_dim {dim} elements on a CUDA device"
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
        memory.low_rank.is_none(),
        Unsupported,
        "k_rank and v_rank are not supported on a CUDA device yet"
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

/// What makes sealed blocks of open ones on a device.
#[derive(Debug)]
pub(super) struct Sealer {
    /// How kernels read sealed blocks.
    layout: Sealed,
    /// The same of keys and of values, byte by byte.
    sides: [SideLayout; 2],
    /// Bit 0: keys, bit 1: values are rotated before they are encoded.
    pub(super) rotates: u32,
    pub(super) kernel: Kernel,
}

impl Sealer {
    /// Loads the kernel; `None` if sealed blocks are raw or on the host.
    pub(super) fn load(config: &CacheConfig, formats: &[Format]) -> Result<Option<Self>> {
        let (Some((layout, rotated)), Some(device), Some(memory)) =
            (sealed_layout(config, formats)?, &config.device, &config.memory)
        else {
            return Ok(None);
        };
        let (dim, open) = (config.shape.head_dim, memory.open.name());
        let name = format!("kvm_seal_{}_{open}_d{dim}", layout.name());
        // Rows as f32, codes, scales: KvmSealed of kernels/seal.cu.
        let shared = (64 * 5 + 8) * dim as u32;
        let _entered = device.gpu.enter()?;
        let kernel = device.gpu.kernel(&name, SEAL_THREADS, shared)?;
        let rotates = u32::from(rotated[0]) | u32::from(rotated[1]) << 1;
        let sides = [true, false].map(|is_key| SideLayout::new(layout, dim, is_key));
        Ok(Some(Self { layout, sides, rotates, kernel }))
    }

    /// The most blocks of `cells` cells for a launch.
    pub(super) fn blocks_of_launch(&self, cells: u32) -> usize {
        (SEAL_CTAS / (2 * cells)).clamp(1, Seal::BLOCKS as u32) as usize
    }
}

/// Threads of a CTA of the kernel that seals.
const SEAL_THREADS: u32 = 128;

/// CTAs of a launch that keep any device busy. More blocks at a time would only need more memory, because open
/// ones are free after the launch.
const SEAL_CTAS: u32 = 4096;

/// How kernels read the sealed blocks, and whether keys and values are rotated; `None` if these are raw.
fn sealed_layout(config: &CacheConfig, formats: &[Format]) -> Result<Option<(Sealed, [bool; 2])>> {
    let (Some(_), Some(format)) = (&config.device, formats.get(1)) else { return Ok(None) };
    let dim = config.shape.head_dim;
    let sides = [format.key.spec(), format.value.spec()];
    let plain = sides.each_ref().map(|spec| spec.strip_prefix(ROTATION));
    let of = |i: usize| codes_of(plain[i].unwrap_or(&sides[i]), dim);
    let (Some(key), Some(value)) = (of(0), of(1)) else {
        bail!(
            Unsupported,
            "keys are kept as {} and values as {}, on a CUDA device both must be int8, int4, \
             fp8(e4m3), or kivi with group at least 64 and head_dim, with had+ or without, or not \
             be quantized",
            sides[0],
            sides[1]
        );
    };
    let layout = Sealed { key, value };
    ensure!(
        Sealed::ALL.contains(&layout),
        Unsupported,
        "keys are kept as {} and values as {}, on a CUDA device both must be the same, or int8 and int4",
        sides[0],
        sides[1]
    );
    ensure!(
        config.block_size == layout::TOKENS,
        Unsupported,
        "block_size is {}, must be {} for quantized blocks on a CUDA device",
        config.block_size,
        layout::TOKENS
    );
    Ok(Some((layout, plain.map(|rest| rest.is_some()))))
}

fn codes_of(spec: &str, dim: usize) -> Option<Codes> {
    Some(match spec {
        "int8" => Codes::Int8,
        "int4" => Codes::Int4,
        "fp8(e4m3)" => Codes::Fp8E4m3,
        _ => {
            let rest = spec.strip_prefix("kivi(bits=")?;
            let (bits, group) = rest.strip_suffix(')')?.split_once(", group=")?;
            let group: usize = group.parse().ok()?;
            match bits {
                _ if group < dim.max(layout::TOKENS) => return None,
                "4" => Codes::Kivi4,
                _ => Codes::Kivi2,
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
        self.sealer.as_ref().map(|sealer| sealer.layout)
    }

    /// Where everything of the keys and the values of a sealed cell is.
    pub(super) fn sealed_sides(&self) -> Option<&[SideLayout; 2]> {
        self.sealer.as_ref().map(|sealer| &sealer.sides)
    }

    /// Bit 0: keys, bit 1: values of sealed blocks on a device are rotated.
    pub fn rotates(&self) -> u32 {
        self.sealer.as_ref().map_or(0, |sealer| sealer.rotates)
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
        fetch(self.device.as_deref(), view)
    }

    /// Lets `fill` write the bytes of a block that nobody else sees yet.
    pub fn fill_block(
        &self,
        view: &BlockView,
        fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        replace(self.device.as_deref(), view, fill)
    }
}

/// The bytes of a view of `memory`, or of the host's; from a device they are fetched, which waits for all
/// queued work.
pub(super) fn fetch<'a>(
    memory: Option<&DeviceMemory>,
    view: &'a BlockView,
) -> Result<Cow<'a, [u8]>> {
    let Some(memory) = memory else { return Ok(Cow::Borrowed(view.bytes())) };
    let mut bytes = vec![0; view.len()];
    memory.read(address(view), &mut bytes)?;
    Ok(Cow::Owned(bytes))
}

/// Lets `fill` write the bytes of a view of `memory`, or of the host's, that nobody else uses.
pub(super) fn replace(
    memory: Option<&DeviceMemory>,
    view: &BlockView,
    fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
) -> Result<()> {
    let Some(memory) = memory else { return fill(view.write(0..view.len())) };
    let mut bytes = vec![0; view.len()];
    fill(&mut bytes)?;
    memory.write(address(view), &bytes)
}

/// The address of a view of device memory.
pub(super) fn address(view: &BlockView) -> u64 {
    view.address().addr().get() as u64
}
