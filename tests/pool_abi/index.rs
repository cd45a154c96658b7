//! What is found of a prompt, by whom, and for how long it is held.

use crate::*;

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
        let image = |name: &'static str| extra_key(name, KVMGR_KEY_ITEM);
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

/// A key of the tokens 8 and 9.
fn extra_key(key: &'static str, kind: kvmgr_key_kind) -> kvmgr_extra_key {
    let (key, key_size) = (key.as_ptr(), key.len());
    kvmgr_extra_key { start: 8, end: 10, key, key_size, kind, reserved: 0 }
}

#[test]
fn adapters_and_kinds_of_keys_are_kept_apart() {
    for hash in [KVMGR_HASH_NATIVE, KVMGR_HASH_VLLM] {
        let pool = create(&kvmgr_pool_config { hash, ..config(64, KVMGR_POOL_PREFIX) });
        let prompt: Vec<i32> = (0..13).collect();
        let adapted =
            |name: &CStr| kvmgr_pool_request { adapter: name.as_ptr(), ..request(&prompt) };
        let salted =
            kvmgr_pool_request { salt: c"a".as_ptr().cast(), salt_size: 1, ..request(&prompt) };
        // A salt is no adapter, and every block of a sequence has its adapter, generated ones too.
        assert_eq!(start(pool, &salted).num_cached, 0);
        for name in [c"", c"a", c"b"] {
            let id = start(pool, &adapted(name)).sequence;
            ok(reserve(pool, id, 3));
            ok(commit(pool, id, &[3], &[13, 14, 15]));
            ok(end(pool, id));
            let longer: Vec<i32> = (0..17).collect();
            let whole = kvmgr_pool_request {
                tokens: longer.as_ptr(),
                num_tokens: longer.len(),
                ..adapted(name)
            };
            assert_eq!(start(pool, &whole).num_cached, 16, "{name:?}");
        }
        let with = |key: &kvmgr_extra_key| kvmgr_pool_request {
            extra_keys: &raw const *key,
            num_extra_keys: 1,
            ..request(&prompt)
        };
        for kind in [KVMGR_KEY_ITEM, KVMGR_KEY_TEXT, KVMGR_KEY_BYTES] {
            assert_eq!(start(pool, &with(&extra_key("x", kind))).num_cached, 8, "{kind:?}");
            assert_eq!(start(pool, &with(&extra_key("x", kind))).num_cached, 12, "{kind:?}");
        }
        // The same image one token later is another prefix.
        let moved = kvmgr_extra_key { start: 9, ..extra_key("x", KVMGR_KEY_ITEM) };
        assert_eq!(start(pool, &with(&moved)).num_cached, 8);
        let wrong = extra_key("x", kvmgr_key_kind(3));
        refused(try_admit(pool, &with(&wrong)).0, KVMGR_INVALID_ARGUMENT, "kind is 3");
        let wrong = kvmgr_extra_key { reserved: 1, ..extra_key("x", KVMGR_KEY_ITEM) };
        refused(try_admit(pool, &with(&wrong)).0, KVMGR_INVALID_ARGUMENT, "reserved");
        kvmgr_pool_release(pool);
    }
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
