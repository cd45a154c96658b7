//! Policies keep the same tokens on a device as in host memory, and attention goes on over these.

use std::ptr;

use kvmgr::ffi::attention::*;
use kvmgr::ffi::cache::*;
use kvmgr::ffi::sequence::*;
use kvmgr::ffi::types::*;

use crate::driver::{Buffer, Context, Stream, on_device};
use crate::twin::{PLAIN, Pair, Setup, Twin, message, ok};

/// A prompt in two pieces, decode steps with a draft, a fork, another piece of a prompt, what is left after
/// a truncation, and another sequence of the same prompt.
fn live(setup: Setup, len: usize, seed: u64, slack: f64) {
    live_with_draft(setup, len, seed, slack, (4, 2));
}

/// The same with a draft of so many tokens, of which some are real.
fn live_with_draft(setup: Setup, len: usize, seed: u64, slack: f64, draft: (usize, usize)) {
    let mut twin = Twin::new(setup, seed, |_| {});
    twin.slack = slack;
    twin.asks_lse = setup.dim == 64;
    let (mut pair, _) = twin.start(&[]);
    for n in [len / 3, len - len / 3] {
        twin.step(&mut [&mut pair], &[(vec![1; n], n)]);
    }
    let before: usize = twin.positions(&pair).iter().map(Vec::len).sum();
    twin.end_prefill(&pair);
    let after: usize = twin.positions(&pair).iter().map(Vec::len).sum();
    assert!(after < before, "{}: {after} of {before} stay", setup.spec);
    let mut child = twin.fork(&pair);
    for (n, keep) in [(1, 1), draft, (1, 1), (1, 1)] {
        twin.step(&mut [&mut pair, &mut child], &[(vec![2; n], keep), (vec![3; 1], 1)]);
        twin.positions(&pair);
        twin.positions(&child);
    }
    twin.step(&mut [&mut pair], &[(vec![1; 30], 30)]);
    twin.end_prefill(&pair);
    twin.positions(&pair);
    let n = pair.tokens.len() - 3;
    twin.truncate(&mut pair, n);
    for _ in 0..3 {
        twin.step(&mut [&mut pair, &mut child], &[(vec![2; 2], 2), (vec![3; 1], 1)]);
        twin.positions(&pair);
    }
    let (mut other, matched) = twin.start(&vec![1; len - 1]);
    assert_eq!(matched > 0, setup.has_prefix);
    let rest = len - matched;
    twin.step(&mut [&mut other], &[(vec![1; rest], rest)]);
    twin.end_prefill(&other);
    assert!(twin.positions(&other)[0].len() < len);
    eprintln!("{setup:?}: errors {:?}", twin.worst);
}

/// A setup for a spec, with lanes that are fine enough for any.
fn setup_for(spec: &'static str, i: usize) -> Setup {
    Setup {
        spec,
        dim: [64, 128][i % 2],
        block: [16, 32][i / 2 % 2],
        lanes: KVMGR_LANE_HEAD,
        dtype: [KVMGR_DTYPE_F16, KVMGR_DTYPE_BF16][i % 2],
        has_prefix: i.is_multiple_of(3),
        ..PLAIN
    }
}

#[test]
fn policies_keep_the_same_tokens() {
    on_device("policies::policies_keep_the_same_tokens", || {
        let _context = Context::new();
        let specs = [
            "random(seed=1) | keep(0.5)",
            "stream(sink=4, recent=24)",
            "knorm | keep(0.5)",
            "every(2) | keydiff | keep_tokens(40)",
            "lagkv(lag=16) | keep(0.5)",
            "cur | keep(0.5)",
            "knorm | adakv | keep(0.4)",
            "every(1) | random(seed=2) | keep_tokens(50)",
            "prefill: knorm | global | keep(0.6); decode: stream(sink=2, recent=30)",
        ];
        for (i, spec) in specs.into_iter().enumerate() {
            live(setup_for(spec, i), 90, i as u64 + 1, 1.0);
        }
        // Lanes with the rows of several heads and layers.
        for (i, lanes) in [KVMGR_LANE_SEQUENCE, KVMGR_LANE_LAYER].into_iter().enumerate() {
            let setup = Setup { lanes, ..setup_for("stream(sink=4, recent=30)", i) };
            live(setup, 100, 20 + i as u64, 1.0);
        }
    });
}

