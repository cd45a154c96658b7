//! The block manager against slow models: random operations, every evictor, misuse.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::collections::{HashMap, HashSet};

use common::Random;
use kvmgr::block::prefix::{self, Hash};
use kvmgr::block::{BlockId, BlockPool, SequenceId, Tables, TablesConfig};
use kvmgr::error::Kind;
use kvmgr::evictor::{self, EVICTORS, Idle};

const BLOCK: usize = 4;

fn pool(blocks: usize, evictor: &str) -> BlockPool {
    BlockPool::new(blocks, evictor::create(evictor, blocks).unwrap())
}

fn tables(salt: &[u8], dedup: bool) -> Tables {
    let root = prefix::tenant_root(&prefix::root(BLOCK, 0, b"test"), salt);
    Tables::new(TablesConfig { block_size: BLOCK, root, dedup, watermark: 0 }).unwrap()
}

/// What a block of the engine's own memory would hold: the tokens up to and including each row.
type Content = Vec<Vec<i32>>;

/// Sequences as plain token lists, and the engine's memory.
struct Model {
    pool: BlockPool,
    tables: Tables,
    live: Vec<(SequenceId, Vec<i32>)>,
    dead: Vec<SequenceId>,
    memory: HashMap<u32, Content>,
}

impl Model {
    fn step(&mut self, random: &mut Random) {
        match random.below(100) {
            0..12 => self.admit(random),
            12..20 => self.fork(random),
            20..32 => self.release(random),
            32..35 => self.misuse(random),
            _ => self.append(random),
        }
    }

    fn admit(&mut self, random: &mut Random) {
        let prompt: Vec<i32> = (0..random.within(1, 18)).map(|_| random.below(2) as i32).collect();
        match self.tables.admit(&mut self.pool, &prompt, &[]) {
            Ok((id, found)) => {
                assert!(found < prompt.len() && found % BLOCK == 0);
                let blocks = self.tables.blocks(id).unwrap().to_vec();
                for (i, row) in (0..prompt.len()).enumerate().skip(found) {
                    self.write(blocks[i / BLOCK], i % BLOCK, &prompt[..=row]);
                }
                self.live.push((id, prompt));
            }
            Err(error) => assert_eq!(error.kind(), Kind::OutOfBlocks),
        }
    }

    fn append(&mut self, random: &mut Random) {
        let picked: Vec<usize> = (0..self.live.len()).filter(|_| random.below(2) == 0).collect();
        let ids: Vec<_> = picked.iter().map(|i| self.live[*i].0).collect();
        let tokens: Vec<_> = picked.iter().map(|_| random.below(2) as i32).collect();
        let before = self.tables_of(&ids);
        if let Err(error) = self.tables.append(&mut self.pool, &ids, &tokens) {
            assert_eq!(error.kind(), Kind::OutOfBlocks);
            assert_eq!(before, self.tables_of(&ids), "a failing call changes nothing");
            return;
        }
        for copy in self.tables.take_copies() {
            let content = self.memory[&copy.source.0].clone();
            self.memory.insert(copy.target.0, content);
        }
        for (i, token) in picked.into_iter().zip(tokens) {
            let (id, list) = &mut self.live[i];
            list.push(token);
            let (id, list) = (*id, list.clone());
            let row = list.len() - 1;
            let block = self.tables.blocks(id).unwrap()[row / BLOCK];
            // A block that gave way to a known one holds the same already.
            self.write(block, row % BLOCK, &list);
        }
    }

    fn fork(&mut self, random: &mut Random) {
        if self.live.is_empty() {
            return;
        }
        let (id, list) = self.live[random.below(self.live.len())].clone();
        let child = self.tables.fork(&mut self.pool, id).unwrap();
        self.live.push((child, list));
    }

    fn release(&mut self, random: &mut Random) {
        if self.live.is_empty() {
            return;
        }
        let (id, _) = self.live.swap_remove(random.below(self.live.len()));
        self.tables.release(&mut self.pool, &[id]).unwrap();
        self.dead.push(id);
    }

    fn misuse(&mut self, random: &mut Random) {
        let foreign = SequenceId(random.next() | 1 << 31);
        let stale = self.dead.last().copied().unwrap_or(foreign);
        for id in [stale, foreign] {
            let kind = |result: kvmgr::error::Result<()>| result.unwrap_err().kind();
            assert_eq!(kind(self.tables.release(&mut self.pool, &[id])), Kind::InvalidHandle);
            assert_eq!(kind(self.tables.append(&mut self.pool, &[id], &[1])), Kind::InvalidHandle);
            assert!(self.tables.fork(&mut self.pool, id).is_err());
            assert!(self.tables.blocks(id).is_err());
        }
        if let Some((id, _)) = self.live.first() {
            let twice = [*id, *id];
            assert!(self.tables.append(&mut self.pool, &twice, &[1, 2]).is_err());
            assert!(self.tables.release(&mut self.pool, &twice).is_err());
        }
    }

