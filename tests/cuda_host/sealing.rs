//! Blocks are sealed on a device as in host memory, many by a launch, as soon as that can be.

use std::ptr;

use kvmgr::ffi::cache::*;
use kvmgr::ffi::types::*;

use crate::driver::{Context, Stream, num_launches, on_device};
use crate::twin::{PLAIN, Pair, Setup, Twin, ok};

/// One head, whose blocks of 64 tokens have 16384 bytes, and 8704 once they are sealed.
const INT8: Setup =
    Setup { spec: "quant(int8)", block: 64, kv_heads: 1, layers: 1, group: 1, ..PLAIN };

/// Seals so far; none on a device, which does not count.
fn seals() -> Option<u32> {
    num_launches(c"kvm_seal_")
}

/// Both caches hold as much, and attention finds the same in it.
fn compare(twin: &mut Twin, pair: &mut Pair) {
    twin.compare_sizes();
    twin.step(&mut [pair], &[(vec![1; 2], 1)]);
}

#[test]
fn a_launch_seals_many_blocks() {
    on_device("sealing::a_launch_seals_many_blocks", || {
        let _context = Context::new();
        // 64 lanes fill 8 blocks each: 512, of which a launch seals 500.
        let setup = Setup { layers: 8, kv_heads: 8, lanes: KVMGR_LANE_HEAD, blocks: 2000, ..INT8 };
        let mut twin = Twin::new(setup, 1, |_| {});
        let before = seals();
        let (mut pair, _) = twin.start(&[]);
        twin.feed(&mut pair, &vec![1; 515]);
        assert_eq!(seals(), before.map(|before| before + 2));
        compare(&mut twin, &mut pair);
        // Another one of the same start has the blocks already; a commit that fills none seals none.
        let (mut other, matched) = twin.start(&vec![1; 600]);
        assert_eq!(matched, 512);
        twin.feed(&mut other, &[1; 63]);
        assert_eq!(seals(), before.map(|before| before + 2));
        twin.feed(&mut other, &[1]);
        assert_eq!(seals(), before.map(|before| before + 3));
        compare(&mut twin, &mut other);
    });
}

/// Kernels that start early read rows of earlier steps before they wait: not right after those have changed.
#[test]
fn the_first_run_after_a_seal_or_an_eviction_waits() {
    on_device("sealing::the_first_run_after_a_seal_or_an_eviction_waits", || {
        let _context = Context::new();
        let early = || num_launches(c"early kvm_decode");
        let layers = 3;
        for (spec, old, changes) in
            [("quant(int8)", 62, 1), ("every(2) | stream(sink=1, recent=9)", 30, 2)]
        {
            let setup = Setup { layers, spec, block: 64, ..PLAIN };
            let mut twin = Twin::new(setup, 4, |_| {});
            let (mut pair, _) = twin.start(&[]);
            twin.step(&mut [&mut pair], &[(vec![1; old], old)]);
            twin.end_prefill(&pair);
            let before = early();
            // 63, 64, 65 and 66 rows: the second fills a block. The policy evicts after every second.
            (0..4).for_each(|_| twin.step(&mut [&mut pair], &[(vec![1], 1)]));
            assert_eq!(
                early(),
                before.map(|before| before + 4 * layers as u32 - changes),
                "{spec}"
            );
        }
    });
}

/// A device with memory for 24 open blocks, in three chunks of 8: of 16 blocks it seals the first 15 in
/// the chunk that is left, and the last where the first were.
#[test]
fn blocks_are_sealed_in_what_others_leave() {
    on_device("sealing::blocks_are_sealed_in_what_others_leave", || {
        let _context = Context::new();
        let mut twin = Twin::new(INT8, 2, |config| config.memory_limit = 24 * 16384);
        let before = seals();
        let (mut pair, _) = twin.start(&[]);
        twin.feed(&mut pair, &[1; 1024]);
        assert_eq!(seals(), before.map(|before| before + 2));
        assert_eq!(twin.device.stats().bytes_used, 16 * 8704);
        compare(&mut twin, &mut pair);
    });
}

