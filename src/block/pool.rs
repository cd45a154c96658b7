//! The block pool: who refers to which block, which blocks are free, and which prefixes are known.
//!
//! The pool knows numbers, not memory. A block is in one of three states:
//!
//! ```text
//! free --allocate--> used --last release--> free
//!                     |  ^
//!            register v  | hold
//!                    cached, held --last unhold--> cached, idle --evict--> free
//! ```
//!
//! A prefix *entry* is one full block of tokens in every lane of a sequence: a bundle of one block
//! for each lane. The entry is named by its first block and owns one reference to each; a sequence
//! that matched or registered the entry owns its own references and counts as a holder. Entries
//! without a holder are idle: an evictor orders them, and they are reclaimed when blocks run out.
//!
//! Everything lies in flat arrays made once: for each block a record (64 bytes, one cache
//! line, the digest included), a place in the index (12), in the free list (4), in the memory of
//! evicted prefixes (1), and what the evictor keeps (8 to 14).
//!
//! Lookups need shared access only: they add to atomic counts (`counts`) and leave the
//! evictor alone, which therefore may name held blocks; those are passed over when they come up.

use super::counts::{Counts, Snapshot};
use super::events::{EventFormat, EventStream, Journal};
use super::index::Index;
use super::partial::Partial;
use super::prefix::Digest;
use crate::device::host;
use crate::error::{Result, ensure};
use crate::evictor::{Evictor, Idle};
use crate::simd::prefetch;
use crate::sync::{AtomicUsize, Ordering};

/// Names a block of a pool: an index below its number of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// Names a prefix entry: the first block of its bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EntryId(pub u32);

/// What became of a block when a reference went away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Released {
    /// Somebody still uses it.
    Used,
    /// Only its prefix entry refers to it.
    Idle,
    /// It is free.
    Freed,
}

/// How long an idle prefix should stay, next to others.
pub const DEFAULT_PRIORITY: u8 = 35;

/// The highest priority.
pub const MAX_PRIORITY: u8 = 100;

/// No block: ends a bundle.
pub(super) const NONE: u32 = u32::MAX;

/// The state of every block in flat arrays. The owner puts a reader-writer lock around it.
#[derive(Debug)]
pub struct BlockPool {
    pub(super) records: Vec<Record>,
    free: Vec<u32>,
    pub(super) index: Index,
    pub(super) evictor: Box<dyn Evictor>,
    pub(super) idle_blocks: AtomicUsize,
    pub(super) evictions: u64,
    /// Tags of evicted prefixes, so that a miss can be told from a prefix never seen.
    pub(super) evicted: Vec<u32>,
    /// Entries that came and went, if somebody listens.
    pub(super) journal: Option<Box<Journal>>,
    /// Tokens of entries, if blocks are reused in part.
    pub(super) partial: Option<Box<Partial>>,
    /// Blocks handed out that somebody had before, if somebody wants to wipe them.
    recycled: Option<Vec<u32>>,
}

/// What is known of a block, in one cache line.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Record {
    pub(super) counts: Counts,
    /// Grows when the block is freed, so that stale names are recognised.
    pub(super) generation: u32,
    /// Next block of the bundle, `NONE` at its end.
    pub(super) sibling: u32,
    /// Blocks of the chain up to and including this one.
    pub(super) depth: u32,
    /// The tag under which the index has the entry.
    pub(super) tag: u32,
    /// Whether an entry owns a reference.
    pub(super) cached: bool,
    pub(super) priority: u8,
    /// The group of a hybrid model that the entry belongs to.
    pub(super) group: u8,
    /// [`REUSED`] and [`DOOMED`].
    pub(super) flags: u8,
    /// What the entry is found by. A block without an entry may have one too: the digest of the
    /// tokens that it holds a second copy of.
    pub(super) digest: Digest,
}

/// The entry has been idle before.
pub(super) const REUSED: u8 = 1;
/// The users of the entry said that they will not come back.
pub(super) const DOOMED: u8 = 2;

#[cfg(not(loom))]
const _: () = assert!(size_of::<Record>() == 64);

