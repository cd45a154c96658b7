//! The workloads on kvbm-logical, with its LRU backend and its own hashing.

use std::hint::black_box;

use dynamo_tokens::{PositionalLineageHash, TokenBlockSequence, Tokens};
use kvbm_logical::{BlockManager, BlockRegistry, ImmutableBlock, MutableBlock};

use crate::{BLOCK, Costs, Stream, splitmix, time, tok, tokens};

#[derive(Clone)]
struct Tier;

type Manager = BlockManager<Tier>;

fn manager(blocks: usize) -> Manager {
    BlockManager::<Tier>::builder()
        .block_count(blocks)
        .block_size(BLOCK)
        .registry(BlockRegistry::new())
        .with_lru_backend()
        .build()
        .expect("a valid configuration")
}

/// A sequence: its tokens, its registered blocks and the block that fills.
struct Sequence {
    tokens: TokenBlockSequence,
    blocks: Vec<ImmutableBlock<Tier>>,
    open: Option<MutableBlock<Tier>>,
}

impl Sequence {
    fn admit(manager: &Manager, prompt: &[i32]) -> Self {
        let tokens = TokenBlockSequence::new(Tokens::from(prompt), BLOCK as u32, None);
        let usable = (prompt.len() - 1) / BLOCK;
        let hashes: Vec<_> =
            tokens.blocks().iter().map(|block| block.positional_lineage_hash()).collect();
        let mut blocks = manager.match_blocks(&hashes[..usable]);
        for hash in &hashes[blocks.len()..] {
            let block = take(manager).stage(*hash, BLOCK).expect("the block size agrees");
            blocks.push(manager.register_block(block));
        }
        let open = (!prompt.len().is_multiple_of(BLOCK)).then(|| take(manager));
        Self { tokens, blocks, open }
    }

    fn append(&mut self, manager: &Manager, token: i32) {
        let open = self.open.take().unwrap_or_else(|| take(manager));
        match self.tokens.append(token as u32).expect("a token") {
            None => self.open = Some(open),
            Some(index) => {
                let hash = self.tokens.blocks()[index].positional_lineage_hash();
                let block = open.stage(hash, BLOCK).expect("the block size agrees");
                self.blocks.push(manager.register_block(block));
            }
        }
    }
}

fn take(manager: &Manager) -> MutableBlock<Tier> {
    manager.allocate_blocks(1).and_then(|mut blocks| blocks.pop()).expect("room")
}

pub fn w1() -> Costs {
    let manager = manager(140_000);
    let shared = tokens(0, 0..2048);
    let _warm = Sequence::admit(&manager, &shared);
    let prompts: Vec<_> = (0..1000u64)
        .map(|i| shared.iter().copied().chain([tok(i + 1, 0)]).collect::<Vec<_>>())
        .collect();
    let (admit, mut sequences) = time(1000, || {
        prompts.iter().map(|prompt| Sequence::admit(&manager, prompt)).collect::<Vec<_>>()
    });
    let steps: Vec<Vec<i32>> =
        (1..2048).map(|p| (0..1000).map(|i| tok(i + 1, p)).collect()).collect();
    let (decode, ()) = time(2047 * 1000, || {
        for step in &steps {
            for (sequence, token) in sequences.iter_mut().zip(step) {
                sequence.append(&manager, *token);
            }
        }
    });
    assert!(sequences.iter().all(|sequence| sequence.blocks.len() == 256));
    // The tokens are the caller's: only the blocks are returned in the measured time.
    let mut blocks: Vec<_> = sequences.into_iter().map(|sequence| sequence.blocks).collect();
    Stream(42).shuffle(&mut blocks);
    let (free, ()) = time(1000 * 256, || drop(blocks));
    Costs::from([
        ("W1 admit, per sequence", admit),
        ("W1 decode, per token", decode),
        ("W1 free, per block", free),
    ])
}

