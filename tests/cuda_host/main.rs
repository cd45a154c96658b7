//! A cache on a CUDA device does what a cache in host memory does: the same calls on both, and the
//! same answers. Runs on a real device where there is one, else on a mock driver whose kernels are
//! emulated (`tests/cuda`); without g++ that is a SKIP.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(unsafe_code, reason = "calls the C ABI and the driver as C does")]
#![expect(unreachable_pub, reason = "modules of a test")]

mod captured;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/counting.rs"]
mod counting;
mod driver;
mod memory;
#[path = "../common/mock_driver.rs"]
mod mock_driver;
mod policies;
mod quest;
mod recurrent;
mod refused;
mod sealing;
mod selected;
mod step;
mod twin;

use std::ptr;

use kvmgr::ffi::attention::*;
use kvmgr::ffi::cache::*;
use kvmgr::ffi::sequence::*;
use kvmgr::ffi::store::*;
use kvmgr::ffi::types::*;
use kvmgr::ffi::version::kvmgr_has_feature;

use common::Random;
use counting::allocations;
use driver::{Buffer, Context, Stream, current_context, on_device};
use step::{Step, graph_key};
use twin::{Engine, PLAIN, Pair, Setup, Twin, message, ok, run};

/// A random life of a few sequences: shared prompts, pieces, drafts, forks, truncation, ends.
fn live(setup: Setup, seed: u64, steps: usize) {
    let mut twin = Twin::new(setup, seed, |_| {});
    let mut plays = Random(seed);
    let mut pairs: Vec<Pair> = Vec::new();
    // Few ids, so that prompts share their starts.
    let prompts: Vec<Vec<i32>> = (0..2)
        .map(|_| (0..plays.within(setup.block, 5 * setup.block)).map(|i| i as i32 % 3).collect())
        .collect();
    for _ in 0..steps {
        match plays.below(8) {
            0 | 1 if pairs.len() < 4 => {
                let prompt = &prompts[plays.below(2)];
                let (mut pair, matched) = twin.start(prompt);
                let rest = prompt[matched..].to_vec();
                let n = rest.len();
                twin.step(&mut [&mut pair], &[(rest, n)]);
                pairs.push(pair);
            }
            2 if !pairs.is_empty() && pairs.len() < 5 => {
                let parent = plays.below(pairs.len());
                pairs.push(twin.fork(&pairs[parent]));
            }
            3 if !pairs.is_empty() => {
                let i = plays.below(pairs.len());
                let n = plays.within(1, pairs[i].tokens.len());
                twin.truncate(&mut pairs[i], n);
            }
            4 if pairs.len() > 2 => drop(pairs.swap_remove(plays.below(pairs.len()))),
            _ if !pairs.is_empty() => {
                let feed = |_: &Pair| {
                    let n = if plays.chance(70) { 1 } else { plays.within(2, 5) };
                    let ids = (0..n).map(|_| plays.below(3) as i32).collect();
                    (ids, plays.within(1, n))
                };
                let feeds: Vec<_> = pairs.iter().map(feed).collect();
                let mut batch: Vec<&mut Pair> = pairs.iter_mut().collect();
                twin.step(&mut batch, &feeds);
            }
            _ => {}
        }
        twin.compare_sizes();
    }
    eprintln!("{setup:?}: errors {:?}", twin.worst);
}

#[test]
fn sequences_live_alike() {
    on_device("sequences_live_alike", || {
        let _context = Context::new();
        let bf16 = KVMGR_DTYPE_BF16;
        let setups = [
            PLAIN,
            Setup { dtype: bf16, dim: 128, block: 32, group: 7, lanes: KVMGR_LANE_LAYER, ..PLAIN },
            Setup { dim: 256, block: 64, group: 1, lanes: KVMGR_LANE_HEAD, ..PLAIN },
            Setup { group: 12, kv_heads: 1, window: 20, softcap: 3.0, has_sinks: true, ..PLAIN },
        ];
        for (i, setup) in setups.into_iter().enumerate() {
            live(setup, i as u64 + 1, if driver::is_mock() { 16 } else { 200 });
        }
        // A device has time for any shape.
        let mut random = Random(11);
        for seed in 0..if driver::is_mock() { 2 } else { 60 } {
            live(any_setup(&mut random), seed, if driver::is_mock() { 6 } else { 60 });
        }
    });
}

