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

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::prefix::Digest;
use crate::error::{Result, ensure};
use crate::evictor::Evictor;

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

/// No block: ends a bundle.
const NONE: u32 = u32::MAX;

/// The state of every block in flat arrays. Exclusive access; the owner puts a lock around it.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<u32>,
    digests: Vec<Digest>,
    index: HashMap<Digest, u32, BuildHasherDefault<DigestHasher>>,
    evictor: Box<dyn Evictor>,
    idle_blocks: usize,
    evictions: u64,
}

#[derive(Debug, Clone, Copy)]
struct Block {
    /// References of sequences, plus one while an entry owns the block.
    refs: u32,
    /// Sequences that hold the entry named by this block.
    holders: u32,
    /// Next block of the bundle, `NONE` at its end.
    sibling: u32,
    /// Whether an entry owns a reference.
    cached: bool,
}

impl BlockPool {
    /// A pool of `num_blocks` free blocks whose idle entries `evictor` orders.
    pub fn new(num_blocks: usize, evictor: Box<dyn Evictor>) -> Self {
        let empty = Block { refs: 0, holders: 0, sibling: NONE, cached: false };
        Self {
            blocks: vec![empty; num_blocks],
            // Popped from the end: low numbers first, and the block freed last is used next.
            free: (0..num_blocks as u32).rev().collect(),
            digests: vec![[0; 32]; num_blocks],
            index: HashMap::with_capacity_and_hasher(num_blocks, BuildHasherDefault::default()),
            evictor,
            idle_blocks: 0,
            evictions: 0,
        }
    }

    /// Blocks in the pool.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody refers to.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that only a prefix entry refers to.
    pub fn num_idle(&self) -> usize {
        self.idle_blocks
    }

    /// Prefix entries, held and idle.
    pub fn num_entries(&self) -> usize {
        self.index.len()
    }

    /// Entries reclaimed since creation.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// References to `block`, its entry's included.
    pub fn refs(&self, block: BlockId) -> u32 {
        self.blocks[block.0 as usize].refs
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
            self.blocks[id as usize] = Block { refs: 1, holders: 0, sibling: NONE, cached: false };
            out.push(BlockId(id));
        }
        Ok(())
    }

    /// Adds a reference. Answers whether the block was idle before.
    pub fn retain(&mut self, block: BlockId) -> bool {
        let block = &mut self.blocks[block.0 as usize];
        assert!(block.refs > 0, "retain of a free block");
        block.refs += 1;
        let was_idle = block.cached && block.refs == 2;
        self.idle_blocks -= usize::from(was_idle);
        was_idle
    }

    /// Drops a reference.
    pub fn release(&mut self, id: BlockId) -> Released {
        let block = &mut self.blocks[id.0 as usize];
        assert!(block.refs > 0, "release of a free block");
        block.refs -= 1;
        match block.refs {
            0 => {
                self.free.push(id.0);
                Released::Freed
            }
            1 if block.cached => {
                self.idle_blocks += 1;
                Released::Idle
            }
            _ => Released::Used,
        }
    }

    /// Makes `blocks`, one for each lane and none of them cached yet, the entry for `digest`, held
    /// once. `None` if the digest is known already: the caller keeps its blocks to itself.
    pub fn register(&mut self, digest: &Digest, blocks: &[BlockId]) -> Option<EntryId> {
        let head = blocks.first()?.0;
        let fresh = |id: &BlockId| {
            let block = &self.blocks[id.0 as usize];
            block.refs > 0 && !block.cached
        };
        if self.index.contains_key(digest) || !blocks.iter().all(fresh) {
            return None;
        }
        for (i, id) in blocks.iter().enumerate() {
            let block = &mut self.blocks[id.0 as usize];
            block.refs += 1;
            block.cached = true;
            block.sibling = blocks.get(i + 1).map_or(NONE, |next| next.0);
        }
        self.blocks[head as usize].holders = 1;
        self.digests[head as usize] = *digest;
        self.index.insert(*digest, head);
        Some(EntryId(head))
    }

    /// The entry for `digest`, if it is known. Changes nothing; [`Self::hold`] takes it.
    pub fn lookup(&self, digest: &Digest) -> Option<EntryId> {
        self.index.get(digest).copied().map(EntryId)
    }

    /// Adds a holder to `entry` and a reference to each of its blocks, appended to `out` in lane
    /// order with whether each was idle before.
    pub fn hold(&mut self, entry: EntryId, out: &mut Vec<(BlockId, bool)>) {
        let head = &mut self.blocks[entry.0 as usize];
        if head.holders == 0 {
            self.evictor.remove(entry.0);
        }
        head.holders += 1;
        let mut id = entry.0;
        while id != NONE {
            let was_idle = self.retain(BlockId(id));
            out.push((BlockId(id), was_idle));
            id = self.blocks[id as usize].sibling;
        }
    }

    /// Removes a holder of `entry`. The holder's block references are released apart from this.
    /// Call it for the last block of a chain first, so that leaves are reclaimed first.
    pub fn unhold(&mut self, entry: EntryId) {
        let head = &mut self.blocks[entry.0 as usize];
        assert!(head.holders > 0, "unhold of an idle entry");
        head.holders -= 1;
        if head.holders == 0 {
            self.evictor.insert(entry.0);
        }
    }

    /// Starts to reclaim the next idle entry: it can no longer be found, but keeps its blocks
    /// until [`Self::finish_eviction`], so that their bytes can be offloaded in between.
    pub fn begin_eviction(&mut self) -> Option<(Digest, Vec<BlockId>)> {
        let head = self.evictor.pop()?;
        let digest = self.digests[head as usize];
        self.index.remove(&digest);
        self.evictions += 1;
        let mut blocks = Vec::new();
        let mut id = head;
        while id != NONE {
            blocks.push(BlockId(id));
            id = self.blocks[id as usize].sibling;
        }
        Some((digest, blocks))
    }

    /// Drops the entry's reference to one of its blocks. Answers whether the block is free now.
    pub fn finish_eviction(&mut self, id: BlockId) -> bool {
        let block = &mut self.blocks[id.0 as usize];
        assert!(block.cached, "block {} is in no entry", id.0);
        block.cached = false;
        block.refs -= 1;
        if block.refs > 0 {
            return false;
        }
        self.idle_blocks -= 1;
        self.free.push(id.0);
        true
    }

    /// Checks every invariant; for tests and debugging. O(blocks).
    pub fn check_integrity(&self) {
        let used = self.blocks.iter().filter(|block| block.refs > 0).count();
        assert_eq!(used + self.free.len(), self.blocks.len(), "free list and references disagree");
        assert!(self.free.iter().all(|id| self.blocks[*id as usize].refs == 0));
        let idle = self.blocks.iter().filter(|block| block.cached && block.refs == 1).count();
        assert_eq!(idle, self.idle_blocks);
        for (digest, head) in &self.index {
            assert_eq!(&self.digests[*head as usize], digest);
            assert!(self.blocks[*head as usize].cached);
        }
        let unheld = self.index.values().filter(|head| self.blocks[**head as usize].holders == 0);
        assert_eq!(unheld.count(), self.evictor.len(), "idle entries and evictor disagree");
    }
}

