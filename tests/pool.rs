//! The parts of the block manager: every evictor, misuse, tenants, digests.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::collections::HashSet;

use common::Random;
use kvmgr::block::groups::Reason;
use kvmgr::block::keys::{Key, Kind};
use kvmgr::block::prefix::{self, Hash};
use kvmgr::block::{BlockId, BlockPool, Request, SequenceId, Tables, TablesConfig};
use kvmgr::error;
use kvmgr::evictor::{self, EVICTORS, Idle};

const BLOCK: usize = 4;

fn pool(blocks: usize, evictor: &str) -> BlockPool {
    BlockPool::new(blocks, evictor::create(evictor, blocks).unwrap())
}

fn tables() -> Tables {
    Tables::new(TablesConfig::new(BLOCK)).unwrap()
}

fn root(salt: &[u8]) -> prefix::Digest {
    prefix::tenant_root(&prefix::root(BLOCK, 0, b"test"), salt)
}

#[test]
fn every_evictor_returns_what_it_was_given_once() {
    for entry in EVICTORS {
        let mut evictor = evictor::create(entry.name, 64).unwrap();
        let mut present = HashSet::new();
        let mut lives = [0u32; 64];
        let mut random = Random(7);
        for _ in 0..20_000 {
            let slot = random.below(64) as u32;
            if random.below(3) > 0 {
                let idle = Idle {
                    slot,
                    priority: random.below(101) as u8,
                    depth: random.below(100) as u32,
                    tag: random.next() as u32,
                    reused: lives[slot as usize] > 0,
                    doomed: random.below(8) == 0,
                };
                evictor.insert(idle);
                lives[slot as usize] += 1;
                present.insert(slot);
                let other = random.below(64) as u32;
                evictor.update(Idle { slot: other, doomed: random.below(4) == 0, ..idle });
            } else if random.below(8) == 0 {
                let slot = random.below(64) as u32;
                assert_eq!(evictor.remove(slot), present.remove(&slot), "{}", entry.name);
                lives[slot as usize] = 0;
            } else {
                let popped = evictor.pop();
                assert_eq!(popped.is_none(), present.is_empty(), "{}", entry.name);
                if let Some(slot) = popped {
                    assert!(present.remove(&slot), "{} made up slot {slot}", entry.name);
                    lives[slot as usize] = 0;
                }
            }
            assert_eq!(evictor.len(), present.len(), "{}", entry.name);
        }
    }
}

#[test]
fn evictors_order_as_they_say() {
    let order = |name: &str, inserts: &[(u32, u8, u32, bool)]| -> Vec<u32> {
        let mut evictor = evictor::create(name, 8).unwrap();
        for (slot, priority, depth, reused) in inserts.iter().copied() {
            evictor.insert(Idle { slot, priority, depth, tag: slot + 1, reused, doomed: false });
        }
        std::iter::from_fn(|| evictor.pop()).collect()
    };
    let again = [(0, 50, 9, false), (1, 10, 1, false), (2, 90, 5, false), (0, 50, 9, true)];
    assert_eq!(order("lru", &again), [1, 2, 0]);
    assert_eq!(order("fifo", &again), [0, 1, 2]);
    assert_eq!(order("lfu", &again), [1, 2, 0]);
    assert_eq!(order("slru", &again), [1, 2, 0]);
    assert_eq!(order("s3_fifo", &again), [1, 2, 0]);
    assert_eq!(order("priority", &again), [1, 0, 2]);
    assert_eq!(order("cost(weight=1)", &again), [1, 2, 0]);
}

/// What nobody will come back for goes first, in every order, and may be taken back.
#[test]
fn doomed_slots_go_first() {
    for entry in EVICTORS {
        let idle = |slot| Idle {
            slot,
            priority: 50,
            depth: 1,
            tag: slot + 1,
            reused: false,
            doomed: false,
        };
        let mut evictor = evictor::create(entry.name, 8).unwrap();
        (0..6).for_each(|slot| evictor.insert(idle(slot)));
        evictor.update(Idle { doomed: true, ..idle(4) });
        evictor.update(Idle { doomed: true, ..idle(5) });
        evictor.update(idle(4));
        evictor.insert(Idle { doomed: true, ..idle(7) });
        let order: Vec<_> = std::iter::from_fn(|| evictor.pop()).collect();
        assert_eq!(order[..2], [5, 7], "{}: {order:?}", entry.name);
        assert_eq!(order.len(), 7);
    }
}

