//! Lists of blocks: the same heads read the same rows on both.

use std::ptr;

use kvmgr::ffi::attention::*;
use kvmgr::ffi::cache::*;
use kvmgr::ffi::sequence::*;
use kvmgr::ffi::types::*;

use crate::common::Random;
use crate::driver::{Buffer, Context, Stream, is_mock, on_device};
use crate::step::{Step, graph_key};
use crate::twin::{Engine, PLAIN, Pair, Setup, Twin, message, ok};

/// Lists for each sequence and KV head.
type Lists = Vec<Vec<u32>>;

pub fn try_select(engine: &Engine, layer: usize, lists: &[Vec<u32>]) -> kvmgr_status {
    let mut starts = vec![0];
    let mut end = 0;
    for list in lists {
        end += list.len() as u32;
        starts.push(end);
    }
    let blocks = lists.concat();
    let (attention, layer) = (engine.attention, layer as u32);
    // SAFETY: a live handle and lists of these lengths.
    unsafe {
        let (starts, num_starts) = (starts.as_ptr(), starts.len());
        kvmgr_attention_select(attention, layer, starts, num_starts, blocks.as_ptr(), blocks.len())
    }
}

/// Both refuse the lists for the same reason, which is answered.
#[track_caller]
fn refused(twin: &Twin, layer: usize, lists: &[Vec<u32>]) -> String {
    let [host, device] = [&twin.host, &twin.device].map(|engine| {
        assert_eq!(try_select(engine, layer, lists), KVMGR_INVALID_ARGUMENT, "{}", message());
        message()
    });
    assert_eq!(host, device);
    host
}

/// The blocks of a head's lane, as the refusal of one too many says.
fn num_blocks(twin: &Twin, layer: usize, head: usize, num_heads: usize) -> u32 {
    let mut lists = vec![Vec::new(); num_heads];
    lists[head].push(1 << 30);
    let text = refused(twin, layer, &lists);
    let (_, text) = text.split_once("the lane has ").unwrap();
    text.split_once(' ').unwrap().0.parse().unwrap()
}

fn any_lists(twin: &Twin, layer: usize, num_heads: usize, random: &mut Random) -> Lists {
    let list = |head: usize| {
        let percent = random.pick(&[0, 10, 50, 90, 100]);
        let blocks = num_blocks(twin, layer, head, num_heads);
        (0..blocks).filter(|_| random.chance(percent)).collect()
    };
    (0..num_heads).map(list).collect()
}

fn select(twin: &Twin, layer: usize, lists: &[Vec<u32>]) {
    [&twin.host, &twin.device].iter().for_each(|engine| ok(try_select(engine, layer, lists)));
}

pub fn plan(twin: &Twin, pairs: &[Pair], counts: &[u32]) {
    for (pair, n) in pairs.iter().zip(counts) {
        let reserve = |sequence| ok(kvmgr_sequence_reserve(sequence, *n as usize));
        pair.both().into_iter().for_each(reserve);
    }
    twin.host.plan(&pairs.iter().map(|pair| pair.host).collect::<Vec<_>>(), counts);
    twin.device.plan(&pairs.iter().map(|pair| pair.device).collect::<Vec<_>>(), counts);
}

/// Sequences of these lengths, the second a fork of the first that has gone on.
fn start(twin: &mut Twin, lens: &[usize]) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for n in lens {
        let (mut pair, _) = twin.start(&[]);
        for piece in vec![1; *n].chunks(100) {
            twin.feed(&mut pair, piece);
        }
        twin.end_prefill(&pair);
        pairs.push(pair);
    }
    let mut fork = twin.fork(&pairs[0]);
    twin.feed(&mut fork, &[2; 7]);
    pairs.push(fork);
    pairs
}

