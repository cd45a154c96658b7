//! Reclaim: idle entries in the evictor's order, and what their users say about them.

use super::counts::Snapshot;
use super::index::tag;
use super::pool::{BlockId, BlockPool, DOOMED, MAX_PRIORITY, NONE, REUSED, Record};
use super::prefix::Digest;
use crate::evictor::Idle;
use crate::simd::prefetch;

/// Evictions between two looks ahead, and how far a look goes.
const PACE: usize = 8;

impl BlockPool {
    /// Starts to reclaim the next idle entry: it can no longer be found, but keeps its blocks
    /// until [`Self::finish_eviction`], so that their bytes can be offloaded in between.
    pub fn begin_eviction(&mut self) -> Option<(Digest, Vec<BlockId>)> {
        let head = self.next_idle()?;
        self.leave(head);
        let mut blocks = Vec::new();
        let mut id = head;
        while id != NONE {
            blocks.push(BlockId(id));
            id = self.records[id as usize].sibling;
        }
        Some((self.records[head as usize].digest, blocks))
    }

    /// Drops the entry's reference to one of its blocks. Answers whether the block is free now.
    pub fn finish_eviction(&mut self, id: BlockId) -> bool {
        let record = &mut self.records[id.0 as usize];
        assert!(record.cached, "block {} is in no entry", id.0);
        record.cached = false;
        if record.counts.sub_exclusive(1, 0).refs > 0 {
            return false;
        }
        self.add_idle(0, 1);
        self.put_free(id.0);
        true
    }

    /// Reclaims every idle entry. Answers how many.
    pub fn clear(&mut self) -> usize {
        let mut cleared = 0;
        while self.evict_one().is_some() {
            cleared += 1;
        }
        if self.num_entries() == 0
            && cleared > 0
            && let Some(journal) = &mut self.journal
        {
            journal.cleared();
        }
        cleared
    }

    /// Gives the entry of `block` another priority, from now on and not only when it next becomes
    /// idle. Answers whether there is such an entry.
    pub fn set_priority(&mut self, block: BlockId, priority: u8) -> bool {
        let record = &mut self.records[block.0 as usize];
        if !record.cached {
            return false;
        }
        record.priority = priority.min(MAX_PRIORITY);
        self.evictor.update(self.idle(block.0));
        true
    }

    /// Says that nobody will come back for the entry of `block`, or that somebody will after all:
    /// a doomed entry is reclaimed before all others. Answers whether there is such an entry.
    pub fn set_doomed(&mut self, block: BlockId, doomed: bool) -> bool {
        let record = &mut self.records[block.0 as usize];
        if !record.cached {
            return false;
        }
        record.flags = if doomed { record.flags | DOOMED } else { record.flags & !DOOMED };
        self.evictor.update(self.idle(block.0));
        true
    }

    /// A block that somebody came back for is not doomed any more.
    pub(super) fn revive(&mut self, block: u32) {
        if self.records[block as usize].flags & DOOMED != 0 {
            self.set_doomed(BlockId(block), false);
        }
    }

    /// Takes the entry of `digest` out of the index, because its content turned out to be wrong.
    /// Those who hold it keep their blocks. Answers whether there was one.
    pub fn forget(&mut self, digest: &Digest, group: u8) -> bool {
        let Some(head) = self.find(digest, group) else { return false };
        self.evictor.remove(head);
        self.leave(head);
        let mut id = head;
        while id != NONE {
            let record = &mut self.records[id as usize];
            let holders = record.counts.get().holders;
            record.counts.sub_exclusive(0, holders);
            let next = record.sibling;
            self.finish_eviction(BlockId(id));
            id = next;
        }
        true
    }

    /// Whether the evictor looks at priorities.
    pub fn has_priorities(&self) -> bool {
        self.evictor.has_priorities()
    }

    /// Whether the prefix of `digest` was evicted, as far as is remembered.
    pub fn was_evicted(&self, digest: &Digest, group: u8) -> bool {
        let tag = tag(digest, group);
        self.evicted[self.memory_of(tag)] == tag
    }

    /// Where the eviction of an entry is remembered.
    fn memory_of(&self, tag: u32) -> usize {
        ((u64::from(tag) * self.evicted.len() as u64) >> 32) as usize
    }

    /// What the evictor learns when nobody holds an entry any more.
    pub(super) fn enlist(&mut self, head: u32) -> Idle {
        let idle = self.idle(head);
        self.records[head as usize].flags |= REUSED;
        idle
    }

    fn idle(&self, head: u32) -> Idle {
        let record = &self.records[head as usize];
        Idle {
            slot: head,
            priority: record.priority,
            depth: record.depth,
            tag: record.tag,
            reused: record.flags & REUSED != 0,
            doomed: record.flags & DOOMED != 0,
        }
    }

    /// Takes the next entry that nobody holds out of the evictor.
    fn next_idle(&mut self) -> Option<u32> {
        loop {
            let head = self.evictor.pop()?;
            let record = &self.records[head as usize];
            // Held by a lookup since: it comes back when the last holder leaves.
            if record.cached && record.counts.get().holders == 0 {
                return Some(head);
            }
        }
    }

    /// Takes an entry out of the index.
    fn leave(&mut self, head: u32) {
        let tag = self.records[head as usize].tag;
        self.index.remove(tag, head);
        let place = self.memory_of(tag);
        self.evicted[place] = tag;
        self.evictions += 1;
        if let Some(partial) = &mut self.partial {
            partial.remove(head);
        }
        if let Some(journal) = &mut self.journal {
            let record = &self.records[head as usize];
            journal.removed(record.group, &record.digest);
        }
    }

    pub(super) fn evict_one(&mut self) -> Option<()> {
        if (self.evictions as usize).is_multiple_of(PACE) {
            self.look_ahead();
        }
        let head = self.next_idle()?;
        self.leave(head);
        let mut id = head;
        while id != NONE {
            self.finish_eviction(BlockId(id));
            id = self.records[id as usize].sibling;
        }
        Some(())
    }

    /// Asks memory for what the next evictions will touch: the records of those after the next few,
    /// and the index of the next few, whose records were asked for the last time.
    fn look_ahead(&self) {
        let mut slots = [0; 2 * PACE];
        let count = self.evictor.upcoming(&mut slots);
        for slot in &slots[count.min(PACE)..count] {
            prefetch(&self.records, *slot as usize);
        }
        for slot in &slots[..count.min(PACE)] {
            let tag = self.records[*slot as usize].tag;
            self.index.prefetch(tag);
            prefetch(&self.evicted, self.memory_of(tag));
        }
    }

    /// Checks every invariant; for tests and debugging. O(blocks).
    pub fn check_integrity(&self) {
        let counts = |id: u32| self.records[id as usize].counts.get();
        let used = self.records.iter().filter(|record| record.counts.get().refs > 0).count();
        assert_eq!(used + self.num_free(), self.records.len(), "free list and references disagree");
        assert!(self.free_list().iter().all(|id| counts(*id) == Snapshot { refs: 0, holders: 0 }));
        let is_idle = |record: &&Record| record.cached && record.counts.get().refs == 1;
        assert_eq!(self.records.iter().filter(is_idle).count(), self.num_idle());
        let mut unheld = 0;
        for head in self.index.blocks() {
            let record = &self.records[head as usize];
            assert!(record.cached && record.counts.get().refs > 0);
            assert_eq!(self.find(&record.digest, record.group), Some(head));
            unheld += usize::from(record.counts.get().holders == 0);
        }
        assert!(self.evictor.len() >= unheld, "an idle entry is missing from the evictor");
    }
}
