//! What a pool is made from, and help for schedulers.

use kvmgr::ffi::schedule::*;

use crate::*;

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