impl BlockPool {
    /// A pool of `num_blocks` free blocks whose idle entries `evictor` orders.
    pub fn new(num_blocks: usize, evictor: Box<dyn Evictor>) -> Self {
        let empty = |_| Record {
            counts: Counts::new(),
            generation: 0,
            sibling: NONE,
            depth: 0,
            tag: 0,
            cached: false,
            priority: DEFAULT_PRIORITY,
            group: 0,
            flags: 0,
            digest: [0; 32],
        };
        Self {
            records: host::large(num_blocks, empty),
            // Popped from the end: low numbers first, and the block freed last is used next.
            free: host::large(num_blocks, |i| (num_blocks - 1 - i) as u32),
            index: Index::new(num_blocks),
            evictor,
            idle_blocks: AtomicUsize::new(0),
            evictions: 0,
            evicted: vec![0; num_blocks / 4 + 64],
            journal: None,
            partial: None,
            recycled: None,
        }
    }

    /// Writes down from now on which blocks are handed out with the bytes of somebody before.
    pub fn watch_recycled(&mut self) {
        self.recycled = Some(Vec::new());
    }

    /// The blocks handed out since the last call whose bytes are those of somebody before, if
    /// [`Self::watch_recycled`] was called; in order, and twice if they went back meanwhile.
    pub fn take_recycled(&mut self) -> Option<Vec<u32>> {
        self.recycled.as_mut().map(std::mem::take)
    }

    /// How many blocks [`Self::take_recycled`] would answer.
    pub fn num_recycled(&self) -> Option<usize> {
        self.recycled.as_ref().map(Vec::len)
    }

    /// Writes down from now on which entries come and go, for [`Self::publish`].
    pub fn listen(&mut self, format: EventFormat) {
        self.journal = Some(Box::new(Journal::new(format)));
    }

    /// Remembers the tokens of entries from now on, so that a prompt that parts from all of them
    /// within a block can copy the rows before. For one full group.
    pub fn remember_tokens(&mut self, block_size: usize) {
        self.partial = Some(Box::new(Partial::new(self.num_blocks(), block_size)));
    }

    /// Makes a batch of what has happened since the last one, stamped with `seconds`. Answers its
    /// number and its bytes, or `None` if nothing happened or nobody listens.
    pub fn publish(&mut self, seconds: f64) -> Option<(u64, &[u8])> {
        self.journal.as_mut()?.publish(seconds)
    }

    /// The batches so far, if somebody listens.
    pub fn events(&self) -> Option<&EventStream> {
        Some(self.journal.as_ref()?.stream())
    }

    /// Blocks in the pool.
    pub fn num_blocks(&self) -> usize {
        self.records.len()
    }

    /// Blocks that nobody refers to.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that only a prefix entry refers to.
    pub fn num_idle(&self) -> usize {
        self.idle_blocks.load(Ordering::Relaxed)
    }

    /// Blocks that can be allocated: free ones and those of idle entries.
    pub fn num_available(&self) -> usize {
        self.num_free() + self.num_idle()
    }

    /// Prefix entries, held and idle.
    pub fn num_entries(&self) -> usize {
        self.index.len()
    }

    /// Entries reclaimed since creation.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Bytes of bookkeeping, the evictor's included.
    pub fn metadata_bytes(&self) -> usize {
        let n = self.num_blocks();
        n * (size_of::<Record>() + size_of::<u32>())
            + self.index.bytes()
            + self.evicted.len() * size_of::<u32>()
            + self.evictor.bytes()
            + self.partial.as_ref().map_or(0, |partial| partial.bytes())
    }

    /// References to `block`, its entry's included.
    pub fn refs(&self, block: BlockId) -> u32 {
        self.records[block.0 as usize].counts.get().refs
    }

    /// How often `block` has been freed: with its number it names one life of it.
    pub fn generation(&self, block: BlockId) -> u32 {
        self.records[block.0 as usize].generation
    }

    /// Whether an entry owns `block`.
    pub fn is_cached(&self, block: BlockId) -> bool {
        self.records[block.0 as usize].cached
    }

    /// Appends `n` blocks with one reference each to `out`, or none at all.
    pub fn allocate(&mut self, n: usize, out: &mut Vec<BlockId>) -> Result<()> {
        let free = self.free.len();
        ensure!(
            n <= free,
            OutOfBlocks,
            "need {n} blocks, {free} of {} are free",
            self.num_blocks()
        );
        for id in self.free.drain(free - n..).rev() {
            let record = &mut self.records[id as usize];
            record.counts.set(Snapshot { refs: 1, holders: 0 });
            out.push(BlockId(id));
        }
        Ok(())
    }

    pub(super) fn put_free(&mut self, id: u32) {
        let record = &mut self.records[id as usize];
        record.generation = record.generation.wrapping_add(1);
        self.free.push(id);
    }

