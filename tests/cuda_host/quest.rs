//! The selector `quest`: the device chooses the blocks that the host would.

use std::ptr;

use half::f16;
use kvmgr::ffi::attention::*;
use kvmgr::ffi::cache::*;
use kvmgr::ffi::policy::*;
use kvmgr::ffi::sequence::*;
use kvmgr::ffi::store::*;
use kvmgr::ffi::types::*;

use crate::common::Random;
use crate::counting::allocations;
use crate::driver::{Context, Stream, is_mock, num_launches, on_device};
use crate::selected::{plan, try_select};
use crate::step::{Step, graph_key};
use crate::twin::{PLAIN, Pair, Setup, Twin, ok};

/// Choices so far; none on a device, which does not count.
fn choices() -> Option<u32> {
    num_launches(c"kvm_topk")
}

/// A life in which sequences grow over the ends of blocks, share prefixes, fork and roll back.
fn live(setup: Setup, n: usize, seed: u64) {
    let mut twin = Twin::new(setup, seed, |_| {});
    let prompt: Vec<i32> = (0..n as i32).map(|i| i % 5).collect();
    let mut pairs = Vec::new();
    for _ in 0..2 {
        let (mut pair, matched) = twin.start(&prompt);
        for piece in prompt[matched..].chunks(90) {
            twin.feed(&mut pair, piece);
        }
        pairs.push(pair);
    }
    pairs.push(twin.fork(&pairs[0]));
    let (mut short, _) = twin.start(&[]);
    twin.feed(&mut short, &[1; 5]);
    pairs.push(short);
    let before = choices();
    for step in 0..if is_mock() { 6 } else { 100 } {
        let n = |i: usize| if step == 3 && i == 1 { 3 } else { 1 };
        let feeds: Vec<_> = (0..pairs.len()).map(|i| (vec![i as i32; n(i)], n(i))).collect();
        let mut batch: Vec<&mut Pair> = pairs.iter_mut().collect();
        twin.step(&mut batch, &feeds);
        // The next block of all.
        if step == 1 {
            for pair in &mut pairs {
                twin.feed(pair, &vec![4; setup.block]);
            }
        }
        if step == 4 {
            let n = pairs[0].tokens.len() / setup.block * setup.block;
            twin.truncate(&mut pairs[0], n - setup.block);
        }
    }
    assert!(before.is_none_or(|before| choices() > Some(before)), "nothing was chosen");
    eprintln!("{setup:?}: errors {:?}", twin.worst);
}

#[test]
fn raw_blocks_are_chosen_alike() {
    on_device("quest::raw_blocks_are_chosen_alike", || {
        let _context = Context::new();
        let (bf16, blocks) = (KVMGR_DTYPE_BF16, 2000);
        let spec = "quest(tokens=64, sink=20, recent=30, dense=1)";
        let setups = [
            Setup { spec, layers: 3, ..PLAIN },
            Setup {
                spec: "quest(tokens=70, dense=0)",
                dtype: bf16,
                dim: 128,
                block: 32,
                group: 7,
                lanes: KVMGR_LANE_LAYER,
                ..PLAIN
            },
            Setup { spec, dim: 256, group: 1, lanes: KVMGR_LANE_HEAD, blocks, ..PLAIN },
            // A sliding window reads what it reaches.
            Setup { spec: "quest(tokens=1, dense=0)", group: 16, window: 40, ..PLAIN },
        ];
        for (i, setup) in setups.into_iter().enumerate() {
            live(setup, if is_mock() { 330 } else { 5000 }, i as u64);
        }
    });
}

/// The keys of a sequence, from which its lists follow.
struct Reference {
    setup: Setup,
    /// `[layer][token, head, dim]`.
    keys: Vec<Vec<f32>>,
}

impl Reference {
    /// Notes the keys of `n` tokens, which a twin is about to draw.
    fn feed(&mut self, twin: &mut Twin, pair: &mut Pair, n: usize) {
        let Setup { kv_heads, dim, .. } = self.setup;
        let mut random = Random(twin.random.0);
        for keys in &mut self.keys {
            let [key, _] = [(); 2].map(|()| self.setup.random(&mut random, n * kv_heads * dim));
            keys.extend(key.into_iter().map(|x| self.setup.value(x)));
        }
        twin.feed(pair, &vec![1; n]);
    }

