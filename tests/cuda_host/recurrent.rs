//! States of recurrent layers in device memory: the addresses are the device's, and what the library does
//! to a state is queued on the stream.

use std::ptr;

use cudarc::driver::sys;
use kvmgr::ffi::attention::*;
use kvmgr::ffi::cache::*;
use kvmgr::ffi::recurrent::*;
use kvmgr::ffi::sequence::*;
use kvmgr::ffi::store::*;
use kvmgr::ffi::types::*;

use crate::driver::{Buffer, Context, Stream, check, on_device};
use crate::twin::{Engine, PLAIN, Setup, message, ok};

const SMALL: Setup = Setup { layers: 1, kv_heads: 1, group: 1, ..PLAIN };
const BYTES: usize = 1000;

fn address(sequence: *mut kvmgr_sequence, layer: u32) -> u64 {
    let (mut state, mut bytes) = (ptr::null_mut(), 0);
    // SAFETY: a live handle and places.
    ok(unsafe { kvmgr_sequence_recurrent_state(sequence, layer, &raw mut state, &raw mut bytes) });
    assert_eq!((state.addr() % 64, bytes), (0, BYTES));
    state.addr() as u64
}

/// Fills the state of each layer, after what is queued.
fn write(sequence: *mut kvmgr_sequence, value: u8) {
    for layer in 0..2 {
        let bytes = [value + layer as u8; BYTES];
        // SAFETY: the state is that long.
        check(unsafe {
            sys::cuMemcpyHtoD_v2(address(sequence, layer), bytes.as_ptr().cast(), BYTES)
        });
    }
}

#[track_caller]
fn assert_state(sequence: *mut kvmgr_sequence, values: [u8; 2]) {
    for (layer, value) in values.into_iter().enumerate() {
        let mut bytes = [0xAA; BYTES];
        let from = address(sequence, layer as u32);
        // SAFETY: both are that long.
        unsafe {
            check(sys::cuCtxSynchronize());
            check(sys::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), from, BYTES));
        }
        assert_eq!(bytes, [value; BYTES]);
    }
}

/// Reserves tokens and writes their rows.
fn run(engine: &Engine, sequence: *mut kvmgr_sequence, n: usize) {
    ok(kvmgr_sequence_reserve(sequence, n));
    engine.plan(&[sequence], &[n as u32]);
    let rows = Buffer::of(&vec![0u16; n * SMALL.dim]);
    let tensor = SMALL.tensor(rows.pointer(), n, 1, true);
    let rows_of = &raw const tensor;
    // SAFETY: a live handle and tensors that fit the plan.
    ok(unsafe { kvmgr_attention_append(engine.attention, 0, rows_of, rows_of, 0, 1) });
    rows.read::<u16>();
}

fn commit(sequence: *mut kvmgr_sequence, tokens: &[i32]) -> kvmgr_status {
    // SAFETY: a live handle and a list of this length.
    unsafe { kvmgr_sequence_commit(sequence, tokens.as_ptr(), tokens.len()) }
}

fn engine(store: *mut kvmgr_store) -> Engine {
    Engine::new(SMALL.create(|config| {
        config.device_type = KVMGR_DEVICE_CUDA;
        (config.recurrent_layers, config.recurrent_bytes) = (2, BYTES as u64);
        (config.num_states, config.store) = (3, store);
    }))
}

#[test]
fn states_go_back_fork_and_are_shared() {
    on_device("recurrent::states_go_back_fork_and_are_shared", || {
        let _context = Context::new();
        let engine = engine(ptr::null_mut());
        let stream = Stream::new();
        let sequence = engine.sequence(ptr::null());
        assert_state(sequence, [0, 0]);
        let prompt: Vec<i32> = (0..17).collect();
        run(&engine, sequence, 16);
        write(sequence, 1);
        ok(commit(sequence, &prompt[..16]));
        ok(kvmgr_sequence_snapshot(sequence, 16));
        // Drafts that are not good.
        run(&engine, sequence, 3);
        write(sequence, 9);
        ok(commit(sequence, &[]));
        assert_state(sequence, [1, 2]);
        let mut child = ptr::null_mut();
        // SAFETY: a live handle and a place.
        ok(unsafe { kvmgr_sequence_fork(sequence, &raw mut child) });
        write(child, 5);
        assert_state(sequence, [1, 2]);
        assert_state(child, [5, 6]);
        ok(kvmgr_sequence_truncate(child, 0));
        assert_state(child, [0, 0]);
        kvmgr_sequence_destroy(child);

        let other = engine.sequence(ptr::null());
        let (tokens, mut matched) = (prompt.as_ptr(), 0);
        // SAFETY: a live handle, tokens and a place.
        ok(unsafe { kvmgr_sequence_match_prefix(other, tokens, 17, &raw mut matched) });
        assert_eq!(matched, 16);
        assert_state(other, [1, 2]);

        ok(kvmgr_cache_set_stream(engine.cache, stream.pointer()));
        _ = stream.capture(|| {
            assert_eq!(kvmgr_sequence_restore(other, 16), KVMGR_INVALID_STATE);
            assert!(message().contains("captured"), "{}", message());
            assert_eq!(kvmgr_sequence_restore(sequence, 16), KVMGR_INVALID_STATE);
        });
        ok(kvmgr_sequence_restore(other, 16));
        assert_state(other, [1, 2]);
        [sequence, other].into_iter().for_each(|sequence| kvmgr_sequence_destroy(sequence));
    });
}

#[test]
fn states_go_to_a_store_and_come_back() {
    on_device("recurrent::states_go_to_a_store_and_come_back", || {
        let _context = Context::new();
        let mut store = ptr::null_mut();
        // SAFETY: a string and a place.
        ok(unsafe { kvmgr_store_create(c"host".as_ptr(), &raw mut store) });
        let engine = engine(store);
        let sequence = engine.sequence(ptr::null());
        let prompt: Vec<i32> = (0..17).collect();
        run(&engine, sequence, 16);
        write(sequence, 3);
        ok(commit(sequence, &prompt[..16]));
        ok(kvmgr_sequence_snapshot(sequence, 16));
        ok(kvmgr_sequence_preempt(sequence, store));
        ok(kvmgr_sequence_resume(sequence));
        assert_state(sequence, [3, 4]);
        ok(kvmgr_sequence_preempt(sequence, store));
        // All states are needed: the one of the prefix goes to the store and comes back from there.
        let others = [
            engine.sequence(ptr::null()),
            engine.sequence(ptr::null()),
            engine.sequence(ptr::null()),
        ];
        assert_eq!(kvmgr_sequence_resume(sequence), KVMGR_OUT_OF_BLOCKS);
        others.into_iter().for_each(|other| kvmgr_sequence_destroy(other));
        let other = engine.sequence(ptr::null());
        let (tokens, mut matched) = (prompt.as_ptr(), 0);
        // SAFETY: a live handle, tokens and a place.
        ok(unsafe { kvmgr_sequence_match_prefix(other, tokens, 17, &raw mut matched) });
        assert_eq!(matched, 16);
        assert_state(other, [3, 4]);
        [sequence, other].into_iter().for_each(|sequence| kvmgr_sequence_destroy(sequence));
        drop(engine);
        kvmgr_store_release(store);
    });
}
