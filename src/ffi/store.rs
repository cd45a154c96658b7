//! Stores: named ones, and the engine's own behind a table of functions.

use std::ffi::{c_char, c_void};
use std::sync::{Arc, LazyLock};

use super::convert;
use super::guard::{guard, guard_or};
use super::handle::{self, Opaque};
use super::types::{KVMGR_NOT_FOUND, KVMGR_OK, kvmgr_status};
use super::version::{Listing, describe};
use crate::error::{Error, Kind, Result, bail, ensure};
use crate::store::{self, Key, STORES, Store, StoreStats};

/// A place for sealed blocks: host memory, or whatever the engine implements. Shared: retain and
/// release, any thread.
#[derive(Debug)]
pub struct kvmgr_store {
    _opaque: [u8; 0],
}

/// What a kvmgr_store holds.
#[derive(Debug, Clone)]
pub(super) struct StoreHandle(pub(super) Arc<dyn Store>);

impl Opaque for kvmgr_store {
    type Inner = StoreHandle;
    const NAME: &'static str = "kvmgr_store";
}

/// Bytes of a key of a store.
pub const KVMGR_STORE_KEY_SIZE: usize = 32;

/// The engine's own store. Set struct_size to sizeof(kvmgr_store_ops).
///
/// The functions may be called from several threads at once. They must not call the library back,
/// throw or longjmp; pointers are valid during the call. Every function but destroy is required.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_store_ops {
    /// sizeof(kvmgr_store_ops).
    pub struct_size: usize,
    /// Stores size bytes under a 32-byte key, replacing what was there. KVMGR_OUT_OF_MEMORY if full.
    pub put: Option<
        unsafe extern "C" fn(
            user_data: *mut c_void,
            key: *const u8,
            bytes: *const c_void,
            size: usize,
        ) -> kvmgr_status,
    >,
    /// Fills out with the object, which has size bytes. KVMGR_NOT_FOUND if there is none.
    pub get: Option<
        unsafe extern "C" fn(
            user_data: *mut c_void,
            key: *const u8,
            out: *mut c_void,
            size: usize,
        ) -> kvmgr_status,
    >,
    /// KVMGR_OK if the object exists, KVMGR_NOT_FOUND if not.
    pub contains:
        Option<unsafe extern "C" fn(user_data: *mut c_void, key: *const u8) -> kvmgr_status>,
    /// Forgets the object; KVMGR_OK also if there is none.
    pub remove:
        Option<unsafe extern "C" fn(user_data: *mut c_void, key: *const u8) -> kvmgr_status>,
    /// Called once when the last reference to the store is gone. May be NULL.
    pub destroy: Option<unsafe extern "C" fn(user_data: *mut c_void)>,
}

/// What a store holds and has done. Set struct_size before the call.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct kvmgr_store_stats {
    /// sizeof(kvmgr_store_stats).
    pub struct_size: usize,
    /// Objects held. 0 for an engine's own store.
    pub objects: u64,
    /// Bytes held. 0 for an engine's own store.
    pub bytes: u64,
    /// Objects put since creation.
    pub puts: u64,
    /// Objects found since creation.
    pub hits: u64,
    /// Objects not found since creation.
    pub misses: u64,
}

static LISTING: LazyLock<Listing> = LazyLock::new(|| {
    let line =
        |entry: &&store::Entry| (entry.name.to_string(), describe(entry.summary, entry.params, ""));
    Listing::new(STORES.iter().map(line))
});

/// Kinds of stores that kvmgr_store_create knows.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_store_count() -> usize {
    guard_or(0, || Ok(LISTING.len()))
}

/// The name of kind index; NULL past the end. Static.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_store_name(index: usize) -> *const c_char {
    guard_or(std::ptr::null(), || Ok(LISTING.name(index)))
}

/// A line about kind index: purpose and parameters; NULL past the end. Static.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_store_help(index: usize) -> *const c_char {
    guard_or(std::ptr::null(), || Ok(LISTING.help(index)))
}

/// Makes the store that spec names, such as "host(capacity=64mi)".
///
/// @param spec a NUL-terminated string
/// @param out_store receives a handle with one reference; NULL on failure
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_store_create(
    spec: *const c_char,
    out_store: *mut *mut kvmgr_store,
) -> kvmgr_status {
    guard(|| {
        // SAFETY: the caller passes a place for a pointer.
        let out = unsafe { convert::handle_output(out_store, "out_store") }?;
        // SAFETY: the caller passes NULL or a NUL-terminated string.
        let spec = unsafe { convert::required_text(spec, "spec") }?;
        let store = store::create(spec).map_err(|error| error.within("spec"))?;
        *out = handle::create(StoreHandle(store))?;
        Ok(())
    })
}

/// Makes a store out of the engine's functions. On failure destroy is not called.
///
/// @param user_data passed to every function
/// @param ops copied; need not outlive the call
/// @param out_store receives a handle with one reference; NULL on failure
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_store_create_custom(
    user_data: *mut c_void,
    ops: *const kvmgr_store_ops,
    out_store: *mut *mut kvmgr_store,
) -> kvmgr_status {
    guard(|| {
        // SAFETY: the caller passes a place for a pointer.
        let out = unsafe { convert::handle_output(out_store, "out_store") }?;
        // SAFETY: the caller passes NULL or a struct that starts with its size; NULL functions
        // are valid for all-zero bytes.
        let ops = unsafe { convert::config(ops, "kvmgr_store_ops") }?;
        let missing = [
            ("put", ops.put.is_none()),
            ("get", ops.get.is_none()),
            ("contains", ops.contains.is_none()),
            ("remove", ops.remove.is_none()),
        ];
        for (name, is_missing) in missing {
            ensure!(!is_missing, InvalidArgument, "kvmgr_store_ops.{name} is NULL");
        }
        *out = handle::create(StoreHandle(Arc::new(Custom { user_data, ops })))?;
        Ok(())
    })
}

