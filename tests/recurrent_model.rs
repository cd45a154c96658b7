//! States of recurrent layers through the C ABI: random operations against a list of tokens for each
//! sequence, from which the state that it must have follows. KVMGR_OPS sets the number of operations,
//! KVMGR_SEED replays a failure.

#![expect(unsafe_code, clippy::borrow_as_ptr, reason = "calls the C ABI as C does")]

mod common;

use std::ffi::CStr;
use std::ptr;

use common::Random;
use kvmgr::ffi::cache::*;
use kvmgr::ffi::recurrent::*;
use kvmgr::ffi::sequence::*;
use kvmgr::ffi::store::*;
use kvmgr::ffi::types::*;
use kvmgr::ffi::version::kvmgr_last_error_message;

const LAYERS: u32 = 2;
const BYTES: usize = 24;
const BLOCK: usize = 8;
const DIM: usize = 32;

fn message() -> String {
    // SAFETY: the library's buffer ends in NUL.
    unsafe { CStr::from_ptr(kvmgr_last_error_message()) }.to_string_lossy().into_owned()
}

fn cache_config(num_states: u64, snapshots: u32) -> kvmgr_cache_config {
    // SAFETY: the documentation says that all zeros are valid.
    let mut config: kvmgr_cache_config = unsafe { std::mem::zeroed() };
    config.struct_size = size_of::<kvmgr_cache_config>();
    (config.num_layers, config.num_q_heads, config.num_kv_heads) = (1, 1, 1);
    (config.head_dim, config.block_size) = (DIM as u32, BLOCK as u32);
    (config.num_blocks, config.num_threads, config.flags) = (60, 1, KVMGR_CACHE_PREFIX);
    (config.recurrent_layers, config.recurrent_bytes) = (LAYERS, BYTES as u64);
    (config.num_states, config.recurrent_snapshots) = (num_states, snapshots);
    config
}

/// The state of a layer after one more token.
fn advance(state: u64, token: i32, layer: u32) -> u64 {
    state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(token as u64 + u64::from(layer) + 1)
}

/// What the engine knows about a sequence.
#[derive(Debug, Clone)]
struct Expected {
    handle: *mut kvmgr_sequence,
    tokens: Vec<i32>,
    /// In the order in which they were taken.
    snapshots: Vec<usize>,
    preempted: bool,
}

impl Expected {
    /// The state of a layer in place, as three copies of a number.
    #[expect(clippy::mut_from_ref, reason = "the memory is the library's")]
    fn state(&self, layer: u32) -> &mut [u64] {
        let (mut address, mut bytes) = (ptr::null_mut(), 0);
        // SAFETY: a live handle and places.
        let status = unsafe {
            kvmgr_sequence_recurrent_state(self.handle, layer, &raw mut address, &raw mut bytes)
        };
        assert_eq!((status, bytes), (KVMGR_OK, BYTES), "{}", message());
        assert_eq!(address.addr() % 64, 0);
        // SAFETY: so many bytes, aligned, that nobody else uses meanwhile.
        unsafe { std::slice::from_raw_parts_mut(address.cast(), BYTES / 8) }
    }

    /// Puts the state right, as an engine that computed it elsewhere.
    fn write(&self, tokens: &[i32]) {
        for layer in 0..LAYERS {
            let state = tokens.iter().fold(0, |state, token| advance(state, *token, layer));
            self.state(layer).fill(state);
        }
    }

    fn check(&self) {
        let (mut length, mut count) = (0, 0);
        let mut lengths = [0; 64];
        // SAFETY: a live handle, places and room for 64 numbers.
        unsafe {
            assert_eq!(kvmgr_sequence_length(self.handle, &raw mut length), KVMGR_OK);
            let room = lengths.as_mut_ptr();
            let status = kvmgr_sequence_snapshots(self.handle, room, 64, &raw mut count);
            assert_eq!(status, KVMGR_OK, "{}", message());
        }
        let mut sorted = self.snapshots.clone();
        sorted.sort_unstable();
        assert_eq!((length, &lengths[..count]), (self.tokens.len(), &sorted[..]));
        for layer in (0..LAYERS).filter(|_| !self.preempted) {
            let state = self.tokens.iter().fold(0, |state, token| advance(state, *token, layer));
            assert_eq!(self.state(layer), [state; 3], "{} tokens", self.tokens.len());
        }
    }

