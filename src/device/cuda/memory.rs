//! Memory of a device, and pinned host memory from which it is filled.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use super::Gpu;
use super::gpu::check;
use crate::error::{Kind, Result, ensure};

/// Spare pieces of memory that are kept when somebody asks for one.
const MAX_SPARES: usize = 8;

/// A range of device memory, ours or the engine's. The host never reads or writes it.
#[derive(Debug)]
pub struct DeviceMemory {
    gpu: Arc<Gpu>,
    address: u64,
    bytes: usize,
    owner: Owner,
}

/// Who gets memory that is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Engine,
    Driver,
    /// Whoever asks for as much next.
    Next,
}

impl DeviceMemory {
    /// Takes `bytes` from the driver, aligned to 256.
    pub fn allocate(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self> {
        let _entered = gpu.enter()?;
        let take = || {
            let mut address = 0;
            // SAFETY: writes one address.
            let result = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes.max(1)) };
            check("cuMemAlloc", result).map(|()| address)
        };
        let address = match take() {
            Err(error) if error.kind() == Kind::OutOfMemory && gpu.free_spares(0) => take(),
            taken => taken,
        };
        let address =
            address.map_err(|error| error.within(format!("{bytes} bytes of device memory")))?;
        Ok(Self { gpu: gpu.clone(), address, bytes, owner: Owner::Driver })
    }

    /// As [`Self::allocate`], for memory that comes and goes with sequences, at any time: the driver would wait
    /// for the device whenever it gets some back, and must get none while a graph is captured. Its bytes are
    /// those of the last owner.
    pub fn reuse(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self> {
        let _entered = gpu.enter()?;
        let mut memory = match gpu.take_spare(bytes) {
            Some(address) => Self { gpu: gpu.clone(), address, bytes, owner: Owner::Next },
            None => Self::allocate(gpu, bytes)?,
        };
        memory.owner = Owner::Next;
        gpu.free_spares(MAX_SPARES);
        Ok(memory)
    }

    /// Memory that the engine has; it stays until this is dropped and the stream is done.
    pub fn borrow(gpu: &Arc<Gpu>, address: u64, bytes: usize) -> Result<Self> {
        let _entered = gpu.enter()?;
        let mut device = -1i32;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
        // SAFETY: writes one number; any address may be asked about.
        let result = unsafe {
            sys::cuPointerGetAttribute((&raw mut device).cast::<c_void>(), attribute, address)
        };
        ensure!(
            result == sys::CUresult::CUDA_SUCCESS && device == gpu.id(),
            InvalidArgument,
            "memory is not memory of CUDA device {}",
            gpu.id()
        );
        ensure!(address.is_multiple_of(256), InvalidArgument, "memory is not aligned to 256 bytes");
        Ok(Self { gpu: gpu.clone(), address, bytes, owner: Owner::Engine })
    }

    /// Its first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The device.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Queues zeros for `bytes` bytes at `offset`.
    pub fn clear(&self, offset: usize, bytes: usize) -> Result<()> {
        let address = self.at(offset, bytes);
        // SAFETY: a range of our own, checked.
        check("cuMemsetD8Async", unsafe {
            sys::cuMemsetD8Async(address, 0, bytes, self.gpu.stream())
        })
    }

    /// Queues a copy inside the range: `bytes` bytes from the device address `from` to `to`.
    pub fn copy_within(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.check(from, bytes);
        self.check(to, bytes);
        let _entered = self.gpu.enter()?;
        // Else every launch of the graph would copy, and nobody now.
        self.gpu.ensure_not_capturing("copy blocks")?;
        // SAFETY: both ranges were checked.
        check("cuMemcpyDtoDAsync", unsafe {
            sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.gpu.stream())
        })
    }

    /// As much memory, for [`Self::reuse`] again; queues a copy of the bytes.
    pub fn duplicate(&self) -> Result<Self> {
        let _entered = self.gpu.enter()?;
        self.gpu.ensure_not_capturing("copy a sequence")?;
        let copy = Self::reuse(&self.gpu, self.bytes)?;
        // SAFETY: both ranges are that long.
        check("cuMemcpyDtoDAsync", unsafe {
            let stream = self.gpu.stream();
            sys::cuMemcpyDtoDAsync_v2(copy.address, self.address, self.bytes, stream)
        })?;
        Ok(copy)
    }

    /// Copies the bytes at a device address to the host, once all that is queued has been done.
    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<()> {
        self.check(address, out.len());
        let _entered = self.gpu.enter()?;
        // A stream that is captured cannot be waited for: the capture would end.
        self.gpu.ensure_not_capturing("fetch blocks")?;
        // SAFETY: the range was checked, `out` is that long and stays until the copy is done.
        unsafe {
            let (to, bytes) = (out.as_mut_ptr().cast(), out.len());
            let result = sys::cuMemcpyDtoHAsync_v2(to, address, bytes, self.gpu.stream());
            check("cuMemcpyDtoHAsync", result)?;
            check("cuStreamSynchronize", sys::cuStreamSynchronize(self.gpu.stream()))
        }
    }

    /// Copies bytes of the host to a device address, after all that is queued.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.check(address, bytes.len());
        let _entered = self.gpu.enter()?;
        self.gpu.ensure_not_capturing("bring blocks")?;
        // SAFETY: the range was checked; `bytes` stays until the copy is done.
        unsafe {
            let from = bytes.as_ptr().cast();
            let result = sys::cuMemcpyHtoDAsync_v2(address, from, bytes.len(), self.gpu.stream());
            check("cuMemcpyHtoDAsync", result)?;
            check("cuStreamSynchronize", sys::cuStreamSynchronize(self.gpu.stream()))
        }
    }

    fn check(&self, address: u64, bytes: usize) {
        let is_inside =
            address >= self.address && address - self.address + bytes as u64 <= self.bytes as u64;
        assert!(is_inside, "{bytes} bytes at {address:#x} are not in the cache's memory");
    }

    fn at(&self, offset: usize, bytes: usize) -> u64 {
        assert!(offset + bytes <= self.bytes, "bytes {offset}+{bytes} of {}", self.bytes);
        self.address + offset as u64
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        match self.owner {
            Owner::Engine => {}
            // What the next owner queues comes after all that is queued.
            Owner::Next => self.gpu.put_spare(self.address, self.bytes),
            Owner::Driver => {
                if let Ok(_entered) = self.gpu.enter() {
                    // The driver waits until the device has done what it was asked for.
                    // SAFETY: our own memory, which nobody queues work for any more.
                    unsafe { sys::cuMemFree_v2(self.address) };
                }
            }
        }
    }
}

