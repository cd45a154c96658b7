//! Attention against its reference: random shapes, formats, lanes, options and workers.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{Engine, Random, Step, check, config};
use kvmgr::attention::Options;
use kvmgr::dtype::DType;
use kvmgr::manager::Session;
use kvmgr::shape::{KeepSet, LaneWidth, ModelShape, Values};

/// Attends in every layer with random queries for the `n` planned tokens.
fn run_layers(engine: &Engine, n: usize, options: &Options<'_>, random: &mut Random) -> Vec<Step> {
    let shape = engine.shape();
    let run = |layer| {
        let query = random.normals(n * shape.num_q_heads * shape.head_dim);
        engine.run(layer, query, options)
    };
    (0..shape.num_layers).map(run).collect()
}

/// A shape for a spec: values of any length, also in keys unless the spec says that they differ.
fn shape_for(spec: &str, random: &mut Random) -> ModelShape {
    let shape = shape(random);
    let dim = shape.head_dim;
    let values = match random.below(4) {
        0 => Values::Own(random.pick(&[32, 64, 160])),
        1 if !spec.contains("v=") => Values::InKeys(random.within(dim / 2, dim)),
        _ => Values::Own(dim),
    };
    ModelShape { values, ..shape }
}

fn shape(random: &mut Random) -> ModelShape {
    let num_kv_heads = random.within(1, 3);
    let (layers, group) = (random.within(1, 2), random.pick(&[1, 2, 4, 7]));
    let head_dim = random.pick(&[32, 64, 96, 128]);
    ModelShape::new(layers, num_kv_heads * group, num_kv_heads, head_dim)
}

#[test]
fn random_batches_agree_with_the_reference() {
    let specs = [
        "full",
        "quant(q8_0)",
        "quant(k=had+q4_0, v=had+q8_0)",
        "quant(k=kivi2, v=kivi4)",
        "quant(k=bf16, v=f32)",
    ];
    for seed in 0..30 {
        let mut random = Random(seed);
        let spec = random.pick(&specs);
        let mut config = config(shape_for(spec, &mut random), spec);
        config.block_size = random.pick(&[1, 16, 32]);
        if config.spec.contains("kivi") {
            config.block_size = 32;
        }
        config.dtype = random.pick(&[DType::F32, DType::F16, DType::Bf16]);
        config.lane_width =
            Some(random.pick(&[LaneWidth::Sequence, LaneWidth::Layer, LaneWidth::Head]));
        let mut engine = Engine::new(config, seed + 100);
        engine.num_workers = random.within(1, 5);
        let mut sessions: Vec<_> = (0..random.within(1, 3)).map(|_| engine.session()).collect();
        for _ in 0..5 {
            let mut refs: Vec<_> = sessions.iter_mut().collect();
            let counts: Vec<_> =
                refs.iter().map(|_| random.pick(&[1, 1, 2, 15, 16, 17, 33, 70])).collect();
            let steps = engine.step(&mut refs, &counts);
            check(&engine, &refs, &counts, &steps, &Options::default());
            for (session, n) in refs.iter_mut().zip(&counts) {
                session.commit(*n, None).unwrap();
            }
        }
    }
}

#[test]
fn options_agree_with_the_reference() {
    for seed in 0..20 {
        let mut random = Random(1000 + seed);
        let shape = shape_for("quant(q8_0)", &mut random);
        let mut engine = Engine::new(config(shape, "quant(q8_0)"), seed);
        let mut session = engine.session();
        let sinks = random.normals(shape.num_q_heads);
        let slopes: Vec<f32> =
            random.normals(shape.num_q_heads).iter().map(|x| x.abs() * 0.1).collect();
        for n in [40, 1, 17, 1] {
            let _ = engine.step(&mut [&mut session], &[n]);
            let options = Options {
                scale: random.pick(&[0.0, 0.3]),
                softcap: random.pick(&[0.0, 2.0]),
                sliding_window: random.pick(&[0, 1, 5, 30, 1000]),
                sinks: random.chance(50).then_some(&sinks),
                alibi_slopes: random.chance(50).then_some(&slopes),
                ..Options::default()
            };
            let steps = run_layers(&engine, n, &options, &mut random);
            check(&engine, &[&mut session], &[n], &steps, &options);
            session.commit(n, None).unwrap();
        }
    }
}