    /// What the model loses when the tokens from `len` on go.
    fn shorten(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.snapshots.retain(|length| *length <= len);
    }
}

struct World {
    cache: *mut kvmgr_cache,
    store: *mut kvmgr_store,
    sequences: Vec<Expected>,
    max_snapshots: usize,
    random: Random,
    /// Matches that found something, rollbacks that worked, and those that were refused.
    seen: [usize; 3],
}

impl World {
    fn step(&mut self) {
        if self.sequences.is_empty() || (self.sequences.len() < 6 && self.random.chance(10)) {
            return self.create();
        }
        let i = self.random.below(self.sequences.len());
        if self.sequences[i].preempted && self.random.chance(50) {
            return self.swap(i);
        }
        match self.random.below(100) {
            0..=49 => self.extend(i),
            50..=64 => self.truncate(i),
            65..=72 => self.fork(i),
            73..=86 => self.destroy(i),
            87..=92 => self.swap(i),
            93 => self.end_prefill(i),
            _ => self.restore(i),
        }
        self.sequences.iter().for_each(Expected::check);
    }

    fn create(&mut self) {
        let mut handle = ptr::null_mut();
        // SAFETY: live handles and places.
        unsafe {
            let status = kvmgr_cache_sequence_create(self.cache, ptr::null(), &raw mut handle);
            if status == KVMGR_OUT_OF_BLOCKS {
                assert!(!self.sequences.is_empty() && handle.is_null(), "{}", message());
                return self.destroy(0);
            }
            assert_eq!(status, KVMGR_OK, "{}", message());
            let prompt: Vec<i32> = (0..self.random.below(60) as i32).collect();
            let mut matched = 99;
            let (tokens, out) = (prompt.as_ptr(), &raw mut matched);
            let status = kvmgr_sequence_match_prefix(handle, tokens, prompt.len(), out);
            assert_eq!(status, KVMGR_OK, "{}", message());
            assert!(matched <= prompt.len().saturating_sub(1) && matched % BLOCK == 0);
            self.seen[0] += usize::from(matched > 0);
            let tokens = prompt[..matched].to_vec();
            let sequence = Expected { handle, tokens, snapshots: Vec::new(), preempted: false };
            sequence.check();
            self.sequences.push(sequence);
        }
    }

    /// Takes a snapshot and notes it, unless none is left.
    fn snapshot(&mut self, i: usize, len: usize) {
        let sequence = &mut self.sequences[i];
        let status = kvmgr_sequence_snapshot(sequence.handle, len);
        if status == KVMGR_OUT_OF_BLOCKS {
            return;
        }
        assert_eq!(status, KVMGR_OK, "{}", message());
        sequence.snapshots.retain(|length| *length != len);
        sequence.snapshots.push(len);
        if sequence.snapshots.len() > self.max_snapshots {
            sequence.snapshots.remove(0);
        }
    }

    fn extend(&mut self, i: usize) {
        let sequence = &mut self.sequences[i];
        let (n, len) = (self.random.within(1, 12), sequence.tokens.len());
        let status = kvmgr_sequence_reserve(sequence.handle, n);
        if sequence.preempted {
            return assert_eq!(status, KVMGR_INVALID_STATE);
        }
        if status == KVMGR_OUT_OF_BLOCKS {
            return self.destroy(i);
        }
        assert_eq!(status, KVMGR_OK, "{}", message());
        let mut rows = vec![0.5f32; n * DIM];
        let rows = kvmgr_tensor {
            data: rows.as_mut_ptr().cast(),
            dtype: KVMGR_DTYPE_F32,
            ndim: 3,
            shape: [n as i64, 1, DIM as i64, 0],
            strides: [0; 4],
            device_type: kvmgr_device_type(0),
            device_id: 0,
        };
        // SAFETY: a live handle and tensors.
        let status = unsafe { kvmgr_sequence_append(sequence.handle, 0, &rows, &rows) };
        assert_eq!(status, KVMGR_OK, "{}", message());
        let odd = if self.random.chance(85) { 0 } else { 1000 };
        let drafts: Vec<i32> = (len as i32..(len + n) as i32).map(|t| t + odd).collect();
        let chance = self.random.pick(&[0, 30, 100]);
        for used in 0..=n {
            if let Some(draft) = used.checked_sub(1).map(|last| drafts[last]) {
                (0..LAYERS).for_each(|layer| {
                    let state = self.sequences[i].state(layer);
                    state.fill(advance(state[0], draft, layer));
                });
            }
            if self.random.chance(chance) {
                self.snapshot(i, len + used);
            }
        }
        let accepted = if self.random.chance(50) { n } else { self.random.below(n + 1) };
        self.commit(i, &drafts, accepted);
    }

