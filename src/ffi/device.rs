//! Devices other than the CPU.

use super::guard::guard_or;
use super::types::{KVMGR_DEVICE_CPU, KVMGR_DEVICE_CUDA, kvmgr_device_type};
use crate::device::cuda;
use crate::error::{Error, Kind, Result, bail, ensure};

/// How many devices of a type this machine offers: 1 for KVMGR_DEVICE_CPU, for KVMGR_DEVICE_CUDA
/// what the driver counts. When the answer is 0, kvmgr_last_error_message says why: no driver
/// library, no visible device, a driver that is too old. Neither the build nor the library needs
/// CUDA; the driver is looked for at each call, so this is not for a hot path. Any thread; the
/// caller's current CUDA context stays as it is.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_device_count(device_type: kvmgr_device_type) -> u32 {
    guard_or(0, || match device_type {
        KVMGR_DEVICE_CPU => Ok(1),
        KVMGR_DEVICE_CUDA => cuda_devices(),
        kvmgr_device_type(value) => {
            bail!(InvalidArgument, "device_type is {value}, not a kvmgr_device_type")
        }
    })
}

/// The number of CUDA devices, at least 1, or why there is none.
pub(super) fn cuda_devices() -> Result<u32> {
    let driver = cuda::probe().map_err(|absent| Error::new(Kind::NoDevice, absent.to_string()))?;
    ensure!(driver.num_devices > 0, NoDevice, "the CUDA driver sees 0 devices, 1 is needed");
    Ok(driver.num_devices)
}