fn any_setup(random: &mut Random) -> Setup {
    Setup {
        layers: random.within(1, 3),
        kv_heads: random.within(1, 5),
        group: random.within(1, 16),
        dim: random.pick(&[64, 128, 256]),
        block: random.pick(&[16, 32, 64]),
        blocks: 2000,
        lanes: random.pick(&[KVMGR_LANE_SEQUENCE, KVMGR_LANE_LAYER, KVMGR_LANE_HEAD]),
        dtype: random.pick(&[KVMGR_DTYPE_F16, KVMGR_DTYPE_BF16]),
        spec: "full",
        softcap: random.pick(&[0.0, 2.0, 30.0]),
        window: random.pick(&[0, 1, 20, 100]),
        has_sinks: random.chance(30),
        has_prefix: true,
        scale: random.pick(&[0.0, 0.2]),
    }
}

/// Blocks that are sealed in few bits: both sides have the same codes.
#[test]
fn quantized_sequences_live_alike() {
    on_device("quantized_sequences_live_alike", || {
        let _context = Context::new();
        let specs = [
            "quant(int8)",
            "quant(fp8(e4m3))",
            "quant(int4)",
            "quant(kivi(bits=4, group=128))",
            "quant(kivi(bits=2, group=128))",
            "quant(k=had+int4, v=int4)",
            "quant(had+int8)",
            "quant(had+kivi(bits=4, group=128))",
            "quant(k=int8, v=int4)",
            "quant(k=had+int8, v=int4)",
        ];
        let lanes = [KVMGR_LANE_SEQUENCE, KVMGR_LANE_LAYER, KVMGR_LANE_HEAD];
        live_each(&specs, &[64, 128], 2, lanes);
        let wide = [
            "quant(int8)",
            "quant(had+kivi(bits=2, group=256))",
            "quant(k=int8, v=int4)",
            "quant(kivi(bits=4, group=256), first=1, residual=64)",
        ];
        live_each(&wide, &[256], 2, lanes);
    });
}

/// Of which some stay open.
#[test]
fn sequences_with_exact_rows_live_alike() {
    on_device("sequences_with_exact_rows_live_alike", || {
        let _context = Context::new();
        let specs = [
            "quant(int4, residual=70)",
            "quant(kivi(bits=2, group=128), first=1)",
            "quant(k=int8, v=int4, skip_layers=1)",
            "quant(had+int4, first=65, residual=1)",
            "quant(fp8(e4m3), skip_layers=1, residual=100)",
            "quant(kivi(bits=4, group=128), skip_layers=1, first=4, residual=64)",
        ];
        let lanes = [KVMGR_LANE_SEQUENCE, KVMGR_LANE_HEAD, KVMGR_LANE_LAYER];
        live_each(&specs, &[64, 128], 3, lanes);
    });
}