    fn commit(&mut self, i: usize, drafts: &[i32], accepted: usize) {
        let sequence = &self.sequences[i];
        let len = sequence.tokens.len();
        let has_snapshot = sequence.snapshots.contains(&(len + accepted));
        let has_drafts = sequence.snapshots.iter().any(|length| *length > len);
        let mut text = sequence.tokens.clone();
        text.extend(&drafts[..accepted]);
        if accepted < drafts.len() && !has_snapshot && !has_drafts {
            sequence.write(&text);
        }
        let commit = |handle| {
            // SAFETY: a live handle and tokens.
            unsafe { kvmgr_sequence_commit(handle, drafts.as_ptr(), accepted) }
        };
        let mut status = commit(sequence.handle);
        if status == KVMGR_INVALID_STATE {
            assert!(accepted < drafts.len() && !has_snapshot && has_drafts, "{}", message());
            self.seen[2] += 1;
            sequence.write(&text);
            self.snapshot(i, len + accepted);
            if !self.sequences[i].snapshots.contains(&(len + accepted)) {
                return self.destroy(i);
            }
            status = commit(self.sequences[i].handle);
        }
        assert_eq!(status, KVMGR_OK, "{}", message());
        self.seen[1] += usize::from(accepted < drafts.len() && has_snapshot);
        let sequence = &mut self.sequences[i];
        sequence.tokens = text;
        sequence.shorten(len + accepted);
    }

    fn truncate(&mut self, i: usize) {
        let sequence = &mut self.sequences[i];
        let len = sequence.tokens.len();
        let n = match self.random.chance(60) {
            true if !sequence.snapshots.is_empty() => self.random.pick(&sequence.snapshots),
            _ => self.random.below(len + 2),
        };
        let status = kvmgr_sequence_truncate(sequence.handle, n);
        if sequence.preempted {
            assert_eq!(status, KVMGR_INVALID_STATE);
        } else if n > len {
            assert_eq!(status, KVMGR_INVALID_ARGUMENT);
        } else if sequence.snapshots.contains(&n) || n == 0 || n == len {
            assert_eq!(status, KVMGR_OK, "{}", message());
        } else if status != KVMGR_OK {
            assert_eq!(status, KVMGR_INVALID_STATE, "{}", message());
            assert!(message().contains("no snapshot"), "{}", message());
            self.seen[2] += 1;
        } else {
            assert_eq!(n % BLOCK, 0, "only a prefix knows more than the snapshots");
        }
        if status == KVMGR_OK {
            self.seen[1] += usize::from(0 < n && n < len);
            sequence.shorten(n);
        }
    }

    fn restore(&mut self, i: usize) {
        let sequence = &self.sequences[i];
        let len = sequence.tokens.len();
        if !sequence.preempted {
            (0..LAYERS).for_each(|layer| sequence.state(layer).fill(7));
        }
        match kvmgr_sequence_restore(sequence.handle, len) {
            KVMGR_OK => assert!(!sequence.preempted),
            status => {
                assert_eq!(status, KVMGR_INVALID_STATE, "{}", message());
                let is_known = sequence.snapshots.contains(&len) || len == 0;
                assert!(sequence.preempted || !is_known, "{}", message());
                if !sequence.preempted {
                    sequence.write(&sequence.tokens);
                }
            }
        }
        if !sequence.preempted {
            self.snapshot(i, len);
        }
    }

