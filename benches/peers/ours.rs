//! The workloads on this library.

use std::hint::black_box;

use kvmgr::block::prefix::{self, Digest};
use kvmgr::block::{BlockId, BlockPool, Request, SequenceId, Tables, TablesConfig};
use kvmgr::evictor;

use crate::{BLOCK, Costs, Stream, splitmix, time, tok, tokens};

fn pool(blocks: usize, evictor: &str) -> BlockPool {
    BlockPool::new(blocks, evictor::create(evictor, blocks).expect("a known evictor"))
}

fn tables() -> Tables {
    Tables::new(TablesConfig::new(BLOCK)).expect("a valid configuration")
}

fn root() -> Digest {
    prefix::root(BLOCK, 0, b"bench")
}

/// Admits a prompt and commits what was not cached, as if the engine had computed it; one more
/// token is reserved.
fn start(pool: &mut BlockPool, tables: &mut Tables, prompt: &[i32]) -> (SequenceId, usize) {
    let admission = tables.admit(pool, &Request::new(prompt, root())).expect("room");
    let (id, found) = (admission.id, admission.num_cached);
    tables.commit(pool, &[id], &[(prompt.len() - found) as u32], &[]).expect("reserved");
    tables.reserve(pool, &[id], &[1]).expect("room");
    (id, found)
}

pub fn w1() -> Costs {
    let (mut pool, mut tables) = (pool(140_000, "lru"), tables());
    let shared = tokens(0, 0..2048);
    start(&mut pool, &mut tables, &shared);
    let prompts: Vec<_> = (0..1000u64)
        .map(|i| shared.iter().copied().chain([tok(i + 1, 0)]).collect::<Vec<_>>())
        .collect();
    let (admit, mut ids) = time(1000, || {
        let mut admit = |prompt: &Vec<i32>| {
            let admission = tables.admit(&mut pool, &Request::new(prompt, root())).expect("room");
            assert_eq!(admission.num_cached, 2048);
            admission.id
        };
        prompts.iter().map(&mut admit).collect::<Vec<_>>()
    });
    let (two, extra) = time(1000, || {
        let pairs = prompts.as_chunks().0.iter();
        let admit = |[a, b]: &[Vec<i32>; 2]| {
            let requests = [a, b].map(|prompt| Request::new(prompt, root()));
            let (mut first, mut second) = (Vec::new(), Vec::new());
            tables.hash_two(requests.each_ref(), [&mut first, &mut second]);
            [(requests[0], first), (requests[1], second)].map(|(request, digests)| {
                let request = Request { digests: &digests, ..request };
                tables.admit(&mut pool, &request).expect("room").id
            })
        };
        pairs.flat_map(admit).collect::<Vec<_>>()
    });
    tables.release(&mut pool, &extra).expect("live");
    let digests = tables.hash(&Request::new(&shared, root())).to_vec();
    let (given, extra) = time(1000, || {
        let mut admit = |prompt| {
            let request = Request { digests: &digests, ..Request::new(prompt, root()) };
            tables.admit(&mut pool, &request).expect("room").id
        };
        prompts.iter().map(|prompt| admit(prompt)).collect::<Vec<_>>()
    });
    tables.release(&mut pool, &extra).expect("live");
    let steps: Vec<Vec<i32>> =
        (1..2048).map(|p| (0..1000).map(|i| tok(i + 1, p)).collect()).collect();
    let (decode, ()) = time(2047 * 1000, || {
        for id in &ids {
            tables.commit(&mut pool, &[*id], &[1], &[]).expect("reserved");
        }
        tables.reserve(&mut pool, &ids, &[1; 1000]).expect("room");
        for step in &steps {
            tables.append(&mut pool, &ids, step).expect("room");
        }
    });
    assert!(ids.iter().all(|id| tables.num_tokens(*id) == Ok(4096)));
    Stream(42).shuffle(&mut ids);
    let (free, ()) = time(1000 * 256, || tables.release(&mut pool, &ids).expect("live"));
    Costs::from([
        ("W1 admit, per sequence", admit),
        ("W1 admit, two hashed at a time", two),
        ("W1 admit, hashes given", given),
        ("W1 decode, per token", decode),
        ("W1 free, per block", free),
    ])
}

pub fn w2(evictor: &str, blocks: usize) -> f64 {
    let (mut pool, mut tables) = (pool(blocks, evictor), tables());
    let mut histories = std::collections::HashMap::new();
    let (mut found, mut asked) = (0, 0);
    for (user, message, answer) in crate::trace() {
        let history: &mut Vec<i32> = histories.entry(user).or_insert_with(|| tokens(0, 0..512));
        let own = |history: &mut Vec<i32>, n: usize| {
            let start = history.len() as u64;
            history.extend(tokens(user + 1, start..start + n as u64));
        };
        own(history, message);
        let (id, hit) = start(&mut pool, &mut tables, history);
        asked += history.len();
        found += hit;
        let start = history.len();
        own(history, answer);
        for token in &history[start..] {
            tables.append(&mut pool, &[id], &[*token]).expect("room");
        }
        tables.release(&mut pool, &[id]).expect("live");
    }
    found as f64 / asked as f64
}