    fn write(&mut self, block: u32, row: usize, tokens: &[i32]) {
        let content = self.memory.entry(block).or_default();
        if content.get(row).is_some_and(|old| old == tokens) {
            return;
        }
        content.truncate(row);
        assert_eq!(content.len(), row, "rows are written in order");
        content.push(tokens.to_vec());
    }

    fn tables_of(&self, ids: &[SequenceId]) -> Vec<(Vec<u32>, usize)> {
        let table = |id: &SequenceId| {
            (self.tables.blocks(*id).unwrap().to_vec(), self.tables.num_tokens(*id).unwrap())
        };
        ids.iter().map(table).collect()
    }

    /// Every row that a table names holds the tokens of its sequence and nothing else.
    fn check(&self) {
        self.pool.check_integrity();
        let mut used = HashSet::new();
        for (id, list) in &self.live {
            let blocks = self.tables.blocks(*id).unwrap();
            assert_eq!(blocks.len(), list.len().div_ceil(BLOCK));
            assert_eq!(self.tables.num_tokens(*id).unwrap(), list.len());
            for row in 0..list.len() {
                let content = &self.memory[&blocks[row / BLOCK]];
                assert_eq!(content[row % BLOCK], list[..=row], "another sequence's row is visible");
            }
            used.extend(blocks.iter().copied());
        }
        assert_eq!(self.pool.num_blocks() - self.pool.num_available(), used.len());
    }
}

/// One million operations over all evictors and both ways to treat duplicates.
#[test]
fn random_operations_agree_with_a_model() {
    let runs = 2 * EVICTORS.len();
    for run in 0..runs {
        let entry = EVICTORS[run / 2];
        let mut random = Random(run as u64);
        let mut model = Model {
            pool: pool(48, entry.name),
            tables: tables(b"", run % 2 == 0),
            live: Vec::new(),
            dead: Vec::new(),
            memory: HashMap::new(),
        };
        for operation in 0..1_000_000 / runs + 1 {
            model.step(&mut random);
            if model.live.len() > 12 {
                model.release(&mut random);
            }
            if operation % 97 == 0 {
                model.check();
            }
        }
        let ids: Vec<_> = model.live.drain(..).map(|(id, _)| id).collect();
        model.tables.release(&mut model.pool, &ids).unwrap();
        model.check();
        assert_eq!(model.pool.num_available(), 48, "{} leaks", entry.name);
    }
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
                };
                evictor.insert(idle);
                lives[slot as usize] += 1;
                present.insert(slot);
                evictor.set_priority(random.below(64) as u32, random.below(101) as u8);
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
            evictor.insert(Idle { slot, priority, depth, tag: slot + 1, reused });
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

#[test]
fn tenants_share_nothing_and_learn_nothing() {
    let mut pool = pool(64, "lru");
    let prompt: Vec<i32> = (0..33).collect();
    let (mut a, mut b) = (tables(b"a", true), tables(b"b", true));
    let (first, _) = a.admit(&mut pool, &prompt, &[]).unwrap();
    let (second, found) = b.admit(&mut pool, &prompt, &[]).unwrap();
    assert_eq!(found, 0, "another tenant's prefix is not found");
    let of_a: HashSet<_> = a.blocks(first).unwrap().iter().collect();
    assert!(b.blocks(second).unwrap().iter().all(|block| !of_a.contains(block)));
    assert_eq!(a.admit(&mut pool, &prompt, &[]).unwrap().1, 32);
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
    pool.unshare(out[0].0);
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
    let first = prefix::extend_with(Hash::VllmCbor, &root, &tokens, &[]);
    assert_eq!(hex(&first), "d830de3d42c00f25a2949b5d12d98642664a44872c1614c5b0147556276afc9c");
    let tokens =
        [23, 24, 255, 256, 65535, 65536, i32::MAX, 100, 101, 102, 103, 104, 105, 106, 107, 108];
    let keys: [&[u8]; 2] = [b"lora-a", b"salt"];
    let second = prefix::extend_with(Hash::VllmCbor, &first, &tokens, &keys);
    assert_eq!(hex(&second), "54a5a760d5637c5f122f056c9d99adc0681b26bccf7df6aac30c4773a7a06241");
}
