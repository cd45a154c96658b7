//! The block tables against a slow model of an engine: what every table names is what its sequence
//! wrote, through forks, drafts, rollbacks, preemption, reclaim and groups of a hybrid model.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::collections::{HashMap, HashSet};

use common::Random;
use kvmgr::block::groups::Group;
use kvmgr::block::prefix;
use kvmgr::block::tables::{NO_BLOCK, Placement};
use kvmgr::block::{BlockPool, Request, SequenceId, Tables, TablesConfig};
use kvmgr::error::Kind;
use kvmgr::evictor::{self, EVICTORS};

const SIZE: usize = 4;

/// What a block of the engine's memory holds: for each row the tokens up to and including it; a
/// state is in row 0.
type Content = Vec<Vec<i32>>;

struct Live {
    id: SequenceId,
    /// Committed tokens.
    tokens: Vec<i32>,
    /// The rest of the prompt.
    rest: Vec<i32>,
    /// While parked: the bytes of each place.
    parked: Option<HashMap<u32, Content>>,
}

struct Model {
    pool: BlockPool,
    tables: Tables,
    live: Vec<Live>,
    dead: Vec<SequenceId>,
    /// The tokens of the last ones that ended.
    ended: Vec<Vec<i32>>,
    memory: HashMap<u32, Content>,
    hits: usize,
    states_restored: usize,
}

fn groups_have_states(groups: &[Group]) -> bool {
    groups.iter().any(|group| matches!(group, Group::Recurrent(_)))
}

impl Model {
    fn new(blocks: usize, evictor: &str, config: TablesConfig) -> Self {
        let pool = BlockPool::new(blocks, evictor::create(evictor, blocks).unwrap());
        let tables = Tables::new(config).unwrap();
        Self {
            pool,
            tables,
            live: Vec::new(),
            dead: Vec::new(),
            ended: Vec::new(),
            memory: HashMap::new(),
            hits: 0,
            states_restored: 0,
        }
    }

    fn groups(&self) -> Vec<Group> {
        self.tables.config().groups.clone()
    }

    fn has_states(&self) -> bool {
        groups_have_states(&self.tables.config().groups)
    }

    fn step(&mut self, random: &mut Random) {
        match random.below(100) {
            0..10 => self.admit(random),
            10..16 => self.fork(random),
            16..26 => self.release(random),
            26..29 => self.misuse(random),
            29..34 => self.truncate(random),
            34..38 => self.park(random),
            38..42 => self.resume(random),
            42..50 => self.draft(random),
            50..60 => self.read_prompt(random),
            _ => self.append(random),
        }
    }

    fn pick(&self, random: &mut Random) -> Option<usize> {
        let present: Vec<_> =
            (0..self.live.len()).filter(|i| self.live[*i].parked.is_none()).collect();
        (!present.is_empty()).then(|| present[random.below(present.len())])
    }

    fn admit(&mut self, random: &mut Random) {
        // New tokens, or those of somebody before and a few more.
        let mut prompt = match &self.ended[..] {
            ended @ [_, ..] if random.chance(30) => ended[random.below(ended.len())].clone(),
            _ => Vec::new(),
        };
        prompt.extend((0..random.within(1, 18)).map(|_| random.below(2) as i32));
        prompt.truncate(24);
        let root = prefix::root(SIZE, random.below(2) as u64, b"model");
        match self.tables.admit(&mut self.pool, &Request::new(&prompt, root)) {
            Ok(admission) => {
                let found = admission.num_cached;
                assert!(found < prompt.len() && found % SIZE == 0);
                assert_eq!(self.tables.num_tokens(admission.id).unwrap(), found);
                assert_eq!(self.tables.num_reserved(admission.id).unwrap(), prompt.len());
                self.hits += found;
                let (tokens, rest) = (prompt[..found].to_vec(), prompt[found..].to_vec());
                self.live.push(Live { id: admission.id, tokens, rest, parked: None });
            }
            Err(error) => assert_eq!(error.kind(), Kind::OutOfBlocks),
        }
    }

