//! The block manager through the C ABI: every call, every error it can give, leases, retention,
//! events and replay.

#![expect(unsafe_code, clippy::borrow_as_ptr, reason = "calls the C ABI as C does")]

mod common;

use std::ffi::{CStr, c_void};
use std::ptr::{null, null_mut};

use common::Random;
use kvmgr::ffi::pool::*;
use kvmgr::ffi::pool_index::*;
use kvmgr::ffi::pool_sequence::*;
use kvmgr::ffi::pool_tables::*;
use kvmgr::ffi::schedule::*;
use kvmgr::ffi::sequence::kvmgr_block_copy;
use kvmgr::ffi::types::*;
use kvmgr::ffi::version::kvmgr_last_error_message;

const SIZE: usize = 4;

fn message() -> String {
    // SAFETY: the library's buffer ends in NUL.
    unsafe { CStr::from_ptr(kvmgr_last_error_message()) }.to_string_lossy().into_owned()
}

#[track_caller]
fn ok(status: kvmgr_status) {
    assert_eq!(status, KVMGR_OK, "{}", message());
}

#[track_caller]
fn refused(status: kvmgr_status, expected: kvmgr_status, text: &str) {
    assert_eq!(status, expected, "{}", message());
    assert!(message().contains(text), "{text:?} is not in {:?}", message());
}

fn config(num_blocks: u64, flags: u32) -> kvmgr_pool_config {
    // SAFETY: zero is valid for every field.
    let mut config: kvmgr_pool_config = unsafe { std::mem::zeroed() };
    config.struct_size = size_of::<kvmgr_pool_config>();
    (config.num_blocks, config.block_size, config.flags) = (num_blocks, SIZE as u32, flags);
    config
}

fn create(config: &kvmgr_pool_config) -> *mut kvmgr_pool {
    let mut pool = null_mut();
    // SAFETY: a valid configuration and a place.
    ok(unsafe { kvmgr_pool_create(config, &raw mut pool) });
    pool
}

fn request(tokens: &[i32]) -> kvmgr_pool_request {
    // SAFETY: zero is valid for every field.
    let mut request: kvmgr_pool_request = unsafe { std::mem::zeroed() };
    (request.tokens, request.num_tokens) = (tokens.as_ptr(), tokens.len());
    request
}

fn try_admit(
    pool: *mut kvmgr_pool,
    request: &kvmgr_pool_request,
) -> (kvmgr_status, kvmgr_pool_admission) {
    // SAFETY: zero is valid for every field; room for one answer.
    unsafe {
        let (mut admission, mut num) = (std::mem::zeroed(), 0);
        let status = kvmgr_pool_admit(pool, request, 1, &raw mut admission, &raw mut num);
        assert_eq!(num, usize::from(status == KVMGR_OK));
        (status, admission)
    }
}

/// Admits a prompt and commits all of it.
fn start(pool: *mut kvmgr_pool, request: &kvmgr_pool_request) -> kvmgr_pool_admission {
    let (status, admission) = try_admit(pool, request);
    ok(status);
    let rest = [request.num_tokens as u32 - admission.num_cached as u32];
    ok(commit(pool, admission.sequence, &rest, &[]));
    admission
}

fn commit(pool: *mut kvmgr_pool, sequence: u64, count: &[u32; 1], tokens: &[i32]) -> kvmgr_status {
    // SAFETY: lists of the lengths that are passed.
    unsafe { kvmgr_pool_commit(pool, &sequence, count.as_ptr(), 1, tokens.as_ptr(), tokens.len()) }
}

fn reserve(pool: *mut kvmgr_pool, sequence: u64, count: u32) -> kvmgr_status {
    // SAFETY: lists of one.
    unsafe { kvmgr_pool_reserve(pool, &sequence, &count, 1) }
}

fn append(pool: *mut kvmgr_pool, sequence: u64, token: i32) -> kvmgr_status {
    // SAFETY: lists of one.
    unsafe { kvmgr_pool_append(pool, &sequence, &token, 1) }
}

fn end(pool: *mut kvmgr_pool, sequence: u64) -> kvmgr_status {
    // SAFETY: a list of one.
    unsafe { kvmgr_pool_end(pool, &sequence, 1) }
}

fn stats(pool: *const kvmgr_pool) -> kvmgr_pool_stats {
    let mut stats =
        kvmgr_pool_stats { struct_size: size_of::<kvmgr_pool_stats>(), ..Default::default() };
    // SAFETY: a struct with its size.
    ok(unsafe { kvmgr_pool_get_stats(pool, &raw mut stats) });
    stats
}

fn hashes(pool: *mut kvmgr_pool, request: &kvmgr_pool_request) -> Vec<u8> {
    let mut num = 0;
    // SAFETY: room for as many hashes as are asked for.
    unsafe {
        ok(kvmgr_pool_hash(pool, request, null_mut(), 0, &raw mut num));
        let mut out = vec![0; num * 32];
        ok(kvmgr_pool_hash(pool, request, out.as_mut_ptr(), num, &raw mut num));
        out
    }
}

fn lookup(pool: *mut kvmgr_pool, hashes: &[u8], deadline: u64) -> (usize, *mut kvmgr_lease) {
    let (mut found, mut lease) = (0, null_mut());
    let num = hashes.len() / 32;
    let mut blocks = vec![0u32; num];
    // SAFETY: room for as many blocks as hashes.
    ok(unsafe {
        kvmgr_pool_lookup(
            pool,
            hashes.as_ptr(),
            num,
            0,
            deadline,
            blocks.as_mut_ptr(),
            &raw mut found,
            &raw mut lease,
        )
    });
    (found, lease)
}

