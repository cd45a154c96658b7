//! Host memory: a map with an optional capacity. Refuses when full; it never drops by itself.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Entry, Key, Store, StoreStats};
use crate::error::{Result, ensure};
use crate::registry::{Domain, Param};

pub(super) static ENTRY: Entry = Entry {
    name: "host",
    summary: "host memory of this process",
    params: &[Param {
        name: "capacity",
        help: "largest number of bytes held; 0 for no limit",
        domain: Domain::Int { default: 0, min: 0, max: i64::MAX },
    }],
    create: |args| {
        let limit = match args.int("capacity") {
            0 => u64::MAX,
            capacity => capacity as u64,
        };
        Ok(Arc::new(Host { limit, inner: Mutex::default() }))
    },
};

#[derive(Debug)]
struct Host {
    limit: u64,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    objects: HashMap<Key, Box<[u8]>>,
    stats: StoreStats,
}

impl Store for Host {
    fn put(&self, key: &Key, bytes: &[u8]) -> Result<()> {
        let mut inner = self.inner.lock();
        let replaced = inner.objects.get(key).map_or(0, |object| object.len() as u64);
        let total = inner.stats.bytes - replaced + bytes.len() as u64;
        ensure!(
            total <= self.limit,
            OutOfMemory,
            "host store would hold {total} bytes, its capacity is {}",
            self.limit
        );
        inner.objects.insert(*key, bytes.into());
        inner.stats.bytes = total;
        inner.stats.objects = inner.objects.len() as u64;
        inner.stats.puts += 1;
        Ok(())
    }

    fn get(&self, key: &Key, out: &mut [u8]) -> Result<bool> {
        let mut inner = self.inner.lock();
        let Some(object) = inner.objects.get(key) else {
            inner.stats.misses += 1;
            return Ok(false);
        };
        ensure!(
            object.len() == out.len(),
            Store,
            "the object has {} bytes, {} were asked for",
            object.len(),
            out.len()
        );
        out.copy_from_slice(object);
        inner.stats.hits += 1;
        Ok(true)
    }

    fn contains(&self, key: &Key) -> Result<bool> {
        Ok(self.inner.lock().objects.contains_key(key))
    }

    fn remove(&self, key: &Key) -> Result<()> {
        let mut inner = self.inner.lock();
        if let Some(object) = inner.objects.remove(key) {
            inner.stats.bytes -= object.len() as u64;
            inner.stats.objects -= 1;
        }
        Ok(())
    }

    fn stats(&self) -> StoreStats {
        self.inner.lock().stats
    }
}