pub fn w3() -> Costs {
    let manager = manager(100_000);
    let (mut fork, mut append, mut free) = (0.0, 0.0, 0.0);
    const ROUNDS: u64 = 10;
    for round in 0..ROUNDS {
        let prompt = tokens(round + 1, 0..1000);
        let _parent = Sequence::admit(&manager, &prompt);
        let (cost, mut children) =
            time(64, || (0..64).map(|_| Sequence::admit(&manager, &prompt)).collect::<Vec<_>>());
        fork += cost;
        let steps: Vec<Vec<i32>> = (0..256)
            .map(|p| (0..64).map(|child| tok(1000 + round * 64 + child, p)).collect())
            .collect();
        append += time(64 * 256, || {
            for step in &steps {
                for (child, token) in children.iter_mut().zip(step) {
                    child.append(&manager, *token);
                }
            }
        })
        .0;
        let blocks: Vec<_> = children.into_iter().map(|child| (child.blocks, child.open)).collect();
        free += time(64, || drop(blocks)).0;
    }
    let rounds = ROUNDS as f64;
    Costs::from([
        ("W3 fork, per child", fork / rounds),
        ("W3 append, per token", append / rounds),
        ("W3 free, per child", free / rounds),
    ])
}

pub fn w4() -> Costs {
    let manager = manager(100_000);
    let mut held = Vec::new();
    let [pair, full] = [50_000, 99_900].map(|count| {
        held.resize_with(count, || take(&manager));
        let mut random = Stream(3);
        let picks: Vec<usize> = (0..500_000).map(|_| random.below(count)).collect();
        let churn = || {
            for pick in &picks {
                held[*pick] = take(&manager);
            }
        };
        time(picks.len(), churn).0
    });
    let (immediate, ()) = time(500_000, || {
        for _ in 0..500_000 {
            drop(black_box(take(&manager)));
        }
    });
    Costs::from([
        ("W4 alloc + free random", pair),
        ("W4 alloc + free random, 99.9 % full", full),
        ("W4 alloc + free at once, 99.9 % full", immediate),
    ])
}

pub fn churn() -> Costs {
    const BLOCKS: usize = 50_000;
    let cost = |free: usize| {
        let manager = manager(BLOCKS);
        let stay: Vec<_> = (0..((BLOCKS - free) / 50) as u64)
            .map(|i| Sequence::admit(&manager, &tokens(i + 1, 0..50 * BLOCK as u64 - 1)))
            .collect();
        let prompts: Vec<_> =
            (0..2000u64).map(|i| tokens(1_000_000 + i, 0..2 * BLOCK as u64 + 1)).collect();
        let (cost, ()) = time(prompts.len(), || {
            for prompt in &prompts {
                let mut sequence = Sequence::admit(&manager, prompt);
                (0..2 * BLOCK).for_each(|_| sequence.append(&manager, 7));
            }
        });
        drop(stay);
        cost
    };
    Costs::from([
        ("short sequence, half full", cost(BLOCKS / 2)),
        ("short sequence, 99.9 % full", cost(BLOCKS / 1000)),
    ])
}

pub fn w5(n: usize) -> Costs {
    let manager = manager(n);
    let hashes: Vec<PositionalLineageHash> = (0..n as u64)
        .map(|i| {
            let parent = (i % 256 > 0).then(|| splitmix(i - 1));
            PositionalLineageHash::new(splitmix(i), parent, i % 256)
        })
        .collect();
    let (alloc, blocks) = time(n, || (0..n).map(|_| take(&manager)).collect::<Vec<_>>());
    let mut held = Vec::with_capacity(n);
    let (register, ()) = time(n, || {
        for (block, hash) in blocks.into_iter().zip(&hashes) {
            let block = block.stage(*hash, BLOCK).expect("the block size agrees");
            held.push(manager.register_block(block));
        }
    });
    let mut found = Vec::with_capacity(n);
    let (lookup, ()) = time(n, || {
        hashes.chunks(256).for_each(|chain| found.extend(manager.match_blocks(chain)));
    });
    assert_eq!(found.len(), n);
    drop(found);
    let (release, ()) = time(n, || drop(held));
    let (again, ()) = time(n, || {
        let mut found = Vec::with_capacity(n);
        hashes.chunks(256).for_each(|chain| found.extend(manager.match_blocks(chain)));
        assert_eq!(found.len(), n);
        drop(found);
    });
    let (evict, blocks) = time(n, || (0..n).map(|_| take(&manager)).collect::<Vec<_>>());
    assert_eq!(blocks.len(), n);
    Costs::from([
        ("alloc", alloc),
        ("register, hashes given", register),
        // It has one kind.
        ("lookup held, shared", lookup),
        ("lookup held, exclusive", lookup),
        ("release", release),
        ("lookup + release idle", again),
        ("evict + alloc", evict),
    ])
}
