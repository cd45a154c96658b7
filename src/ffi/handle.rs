//! Handles: what C holds instead of pointers to Rust objects.
//!
//! A handle looks like a pointer but is never one: it is the number of a slot and the generation
//! of its occupant. A released handle, a handle of another type or a wild pointer is therefore
//! recognised without reading memory that may be gone, and an object that one thread releases
//! while another uses it lives until that call returns.
//!
//! ```text
//! handle = generation (32 bits) | slot + 1 (28 bits) | 0000
//! ```
//!
//! Two kinds exist:
//! * shared: `create / retain / release`, any thread;
//! * exclusive: `create / destroy`, around a lock that is only ever tried: a second thread gets
//!   `BUSY` instead of a data race.

use std::any::Any;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::error::{Result, bail, ensure};

/// The opaque type that C sees, and what is behind it.
pub(super) trait Opaque: Sized {
    /// The Rust object.
    type Inner: Send + Sync + 'static;
    /// The C name for messages.
    const NAME: &'static str;
}

/// Makes a handle with one reference.
pub(super) fn create<N: Opaque>(inner: N::Inner) -> Result<*mut N> {
    // The lock must be gone before `grow` takes it.
    let reused = FREE.lock().pop();
    let index = match reused {
        Some(index) => index,
        None => grow()?,
    };
    let Some(slot) = slot(index) else { bail!(Internal, "handle slot {index} is missing") };
    let mut slot = slot.write();
    slot.references = 1;
    slot.object = Some(Arc::new(Object { poisoned: AtomicBool::new(false), inner }));
    let value = u64::from(slot.generation) << 32 | u64::from(index + 1) << 4;
    Ok(std::ptr::without_provenance_mut(value as usize))
}

/// Runs `body` with the object of a live handle. A panic inside poisons the handle.
pub(super) fn with<N: Opaque, R>(
    handle: *const N,
    body: impl FnOnce(&N::Inner) -> Result<R>,
) -> Result<R> {
    let object = borrow(handle)?;
    let _poison = PoisonOnPanic(&object.object().poisoned);
    body(&object)
}

/// The object of a live handle; it lives at least as long as what is returned.
pub(super) fn borrow<N: Opaque>(handle: *const N) -> Result<Borrowed<N>> {
    let (slot, generation) = locate(handle)?;
    let slot = slot.read();
    ensure!(slot.generation == generation, InvalidHandle, "the {} has been released", N::NAME);
    let Some(object) = &slot.object else {
        bail!(InvalidHandle, "the {} has been released", N::NAME);
    };
    ensure!(object.is::<Object<N::Inner>>(), InvalidHandle, "the handle is not a {}", N::NAME);
    let borrowed = Borrowed { object: object.clone(), name: PhantomData::<N> };
    ensure!(
        !borrowed.object().poisoned.load(Ordering::Acquire),
        Internal,
        "the {} failed with an internal error before and cannot be used any more",
        N::NAME
    );
    Ok(borrowed)
}

/// Adds a reference to a shared handle.
pub(super) fn retain<N: Opaque>(handle: *mut N) -> Result<*mut N> {
    borrow(handle.cast_const())?;
    let (slot, generation) = locate(handle.cast_const())?;
    let mut slot = slot.write();
    ensure!(slot.generation == generation, InvalidHandle, "the {} has been released", N::NAME);
    slot.references += 1;
    Ok(handle)
}

/// Drops a reference; the last one ends the handle. NULL is fine. Exclusive handles have one.
pub(super) fn release<N: Opaque>(handle: *mut N) -> Result<()> {
    if handle.is_null() {
        return Ok(());
    }
    let (slot, generation) = locate(handle.cast_const())?;
    let mut entry = slot.write();
    let object = match &entry.object {
        Some(object) if entry.generation == generation => object,
        _ => bail!(InvalidHandle, "the {} has been released", N::NAME),
    };
    ensure!(object.is::<Object<N::Inner>>(), InvalidHandle, "the handle is not a {}", N::NAME);
    entry.references -= 1;
    if entry.references > 0 {
        return Ok(());
    }
    let object = entry.object.take();
    entry.generation = entry.generation.wrapping_add(1).max(1);
    drop(entry);
    // The object goes without any lock held: its end may run callbacks of the engine.
    drop(object);
    FREE.lock().push(index_of(handle.cast_const()));
    Ok(())
}

/// An object that is in use.
pub(super) struct Borrowed<N: Opaque> {
    object: Arc<dyn Any + Send + Sync>,
    name: PhantomData<N>,
}

impl<N: Opaque> Borrowed<N> {
    fn object(&self) -> &Object<N::Inner> {
        match self.object.downcast_ref() {
            Some(object) => object,
            None => unreachable!("the type was checked when the object was borrowed"),
        }
    }
}

impl<N: Opaque> Deref for Borrowed<N> {
    type Target = N::Inner;