#[test]
fn a_pool_refuses_settings_that_make_no_sense() {
    let good = config(8, KVMGR_POOL_PREFIX);
    let groups = |kind, value| kvmgr_group { kind: kvmgr_group_kind(kind), value };
    let (zero, wild, odd) = (groups(2, 0), groups(9, 0), groups(0, 3));
    let cases: [(kvmgr_pool_config, kvmgr_status, &str); 14] = [
        (kvmgr_pool_config { num_blocks: 0, ..good }, -1, "num_blocks is 0"),
        (kvmgr_pool_config { num_blocks: 1 << 40, ..good }, -1, "num_blocks is 1099511627776"),
        (kvmgr_pool_config { block_size: 2000, ..good }, -1, "block_size is 2000"),
        (kvmgr_pool_config { flags: 64, ..good }, -1, "flags has unknown bits 0x40"),
        (kvmgr_pool_config { flags: KVMGR_POOL_DEDUP, ..good }, -1, "need PREFIX"),
        (kvmgr_pool_config { evictor: c"mru".as_ptr(), ..good }, -1, "unknown evictor"),
        (kvmgr_pool_config { hash: kvmgr_hash(7), ..good }, -1, "hash is 7"),
        (kvmgr_pool_config { hash: KVMGR_HASH_VLLM, hash_salt: 1, ..good }, -1, "hash_salt"),
        (kvmgr_pool_config { num_groups: 17, ..good }, -1, "num_groups is 17"),
        (kvmgr_pool_config { num_groups: 1, ..good }, -1, "groups is NULL"),
        (kvmgr_pool_config { num_groups: 1, groups: &raw const zero, ..good }, -1, "window"),
        (kvmgr_pool_config { num_groups: 1, groups: &raw const wild, ..good }, -1, "kind 9"),
        (kvmgr_pool_config { num_groups: 1, groups: &raw const odd, ..good }, -1, "value 3"),
        (kvmgr_pool_config { struct_size: 4, ..good }, -1, "struct_size is 4"),
    ];
    for (config, status, text) in &cases {
        let mut pool = std::ptr::without_provenance_mut(16);
        // SAFETY: a configuration and a place.
        refused(unsafe { kvmgr_pool_create(config, &raw mut pool) }, *status, text);
        assert!(pool.is_null());
    }
    let window = [groups(0, 0), groups(2, 8)];
    let flags = KVMGR_POOL_PREFIX | KVMGR_POOL_PARTIAL;
    let two = kvmgr_pool_config { num_groups: 2, groups: window.as_ptr(), flags, ..good };
    let mut pool = null_mut();
    // SAFETY: a configuration and a place.
    unsafe {
        refused(kvmgr_pool_create(&two, &raw mut pool), KVMGR_UNSUPPORTED, "one full group");
        // A caller that was built before the newer fields existed.
        let old = kvmgr_pool_config { struct_size: 40, ..good };
        ok(kvmgr_pool_create(&old, &raw mut pool));
    }
    kvmgr_pool_release(pool);
    assert!(kvmgr_pool_retain(pool).is_null());
}

#[test]
fn batches_are_all_or_nothing_and_name_what_is_wrong() {
    let pool = create(&config(8, KVMGR_POOL_PREFIX));
    let prompt: Vec<i32> = (0..9).collect();
    let (status, admission) = try_admit(pool, &request(&prompt));
    ok(status);
    let id = admission.sequence;
    let before = stats(pool);
    refused(append(pool, id, 1), KVMGR_INVALID_STATE, "commit the prompt");
    refused(commit(pool, id, &[10], &[]), KVMGR_INVALID_ARGUMENT, "counts has 10");
    refused(commit(pool, id, &[9], &[1]), KVMGR_INVALID_ARGUMENT, "num_tokens is 1, must be 0");
    let child = &mut 0;
    // SAFETY: lists of the lengths that are passed.
    unsafe {
        refused(kvmgr_pool_fork(pool, id, child, 1), KVMGR_INVALID_STATE, "prompt tokens");
        let (ids, ones) = ([id, id], [1, 1]);
        let twice = kvmgr_pool_append(pool, ids.as_ptr(), ones.as_ptr().cast(), 2);
        refused(twice, KVMGR_INVALID_ARGUMENT, "occurs twice");
        refused(kvmgr_pool_end(pool, ids.as_ptr(), 2), KVMGR_INVALID_ARGUMENT, "occurs twice");
        refused(kvmgr_pool_end(pool, null(), 1), KVMGR_INVALID_ARGUMENT, "sequences is NULL");
        let (both, counts) = ([id, 77], [1, 1]);
        let status = kvmgr_pool_reserve(pool, both.as_ptr(), counts.as_ptr(), 2);
        refused(status, KVMGR_INVALID_HANDLE, "0x4d");
    }
    ok(commit(pool, id, &[9], &[]));
    refused(reserve(pool, id, 100), KVMGR_OUT_OF_BLOCKS, "need 25 blocks");
    refused(kvmgr_pool_truncate(pool, id, 10), KVMGR_INVALID_ARGUMENT, "num_tokens is 10");
    assert_eq!(stats(pool).used_blocks, before.used_blocks);

    let long: Vec<i32> = (100..140).collect();
    refused(try_admit(pool, &request(&long)).0, KVMGR_OUT_OF_BLOCKS, "need 10 blocks");
    refused(try_admit(pool, &request(&[])).0, KVMGR_INVALID_ARGUMENT, "num_tokens is 0");
    let bad = |change: &dyn Fn(&mut kvmgr_pool_request), status, text: &str| {
        let mut request = request(&prompt);
        change(&mut request);
        refused(try_admit(pool, &request).0, status, text);
    };
    let hash = [0u8; 32];
    let key = kvmgr_extra_key { start: 3, end: 12, key: hash.as_ptr(), key_size: 3 };
    bad(&|it| it.reserved = 5, KVMGR_INVALID_ARGUMENT, "reserved is 5");
    bad(&|it| it.priority = 101, KVMGR_INVALID_ARGUMENT, "priority is 101");
    bad(&|it| it.priority = 90, KVMGR_UNSUPPORTED, "evictor lru");
    bad(&|it| it.tokens = null(), KVMGR_INVALID_ARGUMENT, "tokens is NULL");
    let short = |it: &mut kvmgr_pool_request| (it.hashes, it.num_hashes) = (hash.as_ptr(), 1);
    bad(&short, KVMGR_INVALID_ARGUMENT, "num_hashes is 1, must be 0 or 2");
    let keys =
        |it: &mut kvmgr_pool_request| (it.extra_keys, it.num_extra_keys) = (&raw const key, 1);
    bad(&keys, KVMGR_INVALID_ARGUMENT, "extra_keys[0] covers 3..12");

    // The first of two fits, the second does not: one is admitted.
    let requests = [request(&prompt), request(&long)];
    // SAFETY: zero is valid for answers; room for two.
    unsafe {
        let (mut out, mut num) = ([std::mem::zeroed::<kvmgr_pool_admission>(); 2], 9);
        ok(kvmgr_pool_admit(pool, requests.as_ptr(), 2, out.as_mut_ptr(), &raw mut num));
        assert_eq!((num, out[0].num_cached), (1, 8));
        ok(end(pool, out[0].sequence));
        refused(end(pool, out[0].sequence), KVMGR_INVALID_HANDLE, "has been released");
    }
    ok(end(pool, id));
    refused(append(pool, id, 1), KVMGR_INVALID_HANDLE, "has been released");
    assert_eq!((stats(pool).used_blocks, stats(pool).idle_blocks), (0, 2));
    kvmgr_pool_release(pool);
    refused(end(pool, id), KVMGR_INVALID_HANDLE, "kvmgr_pool has been released");
}