    /// From then on a policy evicts, and what it changes is not shared by prefix.
    fn end_prefill(&self, i: usize) {
        let sequence = &self.sequences[i];
        let status = kvmgr_sequence_end_prefill(sequence.handle);
        let is_full = status == KVMGR_OUT_OF_BLOCKS;
        assert!(is_full || (status == KVMGR_OK) != sequence.preempted, "{}", message());
    }

    fn fork(&mut self, i: usize) {
        let sequence = &self.sequences[i];
        let mut child = ptr::dangling_mut();
        // SAFETY: a live handle and a place.
        let status = unsafe { kvmgr_sequence_fork(sequence.handle, &raw mut child) };
        if status == KVMGR_OK {
            assert!(!sequence.preempted);
            let child = Expected { handle: child, ..sequence.clone() };
            return self.sequences.push(child);
        }
        assert!(child.is_null());
        let expected = if sequence.preempted { KVMGR_INVALID_STATE } else { KVMGR_OUT_OF_BLOCKS };
        assert_eq!(status, expected, "{}", message());
    }

    fn destroy(&mut self, i: usize) {
        kvmgr_sequence_destroy(self.sequences.swap_remove(i).handle);
    }

    fn swap(&mut self, i: usize) {
        let sequence = &mut self.sequences[i];
        if sequence.preempted {
            let status = kvmgr_sequence_resume(sequence.handle);
            assert!(matches!(status, KVMGR_OK | KVMGR_OUT_OF_BLOCKS), "{}", message());
            sequence.preempted = status != KVMGR_OK;
        } else {
            let status = kvmgr_sequence_preempt(sequence.handle, self.store);
            assert_eq!(status, KVMGR_OK, "{}", message());
            (sequence.preempted, sequence.snapshots) = (true, Vec::new());
        }
    }

    fn stats(&self) -> kvmgr_cache_stats {
        // SAFETY: zeros are valid; a live handle and a struct with its size.
        unsafe {
            let mut stats: kvmgr_cache_stats = std::mem::zeroed();
            stats.struct_size = size_of::<kvmgr_cache_stats>();
            assert_eq!(kvmgr_cache_get_stats(self.cache, &raw mut stats), KVMGR_OK);
            stats
        }
    }

    fn check_stats(&self) {
        let stats = self.stats();
        let present = self.sequences.iter().filter(|sequence| !sequence.preempted);
        let most: usize = present.clone().map(|sequence| 1 + sequence.snapshots.len()).sum();
        assert!((present.count()..=most).contains(&(stats.used_states as usize)), "{stats:?}");
        assert_eq!(stats.used_states + stats.idle_states + stats.free_states, stats.num_states);
        assert_eq!(stats.state_bytes_used, stats.used_states * 4096);
        assert_eq!(stats.state_bytes_idle, stats.idle_states * 4096);
        let least = stats.state_bytes_used + stats.state_bytes_idle;
        assert!((least..=least + 8 * 4096).contains(&stats.state_bytes_committed), "{stats:?}");
        assert!(stats.state_bytes_peak >= stats.state_bytes_used);
    }

    fn finish(mut self) -> [usize; 3] {
        while !self.sequences.is_empty() {
            self.destroy(0);
        }
        let stats = self.stats();
        assert_eq!((stats.used_states, stats.used_blocks, stats.num_sequences), (0, 0, 0));
        kvmgr_cache_release(self.cache);
        kvmgr_store_release(self.store);
        self.seen
    }
}

fn world(seed: u64) -> World {
    let mut random = Random(seed);
    let max_snapshots = random.within(1, 5);
    let num_states = random.within(4, 40) as u64;
    let (mut cache, mut store) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: valid configurations and places.
    unsafe {
        assert_eq!(kvmgr_store_create(c"host".as_ptr(), &raw mut store), KVMGR_OK);
        let mut config = cache_config(num_states, max_snapshots as u32);
        config.store = if random.chance(50) { store } else { ptr::null_mut() };
        let specs = [c"full", c"quant(q8_0, residual=12)", c"stream(sink=4, recent=20)"];
        config.spec = random.pick(&specs).as_ptr();
        assert_eq!(kvmgr_cache_create(&config, &raw mut cache), KVMGR_OK, "{}", message());
    }
    World { cache, store, sequences: Vec::new(), max_snapshots, random, seen: [0; 3] }
}

