//! The handles that are useful alone, through the C ABI: quantizer, policy, store.

#![expect(unsafe_code, clippy::borrow_as_ptr, reason = "calls the C ABI as C does")]

mod common;

use std::ffi::CStr;
use std::ptr;

use common::Random;
use kvmgr::ffi::policy::*;
use kvmgr::ffi::quantizer::*;
use kvmgr::ffi::store::*;
use kvmgr::ffi::types::*;
use kvmgr::ffi::version::*;

const TOKENS: usize = 32;
const DIM: usize = 64;

fn message() -> String {
    // SAFETY: the library's buffer ends in NUL.
    unsafe { CStr::from_ptr(kvmgr_last_error_message()) }.to_string_lossy().into_owned()
}

#[test]
fn every_listed_quantizer_works_on_plain_buffers() {
    let mut random = Random(1);
    let rows = random.normals(TOKENS * DIM);
    let query = random.normals(DIM);
    assert!(kvmgr_quantizer_count() >= 6 && kvmgr_quantizer_name(1000).is_null());
    for spec in [c"f16", c"q8_0", c"q4_0", c"kivi4", c"had+q8_0"] {
        let mut quantizer = ptr::null_mut();
        // SAFETY: strings, places and buffers of the documented sizes.
        unsafe {
            let status = kvmgr_quantizer_create(spec.as_ptr(), KVMGR_SIDE_KEY, &raw mut quantizer);
            assert_eq!(status, KVMGR_OK, "{}", message());
            let (tokens, dim) = (TOKENS as u32, DIM as u32);
            let mut size = 0;
            assert_eq!(kvmgr_quantizer_bytes(quantizer, tokens, dim, &raw mut size), KVMGR_OK);
            let mut bytes = vec![0u8; size];
            let out = bytes.as_mut_ptr().cast();
            let status = kvmgr_quantizer_encode(quantizer, rows.as_ptr(), tokens, dim, out, size);
            assert_eq!(status, KVMGR_OK, "{}", message());
            let status =
                kvmgr_quantizer_encode(quantizer, rows.as_ptr(), tokens, dim, out, size + 1);
            assert_eq!(status, KVMGR_INVALID_ARGUMENT);
            assert!(message().contains("out_size"), "{}", message());

            let bytes = bytes.as_ptr().cast();
            let mut decoded = vec![0.0f32; rows.len()];
            let out = decoded.as_mut_ptr();
            let status = kvmgr_quantizer_decode(quantizer, bytes, size, tokens, dim, out);
            assert_eq!(status, KVMGR_OK, "{}", message());
            let mut scores = vec![f32::NAN; TOKENS];
            let (q, out) = (query.as_ptr(), scores.as_mut_ptr());
            let status = kvmgr_quantizer_dot(quantizer, bytes, size, tokens, dim, q, 1, out);
            assert_eq!(status, KVMGR_OK, "{}", message());
            let (mut sums, mut expected) = (vec![1.0f32; DIM], vec![1.0f32; DIM]);
            let (w, out) = (scores.as_ptr(), sums.as_mut_ptr());
            let status = kvmgr_quantizer_axpy(quantizer, bytes, size, tokens, dim, w, 1, out);
            assert_eq!(status, KVMGR_OK, "{}", message());
            for (row, score) in decoded.chunks_exact(DIM).zip(&scores) {
                let dot: f32 = row.iter().zip(&query).map(|(a, b)| a * b).sum();
                assert!((dot - score).abs() < 1e-3, "{spec:?}: {dot} {score}");
                expected.iter_mut().zip(row).for_each(|(sum, x)| *sum += score * x);
            }
            assert!(sums.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-2), "{spec:?}");
            let error = decoded.iter().zip(&rows).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error < 0.5, "{spec:?} is off by {error}");
        }
        kvmgr_quantizer_release(quantizer);
        assert!(kvmgr_quantizer_retain(quantizer).is_null());
    }
}