#[test]
fn tables_and_slots_say_where_rows_are() {
    let groups = [
        kvmgr_group { kind: KVMGR_GROUP_FULL, value: 0 },
        kvmgr_group { kind: KVMGR_GROUP_WINDOW, value: 5 },
    ];
    let hybrid = kvmgr_pool_config {
        groups: groups.as_ptr(),
        num_groups: 2,
        ..config(32, KVMGR_POOL_PREFIX)
    };
    let pool = create(&hybrid);
    let prompt: Vec<i32> = (0..14).collect();
    let id = start(pool, &request(&prompt)).sequence;
    ok(reserve(pool, id, 3));
    let (mut full, mut window) = ([0u32; 6], [0u32; 6]);
    let mut slots = [0i64; 3];
    // SAFETY: room of the sizes that are passed.
    unsafe {
        ok(kvmgr_pool_block_tables(pool, &id, 1, 0, full.as_mut_ptr(), 6));
        ok(kvmgr_pool_block_tables(pool, &id, 1, 1, window.as_mut_ptr(), 6));
        assert!(full[..5].iter().all(|block| *block < 32) && full[5] == KVMGR_NO_BLOCK);
        // The token at 14 needs 10..=14: the first two chunks are gone.
        assert_eq!(window[..2], [KVMGR_NO_BLOCK; 2]);
        assert!(window[2..5].iter().all(|block| *block < 32 && !full.contains(block)));
        ok(kvmgr_pool_slot_mapping(pool, &id, &3, 1, 0, slots.as_mut_ptr(), 3));
        let row = |chunk: usize, row: i64| i64::from(full[chunk]) * SIZE as i64 + row;
        assert_eq!(slots, [row(3, 2), row(3, 3), row(4, 0)]);
        let status = kvmgr_pool_slot_mapping(pool, &id, &4, 1, 0, slots.as_mut_ptr(), 3);
        refused(status, KVMGR_INVALID_ARGUMENT, "only 3 tokens are reserved");
        let status = kvmgr_pool_slot_mapping(pool, &id, &3, 1, 0, slots.as_mut_ptr(), 2);
        refused(status, KVMGR_INVALID_ARGUMENT, "room for 3 slots");
        let status = kvmgr_pool_slot_mapping(pool, &id, &3, 1, 2, slots.as_mut_ptr(), 3);
        refused(status, KVMGR_INVALID_ARGUMENT, "group is 2, must be below 2");
        let status = kvmgr_pool_block_tables(pool, &id, 1, 0, full.as_mut_ptr(), 4);
        refused(status, KVMGR_INVALID_ARGUMENT, "columns is 4");
        let status = kvmgr_pool_block_tables(pool, &id, 1, 9, full.as_mut_ptr(), 6);
        refused(status, KVMGR_INVALID_ARGUMENT, "group is 9");
        let (mut committed, mut reserved) = (0, 0);
        ok(kvmgr_pool_num_tokens(pool, id, &raw mut committed, &raw mut reserved));
        assert_eq!((committed, reserved), (14, 17));
        ok(kvmgr_pool_num_tokens(pool, id, null_mut(), null_mut()));
    }
    refused(kvmgr_pool_truncate(pool, id, 4), KVMGR_INVALID_STATE, "window of group 1");
    ok(kvmgr_pool_truncate(pool, id, 13));
    ok(end(pool, id));
    // The full group has everything, the window only its end: the same prompt hits, a shorter
    // one is ended by the window.
    let again = start(pool, &request(&prompt));
    assert_eq!((again.num_cached, again.miss), (12, KVMGR_MISS_NONE));
    kvmgr_pool_release(pool);
}

