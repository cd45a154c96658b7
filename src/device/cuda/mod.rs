//! The CUDA driver, found when somebody asks for it.
//!
//! The library neither links nor needs CUDA. [`probe`] looks for the driver library, starts it and
//! counts devices; every way in which that can fail is a reason in words. Nothing of the driver may
//! be called before a probe has succeeded: a missing library or symbol would be a panic.

#![expect(unsafe_code, reason = "calls of the CUDA driver")]

mod gpu;
mod images;
mod kernels;
mod memory;
pub mod params;
mod ptx;
mod tensor;

use std::fmt;
use std::panic::catch_unwind;

use cudarc::driver::sys::{self, CUresult};

pub use gpu::{Entered, Gpu};
pub use images::has_kernels;
pub use kernels::Kernel;
pub use memory::{DeviceMemory, Staging};
pub use tensor::DeviceTensor;

/// Why CUDA cannot be used on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Absent {
    /// There is no libcuda.so in the search path of the loader.
    NoLibrary,
    /// The driver library is there, but its call `function` answered `code`, a `CUresult`.
    Driver {
        /// The name of the call.
        function: &'static str,
        /// What it answered.
        code: u32,
    },
    /// The driver understands CUDA 12.0 or newer only if its version is at least 12000.
    TooOld {
        /// 1000 * major + 10 * minor.
        version: i32,
    },
    /// The library that was found lacks a function or failed in another way.
    Broken,
}

/// A driver that works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Driver {
    /// The CUDA version it speaks: 1000 * major + 10 * minor.
    pub version: i32,
    /// Devices it sees; can be 0.
    pub num_devices: u32,
}

/// The oldest CUDA version that is accepted: the one whose declarations the library is built with.
const OLDEST: i32 = 12_000;

/// Looks for the driver and counts its devices. Leaves the calling thread's context alone. A
/// failure is not remembered, so a driver that appears later is found.
pub fn probe() -> Result<Driver, Absent> {
    // A symbol that the found library lacks is a panic of the loader.
    catch_unwind(probe_driver).unwrap_or(Err(Absent::Broken))
}

fn probe_driver() -> Result<Driver, Absent> {
    // SAFETY: loads a library by name; its initialisers run.
    if !unsafe { sys::is_culib_present() } {
        return Err(Absent::NoLibrary);
    }
    // SAFETY: cuInit may be called by any thread any number of times; flags are 0.
    check("cuInit", unsafe { sys::cuInit(0) })?;
    let mut version = 0;
    // SAFETY: the driver is initialised and writes one number.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    if version < OLDEST {
        return Err(Absent::TooOld { version });
    }
    let mut count = 0;
    // SAFETY: as above.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    Ok(Driver { version, num_devices: u32::try_from(count).unwrap_or(0) })
}

fn check(function: &'static str, result: CUresult) -> Result<(), Absent> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        error => Err(Absent::Driver { function, code: error as u32 }),
    }
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoLibrary => write!(f, "the CUDA driver library libcuda.so is not installed"),
            Self::Driver { function, code } => {
                let meaning = match code {
                    100 => ": no CUDA device is visible",
                    803 => ": the driver and its library have different versions",
                    _ => "",
                };
                write!(f, "{function} of the CUDA driver answered {code}{meaning}")
            }
            Self::TooOld { version } => {
                write!(f, "the CUDA driver speaks version {version}, must be {OLDEST} or newer")
            }
            Self::Broken => write!(f, "the libcuda.so that was found lacks functions of CUDA 12.0"),
        }
    }
}
