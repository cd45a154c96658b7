//! A store whose bytes cannot be trusted.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvmgr::error::Result;
use kvmgr::store::{self, Key, Store, StoreStats};

/// A host store that flips a bit of each object of more than `limit` bytes.
#[derive(Debug)]
pub struct Liar {
    store: Arc<dyn Store>,
    pub limit: AtomicUsize,
}

impl Liar {
    pub fn new() -> Arc<Self> {
        let store = store::create("host").expect("a store");
        Arc::new(Self { store, limit: 0.into() })
    }
}

impl Store for Liar {
    fn put(&self, key: &Key, bytes: &[u8]) -> Result<()> {
        self.store.put(key, bytes)
    }
    fn get(&self, key: &Key, out: &mut [u8]) -> Result<bool> {
        let found = self.store.get(key, out)?;
        if out.len() > self.limit.load(Ordering::Relaxed) {
            let middle = out.len() / 2;
            out[middle] ^= 4;
        }
        Ok(found)
    }
    fn contains(&self, key: &Key) -> Result<bool> {
        self.store.contains(key)
    }
    fn remove(&self, key: &Key) -> Result<()> {
        self.store.remove(key)
    }
    fn stats(&self) -> StoreStats {
        self.store.stats()
    }
}