#[test]
fn compacted_forked_and_truncated_sequences_agree_with_the_reference() {
    let specs = ["full", "quant(k=had+q4_0, v=q8_0)", "quant(kivi4)", "pos(cache_relative)"];
    for seed in 0..32 {
        let mut random = Random(2000 + seed);
        let spec = specs[seed as usize % specs.len()];
        let mut config = config(shape_for(spec, &mut random), spec);
        config.lane_width = Some(random.pick(&[LaneWidth::Layer, LaneWidth::Head]));
        config.block_size = 32;
        config.dtype = DType::F32;
        let mut engine = Engine::new(config, seed);
        let mut session = engine.session();
        let mut forks: Vec<Session> = Vec::new();
        for round in 0..6 {
            let n = random.pick(&[1, 5, 31, 64, 65]);
            let steps = engine.step(&mut [&mut session], &[n]);
            // Rotation of queries by f32 sines costs a little.
            check(&engine, &[&mut session], &[n], &steps, &Options::default());
            session.commit(n - random.below(2).min(n - 1), None).unwrap();
            for lane in 0..session.sequence().lanes().len() {
                let len = session.sequence().lanes()[lane].len();
                let keep = match random.below(3) {
                    0 => KeepSet::all(len),
                    1 => {
                        let mut keep = KeepSet::default();
                        keep.push_range(0..len.min(3));
                        keep.push_range((len / 2).max(len.min(3))..len);
                        keep
                    }
                    _ => {
                        let kept: Vec<_> =
                            (0..len).filter(|i| *i + 1 == len || random.chance(40)).collect();
                        KeepSet::from_indices(kept)
                    }
                };
                session.sequence_mut().compact(lane, &keep).unwrap();
                assert_eq!(session.sequence().lanes()[lane].len(), keep.len());
            }
            if round % 2 == 0 {
                forks.push(session.fork().unwrap());
            }
            if random.chance(30) {
                let tokens = session.sequence().num_tokens();
                session.sequence_mut().truncate(tokens - random.below(tokens.min(9))).unwrap();
            }
            for fork in &mut forks {
                if fork.sequence().lanes().iter().all(|lane| !lane.is_empty()) {
                    let steps = engine.step(&mut [fork], &[2]);
                    check(&engine, &[fork], &[2], &steps, &Options::default());
                    fork.commit(1, None).unwrap();
                }
            }
        }
        engine.manager.cache().check_integrity();
        drop(forks);
        drop(session);
        let stats = engine.manager.cache().stats();
        assert_eq!((stats.free_blocks, stats.bytes_used), (stats.num_blocks, 0));
        engine.manager.cache().check_integrity();
    }
}

#[test]
fn bad_numbers_stay_where_they_are() {
    let shape = ModelShape::new(1, 4, 2, 32);
    let mut engine = Engine::new(config(shape, "full"), 7);
    let mut session = engine.session();
    session.sequence_mut().reserve(20).unwrap();
    engine.attention.plan(&[(session.sequence(), 20)]).unwrap();
    let mut key = engine.random.normals(20 * 2 * 32);
    let value = engine.random.normals(20 * 2 * 32);
    // Head 1 gets NaN and huge keys; head 0 must not notice.
    key[3 * 64 + 32..3 * 64 + 64].fill(f32::NAN);
    key[5 * 64 + 32..5 * 64 + 64].fill(1e30);
    engine.append(0, &key, &value);
    let query = engine.random.normals(20 * 4 * 32);
    let step = engine.run(0, query, &Options::default());
    for token in 0..20 {
        for head in 0..2 {
            let output = &step.output[(token * 4 + head) * 32..][..32];
            assert!(output.iter().all(|x| x.is_finite()), "token {token} head {head}");
        }
    }
}