    /// The best `budget` of the first `num_blocks` blocks for the queries of a head.
    fn list(
        &self,
        layer: usize,
        head: usize,
        query: &[f32],
        (num_blocks, budget): (usize, usize),
    ) -> Vec<u32> {
        let Setup { kv_heads, dim, block, .. } = self.setup;
        let round = |x: f32| f64::from(f16::from_f32(x).to_f32());
        let score = |b: usize| {
            let bound = |query: &[f32]| -> f64 {
                let channel = |d: usize| {
                    let key = |t: usize| self.keys[layer][(t * kv_heads + head) * dim + d];
                    let keys = (b * block..(b + 1) * block).map(key);
                    let high = round(keys.clone().fold(f32::NEG_INFINITY, f32::max));
                    let low = round(keys.fold(f32::INFINITY, f32::min));
                    (f64::from(query[d]) * high).max(f64::from(query[d]) * low)
                };
                (0..dim).map(channel).sum()
            };
            query.chunks_exact(dim).map(bound).fold(f64::NEG_INFINITY, f64::max)
        };
        let scores: Vec<f64> = (0..num_blocks).map(score).collect();
        let mut order: Vec<u32> = (0..num_blocks as u32).collect();
        order.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
        order.truncate(budget);
        order.sort_unstable();
        order
    }

    /// A step in which the host is told what to read: of `num_blocks` blocks `budget`, and the others of the
    /// lane.
    fn step(
        &mut self,
        twin: &mut Twin,
        pairs: &mut [Pair],
        dense: usize,
        (num_blocks, of_lane, budget): (usize, usize, usize),
    ) {
        let Setup { kv_heads, group, dim, layers, .. } = self.setup;
        plan(twin, pairs, &[1]);
        for layer in 0..layers {
            let mut random = Random(twin.random.0);
            let mut rows = |heads| -> Vec<f32> {
                let bits = self.setup.random(&mut random, heads * dim);
                bits.into_iter().map(|x| self.setup.value(x)).collect()
            };
            let [key, _, query] = [kv_heads, kv_heads, kv_heads * group].map(&mut rows);
            self.keys[layer].extend(key);
            if layer >= dense && num_blocks > budget {
                let of_head = |h: usize| &query[h * group * dim..(h + 1) * group * dim];
                let others = num_blocks as u32..of_lane as u32;
                let best = |h| self.list(layer, h, of_head(h), (num_blocks, budget));
                let list = |h| best(h).into_iter().chain(others.clone()).collect::<Vec<_>>();
                let lists: Vec<_> = (0..kv_heads).map(list).collect();
                ok(try_select(&twin.host, layer, &lists));
            }
            twin.layer(layer, 1);
        }
        twin.commit(&mut pairs[0], &[1]);
    }
}

/// Bounds are those of the keys before they were encoded.
#[test]
fn quantized_blocks_are_chosen_by_the_keys_that_they_had() {
    on_device("quest::quantized_blocks_are_chosen_by_the_keys_that_they_had", || {
        let _context = Context::new();
        let choosing = c"quant(int4) | quest(tokens=128, dense=1)";
        let lanes = [KVMGR_LANE_SEQUENCE, KVMGR_LANE_LAYER, KVMGR_LANE_HEAD];
        for (i, lanes) in lanes.into_iter().enumerate() {
            let dtype = [KVMGR_DTYPE_BF16, KVMGR_DTYPE_F16][i % 2];
            let setup = Setup { spec: "quant(int4)", block: 64, layers: 3, lanes, dtype, ..PLAIN };
            let mut twin = Twin::new(setup, 7, |config| config.spec = choosing.as_ptr());
            let mut reference = Reference { setup, keys: vec![Vec::new(); 3] };
            let (mut pair, _) = twin.start(&[]);
            reference.feed(&mut twin, &mut pair, 318);
            let mut pairs = [pair];
            let before = choices();
            for step in 0..4 {
                // Over the end of a block, and a block more.
                let full = pairs[0].tokens.len() / 64;
                reference.step(&mut twin, &mut pairs, 1, (full, full + 1, 2));
                if step == 2 {
                    reference.feed(&mut twin, &mut pairs[0], 80);
                }
            }
            assert_eq!(
                choices(),
                before.map(|before| before + 4 * 2),
                "layers but the first choose"
            );
            eprintln!("{setup:?}: errors {:?}", twin.worst);
        }
    });
}