/// Sequences of quantized blocks, with head_dim and lanes of these widths in turn.
fn live_each(specs: &[&'static str], dims: &[usize], layers: usize, lanes: [kvmgr_lane_width; 3]) {
    for (i, spec) in specs.iter().copied().enumerate() {
        let setup = Setup {
            spec,
            layers,
            block: 64,
            dim: dims[i % dims.len()],
            group: [4, 9, 1][i % 3],
            lanes: lanes[i % 3],
            dtype: [KVMGR_DTYPE_BF16, KVMGR_DTYPE_F16][i % 2],
            window: 70,
            ..PLAIN
        };
        live(setup, i as u64 + 1, if driver::is_mock() { 14 } else { 200 });
    }
}

/// Heads whose rows are shared by many CTAs, beside short ones.
#[test]
fn long_sequences_are_cut_and_merged() {
    on_device("long_sequences_are_cut_and_merged", || {
        let _context = Context::new();
        let lens: &[usize] =
            if driver::is_mock() { &[500, 1, 130] } else { &[20_000, 1, 130, 777, 4097] };
        for (group, dim) in [(4, 64), (16, 128), (1, 256)] {
            let setup = Setup { group, dim, blocks: 4000, layers: 1, ..PLAIN };
            let mut twin = Twin::new(setup, 6, |_| {});
            let mut pairs: Vec<Pair> = Vec::new();
            for n in lens {
                let (mut pair, _) = twin.start(&[]);
                // In pieces, so that the host is not asked for long prompts.
                for piece in vec![1; *n].chunks(100) {
                    twin.feed(&mut pair, piece);
                }
                pairs.push(pair);
            }
            for n in [1, 3, 1] {
                let feeds: Vec<_> = pairs.iter().map(|_| (vec![2; n], 1)).collect();
                let mut batch: Vec<&mut Pair> = pairs.iter_mut().collect();
                twin.step(&mut batch, &feeds);
            }
        }
    });
}

/// A decode step of `batch` sequences, captured once and launched for every later step.
#[test]
fn a_graph_serves_later_plans() {
    on_device("a_graph_serves_later_plans", || {
        let _context = Context::new();
        let stream = Stream::new();
        for spec in [
            "full",
            "stream(sink=2, recent=30)",
            "every(2) | snapkv(w=4) | keep_tokens(30)",
            "every(2) | h2o(recent=4) | keep_tokens(30)",
        ] {
            serve_with_a_graph(&stream, spec);
        }
    });
}

fn serve_with_a_graph(stream: &Stream, spec: &'static str) {
    let setup = Setup { layers: 1, lanes: KVMGR_LANE_HEAD, spec, ..PLAIN };
    let twin = Twin::new(setup, 5, |_| {});
    ok(kvmgr_cache_set_stream(twin.device.cache, stream.pointer()));
    ok(kvmgr_attention_reserve(twin.device.attention, 3, 3, 80));
    let mut twin = twin;
    let mut pairs: Vec<Pair> = Vec::new();
    for n in [3, 17, 40] {
        let (mut pair, _) = twin.start(&[]);
        let ids = vec![1; n];
        twin.step(&mut [&mut pair], &[(ids, n)]);
        twin.end_prefill(&pair);
        pairs.push(pair);
    }
    let step = Step::new(setup);
    let (mut graph, mut key_of_graph) = (None, 0);
    for i in 0..100 {
        for pair in &pairs {
            ok(kvmgr_sequence_reserve(pair.host, 1));
            ok(kvmgr_sequence_reserve(pair.device, 1));
        }
        twin.host.plan(&pairs.iter().map(|pair| pair.host).collect::<Vec<_>>(), &[1; 3]);
        twin.device.plan(&pairs.iter().map(|pair| pair.device).collect::<Vec<_>>(), &[1; 3]);
        let graph_key = graph_key(&twin);
        let mut data = step.fill(&mut twin);
        match &graph {
            None => {
                graph = Some(stream.capture(|| {
                    step.run(&twin);
                    let plan = twin.try_plan(&pairs);
                    assert_eq!(plan, KVMGR_INVALID_STATE, "no plan in a capture");
                    assert!(message().contains("captured"), "{}", message());
                }));
                key_of_graph = graph_key;
                // The failed plan is gone; the same again, outside.
                let list: Vec<_> = pairs.iter().map(|pair| pair.device).collect();
                twin.device.plan(&list, &[1; 3]);
            }
            Some(_) => {
                assert_eq!(graph_key, key_of_graph, "{spec}, step {i}");
                ok(kvmgr_attention_graph_launched(twin.device.attention));
            }
        }
        if let Some(graph) = &graph {
            stream.launch(graph);
        }
        stream.wait();
        step.compare(&mut twin, &mut data);
        pairs.iter_mut().for_each(|pair| twin.commit(pair, &[1]));
    }
}

/// Plans and runs one after the other without waiting: each run goes by its own plan.
#[test]
fn plans_that_follow_each_other_do_not_mix() {
    on_device("plans_that_follow_each_other_do_not_mix", || {
        let _context = Context::new();
        let setup = Setup { layers: 1, ..PLAIN };
        let mut twin = Twin::new(setup, 9, |_| {});
        let mut pairs: Vec<Pair> = Vec::new();
        for n in [3, 70, 17, 40, 64, 1] {
            let (mut pair, _) = twin.start(&[]);
            twin.step(&mut [&mut pair], &[(vec![1; n], n)]);
            pairs.push(pair);
        }
        let heads = setup.kv_heads * setup.group;
        let row = heads * setup.dim;
        let queries: Vec<_> = pairs.iter().map(|_| setup.random(&mut twin.random, row)).collect();
        let on_device: Vec<_> = queries.iter().map(|query| Buffer::of(query)).collect();
        let outputs: Vec<_> = pairs.iter().map(|_| Buffer::new(row * 2)).collect();
        let options = twin.options(0, ptr::null_mut());
        let attend = |engine: &Engine, query: kvmgr_tensor, output: kvmgr_tensor| {
            let (query, output) = (&raw const query, &raw const output);
            // SAFETY: live handles and tensors that fit the plan.
            ok(unsafe {
                let lse = ptr::null();
                kvmgr_attention_run(
                    engine.attention,
                    0,
                    query,
                    output,
                    lse,
                    &raw const options,
                    0,
                    1,
                )
            });
        };
        for (i, pair) in pairs.iter().enumerate() {
            twin.device.plan(&[pair.device], &[1]);
            let query = setup.tensor(on_device[i].pointer(), 1, heads, true);
            attend(&twin.device, query, setup.tensor(outputs[i].pointer(), 1, heads, true));
        }
        for (i, pair) in pairs.iter().enumerate() {
            let (mut query, mut output) = (queries[i].clone(), vec![f32::NAN; row]);
            twin.host.plan(&[pair.host], &[1]);
            let o = kvmgr_tensor {
                dtype: KVMGR_DTYPE_F32,
                ..setup.tensor(output.as_mut_ptr().cast(), 1, heads, false)
            };
            attend(&twin.host, setup.tensor(query.as_mut_ptr().cast(), 1, heads, false), o);
            let found: Vec<f32> =
                outputs[i].read::<u16>().into_iter().map(|x| setup.value(x)).collect();
            twin.compare(&found, &output, &[], &[]);
        }
    });
}

#[test]
fn the_engine_brings_memory_and_context_and_keeps_them() {
    on_device("the_engine_brings_memory_and_context_and_keeps_them", || {
        // SAFETY: a NUL-terminated string.
        assert!(unsafe { kvmgr_has_feature(c"cuda".as_ptr()) });
        // Without a context of the engine: the primary one, and none is current afterwards.
        assert!(driver::start().is_null());
        let engine = Engine::new(PLAIN.create(|config| config.device_type = KVMGR_DEVICE_CUDA));
        assert!(current_context().is_null());
        drop(engine);
        assert!(current_context().is_null());

        let context = Context::new();
        let mut memory = Buffer::new(4 << 20);
        let mut twin = Twin::new(PLAIN, 3, |config| {
            (config.memory, config.memory_limit) = (memory.pointer(), 1 << 20);
        });
        memory.expect_unused(1 << 20..4 << 20);
        let (mut pair, _) = twin.start(&[]);
        twin.step(&mut [&mut pair], &[(vec![1; 30], 30)]);
        assert!(context.is_current());
        // 30 tokens are 2 of the 64 blocks of 16 KiB that fit.
        let full = kvmgr_sequence_reserve(pair.device, 64 * 16);
        assert_eq!(full, KVMGR_OUT_OF_BLOCKS, "{}", message());
        ok(kvmgr_sequence_reserve(pair.device, 62 * 16 + 2));
        drop((pair, twin));
        memory.check_unused();
        assert!(context.is_current());
    });
}

#[test]
fn append_and_run_allocate_nothing() {
    on_device("append_and_run_allocate_nothing", || {
        let _context = Context::new();
        let twin = Twin::new(PLAIN, 8, |_| {});
        let (pair, _) = twin.start(&[]);
        ok(kvmgr_sequence_reserve(pair.device, 30));
        twin.device.plan(&[pair.device], &[30]);
        let heads = PLAIN.kv_heads * PLAIN.group;
        let buffer = Buffer::of(&vec![0u16; 30 * heads * PLAIN.dim]);
        let output = Buffer::new(30 * heads * PLAIN.dim * 2);
        let kv = PLAIN.tensor(buffer.pointer(), 30, PLAIN.kv_heads, true);
        let query = PLAIN.tensor(buffer.pointer(), 30, heads, true);
        let out = PLAIN.tensor(output.pointer(), 30, heads, true);
        let lse_buffer = Buffer::new(30 * heads * 4);
        let lse = PLAIN.lse(lse_buffer.pointer(), 30, true);
        let options = twin.options(0, ptr::null_mut());
        run(&twin.device, 0, [&kv, &kv, &query, &out, &lse], &options);
        let before = allocations();
        assert!(before > 0, "allocations are counted");
        run(&twin.device, 1, [&kv, &kv, &query, &out, &lse], &options);
        assert_eq!(allocations() - before, 0);
        // What was attended: rows of zeros, each as likely as the others.
        let lse = lse_buffer.read::<f32>();
        (0..30).for_each(|i| assert!((lse[i * heads] - (i as f32 + 1.0).ln()).abs() < 1e-4));
    });
}

/// What a cache has left in a store is found by one on the other side, in its own layout.
#[test]
fn a_store_serves_caches_on_both_sides() {
    on_device("a_store_serves_caches_on_both_sides", || {
        let _context = Context::new();
        let specs = [
            "full",
            "quant(int8)",
            "quant(had+int4)",
            "quant(kivi(bits=2, group=128))",
            "quant(k=int8, v=int4, first=4)",
        ];
        for (i, spec) in specs.into_iter().enumerate() {
            let dim = [64, 128][i % 2];
            let setup = Setup { spec, dim, block: 64, blocks: 16, ..PLAIN };
            for leaves_on_device in [false, true] {
                share_a_store(setup, leaves_on_device, i as u64);
            }
        }
    });
}

fn share_a_store(setup: Setup, leaves_on_device: bool, seed: u64) {
    let mut store = ptr::null_mut();
    // SAFETY: a string and a place for a pointer.
    ok(unsafe { kvmgr_store_create(c"host".as_ptr(), &raw mut store) });
    let prompt: Vec<i32> = (0..130).map(|i| i % 5).collect();
    let stores = [!leaves_on_device, leaves_on_device]
        .map(|leaves| if leaves { store } else { ptr::null_mut() });
    let mut first = Twin::with(
        setup,
        seed,
        |config| config.store = stores[0],
        |config| config.store = stores[1],
    );
    let (mut pair, _) = first.start(&prompt);
    first.step(&mut [&mut pair], &[(prompt.clone(), prompt.len())]);
    drop(pair);
    // Somebody else wants all blocks.
    let (pair, _) = first.start(&[]);
    pair.both().into_iter().for_each(|other| ok(kvmgr_sequence_reserve(other, 16 * 64)));
    drop(pair);
    drop(first);
    let mut second =
        Twin::with(setup, seed, |config| config.store = store, |config| config.store = store);
    let (mut pair, matched) = second.start(&prompt);
    assert_eq!(matched, 128, "{} {leaves_on_device}", setup.spec);
    let rest = prompt[matched..].to_vec();
    let n = rest.len();
    second.step(&mut [&mut pair], &[(rest, n)]);
    assert_eq!(second.device.stats().store_failures, 0);
    drop((pair, second));
    kvmgr_store_release(store);
}

/// Blocks leave the device for a store and come back: those of a preempted sequence, and prefixes that
/// were reclaimed.
#[test]
fn blocks_go_to_a_store_and_come_back() {
    on_device("blocks_go_to_a_store_and_come_back", || {
        let _context = Context::new();
        let mut store = ptr::null_mut();
        // SAFETY: a string and a place for a pointer.
        ok(unsafe { kvmgr_store_create(c"host".as_ptr(), &raw mut store) });
        let mut twin = Twin::new(PLAIN, 4, |config| {
            (config.store, config.num_blocks) = (store, 8);
        });
        let prompts = [1, 2].map(|salt| (0..90).map(|i| i % (3 + salt)).collect::<Vec<i32>>());
        for prompt in [&prompts[0], &prompts[1], &prompts[0]] {
            // Six of eight blocks: each prompt reclaims the one before. The host has them all.
            let (mut pair, matched) = twin.start(prompt);
            let rest = prompt[matched..].to_vec();
            let n = rest.len();
            twin.step(&mut [&mut pair], &[(rest, n)]);
            for sequence in [pair.host, pair.device] {
                ok(kvmgr_sequence_preempt(sequence, store));
                assert_eq!(kvmgr_sequence_reserve(sequence, 1), KVMGR_INVALID_STATE);
                ok(kvmgr_sequence_resume(sequence));
            }
            twin.step(&mut [&mut pair], &[(vec![0], 1)]);
        }
        let stats = twin.device.stats();
        assert!(stats.store_puts > 0 && stats.store_hits > 0, "{stats:?}");
        assert_eq!(stats.store_failures, 0);
        drop(twin);
        kvmgr_store_release(store);
    });
}
