//! One device: the context that work is done in, the stream it is queued on, its kernels.

use std::ffi::c_void;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use super::kernels::{Kernel, Loaded};
use super::params::Params;
use super::probe;
use crate::error::{Error, Kind, Result, bail, ensure};
use cudarc::driver::sys::{self, CUresult};
use parking_lot::Mutex;

/// A device, used in one context. All work is queued on one stream, so what the host does first
/// happens first: memory that the host has given to somebody else is written after its last reader
/// has read it.
pub struct Gpu {
    id: i32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// Whether the context is the primary one and was retained.
    is_primary: bool,
    num_sms: u32,
    /// Compute capability, 10 * major + minor.
    sm: u32,
    max_shared_bytes: u32,
    /// Whether kernels may start while the one before ends.
    has_early_starts: bool,
    stream: AtomicPtr<c_void>,
    loaded: Arc<Loaded>,
    /// Whether a kernel that was queued last may change rows of earlier steps.
    changes_old_rows: AtomicBool,
    /// Addresses and bytes of memory that waits for its next owner, the oldest first.
    spares: Mutex<Vec<(u64, usize)>>,
}

// SAFETY: contexts, streams and modules are handles that any thread may use.
unsafe impl Send for Gpu {}
// SAFETY: as above; what changes is behind locks or atomic.
unsafe impl Sync for Gpu {}

/// Every function of the driver that is called after a device was opened.
const FUNCTIONS: &[&str] = &[
    "cuCtxGetCurrent",
    "cuCtxGetDevice",
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuLaunchKernelEx",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuPointerGetAttribute",
    "cuStreamIsCapturing",
    "cuStreamSynchronize",
];

impl Gpu {
    /// Opens device `id`: in the calling thread's current context if that is one of this device,
    /// else in the primary context. The current context stays as it is.
    pub fn open(id: u32) -> Result<Arc<Self>> {
        let driver = probe().map_err(|absent| Error::new(Kind::NoDevice, absent.to_string()))?;
        ensure!(
            id < driver.num_devices,
            NoDevice,
            "device_id is {id}, the CUDA driver sees {} devices",
            driver.num_devices
        );
        let open = || {
            for function in FUNCTIONS {
                // SAFETY: the library was found by the probe; the symbol is only looked up.
                let found =
                    unsafe { sys::culib().get::<unsafe extern "C" fn()>(function.as_bytes()) };
                ensure!(found.is_ok(), NoDevice, "the libcuda.so that was found lacks {function}");
            }
            Self::open_known(id as i32, driver.version)
        };
        // The driver's bindings panic where they could answer.
        catch_unwind(AssertUnwindSafe(open))
            .unwrap_or_else(|_| bail!(NoDevice, "the libcuda.so that was found does not work"))
    }

