//! Evictors: the order in which unused cached blocks are reclaimed. Lossless, unlike a policy:
//! an evicted prefix can be computed again or fetched from a store.

mod lists;
mod queue;

use std::fmt::Debug;

use crate::error::Result;
use crate::registry::{Args, Param, registry};
use crate::spec;

registry! {
    /// Every evictor, in the order of the documentation.
    pub static EVICTORS: Entry = { lru, fifo, lfu, slru, s3_fifo, priority, cost, }
}

/// What the pool knows about an entry that became idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Idle {
    /// Which one: a block number below the capacity.
    pub slot: u32,
    /// How long its users want it to stay, 0 to 100.
    pub priority: u8,
    /// Blocks of its chain up to and including it: what it costs to compute again.
    pub depth: u32,
    /// A hash of its digest: the same prefix has the same tag in its next life.
    pub tag: u32,
    /// Whether it was idle before in this life, and somebody came back for it.
    pub reused: bool,
    /// Whether its users said that they will not come back: it goes before all others.
    pub doomed: bool,
}

/// The order of reclaim over the slots `0..capacity` of a pool.
///
/// The pool calls, never the other way round. Every call is O(1) or O(log n), amortised where an
/// evictor moves entries between its queues; none allocates after creation. A slot that a lookup
/// holds may stay in the order; the pool passes it over when it is popped and inserts it again
/// when it is idle again.
pub trait Evictor: Debug + Send + Sync {
    /// Adds a slot, or says that a slot in the order was used once more. A child is always
    /// inserted before its parent when both become idle at once, so that leaves go first.
    fn insert(&mut self, idle: Idle);
    /// [`Self::insert`] for each of `list` in its order; no slot occurs twice.
    fn insert_all(&mut self, list: &[Idle]) {
        list.iter().for_each(|idle| self.insert(*idle));
    }
    /// Asks memory for what [`Self::insert`] of `slots` will touch.
    fn prefetch(&self, slots: &[u32]);
    /// The slots that [`Self::pop`] would answer next, in order, as far as that is known without a
    /// search: a hint, so that memory can work ahead. Answers how many were written to `out`.
    fn upcoming(&self, out: &mut [u32]) -> usize {
        _ = out;
        0
    }
    /// Says that what is known of a slot in the order has changed, without a use.
    fn update(&mut self, idle: Idle);
    /// Takes out the next slot to reclaim: doomed ones first.
    fn pop(&mut self) -> Option<u32>;
    /// Takes out one slot, if it is in the order.
    fn remove(&mut self, slot: u32) -> bool;
    /// Whether priorities count.
    fn has_priorities(&self) -> bool {
        false
    }
    /// Bytes of bookkeeping.
    fn bytes(&self) -> usize;
    /// Slots in the order.
    fn len(&self) -> usize;
    /// Whether the order is empty.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The largest capacity of an evictor: a link has room for 31 bits of a slot. So it is the largest pool.
pub const MAX_SLOTS: usize = 1 << 31;

/// How the registry describes an evictor.
#[derive(Debug)]
pub struct Entry {
    /// Name in specs.
    pub name: &'static str,
    /// One line for the documentation.
    pub summary: &'static str,
    /// Parameters in positional order.
    pub params: &'static [Param],
    /// Makes an evictor over the slots `0..capacity`, at most [`MAX_SLOTS`].
    pub create: fn(&Args, usize) -> Box<dyn Evictor>,
}

/// Makes the evictor that `text` names over the slots `0..capacity`, at most [`MAX_SLOTS`].
pub fn create(text: &str, capacity: usize) -> Result<Box<dyn Evictor>> {
    let stage = spec::parse_stage(text)?;
    let entry = crate::registry::find("evictor", EVICTORS, &stage)?;
    Ok((entry.create)(&crate::registry::resolve(entry.params, &stage)?, capacity))
}