    fn deref(&self) -> &N::Inner {
        &self.object().inner
    }
}

struct Object<T> {
    poisoned: AtomicBool,
    inner: T,
}

struct PoisonOnPanic<'a>(&'a AtomicBool);

impl Drop for PoisonOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Release);
        }
    }
}

/// A place for one object. Slots are made in chunks and never freed.
struct Slot {
    generation: u32,
    references: u32,
    object: Option<Arc<dyn Any + Send + Sync>>,
}

const CHUNK: usize = 1024;
const MAX_CHUNKS: usize = 4096;

static CHUNKS: [OnceLock<Box<[RwLock<Slot>]>>; MAX_CHUNKS] =
    [const { OnceLock::new() }; MAX_CHUNKS];
static FREE: Mutex<Vec<u32>> = Mutex::new(Vec::new());
static MADE: Mutex<usize> = Mutex::new(0);

/// Makes another chunk of slots; answers one of them and puts the others on the free list.
fn grow() -> Result<u32> {
    let mut made = MADE.lock();
    ensure!(*made < MAX_CHUNKS, OutOfMemory, "more than {} live handles", MAX_CHUNKS * CHUNK);
    let empty = || RwLock::new(Slot { generation: 1, references: 0, object: None });
    CHUNKS[*made].get_or_init(|| (0..CHUNK).map(|_| empty()).collect());
    let first = (*made * CHUNK) as u32;
    *made += 1;
    FREE.lock().extend((first + 1..first + CHUNK as u32).rev());
    Ok(first)
}

fn slot(index: u32) -> Option<&'static RwLock<Slot>> {
    let index = index as usize;
    CHUNKS.get(index / CHUNK)?.get()?.get(index % CHUNK)
}

fn index_of<N>(handle: *const N) -> u32 {
    ((handle.addr() & 0xFFFF_FFF0) as u32 >> 4).wrapping_sub(1)
}

fn locate<N: Opaque>(handle: *const N) -> Result<(&'static RwLock<Slot>, u32)> {
    ensure!(!handle.is_null(), InvalidHandle, "the {} is NULL", N::NAME);
    let is_handle = handle.addr() & 0xF == 0;
    match slot(index_of(handle)).filter(|_| is_handle) {
        Some(slot) => Ok((slot, (handle.addr() >> 32) as u32)),
        None => bail!(InvalidHandle, "the {} is not a handle of this library", N::NAME),
    }
}

const _: () = assert!(size_of::<usize>() == 8, "handles need 64-bit pointers");

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    struct Number;
    impl Opaque for Number {
        type Inner = Arc<u32>;
        const NAME: &'static str = "number";
    }
    struct Other;
    impl Opaque for Other {
        type Inner = String;
        const NAME: &'static str = "other";
    }

    fn kind<R>(result: Result<R>) -> Kind {
        result.err().unwrap().kind()
    }

    #[test]
    fn stale_foreign_and_wild_handles_are_recognised() {
        let object = Arc::new(5);
        let handle = create::<Number>(object.clone()).unwrap();
        assert_eq!(with(handle, |number| Ok(**number)).unwrap(), 5);
        assert_eq!(kind(with(handle.cast::<Other>(), |_| Ok(()))), Kind::InvalidHandle);
        assert_eq!(kind(release(handle.cast::<Other>())), Kind::InvalidHandle);
        retain(handle).unwrap();
        release(handle).unwrap();
        let held = borrow(handle.cast_const()).unwrap();
        release(handle).unwrap();
        assert_eq!((**held, Arc::strong_count(&object)), (5, 2), "alive while it is in use");
        drop(held);
        assert_eq!(Arc::strong_count(&object), 1);
        // The slot is used again; the old handle still names the old generation.
        let next = create::<Number>(object).unwrap();
        for stale in [handle, std::ptr::without_provenance_mut(16), std::ptr::dangling_mut()] {
            assert_eq!(kind(with(stale, |_| Ok(()))), Kind::InvalidHandle);
            assert_eq!(kind(release(stale)), Kind::InvalidHandle);
        }
        assert_eq!(kind(borrow::<Number>(std::ptr::null())), Kind::InvalidHandle);
        assert!(release::<Number>(std::ptr::null_mut()).is_ok());
        let local = 7u64;
        assert!(borrow(std::ptr::from_ref(&local).cast::<Number>()).is_err());
        release(next).unwrap();
    }

    #[test]
    fn a_panic_poisons_only_its_handle() {
        let (bad, good) =
            (create::<Other>("a".into()).unwrap(), create::<Other>("b".into()).unwrap());
        let call = || with(bad, |_| -> Result<()> { panic!("bug") });
        assert!(std::panic::catch_unwind(call).is_err());
        assert_eq!(kind(with(bad, |_| Ok(()))), Kind::Internal);
        assert!(with(good, |_| Ok(())).is_ok());
        release(bad).unwrap();
        release(good).unwrap();
    }
}