    /// Computes and commits a piece of a prompt.
    fn read_prompt(&mut self, random: &mut Random) {
        let Some(i) = self.pick(random) else { return };
        let count = random.below(self.live[i].rest.len() + 1);
        let piece: Vec<i32> = self.live[i].rest.drain(..count).collect();
        self.write(i, &piece);
        self.tables.commit(&mut self.pool, &[self.live[i].id], &[count as u32], &[]).unwrap();
        self.live[i].tokens.extend(piece);
    }

    /// Reserves, writes and commits drafts, and drops those that were wrong.
    fn draft(&mut self, random: &mut Random) {
        let Some(i) = self.pick(random) else { return };
        if !self.live[i].rest.is_empty() {
            return;
        }
        let count = random.within(1, 6);
        let before = self.snapshot();
        let (id, counts) = (self.live[i].id, [count as u32]);
        if let Err(error) = self.tables.reserve(&mut self.pool, &[id], &counts) {
            assert_eq!(error.kind(), Kind::OutOfBlocks);
            assert_eq!(before, self.snapshot(), "a failing call changes nothing");
            return;
        }
        self.run_copies();
        // A state that has seen a wrong draft cannot go back, so those models have none.
        let accepted = if self.has_states() { count } else { random.below(count + 1) };
        let drafts: Vec<i32> = (0..count).map(|_| random.below(2) as i32).collect();
        self.write(i, &drafts);
        self.tables.commit(&mut self.pool, &[id], &[accepted as u32], &drafts[..accepted]).unwrap();
        self.live[i].tokens.extend(&drafts[..accepted]);
        if random.below(2) == 0 {
            let kept = self.live[i].tokens.len();
            self.tables.truncate(&mut self.pool, id, kept).unwrap();
        }
    }

    fn append(&mut self, random: &mut Random) {
        let ready: Vec<usize> = (0..self.live.len())
            .filter(|i| {
                let live = &self.live[*i];
                let reserved = self.tables.num_reserved(live.id).unwrap();
                live.parked.is_none() && live.rest.is_empty() && reserved > live.tokens.len()
            })
            .filter(|_| random.below(2) == 0)
            .collect();
        let ids: Vec<_> = ready.iter().map(|i| self.live[*i].id).collect();
        let tokens: Vec<_> = ready.iter().map(|_| random.below(2) as i32).collect();
        for (i, token) in ready.iter().zip(&tokens) {
            self.write(*i, &[*token]);
        }
        let before = self.snapshot();
        if let Err(error) = self.tables.append(&mut self.pool, &ids, &tokens) {
            assert_eq!(error.kind(), Kind::OutOfBlocks);
            assert_eq!(before, self.snapshot(), "a failing call changes nothing");
            // The same step again after somebody made room: rows may be written twice.
            if self.has_states() {
                ready.iter().rev().for_each(|i| self.end(*i));
            }
            return;
        }
        self.run_copies();
        for (i, token) in ready.iter().zip(tokens) {
            self.live[*i].tokens.push(token);
        }
    }

    fn fork(&mut self, random: &mut Random) {
        let Some(i) = self.pick(random) else { return };
        match self.tables.fork(&mut self.pool, self.live[i].id) {
            Ok(id) => {
                self.run_copies();
                let tokens = self.live[i].tokens.clone();
                self.live.push(Live { id, tokens, rest: Vec::new(), parked: None });
            }
            Err(error) if error.kind() == Kind::InvalidState => {
                assert!(!self.live[i].rest.is_empty());
            }
            Err(error) => assert!(error.kind() == Kind::OutOfBlocks && self.has_states()),
        }
    }

