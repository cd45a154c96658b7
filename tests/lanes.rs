//! Lanes that lose single rows: split spans against a list of rows.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{Engine, Random, config};
use kvmgr::attention::Options;
use kvmgr::dtype::DType;
use kvmgr::manager::{ManagerConfig, Session};
use kvmgr::quantizer::Side;
use kvmgr::shape::{KeepSet, LaneWidth, ModelShape, Rope};

const SHAPE: ModelShape = ModelShape::new(1, 2, 2, 32);
const BLOCK: usize = 16;

/// A sequence and, for each KV head, the positions and keys that it must hold.
struct Watched {
    session: Session,
    rows: Vec<Vec<(i32, Vec<f32>)>>,
}

impl Watched {
    /// Commits `n` random tokens.
    fn extend(&mut self, engine: &mut Engine, n: usize) {
        let first = self.session.sequence().num_tokens();
        let _ = engine.step(&mut [&mut self.session], &[n]);
        self.session.commit(n, None).unwrap();
        for (head, rows) in self.rows.iter_mut().enumerate() {
            let decoded = decode(&self.session, head);
            let new = decoded.chunks_exact(SHAPE.head_dim).rev().take(n).rev();
            rows.extend((first as i32..).zip(new.map(<[f32]>::to_vec)));
        }
    }

    /// Evicts `n` random rows of each head but the last.
    fn evict(&mut self, random: &mut Random, n: usize) {
        for (head, rows) in self.rows.iter_mut().enumerate() {
            let len = rows.len();
            let gone: Vec<usize> = (0..n).map(|_| random.below(len - 1)).collect();
            let kept: Vec<usize> = (0..len).filter(|i| !gone.contains(i)).collect();
            *rows = kept.iter().map(|i| rows[*i].clone()).collect();
            self.session.sequence_mut().compact(head, &KeepSet::from_indices(kept)).unwrap();
        }
    }

    /// Compares, up to what encoding a row again may change.
    fn check(&self, tolerance: f32) {
        let sequence = self.session.sequence();
        for (head, rows) in self.rows.iter().enumerate() {
            let mut positions = Vec::new();
            sequence.positions(head, &mut positions);
            assert_eq!(positions, rows.iter().map(|row| row.0).collect::<Vec<_>>());
            let decoded = decode(&self.session, head);
            for (found, (position, expected)) in decoded.chunks(SHAPE.head_dim).zip(rows) {
                let is_same = found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= tolerance);
                assert!(is_same, "position {position}");
            }
            let lane = &sequence.lanes()[head];
            let needed = rows.len().div_ceil(BLOCK);
            let blocks = lane.blocks().count();
            assert!(blocks <= needed + 3.max(needed / 16 + 1), "{blocks} blocks, {needed} needed");
            assert!(lane.spans.len() <= 4 * needed + 4, "{} spans", lane.spans.len());
        }
    }

    fn fork(&self) -> Self {
        Self { session: self.session.fork().unwrap(), rows: self.rows.clone() }
    }
}

fn decode(session: &Session, head: usize) -> Vec<f32> {
    let mut rows = Vec::new();
    session.sequence().decode(0, head, Side::Key, &mut rows);
    rows
}

#[test]
fn single_rows_go_without_a_copy_and_everything_else_still_works() {
    for (spec, tolerance) in [("full", 0.0), ("quant(q8_0)", 0.1)] {
        let mut random = Random(3);
        let mut config = config(SHAPE, spec);
        config.lane_width = Some(LaneWidth::Head);
        let mut engine = Engine::new(config, 4);
        let session = engine.session();
        let mut watched = Watched { session, rows: vec![Vec::new(); 2] };
        watched.extend(&mut engine, 200);
        let mut splits = 0;
        for step in 0..120 {
            watched.extend(&mut engine, 1);
            watched.evict(&mut random, 1 + step % 2);
            watched.check(tolerance);
            let lane = &watched.session.sequence().lanes()[0];
            splits += usize::from(lane.spans.len() > lane.blocks().count());
            let used = engine.manager.stats().cache.bytes_used;
            assert_eq!(used, watched.session.sequence().bytes() as u64, "{spec} step {step}");
            if step % 10 == 9 {
                let mut child = watched.fork();
                child.evict(&mut random, 3);
                child.extend(&mut engine, 2);
                child.check(tolerance);
                let end = child.session.sequence().num_tokens() - 5;
                child.session.sequence_mut().truncate(end).unwrap();
                child.rows.iter_mut().for_each(|rows| rows.retain(|row| row.0 < end as i32));
                child.check(tolerance);
                watched.check(tolerance);
                engine.manager.cache().check_integrity();
            }
            if step % 30 == 29 {
                let store = kvmgr::store::create("host").unwrap();
                let before = watched.session.sequence().bytes();
                watched.session.preempt(store).unwrap();
                assert_eq!(engine.manager.stats().cache.bytes_used, 0);
                watched.session.resume().unwrap();
                assert_eq!(watched.session.sequence().bytes(), before);
                watched.check(tolerance);
                engine.manager.cache().check_integrity();
            }
        }
        assert!(splits > 20, "{spec}: {splits} steps with split spans");
        drop(watched);
        assert_eq!(engine.manager.stats().cache.bytes_used, 0);
        engine.manager.cache().check_integrity();
    }
}