/// A digest is uniform already: its first eight bytes are its hash.
#[derive(Debug, Default)]
struct DigestHasher(u64);

impl Hasher for DigestHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(bytes) = bytes.first_chunk::<8>() {
            self.0 = u64::from_le_bytes(*bytes);
        }
    }

    fn write_usize(&mut self, _length: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evictor;

    fn pool(n: usize) -> BlockPool {
        BlockPool::new(n, evictor::create("lru", n).unwrap())
    }

    fn evict(pool: &mut BlockPool) -> Option<Digest> {
        let (digest, blocks) = pool.begin_eviction()?;
        for block in blocks {
            pool.finish_eviction(block);
        }
        Some(digest)
    }

    #[test]
    fn allocation_is_all_or_nothing() {
        let mut pool = pool(4);
        let mut out = Vec::new();
        pool.allocate(3, &mut out).unwrap();
        assert_eq!(out, [BlockId(0), BlockId(1), BlockId(2)]);
        assert!(pool.allocate(2, &mut out).is_err());
        assert_eq!((out.len(), pool.num_free()), (3, 1));
        assert_eq!(pool.release(BlockId(1)), Released::Freed);
        pool.allocate(0, &mut out).unwrap();
        pool.check_integrity();
    }

    #[test]
    fn an_entry_lives_from_register_to_eviction() {
        let mut pool = pool(4);
        let mut blocks = Vec::new();
        pool.allocate(2, &mut blocks).unwrap();
        let entry = pool.register(&[1; 32], &blocks).unwrap();
        assert!(pool.register(&[1; 32], &blocks).is_none(), "known digest");
        assert!(pool.register(&[2; 32], &blocks).is_none(), "blocks of another entry");
        assert!(pool.begin_eviction().is_none(), "held entries stay");

        pool.unhold(entry);
        for block in &blocks {
            assert_eq!(pool.release(*block), Released::Idle);
        }
        pool.check_integrity();
        assert_eq!(pool.num_idle(), 2);

        let mut held = Vec::new();
        pool.hold(pool.lookup(&[1; 32]).unwrap(), &mut held);
        assert_eq!(held, [(blocks[0], true), (blocks[1], true)]);
        assert!(pool.begin_eviction().is_none());
        pool.unhold(entry);
        held.iter().for_each(|(block, _)| _ = pool.release(*block));

        assert_eq!(evict(&mut pool), Some([1; 32]));
        assert_eq!((pool.num_free(), pool.num_idle(), pool.num_entries()), (4, 0, 0));
        pool.check_integrity();
    }

    #[test]
    fn leaves_are_reclaimed_before_their_parents() {
        let mut pool = pool(8);
        let mut blocks = Vec::new();
        pool.allocate(3, &mut blocks).unwrap();
        let chain: Vec<_> = (0..3u8)
            .map(|i| pool.register(&[i; 32], &blocks[i as usize..][..1]).unwrap())
            .collect();
        let free = |pool: &mut BlockPool, n: usize| {
            for i in (0..n).rev() {
                pool.unhold(chain[i]);
                pool.release(blocks[i]);
            }
        };
        free(&mut pool, 3);
        let mut held = Vec::new();
        pool.hold(chain[0], &mut held);
        free(&mut pool, 1);
        let order: Vec<_> =
            std::iter::from_fn(|| evict(&mut pool)).map(|digest| digest[0]).collect();
        assert_eq!(order, [2, 1, 0]);
    }

    #[test]
    fn a_block_used_past_the_eviction_of_its_entry_is_freed_by_its_user() {
        let mut pool = pool(2);
        let mut blocks = Vec::new();
        pool.allocate(1, &mut blocks).unwrap();
        let entry = pool.register(&[9; 32], &blocks).unwrap();
        pool.unhold(entry);
        evict(&mut pool).unwrap();
        assert_eq!(pool.num_free(), 1);
        assert_eq!(pool.release(blocks[0]), Released::Freed);
        pool.check_integrity();
    }
}