#[test]
fn misses_are_explained() {
    let pool = create(&config(4, KVMGR_POOL_PREFIX));
    let (a, b): (Vec<i32>, Vec<i32>) = ((0..9).collect(), (50..62).collect());
    let miss = |admission: &kvmgr_pool_admission| {
        (admission.num_cached, admission.miss, admission.miss_token)
    };
    let first = start(pool, &request(&a));
    assert_eq!(miss(&first), (0, KVMGR_MISS_UNKNOWN, 0));
    ok(end(pool, first.sequence));
    let mut other = a.clone();
    other[5] = -1;
    let second = start(pool, &request(&other));
    assert_eq!(miss(&second), (4, KVMGR_MISS_UNKNOWN, 4));
    ok(end(pool, second.sequence));
    let third = start(pool, &request(&b));
    ok(end(pool, third.sequence));
    ok(end(pool, start(pool, &request(&[7; 16])).sequence));
    let fourth = start(pool, &request(&a));
    assert_eq!(miss(&fourth), (0, KVMGR_MISS_EVICTED, 0));
    let stats = stats(pool);
    assert_eq!((stats.misses_unknown, stats.misses_evicted), (4, 1));
    kvmgr_pool_release(pool);

    let groups = [
        kvmgr_group { kind: KVMGR_GROUP_FULL, value: 0 },
        kvmgr_group { kind: KVMGR_GROUP_RECURRENT, value: 2 },
    ];
    let hybrid = kvmgr_pool_config {
        groups: groups.as_ptr(),
        num_groups: 2,
        ..config(32, KVMGR_POOL_PREFIX)
    };
    let pool = create(&hybrid);
    ok(end(pool, start(pool, &request(&b)).sequence));
    let longer: Vec<i32> = (50..70).collect();
    let again = start(pool, &request(&longer));
    // Three blocks are known, a state only after two.
    assert_eq!(miss(&again), (8, KVMGR_MISS_CHECKPOINT, 8));
    assert_eq!(again.miss_group, 1);
    kvmgr_pool_release(pool);
}

#[test]
fn tenants_and_images_are_kept_apart() {
    for hash in [KVMGR_HASH_NATIVE, KVMGR_HASH_VLLM] {
        let pool = create(&kvmgr_pool_config { hash, ..config(64, KVMGR_POOL_PREFIX) });
        let prompt: Vec<i32> = (0..10).collect();
        let salted = |salt: &'static str| kvmgr_pool_request {
            salt: salt.as_ptr(),
            salt_size: salt.len(),
            ..request(&prompt)
        };
        for salt in ["", "a", "b"] {
            assert_eq!(start(pool, &salted(salt)).num_cached, 0, "{salt}");
            assert_eq!(start(pool, &salted(salt)).num_cached, 8, "{salt}");
        }
        // What one tenant can compute finds nothing of another's.
        let (of_a, of_c) = (hashes(pool, &salted("a")), hashes(pool, &salted("c")));
        let (found, lease) = lookup(pool, &of_c, 0);
        assert_eq!(found, 0);
        kvmgr_lease_destroy(lease);
        let (found, lease) = lookup(pool, &of_a, 0);
        assert_eq!(found, 2);
        kvmgr_lease_destroy(lease);

        // An image behind placeholder tokens of the last, partial block: its hash counts when
        // decoding fills the block.
        let image = |name: &'static str| kvmgr_extra_key {
            start: 8,
            end: 10,
            key: name.as_ptr(),
            key_size: name.len(),
        };
        let (cat, dog) = (image("cat"), image("dog"));
        let with = |key: &kvmgr_extra_key| kvmgr_pool_request {
            extra_keys: &raw const *key,
            num_extra_keys: 1,
            ..request(&prompt)
        };
        let full: Vec<i32> = (0..13).collect();
        let whole = |key: &kvmgr_extra_key| kvmgr_pool_request {
            tokens: full.as_ptr(),
            num_tokens: full.len(),
            ..with(key)
        };
        let id = start(pool, &with(&cat)).sequence;
        ok(reserve(pool, id, 2));
        ok(commit(pool, id, &[2], &[10, 11]));
        assert_eq!(start(pool, &whole(&cat)).num_cached, 12);
        assert_eq!(try_admit(pool, &whole(&dog)).1.num_cached, 8);
        kvmgr_pool_release(pool);
    }
    let vllm = kvmgr_pool_config { hash: KVMGR_HASH_VLLM, ..config(8, KVMGR_POOL_PREFIX) };
    let pool = create(&vllm);
    let salt = [0xFFu8];
    let bad = kvmgr_pool_request { salt: salt.as_ptr(), salt_size: 1, ..request(&[1]) };
    refused(try_admit(pool, &bad).0, KVMGR_INVALID_ARGUMENT, "UTF-8");
    kvmgr_pool_release(pool);
}