/// Bounds of blocks that come encoded from a store are those of what is in them, as on the host.
#[test]
fn blocks_of_a_store_are_chosen_by_what_is_in_them() {
    on_device("quest::blocks_of_a_store_are_chosen_by_what_is_in_them", || {
        let _context = Context::new();
        let mut store = ptr::null_mut();
        // SAFETY: a string and a place for a pointer.
        ok(unsafe { kvmgr_store_create(c"host".as_ptr(), &raw mut store) });
        for spec in ["quant(had+int8) | quest(tokens=64, dense=0)", "quest(tokens=64, dense=0)"] {
            let setup = Setup { spec, block: 64, ..PLAIN };
            let mut twin = Twin::new(setup, 9, |config| config.store = store);
            let (mut pair, _) = twin.start(&[]);
            twin.feed(&mut pair, &[1; 330]);
            for sequence in pair.both() {
                ok(kvmgr_sequence_preempt(sequence, store));
                ok(kvmgr_sequence_resume(sequence));
            }
            for _ in 0..3 {
                twin.step(&mut [&mut pair], &[(vec![1], 1)]);
            }
            eprintln!("{setup:?}: errors {:?}", twin.worst);
        }
        kvmgr_store_release(store);
    });
}

/// A block that has lost its last rows is always read, and what is on the shorter side of it.
#[test]
fn blocks_behind_a_rollback_are_read() {
    on_device("quest::blocks_behind_a_rollback_are_read", || {
        let _context = Context::new();
        let choosing = c"quest(tokens=32, dense=0)";
        let mut twin = Twin::new(PLAIN, 8, |config| config.spec = choosing.as_ptr());
        let mut reference = Reference { setup: PLAIN, keys: vec![Vec::new(); 2] };
        let (mut pair, _) = twin.start(&[]);
        reference.feed(&mut twin, &mut pair, 330);
        // 15 blocks and 10 rows of the next, which is sealed; 4 full ones and one more behind it.
        twin.truncate(&mut pair, 250);
        twin.feed(&mut pair, &[1; 70]);
        let mut pairs = [pair];
        let before = choices();
        for _ in 0..2 {
            reference.step(&mut twin, &mut pairs, 0, (15, 21, 2));
        }
        assert_eq!(choices(), before.map(|before| before + 4));
        eprintln!("errors {:?}", twin.worst);
    });
}

/// A full block that is in the residual window of a fork may be written again when the other sequence, which has
/// chosen by it, is gone.
#[test]
fn blocks_that_are_written_again_are_chosen_by_what_is_in_them() {
    on_device("quest::blocks_that_are_written_again_are_chosen_by_what_is_in_them", || {
        let _context = Context::new();
        // The last layer alone chooses, whose blocks stay as they are.
        let setup = Setup {
            spec: "quant(int8, residual=128, skip_layers=1) | quest(tokens=128, dense=2)",
            block: 64,
            layers: 3,
            lanes: KVMGR_LANE_LAYER,
            has_prefix: false,
            ..PLAIN
        };
        let mut twin = Twin::new(setup, 4, |_| {});
        let (mut pair, _) = twin.start(&[]);
        twin.feed(&mut pair, &[1; 400]);
        let mut child = twin.fork(&pair);
        twin.feed(&mut pair, &[1; 200]);
        let before = choices();
        twin.step(&mut [&mut pair], &[(vec![1], 1)]);
        assert!(before.is_none_or(|before| choices() > Some(before)), "nothing was chosen");
        drop(pair);
        twin.truncate(&mut child, 325);
        twin.feed(&mut child, &[1; 300]);
        for _ in 0..8 {
            twin.step(&mut [&mut child], &[(vec![1], 1)]);
        }
    });
}