pub fn w3() -> Costs {
    let (mut pool, mut tables) = (pool(100_000, "lru"), tables());
    let (mut fork, mut append, mut free) = (0.0, 0.0, 0.0);
    const ROUNDS: u64 = 10;
    for round in 0..ROUNDS {
        let (parent, _) = start(&mut pool, &mut tables, &tokens(round + 1, 0..1000));
        let (cost, children) = time(64, || {
            let fork = |_| tables.fork(&mut pool, parent).expect("live");
            (0..64).map(fork).collect::<Vec<SequenceId>>()
        });
        fork += cost;
        let steps: Vec<Vec<i32>> = (0..256)
            .map(|p| (0..64).map(|child| tok(1000 + round * 64 + child, p)).collect())
            .collect();
        append += time(64 * 256, || {
            tables.reserve(&mut pool, &children, &[1; 64]).expect("room");
            for step in &steps {
                tables.append(&mut pool, &children, step).expect("room");
            }
        })
        .0;
        assert_eq!(tables.take_copies().len(), 64);
        free += time(64, || tables.release(&mut pool, &children).expect("live")).0;
        tables.release(&mut pool, &[parent]).expect("live");
    }
    let rounds = ROUNDS as f64;
    Costs::from([
        ("W3 fork, per child", fork / rounds),
        ("W3 append, per token", append / rounds),
        ("W3 free, per child", free / rounds),
    ])
}

pub fn w4() -> Costs {
    let mut pool = pool(100_000, "lru");
    let mut held: Vec<BlockId> = Vec::new();
    let [pair, full] = [50_000, 99_900].map(|count| {
        held.resize_with(count, || pool.take().expect("room"));
        let mut random = Stream(3);
        let picks: Vec<usize> = (0..500_000).map(|_| random.below(count)).collect();
        let churn = || {
            for pick in &picks {
                let fresh = pool.take().expect("room");
                pool.unshare(std::mem::replace(&mut held[*pick], fresh).0);
            }
        };
        time(picks.len(), churn).0
    });
    let (immediate, ()) = time(500_000, || {
        for _ in 0..500_000 {
            let block = pool.take().expect("room");
            pool.unshare(black_box(block).0);
        }
    });
    Costs::from([
        ("W4 alloc + free random", pair),
        ("W4 alloc + free random, 99.9 % full", full),
        ("W4 alloc + free at once, 99.9 % full", immediate),
    ])
}

/// A short sequence from admission to its end, in a pool that is half full and one that is 99.9 % full
/// of sequences that stay.
pub fn churn() -> Costs {
    const BLOCKS: usize = 50_000;
    let cost = |free: usize| {
        let (mut pool, mut tables) = (pool(BLOCKS, "lru"), tables());
        for i in 0..((BLOCKS - free) / 50) as u64 {
            start(&mut pool, &mut tables, &tokens(i + 1, 0..50 * BLOCK as u64 - 1));
        }
        let prompts: Vec<_> =
            (0..2000u64).map(|i| tokens(1_000_000 + i, 0..2 * BLOCK as u64 + 1)).collect();
        time(prompts.len(), || {
            for prompt in &prompts {
                let (id, _) = start(&mut pool, &mut tables, prompt);
                (0..2 * BLOCK).for_each(|_| tables.append(&mut pool, &[id], &[7]).expect("room"));
                tables.release(&mut pool, &[id]).expect("live");
            }
        })
        .0
    };
    Costs::from([
        ("short sequence, half full", cost(BLOCKS / 2)),
        ("short sequence, 99.9 % full", cost(BLOCKS / 1000)),
    ])
}

/// `n` digests that are as random as SHA-256's.
fn digests(n: usize) -> Vec<Digest> {
    (0..n as u64)
        .map(|i| {
            let mut digest = [0; 32];
            for (k, bytes) in digest.chunks_exact_mut(8).enumerate() {
                bytes.copy_from_slice(&splitmix(i * 4 + k as u64).to_le_bytes());
            }
            digest
        })
        .collect()
}

