//! What `skip_layers`, `first` and `residual` leave exact: bit by bit, through rollback, fork, sharing,
//! eviction and stores, and in bytes.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::sync::Arc;

use common::{Engine, Random, config, relative_error, tolerance};
use kvmgr::attention::{Options, reference};
use kvmgr::device::tensor::Tensor;
use kvmgr::manager::{Manager, ManagerConfig, Session};
use kvmgr::policy::Pipeline;
use kvmgr::quantizer::{self, Cell, Side};
use kvmgr::shape::{LaneWidth, ModelShape};
use kvmgr::slots::{Slots, SlotsConfig};
use kvmgr::store;

const SHAPE: ModelShape = ModelShape::new(4, 4, 2, 32);
const BLOCK: usize = 16;
const DIM: usize = SHAPE.head_dim;

/// A sequence and what was written to each head and side of it, rounded to f16.
struct Watched {
    session: Session,
    rows: Vec<Vec<f32>>,
    /// The end of the blocks that are sealed, in a lane that quantizes.
    sealed: usize,
}

/// What a spec promises.
#[derive(Clone, Copy)]
struct Promise {
    spec: &'static str,
    /// Layers at either end.
    skip: usize,
    first: usize,
    residual: usize,
}

const PROMISES: [Promise; 5] = [
    Promise { spec: "quant(kivi2, first=4, residual=32)", skip: 0, first: 4, residual: 32 },
    Promise { spec: "quant(k=q4_0, v=q8_0, skip_layers=1)", skip: 1, first: 0, residual: 0 },
    Promise {
        spec: "quant(had+q4_0, skip_layers=1, first=17, residual=40)",
        skip: 1,
        first: 17,
        residual: 40,
    },
    Promise { spec: "quant(v=int4, residual=1)", skip: 0, first: 0, residual: 1 },
    Promise { spec: "quant(q4_0, first=1)", skip: 0, first: 1, residual: 0 },
];

fn f16(values: &[f32]) -> Vec<f32> {
    round_trip("f16", Side::Key, values, 1)
}

/// `rows` encoded and decoded, in cells of `tokens` rows.
fn round_trip(spec: &str, side: Side, rows: &[f32], tokens: usize) -> Vec<f32> {
    let quantizer = quantizer::create(spec, side).unwrap();
    let mut out = vec![0.0; rows.len()];
    for (rows, out) in rows.chunks(tokens * DIM).zip(out.chunks_mut(tokens * DIM)) {
        let mut bytes = vec![0; quantizer.bytes(tokens, DIM)];
        quantizer.encode(rows, DIM, &mut bytes);
        let cell = Cell { bytes: &bytes, tokens, dim: DIM, rows: 0..tokens, ahead: &[] };
        quantizer.decode(&cell, out);
    }
    out
}

impl Watched {
    fn new(session: Session) -> Self {
        let heads = SHAPE.num_layers * SHAPE.num_kv_heads * 2;
        Self { session, rows: vec![Vec::new(); heads], sealed: 0 }
    }

    /// Reserves `n` tokens, attends, compares with the reference, and commits `m` of them.
    fn step(&mut self, engine: &mut Engine, n: usize, m: usize, tokens: Option<&[i32]>) {
        self.session.sequence_mut().reserve(n).unwrap();
        engine.attention.plan(&[(self.session.sequence(), n)]).unwrap();
        for layer in 0..SHAPE.num_layers {
            let width = SHAPE.num_kv_heads * DIM;
            let sides = [(); 2].map(|()| engine.random.normals(n * width));
            engine.append(layer, &sides[0], &sides[1]);
            for (side, rows) in sides.iter().enumerate() {
                for (i, row) in rows[..m * width].chunks_exact(DIM).enumerate() {
                    let head = (layer * SHAPE.num_kv_heads + i % SHAPE.num_kv_heads) * 2 + side;
                    self.rows[head].extend(f16(row));
                }
            }
            let query = engine.random.normals(n * SHAPE.num_q_heads * DIM);
            let step = engine.run(layer, query, &Options::default());
            let sequence = self.session.sequence();
            for q_head in 0..SHAPE.num_q_heads {
                let at = ((n - 1) * SHAPE.num_q_heads + q_head) * DIM;
                let query = &step.query[at..][..DIM];
                let options = Options::default();
                let at_end = (n - 1, n);
                let expected = reference::attend(sequence, layer, q_head, query, at_end, &options);
                let error = relative_error(&step.output[at..][..DIM], &expected.output);
                assert!(error < tolerance(engine), "layer {layer} head {q_head}: {error}");
            }
        }
        self.session.commit(m, tokens).unwrap();
    }

