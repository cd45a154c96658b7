//! Who is reclaimed first.

use crate::*;

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
    // Too late, but the entry is still there.
    let late = |pool: *mut kvmgr_pool, a: &[i32], b: &[i32]| {
        run(pool, &request(a));
        run(pool, &kvmgr_pool_request { ttl: 50, ..request(b) });
        ok(kvmgr_pool_tick(pool, 50));
        let known = hashes(pool, &request(b));
        // SAFETY: hashes of the length that is passed.
        ok(unsafe { kvmgr_pool_keep_entries(pool, known.as_ptr(), 1, 0, 0, 0, null_mut()) });
    };
    assert_eq!(survivor(c"lru", late), (false, true));
    // It is wanted again, by a sequence that was parked.
    let resumed = |pool: *mut kvmgr_pool, a: &[i32], b: &[i32]| {
        let id = start(pool, &request(b)).sequence;
        let mut num = 0;
        // SAFETY: nobody asks for places.
        ok(unsafe { kvmgr_pool_park(pool, id, null_mut(), 0, &raw mut num) });
        run(pool, &kvmgr_pool_request { ttl: 50, ..request(b) });
        ok(kvmgr_pool_tick(pool, 50));
        run(pool, &request(a));
        let mut places = [kvmgr_placement { place: 0, block: 0 }; 2];
        // SAFETY: room for all places.
        ok(unsafe { kvmgr_pool_resume(pool, id, places.as_mut_ptr(), 2, &raw mut num) });
        ok(end(pool, id));
    };
    assert_eq!(survivor(c"lru", resumed), (false, true));
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
fn parts_of_a_sequence_stay_for_as_long_as_they_are_told() {
    // The system prompt stays, the rest of the same sequence goes first.
    let pool = create(&kvmgr_pool_config {
        evictor: c"priority".as_ptr(),
        ..config(4, KVMGR_POOL_PREFIX)
    });
    let prompt: Vec<i32> = (0..13).collect();
    let (status, admission) = try_admit(pool, &request(&prompt));
    ok(status);
    let id = admission.sequence;
    refused(kvmgr_pool_keep_range(pool, id, 4, 4, 0, 0), KVMGR_INVALID_ARGUMENT, "4..4");
    refused(kvmgr_pool_keep_range(pool, id, 0, 4, 101, 0), KVMGR_INVALID_ARGUMENT, "is 101");
    // Said before the blocks are entries, and again afterwards; the later word counts.
    ok(kvmgr_pool_keep_range(pool, id, 0, 4, 1, 0));
    ok(kvmgr_pool_keep_range(pool, id, 0, 8, 100, 0));
    ok(commit(pool, id, &[13], &[]));
    ok(kvmgr_pool_keep_range(pool, id, 4, 8, 90, 50));
    ok(end(pool, id));
    refused(kvmgr_pool_keep_range(pool, id, 0, 4, 1, 0), KVMGR_INVALID_HANDLE, "released");
    let num_cached = |pool| {
        let (found, lease) = lookup(pool, &hashes(pool, &request(&prompt)), 0);
        kvmgr_lease_destroy(lease);
        found
    };
    assert_eq!(num_cached(pool), 3);
    ok(end(pool, start(pool, &request(&[7; 7])).sequence));
    assert_eq!(num_cached(pool), 2, "the tokens behind the ranges went first");
    // The time of the second range passes, the first one has none.
    ok(kvmgr_pool_tick(pool, 50));
    ok(end(pool, start(pool, &request(&[8; 11])).sequence));
    assert_eq!(num_cached(pool), 1);
    kvmgr_pool_release(pool);
}

/// The blocks that a parked sequence had may be others' by now.
#[test]
fn what_a_parked_sequence_has_left_is_its_own() {
    for (reuses, expected) in [(true, (true, false)), (false, (true, true))] {
        let pool = create(&config(if reuses { 2 } else { 3 }, KVMGR_POOL_PREFIX));
        let [a, b, parked] = [1, 2, 5].map(|id| [id; 4]);
        let asked = kvmgr_pool_request { ttl: 50, ..request(&parked) };
        let id = start(pool, &asked).sequence;
        // SAFETY: nobody asks for places.
        unsafe {
            let mut num = 0;
            ok(kvmgr_pool_park(pool, id, null_mut(), 0, &raw mut num));
        }
        let [b_id, a_id] = [&b, &a].map(|tokens| start(pool, &request(tokens)).sequence);
        [b_id, a_id, id].into_iter().for_each(|id| ok(end(pool, id)));
        ok(kvmgr_pool_tick(pool, 50));
        let third = start(pool, &request(&[3; 4])).sequence;
        let cached = |tokens: &[i32]| {
            let (found, lease) = lookup(pool, &hashes(pool, &request(tokens)), 0);
            kvmgr_lease_destroy(lease);
            found == 1
        };
        assert_eq!((cached(&a), cached(&b)), expected);
        assert!(!cached(&parked));
        ok(end(pool, third));
        kvmgr_pool_release(pool);
    }
}
