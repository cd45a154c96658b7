//! Sequences that share their first blocks attend to them together: against the reference, against each
//! sequence for itself, and where it must not happen.

#![expect(unsafe_code, clippy::unwrap_used, reason = "calls the C ABI; a test stops at a surprise")]
#![expect(clippy::borrow_as_ptr, reason = "calls the C ABI as C does")]

mod common;
#[path = "common/counting.rs"]
mod counting;

use std::ptr;

use common::{Engine, Random, Step, check, config};
use kvmgr::attention::{Options, PlanStatistics};
use kvmgr::device::tensor::{Tensor, TensorMut};
use kvmgr::dtype::DType;
use kvmgr::manager::Session;
use kvmgr::shape::{KeepSet, LaneWidth, ModelShape};

const SMALL: ModelShape = ModelShape::new(2, 4, 2, 64);

/// A session of `tokens` tokens.
fn prompt(engine: &mut Engine, tokens: usize) -> Session {
    let mut session = engine.session();
    if tokens > 0 {
        let _ = engine.step(&mut [&mut session], &[tokens]);
        session.commit(tokens, None).unwrap();
    }
    session
}

/// Adds `tokens` tokens of its own.
fn extend(engine: &mut Engine, session: &mut Session, tokens: usize) {
    if tokens > 0 {
        let _ = engine.step(&mut [session], &[tokens]);
        session.commit(tokens, None).unwrap();
    }
}

/// Attends with the same queries with and without the cascade; answers both of each layer.
fn both(engine: &mut Engine, options: &Options<'_>) -> Vec<(Step, Step)> {
    let shape = engine.shape();
    let n = engine.attention.num_tokens() * shape.num_q_heads * shape.head_dim;
    let run = |layer| {
        let query = engine.random.normals(n);
        let with = engine.run(layer, query.clone(), options);
        (with, engine.run(layer, query, &Options { no_cascade: true, ..*options }))
    };
    (0..shape.num_layers).map(run).collect()
}

/// Runs a step of the sessions twice and checks both; answers what was shared.
fn check_step(
    engine: &mut Engine,
    sessions: &mut [&mut Session],
    counts: &[usize],
    options: &Options<'_>,
) -> PlanStatistics {
    let _ = engine.step(sessions, counts);
    let (with, without): (Vec<_>, Vec<_>) = both(engine, options).into_iter().unzip();
    check(engine, sessions, counts, &with, options);
    check(engine, sessions, counts, &without, options);
    engine.attention.statistics()
}

#[test]
fn random_batches_of_sharers_and_others_agree_with_the_reference() {
    let specs = [
        "full",
        "quant(q8_0)",
        "quant(k=had+q4_0, v=q4_0)",
        "quant(k=kivi2, v=kivi4)",
        "quant(k=bf16, v=f32)",
        "quant(tq4)",
    ];
    let mut shared = 0;
    for seed in 0..36 {
        let mut random = Random(seed);
        let num_kv_heads = random.within(1, 3);
        let (layers, group) = (random.within(1, 2), random.pick(&[1, 2, 4, 7]));
        let head_dim = random.pick(&[64, 128]);
        let shape = ModelShape::new(layers, num_kv_heads * group, num_kv_heads, head_dim);
        let mut config = config(shape, specs[seed as usize % specs.len()]);
        config.block_size = 32;
        config.dtype = random.pick(&[DType::F32, DType::F16, DType::Bf16]);
        config.lane_width =
            Some(random.pick(&[LaneWidth::Sequence, LaneWidth::Layer, LaneWidth::Head]));
        let mut engine = Engine::new(config, seed + 100);
        engine.num_workers = random.within(1, 5);
        let tokens = random.pick(&[0, 1, 32, 127, 128, 129, 159, 160, 161, 300]);
        let leader = prompt(&mut engine, tokens);
        let mut sessions: Vec<_> =
            (0..random.within(2, 19)).map(|_| leader.fork().unwrap()).collect();
        let mut is_fork = vec![true; sessions.len()];
        for _ in 0..random.below(3) {
            let tokens = random.pick(&[1, 40, 200]);
            let other = prompt(&mut engine, tokens);
            let at = random.below(sessions.len() + 1);
            sessions.insert(at, other);
            is_fork.insert(at, false);
        }
        for session in &mut sessions {
            let tokens = random.pick(&[0, 1, 31, 70]);
            extend(&mut engine, session, tokens);
        }
        let sinks = random.normals(shape.num_q_heads);
        for _ in 0..2 {
            let mut refs: Vec<_> = sessions.iter_mut().collect();
            let counts: Vec<_> = refs.iter().map(|_| random.pick(&[1, 1, 1, 2, 5, 9])).collect();
            let options = Options {
                softcap: random.pick(&[0.0, 3.0]),
                sinks: random.chance(50).then_some(&sinks),
                ..Options::default()
            };
            let found = check_step(&mut engine, &mut refs, &counts, &options);
            let whole = tokens / 32 * 32;
            let sharers = is_fork.iter().zip(&counts).filter(|(is_fork, n)| **is_fork && **n <= 8);
            let sharers = sharers.count();
            if whole < 128 {
                assert_eq!(found.shared_groups, 0, "seed {seed}: {tokens} tokens");
            } else if sharers > 1 {
                assert_eq!(
                    (found.shared_groups, found.shared_sequences),
                    (1, sharers),
                    "seed {seed}"
                );
                assert!((whole..=tokens).contains(&found.shared_rows), "seed {seed}: {found:?}");
                assert!(found.shared_tasks_run > 0, "seed {seed}");
                shared += 1;
            }
            for (session, n) in refs.iter_mut().zip(&counts) {
                session.commit(*n, None).unwrap();
            }
        }
    }
    assert!(shared > 10, "{shared}");
}

