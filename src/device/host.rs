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
}

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
        Ok(Self { base, bytes })
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
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
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
    fn an_impossible_size_is_an_error() {
        assert!(Arena::reserve(usize::MAX / 2).is_err());
    }
}