#[test]
fn leases_hold_until_their_deadline_or_their_end() {
    let pool = create(&config(4, KVMGR_POOL_PREFIX));
    let (prompt, other): (Vec<i32>, Vec<i32>) = ((0..9).collect(), (20..36).collect());
    let id = start(pool, &request(&prompt)).sequence;
    let known = hashes(pool, &request(&prompt));
    let mut pin = null_mut();
    // SAFETY: a place for the handle.
    unsafe {
        ok(kvmgr_pool_pin(pool, id, 0, &raw mut pin));
        refused(kvmgr_pool_pin(pool, 99, 0, &raw mut pin), KVMGR_INVALID_HANDLE, "0x63");
        assert!(pin.is_null());
        ok(kvmgr_pool_pin(pool, id, 0, &raw mut pin));
    }
    ok(end(pool, id));
    assert_eq!((stats(pool).used_blocks, stats(pool).num_leases), (2, 2));
    refused(try_admit(pool, &request(&other)).0, KVMGR_OUT_OF_BLOCKS, "need 4 blocks");
    kvmgr_lease_destroy(pin);

    let (found, lease) = lookup(pool, &known, 100);
    assert_eq!(found, 2);
    ok(kvmgr_lease_extend(lease, 200));
    ok(kvmgr_pool_tick(pool, 150));
    assert_eq!(stats(pool).num_leases, 2, "the deadline has moved");
    refused(kvmgr_lease_extend(lease, 150), KVMGR_INVALID_ARGUMENT, "the clock is at 150");
    ok(kvmgr_pool_tick(pool, 200));
    assert_eq!((stats(pool).num_leases, stats(pool).leases_expired), (1, 1));
    refused(kvmgr_lease_extend(lease, 300), KVMGR_INVALID_STATE, "lease has ended");
    refused(kvmgr_pool_tick(pool, 199), KVMGR_INVALID_ARGUMENT, "now is 199");
    kvmgr_lease_destroy(lease);
    refused(kvmgr_lease_extend(lease, 300), KVMGR_INVALID_HANDLE, "kvmgr_lease");

    let (mut num, mut lease) = (7, null_mut());
    // SAFETY: hashes of the length that is passed and places.
    unsafe {
        let mut call = |group, deadline| {
            let (hashes, out) = (known.as_ptr(), null_mut());
            kvmgr_pool_lookup(pool, hashes, 2, group, deadline, out, &raw mut num, &raw mut lease)
        };
        refused(call(1, 0), KVMGR_INVALID_ARGUMENT, "group is 1");
        refused(call(0, 100), KVMGR_INVALID_ARGUMENT, "deadline is 100");
        ok(call(0, 0));
    }
    assert_eq!(num, 2);
    // A lease keeps its pool alive and may outlive the engine's reference.
    kvmgr_pool_release(pool);
    kvmgr_lease_destroy(lease);
    kvmgr_lease_destroy(null_mut());
}

/// The order of reclaim after each of `change`: which of two prompts is still cached.
fn survivor(evictor: &CStr, change: impl Fn(*mut kvmgr_pool, &[i32], &[i32])) -> (bool, bool) {
    let pool =
        create(&kvmgr_pool_config { evictor: evictor.as_ptr(), ..config(4, KVMGR_POOL_PREFIX) });
    let (a, b) = ([1; 5], [2; 5]);
    change(pool, &a, &b);
    let third = start(pool, &request(&[3; 12]));
    let cached = |tokens: &[i32]| {
        let (found, lease) = lookup(pool, &hashes(pool, &request(tokens)), 0);
        kvmgr_lease_destroy(lease);
        found == 1
    };
    let answer = (cached(&a), cached(&b));
    ok(end(pool, third.sequence));
    kvmgr_pool_release(pool);
    answer
}

#[test]
fn retention_decides_who_goes_first_and_can_be_changed() {
    let run = |pool, request: &kvmgr_pool_request| ok(end(pool, start(pool, request).sequence));
    let plain = |pool: *mut kvmgr_pool, a: &[i32], b: &[i32]| {
        run(pool, &request(a));
        run(pool, &request(b));
    };
    assert_eq!(survivor(c"lru", plain), (false, true));
    // A time to live that has passed.
    let ttl = |pool: *mut kvmgr_pool, a: &[i32], b: &[i32]| {
        run(pool, &request(a));
        run(pool, &kvmgr_pool_request { ttl: 50, ..request(b) });
        ok(kvmgr_pool_tick(pool, 50));
    };
    assert_eq!(survivor(c"lru", ttl), (true, false));
    // The same, prolonged in time.
    let longer = |pool: *mut kvmgr_pool, a: &[i32], b: &[i32]| {
        run(pool, &request(a));
        run(pool, &kvmgr_pool_request { ttl: 50, ..request(b) });
        let known = hashes(pool, &request(b));
        let mut found = 0;
        // SAFETY: hashes of the length that is passed.
        ok(unsafe { kvmgr_pool_keep_entries(pool, known.as_ptr(), 1, 0, 0, 500, &raw mut found) });
        assert_eq!(found, 1);
        ok(kvmgr_pool_tick(pool, 50));
    };
    assert_eq!(survivor(c"lru", longer), (false, true));
    // A newer state of the session replaces the older one.
    let session = |pool: *mut kvmgr_pool, a: &[i32], b: &[i32]| {
        run(pool, &request(a));
        run(pool, &kvmgr_pool_request { session: 9, ..request(b) });
        run(pool, &kvmgr_pool_request { session: 9, ..request(&[4; 3]) });
    };
    assert_eq!(survivor(c"lru", session), (true, false));
    let ended = |pool: *mut kvmgr_pool, a: &[i32], b: &[i32]| {
        run(pool, &request(a));
        run(pool, &kvmgr_pool_request { session: 9, ..request(b) });
        ok(kvmgr_pool_end_session(pool, 9));
        refused(kvmgr_pool_end_session(pool, 9), KVMGR_NOT_FOUND, "session 9");
    };
    assert_eq!(survivor(c"lru", ended), (true, false));
    // Priorities, said at once, or later.
    let high = |pool: *mut kvmgr_pool, a: &[i32], b: &[i32]| {
        run(pool, &kvmgr_pool_request { priority: 90, ..request(a) });
        run(pool, &request(b));
    };
    assert_eq!(survivor(c"priority", high), (true, false));
    let later = |pool: *mut kvmgr_pool, a: &[i32], b: &[i32]| {
        run(pool, &request(a));
        let id = start(pool, &request(b)).sequence;
        ok(kvmgr_pool_keep(pool, id, 10, 0, 0));
        refused(kvmgr_pool_keep(pool, id, 101, 0, 0), KVMGR_INVALID_ARGUMENT, "priority is 101");
        ok(end(pool, id));
        refused(kvmgr_pool_keep(pool, id, 10, 0, 0), KVMGR_INVALID_HANDLE, "released");
    };
    assert_eq!(survivor(c"priority", later), (true, false));
    // Wrong content is never found again.
    let forgotten = |pool: *mut kvmgr_pool, a: &[i32], b: &[i32]| {
        run(pool, &request(a));
        let id = start(pool, &request(b)).sequence;
        let known = hashes(pool, &request(b));
        let mut found = 0;
        // SAFETY: hashes of the length that is passed.
        unsafe {
            ok(kvmgr_pool_forget(pool, known.as_ptr(), 1, 0, &raw mut found));
            assert_eq!(found, 1);
            ok(kvmgr_pool_forget(pool, known.as_ptr(), 1, 0, &raw mut found));
            assert_eq!(found, 0);
        }
        ok(end(pool, id));
    };
    assert_eq!(survivor(c"lru", forgotten), (true, false));
}