    fn truncate(&mut self, n: usize) {
        self.session.sequence_mut().truncate(n).unwrap();
        self.rows.iter_mut().for_each(|rows| rows.truncate(n * DIM));
    }

    /// Compares every row, bit by bit, and the bytes of the allocator.
    fn check(&mut self, engine: &Engine, promise: Promise) {
        let Promise { spec, skip, first, residual } = promise;
        let sequence = self.session.sequence();
        let len = sequence.num_tokens();
        let due = len.saturating_sub(residual) / BLOCK * BLOCK;
        self.sealed = self.sealed.max(due);
        let exact_head = first.next_multiple_of(BLOCK);
        let policy = Pipeline::parse(spec).unwrap();
        let names = [policy.quantizers().0.unwrap_or("f16"), policy.quantizers().1.unwrap()];
        for (i, rows) in self.rows.iter().enumerate() {
            let (layer, head, side) = (i / 2 / 2, i / 2 % 2, [Side::Key, Side::Value][i % 2]);
            let mut found = Vec::new();
            sequence.decode(layer, head, side, &mut found);
            let is_skipped = layer < skip || layer + skip >= SHAPE.num_layers;
            let sealed = if is_skipped { 0 } else { self.sealed };
            for block in (0..len).step_by(BLOCK) {
                let range = block * DIM..(block + BLOCK).min(len) * DIM;
                let expected = match block >= exact_head && block < sealed {
                    true => round_trip(names[i % 2], side, &rows[range.clone()], BLOCK),
                    false => rows[range.clone()].to_vec(),
                };
                assert!(found[range] == expected, "{spec}: {len} tokens, head {i}, {block}");
            }
        }
        let stats = engine.manager.stats().cache;
        assert_eq!(stats.bytes_used as usize, sequence.bytes(), "{spec}");
        assert_eq!(sequence.bytes(), self.bytes(engine, promise), "{spec}: {len} tokens");
        engine.manager.cache().check_integrity();
    }

    /// The bytes that the promise leaves.
    fn bytes(&self, engine: &Engine, promise: Promise) -> usize {
        let cache = engine.manager.cache();
        let len = self.session.sequence().num_tokens();
        let blocks = len.div_ceil(BLOCK);
        let first = promise.first.next_multiple_of(BLOCK).min(self.sealed);
        let sealed = (self.sealed - first) / BLOCK;
        let open = |blocks: usize| blocks * cache.formats()[0].block_bytes;
        let lanes = cache.config().num_lanes();
        let skipped = 2 * promise.skip * lanes / SHAPE.num_layers;
        let mixed = open(blocks - sealed) + sealed * cache.formats()[1].block_bytes;
        skipped * open(blocks) + (lanes - skipped) * mixed
    }
}

fn engine(spec: &str, change: impl FnOnce(&mut ManagerConfig)) -> Engine {
    let mut config = config(SHAPE, spec);
    change(&mut config);
    Engine::new(config, 7)
}

#[test]
fn exact_rows_are_exact_and_the_others_are_not_through_drafts_and_rollback() {
    for (seed, promise) in PROMISES.into_iter().enumerate() {
        let mut random = Random(seed as u64);
        for width in [LaneWidth::Layer, LaneWidth::Head] {
            let mut engine = engine(promise.spec, |config| config.lane_width = Some(width));
            let mut watched = Watched::new(engine.session());
            watched.step(&mut engine, 150, 150, None);
            watched.session.end_prefill().unwrap();
            watched.check(&engine, promise);
            for _ in 0..60 {
                let n = random.within(1, 6);
                watched.step(&mut engine, n, random.within(0, n), None);
                let len = watched.session.sequence().num_tokens();
                watched.check(&engine, promise);
                // Into the window alone: what was sealed stays sealed.
                let drop = random.below(13).min(len - watched.sealed);
                watched.truncate(len - drop);
                watched.check(&engine, promise);
            }
            drop(watched);
            assert_eq!(engine.manager.stats().cache.bytes_used, 0);
        }
    }
}

#[test]
fn the_coarsest_lanes_are_those_of_layers_only_if_layers_differ() {
    let width = |spec: &str| engine(spec, |_| ()).manager.cache().config().lane_width;
    assert_eq!(width("quant(q4_0, first=4, residual=64)"), LaneWidth::Sequence);
    assert_eq!(width("quant(q4_0, skip_layers=1)"), LaneWidth::Layer);
}