/// Pinned host memory, from which device memory is filled without waiting. There are two buffers;
/// one is only written again once the device has read it.
#[derive(Debug)]
pub struct Staging {
    gpu: Arc<Gpu>,
    buffers: [Pinned; 2],
    next: usize,
}

#[derive(Debug)]
struct Pinned {
    address: *mut c_void,
    bytes: usize,
    event: sys::CUevent,
}

// SAFETY: the memory and the event belong to the owner alone.
unsafe impl Send for Staging {}
// SAFETY: as above; writing needs an exclusive borrow.
unsafe impl Sync for Staging {}

impl Staging {
    /// Two buffers of `bytes` bytes.
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self> {
        let _entered = gpu.enter()?;
        let none = || Pinned { address: ptr::null_mut(), bytes: 0, event: ptr::null_mut() };
        // Owned from here on, so that a failure half way gives back what there is.
        let mut staging = Self { gpu: gpu.clone(), buffers: [none(), none()], next: 0 };
        for buffer in &mut staging.buffers {
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
            // SAFETY: the driver writes one address and one handle.
            unsafe {
                let result = sys::cuMemHostAlloc(&raw mut buffer.address, bytes.max(1), 0);
                check("cuMemHostAlloc", result)?;
                check("cuEventCreate", sys::cuEventCreate(&raw mut buffer.event, flags))?;
            }
            buffer.bytes = bytes;
        }
        Ok(staging)
    }

    /// The next buffer, whose last copy is done; waits for it if need be.
    pub fn begin(&mut self) -> Result<&mut [u32]> {
        self.next ^= 1;
        let buffer = &self.buffers[self.next];
        // SAFETY: our own event; one that was never recorded is done.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(buffer.event) })?;
        // SAFETY: pinned memory of this size, aligned to a page; the device has read it, and
        // `self` is borrowed exclusively. The driver gives zeroed or old bytes, all valid numbers.
        Ok(unsafe { std::slice::from_raw_parts_mut(buffer.address.cast(), buffer.bytes / 4) })
    }

    /// Queues copies `(first word, words, offset in target)` from the buffer of the last
    /// [`Self::begin`].
    pub fn send(&mut self, target: &DeviceMemory, copies: &[(usize, usize, usize)]) -> Result<()> {
        let buffer = &self.buffers[self.next];
        for (first, words, offset) in copies {
            assert!((first + words) * 4 <= buffer.bytes, "a copy from outside of the buffer");
            let address = target.at(*offset, words * 4);
            let source = buffer.address.wrapping_byte_add(first * 4);
            // SAFETY: both ranges were checked; the buffer is not written before the event is done.
            let result =
                unsafe { sys::cuMemcpyHtoDAsync_v2(address, source, words * 4, self.gpu.stream()) };
            check("cuMemcpyHtoDAsync", result)?;
        }
        // SAFETY: our own event, the engine's stream.
        check("cuEventRecord", unsafe { sys::cuEventRecord(buffer.event, self.gpu.stream()) })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let Ok(_entered) = self.gpu.enter() else { return };
        for buffer in &self.buffers {
            // SAFETY: our own event and memory, once the device has read it.
            unsafe {
                if !buffer.event.is_null() {
                    sys::cuEventSynchronize(buffer.event);
                    sys::cuEventDestroy_v2(buffer.event);
                }
                if !buffer.address.is_null() {
                    sys::cuMemFreeHost(buffer.address);
                }
            }
        }
    }
}