/// A sequence whose engine rotates keys and queries, and keys of head 0 before that, by index in the cache.
struct Rotated {
    session: Session,
    rope: Rope,
    keys: Vec<Vec<f32>>,
}

impl Rotated {
    /// Rows `[n, 2 heads]` from the next position on.
    fn rotate(&self, mut rows: Vec<f32>) -> Vec<f32> {
        let first = self.session.sequence().num_tokens();
        for (i, row) in rows.chunks_exact_mut(SHAPE.head_dim).enumerate() {
            self.rope.rotate(row, (first + i / 2) as i32);
        }
        rows
    }

    /// Appends `n` tokens that attend; compares with queries and keys that are turned to their index.
    fn extend(&mut self, engine: &mut Engine, n: usize, name: &str) {
        self.session.sequence_mut().reserve(n).unwrap();
        engine.attention.plan(&[(self.session.sequence(), n)]).unwrap();
        let wide = 2 * SHAPE.head_dim;
        let (keys, queries) = (engine.random.normals(n * wide), engine.random.normals(n * wide));
        engine.append(0, &self.rotate(keys.clone()), &vec![1.0; n * wide]);
        self.keys.extend(keys.chunks_exact(wide).map(|row| row[..SHAPE.head_dim].to_vec()));
        let step = engine.run(0, self.rotate(queries.clone()), &Options::default());
        let turned = |row: &[f32], index: usize| {
            let mut row = row.to_vec();
            self.rope.rotate(&mut row, index as i32);
            row
        };
        for (i, query) in queries.chunks_exact(wide).enumerate() {
            let last = self.keys.len() - n + i;
            let query = turned(&query[..SHAPE.head_dim], last);
            let logits = self.keys[..=last].iter().enumerate().map(|(index, key)| {
                let key = turned(key, index);
                let dot: f32 = query.iter().zip(&key).map(|(a, b)| a * b).sum();
                f64::from(dot / (SHAPE.head_dim as f32).sqrt())
            });
            let expected = logits.map(f64::exp).sum::<f64>().ln();
            let found = f64::from(step.lse[2 * i]);
            assert!((found - expected).abs() < 1e-3, "{name}: {found} instead of {expected}");
        }
        self.session.commit(n, None).unwrap();
    }

    /// Evicts rows by their index.
    fn evict(&mut self, is_gone: impl Fn(usize) -> bool) {
        let kept: Vec<usize> = (0..self.keys.len()).filter(|i| !is_gone(*i)).collect();
        self.keys = kept.iter().map(|i| self.keys[*i].clone()).collect();
        let kept = KeepSet::from_indices(kept);
        (0..2).for_each(|lane| self.session.sequence_mut().compact(lane, &kept).unwrap());
    }
}

/// Rows that were evicted do not count, and after a rollback neither do those that it would have taken.
#[test]
fn indices_inside_the_cache_close_up_after_a_rollback() {
    let config = ManagerConfig {
        dtype: DType::F32,
        lane_width: Some(LaneWidth::Head),
        ..config(SHAPE, "pos(cache_relative)")
    };
    // Few rows are trimmed away, many make survivors move to other blocks, which may be open.
    let evictions: [fn(usize) -> bool; 4] = [
        |i| (40..60).contains(&i),
        |i| (4..84).contains(&i),
        |i| (4..94).contains(&i),
        |i| i % 15 > 0,
    ];
    for (eviction, is_gone) in evictions.into_iter().enumerate() {
        for (left, n) in [(98, 1), (70, 5), (50, 1), (50, 5), (30, 1), (3, 5)] {
            let mut engine = Engine::new(config.clone(), 9);
            let rope = config.rope.clone().unwrap();
            let session = engine.session();
            let mut sequence = Rotated { session, rope, keys: Vec::new() };
            let name = format!("eviction {eviction}, {left} left");
            sequence.extend(&mut engine, 100, &name);
            sequence.evict(is_gone);
            sequence.session.truncate(left).unwrap();
            sequence.keys.truncate((0..left).filter(|i| !is_gone(*i)).count());
            for _ in 0..3 {
                sequence.extend(&mut engine, n, &name);
                sequence.evict(|i| (1..2 + n / 3).contains(&i));
            }
        }
    }
}