    fn truncate(&mut self, random: &mut Random) {
        let Some(i) = self.pick(random) else { return };
        let kept = random.below(self.live[i].tokens.len() + 1);
        match self.tables.truncate(&mut self.pool, self.live[i].id, kept) {
            Ok(()) => {
                let went_back = kept > 0 && kept < self.live[i].tokens.len();
                self.states_restored += usize::from(went_back && self.has_states());
                self.live[i].tokens.truncate(kept);
                self.live[i].rest.clear();
            }
            Err(error) => {
                let is_window = |group: &Group| matches!(group, Group::Window(_));
                match error.kind() {
                    Kind::Unsupported => assert!(self.has_states()),
                    Kind::InvalidState => {
                        assert!(self.has_states() || self.groups().iter().any(is_window));
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    fn park(&mut self, random: &mut Random) {
        let Some(i) = self.pick(random) else { return };
        if !self.live[i].rest.is_empty() {
            return;
        }
        let placements = self.tables.park(&mut self.pool, self.live[i].id).unwrap();
        let bytes =
            |it: &Placement| (it.place, self.memory.get(&it.block.0).cloned().unwrap_or_default());
        self.live[i].parked = Some(placements.iter().map(bytes).collect());
        let id = self.live[i].id;
        let kind = self.tables.append(&mut self.pool, &[id], &[1]).unwrap_err().kind();
        assert_eq!(kind, Kind::InvalidState);
    }

    fn resume(&mut self, random: &mut Random) {
        let parked: Vec<_> =
            (0..self.live.len()).filter(|i| self.live[*i].parked.is_some()).collect();
        let Some(i) = (!parked.is_empty()).then(|| parked[random.below(parked.len())]) else {
            return;
        };
        match self.tables.resume(&mut self.pool, self.live[i].id) {
            Ok(placements) => {
                let bytes = self.live[i].parked.take().unwrap();
                for Placement { place, block } in placements {
                    self.memory.insert(block.0, bytes[&place].clone());
                }
            }
            Err(error) => assert_eq!(error.kind(), Kind::OutOfBlocks),
        }
    }

    fn release(&mut self, random: &mut Random) {
        if !self.live.is_empty() {
            self.end(random.below(self.live.len()));
        }
    }

    fn end(&mut self, i: usize) {
        let live = self.live.swap_remove(i);
        self.tables.release(&mut self.pool, &[live.id]).unwrap();
        self.dead.push(live.id);
        self.ended.push(live.tokens);
        if self.ended.len() > 8 {
            self.ended.remove(0);
        }
    }

    fn misuse(&mut self, random: &mut Random) {
        let foreign = SequenceId(random.next() | 1 << 31);
        let stale = self.dead.last().copied().unwrap_or(foreign);
        for id in [stale, foreign, SequenceId(0)] {
            let kind = |result: kvmgr::error::Result<()>| result.unwrap_err().kind();
            let (pool, tables) = (&mut self.pool, &mut self.tables);
            assert_eq!(kind(tables.release(pool, &[id])), Kind::InvalidHandle);
            assert_eq!(kind(tables.append(pool, &[id], &[1])), Kind::InvalidHandle);
            assert_eq!(kind(tables.reserve(pool, &[id], &[1])), Kind::InvalidHandle);
            assert_eq!(kind(tables.commit(pool, &[id], &[1], &[1])), Kind::InvalidHandle);
            assert_eq!(kind(tables.truncate(pool, id, 0)), Kind::InvalidHandle);
            assert!(tables.fork(pool, id).is_err() && tables.blocks(id).is_err());
            assert!(tables.park(pool, id).is_err() && tables.resume(pool, id).is_err());
        }
        if let Some(Live { id, .. }) = self.live.first() {
            let twice = [*id, *id];
            assert!(self.tables.append(&mut self.pool, &twice, &[1, 2]).is_err());
            assert!(self.tables.reserve(&mut self.pool, &twice, &[1, 2]).is_err());
            assert!(self.tables.release(&mut self.pool, &twice).is_err());
        }
    }

    fn run_copies(&mut self) {
        for copy in self.tables.take_copies() {
            let content = self.memory.get(&copy.source.0).cloned().unwrap_or_default();
            self.memory.insert(copy.target.0, content);
        }
    }

    /// Computes the next tokens of a sequence: writes their rows and advances states.
    fn write(&mut self, i: usize, tokens: &[i32]) {
        let (start, id) = (self.live[i].tokens.len(), self.live[i].id);
        let all = [&self.live[i].tokens, tokens].concat();
        let groups = self.groups();
        let blocks = self.tables.blocks(id).unwrap().to_vec();
        let at = |chunk: usize, group: usize| blocks[chunk * groups.len() + group];
        if tokens.is_empty() {
            return;
        }
        for (index, group) in groups.iter().enumerate() {
            if let Group::Recurrent(interval) = group {
                let state = |end: usize| {
                    let chunks = (end - 1) / SIZE..blocks.len() / groups.len();
                    chunks.map(|chunk| at(chunk, index)).find(|block| *block != NO_BLOCK).unwrap()
                };
                if start > 0 {
                    let content = &self.memory[&state(start)][0];
                    assert_eq!(content[..], all[..start], "the state is another sequence's");
                }
                for chunk in start / SIZE..all.len() / SIZE {
                    if (chunk + 1) % *interval as usize == 0 {
                        let content = vec![all[..(chunk + 1) * SIZE].to_vec()];
                        self.memory.insert(at(chunk, index), content);
                    }
                }
                self.memory.insert(state(all.len()), vec![all.clone()]);
                continue;
            }
            for row in start..all.len() {
                let content = self.memory.entry(at(row / SIZE, index)).or_default();
                content.resize(SIZE, Vec::new());
                content[row % SIZE] = all[..=row].to_vec();
            }
        }
    }

    fn snapshot(&self) -> Vec<(Vec<u32>, usize, usize)> {
        let table = |live: &Live| {
            let (tables, id) = (&self.tables, live.id);
            let blocks = tables.blocks(id).unwrap().to_vec();
            (blocks, tables.num_tokens(id).unwrap(), tables.num_reserved(id).unwrap())
        };
        self.live.iter().map(table).collect()
    }

    /// Every row that a table names and a token needs is what the sequence wrote.
    fn check(&self) {
        self.pool.check_integrity();
        let groups = self.groups();
        let mut used = HashSet::new();
        for live in self.live.iter().filter(|live| live.parked.is_none()) {
            let blocks = self.tables.blocks(live.id).unwrap();
            assert_eq!(self.tables.num_tokens(live.id).unwrap(), live.tokens.len());
            assert!(blocks.len() >= live.tokens.len().div_ceil(SIZE) * groups.len());
            for (index, group) in groups.iter().enumerate() {
                let first = match group {
                    Group::Full | Group::Latent => 0,
                    Group::Window(window) => {
                        (live.tokens.len() + 1).saturating_sub(*window as usize)
                    }
                    Group::Recurrent(_) => live.tokens.len(),
                };
                for row in first..live.tokens.len() {
                    let content = &self.memory[&blocks[row / SIZE * groups.len() + index]];
                    let expected = &live.tokens[..=row];
                    assert_eq!(content[row % SIZE], expected, "another sequence's row is visible");
                }
            }
            used.extend(blocks.iter().copied().filter(|block| *block != NO_BLOCK));
        }
        assert_eq!(self.pool.num_blocks() - self.pool.num_available(), used.len());
    }
}

/// Answers the tokens found and how often a state went back.
fn run(operations: usize, seed: u64, evictor: &str, config: TablesConfig) -> (usize, usize) {
    let mut random = Random(seed);
    let mut model = Model::new(64, evictor, config);
    for operation in 0..operations {
        model.step(&mut random);
        if model.live.len() > 12 {
            model.release(&mut random);
        }
        if operation % 61 == 0 {
            model.check();
        }
    }
    (0..model.live.len()).rev().for_each(|i| model.end(i));
    model.check();
    assert_eq!(model.pool.num_available(), 64, "blocks leak");
    (model.hits, model.states_restored)
}

/// One million operations over all evictors, both ways to treat duplicates and mixes of groups.
#[test]
fn random_operations_agree_with_a_model() {
    let mixes: [&[Group]; 6] = [
        &[Group::Full],
        &[Group::Full, Group::Window(6)],
        &[Group::Window(5), Group::Latent],
        &[Group::Full, Group::Recurrent(2)],
        &[Group::Recurrent(1), Group::Window(3), Group::Full],
        &[Group::Recurrent(2), Group::Full],
    ];
    let runs = 2 * EVICTORS.len() * mixes.len();
    for run_index in 0..runs {
        let groups = mixes[run_index % mixes.len()].to_vec();
        let entry = EVICTORS[run_index / mixes.len() % EVICTORS.len()];
        let dedup = run_index >= runs / 2;
        let config = TablesConfig { groups, dedup, ..TablesConfig::new(SIZE) };
        let has_states = groups_have_states(&config.groups);
        let (hits, restored) = run(1_000_000 / runs + 1, run_index as u64, entry.name, config);
        assert!(hits > 0, "{}: nothing was ever shared", entry.name);
        assert_eq!(restored > 0, has_states, "{}: no state ever went back", entry.name);
    }
}
