//! Real memory for blocks of different sizes.
//!
//! The arena is cut into equal chunks; a chunk serves slots of one size class at a time, one class
//! for each block format. A chunk without used slots goes back to the system, but for a spare one where
//! many are in use, so that what the accounting says is what the process holds.

use std::ptr::NonNull;
use std::sync::Arc;

use super::view::BlockView;
use crate::device::cuda::DeviceMemory;
use crate::device::host::{Arena, HUGE_PAGE, page_size};
use crate::error::{Result, ensure};

/// Limit from which on chunks are made of huge pages; below, they would be mostly empty.
const HUGE_FROM: usize = 32 * HUGE_PAGE;

/// Chunks in use from which on an empty one is kept.
const SPARE_FROM: usize = 8;

/// The memory that is handed out.
#[derive(Debug)]
enum Region {
    Host(Arena),
    /// Taken all at once, never touched here.
    Device(Arc<DeviceMemory>),
}

/// A slab allocator over one reserved address range. Exclusive access; no allocation of its own
/// after the first use of each chunk.
#[derive(Debug)]
pub(super) struct Slab {
    region: Region,
    chunk_bytes: usize,
    classes: Vec<Class>,
    chunks: Vec<Chunk>,
    free_chunks: Vec<u32>,
    /// An empty chunk that still has its pages, so that who takes new blocks before it lets go of old ones
    /// does not pay for clean pages each time. It counts as taken from the system.
    spare: Option<u32>,
    used_bytes: usize,
    limit: usize,
}

#[derive(Debug)]
struct Class {
    slot_bytes: usize,
    /// Chunks of this class with at least one free slot.
    partial: Vec<u32>,
    /// Their free slots.
    free: usize,
}

#[derive(Debug, Default)]
struct Chunk {
    class: usize,
    used: u32,
    free: Vec<u32>,
}

impl Slab {
    /// Memory for at most `limit` bytes of slots of the sizes `slot_bytes`.
    pub(super) fn new(slot_bytes: &[usize], limit: usize) -> Result<Self> {
        let largest = slot_bytes.iter().copied().max().unwrap_or(1);
        let smallest = slot_bytes.iter().copied().min().unwrap_or(1);
        ensure!(smallest > 0, Internal, "a block format of 0 bytes");
        // A chunk holds at least 8 slots, so that a class wastes little at its end.
        let is_large = limit >= HUGE_FROM;
        let page = if is_large { HUGE_PAGE } else { page_size() };
        let chunk_bytes = (largest * 8).max(64 << 10).next_multiple_of(page);
        // Each class may leave chunks partly used; twice the limit in addresses costs nothing.
        let chunks = limit.div_ceil(chunk_bytes).saturating_mul(2) + 2 * slot_bytes.len();
        ensure!(
            u32::try_from(chunks).is_ok() && u32::try_from(largest).is_ok(),
            InvalidArgument,
            "a memory limit of {limit} bytes in blocks of {largest} bytes is too large"
        );
        let arena = match chunks.saturating_mul(chunk_bytes) {
            bytes if is_large => Arena::reserve_huge(bytes)?,
            bytes => Arena::reserve(bytes)?,
        };
        Ok(Self::over(Region::Host(arena), slot_bytes, chunk_bytes, chunks, limit))
    }

    /// Slots of the sizes `slot_bytes` in all of `memory`.
    pub(super) fn on_device(slot_bytes: &[usize], memory: Arc<DeviceMemory>) -> Result<Self> {
        let largest = slot_bytes.iter().copied().max().unwrap_or(1);
        ensure!(slot_bytes.iter().all(|bytes| *bytes > 0), Internal, "a block format of 0 bytes");
        // One class leaves nothing unused; several share chunks, of which they waste little.
        let chunk_bytes = if slot_bytes.len() == 1 { largest } else { largest * 8 };
        let (limit, chunks) = (memory.len(), memory.len() / chunk_bytes);
        ensure!(
            chunks >= slot_bytes.len() && u32::try_from(chunks).is_ok(),
            InvalidArgument,
            "memory_limit is {limit}, must be at least {}: a few blocks of {largest} bytes",
            chunk_bytes * slot_bytes.len()
        );
        Ok(Self::over(Region::Device(memory), slot_bytes, chunk_bytes, chunks, limit))
    }

