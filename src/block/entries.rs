//! Prefix entries: blocks that are registered under a digest, found and held.
//!
//! A chain's digests lie at random places of the index, so calls with many of them ask memory for
//! the places of a batch before they look at the first: misses that overlap cost as little as one.

use super::index::{Place, tag};
use super::pool::{BlockId, BlockPool, DEFAULT_PRIORITY, EntryId, NONE};
use super::prefix::Digest;
use crate::simd::prefetch;
use crate::sync::Ordering;

/// Digests whose places are asked for together.
const BATCH: usize = 32;

impl BlockPool {
    /// Makes `blocks`, one for each lane and none of them cached yet, the entry for `digest`, held
    /// once. `None` if the digest is known already: the caller keeps its blocks to itself.
    pub fn register(&mut self, digest: &Digest, blocks: &[BlockId]) -> Option<EntryId> {
        let head = blocks.first()?.0;
        let fresh = |id: &BlockId| {
            let record = &self.records[id.0 as usize];
            record.counts.get().refs > 0 && !record.cached
        };
        let tag = tag(digest, 0);
        let Place::Empty(at) = self.place(tag, digest, 0) else { return None };
        if !blocks.iter().all(fresh) {
            return None;
        }
        for (i, id) in blocks.iter().enumerate() {
            let record = &mut self.records[id.0 as usize];
            record.counts.add_exclusive(1, u32::from(i == 0));
            record.cached = true;
            record.sibling = blocks.get(i + 1).map_or(NONE, |next| next.0);
        }
        self.index.fill(at, tag, head);
        self.enter(head, digest, tag, 0, 0);
        Some(EntryId(head))
    }

    /// Makes `block` the entry for `digest` in `group`, held by all who refer to it. Answers another
    /// block if that one is the entry already.
    pub fn register_one(
        &mut self,
        digest: &Digest,
        group: u8,
        depth: u32,
        block: u32,
    ) -> Option<u32> {
        let tag = tag(digest, group);
        let at = match self.place(tag, digest, group) {
            Place::Taken(known) => return Some(known),
            Place::Empty(at) => at,
        };
        let record = &mut self.records[block as usize];
        let users = record.counts.get().refs;
        record.counts.add_exclusive(1, users);
        record.cached = true;
        record.sibling = NONE;
        self.index.fill(at, tag, block);
        self.enter(block, digest, tag, group, depth);
        None
    }

    /// Asks memory for what [`Self::register_one`] of these will touch.
    pub fn anticipate(&self, digest: &Digest, group: u8, block: u32) {
        self.index.prefetch(tag(digest, group));
        prefetch(&self.records, block as usize);
    }

    /// The entry for `digest`, if it is known. Changes nothing; [`Self::hold`] takes it.
    pub fn lookup(&self, digest: &Digest) -> Option<EntryId> {
        self.find(digest, 0).map(EntryId)
    }

    /// Shared: holds the entry for `digest` in `group` and refers to its block once.
    pub fn find_held(&self, digest: &Digest, group: u8) -> Option<u32> {
        let head = self.find(digest, group)?;
        self.hold_one(head);
        Some(head)
    }

    /// Shared: holds the entries of the longest run of `digests`, from the first on, that is known
    /// in `group`, and appends their blocks to `out`. Answers how many.
    pub fn find_run(&self, digests: &[Digest], group: u8, out: &mut Vec<u32>) -> usize {
        let start = out.len();
        let mut tags = self.expect(&digests[..digests.len().min(BATCH)], group);
        for (i, batch) in digests.chunks(BATCH).enumerate() {
            let found = out.len();
            let is_whole =
                self.find_batch(batch, &digests[i * BATCH + batch.len()..], group, &mut tags, out);
            out[found..].iter().for_each(|head| self.hold_one(*head));
            if !is_whole {
                break;
            }
        }
        out.len() - start
    }