    /// The free blocks.
    pub(super) fn free_list(&self) -> &[u32] {
        &self.free
    }

    /// One block with one reference, from the free list or from the next idle entry.
    pub fn take(&mut self) -> Option<BlockId> {
        while self.free.is_empty() {
            self.evict_one()?;
        }
        let id = self.free.pop()?;
        let record = &mut self.records[id as usize];
        record.counts.set(Snapshot { refs: 1, holders: 0 });
        if let Some(recycled) = &mut self.recycled
            && record.generation > 0
        {
            recycled.push(id);
        }
        Some(BlockId(id))
    }

    /// Shared: adds a reference. Answers whether the block was idle before.
    pub fn retain(&self, block: BlockId) -> bool {
        let record = &self.records[block.0 as usize];
        let before = record.counts.add(false);
        assert!(before.refs > 0, "retain of a free block");
        let was_idle = record.cached && before.refs == 1;
        self.idle_blocks.fetch_sub(usize::from(was_idle), Ordering::Relaxed);
        was_idle
    }

    /// Drops a reference.
    pub fn release(&mut self, id: BlockId) -> Released {
        let record = &mut self.records[id.0 as usize];
        match record.counts.sub_exclusive(1, 0).refs {
            0 => {
                self.put_free(id.0);
                Released::Freed
            }
            1 if record.cached => {
                self.add_idle(1, 0);
                Released::Idle
            }
            _ => Released::Used,
        }
    }

    /// Adds a reference to a block of a table, and a hold if the block is an entry.
    pub fn share(&mut self, id: u32) {
        let record = &mut self.records[id as usize];
        let was_idle = record.cached && record.counts.get().refs == 1;
        let holders = u32::from(record.cached);
        record.counts.add_exclusive(1, holders);
        self.add_idle(0, usize::from(was_idle));
    }

    /// Drops what [`Self::share`], [`Self::find_held`] or [`Self::register_one`] gave.
    pub fn unshare(&mut self, id: u32) {
        let mut idle = 0;
        if let Some(entry) = self.drop_user(id, &mut idle) {
            self.evictor.insert(entry);
        }
        self.add_idle(idle, 0);
    }

    /// Drops all of `ids` but `u32::MAX`, the last one first, so that leaves are reclaimed before their
    /// parents. Memory works ahead.
    pub fn unshare_run(&mut self, ids: &[u32]) {
        const BATCH: usize = 8;
        const AHEAD: usize = 4;
        let mut idle = 0;
        let mut entries = [Idle::default(); BATCH];
        let mut ahead = ids.rchunks(BATCH);
        (0..AHEAD).for_each(|_| self.prefetch(ahead.next()));
        for batch in ids.rchunks(BATCH) {
            self.prefetch(ahead.next());
            let mut num_entries = 0;
            for id in batch.iter().rev().filter(|id| **id != NONE) {
                if let Some(entry) = self.drop_user(*id, &mut idle) {
                    entries[num_entries] = entry;
                    num_entries += 1;
                }
            }
            self.evictor.insert_all(&entries[..num_entries]);
        }
        self.add_idle(idle, 0);
    }

    /// Asks memory for what dropping `ids` will touch.
    fn prefetch(&self, ids: Option<&[u32]>) {
        let Some(ids) = ids else { return };
        ids.iter().for_each(|id| prefetch(&self.records, *id as usize));
        self.evictor.prefetch(ids);
    }

    /// Drops a reference, and a hold if the block is an entry. Answers the entry if nobody holds it
    /// any more, and counts it in `idle` if nobody refers to its block either.
    fn drop_user(&mut self, id: u32, idle: &mut usize) -> Option<Idle> {
        let record = &mut self.records[id as usize];
        if !record.cached {
            if record.counts.sub_exclusive(1, 0).refs == 0 {
                self.put_free(id);
            }
            return None;
        }
        let left = record.counts.sub_exclusive(1, 1);
        (left.holders == 0).then(|| {
            *idle += usize::from(left.refs == 1);
            self.enlist(id)
        })
    }

    /// Exclusive: counts idle blocks without the price of an atomic addition.
    pub(super) fn add_idle(&mut self, more: usize, fewer: usize) {
        if more != fewer {
            let idle = self.idle_blocks.load(Ordering::Relaxed);
            self.idle_blocks.store(idle + more - fewer, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