#[test]
fn forks_preemption_and_parts_of_blocks_tell_what_to_copy() {
    let flags = KVMGR_POOL_PREFIX | KVMGR_POOL_PARTIAL;
    let pool = create(&config(16, flags));
    let prompt: Vec<i32> = (0..10).collect();
    let id = start(pool, &request(&prompt)).sequence;
    let mut children = [0; 3];
    let mut copies = [kvmgr_block_copy { source: 0, target: 0 }; 4];
    let mut num = 0;
    // SAFETY: room of the sizes that are passed.
    unsafe {
        ok(kvmgr_pool_fork(pool, id, children.as_mut_ptr(), 3));
        assert_eq!(stats(pool).used_blocks, 3);
        ok(kvmgr_pool_reserve(pool, children.as_ptr(), [1; 3].as_ptr(), 3));
        ok(kvmgr_pool_take_copies(pool, null_mut(), 0, &raw mut num));
        assert_eq!(num, 3);
        let status = kvmgr_pool_take_copies(pool, copies.as_mut_ptr(), 2, &raw mut num);
        refused(status, KVMGR_INVALID_ARGUMENT, "room for 3 copies");
        ok(kvmgr_pool_take_copies(pool, copies.as_mut_ptr(), 4, &raw mut num));
        assert!(num == 3 && copies[..3].iter().all(|it| it.source == copies[0].source));
        ok(kvmgr_pool_end(pool, children.as_ptr(), 3));

        let mut places = [kvmgr_placement { place: 0, block: 0 }; 4];
        let status = kvmgr_pool_park(pool, id, places.as_mut_ptr(), 2, &raw mut num);
        refused(status, KVMGR_INVALID_ARGUMENT, "room for 3 elements");
        ok(kvmgr_pool_park(pool, id, places.as_mut_ptr(), 4, &raw mut num));
        assert_eq!((num, stats(pool).used_blocks, stats(pool).preemptions), (3, 0, 1));
        refused(append(pool, id, 1), KVMGR_INVALID_STATE, "is parked");
        let status = kvmgr_pool_block_tables(pool, &id, 1, 0, [0; 4].as_mut_ptr(), 4);
        refused(status, KVMGR_INVALID_STATE, "is parked");
        let status = kvmgr_pool_park(pool, id, places.as_mut_ptr(), 4, &raw mut num);
        refused(status, KVMGR_INVALID_STATE, "is parked");
        ok(kvmgr_pool_resume(pool, id, places.as_mut_ptr(), 4, &raw mut num));
        assert_eq!((num, places[0].place), (1, 2), "two blocks were still cached");
        let status = kvmgr_pool_resume(pool, id, places.as_mut_ptr(), 4, &raw mut num);
        refused(status, KVMGR_INVALID_STATE, "is not parked");

        // Seven tokens are the same: one block and three rows of the next.
        let mut near = prompt;
        near[7] = -1;
        let admission = start(pool, &request(&near));
        assert_eq!((admission.num_cached, admission.num_copied), (7, 3));
        ok(kvmgr_pool_take_copies(pool, copies.as_mut_ptr(), 4, &raw mut num));
        assert_eq!(num, 1);
        assert_eq!(stats(pool).prefix_copied_tokens, 3);
    }
    kvmgr_pool_release(pool);
}

#[test]
fn the_numbers_are_prometheus_text() {
    let pool = create(&config(8, KVMGR_POOL_PREFIX));
    start(pool, &request(&[1; 9]));
    let mut size = 0;
    let mut text = vec![0u8; 8192];
    // SAFETY: room of the size that is passed.
    unsafe {
        ok(kvmgr_pool_prometheus(pool, null(), null_mut(), 0, &raw mut size));
        let labels = c"pool=\"a\"".as_ptr();
        let short = kvmgr_pool_prometheus(pool, labels, text.as_mut_ptr().cast(), 5, &raw mut size);
        refused(short, KVMGR_INVALID_ARGUMENT, "capacity is 5");
        let out = text.as_mut_ptr().cast();
        ok(kvmgr_pool_prometheus(pool, labels, out, text.len(), &raw mut size));
    }
    let text = String::from_utf8_lossy(&text[..size]);
    assert!(text.contains("kvmgr_pool_used_blocks{pool=\"a\"} 3\n"), "{text}");
    assert!(text.contains("# TYPE kvmgr_pool_committed_tokens_total counter\n"), "{text}");
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let value = line.rsplit(' ').next().map(str::parse::<u64>);
        assert!(matches!(value, Some(Ok(_))), "{line}");
    }
    kvmgr_pool_release(pool);
}