#[test]
fn errors_name_what_is_wrong_and_change_nothing() {
    use kvmgr::device::tensor::{Tensor, TensorMut};
    let shape = ModelShape::new(2, 2, 1, 32);
    let mut engine = Engine::new(config(shape, "full"), 7);
    let other = Engine::new(config(shape, "full"), 8);
    let (mut a, b) = (engine.session(), other.session());
    a.sequence_mut().reserve(3).unwrap();
    let mut plan = |batch: &[(&kvmgr::sequence::Sequence, usize)]| {
        engine.attention.plan(batch).unwrap_err().message().to_string()
    };
    assert!(plan(&[(a.sequence(), 4)]).contains("num_queries is 4, must be in 1..=3"));
    assert!(plan(&[(a.sequence(), 0)]).contains("num_queries is 0"));
    assert!(plan(&[(a.sequence(), 1), (a.sequence(), 1)]).contains("twice"));
    assert!(plan(&[(b.sequence(), 1)]).contains("another cache"));

    engine.attention.plan(&[(a.sequence(), 3)]).unwrap();
    let (rows, wide) = (vec![0.0; 3 * 32], vec![0.0; 3 * 2 * 32]);
    let mut out = wide.clone();
    let key = Tensor::from_slice(&rows, [3, 1, 32]);
    let query = Tensor::from_slice(&wide, [3, 2, 32]);
    let output = TensorMut::from_slice(&mut out, [3, 2, 32]);
    let options = Options::default();
    let run = |layer, query: &Tensor<'_>, worker, workers| {
        engine.attention.run(layer, query, &output, None, &options, worker, workers)
    };
    assert!(run(0, &query, 0, 1).unwrap_err().message().contains("has 0 of 3 reserved tokens"));
    engine.attention.append(0, &key, Some(&key), 0, 1).unwrap();
    run(0, &query, 0, 1).unwrap();
    assert!(run(2, &query, 0, 1).unwrap_err().message().contains("layer is 2"));
    assert!(run(0, &query, 1, 1).unwrap_err().message().contains("worker is 1"));
    assert!(run(0, &key, 0, 1).unwrap_err().message().contains("query has shape [3, 1, 32]"));
    let bad = Options { softcap: f32::NAN, ..options };
    let error = engine.attention.run(0, &query, &output, None, &bad, 0, 1).unwrap_err();
    assert!(error.message().contains("softcap"));
    assert!(a.commit(3, None).unwrap_err().message().contains("layer 1 has 0 of 3"));
    engine.attention.append(1, &key, Some(&key), 0, 1).unwrap();
    a.commit(3, None).unwrap();
    assert!(run(0, &query, 0, 1).unwrap_err().message().contains("has changed since"));
}

#[test]
fn bad_values_do_not_reach_queries_that_do_not_see_them() {
    let shape = ModelShape::new(1, 2, 1, 32);
    let cases =
        [(5, 3, 0), (20, 15, 0), (40, 17, 0), (40, 17, 1), (40, 15, 4), (60, 0, 17), (90, 16, 33)];
    for (n, bad, window) in cases {
        let mut engine = Engine::new(config(shape, "full"), 7);
        let mut session = engine.session();
        session.sequence_mut().reserve(n).unwrap();
        engine.attention.plan(&[(session.sequence(), n)]).unwrap();
        let mut key = engine.random.normals(n * 32);
        let mut value = engine.random.normals(n * 32);
        key[bad * 32..][..32].fill(f32::INFINITY);
        value[bad * 32..][..32].fill(f32::NAN);
        engine.append(0, &key, &value);
        let query = engine.random.normals(n * 2 * 32);
        let options = Options { sliding_window: window, ..Options::default() };
        let step = engine.run(0, query, &options);
        let sees = |i: usize| i >= bad && (window == 0 || i < bad + window as usize);
        for (i, output) in step.output.chunks_exact(2 * 32).enumerate() {
            let case = format!("token {i} of {n}, bad {bad}, window {window}");
            assert_eq!(output.iter().all(|x| x.is_nan()), sees(i), "{case}");
            assert_eq!(output.iter().all(|x| x.is_finite()), !sees(i), "{case}");
        }
    }
}