#[test]
fn random_operations_agree_with_a_model() {
    let variable = |name: &str, default: u64| {
        std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    let (ops, per_world) = (variable("KVMGR_OPS", 60_000), 2_000);
    let first = variable("KVMGR_SEED", 1);
    let mut seen = [0; 3];
    for seed in first..first + ops.div_ceil(per_world) {
        let run = || {
            let mut world = world(seed);
            for _ in 0..per_world {
                world.step();
                world.check_stats();
            }
            world.finish()
        };
        let result = std::panic::catch_unwind(run);
        let Ok(more) = result else {
            panic!("replay with KVMGR_SEED={seed} KVMGR_OPS={per_world} --test recurrent_model");
        };
        seen.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
    }
    eprintln!("{} matches, {} rollbacks, {} refused", seen[0], seen[1], seen[2]);
    assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
}

#[test]
fn bad_values_are_refused_by_name() {
    let mut cache: *mut kvmgr_cache = ptr::dangling_mut();
    let mut refuse = |change: &dyn Fn(&mut kvmgr_cache_config), text: &str| {
        let mut config = cache_config(4, 0);
        change(&mut config);
        // SAFETY: a configuration and a place.
        let status = unsafe { kvmgr_cache_create(&config, &raw mut cache) };
        assert_eq!(status, KVMGR_INVALID_ARGUMENT, "{text}: {}", message());
        assert!(message().contains(text) && cache.is_null(), "{text}: {}", message());
    };
    refuse(&|c| c.recurrent_layers = 0, "recurrent_layers is 0, but");
    refuse(&|c| c.recurrent_layers = 5000, "recurrent_layers is 5000");
    refuse(&|c| c.recurrent_bytes = 0, "recurrent_bytes is 0");
    refuse(&|c| c.recurrent_bytes = 1 << 31, "less than 4 GiB");
    refuse(&|c| c.num_states = 0, "num_states is 0");
    refuse(&|c| c.recurrent_snapshots = 2000, "recurrent_snapshots is 2000");

    let (mut sequence, mut state) = (ptr::null_mut(), ptr::dangling_mut());
    let config = cache_config(4, 0);
    // SAFETY: valid settings, places, and the documented bad values.
    unsafe {
        assert_eq!(kvmgr_cache_create(&config, &raw mut cache), KVMGR_OK);
        let status = kvmgr_cache_sequence_create(cache, ptr::null(), &raw mut sequence);
        assert_eq!(status, KVMGR_OK);
        let get =
            |layer, out| kvmgr_sequence_recurrent_state(sequence, layer, out, ptr::null_mut());
        assert_eq!(get(LAYERS, &raw mut state), KVMGR_INVALID_ARGUMENT);
        assert!(state.is_null() && message().contains("layer is 2"), "{}", message());
        assert_eq!(get(0, ptr::null_mut()), KVMGR_INVALID_ARGUMENT);
        assert_eq!(get(1, &raw mut state), KVMGR_OK, "the number of bytes is optional");
        assert_eq!(kvmgr_sequence_snapshot(sequence, 1), KVMGR_INVALID_ARGUMENT);
        assert_eq!(kvmgr_sequence_restore(sequence, usize::MAX), KVMGR_INVALID_ARGUMENT);
        assert_eq!(kvmgr_sequence_restore(ptr::null_mut(), 0), KVMGR_INVALID_HANDLE);
        let mut count = 0;
        assert_eq!(kvmgr_sequence_snapshot(sequence, 0), KVMGR_OK);
        let status = kvmgr_sequence_snapshots(sequence, ptr::null_mut(), 0, &raw mut count);
        assert_eq!((status, count), (KVMGR_OK, 1));
        let struct_size = size_of::<kvmgr_sequence_stats>();
        let mut stats = kvmgr_sequence_stats { struct_size, ..Default::default() };
        assert_eq!(kvmgr_sequence_get_stats(sequence, &raw mut stats), KVMGR_OK);
        assert_eq!((stats.state_bytes, stats.bytes), (2 * 4096, 0));
    }
    kvmgr_sequence_destroy(sequence);
    kvmgr_cache_release(cache);
}
