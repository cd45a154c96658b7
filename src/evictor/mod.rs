//! Evictors: the order in which unused cached blocks are reclaimed. Lossless, unlike a policy:
//! an evicted prefix can be computed again or fetched from a store.

use std::fmt::Debug;

use crate::error::Result;
use crate::registry::{Args, Param, registry};
use crate::spec;

registry! {
    /// Every evictor, in the order of the documentation.
    pub static EVICTORS: Entry = { lru, }
}

/// The order of reclaim over the slots `0..capacity` of a pool.
///
/// The pool calls, never the other way round, and only for prefix entries that nobody holds.
/// Every call is O(1) or O(log n); none allocates after creation.
pub trait Evictor: Debug + Send {
    /// Adds `slot`, which is not in the order. A child is always inserted before its parent when
    /// both become idle at once, so that leaves go first.
    fn insert(&mut self, slot: u32);
    /// Takes `slot` out again, because somebody holds it or it is gone. It is in the order.
    fn remove(&mut self, slot: u32);
    /// Takes out the next slot to reclaim.
    fn pop(&mut self) -> Option<u32>;
    /// Slots in the order.
    fn len(&self) -> usize;
    /// Whether the order is empty.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How the registry describes an evictor.
#[derive(Debug)]
pub struct Entry {
    /// Name in specs.
    pub name: &'static str,
    /// One line for the documentation.
    pub summary: &'static str,
    /// Parameters in positional order.
    pub params: &'static [Param],
    /// Makes an evictor over the slots `0..capacity`.
    pub create: fn(&Args, usize) -> Box<dyn Evictor>,
}

/// Makes the evictor that `text` names over the slots `0..capacity`.
pub fn create(text: &str, capacity: usize) -> Result<Box<dyn Evictor>> {
    let stage = spec::parse_stage(text)?;
    let entry = crate::registry::find("evictor", EVICTORS, &stage)?;
    Ok((entry.create)(&crate::registry::resolve(entry.params, &stage)?, capacity))
}