#[test]
fn a_policy_scores_and_selects_what_it_is_told() {
    let (mut policy, mut needs, mut window) = (ptr::null_mut(), 0, 0);
    // SAFETY: zeros are valid for the input; strings, places and buffers of the documented sizes.
    unsafe {
        let spec = c"h2o(recent=2) | keep_tokens(4)";
        assert_eq!(kvmgr_policy_create(spec.as_ptr(), &raw mut policy), KVMGR_OK);
        assert_eq!(kvmgr_policy_needs(policy, &raw mut needs, &raw mut window), KVMGR_OK);
        assert_eq!((needs, window), (KVMGR_NEEDS_COLUMN_SUM, 0));
        let sums = [0.1, 0.9, 0.2, 0.8, 0.3, 0.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0f32];
        let mut input: kvmgr_policy_input = std::mem::zeroed();
        input.struct_size = size_of::<kvmgr_policy_input>();
        (input.num_q_heads, input.num_kv_heads, input.head_dim) = (4, 2, DIM as u32);
        input.num_tokens = 6;
        let (mut kept, mut counts) = ([99; 12], [0; 2]);
        let mut select = |input: &kvmgr_policy_input| {
            kvmgr_policy_select(policy, input, kept.as_mut_ptr(), counts.as_mut_ptr())
        };
        assert_eq!(select(&input), KVMGR_INVALID_ARGUMENT);
        assert!(message().contains("column_sums is NULL"), "{}", message());
        input.column_sums = sums.as_ptr();
        let negative = [-3, -2, -1, 0, 1, 2];
        input.positions = negative.as_ptr();
        assert_eq!(select(&input), KVMGR_INVALID_ARGUMENT);
        assert!(message().contains("positions[0] is -3"), "{}", message());
        input.positions = ptr::null();
        assert_eq!(select(&input), KVMGR_OK, "{}", message());
        assert_eq!(
            (counts, &kept[..4], &kept[6..10]),
            ([4, 4], &[1, 3, 4, 5][..], &[0, 1, 4, 5][..])
        );
        let mut scores = [f32::NAN; 12];
        assert_eq!(kvmgr_policy_score(policy, &input, scores.as_mut_ptr()), KVMGR_OK);
        assert_eq!(scores, sums);
        kvmgr_policy_release(policy);
        // What compares all layers has nothing to say about one.
        let spec = c"h2o(recent=2) | squeeze | keep_tokens(4)";
        assert_eq!(kvmgr_policy_create(spec.as_ptr(), &raw mut policy), KVMGR_OK);
        assert_eq!(kvmgr_policy_needs(policy, &raw mut needs, &raw mut window), KVMGR_OK);
        assert_eq!(needs, KVMGR_NEEDS_COLUMN_SUM | KVMGR_NEEDS_RESIDUAL);
        let (mut kept, mut counts) = ([99; 12], [0; 2]);
        let status = kvmgr_policy_select(policy, &input, kept.as_mut_ptr(), counts.as_mut_ptr());
        assert_eq!(status, KVMGR_UNSUPPORTED);
        assert!(message().contains("compares all layers"), "{}", message());
    }
    kvmgr_policy_release(policy);
}