#[test]
fn tenants_share_nothing_and_learn_nothing() {
    let (mut pool, mut tables) = (pool(64, "lru"), tables());
    let prompt: Vec<i32> = (0..33).collect();
    let mut admit = |salt: &[u8]| {
        let admission = tables.admit(&mut pool, &Request::new(&prompt, root(salt))).unwrap();
        let rest = prompt.len() - admission.num_cached;
        tables.commit(&mut pool, &[admission.id], &[rest as u32], &[]).unwrap();
        (admission, tables.blocks(admission.id).unwrap().to_vec())
    };
    let (_, of_a) = admit(b"a");
    let (second, of_b) = admit(b"b");
    assert_eq!(second.num_cached, 0, "another tenant's prefix is not found");
    assert_eq!((second.miss.reason, second.miss.token), (Reason::Unknown, 0));
    assert!(of_b.iter().all(|block| !of_a.contains(block)));
    let (third, _) = admit(b"a");
    assert_eq!((third.num_cached, third.miss.reason), (32, Reason::Complete));
    pool.check_integrity();
}

#[test]
fn a_held_lookup_is_safe_from_eviction_and_its_release_is_seen() {
    let mut pool = pool(2, "lru");
    let block = pool.take().unwrap();
    assert!(pool.register_one(&[1; 32], 0, 1, block.0).is_none());
    pool.unshare(block.0);
    let mut out = Vec::new();
    assert_eq!(pool.find_run(&[[1; 32], [2; 32]], 0, &mut out), 1);
    assert_eq!(pool.find_held(&[1; 32], 1), None, "another group");
    let generation = pool.generation(block);
    assert_ne!(pool.take(), Some(block));
    assert_eq!(pool.take(), None, "the held block stays");
    pool.unshare(out[0]);
    assert_eq!(pool.take(), Some(block));
    assert_ne!(pool.generation(block), generation, "its next life has another name");
    assert!(pool.was_evicted(&[1; 32], 0) && !pool.was_evicted(&[3; 32], 0));
}

#[test]
fn double_release_of_a_block_stops_at_once() {
    let mut pool = pool(1, "lru");
    let BlockId(block) = pool.take().unwrap();
    pool.unshare(block);
    assert!(
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pool.unshare(block))).is_err()
    );
}

#[test]
fn a_block_costs_at_most_96_bytes() {
    for entry in EVICTORS {
        let pool = pool(1_000_000, entry.name);
        let bytes = pool.metadata_bytes() as f64 / 1e6;
        assert!(bytes <= 96.0, "{}: {bytes}", entry.name);
    }
}