#[test]
fn long_prefixes_are_split_and_two_groups_keep_apart() {
    for (seed, spec) in ["full", "quant(q8_0)"].into_iter().enumerate() {
        let shape = ModelShape::new(1, 8, 2, 64);
        let mut engine = Engine::new(config(shape, spec), seed as u64);
        engine.num_workers = 3;
        let (a, b) = (prompt(&mut engine, 4200), prompt(&mut engine, 700));
        let mut sessions: Vec<_> = (0..7).map(|i| [&a, &b][i % 2].fork().unwrap()).collect();
        extend(&mut engine, &mut sessions[2], 1100);
        let mut refs: Vec<_> = sessions.iter_mut().collect();
        let found = check_step(&mut engine, &mut refs, &[1, 1, 3, 1, 1, 2, 1], &Options::default());
        assert_eq!((found.shared_groups, found.shared_sequences), (2, 7));
        assert_eq!(found.shared_rows, 4200 / 16 * 16 + 700 / 16 * 16);
        // Two parts of the long prefix and one of the short, for each of two heads, in two runs.
        assert_eq!(found.shared_tasks_run, 2 * 2 * 3);
    }
}

#[test]
fn results_do_not_depend_on_workers() {
    let mut engine = Engine::new(config(SMALL, "quant(q4_0)"), 5);
    let leader = prompt(&mut engine, 4100);
    let mut sessions: Vec<_> = (0..20).map(|_| leader.fork().unwrap()).collect();
    let mut refs: Vec<_> = sessions.iter_mut().collect();
    let _ = engine.step(&mut refs, &[1; 20]);
    let query = engine.random.normals(20 * 4 * 64);
    let first = engine.run(0, query.clone(), &Options::default());
    for workers in [2, 3, 7, 40] {
        engine.num_workers = workers;
        let other = engine.run(0, query.clone(), &Options::default());
        assert_eq!((&other.output, &other.lse), (&first.output, &first.lse), "{workers}");
    }
    assert!(engine.attention.statistics().shared_tasks_run > 0);
}

#[test]
fn what_depends_on_places_or_on_single_rows_is_not_shared() {
    let slopes = [0.1, 0.2, 0.3, 0.4];
    let mut engine = Engine::new(config(SMALL, "full"), 5);
    let leader = prompt(&mut engine, 200);
    let (mut a, mut b) = (leader.fork().unwrap(), leader.fork().unwrap());
    let _ = engine.step(&mut [&mut a, &mut b], &[1, 2]);
    let before = engine.attention.statistics();
    assert_eq!((before.shared_groups, before.shared_tasks_run), (1, 4));
    for options in [
        Options { sliding_window: 50, ..Options::default() },
        Options { alibi_slopes: Some(&slopes), ..Options::default() },
    ] {
        let (with, _): (Vec<_>, Vec<_>) = both(&mut engine, &options).into_iter().unzip();
        check(&engine, &[&mut a, &mut b], &[1, 2], &with, &options);
    }
    let blocks = |all: &[u32]| [all, all, all, all].concat();
    engine.attention.select(0, &[0, 2, 4, 6, 8], &blocks(&[0, 3])).unwrap();
    let query = engine.random.normals(3 * 4 * 64);
    let _ = engine.run(0, query.clone(), &Options::default());
    assert_eq!(engine.attention.statistics(), before);
    // The other layer has no lists.
    let _ = engine.run(1, query, &Options::default());
    assert_eq!(engine.attention.statistics().shared_tasks_run, 6);

    for spec in [
        "h2o | keep_tokens(500)",
        "tova | keep_tokens(500)",
        "pos(cache_relative)",
        "quest(tokens=64)",
    ] {
        let mut engine = Engine::new(config(SMALL, spec), 5);
        let leader = prompt(&mut engine, 200);
        let (mut a, mut b) = (leader.fork().unwrap(), leader.fork().unwrap());
        let found = check_plan(&mut engine, &mut [&mut a, &mut b]);
        assert_eq!(found, PlanStatistics::default(), "{spec}");
    }
}

