//! The tier: prefix entries that leave the cache go to a store and come back on a match.
//!
//! An object is a header and the bytes of the entry's block in every lane:
//!
//! ```text
//! magic 8 | digest 32 | payload bytes u64 | crc64 of the payload u64 | payload
//! ```
//!
//! Blocks of a cache on a device are stored as those of one on the host, so that either finds what the other
//! has left.
//!
//! The state of recurrent layers after an entry is an object of its own, named by the complement of the
//! entry's digest: few entries have one, and it may go and come without them.
//!
//! The header is checked before a block becomes visible. A store that fails, or returns other
//! bytes than it was given, costs a computation and a log line, never a wrong answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::block::EntryId;
use crate::block::prefix::Digest;
use crate::cache::{Block, Cache, Offload};
use crate::error::{Error, Kind, Result, ensure};
use crate::log::{Level, log};
use crate::store::{Key, Store};

const MAGIC: &[u8; 8] = b"KVMGR\x01\0\0";
const HEADER: usize = 8 + 32 + 8 + 8;

/// A store below a cache.
#[derive(Debug)]
pub struct Tier {
    store: Arc<dyn Store>,
    puts: AtomicU64,
    hits: AtomicU64,
    failures: AtomicU64,
}

impl Tier {
    /// A tier over `store`.
    pub fn new(store: Arc<dyn Store>) -> Self {
        let zero = AtomicU64::default;
        Self { store, puts: zero(), hits: zero(), failures: zero() }
    }

    /// Entries offloaded, entries fetched, and failures, since creation.
    pub fn counts(&self) -> (u64, u64, u64) {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (load(&self.puts), load(&self.hits), load(&self.failures))
    }

    /// Brings the entry `digest` of the tokens from `position` on into the prefix index of `cache`, if
    /// the store has it. Answers whether it can be found there now. Failures are logged and count as
    /// absence.
    pub fn fetch(&self, cache: &Cache, digest: &Digest, position: usize) -> bool {
        let found = self.counted(self.try_fetch(cache, digest, position));
        self.hits.fetch_add(u64::from(found), Ordering::Relaxed);
        found
    }

    fn try_fetch(&self, cache: &Cache, digest: &Digest, position: usize) -> Result<bool> {
        if !self.store.contains(digest)? {
            return Ok(false);
        }
        let mut blocks: Vec<Block> = Vec::new();
        let format = |lane| cache.format_of(lane, position as i32);
        let formats: Vec<usize> = (0..cache.config().num_lanes()).map(format).collect();
        cache.allocate_each(&formats, &mut blocks)?;
        let result = self.read_into(cache, &blocks, digest);
        let ids = || blocks.iter().map(|block| block.id);
        let entry = match result {
            Ok(true) => cache.register(digest, &ids().collect::<Vec<_>>()),
            _ => None,
        };
        cache.release(ids(), entry.into_iter());
        result
    }

    /// Whether the store has the entry `digest`; a failure counts as absence.
    pub fn has(&self, digest: &Digest) -> bool {
        self.counted(self.store.contains(digest))
    }

    /// Whether the store has the state after the entry `digest`.
    pub fn has_state(&self, digest: &Digest) -> bool {
        self.has(&state_key(digest))
    }

    /// Brings the state after `digest` to `entry`, which the caller holds, if the store has it. Answers
    /// whether the entry keeps it now. Failures are logged and count as absence.
    pub fn fetch_state(&self, cache: &Cache, entry: EntryId, digest: &Digest) -> bool {
        self.counted(self.try_fetch_state(cache, entry, digest))
    }

    fn try_fetch_state(&self, cache: &Cache, entry: EntryId, digest: &Digest) -> Result<bool> {
        let key = state_key(digest);
        if !self.store.contains(&key)? {
            return Ok(false);
        }
        let state = cache.new_state()?;
        let mut found = false;
        let result = cache.fill_state(&state, &mut |bytes| {
            let mut object = vec![0; object_len(bytes.len())];
            found = self.store.get(&key, &mut object)?;
            if found {
                bytes.copy_from_slice(verify(&object, &key)?);
            }
            Ok(())
        });
        if result.is_ok() && found {
            cache.keep_state(entry, digest, &state);
        }
        cache.release_states([state]);
        result.map(|()| found)
    }