#[test]
fn keys_that_are_not_numbers_are_not_taken_for_masked_ones() {
    let shape = ModelShape::new(1, 1, 1, 32);
    let mut engine = Engine::new(config(shape, "full"), 7);
    let mut session = engine.session();
    session.sequence_mut().reserve(40).unwrap();
    engine.attention.plan(&[(session.sequence(), 40)]).unwrap();
    let mut key = engine.random.normals(40 * 32);
    // A whole block of 16 rows.
    key[16 * 32..32 * 32].fill(f32::NAN);
    let value = engine.random.normals(40 * 32);
    engine.append(0, &key, &value);
    let query = engine.random.normals(40 * 32);
    let step = engine.run(0, query, &Options::default());
    for (i, output) in step.output.chunks_exact(32).enumerate() {
        assert_eq!(output.iter().all(|x| x.is_finite()), i < 16, "token {i}");
        assert_eq!(step.lse[i].is_nan(), i >= 16, "token {i}: lse {}", step.lse[i]);
    }
}

#[test]
fn tokens_whose_rows_a_policy_evicted_cannot_be_queried() {
    let shape = ModelShape::new(1, 1, 1, 32);
    let mut engine = Engine::new(config(shape, "full"), 7);
    let mut session = engine.session();
    let _ = engine.step(&mut [&mut session], &[20]);
    session.commit(20, None).unwrap();
    session.sequence_mut().compact(0, &KeepSet::from_indices(0..10)).unwrap();
    let error = engine.attention.plan(&[(session.sequence(), 5)]).unwrap_err();
    assert!(error.message().contains("num_queries is 5"), "{}", error.message());
}

/// What `workers` make of a step, one after the other in a rotated order or all at once.
fn run_with(
    engine: &Engine,
    query: &[f32],
    options: &Options<'_>,
    workers: usize,
    threads: bool,
) -> (Vec<u32>, Vec<u32>) {
    use kvmgr::device::tensor::{Tensor, TensorMut};
    let shape = engine.shape();
    let tokens = engine.attention.num_tokens();
    let dims = [tokens, shape.num_q_heads, shape.head_dim];
    let mut output = vec![f32::NAN; query.len()];
    let mut lse = vec![f32::NAN; tokens * shape.num_q_heads];
    let query = Tensor::from_slice(query, dims);
    let out_view = TensorMut::from_slice(&mut output, dims);
    let lse_view = TensorMut::from_slice(&mut lse, [tokens, shape.num_q_heads, 1]);
    let part = |worker: usize| {
        let (out, lse) = (&out_view, Some(&lse_view));
        engine.attention.run(0, &query, out, lse, options, worker, workers).unwrap();
    };
    if threads {
        std::thread::scope(|scope| {
            for worker in 0..workers {
                let part = &part;
                scope.spawn(move || part(worker));
            }
        });
    } else {
        (0..workers).for_each(|i| part((i + workers / 2) % workers));
    }
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
    (bits(output), bits(lse))
}

