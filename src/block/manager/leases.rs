//! Leases: cached blocks that somebody holds apart from any sequence, until a deadline.
//!
//! A lookup answers a lease, so nothing can happen to what it found before it is used; a pin is the
//! same thing. A lease ends when it is given back or when its deadline passes, whichever is first.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::{BlockManager, log};
use crate::block::pool::BlockPool;
use crate::block::prefix::Digest;
use crate::block::tables::{NO_BLOCK, SequenceId};
use crate::error::{Result, bail, ensure};

/// Names a lease: a slot and how often it was used before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeaseId(pub u64);

/// The leases of a manager.
#[derive(Debug, Default)]
pub(super) struct Leases {
    slots: Vec<Lease>,
    free: Vec<u32>,
    /// Deadlines; stale ones are skipped when they come up.
    deadlines: BinaryHeap<Reverse<(u64, u64)>>,
}

#[derive(Debug, Default)]
struct Lease {
    generation: u32,
    live: bool,
    /// 0 for never.
    deadline: u64,
    blocks: Vec<u32>,
}

impl Leases {
    /// Leases that hold something now.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// A lease on blocks that are held already.
    fn add(&mut self, blocks: &[u32], deadline: u64) -> LeaseId {
        let slot = self.free.pop().unwrap_or(self.slots.len() as u32);
        if slot as usize == self.slots.len() {
            self.slots.push(Lease { generation: 1, ..Lease::default() });
        }
        let lease = &mut self.slots[slot as usize];
        (lease.live, lease.deadline) = (true, deadline);
        lease.blocks.clear();
        lease.blocks.extend_from_slice(blocks);
        let name = u64::from(lease.generation) << 32 | u64::from(slot);
        if deadline > 0 {
            self.deadlines.push(Reverse((deadline, name)));
        }
        LeaseId(name)
    }

    fn get(&mut self, id: LeaseId) -> Result<&mut Lease> {
        match self.slots.get_mut(id.0 as u32 as usize) {
            Some(lease) if lease.live && u64::from(lease.generation) == id.0 >> 32 => Ok(lease),
            _ => bail!(InvalidState, "the lease has ended: given back, or its deadline has passed"),
        }
    }

    /// Gives the blocks back, the last one first.
    fn end(&mut self, pool: &mut BlockPool, id: LeaseId) -> Result<()> {
        let lease = self.get(id)?;
        lease.blocks.drain(..).rev().for_each(|block| pool.unshare(block));
        lease.live = false;
        lease.generation = lease.generation.wrapping_add(1).max(1);
        self.free.push(id.0 as u32);
        Ok(())
    }

    /// Ends what is due at `now`. Answers how many.
    pub(super) fn expire(&mut self, pool: &mut BlockPool, now: u64) -> u64 {
        let mut ended = 0;
        while let Some(Reverse((deadline, name))) = self.deadlines.peek().copied()
            && deadline <= now
        {
            self.deadlines.pop();
            let id = LeaseId(name);
            // The deadline may have moved, or the lease may have ended before.
            if self.get(id).is_ok_and(|lease| lease.deadline == deadline) {
                ended += u64::from(self.end(pool, id).is_ok());
            }
        }
        ended
    }
}

impl BlockManager {
    /// Shared: holds the longest run of `digests`, from the first on, that is cached in `group`.
    /// Appends its blocks to `out`. The lease ends at `deadline`, 0 for never.
    pub fn lookup(
        &self,
        digests: &[Digest],
        group: u8,
        deadline: u64,
        out: &mut Vec<u32>,
    ) -> Result<LeaseId> {
        self.check_deadline(deadline)?;
        let start = out.len();
        self.pool.find_run(digests, group, out);
        Ok(self.leases.lock().add(&out[start..], deadline))
    }

    /// The same with exclusive access, written to the log.
    pub fn lookup_logged(
        &mut self,
        digests: &[Digest],
        group: u8,
        deadline: u64,
        out: &mut Vec<u32>,
    ) -> Result<LeaseId> {
        let start = out.len();
        let result = self.lookup(digests, group, deadline, out);
        self.record(
            |log| log::lookup(log, digests, group, deadline),
            |_, log| {
                log.result(&result, |log, id| {
                    log.long(id.0);
                    log.words(&out[start..]);
                });
            },
        );
        result
    }

    /// Holds the cached blocks of a sequence beyond its end.
    pub fn pin(&mut self, id: SequenceId, deadline: u64) -> Result<LeaseId> {
        let result = self.pin_quietly(id, deadline);
        self.record(
            |out| log::pin(out, id, deadline),
            |_, out| {
                out.result(&result, |out, id| out.long(id.0));
            },
        );
        result
    }

    fn pin_quietly(&mut self, id: SequenceId, deadline: u64) -> Result<LeaseId> {
        self.check_deadline(deadline)?;
        ensure!(!self.tables.is_parked(id)?, InvalidState, "sequence {:#x} is parked", id.0);
        let is_cached =
            |block: &u32| *block != NO_BLOCK && self.pool.is_cached(crate::block::BlockId(*block));
        let blocks: Vec<u32> =
            self.tables.blocks(id)?.iter().copied().filter(|block| is_cached(block)).collect();
        blocks.iter().for_each(|block| self.pool.share(*block));
        Ok(self.leases.get_mut().add(&blocks, deadline))
    }

    /// Gives a lease back.
    pub fn end_lease(&mut self, id: LeaseId) -> Result<()> {
        let result = self.leases.get_mut().end(&mut self.pool, id);
        self.record(|out| log::end_lease(out, id), |_, out| out.result(&result, |_, ()| {}));
        result
    }

    /// Moves the deadline of a lease, 0 for never.
    pub fn extend_lease(&mut self, id: LeaseId, deadline: u64) -> Result<()> {
        let result = self.extend_quietly(id, deadline);
        self.record(
            |out| log::extend_lease(out, id, deadline),
            |_, out| {
                out.result(&result, |_, ()| {});
            },
        );
        result
    }

    fn extend_quietly(&mut self, id: LeaseId, deadline: u64) -> Result<()> {
        self.check_deadline(deadline)?;
        let leases = self.leases.get_mut();
        leases.get(id)?.deadline = deadline;
        if deadline > 0 {
            leases.deadlines.push(Reverse((deadline, id.0)));
        }
        Ok(())
    }

    /// Leases that hold something now.
    pub fn num_leases(&self) -> usize {
        self.leases.lock().len()
    }

    fn check_deadline(&self, deadline: u64) -> Result<()> {
        ensure!(
            deadline == 0 || deadline > self.now,
            InvalidArgument,
            "deadline is {deadline}, the clock is at {} already",
            self.now
        );
        Ok(())
    }
}
