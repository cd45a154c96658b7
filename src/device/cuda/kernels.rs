//! Kernels in a context of the driver. All caches that work in one share them: the driver compiles PTX
//! when it is loaded.

use std::ffi::CString;
use std::ptr;
use std::sync::{Arc, Weak};

use cudarc::driver::sys;
use parking_lot::Mutex;

use super::gpu::check;
use super::images;
use crate::error::{Result, ensure};

/// A kernel that can be launched.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    pub(super) function: sys::CUfunction,
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
    /// Whether it may start while the kernel before ends, for whose results it waits by itself.
    pub(super) starts_early: bool,
    /// How many of its CTAs a multiprocessor holds at a time.
    pub ctas_per_sm: u32,
}

impl Kernel {
    /// The same, but it starts once the kernel before has ended: for one that reads what is made by that
    /// before it waits.
    #[must_use]
    pub fn after_previous(&self) -> Self {
        Self { starts_early: false, ..*self }
    }
}

// SAFETY: a function is a handle that any thread may launch.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// What is loaded in one context.
pub(super) struct Loaded {
    context: sys::CUcontext,
    kernels: Mutex<Vec<(String, Kernel)>>,
    modules: Mutex<Vec<sys::CUmodule>>,
}

// SAFETY: contexts and modules are handles that any thread may use.
unsafe impl Send for Loaded {}
// SAFETY: as above; what changes is behind locks.
unsafe impl Sync for Loaded {}

/// Those that somebody uses.
static ALL: Mutex<Vec<Weak<Loaded>>> = Mutex::new(Vec::new());

impl Loaded {
    /// A place for nothing.
    pub(super) fn none() -> Arc<Self> {
        let (kernels, modules) = (Mutex::default(), Mutex::default());
        Arc::new(Self { context: ptr::null_mut(), kernels, modules })
    }

    /// What is loaded in `context`. A context outlives its users, so another one at the same address
    /// finds nothing of it.
    pub(super) fn of(context: sys::CUcontext) -> Arc<Self> {
        let mut all = ALL.lock();
        all.retain(|loaded| loaded.strong_count() > 0);
        let known = all.iter().filter_map(Weak::upgrade).find(|known| known.context == context);
        known.unwrap_or_else(|| {
            let (kernels, modules) = (Mutex::default(), Mutex::default());
            let loaded = Arc::new(Self { context, kernels, modules });
            all.push(Arc::downgrade(&loaded));
            loaded
        })
    }

    /// A kernel for a device of compute capability `sm / 10`.`sm % 10`. The context is current.
    pub(super) fn kernel(
        &self,
        name: &str,
        threads: u32,
        shared_bytes: u32,
        sm: u32,
    ) -> Result<Kernel> {
        let mut kernels = self.kernels.lock();
        if let Some((_, kernel)) = kernels.iter().find(|(known, _)| known == name) {
            return Ok(*kernel);
        }
        let kernel = self.load(name, threads, shared_bytes, sm)?;
        kernels.push((name.to_string(), kernel));
        Ok(kernel)
    }

    fn load(&self, name: &str, threads: u32, shared_bytes: u32, sm: u32) -> Result<Kernel> {
        let image = images::find(name, sm)?;
        let (mut module, mut function) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: a cubin, or PTX text that ends in NUL; the driver copies it.
        let result = unsafe { sys::cuModuleLoadData(&raw mut module, image.bytes.as_ptr().cast()) };
        check("cuModuleLoadData", result).map_err(|error| error.within(name))?;
        self.modules.lock().push(module);
        let c_name = CString::new(name).unwrap_or_default();
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let mut ctas = 0;
        // SAFETY: handles that the driver has just made; it writes one handle and one number.
        unsafe {
            let result = sys::cuModuleGetFunction(&raw mut function, module, c_name.as_ptr());
            check("cuModuleGetFunction", result).map_err(|error| error.within(name))?;
            let result = sys::cuFuncSetAttribute(function, attribute, shared_bytes as i32);
            check("cuFuncSetAttribute", result).map_err(|error| error.within(name))?;
            let result = sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &raw mut ctas,
                function,
                threads as i32,
                shared_bytes as usize,
            );
            check("cuOccupancyMaxActiveBlocksPerMultiprocessor", result)?;
        }
        ensure!(ctas > 0, Unsupported, "the device has no room for a CTA of {name}");
        let (starts_early, ctas_per_sm) = (image.starts_early, ctas as u32);
        Ok(Kernel { function, threads, shared_bytes, starts_early, ctas_per_sm })
    }
}

impl Drop for Loaded {
    /// The context is current.
    fn drop(&mut self) {
        for module in self.modules.get_mut().drain(..) {
            // SAFETY: our own modules, which nobody launches from any more.
            unsafe { sys::cuModuleUnload(module) };
        }
    }
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.kernels.lock().iter().map(|(name, _)| name)).finish()
    }
}