    fn over(
        region: Region,
        slot_bytes: &[usize],
        chunk_bytes: usize,
        chunks: usize,
        limit: usize,
    ) -> Self {
        let class = |&slot_bytes: &usize| Class { slot_bytes, partial: Vec::new(), free: 0 };
        Self {
            region,
            chunk_bytes,
            classes: slot_bytes.iter().map(class).collect(),
            chunks: (0..chunks).map(|_| Chunk::default()).collect(),
            free_chunks: (0..chunks as u32).rev().collect(),
            spare: None,
            used_bytes: 0,
            limit,
        }
    }

    fn address(&self, offset: usize) -> NonNull<u8> {
        match &self.region {
            Region::Host(arena) => arena.address(offset),
            Region::Device(memory) => {
                let address = memory.address() as usize + offset;
                NonNull::new(std::ptr::without_provenance_mut(address))
                    .unwrap_or(NonNull::dangling())
            }
        }
    }

    /// Bytes in slots handed out.
    pub(super) fn used_bytes(&self) -> usize {
        self.used_bytes
    }

    /// Bytes in chunks taken from the system; a device gives all at once.
    pub(super) fn committed_bytes(&self) -> usize {
        if let Region::Device(memory) = &self.region {
            return memory.len();
        }
        (self.chunks.len() - self.free_chunks.len()) * self.chunk_bytes
    }

    /// Whether `n` slots of `class` fit under the limit.
    pub(super) fn fits(&self, class: usize, n: usize) -> bool {
        let Class { slot_bytes, free, .. } = self.classes[class];
        let has_slots = match &self.region {
            Region::Host(_) => true, // Addresses are never short.
            Region::Device(_) => {
                free + self.free_chunks.len() * (self.chunk_bytes / slot_bytes) >= n
            }
        };
        has_slots && self.used_bytes + n * slot_bytes <= self.limit
    }

    /// A slot of `class`. The limit is the caller's to check with [`Self::fits`]: sealing needs
    /// both forms of a block for a moment, and must not fail for it.
    pub(super) fn allocate(&mut self, class: usize) -> Option<BlockView> {
        let slot_bytes = self.classes[class].slot_bytes;
        let chunk = match self.classes[class].partial.last() {
            Some(chunk) => *chunk,
            None => {
                let chunk = self.spare.take().or_else(|| self.free_chunks.pop())?;
                let slots = (self.chunk_bytes / slot_bytes) as u32;
                let entry = &mut self.chunks[chunk as usize];
                entry.class = class;
                entry.free.clear();
                entry.free.extend((0..slots).rev());
                self.classes[class].partial.push(chunk);
                self.classes[class].free += slots as usize;
                chunk
            }
        };
        let entry = &mut self.chunks[chunk as usize];
        let slot = entry.free.pop()?;
        entry.used += 1;
        self.classes[class].free -= 1;
        if entry.free.is_empty() {
            self.classes[class].partial.pop();
        }
        self.used_bytes += slot_bytes;
        let offset = chunk as usize * self.chunk_bytes + slot as usize * slot_bytes;
        let address = self.address(offset);
        Some(match self.region {
            Region::Host(_) => BlockView::new(address, slot_bytes, class as u8),
            Region::Device(_) => BlockView::on_device(address, slot_bytes, class as u8),
        })
    }