/// Steps of some queries in which random layers read random blocks.
fn choose(setup: Setup, lens: &[usize], seed: u64) {
    let mut twin = Twin::new(setup, seed, |_| {});
    let mut random = Random(seed + 100);
    let mut pairs = start(&mut twin, lens);
    let num_heads = pairs.len() * setup.kv_heads;
    for step in 0..4 {
        let counts: Vec<u32> =
            pairs.iter().map(|_| random.pick(&[1, 1, 3, if step == 2 { 70 } else { 2 }])).collect();
        plan(&twin, &pairs, &counts);
        let total = counts.iter().sum::<u32>() as usize;
        for layer in 0..setup.layers {
            if random.chance(75) {
                select(&twin, layer, &any_lists(&twin, layer, num_heads, &mut random));
            }
        }
        for layer in 0..setup.layers {
            twin.layer(layer, total);
        }
        for (pair, n) in pairs.iter_mut().zip(&counts) {
            twin.commit(pair, &vec![1; *n as usize]);
        }
        let n = pairs[1].tokens.len();
        twin.truncate(&mut pairs[1], n - random.within(0, 3));
    }
    eprintln!("{setup:?}: errors {:?}", twin.worst);
}

#[test]
fn heads_read_what_is_selected() {
    on_device("selected::heads_read_what_is_selected", || {
        let _context = Context::new();
        let (bf16, plain) = (KVMGR_DTYPE_BF16, Setup { blocks: 2000, ..PLAIN });
        let setups = [
            plain,
            Setup { dtype: bf16, dim: 128, block: 32, group: 7, lanes: KVMGR_LANE_LAYER, ..plain },
            Setup { dim: 256, block: 64, group: 1, lanes: KVMGR_LANE_HEAD, ..plain },
            Setup { spec: "quant(int4)", block: 64, dtype: bf16, ..plain },
            Setup {
                spec: "quant(had+int8, first=64)",
                block: 64,
                group: 12,
                lanes: KVMGR_LANE_HEAD,
                ..plain
            },
            Setup { spec: "stream(sink=4) | keep_tokens(100)", softcap: 5.0, ..plain },
        ];
        for (i, setup) in setups.into_iter().enumerate() {
            choose(setup, if is_mock() { &[330, 40, 1] } else { &[9000, 40, 1] }, i as u64);
        }
    });
}

#[test]
fn a_new_plan_or_a_bad_list_brings_all_blocks_back() {
    on_device("selected::a_new_plan_or_a_bad_list_brings_all_blocks_back", || {
        let _context = Context::new();
        let mut twin = Twin::new(PLAIN, 4, |_| {});
        let pairs = start(&mut twin, &[100, 20]);
        plan(&twin, &pairs, &[1; 3]);
        let short = vec![vec![0]; 6];
        select(&twin, 0, &short);
        twin.layer(0, 3);
        // The other layer has all blocks.
        twin.layer(1, 3);
        let text = |lists: &[Vec<u32>]| refused(&twin, 0, lists);
        assert!(text(&short[..5]).contains("starts has 6 values, must have 6 + 1"));
        let mut bad = short.clone();
        bad[3] = vec![1, 1];
        assert!(text(&bad).contains("sequence 1, KV head 1: blocks[1] is 1 after 1"));
        // What is read now is everything: the host says so too.
        twin.layer(0, 3);
        select(&twin, 0, &short);
        let lists = [&twin.host, &twin.device].map(|engine| {
            let status = try_select(engine, PLAIN.layers, &short);
            (status, message())
        });
        assert_eq!(lists[0], lists[1], "there is no such layer");
        for pair in &pairs {
            pair.both().into_iter().for_each(|sequence| ok(kvmgr_sequence_truncate(sequence, 18)));
        }
        let stale = [&twin.host, &twin.device].map(|engine| try_select(engine, 0, &short));
        assert_eq!(stale, [KVMGR_INVALID_STATE; 2], "{}", message());
        plan(&twin, &pairs, &[1; 3]);
        (0..2).for_each(|layer| twin.layer(layer, 3));
    });
}

