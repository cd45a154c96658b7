//! The one place that turns the address of a block into bytes.
//!
//! Who may touch a block is decided by its life cycle, not by the borrow checker:
//! * a sealed block never changes, so any number of readers may share it;
//! * an open block belongs to one sequence; its rows are written by workers that own disjoint
//!   (cell, row) pairs, and read only after the engine's barrier between append and run.
//!
//! The memory outlives every view because each holder of views also holds the cache.
//!
//! Blocks in device memory have views as well, but these are addresses for the device alone: to
//! read or write one here is a bug.

#![expect(unsafe_code, reason = "the single helper that views block memory")]

use std::ops::Range;
use std::ptr::NonNull;

/// The bytes of a block and the format they are in. Copies freely, like a pointer.
#[derive(Debug, Clone, Copy)]
pub struct BlockView {
    address: NonNull<u8>,
    bytes: u32,
    format: u8,
    is_on_device: bool,
}

// SAFETY: a view is an address; the module comment states who may use it when.
unsafe impl Send for BlockView {}
// SAFETY: as above.
unsafe impl Sync for BlockView {}

impl BlockView {
    /// A view of `bytes` bytes at `address`, which live as long as the cache that made them.
    pub(super) fn new(address: NonNull<u8>, bytes: usize, format: u8) -> Self {
        Self { address, bytes: bytes as u32, format, is_on_device: false }
    }

    /// A view of `bytes` bytes of device memory.
    pub(super) fn on_device(address: NonNull<u8>, bytes: usize, format: u8) -> Self {
        Self { is_on_device: true, ..Self::new(address, bytes, format) }
    }

    /// The view of a block without memory.
    pub fn none() -> Self {
        Self { address: NonNull::dangling(), bytes: 0, format: 0, is_on_device: false }
    }

    /// The index of the format in the cache's list.
    pub fn format(&self) -> usize {
        usize::from(self.format)
    }

    /// Bytes of the block.
    pub fn len(&self) -> usize {
        self.bytes as usize
    }

    /// Whether the block has no memory.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The address, which identifies the storage.
    pub(super) fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// Whether the bytes are in device memory.
    pub(super) fn is_on_device(&self) -> bool {
        self.is_on_device
    }

    /// Bytes of the block to read.
    pub fn read(&self, range: Range<usize>) -> &[u8] {
        self.check(&range);
        // SAFETY: inside the block (checked), initialised by the system or a writer, and not
        // written meanwhile by the rules in the module comment.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr().add(range.start), range.len()) }
    }

    /// Every byte of the block.
    pub fn bytes(&self) -> &[u8] {
        self.read(0..self.len())
    }

    /// Bytes of an open block to write.
    #[expect(clippy::mut_from_ref, reason = "a view is a pointer; see the module comment")]
    pub fn write(&self, range: Range<usize>) -> &mut [u8] {
        self.check(&range);
        // SAFETY: inside the block (checked), and this worker alone uses the range by the rules in
        // the module comment.
        unsafe {
            std::slice::from_raw_parts_mut(self.address.as_ptr().add(range.start), range.len())
        }
    }

    fn check(&self, range: &Range<usize>) {
        assert!(!self.is_on_device, "the host does not read or write device memory");
        assert!(
            range.start <= range.end && range.end <= self.len(),
            "bytes {range:?} outside a block of {}",
            self.len()
        );
    }
}
