//! Retention: what the users of an entry say about how long it should stay. Soft: nothing here
//! keeps a block that is needed, and everything can be changed afterwards.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::{BlockManager, Keep, log};
use crate::block::keys::Range;
use crate::block::pool::{BlockId, BlockPool};
use crate::block::prefix::Digest;
use crate::block::tables::{NO_BLOCK, SequenceId};
use crate::error::Result;

/// What a sequence wants for what it leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Label {
    pub(super) ttl: u64,
    pub(super) session: u64,
}

/// One life of a block.
type Life = (u32, u32);

/// Labels of live sequences, and what ended ones left behind.
#[derive(Debug, Default)]
pub(super) struct Retention {
    /// By slot of the sequence; empty until somebody asks for something.
    labels: Vec<Label>,
    used: bool,
    /// When a life of a block ends, if it is to.
    deadlines: HashMap<Life, u64>,
    queue: BinaryHeap<Reverse<(u64, Life)>>,
    /// What the last state of each session left behind, in token order.
    sessions: HashMap<u64, Vec<Life>>,
}

impl Retention {
    pub(super) fn has_labels(&self) -> bool {
        self.used
    }

    pub(super) fn label(&self, id: SequenceId) -> Label {
        self.labels.get(id.0 as u32 as usize).copied().unwrap_or_default()
    }

    pub(super) fn set_label(&mut self, id: SequenceId, label: Label) {
        let slot = id.0 as u32 as usize;
        self.used |= label != Label::default();
        if self.used {
            self.labels.resize(self.labels.len().max(slot + 1), Label::default());
            self.labels[slot] = label;
        }
    }

    /// A sequence of `session` has ended and left blocks behind, each with its time to live.
    pub(super) fn leave(
        &mut self,
        pool: &mut BlockPool,
        session: u64,
        blocks: &[(u32, u64)],
        now: u64,
    ) {
        let mut lives: Vec<Life> = Vec::with_capacity(blocks.len());
        for (block, ttl) in blocks {
            let id = BlockId(*block);
            if *block == NO_BLOCK || !pool.is_cached(id) {
                continue;
            }
            let life = (*block, pool.generation(id));
            if *ttl > 0 {
                let deadline = now.saturating_add(*ttl);
                self.deadlines.insert(life, deadline);
                self.queue.push(Reverse((deadline, life)));
            } else {
                self.deadlines.remove(&life);
            }
            // A deadline that has passed counts no more.
            pool.revive(*block);
            lives.push(life);
        }
        if session > 0 {
            let old = self.sessions.insert(session, lives).unwrap_or_default();
            let new = &self.sessions[&session];
            let same = old.iter().zip(new).take_while(|(a, b)| a == b).count();
            doom(pool, &old[same..]);
        }
    }

    /// What is past its time goes first from now on.
    pub(super) fn expire(&mut self, pool: &mut BlockPool, now: u64) {
        while let Some(Reverse((deadline, life))) = self.queue.peek().copied()
            && deadline <= now
        {
            self.queue.pop();
            if self.deadlines.get(&life) == Some(&deadline) {
                self.deadlines.remove(&life);
                doom(pool, &[life]);
            }
        }
    }
}

/// Says that nobody will come back, leaves first, for blocks that are still what they were.
fn doom(pool: &mut BlockPool, lives: &[Life]) {
    for (block, generation) in lives.iter().rev() {
        if pool.generation(BlockId(*block)) == *generation {
            pool.set_doomed(BlockId(*block), true);
        }
    }
}

impl BlockManager {
    /// Changes how long what a sequence leaves behind should stay, its entries so far included.
    pub fn set_keep(&mut self, id: SequenceId, keep: Keep) -> Result<()> {
        let result = self.set_keep_quietly(id, keep);
        self.record(|out| log::set_keep(out, id, keep), |_, out| out.result(&result, |_, ()| {}));
        result
    }

    fn set_keep_quietly(&mut self, id: SequenceId, keep: Keep) -> Result<()> {
        self.check_keep(keep)?;
        self.tables.set_priority(&mut self.pool, id, keep.priority)?;
        self.retention.set_label(id, Label { ttl: keep.ttl, session: keep.session });
        Ok(())
    }

    /// Changes the priority and the time to live of entries that are cached already. Answers how
    /// many of `digests` are.
    pub fn keep_entries(&mut self, digests: &[Digest], group: u8, keep: Keep) -> Result<usize> {
        let result = self.keep_quietly(digests, group, keep);
        self.record(
            |out| log::keep_entries(out, digests, group, keep),
            |_, out| {
                out.result(&result, |out, found| out.word(*found as u32));
            },
        );
        result
    }

    fn keep_quietly(&mut self, digests: &[Digest], group: u8, keep: Keep) -> Result<usize> {
        self.check_keep(keep)?;
        let mut blocks = Vec::new();
        for digest in digests {
            if let Some(block) = self.pool.find(digest, group) {
                self.pool.set_priority(BlockId(block), keep.priority);
                blocks.push(block);
            }
        }
        let found = blocks.len();
        let blocks: Vec<_> = blocks.into_iter().map(|block| (block, keep.ttl)).collect();
        self.retention.leave(&mut self.pool, 0, &blocks, self.now);
        Ok(found)
    }

    /// Changes how long the entries of a part of a sequence should stay: those that exist, and those
    /// that its blocks become later. See [`Tables::set_range`].
    ///
    /// [`Tables::set_range`]: crate::block::Tables::set_range
    pub fn keep_range(&mut self, id: SequenceId, range: Range) -> Result<()> {
        let result = self.keep_range_quietly(id, range);
        self.record(
            |out| log::keep_range(out, id, range.start, range.end, range.priority, range.ttl),
            |_, out| out.result(&result, |_, ()| {}),
        );
        result
    }

    fn keep_range_quietly(&mut self, id: SequenceId, range: Range) -> Result<()> {
        self.check_keep(Keep { priority: range.priority, ttl: range.ttl, session: 0 })?;
        self.tables.set_range(&mut self.pool, id, range)?;
        self.retention.used = true;
        Ok(())
    }

    /// Says that a session has ended: what its last state left behind goes first. Answers whether
    /// there was one.
    pub fn end_session(&mut self, session: u64) -> bool {
        let lives = self.retention.sessions.remove(&session);
        if let Some(lives) = &lives {
            doom(&mut self.pool, lives);
        }
        let found = lives.is_some();
        self.record(|out| log::end_session(out, session), |_, out| out.word(u32::from(found)));
        found
    }
}