/// Blocks that cannot be sealed by a commit are by the next one that can.
#[test]
fn what_a_commit_could_not_seal_the_next_one_does() {
    on_device("sealing::what_a_commit_could_not_seal_the_next_one_does", || {
        let context = Context::new();
        for in_capture in [true, false] {
            let mut twin = Twin::new(INT8, 3, |_| {});
            let (mut pair, _) = twin.start(&[]);
            twin.append(&pair, 130);
            let before = seals();
            if in_capture {
                let stream = Stream::new();
                ok(kvmgr_cache_set_stream(twin.device.cache, stream.pointer()));
                _ = stream.capture(|| twin.commit(&mut pair, &[1; 130]));
                ok(kvmgr_cache_set_stream(twin.device.cache, ptr::null_mut()));
            } else {
                // The driver refuses what is queued on a stream of another context.
                let other = Context::new();
                let stream = Stream::new();
                ok(kvmgr_cache_set_stream(twin.device.cache, stream.pointer()));
                twin.commit(&mut pair, &[1; 130]);
                ok(kvmgr_cache_set_stream(twin.device.cache, ptr::null_mut()));
                drop((stream, other));
            }
            assert!(context.is_current());
            assert_eq!(seals(), before);
            assert_eq!(twin.device.stats().bytes_used, 3 * 16384);
            twin.feed(&mut pair, &[1]);
            assert_eq!(seals(), before.map(|before| before + 1));
            assert_eq!(twin.device.stats().bytes_used, 2 * 8704 + 16384);
            compare(&mut twin, &mut pair);
        }
    });
}

/// Four layers of two heads. With `first=4, residual=64` the first block stays open, and each later one until 64
/// tokens are behind it; with `skip_layers=1` all blocks of two layers do.
#[test]
fn some_blocks_stay_open() {
    on_device("sealing::some_blocks_stay_open", || {
        let _context = Context::new();
        for (i, lanes) in [KVMGR_LANE_LAYER, KVMGR_LANE_HEAD].into_iter().enumerate() {
            let spec = "quant(int4, skip_layers=1, first=4, residual=64)";
            let setup = Setup { spec, layers: 4, kv_heads: 2, group: 4, lanes, ..INT8 };
            let mut twin = Twin::new(setup, i as u64, |_| {});
            // Bytes while all but so many blocks of a lane in the middle are open.
            let bytes = |blocks: u64, sealed: u64| 8 * blocks * 16384 - 4 * sealed * (16384 - 5120);
            let (mut pair, _) = twin.start(&[]);
            let mut fed = 0;
            for (len, sealed) in [(127, 0), (191, 0), (192, 1), (255, 1), (256, 2), (321, 3)] {
                twin.feed(&mut pair, &vec![1; len - fed]);
                fed = len;
                let blocks = len.div_ceil(64) as u64;
                assert_eq!(twin.device.stats().bytes_used, bytes(blocks, sealed), "{len} tokens");
                // Drafts that nobody takes: more rows than a tile has, then one.
                for n in [9, 1] {
                    twin.step(&mut [&mut pair], &[(vec![2; n], 0)]);
                }
            }
            // In the window, in a sealed block, in the first one, each time in a fork that goes on.
            for cut in [300, 150, 30] {
                let mut child = twin.fork(&pair);
                twin.truncate(&mut child, cut);
                twin.step(&mut [&mut child, &mut pair], &[(vec![3; 70], 70), (vec![1; 3], 0)]);
                for n in [70, 1] {
                    twin.step(&mut [&mut child], &[(vec![4; n], n)]);
                    twin.compare_sizes();
                }
            }
            // What has left the window is shared.
            let (mut other, matched) = twin.start(&[1; 321]);
            assert_eq!(matched, 256);
            twin.step(&mut [&mut other, &mut pair], &[(vec![1; 65], 65), (vec![1], 1)]);
            compare(&mut twin, &mut other);
        }
    });
}
