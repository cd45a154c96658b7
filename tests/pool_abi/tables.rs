//! Batches of sequences: tables, slots, forks, preemption.

use std::ptr::null;

use kvmgr::ffi::pool_tables::*;
use kvmgr::ffi::sequence::kvmgr_block_copy;

use crate::*;

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
        let ids = [id, id];
        let twice = kvmgr_pool_reserve(pool, ids.as_ptr(), [1; 2].as_ptr(), 2);
        refused(twice, KVMGR_INVALID_ARGUMENT, "occurs twice");
        refused(kvmgr_pool_end(pool, ids.as_ptr(), 2), KVMGR_INVALID_ARGUMENT, "occurs twice");
        refused(kvmgr_pool_end(pool, null(), 1), KVMGR_INVALID_ARGUMENT, "sequences is NULL");
        let (both, counts) = ([id, 77], [1, 1]);
        let status = kvmgr_pool_reserve(pool, both.as_ptr(), counts.as_ptr(), 2);
        refused(status, KVMGR_INVALID_HANDLE, "0x4d");
    }
    ok(commit(pool, id, &[9], &[]));
    ok(reserve(pool, id, 1));
    // SAFETY: lists of the lengths that are passed.
    let twice = unsafe { kvmgr_pool_append(pool, [id; 2].as_ptr(), [1; 2].as_ptr(), 2) };
    refused(twice, KVMGR_INVALID_ARGUMENT, "occurs twice");
    ok(kvmgr_pool_truncate(pool, id, 9));
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
    let key = kvmgr_extra_key {
        start: 3,
        end: 12,
        key: hash.as_ptr(),
        key_size: 3,
        kind: KVMGR_KEY_ITEM,
        reserved: 0,
    };
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
fn a_recurrent_state_goes_back_to_where_it_was_kept() {
    let group = |kind, value| kvmgr_group { kind, value };
    let groups = [group(KVMGR_GROUP_FULL, 0), group(KVMGR_GROUP_RECURRENT, 2)];
    let config = kvmgr_pool_config {
        groups: groups.as_ptr(),
        num_groups: 2,
        ..config(64, KVMGR_POOL_PREFIX)
    };
    let pool = create(&config);
    let prompt: Vec<i32> = (0..19).collect();
    let id = start(pool, &request(&prompt)).sequence;
    refused(kvmgr_pool_truncate(pool, id, 12), KVMGR_UNSUPPORTED, "after every 8 tokens");
    refused(kvmgr_pool_truncate(pool, id, 9), KVMGR_UNSUPPORTED, "group 1 is recurrent");
    ok(kvmgr_pool_truncate(pool, id, 16));
    ok(kvmgr_pool_truncate(pool, id, 8));
    let mut table = [0; 5];
    // SAFETY: room of the size that is passed.
    ok(unsafe { kvmgr_pool_block_tables(pool, &id, 1, 1, table.as_mut_ptr(), 5) });
    assert!(table[0] == KVMGR_NO_BLOCK && table[1] != KVMGR_NO_BLOCK);
    ok(reserve(pool, id, 1));
    (8..19).for_each(|token| ok(append(pool, id, token)));
    // The same tokens again are the same prefix again.
    assert_eq!(start(pool, &request(&prompt)).num_cached, 16);
    // Once the state has been reclaimed there is nothing to go back to.
    let (mut found, known) = (0, hashes(pool, &request(&prompt)));
    // SAFETY: hashes of the length that is passed.
    ok(unsafe { kvmgr_pool_forget(pool, known[32..].as_ptr(), 1, 1, &raw mut found) });
    assert_eq!(found, 1);
    refused(kvmgr_pool_truncate(pool, id, 8), KVMGR_INVALID_STATE, "has been reclaimed");
    kvmgr_pool_release(pool);
}

#[test]
fn recycled_blocks_are_named_before_they_are_written() {
    let pool = create(&config(4, KVMGR_POOL_PREFIX | KVMGR_POOL_RECYCLED));
    let (mut num, mut blocks) = (9, [0; 4]);
    let mut take = |out: *mut u32, capacity| {
        // SAFETY: room of the size that is passed.
        (unsafe { kvmgr_pool_take_recycled(pool, out, capacity, &raw mut num) }, num)
    };
    let first = start(pool, &request(&[1; 12])).sequence;
    assert_eq!(take(null_mut(), 0), (KVMGR_OK, 0), "nobody had these blocks before");
    ok(end(pool, first));
    // One new block, three of the sequence before; its first one is still found.
    start(pool, &request(&[2; 13]));
    assert_eq!(take(null_mut(), 0), (KVMGR_OK, 3));
    refused(take(blocks.as_mut_ptr(), 2).0, KVMGR_INVALID_ARGUMENT, "room for 3 blocks");
    assert_eq!(take(blocks.as_mut_ptr(), 4), (KVMGR_OK, 3));
    assert_eq!(take(null_mut(), 0), (KVMGR_OK, 0));
    kvmgr_pool_release(pool);
    let pool = create(&config(4, 0));
    // SAFETY: asks for the number alone.
    let status = unsafe { kvmgr_pool_take_recycled(pool, null_mut(), 0, &raw mut num) };
    refused(status, KVMGR_INVALID_STATE, "KVMGR_POOL_RECYCLED");
    kvmgr_pool_release(pool);
}

#[test]
fn duplicates_give_way_only_if_asked() {
    for (flags, used) in [(0, 4), (KVMGR_POOL_DEDUP, 2)] {
        let pool =
            create(&kvmgr_pool_config { watermark: 1, ..config(8, KVMGR_POOL_PREFIX | flags) });
        // Both were admitted before either was computed.
        let prompt = [5; 8];
        let [first, second] = [(); 2].map(|()| try_admit(pool, &request(&prompt)).1.sequence);
        ok(commit(pool, first, &[8], &[]));
        ok(commit(pool, second, &[8], &[]));
        assert_eq!((stats(pool).used_blocks, stats(pool).prefix_entries), (used, 2));
        let (mut tables, ids) = ([[0; 2]; 2], [first, second]);
        let out = tables.as_mut_ptr().cast();
        // SAFETY: room of the size that is passed.
        ok(unsafe { kvmgr_pool_block_tables(pool, ids.as_ptr(), 2, 0, out, 2) });
        assert_eq!(tables[0] == tables[1], flags == KVMGR_POOL_DEDUP);
        // Admission leaves the watermark, running sequences may use it.
        let rest: Vec<i32> = (0..(8 - used as i32) * 4).collect();
        refused(try_admit(pool, &request(&rest)).0, KVMGR_OUT_OF_BLOCKS, "1 of watermark");
        ok(reserve(pool, first, rest.len() as u32));
        kvmgr_pool_release(pool);
    }
}
