//! Policies that need the engine's help: replays of the prompt, hidden states, output projections.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::golden::{DIM, GROUP, Golden, HEADS, LAYERS, LEN};
use common::weights::{self, Shape, with_file};
use common::{Engine, Random, config};
use kvmgr::attention::Options;
use kvmgr::device::tensor::Tensor;
use kvmgr::dtype::DType;
use kvmgr::error::Kind;
use kvmgr::manager::{Manager, Session};
use kvmgr::policy::Pipeline;
use kvmgr::shape::ModelShape;

const SMALL: ModelShape = ModelShape::new(2, 4, 2, 8);

/// Rows `[tokens, heads, dim]` from `[heads, tokens, dim]`.
fn by_token(rows: &[f32], heads: usize, dim: usize) -> Vec<f32> {
    let tokens = rows.len() / heads / dim;
    let at = |i: usize| (i % heads * tokens + i / heads) * dim;
    (0..tokens * heads).flat_map(|i| rows[at(i)..at(i) + dim].to_vec()).collect()
}

/// What a replay should have noted, in f64: `[q_heads, tokens]`.
fn maxima(
    shape: ModelShape,
    keys: &[f32],
    queries: &[f32],
    prompt: usize,
    replayed: std::ops::Range<usize>,
    sinks: usize,
) -> Vec<f64> {
    let ModelShape { num_q_heads, num_kv_heads, head_dim: dim, .. } = shape;
    let (total, n) = (keys.len() / num_kv_heads / dim, queries.len() / num_q_heads / dim);
    let mut most = vec![f64::NAN; num_q_heads * prompt];
    for h in 0..num_q_heads {
        for t in 0..n {
            let query = &queries[(t * num_q_heads + h) * dim..][..dim];
            let takes_part = |j: &usize| {
                *j < sinks || replayed.contains(j) || (*j >= prompt && *j <= prompt + t)
            };
            let logit = |j: usize| {
                let key = &keys[(j * num_kv_heads + h / shape.group()) * dim..][..dim];
                let dot: f64 =
                    key.iter().zip(query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                (dot / (dim as f64).sqrt()).exp()
            };
            let sum: f64 = (0..total).filter(takes_part).map(logit).sum();
            for j in replayed.clone() {
                let most = &mut most[h * prompt + j];
                *most = most.max(logit(j) / sum);
            }
        }
    }
    most
}

/// Reserves rows, appends and attends in every layer, and answers the keys and queries of layer 0.
fn feed(engine: &mut Engine, session: &mut Session, n: usize) -> (Vec<f32>, Vec<f32>) {
    session.sequence_mut().reserve(n).unwrap();
    engine.attention.plan(&[(session.sequence(), n)]).unwrap();
    let shape = engine.shape();
    let mut first = (Vec::new(), Vec::new());
    for layer in 0..shape.num_layers {
        let keys = engine.random.normals(n * shape.num_kv_heads * shape.head_dim);
        engine.append(layer, &keys, &keys);
        let queries = engine.random.normals(n * shape.num_q_heads * shape.head_dim);
        let step = engine.run(layer, queries, &Options::default());
        if layer == 0 {
            first = (keys, step.query);
        }
    }
    first
}

#[test]
fn a_replay_notes_the_largest_probabilities_and_leaves_nothing_behind() {
    for (spec, prompt, pieces, n) in [
        ("kvzip(sink=3) | global | keep(0.5)", 40, vec![0..20, 20..40], 21),
        ("kvzip(sink=3) | global | keep(0.5)", 70, vec![0..33, 33..64], 40),
    ] {
        let mut engine = Engine::new(
            kvmgr::manager::ManagerConfig { dtype: DType::F32, ..config(SMALL, spec) },
            prompt as u64,
        );
        let mut session = engine.session();
        let (keys, _) = feed(&mut engine, &mut session, prompt);
        session.commit(prompt, None).unwrap();
        let error = session.end_prefill().unwrap_err();
        assert!(error.message().contains("no replay"), "{error}");
        let mut expected = vec![f64::NAN; SMALL.num_q_heads * prompt];
        for piece in &pieces {
            session.replay(piece.clone()).unwrap();
            engine.num_workers = 3;
            let (again, queries) = feed(&mut engine, &mut session, n);
            let keys: Vec<f32> = keys.iter().chain(&again).copied().collect();
            let sinks = 3.min(piece.start);
            let found = maxima(SMALL, &keys, &queries, prompt, piece.clone(), sinks);
            expected.iter_mut().zip(&found).for_each(|(all, one)| *all = all.max(*one));
            assert_eq!(session.commit(1, None).unwrap_err().kind(), Kind::InvalidState);
            session.commit(0, None).unwrap();
        }
        assert_eq!(session.sequence().num_tokens(), prompt);
        for h in 0..SMALL.num_q_heads {
            let group = SMALL.group();
            let seen = session.sequence().observation().unwrap().head(0, h / group).lock();
            let found = &seen.replay_maxima[h % group];
            assert_eq!(found.len(), prompt);
            for (found, expected) in found.iter().zip(&expected[h * prompt..]) {
                let error = (f64::from(*found) - expected).abs();
                assert!(found.is_nan() == expected.is_nan());
                assert!(found.is_nan() || error <= 1e-5 * expected, "{found} and {expected}");
            }
        }
        session.end_prefill().unwrap();
        let rows: usize = session.sequence().lanes().iter().map(|lane| lane.len()).sum();
        assert_eq!(rows, SMALL.num_layers * SMALL.num_kv_heads * prompt / 2);
        // Tokens that no replay covered stay.
        let (lane, mut positions) = (&session.sequence().lanes()[0], Vec::new());
        session.sequence().positions(0, &mut positions);
        let last = pieces.last().unwrap().end as i32;
        assert!(lane.len() >= 3 && (last..prompt as i32).all(|p| positions.contains(&p)));
    }
}

#[test]
fn a_rollback_ends_a_replay() {
    let mut engine = Engine::new(config(SMALL, "kvzip(sink=3) | global | keep(0.5)"), 1);
    let mut session = engine.session();
    feed(&mut engine, &mut session, 40);
    session.commit(40, None).unwrap();
    session.replay(20..40).unwrap();
    feed(&mut engine, &mut session, 20);
    session.truncate(30).unwrap();
    // What follows are tokens that go on.
    feed(&mut engine, &mut session, 5);
    session.commit(5, None).unwrap();
    assert_eq!(session.sequence().num_tokens(), 35);
}

/// Nothing of a prompt is left for the next one.
#[test]
fn a_sequence_without_tokens_starts_anew() {
    let spec = "expected | keep(0.5) | quant(kivi2)";
    let config = config(ModelShape::new(2, 4, 2, 32), spec);
    let mut engine = Engine::new(config, 1);
    let mut session = engine.session();
    for _ in 0..2 {
        feed(&mut engine, &mut session, 64);
        session.commit(64, None).unwrap();
        let sealed = |session: &Session| session.sequence().lanes()[0].spans[0].sealed;
        assert!(
            !sealed(&session),
            "a policy is going to evict rows of blocks that cannot lose any"
        );
        session.end_prefill().unwrap();
        assert!(sealed(&session));
        session.truncate(0).unwrap();
        let seen = session.sequence().observation().unwrap();
        assert!(seen.head(0, 0).lock().statistics.is_empty());
    }
}

#[test]
fn replays_happen_between_prompt_and_end() {
    let mut engine = Engine::new(config(SMALL, "kvzip | global | keep(0.5)"), 1);
    let mut session = engine.session();
    feed(&mut engine, &mut session, 20);
    let message = |result: kvmgr::error::Result<()>| result.unwrap_err().message().to_string();
    assert!(message(session.replay(0..20)).contains("20 tokens are reserved"));
    session.commit(20, None).unwrap();
    assert!(message(session.replay(0..21)).contains("tokens 0..21 of a sequence of 20"));
    assert!(message(session.replay(5..5)).contains("tokens 5..5"));
    session.replay(0..20).unwrap();
    assert!(message(session.end_prefill()).contains("commit 0 tokens"));
    session.commit(0, None).unwrap();
    let mut plain = Engine::new(config(SMALL, "snapkv | keep(0.5)"), 1);
    let mut session = plain.session();
    feed(&mut plain, &mut session, 20);
    session.commit(20, None).unwrap();
    assert!(message(session.replay(0..20)).contains("needs no replay"));
}

#[test]
fn kvzip_agrees_with_its_reference() {
    let golden = Golden::open();
    if !golden.has("kvzip@0.5/l0.rep_q") {
        return; // The queries of a replay are megabytes: only in the full set.
    }
    let shape = ModelShape::new(LAYERS, HEADS * GROUP, HEADS, DIM);
    for (press, plus, keep) in [
        ("kvzip@0.5", "no", 0.5),
        ("kvzip@0.75", "no", 0.25),
        ("kvzip_plus@0.5", "yes", 0.5),
        ("kvzip_plus@0.75", "yes", 0.25),
    ] {
        let spec = format!("kvzip(plus={plus}) | global | keep({keep})");
        let config = kvmgr::manager::ManagerConfig { dtype: DType::F32, ..config(shape, &spec) };
        let engine = &mut Engine::new(config, 1);
        let projections: Vec<Vec<f32>> =
            (0..LAYERS).map(|l| golden.floats(&format!("weights/l{l}.o_proj"))).collect();
        for (layer, weights) in projections.into_iter().enumerate() {
            let rows = weights.len() / 512;
            let weights = Tensor::from_slice(weights.leak(), [rows, 1, 512]);
            engine.manager.set_output_projection(layer, weights).unwrap();
        }
        let mut session = engine.session();
        let mut feed = |session: &mut Session, prefix: &str, names: [&str; 3], n: usize| {
            session.sequence_mut().reserve(n).unwrap();
            engine.attention.plan(&[(session.sequence(), n)]).unwrap();
            for layer in 0..LAYERS {
                let load = |name: &str, heads: usize| match name {
                    "" => vec![0.0; n * heads * DIM],
                    name => {
                        by_token(&golden.floats(&format!("{prefix}/l{layer}.{name}")), heads, DIM)
                    }
                };
                engine.append(layer, &load(names[0], HEADS), &load(names[1], HEADS));
                if prefix != "states" {
                    // Rows of this length stand for the hidden states.
                    let norms = golden.floats(&format!("{prefix}/l{layer}.rep_hidden_norm"));
                    let hidden = Tensor::from_slice(&norms, [n, 1, 1]);
                    session.observe_hidden(layer, &hidden).unwrap();
                }
                engine.run(layer, load(names[2], HEADS * GROUP), &Options::default());
            }
        };
        feed(&mut session, "states", ["k", "v", "q"], LEN);
        session.commit(LEN, None).unwrap();
        session.replay(0..LEN).unwrap();
        let replaying = golden.floats("kvzip@0.5/l0.rep_hidden_norm").len();
        feed(&mut session, "kvzip@0.5", ["rep_k", "", "rep_q"], replaying);
        session.commit(0, None).unwrap();
        session.end_prefill().unwrap();
        for layer in 0..LAYERS {
            for head in 0..HEADS {
                let (lane, _) = session.sequence().locate(layer, head);
                let mut kept = Vec::new();
                session.sequence().positions(lane, &mut kept);
                let kept: Vec<usize> = kept.iter().map(|position| *position as usize).collect();
                assert_eq!(kept, golden.kept(press, layer, head), "{press} layer {layer} {head}");
            }
        }
    }
}

#[test]
fn gates_score_tokens_as_they_come_and_scores_follow_them() {
    let hidden = 6;
    let shape = Shape { layers: 2, heads: 2, group: 2, dim: 8, hidden };
    let file = weights::write(shape);
    let spec = "kvzap(file=\"w.safetensors\") | protect(2, 4) | tau(2.6)";
    let spec = with_file(spec, file.path());
    let mut engine = Engine::new(config(SMALL, &spec), 3);
    let mut session = engine.session();
    let pipeline = Pipeline::parse(&spec).unwrap();
    let mut random = Random(9);
    let (mut expected, mut kept) = (vec![Vec::new(); 4], vec![Vec::<i32>::new(); 4]);
    let mut position = 0;
    for (step, n) in [30, 1, 1, 5, 1].into_iter().enumerate() {
        session.sequence_mut().reserve(n).unwrap();
        engine.attend(&[&mut session], &[n], true);
        assert!(session.commit(n, None).unwrap_err().message().contains("hidden states of 0 of"));
        for layer in 0..2 {
            let rows = random.normals(n * hidden);
            session.observe_hidden(layer, &Tensor::from_slice(&rows, [n, 1, hidden])).unwrap();
            let scores = pipeline.gate(layer, 2, &rows, hidden).unwrap();
            for (head, scores) in scores.chunks_exact(n).enumerate() {
                expected[layer * 2 + head].extend_from_slice(scores);
            }
        }
        session.commit(n, None).unwrap();
        (0..n as i32).for_each(|i| kept.iter_mut().for_each(|kept| kept.push(position + i)));
        position += n as i32;
        if step == 0 {
            session.end_prefill().unwrap();
        }
        for (lane, kept) in kept.iter_mut().enumerate() {
            // The rule, token by token: sinks and recent ones of those that are left, and scores.
            let len = kept.len();
            let stays =
                |i: usize, p: i32| i < 2 || i + 4 >= len || expected[lane][p as usize] >= 2.6;
            *kept = (0..len).filter(|i| stays(*i, kept[*i])).map(|i| kept[i]).collect();
            let mut found = Vec::new();
            session.sequence().positions(lane, &mut found);
            assert_eq!(found, *kept, "step {step} lane {lane}");
        }
    }
    assert!(kept.iter().any(|kept| kept.len() < position as usize));
}

#[test]
fn what_is_missing_is_refused_by_name() {
    let manager = Manager::new(config(SMALL, "snapkv | critical | keep(0.5)")).unwrap();
    let error = Session::new(&manager, None).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.message().starts_with("column 10: critical needs OUTPUT_PROJECTION"), "{error}");
    let weights = Random(1).normals(10 * 32).leak();
    let set = |layer, rows, width| {
        manager.set_output_projection(layer, Tensor::from_slice(weights, [rows, 1, width]))
    };
    assert!(set(0, 10, 31).unwrap_err().message().contains("num_q_heads * value_dim = 32"));
    assert!(set(2, 10, 32).unwrap_err().message().contains("layer is 2, the model has 2"));
    set(0, 10, 32).unwrap();
    assert!(Session::new(&manager, None).is_err());
    set(1, 10, 32).unwrap();
    let mut session = Session::new(&manager, None).unwrap();
    session.sequence_mut().reserve(3).unwrap();
    let rows = [0.0; 12];
    for (layer, shape) in [(0, [2, 1, 6]), (2, [3, 1, 4]), (0, [3, 1, 0])] {
        let error = session.observe_hidden(layer, &Tensor::from_slice(&rows, shape)).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
    }
    // A policy without a gate does not look.
    session.observe_hidden(0, &Tensor::from_slice(&rows, [3, 1, 4])).unwrap();
}