/// Adds a reference; answers the same handle, or NULL if it is not a live store.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_store_retain(store: *mut kvmgr_store) -> *mut kvmgr_store {
    guard_or(std::ptr::null_mut(), || handle::retain(store))
}

/// Drops a reference. NULL is fine. Caches and preempted sequences keep their own.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_store_release(store: *mut kvmgr_store) {
    guard(|| handle::release(store));
}

/// Stores size bytes under a key of KVMGR_STORE_KEY_SIZE bytes, replacing what was there.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_store_put(
    store: *mut kvmgr_store,
    key: *const u8,
    bytes: *const c_void,
    size: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle, a key and `size` readable bytes.
    guard(|| unsafe {
        handle::with(store, |store| {
            let bytes = convert::slice(bytes.cast::<u8>(), size, "bytes")?;
            store.0.put(read_key(key)?, bytes)
        })
    })
}

/// Fills out, which has exactly the size of the object. KVMGR_NOT_FOUND if there is none.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_store_get(
    store: *mut kvmgr_store,
    key: *const u8,
    out: *mut c_void,
    size: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle, a key and `size` writable bytes.
    guard(|| unsafe {
        handle::with(store, |store| {
            let out = convert::slice_mut(out.cast::<u8>(), size, "out")?;
            found(store.0.get(read_key(key)?, out)?)
        })
    })
}

/// KVMGR_OK if the object exists, KVMGR_NOT_FOUND if not.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_store_contains(
    store: *mut kvmgr_store,
    key: *const u8,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a key.
    guard(|| unsafe { handle::with(store, |store| found(store.0.contains(read_key(key)?)?)) })
}

/// Forgets an object; KVMGR_OK also if there is none.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_store_remove(
    store: *mut kvmgr_store,
    key: *const u8,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a key.
    guard(|| unsafe { handle::with(store, |store| store.0.remove(read_key(key)?)) })
}

/// Numbers about a store.
///
/// @param out_stats its struct_size must be set; receives the numbers
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_store_get_stats(
    store: *const kvmgr_store,
    out_stats: *mut kvmgr_store_stats,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a struct that starts with its size.
    guard(|| unsafe {
        handle::with(store, |store| {
            let StoreStats { objects, bytes, puts, hits, misses } = store.0.stats();
            let stats = kvmgr_store_stats { struct_size: 0, objects, bytes, puts, hits, misses };
            convert::fill_struct(out_stats, &stats, "kvmgr_store_stats")
        })
    })
}

/// # Safety
/// `key` is NULL or 32 readable bytes.
unsafe fn read_key<'a>(key: *const u8) -> Result<&'a Key> {
    // SAFETY: the caller promises it.
    let bytes = unsafe { convert::slice(key, KVMGR_STORE_KEY_SIZE, "key") }?;
    bytes.try_into().map_err(|_| Error::new(Kind::Internal, "key has the wrong length"))
}

fn found(found: bool) -> Result<()> {
    ensure!(found, NotFound, "the store has no object of this key");
    Ok(())
}

/// The engine's store.
#[derive(Debug)]
struct Custom {
    user_data: *mut c_void,
    ops: kvmgr_store_ops,
}

// SAFETY: the engine promised that its functions may run on any thread, several at once.
unsafe impl Send for Custom {}
// SAFETY: as above.
unsafe impl Sync for Custom {}

impl Custom {
    fn check(&self, name: &str, status: kvmgr_status) -> Result<()> {
        if status == KVMGR_OK {
            return Ok(());
        }
        bail!(Store, "{name} of the engine's store answered {status}")
    }
}

impl Store for Custom {
    fn put(&self, key: &Key, bytes: &[u8]) -> Result<()> {
        let Some(put) = self.ops.put else { bail!(Internal, "put is NULL") };
        // SAFETY: the engine's function with its pointer, a key and readable bytes.
        let status =
            unsafe { put(self.user_data, key.as_ptr(), bytes.as_ptr().cast(), bytes.len()) };
        self.check("put", status)
    }

    fn get(&self, key: &Key, out: &mut [u8]) -> Result<bool> {
        let Some(get) = self.ops.get else { bail!(Internal, "get is NULL") };
        // SAFETY: the engine's function with its pointer, a key and writable bytes.
        let status =
            unsafe { get(self.user_data, key.as_ptr(), out.as_mut_ptr().cast(), out.len()) };
        if status == KVMGR_NOT_FOUND {
            return Ok(false);
        }
        self.check("get", status).map(|()| true)
    }

    fn contains(&self, key: &Key) -> Result<bool> {
        let Some(contains) = self.ops.contains else { bail!(Internal, "contains is NULL") };
        // SAFETY: the engine's function with its pointer and a key.
        let status = unsafe { contains(self.user_data, key.as_ptr()) };
        if status == KVMGR_NOT_FOUND {
            return Ok(false);
        }
        self.check("contains", status).map(|()| true)
    }

    fn remove(&self, key: &Key) -> Result<()> {
        let Some(remove) = self.ops.remove else { bail!(Internal, "remove is NULL") };
        // SAFETY: the engine's function with its pointer and a key.
        let status = unsafe { remove(self.user_data, key.as_ptr()) };
        self.check("remove", status)
    }

    fn stats(&self) -> StoreStats {
        StoreStats::default()
    }
}

impl Drop for Custom {
    fn drop(&mut self) {
        if let Some(destroy) = self.ops.destroy {
            // SAFETY: the last use of the engine's pointer.
            unsafe { destroy(self.user_data) };
        }
    }
}
