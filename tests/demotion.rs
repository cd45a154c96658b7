//! Rows that a policy demotes: which, in which format, in how many bytes, and what attention, rollback, fork,
//! stores and later runs make of them.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{Engine, Random, config, relative_error, tolerance};
use kvmgr::attention::{Options, reference};
use kvmgr::manager::{Manager, Session};
use kvmgr::policy::{Event, Pipeline};
use kvmgr::quantizer::Side;
use kvmgr::shape::{KeepSet, LaneWidth, ModelShape};
use kvmgr::store;

const SHAPE: ModelShape = ModelShape::new(2, 4, 2, 32);
const BLOCK: usize = 16;
const DIM: usize = SHAPE.head_dim;

/// A row of a head: position, whether it is demoted, key and value.
type Row = (i32, bool, Vec<f32>, Vec<f32>);

/// The rows of a head by position.
fn rows(session: &Session, layer: usize, head: usize) -> Vec<Row> {
    let sequence = session.sequence();
    let (lane, _) = sequence.locate(layer, head);
    let (mut positions, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
    sequence.positions(lane, &mut positions);
    sequence.decode(layer, head, Side::Key, &mut keys);
    sequence.decode(layer, head, Side::Value, &mut values);
    let lane = &sequence.lanes()[lane];
    let demoted = lane.num_demoted();
    assert_eq!(lane.len(), positions.len());
    let row = |i: usize| {
        let of = |side: &[f32]| side[i * DIM..][..DIM].to_vec();
        (positions[i], i < demoted, of(&keys), of(&values))
    };
    let mut rows: Vec<Row> = (0..lane.len()).map(row).collect();
    rows.sort_by_key(|row| row.0);
    rows
}

fn all_rows(session: &Session) -> Vec<Vec<Row>> {
    (0..4).map(|i| rows(session, i / 2, i % 2)).collect()
}

fn start(spec: &str, n: usize) -> (Engine, Session) {
    let mut engine = Engine::new(config(SHAPE, spec), 5);
    let mut session = engine.session();
    let _ = engine.step(&mut [&mut session], &[n]);
    session.commit(n, None).unwrap();
    (engine, session)
}

/// Reserves `n` tokens and attends; every query agrees with the reference over decoded rows.
fn step(engine: &mut Engine, session: &mut Session, n: usize, options: &Options<'_>) {
    session.sequence_mut().reserve(n).unwrap();
    engine.attention.plan(&[(session.sequence(), n)]).unwrap();
    for layer in 0..SHAPE.num_layers {
        let rows = n * SHAPE.num_kv_heads * DIM;
        let (key, value) = (engine.random.normals(rows), engine.random.normals(rows));
        engine.append(layer, &key, &value);
        let query = engine.random.normals(n * SHAPE.num_q_heads * DIM);
        let step = engine.run(layer, query, options);
        for (i, q_head) in (0..n).flat_map(|i| (0..SHAPE.num_q_heads).map(move |head| (i, head))) {
            let at = (i * SHAPE.num_q_heads + q_head) * DIM;
            let query = &step.query[at..][..DIM];
            let sequence = session.sequence();
            let expected = reference::attend(sequence, layer, q_head, query, (i, n), options);
            let error = relative_error(&step.output[at..][..DIM], &expected.output);
            assert!(error < tolerance(engine), "layer {layer}, head {q_head}, query {i}: {error}");
        }
    }
}

fn check_bytes(engine: &Engine, session: &Session) {
    let stats = engine.manager.stats().cache;
    assert_eq!(stats.bytes_used as usize, session.sequence().bytes());
    let mut bytes = 0;
    for lane in session.sequence().lanes() {
        assert!(lane.blocks().count() <= lane.len().div_ceil(BLOCK) + 1);
        let formats = engine.manager.cache().formats();
        bytes += lane.blocks().map(|block| formats[block.view.format()].block_bytes).sum::<usize>();
    }
    assert_eq!(bytes, session.sequence().bytes());
    engine.manager.cache().check_integrity();
}

#[test]
fn what_is_ranked_low_is_demoted_and_memory_falls() {
    for (spec, evicting, width) in [
        ("snapkv(w=16) | keep(0.25) | demote(kivi2)", "snapkv(w=16) | keep(0.25)", None),
        (
            "knorm | adakv(0.2) | keep(0.5) | demote(k=q4_0, v=kivi2) | quant(q8_0)",
            "knorm | adakv(0.2) | keep(0.5) | quant(q8_0)",
            None,
        ),
        (
            "stream(sink=4, recent=36) | demote(q4_0)",
            "stream(sink=4, recent=36)",
            Some(LaneWidth::Layer),
        ),
    ] {
        let make = |spec: &str| {
            let mut config = config(SHAPE, spec);
            config.lane_width = width;
            let mut engine = Engine::new(config, 5);
            let mut session = engine.session();
            let _ = engine.step(&mut [&mut session], &[200]);
            session.commit(200, None).unwrap();
            (engine, session)
        };
        let ((engine, mut session), (_evictor, mut evicted)) = (make(spec), make(evicting));
        let (before, full) = (all_rows(&session), session.sequence().bytes());
        session.end_prefill().unwrap();
        evicted.end_prefill().unwrap();
        check_bytes(&engine, &session);
        let left = session.sequence().bytes();
        assert!(left < full * 8 / 10, "{spec}: {left} of {full} bytes");
        assert_eq!(session.sequence().num_evicted(), 0);
        for ((after, kept), before) in
            all_rows(&session).iter().zip(all_rows(&evicted)).zip(&before)
        {
            let kept: Vec<i32> = kept.iter().map(|row| row.0).collect();
            let is_victim = |row: &&Row| !kept.contains(&row.0);
            let victims: Vec<i32> = before.iter().filter(is_victim).map(|row| row.0).collect();
            let full = victims.len() / BLOCK * BLOCK;
            let demoted: Vec<i32> = after.iter().filter(|row| row.1).map(|row| row.0).collect();
            // The oldest that fill blocks.
            assert_eq!(demoted, victims[..full], "{spec}");
            for (after, before) in after.iter().zip(before) {
                assert_eq!(after.0, before.0);
                let error = |a: &[f32], b: &[f32]| {
                    let b: Vec<f64> = b.iter().map(|x| f64::from(*x)).collect();
                    relative_error(a, &b)
                };
                let errors = [error(&after.2, &before.2), error(&after.3, &before.3)];
                // Rows that stay next to others from the open tail are quantized with them.
                let (least, most) = match (after.1, spec.contains("quant(q8_0)")) {
                    (true, _) => (0.01, 0.7),
                    (false, true) => (0.0, 0.01),
                    (false, false) => (0.0, 0.0),
                };
                let fits = errors.iter().all(|error| (least..=most).contains(error));
                assert!(fits, "{spec}: position {}: {errors:?}", after.0);
            }
        }
    }
}

#[test]
fn attention_over_mixed_lanes_agrees_with_the_reference() {
    let slopes = [0.1, 0.05, 0.02, 0.01];
    let options = [
        Options::default(),
        Options { sliding_window: 60, ..Options::default() },
        Options { alibi_slopes: Some(&slopes), softcap: 5.0, ..Options::default() },
    ];
    for spec in [
        "snapkv(w=16) | keep(0.25) | demote(kivi2)",
        "snapkv(w=16) | keep(0.25) | demote(k=had+q4_0, v=kivi2) | quant(q8_0, first=4, residual=32)",
        "every(4) | h2o(recent=16) | keep(0.3) | demote(int4) | quant(q8_0)",
        "every(1) | tova | keep_tokens(40) | demote(kivi2)",
        "decode: every(8) | keydiff | global | keep_tokens(50) | demote(tq(bits=3))",
    ] {
        for options in &options {
            let (mut engine, mut session) = start(spec, 150);
            session.end_prefill().unwrap();
            for i in 0..60 {
                let n = if i % 20 == 19 { 20 } else { 1 + i % 3 };
                step(&mut engine, &mut session, n, options);
                session.commit(n.div_ceil(2), None).unwrap();
                check_bytes(&engine, &session);
            }
            assert_eq!(session.sequence().num_evicted(), 0);
            let high = |lane: &kvmgr::sequence::Lane| lane.len() - lane.num_demoted();
            let (len, lanes) = (session.sequence().num_tokens(), session.sequence().lanes());
            for lane in lanes {
                assert_eq!(lane.len(), len);
            }
            if spec.contains("every") && !spec.contains("global") {
                let most = if spec.contains("0.3") { len * 3 / 10 } else { 40 };
                // Less than a block waits, and what came since the last run.
                assert!(lanes.iter().all(|lane| high(lane) < most + BLOCK + 12), "{spec}");
            }
        }
    }
}

#[test]
fn what_was_demoted_is_never_touched_again_and_the_exact_is_never_demoted() {
    let spec =
        "every(4) | h2o(recent=8) | keep(0.2) | demote(kivi2) | quant(q8_0, first=10, residual=40)";
    let (mut engine, mut session) = start(spec, 170);
    session.end_prefill().unwrap();
    let mut before = all_rows(&session);
    for _ in 0..80 {
        step(&mut engine, &mut session, 1, &Options::default());
        session.commit(1, None).unwrap();
        let after = all_rows(&session);
        let window = session.sequence().num_tokens() as i32 - 40;
        for (after, before) in after.iter().zip(&before) {
            for (after, before) in after.iter().zip(before) {
                if before.1 {
                    assert_eq!(after, before);
                }
                assert!(!after.1 || (10..window).contains(&after.0), "position {}", after.0);
            }
        }
        before = after;
    }
    let demoted = before[0].iter().filter(|row| row.1).count();
    assert!(demoted > 100, "{demoted}");
}

#[test]
fn rollback_fork_and_preemption_find_mixed_lanes_as_they_were() {
    for seed in 0..6 {
        let mut random = Random(seed);
        let spec = "every(2) | knorm | keep_tokens(60) | demote(kivi2)";
        let (mut engine, mut session) = start(spec, 150);
        session.end_prefill().unwrap();
        for _ in 0..20 {
            let before = all_rows(&session);
            let fork = session.fork().unwrap();
            step(&mut engine, &mut session, 3, &Options::default());
            session.commit(random.within(1, 3), None).unwrap();
            assert_eq!(all_rows(&fork), before);
            if random.chance(50) {
                session = fork;
            } else {
                drop(fork);
            }
            if random.chance(30) {
                let rows = all_rows(&session);
                let bytes = session.sequence().bytes();
                session.preempt(store::create("host").unwrap()).unwrap();
                assert_eq!(engine.manager.stats().cache.bytes_used, 0);
                session.resume().unwrap();
                assert_eq!((all_rows(&session), session.sequence().bytes()), (rows, bytes));
            }
            if random.chance(40) {
                let mut rows = all_rows(&session);
                let len = session.sequence().num_tokens();
                let n = len - random.below(len.min(60));
                session.sequence_mut().truncate(n).unwrap();
                rows.iter_mut().for_each(|rows| rows.retain(|row| row.0 < n as i32));
                assert_eq!(all_rows(&session), rows);
                engine.manager.cache().check_integrity();
            }
        }
        drop(session);
        assert_eq!(engine.manager.stats().cache.bytes_used, 0);
    }
}

/// Demoted blocks in front of the others go with a rollback; the open block behind them is sealed all the same
/// once it is full.
#[test]
fn blocks_are_sealed_after_a_rollback_took_demoted_ones() {
    let (mut engine, mut session) = start("knorm | keep(0.5) | demote(kivi2) | quant(q8_0)", 132);
    let format = engine.manager.cache().find_format("kivi2", "kivi2").unwrap().unwrap();
    let keep = KeepSet::from_indices(0..100);
    for lane in 0..session.sequence().lanes().len() {
        session.sequence_mut().demote(lane, &keep, format).unwrap();
        assert_eq!(session.sequence().lanes()[lane].num_demoted_spans(), 2);
    }
    step(&mut engine, &mut session, 1, &Options::default());
    session.commit(1, None).unwrap();
    session.sequence_mut().truncate(100).unwrap();
    step(&mut engine, &mut session, 30, &Options::default());
    session.commit(30, None).unwrap();
    for lane in session.sequence().lanes() {
        let sealed: Vec<bool> = lane.spans.iter().map(|span| span.sealed).collect();
        assert_eq!(sealed, [vec![true; 8], vec![false]].concat());
    }
    check_bytes(&engine, &session);
}

#[test]
fn an_engine_may_still_evict_rows_of_mixed_lanes() {
    for seed in 0..10 {
        let mut random = Random(seed);
        let (mut engine, mut session) = start("snapkv(w=16) | keep(0.4) | demote(q4_0)", 180);
        session.end_prefill().unwrap();
        for _ in 0..6 {
            let lane = random.below(session.sequence().lanes().len());
            let len = session.sequence().lanes()[lane].len();
            let (mut positions, mut kept) = (Vec::new(), Vec::new());
            session.sequence().positions(lane, &mut positions);
            let odds = random.pick(&[2, 30, 80]);
            kept.extend((0..len).filter(|_| !random.chance(odds)));
            let mut expected: Vec<i32> = kept.iter().map(|i| positions[*i]).collect();
            session.sequence_mut().compact(lane, &KeepSet::from_indices(kept)).unwrap();
            session.sequence().positions(lane, &mut positions);
            positions.sort_unstable();
            expected.sort_unstable();
            assert_eq!(positions, expected);
            engine.manager.cache().check_integrity();
            step(&mut engine, &mut session, 2, &Options::default());
            session.commit(2, None).unwrap();
        }
    }
}

#[test]
fn prefixes_stay_whole_for_others() {
    let mut config = config(SHAPE, "knorm | keep(0.3) | demote(kivi2) | quant(q8_0)");
    config.prefix = true;
    let mut engine = Engine::new(config, 5);
    let tokens: Vec<i32> = (0..161).collect();
    let mut first = engine.session();
    let _ = engine.step(&mut [&mut first], &[160]);
    first.commit(160, Some(&tokens[..160])).unwrap();
    let before = all_rows(&first);
    first.end_prefill().unwrap();
    assert_ne!(all_rows(&first), before);
    let mut second = engine.session();
    assert_eq!(second.match_prefix(&tokens).unwrap(), 160);
    assert_eq!(all_rows(&second), before);
    drop(first);
    assert_eq!(all_rows(&second), before);
    engine.manager.cache().check_integrity();
}

/// To keep all is to demote nothing, and a format that loses nothing changes nothing.
#[test]
fn laws() {
    for (spec, moves) in [
        ("knorm | protect(0, 16) | keep(1.0) | demote(kivi2)", false),
        ("knorm | protect(0, 16) | keep(0.3) | demote(f16)", true),
    ] {
        let (mut engine, mut session) = start(spec, 150);
        let (before, bytes) = (all_rows(&session), session.sequence().bytes());
        let query = engine.random.normals(SHAPE.num_q_heads * DIM);
        let mut attend = |session: &Session| {
            engine.attention.plan(&[(session.sequence(), 1)]).unwrap();
            engine.run(1, query.clone(), &Options::default()).output
        };
        let whole: Vec<f64> = attend(&session).iter().map(|x| f64::from(*x)).collect();
        session.end_prefill().unwrap();
        assert!(relative_error(&attend(&session), &whole) < 1e-5, "{spec}");
        let strip = |heads: &[Vec<Row>]| -> Vec<(i32, Vec<f32>, Vec<f32>)> {
            heads.iter().flatten().map(|row| (row.0, row.2.clone(), row.3.clone())).collect()
        };
        assert_eq!(strip(&all_rows(&session)), strip(&before), "{spec}");
        assert_eq!(session.sequence().bytes(), bytes, "{spec}");
        let demoted: usize = session.sequence().lanes().iter().map(|lane| lane.num_demoted()).sum();
        assert_eq!(demoted > 0, moves, "{spec}");
        // Queries of tokens of which some have moved to the front would see the wrong rows.
        let plan = engine.attention.plan(&[(session.sequence(), 100)]);
        assert_eq!(plan.is_err(), moves, "{spec}");
    }
}

#[test]
fn a_format_that_frees_nothing_is_refused() {
    for spec in
        ["knorm | keep(0.3) | demote(f32)", "knorm | keep(0.3) | demote(q8_0) | quant(q4_0)"]
    {
        let error = Manager::new(config(SHAPE, spec)).unwrap_err();
        assert!(error.message().contains("blocks of demoted rows have"), "{error}");
    }
}

#[test]
fn what_does_not_go_together_is_refused_with_column_and_reason() {
    let refused = |spec: &str| Pipeline::parse(spec).expect_err(spec).message().to_string();
    for (spec, message) in [
        ("knorm | keep(0.5) | demote(q9)", "column 28: Key quantizer q9: column 1: unknown"),
        ("demote(q4_0)", "column 1: demote needs a score"),
        ("full | demote(q4_0)", "column 8: full keeps everything, demote has no effect on it"),
        (
            "prefill: knorm | keep(0.5) | demote(q4_0) ; decode: h2o | keep_tokens(64)",
            "column 30: demote keeps every token, but h2o evicts in the other phase",
        ),
        (
            "knorm | keep(0.5) | demote(q4_0) | pos(cache_relative)",
            "column 21: demote leaves no gaps that cache_relative could close",
        ),
        (
            "knorm | keep(0.5) | demote(q4_0) | quest",
            "column 21: quest chooses among blocks of neighbouring tokens",
        ),
        (
            "h2o | keep(0.5) | demote(q4_0) | quant(kivi4)",
            "column 40: kivi4 encodes whole blocks, but h2o evicts single tokens while decoding",
        ),
    ] {
        let found = refused(spec);
        assert!(found.starts_with(message), "{spec}: {found}");
    }
    let error = kvmgr::slots::parse_spec("knorm | keep(0.5) | demote(q4_0)").unwrap_err();
    assert!(error.message().starts_with("column 21: demote needs blocks of several formats"));
    let engine = Engine::new(config(SHAPE, "full"), 1);
    let policy = Pipeline::parse("knorm | keep(0.5) | demote(q4_0)").unwrap();
    let error = Session::new(&engine.manager, Some(policy.into())).unwrap_err();
    let message = error.message();
    assert!(message.starts_with("column 21: demote: the cache has no blocks of q4_0"), "{message}");
    // Keep sets and budgets are those of eviction.
    let policy = Pipeline::parse("knorm | keep(0.5) | demote(q4_0)").unwrap();
    assert!(!policy.changes_values(Event::PrefillEnd));
    assert_eq!(policy.demotes(Event::PrefillEnd), Some(["q4_0", "q4_0"]));
    assert_eq!(policy.demotes(Event::Step), None);
}
