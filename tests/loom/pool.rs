//! The shared part of the block pool under a model checker: lookups that hold blocks, beside an
//! evictor, in every interleaving that the memory model allows.
//!
//! `make test-loom`

#![cfg(loom)]

use kvmgr::block::{BlockId, BlockPool};
use kvmgr::evictor;
use loom::sync::{Arc, RwLock};
use loom::thread;

const KNOWN: [u8; 32] = [1; 32];
const OTHER: [u8; 32] = [2; 32];

/// A pool of two blocks, both idle entries.
fn idle_pool() -> (Arc<RwLock<BlockPool>>, BlockId) {
    let mut pool = BlockPool::new(2, evictor::create("lru", 2).unwrap());
    let blocks = [pool.take().unwrap(), pool.take().unwrap()];
    for (digest, block) in [KNOWN, OTHER].iter().zip(blocks) {
        assert!(pool.register_one(digest, 0, 1, block.0).is_none());
    }
    blocks.iter().for_each(|block| pool.unshare(block.0));
    (Arc::new(RwLock::new(pool)), blocks[0])
}

#[test]
fn a_block_that_a_lookup_holds_is_never_handed_out() {
    loom::model(|| {
        let (pool, known) = idle_pool();
        let looker = {
            let pool = pool.clone();
            thread::spawn(move || {
                let held = pool.read().unwrap().find_held(&KNOWN, 0);
                if let Some(block) = held {
                    // Held: nobody gets it, and it is still what it was.
                    let pool = pool.read().unwrap();
                    assert_eq!(block, known.0);
                    assert!(pool.is_cached(known) && pool.refs(known) >= 2);
                }
                held
            })
        };
        let taken = pool.write().unwrap().take();
        let held = looker.join().unwrap();
        assert!(taken.is_some());
        assert!(held.is_none() || taken.map(|block| block.0) != held);
        if let Some(block) = held {
            pool.write().unwrap().unshare(block);
        }
        pool.write().unwrap().unshare(taken.unwrap().0);
        let pool = pool.read().unwrap();
        pool.check_integrity();
        assert_eq!(pool.num_available(), 2);
    });
}

#[test]
fn two_lookups_of_an_idle_block_count_it_once() {
    loom::model(|| {
        let (pool, known) = idle_pool();
        let other = {
            let pool = pool.clone();
            thread::spawn(move || pool.read().unwrap().find_held(&KNOWN, 0))
        };
        let here = pool.read().unwrap().find_held(&KNOWN, 0);
        let there = other.join().unwrap();
        assert_eq!((here, there), (Some(known.0), Some(known.0)));
        let mut pool = pool.write().unwrap();
        assert_eq!((pool.refs(known), pool.num_idle()), (3, 1));
        pool.check_integrity();
        pool.unshare(known.0);
        pool.unshare(known.0);
        assert_eq!(pool.num_idle(), 2);
        pool.check_integrity();
    });
}

#[test]
fn a_release_beside_a_lookup_loses_no_hold() {
    loom::model(|| {
        let (pool, known) = idle_pool();
        assert_eq!(pool.read().unwrap().find_held(&KNOWN, 0), Some(known.0));
        let other = {
            let pool = pool.clone();
            thread::spawn(move || pool.read().unwrap().find_held(&KNOWN, 0))
        };
        pool.write().unwrap().unshare(known.0);
        assert_eq!(other.join().unwrap(), Some(known.0));
        let mut pool = pool.write().unwrap();
        assert_eq!(pool.refs(known), 2);
        let taken = pool.take().unwrap();
        assert_ne!(taken, known, "the held block is passed over");
        assert_eq!(pool.take(), None);
        pool.unshare(known.0);
        pool.unshare(taken.0);
        pool.check_integrity();
    });
}
