//! What a pool tells: numbers, events, a log that replays.

use std::ffi::c_void;
use std::ptr::null;

use crate::common::Random;
use crate::*;

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

/// What a router needs to compute the hashes itself, by name and by position.
#[test]
fn events_tell_adapters_and_keys() {
    for flags in [0, KVMGR_EVENTS_ARRAYS] {
        let pool = create(&config(16, KVMGR_POOL_PREFIX));
        let mut seen = Vec::<(u64, Vec<u8>)>::new();
        // SAFETY: the list outlives the pool.
        ok(unsafe {
            let user = (&raw mut seen).cast();
            kvmgr_pool_listen(pool, flags, 8, null(), user, None, Some(collect))
        });
        let prompt: Vec<i32> = (0..12).collect();
        let image = kvmgr_extra_key {
            start: 3,
            end: 6,
            key: "cat".as_ptr(),
            key_size: 3,
            kind: KVMGR_KEY_ITEM,
            reserved: 0,
        };
        let plain = start(pool, &request(&prompt)).sequence;
        let adapted = kvmgr_pool_request {
            adapter: c"lora".as_ptr(),
            extra_keys: &raw const image,
            num_extra_keys: 1,
            ..request(&prompt)
        };
        start(pool, &adapted);
        ok(end(pool, plain));
        let stored: Vec<rmpv::Value> = seen
            .iter()
            .map(|(_, bytes)| rmpv::decode::read_value(&mut &bytes[..]).unwrap()[1][0].clone())
            .collect();
        let get = |event: &rmpv::Value, name: &str, place: usize| match event.as_map() {
            Some(map) => {
                map.iter().find(|(key, _)| key.as_str() == Some(name)).map(|it| it.1.clone())
            }
            None => event.as_array().unwrap().get(place).cloned(),
        };
        let (first, second) = (&stored[0], &stored[1]);
        assert!(get(first, "lora_name", 7).unwrap().is_nil());
        assert!(get(first, "extra_keys", 8).is_none());
        assert_eq!(get(second, "lora_name", 7).unwrap().as_str(), Some("lora"));
        let keys = get(second, "extra_keys", 8).unwrap();
        let of_block = |offset: i64| {
            let item = rmpv::Value::Array(vec!["cat".into(), offset.into()]);
            rmpv::Value::Array(vec!["lora".into(), item])
        };
        let only = rmpv::Value::Array(vec!["lora".into()]);
        assert_eq!(keys, rmpv::Value::Array(vec![of_block(3), of_block(-1), only]));
        assert_eq!(get(second, "block_hashes", 1).unwrap().as_array().unwrap().len(), 3);
        kvmgr_pool_release(pool);
    }
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
            adapter: random.pick(&[c"", c"lora"]).as_ptr(),
            priority: random.below(3) as u32 * 20,
            ..request(&prompt)
        };
        let pick = |random: &mut Random, live: &[u64]| match live {
            [] => 0,
            live => live[random.below(live.len())],
        };
        // Refusals are recorded too; what they say does not matter here.
        match random.below(13) {
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
            11 => {
                let (end, priority) = (random.below(12) as u64, random.below(101) as u32);
                _ = kvmgr_pool_keep_range(pool, pick(&mut random, &live), 0, end, priority, 30);
            }
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