#[test]
fn results_depend_neither_on_workers_nor_on_the_rest_of_the_batch() {
    let shape = ModelShape::new(1, 4, 2, 32);
    let options = Options { sliding_window: 3000, ..Options::default() };
    for (spec, counts) in [("full", [1, 40, 3]), ("quant(k=had+q4_0, v=q8_0)", [2, 1, 17])] {
        let mut engine = Engine::new(config(shape, spec), 3);
        // Long enough for several parts, for none, and for a lane of one block.
        let mut sessions: Vec<_> = (0..3).map(|_| engine.session()).collect();
        for (session, n) in sessions.iter_mut().zip([5000, 2047, 3]) {
            let _ = engine.step(&mut [session], &[n]);
            session.commit(n, None).unwrap();
        }
        let mut refs: Vec<_> = sessions.iter_mut().collect();
        let steps = engine.step(&mut refs, &counts);
        check(&engine, &refs, &counts, &steps, &Options::default());
        let query = &steps[0].query;
        let expected = run_with(&engine, query, &options, 1, false);
        assert!(expected.0.iter().all(|x| f32::from_bits(*x).is_finite()));
        for workers in [2, 3, 4, 5, 33] {
            assert!(run_with(&engine, query, &options, workers, false) == expected, "{workers}");
            assert!(run_with(&engine, query, &options, workers, true) == expected, "{workers}");
        }
        let mut token = 0;
        let wide = shape.num_q_heads * shape.head_dim;
        for (session, n) in sessions.iter().zip(counts) {
            engine.attention.plan(&[(session.sequence(), n)]).unwrap();
            let alone =
                run_with(&engine, &query[token * wide..(token + n) * wide], &options, 2, false);
            assert!(alone.0 == expected.0[token * wide..(token + n) * wide]);
            assert!(alone.1 == expected.1[token * shape.num_q_heads..][..n * shape.num_q_heads]);
            token += n;
        }
    }
}

#[test]
fn long_contexts_in_parts_agree_with_the_reference() {
    let sinks = [0.5, -1.0, 3.0, f32::NEG_INFINITY];
    let slopes = [0.01, 0.0, 0.002, 0.1];
    for (seed, spec) in ["full", "quant(k=kivi2, v=q4_0)", "pos(cache_relative)"].iter().enumerate()
    {
        let mut random = Random(3000 + seed as u64);
        let shape = ModelShape::new(2, 4, 2, 32);
        let mut config = config(shape, spec);
        config.block_size = 32;
        config.lane_width = Some(LaneWidth::Head);
        let mut engine = Engine::new(config, seed as u64);
        engine.num_workers = 3;
        let mut session = engine.session();
        let _ = engine.step(&mut [&mut session], &[4500]);
        session.commit(4500, None).unwrap();
        // Lanes of very different length: the parts of the longest go for all.
        for lane in 0..session.sequence().lanes().len() {
            let percent = [100, 3, 60, 95][lane];
            let kept = (0..4500).filter(|i| *i > 4480 || random.chance(percent));
            session.sequence_mut().compact(lane, &KeepSet::from_indices(kept)).unwrap();
        }
        for n in [1, 2, 4, 16] {
            let _ = engine.step(&mut [&mut session], &[n]);
            let options = Options {
                sliding_window: random.pick(&[0, 700, 3100]),
                sinks: random.chance(50).then_some(&sinks),
                alibi_slopes: random.chance(50).then_some(&slopes),
                ..Options::default()
            };
            let steps = run_layers(&engine, n, &options, &mut random);
            check(&engine, &[&mut session], &[n], &steps, &options);
            session.commit(n, None).unwrap();
        }
    }
}

#[test]
fn queries_that_see_nothing_get_zeros_and_the_sink() {
    let shape = ModelShape::new(1, 4, 2, 32);
    let mut engine = Engine::new(config(shape, "full"), 7);
    for n in [1, 20] {
        let mut session = engine.session();
        session.sequence_mut().reserve(n).unwrap();
        engine.attention.plan(&[(session.sequence(), n)]).unwrap();
        // Every logit is -inf, which is how a model masks by itself.
        let key = vec![f32::NEG_INFINITY; n * 2 * 32];
        let value = engine.random.normals(n * 2 * 32);
        engine.append(0, &key, &value);
        let query = vec![1.0; n * 4 * 32];
        let step = engine.run(0, query.clone(), &Options::default());
        assert!(step.output.iter().all(|x| *x == 0.0));
        assert!(step.lse.iter().all(|x| *x == f32::NEG_INFINITY));
        let sinks = [1.5, -2.0, 0.0, 100.0];
        let step = engine.run(0, query, &Options { sinks: Some(&sinks), ..Options::default() });
        assert!(step.output.iter().all(|x| *x == 0.0));
        assert!(step.lse.chunks_exact(4).all(|lse| lse == sinks));
    }
}
