//! Scores of the engine's own, through the C ABI.

#![expect(unsafe_code, clippy::borrow_as_ptr, reason = "calls the C ABI as C does")]

use std::ffi::{CStr, CString, c_void};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvmgr::ffi::cache::*;
use kvmgr::ffi::policy::*;
use kvmgr::ffi::score::*;
use kvmgr::ffi::sequence::*;
use kvmgr::ffi::types::*;
use kvmgr::ffi::version::*;

/// What the engine's score counts.
#[derive(Default)]
struct Counts {
    calls: AtomicUsize,
    destroyed: AtomicUsize,
}

fn message() -> String {
    // SAFETY: the library's buffer ends in NUL.
    unsafe { CStr::from_ptr(kvmgr_last_error_message()) }.to_string_lossy().into_owned()
}

/// Later tokens score higher; the first is protected. Head 1 of layer 1 fails.
unsafe extern "C" fn newest(
    user_data: *mut c_void,
    input: *const kvmgr_policy_input,
    scores: *mut f32,
    protected: *mut u8,
) -> kvmgr_status {
    // SAFETY: the library passes what it documents.
    unsafe {
        let counts = &*user_data.cast::<Counts>();
        counts.calls.fetch_add(1, Ordering::Relaxed);
        let input = &*input;
        assert_eq!((input.num_kv_heads, input.num_q_heads, input.head_dim), (1, 2, 4));
        assert!(!input.keys.is_null() && input.kv_head < 2 && input.num_layers == 2);
        for i in 0..input.num_tokens as usize {
            *scores.add(i) = *input.positions.add(i) as f32;
        }
        *protected = 1;
        if input.num_tokens == 99 { KVMGR_INVALID_STATE } else { KVMGR_OK }
    }
}

unsafe extern "C" fn destroy(user_data: *mut c_void) {
    // SAFETY: the library passes the engine's pointer.
    unsafe { &*user_data.cast::<Counts>() }.destroyed.fetch_add(1, Ordering::Relaxed);
}

fn ops() -> kvmgr_score_ops {
    kvmgr_score_ops {
        struct_size: size_of::<kvmgr_score_ops>(),
        needs: KVMGR_NEEDS_KEYS,
        query_window: 0,
        flags: KVMGR_SCORE_EACH_STEP,
        reserved: 0,
        score: Some(newest),
        destroy: Some(destroy),
    }
}

fn register(name: &str, counts: &Counts, ops: &kvmgr_score_ops) -> kvmgr_status {
    let name = CString::new(name).expect("no NUL");
    let data = ptr::from_ref(counts).cast_mut().cast();
    // SAFETY: a string, a pointer for the callbacks and a struct.
    unsafe { kvmgr_policy_register_score(name.as_ptr(), data, ops) }
}

/// A sequence of `tokens` equal rows under `spec`; answers the positions of the last head.
fn run(spec: &CStr, tokens: usize, steps: usize) -> Result<Vec<i32>, kvmgr_status> {
    // SAFETY: every struct has its size, every tensor its rows.
    unsafe {
        let mut config: kvmgr_cache_config = std::mem::zeroed();
        config.struct_size = size_of::<kvmgr_cache_config>();
        (config.num_layers, config.num_q_heads, config.num_kv_heads) = (2, 4, 2);
        (config.head_dim, config.num_blocks, config.spec) = (4, 64, spec.as_ptr());
        let (mut cache, mut sequence) = (ptr::null_mut(), ptr::null_mut());
        assert_eq!(kvmgr_cache_create(&config, &raw mut cache), KVMGR_OK, "{}", message());
        let status = kvmgr_cache_sequence_create(cache, ptr::null(), &raw mut sequence);
        assert_eq!(status, KVMGR_OK, "{}", message());
        let feed = |n: usize| {
            assert_eq!(kvmgr_sequence_reserve(sequence, n), KVMGR_OK);
            let mut rows = vec![1.0f32; n * 8];
            let mut tensor: kvmgr_tensor = std::mem::zeroed();
            (tensor.data, tensor.ndim) = (rows.as_mut_ptr().cast(), 3);
            (tensor.dtype, tensor.shape) = (KVMGR_DTYPE_F32, [n as i64, 2, 4, 0]);
            for layer in 0..2 {
                assert_eq!(kvmgr_sequence_append(sequence, layer, &tensor, &tensor), KVMGR_OK);
            }
            kvmgr_sequence_commit(sequence, ptr::null(), n)
        };
        assert_eq!(feed(tokens), KVMGR_OK);
        let mut status = kvmgr_sequence_end_prefill(sequence);
        for _ in 0..steps {
            status = if status == KVMGR_OK { feed(1) } else { status };
        }
        let mut positions = vec![0; 1000];
        let mut num = 0;
        let (out, capacity) = (positions.as_mut_ptr(), positions.len());
        let listed = kvmgr_sequence_positions(sequence, 1, 1, out, capacity, &raw mut num);
        assert_eq!(listed, KVMGR_OK);
        positions.truncate(num);
        kvmgr_sequence_destroy(sequence);
        kvmgr_cache_release(cache);
        if status == KVMGR_OK { Ok(positions) } else { Err(status) }
    }
}