/// Policies that ask for the last queries, which a kernel notes.
#[test]
fn policies_see_the_same_queries() {
    on_device("policies::policies_see_the_same_queries", || {
        let _context = Context::new();
        let specs = [
            "snapkv(w=16) | keep(0.5)",
            "snapkv(w=8, kernel=3, pool=max, agg=max) | adakv(0.2) | keep(0.4)",
            "every(2) | snapkv(w=4) | keep_tokens(50)",
            "prefill: snapkv(w=70) | keep(0.9); decode: every(1) | tova | keep_tokens(60)",
            "cake(w=12) | keep(0.5)",
            "finch(w=10) | keep(0.5)",
            "keyformer | keep(0.5)",
        ];
        for (i, spec) in specs.into_iter().enumerate() {
            let scale = [0.0, 0.2][i % 2];
            live(Setup { scale, ..setup_for(spec, i) }, 90, i as u64 + 1, 1.0);
        }
        // Both seal before the policy, or both after it.
        for (spec, has_prefix) in [
            ("snapkv(w=16) | keep(0.6) | quant(had+int4)", true),
            ("snapkv(w=16) | keep(0.6) | quant(kivi(bits=4, group=128))", false),
        ] {
            let setup = Setup { block: 64, has_prefix, ..setup_for(spec, 1) };
            live(setup, 250, 3, 1.0);
        }
    });
}

/// A sequence that is emptied reads another prompt, here token by token.
#[test]
fn a_prompt_of_single_tokens_is_seen_too() {
    on_device("policies::a_prompt_of_single_tokens_is_seen_too", || {
        let _context = Context::new();
        let mut twin = Twin::new(setup_for("snapkv(w=4) | keep(0.5)", 0), 1, |_| {});
        let (mut pair, _) = twin.start(&[]);
        for _ in 0..2 {
            (0..12).for_each(|_| twin.step(&mut [&mut pair], &[(vec![1], 1)]));
            twin.end_prefill(&pair);
            assert_eq!(twin.positions(&pair)[0].len(), 6);
            twin.step(&mut [&mut pair], &[(vec![1], 1)]);
            twin.truncate(&mut pair, 0);
        }
    });
}

/// Of a long piece the last queries are noted alone: before them the ring has those of an earlier text, or none.
#[test]
fn queries_of_another_text_are_not_taken() {
    on_device("policies::queries_of_another_text_are_not_taken", || {
        let _context = Context::new();
        let mut twin = Twin::new(setup_for("snapkv(w=16) | keep(0.5)", 0), 5, |_| {});
        let (mut pair, _) = twin.start(&[]);
        twin.step(&mut [&mut pair], &[(vec![1; 150], 150)]);
        twin.truncate(&mut pair, 100);
        twin.step(&mut [&mut pair], &[(vec![2; 100], 100)]);
        twin.truncate(&mut pair, 150);
        twin.step(&mut [&mut pair], &[(vec![3; 5], 5)]);
        // What is taken back has noted nothing that counts.
        twin.step(&mut [&mut pair], &[(vec![3; 100], 0)]);
        twin.end_prefill(&pair);
        assert!(twin.positions(&pair)[0].len() < 155);
    });
}

/// Nor before what the prefix index has: these tokens are not attended.
#[test]
fn queries_of_another_text_are_not_taken_for_those_of_a_prefix() {
    on_device("policies::queries_of_another_text_are_not_taken_for_those_of_a_prefix", || {
        let _context = Context::new();
        let mut twin = Twin::new(setup_for("snapkv(w=16) | keep(0.5)", 0), 5, |_| {});
        let prompt: Vec<i32> = (0..100).collect();
        let (mut other, _) = twin.start(&prompt);
        twin.feed(&mut other, &prompt);
        let (mut pair, _) = twin.start(&[]);
        twin.step(&mut [&mut pair], &[(vec![1; 110], 110)]);
        twin.truncate(&mut pair, 0);
        twin.match_prefix(&mut pair, &prompt);
        assert_eq!(pair.tokens.len(), 96);
        twin.step(&mut [&mut pair], &[(prompt[96..].to_vec(), 4)]);
        twin.end_prefill(&pair);
        assert_eq!(twin.positions(&pair)[0].len(), 50);
    });
}

/// Policies that ask for what queries give each row, which a kernel adds up. On a device those of a rejected
/// draft count, so here all are real.
#[test]
fn policies_see_the_same_sums() {
    on_device("policies::policies_see_the_same_sums", || {
        let _context = Context::new();
        let specs = [
            "h2o(recent=16) | keep(0.5)",
            "h2o(recent=8, heavy=30)",
            "every(2) | h2o(recent=8) | keep_tokens(40)",
            "observed | keep(0.6)",
            "fastgen(mass=0.5, sink=2, recent=0.2, heavy=0.3)",
        ];
        for (i, spec) in specs.into_iter().enumerate() {
            let (scale, softcap) = ([0.0, 0.2][i % 2], [0.0, 20.0][i / 2 % 2]);
            let setup = Setup { scale, softcap, has_sinks: i == 1, ..setup_for(spec, i) };
            live_with_draft(setup, 90, i as u64 + 1, 1.0, (4, 4));
        }
    });
}