fn check_plan(engine: &mut Engine, sessions: &mut [&mut Session]) -> PlanStatistics {
    let counts = vec![1; sessions.len()];
    let _ = engine.step(sessions, &counts);
    engine.attention.statistics()
}

#[test]
fn evicted_rows_stay_hidden_and_end_what_is_shared() {
    let mut engine = Engine::new(config(SMALL, "quant(q8_0)"), 9);
    let mut leader = prompt(&mut engine, 600);
    let mut random = Random(3);
    let kept: Vec<_> = (0..600).filter(|i| *i > 560 || random.chance(70)).collect();
    leader.sequence_mut().compact(0, &KeepSet::from_indices(kept)).unwrap();
    let mut sessions: Vec<_> = (0..4).map(|_| leader.fork().unwrap()).collect();
    // Another hole in one of them, behind what is worth a group.
    let len = sessions[1].sequence().lanes()[0].len();
    let kept = (0..len).filter(|i| *i != 250);
    sessions[1].sequence_mut().compact(0, &KeepSet::from_indices(kept)).unwrap();
    let mut refs: Vec<_> = sessions.iter_mut().collect();
    let found = check_step(&mut engine, &mut refs, &[1, 1, 2, 1], &Options::default());
    assert_eq!(found.shared_sequences, 4);
    assert_eq!(found.shared_rows, 250);
}

#[test]
fn bad_numbers_stay_in_their_sequence() {
    let mut engine = Engine::new(config(SMALL, "full"), 11);
    let mut leader = prompt(&mut engine, 200);
    // Rows that are rolled back leave NaN in the block that is shared.
    let poison = |engine: &mut Engine, session: &mut Session, n: usize| {
        session.sequence_mut().reserve(n).unwrap();
        engine.attention.plan(&[(session.sequence(), n)]).unwrap();
        let bad = vec![f32::NAN; n * 2 * 64];
        (0..2).for_each(|layer| engine.append(layer, &bad, &bad));
    };
    poison(&mut engine, &mut leader, 5);
    leader.commit(0, None).unwrap();
    let mut sessions: Vec<_> = (0..3).map(|_| leader.fork().unwrap()).collect();
    poison(&mut engine, &mut sessions[1], 3);
    sessions[1].commit(3, None).unwrap();
    let mut refs: Vec<_> = sessions.iter_mut().collect();
    let _ = engine.step(&mut refs, &[1, 1, 2]);
    for layer in 0..2 {
        let query = engine.random.normals(4 * 4 * 64);
        let step = engine.run(layer, query, &Options::default());
        for (token, output) in step.output.chunks_exact(4 * 64).enumerate() {
            let is_bad = output.iter().all(|x| x.is_nan());
            assert!(if token == 1 { is_bad } else { output.iter().all(|x| x.is_finite()) });
        }
    }
    assert_eq!(engine.attention.statistics().shared_sequences, 3);
}

#[test]
fn a_run_allocates_nothing() {
    for spec in ["full", "quant(q4_0)"] {
        let mut engine = Engine::new(config(SMALL, spec), 5);
        let leader = prompt(&mut engine, 4100);
        let mut sessions: Vec<_> = (0..20).map(|_| leader.fork().unwrap()).collect();
        let mut refs: Vec<_> = sessions.iter_mut().collect();
        let _ = engine.step(&mut refs, &[1; 20]);
        let query = engine.random.normals(20 * 4 * 64);
        let mut output = vec![0.0; query.len()];
        let query = Tensor::from_slice(&query, [20, 4, 64]);
        let output = TensorMut::from_slice(&mut output, [20, 4, 64]);
        let options = Options::default();
        let before = counting::allocations();
        for worker in 0..2 {
            engine.attention.run(1, &query, &output, None, &options, worker, 2).unwrap();
        }
        assert_eq!(counting::allocations() - before, 0, "{spec}");
        assert!(engine.attention.statistics().shared_tasks_run > 0);
    }
}