unsafe extern "C" fn collect(user: *mut c_void, number: u64, data: *const c_void, size: usize) {
    // SAFETY: the test passes its list; the library passes live bytes.
    unsafe {
        let bytes = std::slice::from_raw_parts(data.cast::<u8>(), size);
        (*user.cast::<Vec<(u64, Vec<u8>)>>()).push((number, bytes.to_vec()));
    }
}

unsafe extern "C" fn reenter(user: *mut c_void, _: u64, _: *const c_void, _: usize) {
    let pool = user.cast::<kvmgr_pool>();
    refused(kvmgr_pool_tick(pool, 1), KVMGR_BUSY, "callback");
}

#[test]
fn events_arrive_in_order_and_can_be_asked_for_again() {
    let pool = create(&config(4, KVMGR_POOL_PREFIX));
    let (mut seen, mut again) = (Vec::<(u64, Vec<u8>)>::new(), Vec::<(u64, Vec<u8>)>::new());
    let user = (&raw mut seen).cast();
    // SAFETY: the lists outlive the pool.
    unsafe {
        let status = kvmgr_pool_replay_events(pool, 0, user, Some(collect));
        refused(status, KVMGR_INVALID_STATE, "no listener");
        let listen = |flags, kept, function| {
            kvmgr_pool_listen(pool, flags, kept, null(), user, None, function)
        };
        refused(listen(2, 8, Some(collect as _)), KVMGR_INVALID_ARGUMENT, "unknown bits 0x2");
        refused(listen(0, 0, Some(collect)), KVMGR_INVALID_ARGUMENT, "num_kept is 0");
        refused(listen(0, 8, None), KVMGR_INVALID_ARGUMENT, "function is NULL");
        ok(listen(0, 8, Some(collect)));
        refused(listen(0, 8, Some(collect)), KVMGR_INVALID_STATE, "listener already");
        for token in 0..5 {
            ok(end(pool, start(pool, &request(&[token; 9])).sequence));
        }
        ok(kvmgr_pool_clear(pool, null_mut()));
        assert!(seen.iter().map(|it| it.0).eq(0..seen.len() as u64) && seen.len() >= 8);
        let user = (&raw mut again).cast();
        ok(kvmgr_pool_replay_events(pool, 0, user, Some(collect)));
        assert_eq!(again[..], seen[seen.len() - 8..]);
        refused(
            kvmgr_pool_replay_events(pool, 0, user, None),
            KVMGR_INVALID_ARGUMENT,
            "function is NULL",
        );
        ok(kvmgr_pool_replay_events(pool, 0, pool.cast(), Some(reenter)));
    }
    kvmgr_pool_release(pool);
}

/// A recorded run of every operation repeats to the last byte; a changed decision is noticed.
#[test]
fn a_log_replays_to_the_same_bytes() {
    let flags = KVMGR_POOL_PREFIX | KVMGR_POOL_LOG;
    let pool = create(&kvmgr_pool_config {
        evictor: c"priority".as_ptr(),
        watermark: 1,
        ..config(24, flags)
    });
    let mut random = Random(5);
    let mut live: Vec<u64> = Vec::new();
    let mut leases: Vec<*mut kvmgr_lease> = Vec::new();
    for step in 0..4000u64 {
        let prompt: Vec<i32> = (0..random.within(1, 20)).map(|_| random.below(2) as i32).collect();
        let prompt = kvmgr_pool_request {
            ttl: random.pick(&[0, 30]),
            session: random.below(3) as u64,
            priority: random.below(3) as u32 * 20,
            ..request(&prompt)
        };
        let pick = |random: &mut Random, live: &[u64]| match live {
            [] => 0,
            live => live[random.below(live.len())],
        };
        // Refusals are recorded too; what they say does not matter here.
        match random.below(12) {
            0..3 => {
                let (status, admission) = try_admit(pool, &prompt);
                if status == KVMGR_OK {
                    let rest = [prompt.num_tokens as u32 - admission.num_cached as u32];
                    ok(commit(pool, admission.sequence, &rest, &[]));
                    live.push(admission.sequence);
                }
            }
            3 if !live.is_empty() => {
                ok(end(pool, live.swap_remove(random.below(live.len()))));
            }
            4 => _ = reserve(pool, pick(&mut random, &live), 2),
            5 => _ = append(pool, pick(&mut random, &live), step as i32 % 2),
            6 => {
                let (mut child, parent) = (0, pick(&mut random, &live));
                // SAFETY: a place for one child.
                if unsafe { kvmgr_pool_fork(pool, parent, &raw mut child, 1) } == KVMGR_OK {
                    live.push(child);
                }
            }
            7 => {
                let (_, lease) = lookup(pool, &hashes(pool, &prompt), random.pick(&[0, step + 9]));
                leases.push(lease);
            }
            8 if !leases.is_empty() => {
                kvmgr_lease_destroy(leases.swap_remove(random.below(leases.len())));
            }
            9 => _ = kvmgr_pool_truncate(pool, pick(&mut random, &live), random.below(9)),
            10 => _ = kvmgr_pool_end_session(pool, random.below(3) as u64),
            _ => ok(kvmgr_pool_tick(pool, step)),
        }
        if live.len() > 5 {
            ok(end(pool, live.remove(0)));
        }
    }
    let (mut size, mut replayed) = (0, 0);
    // SAFETY: room for as many bytes as are asked for.
    unsafe {
        ok(kvmgr_pool_take_log(pool, null_mut(), 0, &raw mut size));
        let mut log = vec![0u8; size];
        let short = kvmgr_pool_take_log(pool, log.as_mut_ptr().cast(), 5, &raw mut size);
        refused(short, KVMGR_INVALID_ARGUMENT, "capacity is 5");
        ok(kvmgr_pool_take_log(pool, log.as_mut_ptr().cast(), size, &raw mut size));
        ok(kvmgr_pool_replay(log.as_ptr().cast(), size, &raw mut replayed));
        assert!(replayed > 3000, "{replayed}");
        assert!(stats(pool).evictions > 100);
        // Another request may be decided alike, another decision is always noticed.
        let mut noticed = 0;
        for _ in 0..50 {
            let (at, bit) = (random.below(size), 1 << random.below(8));
            log[at] ^= bit;
            let status = kvmgr_pool_replay(log.as_ptr().cast(), size, &raw mut replayed);
            noticed += usize::from(status != KVMGR_OK);
            assert_ne!(status, KVMGR_INTERNAL, "byte {at}: {}", message());
            log[at] ^= bit;
        }
        assert!(noticed >= 20, "{noticed} of 50");
        log[size - 1] ^= 1;
        let last = kvmgr_pool_replay(log.as_ptr().cast(), size, &raw mut replayed);
        refused(last, KVMGR_CORRUPT, "was decided differently");
        log[size - 1] ^= 1;
        let cut = kvmgr_pool_replay(log.as_ptr().cast(), size - 1, &raw mut replayed);
        refused(cut, KVMGR_CORRUPT, "within a record");
        let none = kvmgr_pool_replay(log.as_ptr().cast(), 3, &raw mut replayed);
        refused(none, KVMGR_CORRUPT, "name and version");
    }
    leases.into_iter().for_each(|lease| kvmgr_lease_destroy(lease));
    kvmgr_pool_release(pool);
    let pool = create(&config(4, 0));
    // SAFETY: a place for the size.
    let status = unsafe { kvmgr_pool_take_log(pool, null_mut(), 0, &raw mut size) };
    refused(status, KVMGR_INVALID_STATE, "KVMGR_POOL_LOG");
    kvmgr_pool_release(pool);
}