/// Blocks in few bits: encoded after the policy has chosen, or before it where prefixes are shared.
#[test]
fn policies_keep_the_same_tokens_of_quantized_blocks() {
    on_device("policies::policies_keep_the_same_tokens_of_quantized_blocks", || {
        let _context = Context::new();
        let specs = [
            ("knorm | keep(0.6) | quant(int8)", true),
            ("random(seed=3) | keep(0.7) | quant(int4)", true),
            ("random(seed=3) | keep(0.7) | quant(had+int4)", false),
            ("keydiff | keep(0.6) | quant(kivi(bits=4, group=128))", false),
            ("keydiff | keep(0.6) | quant(kivi(bits=2, group=128))", true),
            ("every(2) | random(seed=4) | keep_tokens(140) | quant(had+int8)", true),
            ("every(1) | stream(sink=4, recent=130) | quant(fp8(e4m3))", false),
            ("knorm | keep(0.7) | quant(k=int8, v=int4, first=4, residual=70)", true),
            ("every(2) | random(seed=5) | keep_tokens(150) | quant(int8, residual=40)", true),
        ];
        for (i, (spec, has_prefix)) in specs.into_iter().enumerate() {
            let setup = Setup { block: 64, has_prefix, ..setup_for(spec, i) };
            // A host seals rows that can be moved one by one at once, a device after the policy has run.
            let waits = !has_prefix && !spec.contains("kivi");
            live(setup, 250, i as u64 + 1, if waits { 30.0 } else { 1.0 });
        }
    });
}

/// Rows count as positions in a window, so it may miss none; the window of odd layers is 20.
#[test]
fn windows_with_missing_tokens_are_refused() {
    on_device("policies::windows_with_missing_tokens_are_refused", || {
        let _context = Context::new();
        let window = Setup { window: 20, ..PLAIN };
        live(Setup { spec: "stream(sink=4, recent=60)", ..window }, 100, 1, 1.0);
        let setup = Setup { spec: "random(seed=1) | keep(0.5)", lanes: KVMGR_LANE_HEAD, ..window };
        let mut twin = Twin::new(setup, 2, |_| {});
        let (mut pair, _) = twin.start(&[]);
        twin.step(&mut [&mut pair], &[(vec![1; 60], 60)]);
        twin.end_prefill(&pair);
        assert_eq!(step(&twin, &pair, 0), KVMGR_OK, "{}", message());
        assert_eq!(step(&twin, &pair, 1), KVMGR_UNSUPPORTED);
        assert!(message().contains("sliding_window is 20"), "{}", message());
    });
}

/// Runs a layer of a decode step on the device alone.
fn step(twin: &Twin, pair: &Pair, layer: usize) -> kvmgr_status {
    let setup = twin.setup;
    let heads = setup.kv_heads * setup.group;
    if layer == 0 {
        ok(kvmgr_sequence_reserve(pair.device, 1));
        twin.device.plan(&[pair.device], &[1]);
    }
    let rows = Buffer::of(&vec![0u16; heads * setup.dim]);
    let kv = setup.tensor(rows.pointer(), 1, setup.kv_heads, true);
    let q = setup.tensor(rows.pointer(), 1, heads, true);
    let (out, options) = (Buffer::new(rows.bytes), twin.options(layer, ptr::null_mut()));
    let o = setup.tensor(out.pointer(), 1, heads, true);
    let (attention, layer) = (twin.device.attention, layer as u32);
    let (kv, q, o) = (&raw const kv, &raw const q, &raw const o);
    // SAFETY: live handles and tensors that fit the plan.
    let status = unsafe {
        ok(kvmgr_attention_append(attention, layer, kv, kv, 0, 1));
        kvmgr_attention_run(attention, layer, q, o, ptr::null(), &raw const options, 0, 1)
    };
    // The device has read the rows before they go.
    out.read::<u16>();
    status
}

/// Policies wait for the stream, which nobody can do while it is captured; nothing has changed then.
#[test]
fn policies_do_not_run_in_a_capture() {
    on_device("policies::policies_do_not_run_in_a_capture", || {
        let _context = Context::new();
        let setup = Setup { spec: "stream(sink=4, recent=20)", ..PLAIN };
        let mut twin = Twin::new(setup, 3, |_| {});
        let (mut pair, _) = twin.start(&[]);
        twin.step(&mut [&mut pair], &[(vec![1; 60], 60)]);
        let stream = Stream::new();
        ok(kvmgr_cache_set_stream(twin.device.cache, stream.pointer()));
        _ = stream.capture(|| {
            assert_eq!(kvmgr_sequence_end_prefill(pair.device), KVMGR_INVALID_STATE);
            assert!(message().contains("captured"), "{}", message());
        });
        twin.end_prefill(&pair);
        assert_eq!(twin.positions(&pair)[0].len(), 24);
        ok(kvmgr_sequence_reserve(pair.device, 1));
        _ = stream.capture(|| {
            // SAFETY: a live handle and no token.
            let status = unsafe { kvmgr_sequence_commit(pair.device, ptr::null(), 0) };
            assert_eq!(status, KVMGR_OK, "no token is no step: {}", message());
        });
        ok(kvmgr_cache_set_stream(twin.device.cache, ptr::null_mut()));
        twin.step(&mut [&mut pair], &[(vec![1], 1)]);
        assert_eq!(twin.positions(&pair)[0].len(), 24);
    });
}
