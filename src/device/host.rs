//! Host memory: one reserved address range whose pages cost nothing until they are written.

#![expect(unsafe_code, reason = "mmap")]

use std::ptr::{self, NonNull};

use crate::error::{Result, bail, ensure};

/// A private anonymous mapping. Reserving is free: the system gives a page when it is first
/// written and takes it back on [`Arena::discard`]. Addresses stay valid until the arena is
/// dropped, so a stale reader can see other bytes but never fault.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    bytes: usize,
    /// The whole mapping, which `base` may lie inside of.
    mapping: (NonNull<u8>, usize),
}

/// Bytes of a huge page. An arena that starts and hands out memory in these needs a five hundredth of
/// the address translations, which is a third of the time of attention over a long context.
pub const HUGE_PAGE: usize = 2 << 20;

// SAFETY: the arena owns its mapping; access to the bytes is governed by `cache::view`.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// Reserves `bytes`, rounded up to whole pages.
    pub fn reserve(bytes: usize) -> Result<Self> {
        let page = page_size();
        let bytes = bytes.max(1).next_multiple_of(page);
        ensure!(isize::try_from(bytes).is_ok(), OutOfMemory, "cannot reserve {bytes} bytes");
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh anonymous mapping at an address of the system's choice.
        let base = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            bail!(OutOfMemory, "cannot reserve {bytes} bytes of address space: {error}");
        }
        let Some(base) = NonNull::new(base.cast()) else {
            bail!(OutOfMemory, "the system mapped address 0");
        };
        Ok(Self { base, bytes, mapping: (base, bytes) })
    }

    /// Like [`Self::reserve_aligned`], and asks the system for huge pages. It may not have any; then
    /// memory comes in small ones.
    pub fn reserve_huge(bytes: usize) -> Result<Self> {
        let arena = Self::reserve_aligned(bytes)?;
        // SAFETY: the range is our own mapping; failure changes nothing.
        unsafe { libc::madvise(arena.base.as_ptr().cast(), arena.bytes, libc::MADV_HUGEPAGE) };
        Ok(arena)
    }

    /// Like [`Self::reserve`], but starts at a multiple of [`HUGE_PAGE`].
    pub fn reserve_aligned(bytes: usize) -> Result<Self> {
        let mut arena = Self::reserve(bytes.saturating_add(HUGE_PAGE))?;
        let skip = arena.base.addr().get().wrapping_neg() % HUGE_PAGE;
        arena.base = arena.address(skip);
        arena.bytes = bytes.max(1).next_multiple_of(page_size());
        Ok(arena)
    }

    /// Asks the system to move the small pages at `offset` to one huge page. It may not be able to;
    /// then they stay small.
    pub fn collapse(&self, offset: usize) {
        assert!(offset + HUGE_PAGE <= self.bytes && offset.is_multiple_of(HUGE_PAGE));
        let address = self.base.as_ptr().wrapping_add(offset);
        // SAFETY: the range lies inside our own mapping; failure changes nothing.
        unsafe { libc::madvise(address.cast(), HUGE_PAGE, libc::MADV_COLLAPSE) };
    }

    /// Bytes reserved.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Always false: an arena has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The address of the byte at `offset`.
    pub fn address(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.bytes, "offset {offset} outside an arena of {} bytes", self.bytes);
        // SAFETY: the offset lies inside the mapping.
        unsafe { self.base.add(offset) }
    }

    /// Gives the pages of a range back to the system; they read as zero afterwards. `offset` and
    /// `bytes` are multiples of [`page_size`].
    pub fn discard(&self, offset: usize, bytes: usize) {
        assert!(offset + bytes <= self.bytes && offset.is_multiple_of(page_size()));
        // SAFETY: the range lies inside our own mapping.
        unsafe {
            libc::madvise(
                self.base.as_ptr().wrapping_add(offset).cast(),
                bytes,
                libc::MADV_DONTNEED,
            );
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody uses it any more.
        unsafe { libc::munmap(self.mapping.0.as_ptr().cast(), self.mapping.1) };
    }
}

/// A list of `count` items, `item(0)` on, that never grows and is read at random places: in huge
/// pages where the system has them and the list is long enough.
pub fn large<T>(count: usize, item: impl FnMut(usize) -> T) -> Vec<T> {
    let mut list = Vec::<T>::with_capacity(count);
    let start = list.as_ptr().addr();
    let first = start.next_multiple_of(HUGE_PAGE);
    let end = (start + count * size_of::<T>()) / HUGE_PAGE * HUGE_PAGE;
    if first < end {
        let place = list.as_mut_ptr().with_addr(first).cast();
        // SAFETY: whole pages inside the list's own memory; failure changes nothing.
        unsafe { libc::madvise(place, end - first, libc::MADV_HUGEPAGE) };
    }
    list.extend((0..count).map(item));
    list
}

/// Bytes of a page of the system.
pub fn page_size() -> usize {
    // SAFETY: no preconditions.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "mmap flags")]
    fn discarded_pages_read_as_zero() {
        let arena = Arena::reserve(10 * page_size() + 1).unwrap();
        assert_eq!(arena.len(), 11 * page_size());
        let address = arena.address(3 * page_size());
        // SAFETY: inside the arena, and this test is the only user.
        unsafe {
            address.write(7);
            arena.discard(3 * page_size(), page_size());
            assert_eq!(address.read(), 0);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "mmap flags")]
    fn huge_arenas_start_at_huge_pages_and_can_be_used_to_their_end() {
        let arena = Arena::reserve_huge(3 * HUGE_PAGE + 1).unwrap();
        assert_eq!(arena.address(0).addr().get() % HUGE_PAGE, 0);
        assert_eq!(arena.len(), 3 * HUGE_PAGE + page_size());
        // SAFETY: inside the arena, and this test is the only user.
        unsafe { arena.address(arena.len() - 1).write(7) };
        arena.discard(HUGE_PAGE, HUGE_PAGE);
        assert!(Arena::reserve_huge(usize::MAX / 2).is_err());
    }

    #[test]
    #[cfg_attr(miri, ignore = "madvise flags")]
    fn large_lists_hold_what_they_are_given() {
        for count in [0, 3, 3 * HUGE_PAGE / 8] {
            let list = large(count, |i| i as u64);
            assert!(list.iter().enumerate().all(|(i, item)| *item == i as u64));
            assert_eq!((list.len(), list.capacity()), (count, count));
        }
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        assert!(Arena::reserve(usize::MAX / 2).is_err());
    }
}