#[test]
fn a_cut_inside_sealed_blocks_and_a_way_out_and_back_keep_what_is_there() {
    let promise = PROMISES[0];
    let mut engine = engine(promise.spec, |_| ());
    let mut watched = Watched::new(engine.session());
    watched.step(&mut engine, 200, 200, None);
    let rows = |watched: &Watched| {
        let mut all = Vec::new();
        let mut head = Vec::new();
        for i in 0..16 {
            let side = [Side::Key, Side::Value][i % 2];
            watched.session.sequence().decode(i / 4, i / 2 % 2, side, &mut head);
            all.extend_from_slice(&head[..100 * DIM]);
        }
        all
    };
    let before = rows(&watched);
    // Inside a sealed block, which then holds no more rows; what follows has blocks of its own.
    watched.truncate(100);
    assert_eq!(rows(&watched), before);
    watched.step(&mut engine, 20, 20, None);
    let bytes = watched.session.sequence().bytes();
    watched.session.preempt(store::create("host").unwrap()).unwrap();
    assert_eq!(engine.manager.stats().cache.bytes_used, 0);
    watched.session.resume().unwrap();
    assert_eq!((rows(&watched), watched.session.sequence().bytes()), (before, bytes));
    watched.step(&mut engine, 90, 90, None);
    engine.manager.cache().check_integrity();
}

#[test]
fn prefixes_are_shared_up_to_the_residual_window_and_come_back_from_a_store() {
    let promise = PROMISES[2];
    let tokens: Vec<i32> = (0..300).collect();
    let mut engine = engine(promise.spec, |config| {
        (config.prefix, config.num_blocks) = (true, 80);
        config.store = Some(store::create("host").unwrap());
    });
    let mut first = Watched::new(engine.session());
    first.step(&mut engine, 200, 200, Some(&tokens[..200]));
    let mut second = Watched::new(engine.session());
    // 200 - 40 tokens are out of the window: ten blocks.
    assert_eq!(second.session.match_prefix(&tokens).unwrap(), 160);
    let decode = |session: &Session| {
        let mut all = Vec::new();
        for i in 0..16 {
            let mut head = Vec::new();
            let side = [Side::Key, Side::Value][i % 2];
            session.sequence().decode(i / 4, i / 2 % 2, side, &mut head);
            all.extend_from_slice(&head[..160 * DIM]);
        }
        all
    };
    let rows = decode(&first.session);
    assert!(decode(&second.session) == rows);
    drop((first, second));
    // Another prompt takes all blocks, so that the prefix has to go to the store.
    let mut other = Watched::new(engine.session());
    other.step(&mut engine, 310, 310, None);
    drop(other);
    let mut third = engine.session();
    assert_eq!(third.match_prefix(&tokens).unwrap(), 160);
    assert!(engine.manager.stats().store_hits >= 10);
    assert!(decode(&third) == rows);
    engine.manager.cache().check_integrity();
}

#[test]
fn blocks_that_a_fork_shares_are_sealed_once_they_are_private() {
    let promise = PROMISES[2];
    let mut engine = engine(promise.spec, |_| ());
    let mut parent = Watched::new(engine.session());
    parent.step(&mut engine, 120, 120, None);
    let mut child = Watched {
        session: parent.session.fork().unwrap(),
        rows: parent.rows.clone(),
        sealed: parent.sealed,
    };
    child.step(&mut engine, 50, 50, None);
    let shared = child.session.sequence().bytes();
    drop(parent);
    child.step(&mut engine, 1, 1, None);
    assert!(child.session.sequence().bytes() < shared);
    child.check(&engine, promise);
}

#[test]
fn what_a_policy_leaves_is_exact_where_it_was() {
    for (spec, evicts) in [
        ("every(3) | h2o(recent=8) | keep_tokens(70) | quant(q4_0, first=4, residual=24)", true),
        ("snapkv(w=16) | keep_tokens(70) | quant(kivi2, residual=24)", true),
        ("stream(sink=4, recent=66) | quant(q8_0, first=4, residual=24)", true),
        ("snapkv(w=16) | keep(1.0) | quant(kivi2, residual=24)", false),
    ] {
        let mut engine = engine(spec, |_| ());
        let mut watched = Watched::new(engine.session());
        watched.step(&mut engine, 150, 150, None);
        watched.session.end_prefill().unwrap();
        for step in 0..40 {
            watched.step(&mut engine, 1, 1, None);
            let sequence = watched.session.sequence();
            assert_eq!(sequence.num_evicted() > 0, evicts);
            let window = sequence.num_tokens() as i32 - 24;
            for (i, rows) in watched.rows.iter().enumerate() {
                let (layer, head) = (i / 4, i / 2 % 2);
                let (mut found, mut positions) = (Vec::new(), Vec::new());
                sequence.decode(layer, head, [Side::Key, Side::Value][i % 2], &mut found);
                sequence.positions(sequence.locate(layer, head).0, &mut positions);
                let is_exact = |(found, position): &(&[f32], i32)| {
                    **found == rows[*position as usize * DIM..][..DIM]
                };
                let all: Vec<(&[f32], i32)> = found.chunks(DIM).zip(positions).collect();
                let mut latest = all.iter().filter(|(_, position)| *position >= window);
                assert!(latest.all(is_exact), "{spec}: step {step}");
                if spec.contains("first") {
                    let mut first = all.iter().filter(|(_, position)| *position < 4);
                    assert!(first.all(is_exact), "{spec}: step {step}");
                }
                let quantized = all.iter().filter(|pair| !is_exact(pair)).count();
                assert!(quantized >= 16, "{spec}: {quantized} of {}", all.len());
            }
            engine.manager.cache().check_integrity();
        }
    }
}