#[test]
fn a_policy_takes_statistics_of_queries_and_the_rotation() {
    use kvmgr::ffi::types::{KVMGR_ROPE_HALF, kvmgr_rope_style};
    let (mut policy, mut needs, mut window) = (ptr::null_mut(), 0, 0);
    let rows: Vec<f32> = (0..2 * 12 * DIM).map(|i| (i * 7 % 13) as f32 - 6.0).collect();
    let statistics = vec![0.5f32; 4 * DIM * DIM];
    // SAFETY: zeros are valid for the input; strings, places and buffers of the documented sizes.
    unsafe {
        let spec = c"expected(sink=2) | keep(0.5)";
        assert_eq!(kvmgr_policy_create(spec.as_ptr(), &raw mut policy), KVMGR_OK);
        assert_eq!(kvmgr_policy_needs(policy, &raw mut needs, &raw mut window), KVMGR_OK);
        let expected = KVMGR_NEEDS_KEYS | KVMGR_NEEDS_VALUES | KVMGR_NEEDS_ROPE;
        assert_eq!(needs, expected | KVMGR_NEEDS_QUERY_STATISTICS);
        let mut input: kvmgr_policy_input = std::mem::zeroed();
        input.struct_size = size_of::<kvmgr_policy_input>();
        (input.num_q_heads, input.num_kv_heads, input.head_dim) = (4, 2, DIM as u32);
        (input.num_tokens, input.keys, input.values) = (12, rows.as_ptr(), rows.as_ptr());
        let (mut kept, mut counts) = ([99; 24], [0; 2]);
        let mut select = |input: &kvmgr_policy_input| {
            kvmgr_policy_select(policy, input, kept.as_mut_ptr(), counts.as_mut_ptr())
        };
        let refused = |status, text: &str| {
            assert_eq!(status, KVMGR_INVALID_ARGUMENT);
            assert!(message().contains(text), "{}", message());
        };
        input.num_tokens = 1 << 31;
        refused(select(&input), "num_tokens is 2147483648, must be in 1..=2147483647");
        input.num_tokens = 12;
        refused(select(&input), "query_mean is NULL");
        input.query_mean = statistics.as_ptr();
        refused(select(&input), "query_covariance is NULL");
        input.query_covariance = statistics.as_ptr();
        refused(select(&input), "rope_style is KVMGR_ROPE_NONE");
        input.rope_style = kvmgr_rope_style(77);
        refused(select(&input), "rope_style is 77");
        input.rope_style = KVMGR_ROPE_HALF;
        input.rope_dims = DIM as u32 + 2;
        refused(select(&input), "must be at most head_dim");
        input.rope_dims = 0;
        assert_eq!(select(&input), KVMGR_OK, "{}", message());
        assert_eq!((counts, &kept[..2], &kept[12..14]), ([6, 6], &[0, 1][..], &[0, 1][..]));
    }
    kvmgr_policy_release(policy);
}

#[test]
fn a_store_keeps_objects_until_it_is_full() {
    let mut store = ptr::null_mut();
    let (key, other) = ([1u8; KVMGR_STORE_KEY_SIZE], [2u8; KVMGR_STORE_KEY_SIZE]);
    let (bytes, mut out) = ([7u8; 10], [0u8; 10]);
    // SAFETY: strings, places and buffers of the documented sizes.
    unsafe {
        let spec = c"host(capacity=16)";
        assert_eq!(kvmgr_store_create(spec.as_ptr(), &raw mut store), KVMGR_OK, "{}", message());
        let put = |key: &[u8; 32]| kvmgr_store_put(store, key.as_ptr(), bytes.as_ptr().cast(), 10);
        assert_eq!((put(&key), put(&key), put(&other)), (KVMGR_OK, KVMGR_OK, KVMGR_OUT_OF_MEMORY));
        assert!(message().contains("capacity is 16"), "{}", message());
        let mut get = |key: &[u8; 32], size| {
            kvmgr_store_get(store, key.as_ptr(), out.as_mut_ptr().cast(), size)
        };
        assert_eq!((get(&other, 10), get(&key, 9)), (KVMGR_NOT_FOUND, KVMGR_STORE_ERROR));
        assert_eq!(get(&key, 10), KVMGR_OK);
        assert_eq!(out, bytes);
        assert_eq!(kvmgr_store_remove(store, key.as_ptr()), KVMGR_OK);
        assert_eq!(kvmgr_store_contains(store, key.as_ptr()), KVMGR_NOT_FOUND);
    }
    kvmgr_store_release(store);
}
