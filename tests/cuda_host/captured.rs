//! What happens to sequences while the engine captures a graph: nothing that the graph would do again, or
//! that a driver forbids then.

use std::ptr;

use kvmgr::ffi::attention::*;
use kvmgr::ffi::cache::*;
use kvmgr::ffi::sequence::*;
use kvmgr::ffi::types::*;

use crate::driver::{Context, Stream, num_failures, on_device};
use crate::twin::{PLAIN, Setup, Twin, message, ok};

/// Queries are noted for the prompt alone.
const SNAPKV: Setup = Setup { spec: "snapkv(w=4) | keep(0.5)", lanes: KVMGR_LANE_HEAD, ..PLAIN };

/// The memory of noted queries goes with the first step, and with its sequence.
#[test]
fn memory_of_queries_goes_in_a_capture() {
    on_device("captured::memory_of_queries_goes_in_a_capture", || {
        let _context = Context::new();
        let stream = Stream::new();
        let mut twin = Twin::new(SNAPKV, 1, |_| {});
        ok(kvmgr_cache_set_stream(twin.device.cache, stream.pointer()));
        let (mut pair, _) = twin.start(&[]);
        let (mut other, _) = twin.start(&[]);
        twin.step(&mut [&mut pair, &mut other], &[(vec![1; 40], 40), (vec![2; 30], 30)]);
        twin.end_prefill(&pair);
        twin.append(&pair, 1);
        let before = num_failures();
        _ = stream.capture(|| {
            twin.commit(&mut pair, &[1]);
            drop(other);
        });
        assert_eq!(num_failures(), before);
        // Others get the memory, with nothing in it that counts.
        for len in [20, 3] {
            let (mut next, _) = twin.start(&[]);
            twin.step(&mut [&mut next, &mut pair], &[(vec![3; len], len), (vec![1], 1)]);
            twin.end_prefill(&next);
            twin.positions(&next);
        }
        ok(kvmgr_cache_set_stream(twin.device.cache, ptr::null_mut()));
    });
}

/// So does the memory of what rows receive.
#[test]
fn memory_of_sums_goes_in_a_capture() {
    on_device("captured::memory_of_sums_goes_in_a_capture", || {
        let _context = Context::new();
        let stream = Stream::new();
        let setup = Setup { spec: "h2o(recent=8) | keep(0.5)", ..SNAPKV };
        let mut twin = Twin::new(setup, 3, |_| {});
        ok(kvmgr_cache_set_stream(twin.device.cache, stream.pointer()));
        let (mut pair, _) = twin.start(&[]);
        let (mut other, _) = twin.start(&[]);
        twin.step(&mut [&mut pair, &mut other], &[(vec![1; 40], 40), (vec![2; 30], 30)]);
        twin.step(&mut [&mut pair], &[(vec![1; 5], 5)]);
        let before = num_failures();
        _ = stream.capture(|| drop(other));
        assert_eq!(num_failures(), before);
        let (mut next, _) = twin.start(&[]);
        twin.step(&mut [&mut next, &mut pair], &[(vec![3; 30], 30), (vec![1; 2], 2)]);
        for pair in [&next, &pair] {
            twin.end_prefill(pair);
            twin.positions(pair);
        }
        ok(kvmgr_cache_set_stream(twin.device.cache, ptr::null_mut()));
    });
}

/// Copies would be those of the graph.
#[test]
fn nothing_is_copied_in_a_capture() {
    on_device("captured::nothing_is_copied_in_a_capture", || {
        let _context = Context::new();
        let stream = Stream::new();
        let mut twin = Twin::new(SNAPKV, 2, |_| {});
        ok(kvmgr_cache_set_stream(twin.device.cache, stream.pointer()));
        let (mut pair, _) = twin.start(&[]);
        twin.step(&mut [&mut pair], &[(vec![1; 37], 37)]);
        let mut child = twin.fork(&pair);
        let before = (num_failures(), twin.device.stats().used_blocks);
        _ = stream.capture(|| {
            assert_eq!(kvmgr_sequence_reserve(child.device, 1), KVMGR_INVALID_STATE);
            assert!(message().contains("captured"), "{}", message());
            let mut grandchild = ptr::null_mut();
            // SAFETY: a live handle and a place for a pointer.
            let status = unsafe { kvmgr_sequence_fork(child.device, &raw mut grandchild) };
            assert_eq!(status, KVMGR_INVALID_STATE);
            assert!(message().contains("captured") && grandchild.is_null(), "{}", message());
        });
        assert_eq!((num_failures(), twin.device.stats().used_blocks), before);
        twin.step(&mut [&mut child, &mut pair], &[(vec![2; 9], 9), (vec![1; 2], 2)]);
        for pair in [&child, &pair] {
            twin.end_prefill(pair);
            twin.positions(pair);
        }
        ok(kvmgr_cache_set_stream(twin.device.cache, ptr::null_mut()));
    });
}

/// What is refused leaves the plan as it was.
#[test]
fn a_plan_stays_when_no_memory_is_taken_in_a_capture() {
    on_device("captured::a_plan_stays_when_no_memory_is_taken_in_a_capture", || {
        let _context = Context::new();
        let stream = Stream::new();
        let mut twin = Twin::new(PLAIN, 4, |_| {});
        ok(kvmgr_cache_set_stream(twin.device.cache, stream.pointer()));
        let (mut pair, _) = twin.start(&[]);
        twin.feed(&mut pair, &[1; 20]);
        pair.both().into_iter().for_each(|sequence| ok(kvmgr_sequence_reserve(sequence, 1)));
        twin.host.plan(&[pair.host], &[1]);
        twin.device.plan(&[pair.device], &[1]);
        _ = stream.capture(|| {
            let status = kvmgr_attention_reserve(twin.device.attention, 4, 4, 40);
            assert_eq!(status, KVMGR_INVALID_STATE);
            assert!(message().contains("captured"), "{}", message());
        });
        (0..2).for_each(|layer| twin.layer(layer, 1));
        twin.commit(&mut pair, &[1]);
        ok(kvmgr_cache_set_stream(twin.device.cache, ptr::null_mut()));
    });
}
