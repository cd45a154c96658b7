//! Who uses a block: references and holders in one atomic word.
//!
//! ```text
//! word = holders (32 bits) | references (32 bits)
//! ```
//!
//! The protocol has two sides. *Shared*: any number of threads, each with the pool's lock taken for
//! reading, may add to the word. *Exclusive*: one thread with the lock taken for writing may also
//! take away, evict and hand out again. So a block that a lookup holds cannot be evicted: the
//! evictor's thread sees every addition, because it took the lock after it.

use crate::sync::{AtomicU64, Ordering};

/// One holder in the word.
const HOLDER: u64 = 1 << 32;

/// The word of one block.
#[derive(Debug)]
pub(super) struct Counts(AtomicU64);

/// A copy of the word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Snapshot {
    /// References of sequences and leases, plus one while a prefix entry owns the block.
    pub(super) refs: u32,
    /// Sequences and leases that hold the entry named by this block.
    pub(super) holders: u32,
}

impl Counts {
    /// Nobody.
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// The word now.
    pub(super) fn get(&self) -> Snapshot {
        split(self.0.load(Ordering::Relaxed))
    }

    /// Shared: adds a reference, and a holder if `holder`. Answers the word before.
    pub(super) fn add(&self, holder: bool) -> Snapshot {
        // The lock orders this with evictions; two additions need no order between them.
        split(self.0.fetch_add(1 + HOLDER * u64::from(holder), Ordering::Relaxed))
    }

    /// Shared: adds a holder alone.
    pub(super) fn add_holder(&self) {
        self.0.fetch_add(HOLDER, Ordering::Relaxed);
    }

    /// Exclusive: adds as [`Self::add`] does, without the price of an atomic addition.
    pub(super) fn add_exclusive(&mut self, refs: u32, holders: u32) {
        let word = self.0.load(Ordering::Relaxed);
        self.0.store(word + u64::from(refs) + HOLDER * u64::from(holders), Ordering::Relaxed);
    }

    /// Exclusive: takes away. Answers the word after.
    pub(super) fn sub_exclusive(&mut self, refs: u32, holders: u32) -> Snapshot {
        let word = split(self.0.load(Ordering::Relaxed));
        assert!(word.refs >= refs, "release of a free block");
        assert!(word.holders >= holders, "unhold of an idle entry");
        let word = Snapshot { refs: word.refs - refs, holders: word.holders - holders };
        self.set(word);
        word
    }

    /// Exclusive: replaces the word.
    pub(super) fn set(&mut self, word: Snapshot) {
        self.0.store(u64::from(word.refs) + HOLDER * u64::from(word.holders), Ordering::Relaxed);
    }
}

fn split(word: u64) -> Snapshot {
    Snapshot { refs: word as u32, holders: (word >> 32) as u32 }
}
