//! Handles: the only place that turns a C pointer into a Rust object.
//!
//! A handle starts with a tag, so that a wrong type or a released handle is an answer instead of a
//! crash as long as its memory has not been reused. Two kinds exist:
//! * shared: an `Arc`, `create / retain / release`, used from any thread;
//! * exclusive: a `Box` around a lock that is only ever tried, `create / destroy`; a second thread
//!   gets `BUSY` instead of a data race.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::error::{Result, bail, ensure};

/// The memory behind a handle.
#[derive(Debug)]
#[repr(C)]
pub struct Handle<T> {
    tag: AtomicU64,
    poisoned: AtomicBool,
    inner: T,
}

/// What a handle type is called and how it is recognised.
pub(super) trait Tagged {
    /// Eight letters that start the memory of a live handle.
    const TAG: u64;
    /// The C name for messages.
    const NAME: &'static str;
}

/// A tag from eight letters.
pub(super) const fn tag(letters: &[u8; 8]) -> u64 {
    u64::from_le_bytes(*letters)
}

const DEAD: u64 = tag(b"released");

impl<T: Tagged> Handle<T> {
    fn new(inner: T) -> Self {
        Self { tag: AtomicU64::new(T::TAG), poisoned: AtomicBool::new(false), inner }
    }

    /// Makes a shared handle with one reference.
    pub(super) fn shared(inner: T) -> *mut Self {
        Arc::into_raw(Arc::new(Self::new(inner))).cast_mut()
    }

    /// Makes an exclusive handle.
    pub(super) fn exclusive(inner: T) -> *mut Self {
        Box::into_raw(Box::new(Self::new(inner)))
    }

    /// Runs `body` with the object of a live handle. A panic inside poisons the handle.
    ///
    /// # Safety
    /// `handle` is NULL, or points to 8 readable aligned bytes and, if they are this type's tag,
    /// to a live handle of this type.
    pub(super) unsafe fn with<R>(
        handle: *const Self,
        body: impl FnOnce(&T) -> Result<R>,
    ) -> Result<R> {
        // SAFETY: the caller promises it.
        let handle = unsafe { Self::check(handle) }?;
        ensure!(
            !handle.poisoned.load(Ordering::Acquire),
            Internal,
            "the {} failed with an internal error before and cannot be used any more",
            T::NAME
        );
        struct Poison<'a>(&'a AtomicBool);
        impl Drop for Poison<'_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.store(true, Ordering::Release);
                }
            }
        }
        let _poison = Poison(&handle.poisoned);
        body(&handle.inner)
    }

    /// Adds a reference to a shared handle.
    ///
    /// # Safety
    /// As for [`Self::with`]; the handle is shared.
    pub(super) unsafe fn retain(handle: *mut Self) -> Result<*mut Self> {
        // SAFETY: the caller promises it.
        unsafe { Self::check(handle) }?;
        // SAFETY: a live shared handle is an `Arc` made by `shared`.
        unsafe { Arc::increment_strong_count(handle.cast_const()) };
        Ok(handle)
    }

    /// Drops a reference of a shared handle; NULL is fine.
    ///
    /// # Safety
    /// As for [`Self::with`]; the handle is shared, and the caller owns a reference.
    pub(super) unsafe fn release(handle: *mut Self) -> Result<()> {
        if handle.is_null() {
            return Ok(());
        }
        // SAFETY: the caller promises it.
        unsafe { Self::check(handle) }?;
        // SAFETY: a live shared handle is an `Arc` made by `shared`.
        let arc = unsafe { Arc::from_raw(handle.cast_const()) };
        if let Some(last) = Arc::into_inner(arc) {
            last.tag.store(DEAD, Ordering::Release);
        }
        Ok(())
    }

    /// Ends an exclusive handle; NULL is fine.
    ///
    /// # Safety
    /// As for [`Self::with`]; the handle is exclusive, and nobody uses it now or later.
    pub(super) unsafe fn destroy(handle: *mut Self) -> Result<()> {
        if handle.is_null() {
            return Ok(());
        }
        // SAFETY: the caller promises it.
        unsafe { Self::check(handle) }?;
        // SAFETY: a live exclusive handle is a `Box` made by `exclusive`.
        let owned = unsafe { Box::from_raw(handle) };
        // Volatile in effect: the tag is gone before the memory is, so that a second destroy is
        // recognised as long as nobody has reused it.
        owned.tag.store(DEAD, Ordering::SeqCst);
        Ok(())
    }

    /// # Safety
    /// As for [`Self::with`].
    unsafe fn check<'a>(handle: *const Self) -> Result<&'a Self> {
        ensure!(!handle.is_null(), InvalidHandle, "the {} is NULL", T::NAME);
        ensure!(handle.is_aligned(), InvalidHandle, "the {} is not a handle", T::NAME);
        // SAFETY: the caller promises 8 readable aligned bytes.
        let found = unsafe { (*handle.cast::<AtomicU64>()).load(Ordering::Acquire) };
        if found == DEAD {
            bail!(InvalidHandle, "the {} has been released", T::NAME);
        }
        if found != T::TAG {
            bail!(InvalidHandle, "the handle is not a {}", T::NAME);
        }
        // SAFETY: the tag is this type's, so the caller promises a live handle of it.
        Ok(unsafe { &*handle })
    }
}

/// An object that one thread changes at a time. Trying instead of waiting turns a broken thread
/// rule into an error.
#[derive(Debug)]
pub(super) struct Exclusive<T>(RwLock<T>);

impl<T> Exclusive<T> {
    pub(super) fn new(inner: T) -> Self {
        Self(RwLock::new(inner))
    }

    /// Exclusive access, or `Busy`.
    pub(super) fn write(&self, name: &str) -> Result<RwLockWriteGuard<'_, T>> {
        match self.0.try_write() {
            Some(guard) => Ok(guard),
            None => bail!(Busy, "the {name} is in use by another thread"),
        }
    }

    /// Shared access next to other readers, or `Busy`.
    pub(super) fn read(&self, name: &str) -> Result<RwLockReadGuard<'_, T>> {
        match self.0.try_read() {
            Some(guard) => Ok(guard),
            None => bail!(Busy, "the {name} is being changed by another thread"),
        }
    }
}