#[test]
fn a_registered_score_is_a_stage_like_any_other() {
    let counts = Counts::default();
    assert_eq!(register("newest_first", &counts, &ops()), KVMGR_OK, "{}", message());
    for spec in [
        c"newest_first | keep_tokens(10)",
        c"newest_first | protect(1, 3) | adakv(1) | keep_tokens(10)",
        c"newest_first | agree | keep_tokens(10)",
    ] {
        let kept = run(spec, 40, 7).expect("it works");
        assert_eq!(kept, [0, 38, 39, 40, 41, 42, 43, 44, 45, 46], "{spec:?}");
    }
    let once = run(c"prefill_end | newest_first | keep(0.25)", 40, 2).expect("it works");
    assert_eq!(once, (0..1).chain(31..42).collect::<Vec<_>>());
    // Two layers of two heads, each time that the policy ran.
    assert_eq!(counts.calls.load(Ordering::Relaxed), 4 * (3 * 8 + 1));
    assert_eq!(run(c"newest_first | keep_tokens(10)", 99, 0), Err(KVMGR_INVALID_STATE));
    assert!(message().contains("the engine's score newest_first answered"), "{}", message());

    // Policies keep a score alive whose name is gone.
    let mut policy = ptr::null_mut();
    // SAFETY: strings and a place for a handle.
    unsafe {
        let spec = c"newest_first | keep(0.5)";
        assert_eq!(kvmgr_policy_create(spec.as_ptr(), &raw mut policy), KVMGR_OK);
        assert_eq!(kvmgr_policy_unregister_score(c"newest_first".as_ptr()), KVMGR_OK);
        assert_eq!(counts.destroyed.load(Ordering::Relaxed), 0);
        let mut other = ptr::null_mut();
        let status = kvmgr_policy_create(spec.as_ptr(), &raw mut other);
        assert_eq!((status, other), (KVMGR_INVALID_ARGUMENT, ptr::null_mut()));
        kvmgr_policy_release(policy);
        assert_eq!(counts.destroyed.load(Ordering::Relaxed), 1);
        let gone = kvmgr_policy_unregister_score(c"newest_first".as_ptr());
        assert_eq!(gone, KVMGR_NOT_FOUND);
    }
}

#[test]
fn bad_registrations_are_refused_and_destroy_nothing() {
    let counts = Counts::default();
    let refused = |name: &str, ops: kvmgr_score_ops, text: &str| {
        assert_ne!(register(name, &counts, &ops), KVMGR_OK);
        assert!(message().contains(text), "{}", message());
    };
    refused("snapkv", ops(), "a stage of the library");
    refused("keep", ops(), "a stage of the library");
    refused("prefill", ops(), "must be one word");
    refused("two words", ops(), "name: column");
    refused("call(1)", ops(), "must be one word");
    refused("", ops(), "name");
    refused("x1", kvmgr_score_ops { score: None, ..ops() }, "kvmgr_score_ops.score is NULL");
    refused("x1", kvmgr_score_ops { needs: KVMGR_NEEDS_ROPE, ..ops() }, "needs has bits 0x10");
    refused("x1", kvmgr_score_ops { query_window: 3, ..ops() }, "query_window is 3");
    refused("x1", kvmgr_score_ops { flags: 6, ..ops() }, "flags has unknown bits 0x6");
    refused("x1", kvmgr_score_ops { reserved: 1, ..ops() }, "reserved is 1");
    let queries = kvmgr_score_ops { needs: KVMGR_NEEDS_QUERY_WINDOW, ..ops() };
    refused("x1", queries, "query_window is 0, must be in 1..=4096");
    assert_eq!(register("x1", &counts, &ops()), KVMGR_OK);
    refused("x1", ops(), "registered already");
    assert_eq!(counts.destroyed.load(Ordering::Relaxed), 0);
    // SAFETY: a string.
    assert_eq!(unsafe { kvmgr_policy_unregister_score(c"x1".as_ptr()) }, KVMGR_OK);
    assert_eq!(counts.destroyed.load(Ordering::Relaxed), 1);
}