/// Vectors from hashlib and cbor2 5.x: `sha256(cbor2.dumps((parent, tokens, extra), canonical))`.
#[test]
fn vllm_digests_are_vllms() {
    let hex = |digest: &prefix::Digest| {
        digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let root = prefix::vllm_root("0");
    assert_eq!(hex(&root), "4e1195df020de59e0d65a33a4279f1183e7ae4e5d980e309f8b55adff2e61c3e");
    let tokens: Vec<i32> = (0..16).collect();
    let first = prefix::extend_with(Hash::VllmCbor, &root, &tokens, "", &[]);
    assert_eq!(hex(&first), "d830de3d42c00f25a2949b5d12d98642664a44872c1614c5b0147556276afc9c");
    let tokens =
        [23, 24, 255, 256, 65535, 65536, i32::MAX, 100, 101, 102, 103, 104, 105, 106, 107, 108];
    let key = |kind, bytes, offset| Key { kind, bytes, offset };
    let salt = key(Kind::Text, b"salt", 0);
    let second = prefix::extend_with(Hash::VllmCbor, &first, &tokens, "lora-a", &[salt]);
    assert_eq!(hex(&second), "54a5a760d5637c5f122f056c9d99adc0681b26bccf7df6aac30c4773a7a06241");
    let embeddings: Vec<u8> = (0..32).collect();
    let keys = [
        key(Kind::Item, b"image-1", 3),
        key(Kind::Item, b"image-0", -40),
        salt,
        key(Kind::Bytes, &embeddings, 0),
    ];
    let all = prefix::extend_with(Hash::VllmCbor, &first, &tokens, "lora-a", &keys);
    assert_eq!(hex(&all), "10dc2c1fa6bc8e4f04ca8dcde66915af42257c0c03f23e06b07fef64d5d7b165");
}

/// A batch is appended as a whole or not at all: whatever is wrong with its last sequence, those before
/// it have neither a token nor a reserved row more.
#[test]
fn a_refused_append_changes_nothing() {
    let (mut pool, mut tables) = (pool(8, "lru"), tables());
    let lengths = [2, 3, 5, 4];
    let ids = lengths.map(|length| {
        let prompt: Vec<i32> = (0..length).map(|i| length * 100 + i).collect();
        let id = tables.admit(&mut pool, &Request::new(&prompt, root(b""))).unwrap().id;
        tables.commit(&mut pool, &[id], &[length as u32], &[]).unwrap();
        id
    });
    let [one, two, drafts, bare] = ids;
    tables.reserve(&mut pool, &[one, two, drafts], &[1, 1, 3]).unwrap();
    let state = |tables: &Tables| {
        ids.map(|id| {
            let blocks = tables.blocks(id).unwrap().to_vec();
            let counts = (tables.num_tokens(id).unwrap(), tables.num_reserved(id).unwrap());
            (blocks, counts, tables.tokens(id).unwrap().to_vec())
        })
    };
    let before = state(&tables);
    let gone = tables.fork(&mut pool, two).unwrap();
    tables.release(&mut pool, &[gone]).unwrap();
    for (last, kind) in [
        (one, error::Kind::InvalidArgument),
        (bare, error::Kind::InvalidState),
        (gone, error::Kind::InvalidHandle),
        (SequenceId(1 << 40), error::Kind::InvalidHandle),
        (SequenceId(u64::MAX), error::Kind::InvalidHandle),
    ] {
        let result = tables.append(&mut pool, &[one, two, drafts, last], &[7; 4]);
        assert_eq!(result.unwrap_err().kind(), kind);
        assert_eq!(state(&tables), before);
    }
    // The second fills its block and needs another one, but the pool has none.
    while pool.take().is_some() {}
    let result = tables.append(&mut pool, &[one, two, drafts], &[7; 3]);
    assert_eq!(result.unwrap_err().kind(), error::Kind::OutOfBlocks);
    assert_eq!(state(&tables), before);
    tables.append(&mut pool, &[one, drafts], &[7; 2]).unwrap();
    assert_eq!((tables.num_tokens(one), tables.num_reserved(one)), (Ok(3), Ok(4)));
    assert_eq!((tables.num_tokens(drafts), tables.num_reserved(drafts)), (Ok(6), Ok(8)));
}

/// A step of a pool that is 99.9 % full does the work of one in an empty pool: a reclaim for each
/// block that is not free, of a block that nobody holds, without a look at those that are held. What
/// it costs is a row of `benches/peers`.
#[test]
fn a_nearly_full_pool_reclaims_one_block_for_each_it_hands_out() {
    const BLOCKS: usize = 5_000;
    const SPARE: usize = 5;
    let mut pool = pool(BLOCKS, "lru");
    let mut tables = tables();
    let tokens: Vec<i32> = (0..(BLOCKS - SPARE) * BLOCK).map(|i| i as i32).collect();
    let mut held = Vec::new();
    for tokens in tokens.chunks(100 * BLOCK) {
        let id = tables.admit(&mut pool, &Request::new(tokens, root(b""))).unwrap().id;
        tables.commit(&mut pool, &[id], &[tokens.len() as u32], &[]).unwrap();
        held.push((id, tables.blocks(id).unwrap().to_vec()));
    }
    assert_eq!(pool.num_available(), SPARE);
    let mut taken = 0;
    for next in 1 << 24..(1 << 24) + 1000 {
        let (free, before) = (pool.num_free(), pool.evictions());
        let prompt = [next; 2 * BLOCK + 1];
        let id = tables.admit(&mut pool, &Request::new(&prompt, root(b""))).unwrap().id;
        tables.commit(&mut pool, &[id], &[prompt.len() as u32], &[]).unwrap();
        tables.reserve(&mut pool, &[id], &[1]).unwrap();
        (0..2 * BLOCK).for_each(|_| tables.append(&mut pool, &[id], &[7]).unwrap());
        let blocks = tables.blocks(id).unwrap().len();
        taken += blocks;
        assert_eq!(pool.evictions() - before, blocks.saturating_sub(free) as u64);
        tables.release(&mut pool, &[id]).unwrap();
        assert_eq!(pool.num_available(), SPARE);
    }
    assert!(pool.evictions() as usize > taken / 2, "{} of {taken}", pool.evictions());
    assert!(held.iter().all(|(id, blocks)| tables.blocks(*id).unwrap() == blocks));
    pool.check_integrity();
}