    /// Gives a slot back.
    pub(super) fn free(&mut self, view: BlockView) {
        if cfg!(debug_assertions) && !view.is_on_device() {
            // Nobody may see a recycled block's content: make it obvious if somebody does.
            view.write(0..view.len()).fill(0xFF);
        }
        let (chunk, slot) = self.locate(view.address(), view.format());
        let class = view.format();
        let entry = &mut self.chunks[chunk];
        entry.free.push(slot);
        entry.used -= 1;
        self.used_bytes -= self.classes[class].slot_bytes;
        self.classes[class].free += 1;
        let partial = &mut self.classes[class].partial;
        if entry.free.len() == 1 {
            partial.push(chunk as u32);
        }
        if entry.used == 0 {
            partial.retain(|other| *other as usize != chunk);
            self.classes[class].free -= self.chunks[chunk].free.len();
            self.retire(chunk as u32);
        }
    }

    /// Keeps an empty chunk as the spare one, and gives the one before back to the system; both if few
    /// are in use, beside which one more would not be little.
    fn retire(&mut self, chunk: u32) {
        let before = match self.region {
            Region::Host(_) => self.spare.replace(chunk),
            Region::Device(_) => Some(chunk),
        };
        self.give_back(before);
        let taken = self.chunks.len() - self.free_chunks.len();
        if taken <= SPARE_FROM {
            let spare = self.spare.take();
            self.give_back(spare);
        }
    }

    fn give_back(&mut self, chunk: Option<u32>) {
        let Some(chunk) = chunk else { return };
        self.free_chunks.push(chunk);
        if let Region::Host(arena) = &self.region {
            arena.discard(chunk as usize * self.chunk_bytes, self.chunk_bytes);
        }
    }

    fn locate(&self, address: NonNull<u8>, class: usize) -> (usize, u32) {
        let offset = address.addr().get() - self.address(0).addr().get();
        let slot = offset % self.chunk_bytes / self.classes[class].slot_bytes;
        (offset / self.chunk_bytes, slot as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_do_not_overlap_and_empty_chunks_go_back() {
        let mut slab = Slab::new(&[1000, 4096], 1 << 20).unwrap();
        let mut views = Vec::new();
        while slab.fits(0, 1) {
            let view = slab.allocate(views.len() % 2).unwrap();
            view.write(0..view.len()).fill(views.len() as u8);
            views.push(view);
        }
        for (i, view) in views.iter().enumerate() {
            assert!(view.bytes().iter().all(|byte| *byte == i as u8));
        }
        let used: usize = views.iter().map(BlockView::len).sum();
        assert_eq!(slab.used_bytes(), used);
        assert!(slab.committed_bytes() >= used);
        for view in views.drain(..).rev() {
            slab.free(view);
        }
        assert_eq!((slab.used_bytes(), slab.committed_bytes(), slab.spare), (0, 0, None));
        assert!(slab.classes.iter().all(|class| class.free == 0 && class.partial.is_empty()));
    }

    #[test]
    fn of_many_chunks_one_empty_one_is_kept_and_used_first() {
        let mut slab = Slab::new(&[8 << 10], 4 << 20).unwrap();
        let slots = slab.chunk_bytes / (8 << 10);
        let take = |slab: &mut Slab, chunks: usize| -> Vec<BlockView> {
            (0..chunks * slots).map(|_| slab.allocate(0).unwrap()).collect()
        };
        let chunks = |slab: &Slab| slab.committed_bytes() / slab.chunk_bytes;
        let (old, new) = (take(&mut slab, SPARE_FROM), take(&mut slab, 3));
        assert_eq!(chunks(&slab), SPARE_FROM + 3);
        let first = new[2 * slots].address();
        new.into_iter().for_each(|view| slab.free(view));
        assert_eq!(chunks(&slab), SPARE_FROM + 1, "one of three");
        assert_eq!(take(&mut slab, 1)[0].address(), first, "the one that became empty last");
        assert_eq!((chunks(&slab), slab.spare), (SPARE_FROM + 1, None));
        old.into_iter().for_each(|view| slab.free(view));
        assert_eq!((chunks(&slab), slab.spare), (1, None), "one beside one is much");
    }
}