    /// A failure is logged, counted, and means no.
    fn counted(&self, answer: Result<bool>) -> bool {
        answer.unwrap_or_else(|error| {
            self.failures.fetch_add(1, Ordering::Relaxed);
            log(Level::Warn, format_args!("prefix not fetched: {error}"));
            false
        })
    }

    /// Whether an object could be stored. A failure is logged and counted.
    fn put(&self, key: &Key, parts: &[&[u8]]) -> bool {
        let Err(error) = self.store.put(key, &seal(key, parts)) else { return true };
        self.failures.fetch_add(1, Ordering::Relaxed);
        log(Level::Warn, format_args!("prefix not offloaded: {error}"));
        false
    }

    fn read_into(&self, cache: &Cache, blocks: &[Block], digest: &Digest) -> Result<bool> {
        let payload: usize = blocks.iter().map(|block| block.view.len()).sum();
        let mut object = vec![0; HEADER + payload];
        if !self.store.get(digest, &mut object)? {
            return Ok(false);
        }
        let mut rest = verify(&object, digest)?;
        for block in blocks {
            let (bytes, tail) = rest.split_at(block.view.len());
            cache.fill_stored(&block.view, bytes)?;
            rest = tail;
        }
        Ok(true)
    }
}

impl Offload for Tier {
    fn offload(&self, digest: &Digest, blocks: &[&[u8]]) {
        let is_put = self.put(digest, blocks);
        self.puts.fetch_add(u64::from(is_put), Ordering::Relaxed);
    }

    fn offload_state(&self, digest: &Digest, bytes: &[u8]) {
        self.put(&state_key(digest), &[bytes]);
    }
}

/// The name of the state after the entry `digest`: as hard to meet by chance as the digest.
fn state_key(digest: &Digest) -> Key {
    digest.map(|byte| !byte)
}

/// An object for `name` out of parts.
pub fn seal(name: &Key, parts: &[&[u8]]) -> Vec<u8> {
    let payload: usize = parts.iter().map(|part| part.len()).sum();
    let mut object = Vec::with_capacity(HEADER + payload);
    object.extend_from_slice(MAGIC);
    object.extend_from_slice(name);
    object.extend_from_slice(&(payload as u64).to_le_bytes());
    object.extend_from_slice(&[0; 8]);
    parts.iter().for_each(|part| object.extend_from_slice(part));
    let checksum = checksum(&object[HEADER..]).to_le_bytes();
    object[HEADER - 8..HEADER].copy_from_slice(&checksum);
    object
}

/// The payload of an object that [`seal`] made for `name`, or `Corrupt`.
pub fn verify<'a>(object: &'a [u8], name: &Key) -> Result<&'a [u8]> {
    let corrupt = |what: &str| Error::new(Kind::Corrupt, format!("stored object: {what}"));
    ensure!(object.len() >= HEADER, Corrupt, "stored object: {} bytes", object.len());
    let (header, payload) = object.split_at(HEADER);
    if header[..8] != *MAGIC {
        return Err(corrupt("not an object of this library"));
    }
    if header[8..40] != *name {
        return Err(corrupt("it belongs to another prefix"));
    }
    if header[40..48] != (payload.len() as u64).to_le_bytes() {
        return Err(corrupt("the length is wrong"));
    }
    if header[48..] != checksum(payload).to_le_bytes() {
        return Err(corrupt("the checksum is wrong"));
    }
    Ok(payload)
}

/// Bytes of an object with a payload of this size.
pub fn object_len(payload: usize) -> usize {
    HEADER + payload
}

fn checksum(payload: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_flipped_bit_is_noticed() {
        let name = [7; 32];
        let object = seal(&name, &[b"abc", b"", b"defg"]);
        assert_eq!(object.len(), object_len(7));
        assert_eq!(verify(&object, &name).unwrap(), b"abcdefg");
        for bit in 0..object.len() * 8 {
            let mut object = object.clone();
            object[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(verify(&object, &name).unwrap_err().kind(), Kind::Corrupt, "bit {bit}");
        }
        assert!(verify(&object[..object.len() - 1], &name).is_err());
        assert!(verify(&object, &[8; 32]).is_err());
    }
}
