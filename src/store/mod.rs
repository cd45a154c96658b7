//! Stores: where sealed blocks go when they leave the cache.
//!
//! A store holds opaque objects under 32-byte keys. It never interprets the bytes; the tier above
//! it puts an identity header and a checksum in front of them and verifies both on the way back.

use std::fmt::Debug;
use std::sync::Arc;

use crate::error::Result;
use crate::registry::{Args, Param, registry};
use crate::spec;

registry! {
    /// Every store that a spec can name, in the order of the documentation.
    pub static STORES: Entry = { host, }
}

/// The name of an object.
pub type Key = [u8; 32];

/// A place for objects. Calls may come from several threads at once.
pub trait Store: Debug + Send + Sync {
    /// Stores `bytes` under `key`, replacing what was there. `OutOfMemory` when it is full.
    fn put(&self, key: &Key, bytes: &[u8]) -> Result<()>;
    /// Fills `out` with the object `key`. `Ok(false)` if there is none; an error if its length is
    /// not that of `out`.
    fn get(&self, key: &Key, out: &mut [u8]) -> Result<bool>;
    /// Whether the object exists.
    fn contains(&self, key: &Key) -> Result<bool>;
    /// Forgets the object; no error if there is none.
    fn remove(&self, key: &Key) -> Result<()>;
    /// Numbers for people.
    fn stats(&self) -> StoreStats;
}

/// What a store holds and has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Objects held.
    pub objects: u64,
    /// Bytes held.
    pub bytes: u64,
    /// Objects put since creation.
    pub puts: u64,
    /// Objects found by `get` since creation.
    pub hits: u64,
    /// `get` calls that found nothing since creation.
    pub misses: u64,
}

/// How the registry describes a store.
#[derive(Debug)]
pub struct Entry {
    /// Name in specs.
    pub name: &'static str,
    /// One line for the documentation.
    pub summary: &'static str,
    /// Parameters in positional order.
    pub params: &'static [Param],
    /// Opens or makes the store.
    pub create: fn(&Args) -> Result<Arc<dyn Store>>,
}

/// Opens the store that `text` names, such as `host(capacity=64mi)`.
pub fn create(text: &str) -> Result<Arc<dyn Store>> {
    let stage = spec::parse_stage(text)?;
    let entry = crate::registry::find("store", STORES, &stage)?;
    (entry.create)(&crate::registry::resolve(entry.params, &stage)?)
}