/// Sequences of a batch choose in layers of their own; one has no policy, and blocks were there before
/// anybody chose.
#[test]
fn sequences_choose_for_themselves() {
    on_device("quest::sequences_choose_for_themselves", || {
        let _context = Context::new();
        for lanes in [KVMGR_LANE_SEQUENCE, KVMGR_LANE_HEAD] {
            let setup = Setup { layers: 3, lanes, spec: "quant(int4)", block: 64, ..PLAIN };
            let mut twin = Twin::new(setup, 8, |_| {});
            let prompt = [1; 400];
            let (mut pair, _) = twin.start(&[]);
            twin.feed(&mut pair, &prompt);
            let mut pairs = vec![pair];
            // Blocks of the prefix index, encoded: both know what is in them.
            for spec in [c"quest(tokens=64, dense=1)", c"quest(tokens=192, sink=3, dense=2)"] {
                let mut policy = ptr::null_mut();
                // SAFETY: a string and a place for a pointer.
                ok(unsafe { kvmgr_policy_create(spec.as_ptr(), &raw mut policy) });
                let (mut pair, matched) = twin.start_with(policy, &prompt);
                assert_eq!(matched, 384);
                twin.feed(&mut pair, &prompt[matched..]);
                pairs.push(pair);
                kvmgr_policy_release(policy);
            }
            let before = choices();
            for step in 0..2 {
                let mut batch: Vec<&mut Pair> = pairs.iter_mut().collect();
                twin.step(&mut batch, &vec![(vec![step], 1); 3]);
            }
            assert_eq!(choices(), before.map(|before| before + 2 * 2));
            eprintln!("{setup:?}: errors {:?}", twin.worst);
        }
    });
}

/// A list of the engine comes before a choice, for a layer and a plan.
#[test]
fn lists_of_the_engine_come_first() {
    on_device("quest::lists_of_the_engine_come_first", || {
        let _context = Context::new();
        let setup = Setup { spec: "quest(tokens=32, dense=0)", ..PLAIN };
        let mut twin = Twin::new(setup, 3, |_| {});
        let (mut pair, _) = twin.start(&[]);
        twin.feed(&mut pair, &[1; 200]);
        let mut pairs = [pair];
        for is_selected in [true, false] {
            plan(&twin, &pairs, &[1]);
            let before = choices();
            if is_selected {
                let lists = vec![vec![1, 2, 5, 7, 11], vec![]];
                [&twin.host, &twin.device]
                    .iter()
                    .for_each(|engine| ok(try_select(engine, 0, &lists)));
            }
            (0..2).for_each(|layer| twin.layer(layer, 1));
            let expected = if is_selected { 1 } else { 2 };
            assert_eq!(choices(), before.map(|before| before + expected));
            twin.commit(&mut pairs[0], &[1]);
        }
    });
}

#[test]
fn a_graph_serves_later_choices() {
    on_device("quest::a_graph_serves_later_choices", || {
        let _context = Context::new();
        let stream = Stream::new();
        let setup = Setup { spec: "quest(tokens=32, dense=0)", layers: 1, ..PLAIN };
        let mut twin = Twin::new(setup, 5, |_| {});
        ok(kvmgr_cache_set_stream(twin.device.cache, stream.pointer()));
        ok(kvmgr_attention_reserve(twin.device.attention, 3, 3, 40));
        // Two are about to begin a block; the last reads all.
        let mut pairs: Vec<Pair> = Vec::new();
        for n in [95, 159, 20] {
            let (mut pair, _) = twin.start(&[]);
            twin.feed(&mut pair, &vec![1; n]);
            pairs.push(pair);
        }
        let step = Step::new(setup);
        let (mut graph, mut key_of_graph) = (None, 0);
        for i in 0..60 {
            plan(&twin, &pairs, &[1; 3]);
            let graph_key = graph_key(&twin);
            let mut data = step.fill(&mut twin);
            if graph.is_none() {
                step.run(&twin);
                let before = allocations();
                step.run(&twin);
                assert_eq!(allocations(), before);
                graph = Some(stream.capture(|| step.run(&twin)));
                key_of_graph = graph_key;
            } else {
                ok(kvmgr_attention_graph_launched(twin.device.attention));
            }
            assert_eq!(graph_key, key_of_graph, "step {i}");
            if let Some(graph) = &graph {
                stream.launch(graph);
            }
            stream.wait();
            step.compare(&mut twin, &mut data);
            pairs.iter_mut().for_each(|pair| twin.commit(pair, &[1]));
        }
    });
}
