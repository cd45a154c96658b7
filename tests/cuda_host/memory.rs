//! Device memory that runs out in the middle of a call: it says so, and can be made again.

use std::ptr;

use kvmgr::ffi::attention::*;
use kvmgr::ffi::cache::*;
use kvmgr::ffi::sequence::*;
use kvmgr::ffi::types::*;

use crate::driver::{Buffer, Context, is_mock, on_device, refuse_allocations};
use crate::twin::{PLAIN, Pair, Setup, Twin, message, ok};

/// Calls `body` again and again, each time with memory for one piece more, until there is enough. Answers how
/// often there was not.
fn run_out(mut body: impl FnMut(u32) -> bool) -> u32 {
    (0..).find(|pieces| body(*pieces)).unwrap()
}

/// Calls `call` with memory for so many pieces; whether that was enough.
#[track_caller]
fn is_enough(pieces: u32, call: impl FnOnce() -> kvmgr_status) -> bool {
    refuse_allocations(pieces, u32::MAX);
    let status = call();
    let taken = refuse_allocations(0, 0);
    if taken <= pieces {
        ok(status);
        return true;
    }
    assert_eq!(status, KVMGR_OUT_OF_MEMORY, "{}", message());
    assert!(message().contains("no memory left"), "{}", message());
    false
}

/// Appends two rows to the device alone.
fn try_append(twin: &Twin) -> kvmgr_status {
    let buffer = Buffer::new(1 << 12);
    let rows = twin.setup.tensor(buffer.pointer(), 2, twin.setup.kv_heads, true);
    let (attention, rows) = (twin.device.attention, &raw const rows);
    // SAFETY: a live handle and tensors of this size.
    unsafe { kvmgr_attention_append(attention, 0, rows, rows, 0, 1) }
}

/// A plan that takes all its memory at once.
fn plan_fresh(setup: Setup, pieces: u32) -> bool {
    let mut twin = Twin::new(setup, 6, |_| {});
    let mut pairs: Vec<Pair> = Vec::new();
    for n in [250, 40] {
        let (mut pair, _) = twin.start(&[]);
        twin.feed(&mut pair, &vec![1; n]);
        pairs.push(pair);
    }
    twin.device.renew_attention();
    for pair in &pairs {
        pair.both().into_iter().for_each(|sequence| ok(kvmgr_sequence_reserve(sequence, 1)));
    }
    let list: Vec<_> = pairs.iter().map(|pair| pair.host).collect();
    twin.host.plan(&list, &[1; 2]);
    let is_enough = is_enough(pieces, || twin.try_plan(&pairs));
    if !is_enough {
        let mut key = 0;
        // SAFETY: a live handle and a place for a number.
        ok(unsafe { kvmgr_attention_graph_key(twin.device.attention, &raw mut key) });
        // What cannot be planned is not run.
        assert_eq!(try_append(&twin), KVMGR_INVALID_ARGUMENT, "{}", message());
        ok(twin.try_plan(&pairs));
    }
    (0..setup.layers).for_each(|layer| twin.layer(layer, 2));
    pairs.iter_mut().for_each(|pair| twin.commit(pair, &[1]));
    for _ in 0..2 {
        let mut batch: Vec<&mut Pair> = pairs.iter_mut().collect();
        twin.step(&mut batch, &vec![(vec![1], 1); 2]);
    }
    pairs.iter().for_each(|pair| twin.end_prefill(pair));
    pairs.iter().for_each(|pair| _ = twin.positions(pair));
    is_enough
}

#[test]
fn a_plan_without_memory_can_be_made_again() {
    on_device("memory::a_plan_without_memory_can_be_made_again", || {
        if !is_mock() {
            return;
        }
        let _context = Context::new();
        for (spec, least) in [
            ("full", 3),
            ("quest(tokens=32, dense=0)", 6),
            ("snapkv(w=8) | keep(0.5)", 3),
            ("h2o(recent=8) | keep(0.5)", 6),
        ] {
            let setup = Setup { spec, lanes: KVMGR_LANE_HEAD, blocks: 800, ..PLAIN };
            let failures = run_out(|pieces| plan_fresh(setup, pieces));
            assert!(failures >= least, "{spec}: {failures}");
        }
    });
}

/// The first sequence that chooses takes memory for bounds.
#[test]
fn a_sequence_without_memory_can_be_made_again() {
    on_device("memory::a_sequence_without_memory_can_be_made_again", || {
        if !is_mock() {
            return;
        }
        let _context = Context::new();
        let setup = Setup { spec: "quest(tokens=32, dense=0)", ..PLAIN };
        let failures = run_out(|pieces| {
            let mut twin = Twin::new(setup, 6, |_| {});
            let mut sequence = ptr::null_mut();
            let is_enough = is_enough(pieces, || {
                // SAFETY: a live handle and a place for a pointer.
                unsafe {
                    kvmgr_cache_sequence_create(twin.device.cache, ptr::null(), &raw mut sequence)
                }
            });
            assert_eq!(sequence.is_null(), !is_enough);
            kvmgr_sequence_destroy(sequence);
            let (mut pair, _) = twin.start(&[]);
            twin.feed(&mut pair, &[1; 100]);
            twin.step(&mut [&mut pair], &[(vec![1], 1)]);
            is_enough
        });
        assert_eq!(failures, 1);
    });
}