/// Row numbers do not tell distances where blocks between are not read.
#[test]
fn a_window_reaches_as_far_as_what_is_selected_has_no_gap() {
    on_device("selected::a_window_reaches_as_far_as_what_is_selected_has_no_gap", || {
        let _context = Context::new();
        for (window, fits) in [(20, true), (36, true), (37, false)] {
            let setup = Setup { window, layers: 2, ..PLAIN };
            let mut twin = Twin::new(setup, 4, |_| {});
            let mut pairs = start(&mut twin, &[98]);
            pairs.truncate(1);
            plan(&twin, &pairs, &[2]);
            // Rows 64 to 99 without a gap, which is 36; a window of the first query is one row short of it.
            select(&twin, 1, &[vec![0, 4, 5], vec![0, 1, 2, 3, 4, 5]]);
            twin.layer(0, 2);
            let rows = Buffer::of(&vec![0u16; 2 * 8 * setup.dim]);
            let out = Buffer::new(2 * 8 * setup.dim * 2);
            let kv = setup.tensor(rows.pointer(), 2, 2, true);
            let [q, o] = [&rows, &out].map(|buffer| setup.tensor(buffer.pointer(), 2, 8, true));
            let options = twin.options(1, ptr::null_mut());
            // SAFETY: live handles and tensors that fit the plan.
            let status = unsafe {
                let attention = twin.device.attention;
                ok(kvmgr_attention_append(attention, 1, &raw const kv, &raw const kv, 0, 1));
                let (q, o, lse) = (&raw const q, &raw const o, ptr::null());
                kvmgr_attention_run(attention, 1, q, o, lse, &raw const options, 0, 1)
            };
            let fits = fits && window < 36;
            assert_eq!(status == KVMGR_OK, fits, "{}", message());
            if !fits {
                assert_eq!(status, KVMGR_UNSUPPORTED);
                let text = format!("sliding_window is {window}, but blocks are not selected in it");
                assert!(message().contains(&text), "{}", message());
            }
        }
    });
}

/// A graph serves later lists, but not a plan whose other layers have them.
#[test]
fn a_graph_serves_later_lists() {
    on_device("selected::a_graph_serves_later_lists", || {
        let _context = Context::new();
        let stream = Stream::new();
        let setup = Setup { layers: 1, ..PLAIN };
        let mut twin = Twin::new(setup, 5, |_| {});
        ok(kvmgr_cache_set_stream(twin.device.cache, stream.pointer()));
        ok(kvmgr_attention_reserve(twin.device.attention, 3, 3, 40));
        let mut pairs = start(&mut twin, &[90, 150]);
        let step = Step::new(setup);
        let (mut graph, mut key_of_graph) = (None, 0);
        let mut random = Random(3);
        for _ in 0..if is_mock() { 3 } else { 60 } {
            plan(&twin, &pairs, &[1; 3]);
            let key_of_all = graph_key(&twin);
            let lists = any_lists(&twin, 0, 3 * setup.kv_heads, &mut random);
            select(&twin, 0, &lists);
            assert_ne!(graph_key(&twin), key_of_all);
            let mut data = step.fill(&mut twin);
            if graph.is_none() {
                key_of_graph = graph_key(&twin);
                graph = Some(stream.capture(|| {
                    step.run(&twin);
                    assert_eq!(try_select(&twin.device, 0, &lists), KVMGR_INVALID_STATE);
                    assert!(message().contains("select before or after that"), "{}", message());
                }));
                // The lists are gone; the same again, outside.
                ok(try_select(&twin.device, 0, &lists));
            } else {
                ok(kvmgr_attention_graph_launched(twin.device.attention));
            }
            assert_eq!(graph_key(&twin), key_of_graph);
            if let Some(graph) = &graph {
                stream.launch(graph);
            }
            stream.wait();
            step.compare(&mut twin, &mut data);
            pairs.iter_mut().for_each(|pair| twin.commit(pair, &[1]));
        }
    });
}

/// What rows receive is not known where blocks are left out: on a device the lists are refused, and the layer
/// reads everything, as is compared.
#[test]
fn lists_and_sums_of_rows_exclude_each_other() {
    on_device("selected::lists_and_sums_of_rows_exclude_each_other", || {
        let _context = Context::new();
        let setup = Setup { spec: "h2o(recent=8) | keep(0.5)", lanes: KVMGR_LANE_HEAD, ..PLAIN };
        let mut twin = Twin::new(setup, 4, |_| {});
        let (mut pair, _) = twin.start(&[]);
        twin.step(&mut [&mut pair], &[(vec![1; 50], 50)]);
        plan(&twin, std::slice::from_ref(&pair), &[1]);
        let lists = vec![vec![0]; setup.kv_heads];
        assert_eq!(try_select(&twin.device, 0, &lists), KVMGR_UNSUPPORTED);
        assert!(message().contains("what queries give each row"), "{}", message());
        (0..setup.layers).for_each(|layer| twin.layer(layer, 1));
        twin.commit(&mut pair, &[1]);
        twin.end_prefill(&pair);
        assert!(twin.positions(&pair)[0].len() < 51);
    });
}
