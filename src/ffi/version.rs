//! Version, features, errors and the log hook.

use std::ffi::{CString, c_char, c_void};
use std::sync::OnceLock;

use super::convert;
use super::guard::{guard, guard_or, last_message};
use super::types::{STATUSES, kvmgr_log_level, kvmgr_status};
use crate::device::cuda;
use crate::error::{Result, ensure};
use crate::log::{self, Level};
use crate::simd;

/// Major version of the library this header belongs to.
pub const KVMGR_VERSION_MAJOR: u32 = 0;
/// Minor version; before 1.0 it changes whenever the ABI breaks.
pub const KVMGR_VERSION_MINOR: u32 = 1;
/// Patch version.
pub const KVMGR_VERSION_PATCH: u32 = 0;

/// The version of the loaded library: major << 16 | minor << 8 | patch.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_version() -> u32 {
    KVMGR_VERSION_MAJOR << 16 | KVMGR_VERSION_MINOR << 8 | KVMGR_VERSION_PATCH
}

/// The version of the loaded library as text, such as "0.1.0". Static.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_version_string() -> *const c_char {
    const TEXT: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    TEXT.as_ptr().cast()
}

/// Whether the loaded library can do something: "avx2" or "avx512" (kernels for this CPU), "cuda" (it
/// has kernels for CUDA devices; kvmgr_device_count tells whether this machine has a device). Unknown
/// names are false. The exported symbols never depend on features.
///
/// @param name a NUL-terminated string
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_has_feature(name: *const c_char) -> bool {
    guard_or(false, || {
        // SAFETY: the caller passes NULL or a NUL-terminated string.
        let name = unsafe { convert::required_text(name, "name") }?;
        Ok(name == "cuda" && cuda::has_kernels()
            || simd::available().any(|kernels| kernels.name == name))
    })
}

/// The instruction set of the CPU kernels in use: "scalar", "avx2" or "avx512". Static. The
/// environment variable KVMGR_CPU forces one; a value that cannot be honoured is logged by
/// kvmgr_cache_create and ignored.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_cpu_level() -> *const c_char {
    static NAME: OnceLock<CString> = OnceLock::new();
    guard_or(c"".as_ptr(), || {
        let name = NAME.get_or_init(|| CString::new(simd::active().name).unwrap_or_default());
        Ok(name.as_ptr())
    })
}

/// The name of a status, such as "OUT_OF_BLOCKS"; "UNKNOWN" for a number that is none. Static.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_status_name(status: kvmgr_status) -> *const c_char {
    let known = STATUSES.iter().find(|(value, _)| *value == status);
    known.map_or(c"UNKNOWN".as_ptr(), |(_, name)| name.as_ptr())
}

/// What went wrong in the last failing call of this thread: which argument, which value, which
/// limit. Empty before the first failure. The pointer is the same for the life of the thread; the
/// text is replaced by the next failure, never freed.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_last_error_message() -> *const c_char {
    last_message()
}

/// Receives log messages.
///
/// Called on the thread that caused the message, possibly on several at once. It must not call the
/// library back, throw or longjmp. `message` is valid during the call.
pub type kvmgr_log_fn = Option<
    unsafe extern "C" fn(user_data: *mut c_void, level: kvmgr_log_level, message: *const c_char),
>;

/// Sets the log hook of the process. The library is silent without one.
///
/// When the call returns, the previous hook is not running any more and its user_data may go.
///
/// @param user_data passed to every call of `log`; must stay valid until the hook is replaced
/// @param max_level least important level to report, KVMGR_LOG_OFF to KVMGR_LOG_DEBUG
/// @param log the hook, or NULL for silence
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_set_log(
    user_data: *mut c_void,
    max_level: kvmgr_log_level,
    log: kvmgr_log_fn,
) -> kvmgr_status {
    guard(|| {
        let level = max_level.0;
        ensure!(level <= 4, InvalidArgument, "max_level is {level}, not a kvmgr_log_level");
        let user_data = UserData(user_data);
        log::set_hook(log.map(|log| hook(user_data, log)), level);
        Ok(())
    })
}

/// The engine's pointer. The engine promised that its hook may run on any thread.
struct UserData(*mut c_void);
// SAFETY: see the promise above.
unsafe impl Send for UserData {}
// SAFETY: see the promise above.
unsafe impl Sync for UserData {}

fn hook(
    user_data: UserData,
    log: unsafe extern "C" fn(*mut c_void, kvmgr_log_level, *const c_char),
) -> log::Hook {
    Box::new(move |level: Level, message: &str| {
        let user_data: &UserData = &user_data;
        let text: Result<CString> =
            Ok(CString::new(message.replace('\0', "?")).unwrap_or_default());
        if let Ok(text) = text {
            // SAFETY: the engine's function with the engine's pointer and a live string.
            unsafe { log(user_data.0, kvmgr_log_level(level as u32), text.as_ptr()) };
        }
    })
}

/// A list of names with descriptions as C strings that live as long as the process.
pub(super) struct Listing {
    entries: Vec<(CString, CString)>,
}

impl Listing {
    /// From (name, description) pairs.
    pub(super) fn new(entries: impl IntoIterator<Item = (String, String)>) -> Self {
        let text = |text: String| CString::new(text).unwrap_or_default();
        Self { entries: entries.into_iter().map(|(a, b)| (text(a), text(b))).collect() }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// NULL past the end.
    pub(super) fn name(&self, index: usize) -> *const c_char {
        self.entries.get(index).map_or(std::ptr::null(), |entry| entry.0.as_ptr())
    }

    /// NULL past the end.
    pub(super) fn help(&self, index: usize) -> *const c_char {
        self.entries.get(index).map_or(std::ptr::null(), |entry| entry.1.as_ptr())
    }
}

/// One line that describes a member: summary, parameters, paper.
pub(super) fn describe(summary: &str, params: &[crate::registry::Param], paper: &str) -> String {
    let mut text = summary.to_string();
    for param in params {
        text.push_str(&format!("; {}: {} ({:?})", param.name, param.help, param.domain));
    }
    if !paper.is_empty() {
        text.push_str(&format!(" [{paper}]"));
    }
    text
}