#[test]
fn schedules_follow_from_their_arguments_alone() {
    let waiting = |cached_blocks, tenant, waited| kvmgr_waiting {
        cached_blocks,
        needed_blocks: 4,
        tenant,
        reserved: 0,
        waited,
    };
    let list = [waiting(0, 0, 5), waiting(9, 0, 1), waiting(1, 1, 1), waiting(0, 2, 300)];
    let (mut order, mut fitting) = ([9u32; 4], 9);
    let running = |own_blocks, admitted| kvmgr_running {
        own_blocks,
        tokens: own_blocks * 4,
        priority: 0,
        reserved: 0,
        admitted,
    };
    let runs = [running(4, 1), running(2, 2)];
    let (mut victims, mut num) = ([9u32; 2], 9);
    let mut layers = [9u8; 4];
    // SAFETY: lists and room of the sizes that are passed.
    unsafe {
        let out = order.as_mut_ptr();
        ok(kvmgr_schedule_admission(list.as_ptr(), 4, 100, 9, out, &raw mut fitting));
        assert_eq!((order, fitting), ([3, 1, 2, 0], 2));
        let odd = kvmgr_waiting { reserved: 1, ..list[0] };
        let status = kvmgr_schedule_admission(&odd, 1, 100, 9, out, &raw mut fitting);
        refused(status, KVMGR_INVALID_ARGUMENT, "reserved");
        let out = victims.as_mut_ptr();
        ok(kvmgr_schedule_preemption(runs.as_ptr(), 2, 2, out, &raw mut num));
        assert_eq!((victims[0], num), (1, 1));
        let status = kvmgr_schedule_preemption(runs.as_ptr(), 2, 7, out, &raw mut num);
        refused(status, KVMGR_OUT_OF_BLOCKS, "fewer than 7");
        let odd = kvmgr_running { reserved: 1, ..runs[0] };
        let status = kvmgr_schedule_preemption(&odd, 1, 1, out, &raw mut num);
        refused(status, KVMGR_INVALID_ARGUMENT, "reserved");
        ok(kvmgr_schedule_layers(4, 10, 20, layers.as_mut_ptr()));
        assert_eq!(layers, [0, 1, 0, 1]);
        let status = kvmgr_schedule_layers(0, 10, 20, layers.as_mut_ptr());
        refused(status, KVMGR_INVALID_ARGUMENT, "num_layers is 0");
    }
    let pool = create(&kvmgr_pool_config { watermark: 2, ..config(8, 0) });
    let mut tokens = 0;
    // SAFETY: a place for the number.
    ok(unsafe { kvmgr_pool_num_admissible(pool, &raw mut tokens) });
    assert_eq!(tokens, 24);
    kvmgr_pool_release(pool);
}

/// Many threads look up while others admit and end; every count comes out even.
#[test]
fn threads_share_a_pool() {
    let pool = create(&config(64, KVMGR_POOL_PREFIX)) as usize;
    let handle = |address: usize| std::ptr::without_provenance_mut::<kvmgr_pool>(address);
    let prompt: Vec<i32> = (0..33).collect();
    start(handle(pool), &request(&prompt));
    let known = hashes(handle(pool), &request(&prompt));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let known = &known;
            scope.spawn(move || {
                for round in 0..500 {
                    if thread < 2 {
                        let (found, lease) = lookup(handle(pool), known, 0);
                        assert_eq!(found, 8);
                        kvmgr_lease_destroy(lease);
                    } else {
                        let own: Vec<i32> =
                            (0..20).map(|i| thread * 1000 + round % 7 + i).collect();
                        let id = start(handle(pool), &request(&own)).sequence;
                        ok(end(handle(pool), id));
                    }
                }
            });
        }
    });
    let stats = stats(handle(pool));
    assert_eq!((stats.used_blocks, stats.num_leases, stats.num_sequences), (9, 0, 1));
    kvmgr_pool_release(handle(pool));
}
