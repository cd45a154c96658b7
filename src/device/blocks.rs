//! Blocks of one size in one reserved address range, owned by whoever holds the allocator.
//!
//! Unlike the slab of a cache, whose blocks are shared between sequences and threads, these belong
//! to one object: bytes are reached through a borrow of the allocator, so the borrow checker says
//! who may read and who may write.

#![expect(unsafe_code, reason = "views of a mapping that the allocator owns")]

use super::host::{Arena, HUGE_PAGE, page_size};
use crate::error::{Result, bail};

/// An allocator of blocks of `block_bytes` bytes. Addresses are reserved at once, memory is taken
/// when a block is first written and goes back when it is released.
#[derive(Debug)]
pub struct Blocks {
    arena: Arena,
    block_bytes: usize,
    /// Which blocks below `next` are in use.
    used: Vec<bool>,
    free: Vec<u32>,
    capacity: usize,
    num_used: usize,
    peak: usize,
    /// Whether pages become huge ones as soon as they are full.
    is_huge: bool,
}

impl Blocks {
    /// Room for `capacity` blocks. Blocks that come and go one by one should not be `huge`: single ones
    /// give no memory back out of a huge page.
    pub fn reserve(block_bytes: usize, capacity: usize, is_huge: bool) -> Result<Self> {
        let bytes = block_bytes.saturating_mul(capacity);
        let arena = if is_huge { Arena::reserve_aligned(bytes) } else { Arena::reserve(bytes) }?;
        let (used, free) = (Vec::new(), Vec::new());
        Ok(Self { arena, block_bytes, used, free, capacity, num_used: 0, peak: 0, is_huge })
    }

    /// A block of zeros.
    pub fn allocate(&mut self) -> Result<u32> {
        let index = match self.free.pop() {
            Some(index) => {
                self.used[index as usize] = true;
                // The pages at its ends may have been kept for a neighbour.
                self.bytes_mut(index).fill(0);
                index
            }
            None if self.used.len() < self.capacity => {
                self.fill_huge_page();
                self.used.push(true);
                self.used.len() as u32 - 1
            }
            None => bail!(OutOfBlocks, "all {} blocks are in use", self.capacity),
        };
        self.num_used += 1;
        self.peak = self.peak.max(self.num_used);
        Ok(index)
    }

    /// A block is about to be added at the end: if the last one filled a huge page, makes it one.
    fn fill_huge_page(&mut self) {
        let end = self.used.len() * self.block_bytes;
        let page = end / HUGE_PAGE;
        if self.is_huge && page > end.saturating_sub(self.block_bytes) / HUGE_PAGE {
            self.arena.collapse((page - 1) * HUGE_PAGE);
        }
    }

    /// Gives a block back.
    pub fn release(&mut self, index: u32) {
        let i = index as usize;
        assert!(self.used[i], "block {i} is not in use");
        self.used[i] = false;
        self.num_used -= 1;
        if self.num_used == 0 {
            return self.start_over();
        }
        self.free.push(index);
        self.discard(i);
    }

    /// Nothing is left: the next blocks come in order again, in fresh pages.
    fn start_over(&mut self) {
        let bytes = (self.used.len() * self.block_bytes).next_multiple_of(page_size());
        self.arena.discard(0, bytes);
        self.used.clear();
        self.free.clear();
    }

    /// Returns the pages of a block to the system: whole ones, and those that it shares only with
    /// blocks that are free as well.
    fn discard(&self, i: usize) {
        let page = page_size();
        let (start, end) = (i * self.block_bytes, (i + 1) * self.block_bytes);
        // A page is shared with direct neighbours alone only if blocks are not smaller than it.
        let is_free = |i: Option<usize>| {
            self.block_bytes >= page
                && i.is_some_and(|i| !self.used.get(i).copied().unwrap_or(false))
        };
        let first = match is_free(i.checked_sub(1)) {
            true => start / page * page,
            false => start.next_multiple_of(page),
        };
        let last = match is_free(Some(i + 1)) {
            true => end.next_multiple_of(page).min(self.arena.len()),
            false => end / page * page,
        };
        if first < last {
            self.arena.discard(first, last - first);
        }
    }

    /// The bytes of a block.
    pub fn bytes(&self, index: u32) -> &[u8] {
        let i = index as usize;
        assert!(self.used[i], "block {i} is not in use");
        let address = self.arena.address(i * self.block_bytes);
        // SAFETY: the block lies inside the mapping, which reads as zeros before it is written and
        // lives as long as `self`; writers borrow `self` exclusively.
        unsafe { std::slice::from_raw_parts(address.as_ptr(), self.block_bytes) }
    }

    /// The bytes of a block to write.
    pub fn bytes_mut(&mut self, index: u32) -> &mut [u8] {
        let i = index as usize;
        assert!(self.used[i], "block {i} is not in use");
        let address = self.arena.address(i * self.block_bytes);
        // SAFETY: inside the mapping, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(address.as_ptr(), self.block_bytes) }
    }

    /// Copies a block over another.
    pub fn copy(&mut self, source: u32, target: u32) {
        if source != target {
            // No split borrow can say that two blocks differ; blocks are small.
            let bytes = self.bytes(source).to_vec();
            self.bytes_mut(target).copy_from_slice(&bytes);
        }
    }

    /// Bytes of the blocks in use.
    pub fn used_bytes(&self) -> usize {
        self.num_used * self.block_bytes
    }

    /// The largest [`Self::used_bytes`] so far.
    pub fn peak_bytes(&self) -> usize {
        self.peak * self.block_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn blocks_keep_their_bytes_while_neighbours_come_and_go() {
        for block_bytes in [64, 4096, 5000, 9000] {
            let mut blocks = Blocks::reserve(block_bytes, 9, false).unwrap();
            let all: Vec<u32> = (0..9).map(|_| blocks.allocate().unwrap()).collect();
            assert_eq!(blocks.allocate().unwrap_err().kind(), Kind::OutOfBlocks);
            all.iter().for_each(|i| blocks.bytes_mut(*i).fill(*i as u8 + 1));
            // Out of order, so that both neighbours, one or none are free.
            for gone in [4, 3, 5, 0, 8, 1] {
                blocks.release(gone);
                for i in all.iter().filter(|i| blocks.used[**i as usize]) {
                    assert!(blocks.bytes(*i).iter().all(|byte| *byte == *i as u8 + 1));
                }
            }
            assert_eq!(blocks.used_bytes(), 3 * block_bytes);
            let fresh = blocks.allocate().unwrap();
            assert!(blocks.bytes(fresh).iter().all(|byte| *byte == 0));
            blocks.copy(2, fresh);
            assert_eq!(blocks.bytes(fresh), blocks.bytes(2));
            assert_eq!(blocks.peak_bytes(), 9 * block_bytes);
            [2, 6, 7, fresh].into_iter().for_each(|i| blocks.release(i));
            assert_eq!(blocks.allocate().unwrap(), 0, "they come in order again");
            assert!(blocks.bytes(0).iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "mmap flags")]
    fn blocks_keep_their_bytes_when_pages_become_huge() {
        let block_bytes = 100_000;
        let capacity = 4 * HUGE_PAGE / block_bytes + 3;
        let mut blocks = Blocks::reserve(block_bytes, capacity, true).unwrap();
        for i in 0..capacity {
            let index = blocks.allocate().unwrap();
            blocks.bytes_mut(index).fill(i as u8);
        }
        blocks.release(3);
        for i in (0..capacity).filter(|i| *i != 3) {
            assert!(blocks.bytes(i as u32).iter().all(|byte| *byte == i as u8));
        }
    }
}