#[test]
fn forks_through_the_c_abi_share_and_can_be_kept_apart() {
    use kvmgr::ffi::attention::*;
    use kvmgr::ffi::cache::*;
    use kvmgr::ffi::sequence::*;
    use kvmgr::ffi::types::*;
    let tensor = |data: &mut [f32], tokens: usize, heads: i64| kvmgr_tensor {
        data: data.as_mut_ptr().cast(),
        dtype: KVMGR_DTYPE_F32,
        ndim: 3,
        shape: [tokens as i64, heads, 64, 0],
        strides: [0; 4],
        device_type: kvmgr_device_type(0),
        device_id: 0,
    };
    let mut random = Random(77);
    let (mut cache, mut attention) = (ptr::null_mut(), ptr::null_mut());
    let mut sequences = [ptr::null_mut(); 3];
    // SAFETY: zeroed structs with their sizes, live handles, tensors that outlive the calls.
    unsafe {
        let mut config: kvmgr_cache_config = std::mem::zeroed();
        config.struct_size = size_of::<kvmgr_cache_config>();
        (config.num_layers, config.num_q_heads, config.num_kv_heads) = (1, 4, 2);
        (config.head_dim, config.block_size, config.num_blocks) = (64, 16, 100);
        (config.num_threads, config.spec) = (1, c"full".as_ptr());
        assert_eq!(kvmgr_cache_create(&config, &raw mut cache), KVMGR_OK);
        assert_eq!(kvmgr_attention_create(cache, &raw mut attention), KVMGR_OK);
        assert_eq!(
            kvmgr_cache_sequence_create(cache, ptr::null(), &raw mut sequences[0]),
            KVMGR_OK
        );
        let mut append = |sequence, n: usize| {
            let (mut key, mut value) = (random.normals(n * 128), random.normals(n * 128));
            let (key, value) = (tensor(&mut key, n, 2), tensor(&mut value, n, 2));
            assert_eq!(kvmgr_sequence_reserve(sequence, n), KVMGR_OK);
            assert_eq!(kvmgr_sequence_append(sequence, 0, &key, &value), KVMGR_OK);
        };
        append(sequences[0], 320);
        assert_eq!(kvmgr_sequence_commit(sequences[0], ptr::null(), 320), KVMGR_OK);
        for i in 1..3 {
            let fork = kvmgr_sequence_fork(sequences[0], &raw mut sequences[i]);
            assert_eq!(fork, KVMGR_OK);
        }
        sequences.into_iter().for_each(|sequence| append(sequence, 1));
        let plan = kvmgr_attention_plan(attention, sequences.as_ptr(), [1; 3].as_ptr(), 3);
        assert_eq!(plan, KVMGR_OK);

        let mut query = random.normals(3 * 256);
        let query = tensor(&mut query, 3, 4);
        let run = |flags| {
            let mut values = vec![f32::NAN; 3 * 256];
            let output = tensor(&mut values, 3, 4);
            let mut options: kvmgr_attention_options = std::mem::zeroed();
            options.struct_size = size_of::<kvmgr_attention_options>();
            options.flags = flags;
            let none = ptr::null();
            let status = kvmgr_attention_run(attention, 0, &query, &output, none, &options, 0, 1);
            let struct_size = size_of::<kvmgr_attention_stats>();
            let mut stats = kvmgr_attention_stats { struct_size, ..Default::default() };
            assert_eq!(kvmgr_attention_get_stats(attention, &raw mut stats), KVMGR_OK);
            assert_eq!((stats.shared_groups, stats.shared_sequences), (1, 3));
            assert_eq!(stats.shared_rows, 320);
            (status, values, stats.shared_tasks_run)
        };
        let (_, apart, tasks) = run(KVMGR_ATTENTION_NO_CASCADE);
        assert_eq!(tasks, 0);
        let (_, together, tasks) = run(0);
        assert_eq!(tasks, 2, "one for each KV head");
        let apart: Vec<_> = apart.iter().map(|x| f64::from(*x)).collect();
        assert!(common::relative_error(&together, &apart) < 1e-4);
        assert_eq!(run(2).0, KVMGR_INVALID_ARGUMENT);

        kvmgr_attention_destroy(attention);
        sequences.into_iter().for_each(|sequence| kvmgr_sequence_destroy(sequence));
        kvmgr_cache_release(cache);
    }
}