    /// The same with exclusive access: without the price of atomic additions. Those who hold an
    /// entry came back for it, so it is not doomed any more.
    pub fn take_run(&mut self, digests: &[Digest], group: u8, out: &mut Vec<u32>) -> usize {
        let start = out.len();
        let mut idle = 0;
        let mut tags = self.expect(&digests[..digests.len().min(BATCH)], group);
        for (i, batch) in digests.chunks(BATCH).enumerate() {
            let found = out.len();
            let is_whole =
                self.find_batch(batch, &digests[i * BATCH + batch.len()..], group, &mut tags, out);
            for head in &out[found..] {
                let record = &mut self.records[*head as usize];
                idle += usize::from(record.counts.get().refs == 1);
                record.counts.add_exclusive(1, 1);
            }
            if !is_whole {
                break;
            }
        }
        self.add_idle(0, idle);
        out[start..].iter().for_each(|head| self.revive(*head));
        out.len() - start
    }

    /// The tags of at most [`BATCH`] digests, whose places in the index memory is asked for.
    fn expect(&self, batch: &[Digest], group: u8) -> [u32; BATCH] {
        let mut tags = [0; BATCH];
        for (digest, tag_of) in batch.iter().zip(&mut tags) {
            *tag_of = tag(digest, group);
            self.index.prefetch(*tag_of);
        }
        tags
    }

    /// Appends the blocks of the longest known run of `batch`, whose `tags` come from
    /// [`Self::expect`]; answers whether that is all of them. Reads only, so that the misses of all
    /// steps overlap, and those of the next batch, the start of `rest`; `tags` are its tags then.
    fn find_batch(
        &self,
        batch: &[Digest],
        rest: &[Digest],
        group: u8,
        tags: &mut [u32; BATCH],
        out: &mut Vec<u32>,
    ) -> bool {
        let mut guesses = [0; BATCH];
        for (tag, guess) in tags.iter().zip(&mut guesses).take(batch.len()) {
            *guess = self.index.guess(*tag);
            prefetch(&self.records, *guess as usize);
        }
        let next = self.expect(&rest[..rest.len().min(BATCH)], group);
        let tags = std::mem::replace(tags, next);
        for (i, digest) in batch.iter().enumerate() {
            if guesses[i] < self.records.len() as u32 && self.is_entry(guesses[i], digest, group) {
                out.push(guesses[i]);
            } else if let Place::Taken(head) = self.place(tags[i], digest, group) {
                out.push(head);
            } else {
                return false;
            }
        }
        true
    }

    /// Shared: adds a holder to `entry` and a reference to each of its blocks, appended to `out` in
    /// lane order with whether each was idle before.
    pub fn hold(&self, entry: EntryId, out: &mut Vec<(BlockId, bool)>) {
        self.records[entry.0 as usize].counts.add_holder();
        let mut id = entry.0;
        while id != NONE {
            let was_idle = self.retain(BlockId(id));
            out.push((BlockId(id), was_idle));
            id = self.records[id as usize].sibling;
        }
    }

    /// Removes a holder of `entry`. The holder's block references are released apart from this.
    /// Call it for the last block of a chain first, so that leaves are reclaimed first.
    pub fn unhold(&mut self, entry: EntryId) {
        if self.records[entry.0 as usize].counts.sub_exclusive(0, 1).holders == 0 {
            let idle = self.enlist(entry.0);
            self.evictor.insert(idle);
        }
    }

    /// The block of the entry for `digest` in `group`. Holds nothing.
    pub fn find(&self, digest: &Digest, group: u8) -> Option<u32> {
        match self.place(tag(digest, group), digest, group) {
            Place::Taken(block) => Some(block),
            Place::Empty(_) => None,
        }
    }

    fn place(&self, tag: u32, digest: &Digest, group: u8) -> Place {
        self.index.place(tag, |block| self.is_entry(block, digest, group))
    }

    fn is_entry(&self, block: u32, digest: &Digest, group: u8) -> bool {
        let record = &self.records[block as usize];
        record.group == group && record.digest == *digest
    }

    fn hold_one(&self, head: u32) {
        let record = &self.records[head as usize];
        let before = record.counts.add(true);
        if before.refs == 1 {
            self.idle_blocks.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn enter(&mut self, head: u32, digest: &Digest, tag: u32, group: u8, depth: u32) {
        let record = &mut self.records[head as usize];
        record.tag = tag;
        (record.group, record.depth) = (group, depth);
        (record.priority, record.flags) = (DEFAULT_PRIORITY, 0);
        record.digest = *digest;
    }
}