pub fn w5(n: usize) -> Costs {
    let mut pool = pool(n, "lru");
    let digests = digests(n);
    let (alloc, blocks) =
        time(n, || (0..n).map(|_| pool.take().expect("room")).collect::<Vec<_>>());
    let (register, ()) = time(n, || {
        for (chain, blocks) in digests.chunks(256).zip(blocks.chunks(256)) {
            for (digest, block) in chain.iter().zip(blocks) {
                pool.anticipate(digest, 0, block.0);
            }
            for (depth, (digest, block)) in chain.iter().zip(blocks).enumerate() {
                assert!(pool.register_one(digest, 0, depth as u32, block.0).is_none());
            }
        }
    });
    let mut out = Vec::with_capacity(n);
    let (lookup, ()) = time(n, || {
        digests.chunks(256).for_each(|chain| _ = pool.find_run(chain, 0, &mut out));
    });
    assert_eq!(out.len(), n);
    let mut own = Vec::with_capacity(n);
    let (exclusive, ()) = time(n, || {
        digests.chunks(256).for_each(|chain| _ = pool.take_run(chain, 0, &mut own));
    });
    assert_eq!(own, out);
    let blocks: Vec<u32> = blocks.into_iter().map(|block| block.0).collect();
    let release = |pool: &mut BlockPool, blocks: &[u32]| {
        blocks.chunks(256).for_each(|chain| pool.unshare_run(chain));
    };
    release(&mut pool, &out);
    release(&mut pool, &own);
    let (idle, ()) = time(n, || release(&mut pool, &blocks));
    out.clear();
    let (again, ()) = time(n, || {
        digests.chunks(256).for_each(|chain| _ = pool.find_run(chain, 0, &mut out));
        release(&mut pool, &out);
    });
    let (evict, ()) = time(n, || {
        for _ in 0..n {
            black_box(pool.take().expect("idle blocks"));
        }
    });
    assert_eq!(pool.num_entries(), 0);
    Costs::from([
        ("alloc", alloc),
        ("register, hashes given", register),
        ("lookup held, shared", lookup),
        ("lookup held, exclusive", exclusive),
        ("release", idle),
        ("lookup + release idle", again),
        ("evict + alloc", evict),
    ])
}

pub fn metadata(n: usize) -> f64 {
    pool(n, "lru").metadata_bytes() as f64 / n as f64
}

/// Millions a second at 1M blocks by one and by two threads, which take turns: lookups under a
/// reader-writer lock; and, as what memory allows, loads of as many lines at random places of huge pages. The
/// fastest of many runs, because a shared machine only ever slows them down; and the medians of the
/// gain of the second thread.
pub fn two_threads() -> [(f64, f64, f64); 2] {
    const N: usize = 1_000_000;
    let mut pool = pool(N, "lru");
    let digests = digests(N);
    for digest in &digests {
        let block = pool.take().expect("room");
        pool.register_one(digest, 0, 0, block.0);
    }
    let pool = std::sync::RwLock::new(pool);
    let look_up = |share: std::ops::Range<usize>| {
        let mut out = Vec::with_capacity(256);
        for chain in digests[share].chunks(256) {
            out.clear();
            let pool = pool.read().expect("no panic");
            assert_eq!(pool.find_run(chain, 0, &mut out), chain.len());
        }
    };
    let lines = kvmgr::device::host::large(N, |_| [1u64; 8]);
    let load = |share: std::ops::Range<usize>| {
        // Asked for ahead, as the pool does it.
        let place = |i: usize| splitmix(i as u64) as usize % N;
        let (mut sum, mut ahead) = (0, share.start);
        for i in share.clone() {
            while ahead < (i + 48).min(share.end) {
                kvmgr::simd::prefetch(&lines, place(ahead));
                ahead += 1;
            }
            sum += lines[place(i)][0];
        }
        black_box(sum);
    };
    [compare_threads(N, &look_up), compare_threads(N, &load)]
}

fn compare_threads(n: usize, work: &(dyn Fn(std::ops::Range<usize>) + Sync)) -> (f64, f64, f64) {
    const ROUNDS: usize = 15;
    let run = |threads: usize| {
        let share = n / threads;
        let (cost, ()) = time(1, || {
            std::thread::scope(|scope| {
                (0..threads)
                    .for_each(|i| _ = scope.spawn(move || work(i * share..(i + 1) * share)));
            });
        });
        n as f64 * 1e3 / cost
    };
    let mut rounds: Vec<_> = (0..ROUNDS).map(|_| (run(1), run(2))).collect();
    let best = |speed: fn(&(f64, f64)) -> f64| rounds.iter().map(speed).fold(0.0, f64::max);
    let (one, two) = (best(|round| round.0), best(|round| round.1));
    rounds.sort_by(|a, b| (a.1 / a.0).total_cmp(&(b.1 / b.0)));
    (one, two, rounds[ROUNDS / 2].1 / rounds[ROUNDS / 2].0)
}