    fn open_known(id: i32, driver_version: i32) -> Result<Arc<Self>> {
        use sys::CUdevice_attribute::*;
        let mut device = 0;
        // SAFETY: the driver is initialised; it writes one number.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, id) })?;
        let attribute = |which| -> Result<u32> {
            let mut value = 0;
            // SAFETY: as above.
            let result = unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) };
            check("cuDeviceGetAttribute", result)?;
            Ok(value.max(0) as u32)
        };
        let sm = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
            + attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        ensure!(
            sm >= 80,
            Unsupported,
            "device {id} has compute capability {}.{}, must be 8.0 or newer",
            sm / 10,
            sm % 10
        );
        let mut gpu = Self {
            id,
            device,
            context: current_context()?,
            is_primary: false,
            num_sms: attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1),
            sm,
            max_shared_bytes: attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            // Older drivers cannot capture such launches.
            has_early_starts: sm >= 90 && driver_version >= 12_030,
            stream: AtomicPtr::default(),
            loaded: Loaded::none(),
            changes_old_rows: AtomicBool::new(false),
            spares: Mutex::default(),
        };
        let mut current = -1;
        // SAFETY: writes one number; needs a current context, which is asked for first.
        let is_ours = !gpu.context.is_null()
            && unsafe { sys::cuCtxGetDevice(&raw mut current) } == CUresult::CUDA_SUCCESS
            && current == device;
        if !is_ours {
            // SAFETY: writes one handle, which is given back when `gpu` is dropped.
            let result = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut gpu.context, device) };
            check("cuDevicePrimaryCtxRetain", result)?;
            gpu.is_primary = true;
        }
        gpu.loaded = Loaded::of(gpu.context);
        Ok(Arc::new(gpu))
    }

    /// The number of the device.
    pub fn id(&self) -> i32 {
        self.id
    }

    /// Multiprocessors of the device.
    pub fn num_sms(&self) -> u32 {
        self.num_sms
    }

    /// The most shared memory that a CTA can have.
    pub fn max_shared_bytes(&self) -> u32 {
        self.max_shared_bytes
    }

    /// From now on work is queued on `stream`, a `CUstream` of this context; null is the legacy
    /// default stream. Nobody waits for what is on the stream before.
    pub fn set_stream(&self, stream: *mut c_void) {
        self.stream.store(stream, Ordering::Release);
    }

    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream.load(Ordering::Acquire).cast()
    }

    /// Makes the context current for the calling thread until the answer is dropped.
    pub fn enter(&self) -> Result<Entered> {
        let is_pushed = current_context()? != self.context;
        if is_pushed {
            // SAFETY: a context that lives as long as `self`, or whose end its owner answers for.
            check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.context) })?;
        }
        Ok(Entered { is_pushed, thread: std::marker::PhantomData })
    }

    /// Fails while the stream is being captured into a graph.
    pub fn ensure_not_capturing(&self, what: &str) -> Result<()> {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream is the engine's word; writes one number.
        let result = unsafe { sys::cuStreamIsCapturing(self.stream(), &raw mut status) };
        check("cuStreamIsCapturing", result)?;
        ensure!(
            status == sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE,
            InvalidState,
            "the stream is being captured into a CUDA graph; {what} before or after that"
        );
        Ok(())
    }

    /// Memory of `bytes` bytes that somebody has left.
    pub(super) fn take_spare(&self, bytes: usize) -> Option<u64> {
        let mut spares = self.spares.lock();
        let found = spares.iter().rposition(|(_, other)| *other == bytes)?;
        Some(spares.remove(found).0)
    }

    /// Leaves memory for the next owner. Calls nobody.
    pub(super) fn put_spare(&self, address: u64, bytes: usize) {
        self.spares.lock().push((address, bytes));
    }

    /// Gives all but the last `most` spare pieces of memory back to the driver, which waits for the device;
    /// whether there were any. The context is current.
    pub(super) fn free_spares(&self, most: usize) -> bool {
        let mut spares = self.spares.lock();
        let count = spares.len().saturating_sub(most);
        for (address, _) in spares.drain(..count) {
            // SAFETY: memory of ours, which nobody queues work for any more.
            unsafe { sys::cuMemFree_v2(address) };
        }
        count > 0
    }

    /// Loads a kernel by its name, with `shared_bytes` of dynamic shared memory. Slow the first time.
    pub fn kernel(&self, name: &str, threads: u32, shared_bytes: u32) -> Result<Kernel> {
        let _entered = self.enter()?;
        let mut kernel = self.loaded.kernel(name, threads, shared_bytes, self.sm)?;
        kernel.starts_early &= self.has_early_starts;
        Ok(kernel)
    }

    /// Queues a kernel that changes rows of earlier steps, which kernels that start early read before they wait.
    pub fn launch_on_old_rows<P: Params>(
        &self,
        kernel: &Kernel,
        grid: u32,
        params: &P,
    ) -> Result<()> {
        self.changes_old_rows.store(true, Ordering::Release);
        self.launch(kernel, grid, params)
    }

    /// The same kernel, which must not start early if rows of earlier steps have just been changed.
    pub fn after_old_rows(&self, kernel: &Kernel) -> Kernel {
        match self.changes_old_rows.swap(false, Ordering::AcqRel) {
            true => kernel.after_previous(),
            false => *kernel,
        }
    }

    /// Queues `grid` CTAs of a kernel. The context is current: see [`Self::enter`]. A wrong
    /// address in `params` is an error of the device, not of this process.
    pub fn launch<P: Params>(&self, kernel: &Kernel, grid: u32, params: &P) -> Result<()> {
        let mut arguments = [ptr::from_ref(params).cast_mut().cast::<c_void>()];
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: kernel.shared_bytes,
            hStream: self.stream(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(kernel.starts_early),
        };
        // SAFETY: every kernel takes one struct by value, which the driver copies before it returns.
        check("cuLaunchKernelEx", unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                kernel.function,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        })
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // The last user of the context unloads the kernels in it.
        let entered = self.enter();
        if entered.is_ok() {
            self.free_spares(0);
        }
        self.loaded = Loaded::none();
        drop(entered);
        if self.is_primary {
            // SAFETY: gives back what `open` retained.
            unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        }
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu").field("id", &self.id).field("num_sms", &self.num_sms).finish()
    }
}

/// While it lives, the context of a [`Gpu`] is current; then the one before is again.
#[derive(Debug)]
pub struct Entered {
    is_pushed: bool,
    /// What is current belongs to a thread.
    thread: std::marker::PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.is_pushed {
            let mut context = ptr::null_mut();
            // SAFETY: takes back what `enter` pushed on this thread.
            unsafe { sys::cuCtxPopCurrent_v2(&raw mut context) };
        }
    }
}

fn current_context() -> Result<sys::CUcontext> {
    let mut context = ptr::null_mut();
    // SAFETY: the driver is initialised and writes one handle.
    check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&raw mut context) })?;
    Ok(context)
}

/// The error of a call of the driver.
pub(super) fn check(function: &str, result: CUresult) -> Result<()> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            bail!(OutOfMemory, "{function} of the CUDA driver has no memory left")
        }
        other => {
            bail!(Device, "{function} of the CUDA driver answered {}: {other:?}", other as u32)
        }
    }
}
