//! Every example of every stage, and random pipelines, in a real cache: nothing fails, budgets hold, and
//! the bytes are really gone.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::weights::{self, Shape, with_file};
use common::{Engine, config};
use kvmgr::attention::Options;
use kvmgr::device::tensor::Tensor;
use kvmgr::manager::Session;
use kvmgr::policy::{Event, Pipeline, STAGES, StageClass};
use kvmgr::shape::{ModelShape, Needs};

const SHAPE: ModelShape = ModelShape::new(2, 4, 2, 32);
const HIDDEN: usize = 6;
const PROMPT: usize = 150;

/// Reserves, appends, attends and hands over everything that a policy may need.
fn feed(engine: &mut Engine, session: &mut Session, n: usize) {
    session.sequence_mut().reserve(n).unwrap();
    engine.attention.plan(&[(session.sequence(), n)]).unwrap();
    for layer in 0..SHAPE.num_layers {
        let keys = engine.random.normals(n * SHAPE.num_kv_heads * SHAPE.head_dim);
        let values = engine.random.normals(keys.len());
        engine.append(layer, &keys, &values);
        let hidden = engine.random.normals(n * HIDDEN);
        let hidden = Tensor::from_slice(&hidden, [n, 1, HIDDEN]);
        session.observe_hidden(layer, &hidden).unwrap();
        let added = engine.random.normals(n * HIDDEN);
        let added = Tensor::from_slice(&added, [n, 1, HIDDEN]);
        session.observe_residual(layer, &hidden, &added).unwrap();
        let queries = engine.random.normals(n * SHAPE.num_q_heads * SHAPE.head_dim);
        engine.run(layer, queries, &Options::default());
    }
}

fn rows(session: &Session) -> usize {
    let head = |layer: usize, head: usize| {
        let (lane, _) = session.sequence().locate(layer, head);
        session.sequence().lanes()[lane].len()
    };
    (0..4).map(|i| head(i / 2, i % 2)).sum()
}

/// Reads a prompt and generates under `spec`; answers the rows after the prompt and at the end.
fn run(spec: &str, steps: usize) -> (usize, usize) {
    let pipeline = Pipeline::parse(spec).unwrap_or_else(|error| panic!("{spec}: {error}"));
    let mut engine = Engine::new(config(SHAPE, spec), 11);
    let width = SHAPE.num_q_heads * SHAPE.head_dim;
    let projection = engine.random.normals(HIDDEN * width).leak();
    for layer in 0..SHAPE.num_layers {
        let weights = Tensor::from_slice(projection, [HIDDEN, 1, width]);
        engine.manager.set_output_projection(layer, weights).unwrap();
    }
    let mut session = engine.session();
    feed(&mut engine, &mut session, PROMPT);
    session.commit(PROMPT, None).unwrap();
    let full = engine.manager.stats().cache.bytes_used;
    if pipeline.needs().contains(Needs::REPLAY) {
        session.replay(0..PROMPT).unwrap();
        feed(&mut engine, &mut session, 40);
        session.commit(0, None).unwrap();
    }
    session.end_prefill().unwrap_or_else(|error| panic!("{spec}: {error}"));
    let after = rows(&session);
    check_bytes(&engine, &session, spec);
    if after * 2 <= PROMPT * 4 {
        let left = engine.manager.stats().cache.bytes_used;
        // Each lane, of ten blocks before, ends in a block that is partly used.
        let slack = full / 9;
        assert!(left <= full * 6 / 10 + slack, "{spec}: {left} of {full} bytes");
    }
    for _ in 0..steps {
        feed(&mut engine, &mut session, 1);
        session.commit(1, None).unwrap_or_else(|error| panic!("{spec}: {error}"));
        check_bytes(&engine, &session, spec);
    }
    if let Some(seen) = session.sequence().observation().filter(|_| steps > 0) {
        // Of all the queries of a prompt none is left.
        let most = pipeline.step_query_window();
        assert!(most <= 4096 && seen.head(0, 0).lock().num_queries() <= most, "{spec}");
    }
    let end = rows(&session);
    assert_eq!(session.sequence().num_tokens(), PROMPT + steps);
    drop(session);
    assert_eq!(engine.manager.stats().cache.bytes_used, 0, "{spec}");
    (after, end)
}