#[test]
fn options_that_cannot_be_are_refused_with_column_and_reason() {
    let refused = |spec: &str| Pipeline::parse(spec).expect_err(spec).message().to_string();
    for (spec, message) in [
        ("quant(q4_0, first=-1)", "column 13: first is -1, must be a whole number in 0..=1048576"),
        (
            "full | quant(q4_0, residual=1.5)",
            "column 20: residual is 1.5, must be a whole number in 0..=1048576",
        ),
        (
            "quant(q4_0, skip_layers=2000)",
            "column 13: skip_layers is 2000, must be a whole number in 0..=1024",
        ),
        ("quant(first=4)", "column 1: quant names no quantizer"),
        (
            "quant(k=f16, v=bf16, residual=64)",
            "column 22: residual has no effect, quant(k=f16, v=bf16, residual=64) quantizes nothing",
        ),
    ] {
        assert_eq!(refused(spec), message);
    }
    let refused = |change: &dyn Fn(&mut ManagerConfig)| {
        let mut config = config(SHAPE, "quant(q4_0, skip_layers=1)");
        change(&mut config);
        Manager::new(config).unwrap_err().message().to_string()
    };
    let message = refused(&|config| config.lane_width = Some(LaneWidth::Sequence));
    assert!(message.contains("skip_layers needs lanes of width Layer"), "{message}");
    let message = refused(&|config| config.spec = "quant(q4_0, skip_layers=2)".into());
    assert!(message.contains("skip_layers is 2"), "{message}");
    assert!(message.contains("leaves none to quantize"), "{message}");
}

#[test]
fn prefixes_of_other_options_are_not_exchanged() {
    let root = |spec: &str| {
        let engine = engine(spec, |config| config.lane_width = Some(LaneWidth::Layer));
        *Arc::clone(engine.manager.cache()).root()
    };
    let plain = root("quant(q4_0)");
    assert_eq!(plain, root("quant(q4_0, residual=64)"));
    assert_ne!(plain, root("quant(q4_0, first=4)"));
    assert_ne!(plain, root("quant(q4_0, skip_layers=1)"));
}

#[test]
fn slots_skip_layers_and_refuse_what_needs_an_order_of_tokens() {
    let slots = |spec: &str, layer: usize| {
        let config = SlotsConfig {
            layer,
            num_layers: 3,
            num_q_heads: 2,
            num_kv_heads: 1,
            key_dim: DIM,
            value_dim: DIM,
            num_slots: 64,
            num_streams: 1,
            block_size: BLOCK,
            pieces: false,
        };
        Slots::new(config, spec)
    };
    let bytes = |spec: &str, layer: usize| {
        let mut slots = slots(spec, layer).unwrap();
        let rows = Random(1).normals(BLOCK * DIM);
        let rows = Tensor::from_slice(&rows, [BLOCK, 1, DIM]);
        let numbers: Vec<u32> = (0..BLOCK as u32).collect();
        for side in [Side::Key, Side::Value] {
            slots.write(side, &numbers, &rows, false).unwrap();
        }
        slots.stats().bytes_used
    };
    let skipping = [0, 1, 2].map(|layer| bytes("quant(q4_0, skip_layers=1)", layer));
    let (exact, quantized) = (bytes("full", 0), bytes("quant(q4_0)", 0));
    assert_eq!(skipping, [exact, quantized, exact]);
    assert!(quantized < exact);
    for spec in ["quant(q4_0, first=4)", "full | quant(q4_0, residual=4)"] {
        let message = slots(spec, 0).unwrap_err().message().to_string();
        let column = if spec.starts_with("full") { 8 } else { 1 };
        assert!(message.starts_with(&format!("column {column}: slots have no order")), "{message}");
    }
}