/// The allocator holds what the sequence refers to, and no lane holds more blocks than it needs.
fn check_bytes(engine: &Engine, session: &Session, spec: &str) {
    let used = engine.manager.stats().cache.bytes_used;
    assert_eq!(used, session.sequence().bytes() as u64, "{spec}");
    for lane in session.sequence().lanes() {
        let needed = lane.len().div_ceil(16) + 3;
        assert!(lane.blocks().count() <= needed, "{spec}: {} rows", lane.len());
    }
}

#[test]
fn every_example_of_every_stage_runs_in_a_cache() {
    let file = weights::write(Shape { layers: 2, heads: 2, group: 2, dim: 32, hidden: HIDDEN });
    for stage in STAGES.iter() {
        for example in stage.examples {
            let spec = with_file(example, file.path());
            let pipeline = Pipeline::parse(&spec).unwrap();
            let (after, end) = run(&spec, 20);
            let all = 4 * PROMPT;
            if !pipeline.acts_on(Event::PrefillEnd) {
                assert_eq!(after, all, "{spec}");
            }
            if !pipeline.acts_on(Event::Step) {
                assert_eq!(end, after + 4 * 20, "{spec}");
            }
            assert!(after >= 4 && end >= 4, "{spec}");
        }
    }
}

#[test]
fn budgets_hold_to_the_token_in_every_combination_of_stages() {
    let file = weights::write(Shape { layers: 2, heads: 2, group: 2, dim: 32, hidden: HIDDEN });
    let first = |class: StageClass| {
        STAGES.iter().filter(move |stage| stage.class == class).map(|stage| {
            // The stage as its first example writes it.
            let part = |part: &&str| part.trim().split('(').next() == Some(stage.name);
            stage.examples[0].split('|').find(part).unwrap_or(stage.name).trim()
        })
    };
    let (mut runs, mut refused) = (0, 0);
    for score in first(StageClass::Score) {
        for (i, map) in first(StageClass::Map).enumerate() {
            let budgets: Vec<&str> = first(StageClass::Budget).collect();
            // What is demoted stays.
            let evicts = |act: &&str| !act.starts_with("demote");
            let acts: Vec<&str> = first(StageClass::Act).filter(evicts).collect();
            let score = score.split(',').next().unwrap_or(score);
            let score = if score.contains('(') && !score.ends_with(')') {
                format!("{score})")
            } else {
                score.to_string()
            };
            let (budget, act) = (budgets[i % budgets.len()], acts[i % acts.len()]);
            let with_act = if i % 2 == 0 { format!(" | {act}") } else { String::new() };
            let spec = format!("prefill: {score} | {map} | {budget} | keep_tokens(40){with_act}");
            let spec = with_file(&spec, file.path());
            let Ok(pipeline) = Pipeline::parse(&spec) else {
                refused += 1;
                continue;
            };
            assert!(pipeline.acts_on(Event::PrefillEnd), "{spec}");
            let (after, _) = run(&spec, 0);
            runs += 1;
            // Tables give heads what they say; the others share the allowance of all.
            if !spec.contains("lukv") && !spec.contains("headkv") && !spec.contains("pyramid") {
                let chunked = spec.contains("chunk(len=20)");
                // The two heads of a layer that agree keep as much: of an odd allowance one is left.
                let divides = spec.contains("preferences") || spec.contains("squeeze");
                let agreed = spec.contains("agree") && divides;
                let least = if chunked { 0 } else { 4 * 40 - if agreed { 2 } else { 0 } };
                assert!((least..=4 * 40).contains(&after), "{spec}: {after} rows");
            }
        }
    }
    assert!(runs > 60 && refused > 20, "{runs} ran, {refused} were refused");
}
