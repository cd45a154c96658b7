//! Random operations through the C ABI against a simple model: a list of positions for each
//! sequence. KVMGR_OPS sets the number of operations (1 million takes minutes), KVMGR_SEED replays
//! a failure.

#![expect(unsafe_code, clippy::borrow_as_ptr, reason = "calls the C ABI as C does")]

mod common;

use std::ffi::CStr;
use std::ptr;

use common::Random;
use kvmgr::ffi::attention::*;
use kvmgr::ffi::cache::*;
use kvmgr::ffi::pool::*;
use kvmgr::ffi::sequence::*;
use kvmgr::ffi::store::*;
use kvmgr::ffi::types::*;
use kvmgr::ffi::version::kvmgr_last_error_message;

const LAYERS: u32 = 2;
const HEADS: usize = 2;
const DIM: usize = 32;

fn message() -> String {
    // SAFETY: the library's buffer ends in NUL.
    unsafe { CStr::from_ptr(kvmgr_last_error_message()) }.to_string_lossy().into_owned()
}

fn tensor(data: &mut [f32], tokens: usize, heads: usize) -> kvmgr_tensor {
    kvmgr_tensor {
        data: data.as_mut_ptr().cast(),
        dtype: KVMGR_DTYPE_F32,
        ndim: 3,
        shape: [tokens as i64, heads as i64, DIM as i64, 0],
        strides: [0; 4],
        device_type: kvmgr_device_type(0),
        device_id: 0,
    }
}

fn cache_config(spec: &CStr, num_blocks: u64) -> kvmgr_cache_config {
    // SAFETY: the documentation says that all zeros are valid.
    let mut config: kvmgr_cache_config = unsafe { std::mem::zeroed() };
    config.struct_size = size_of::<kvmgr_cache_config>();
    config.num_layers = LAYERS;
    config.num_q_heads = HEADS as u32 * 2;
    config.num_kv_heads = HEADS as u32;
    config.head_dim = DIM as u32;
    config.block_size = 8;
    config.num_blocks = num_blocks;
    config.num_threads = 1;
    config.spec = spec.as_ptr();
    config.flags = KVMGR_CACHE_PREFIX;
    config
}

/// What the model knows about a sequence.
#[derive(Debug, Clone)]
struct Expected {
    handle: *mut kvmgr_sequence,
    tokens: Vec<i32>,
    reserved: usize,
    preempted: bool,
}

struct World {
    cache: *mut kvmgr_cache,
    store: *mut kvmgr_store,
    attention: *mut kvmgr_attention,
    sequences: Vec<Expected>,
    dead: Vec<*mut kvmgr_sequence>,
    random: Random,
}

impl World {
    fn step(&mut self) {
        if self.sequences.is_empty() || (self.sequences.len() < 12 && self.random.chance(8)) {
            return self.create();
        }
        let i = self.random.below(self.sequences.len());
        match self.random.below(100) {
            0..=34 => self.extend(i),
            35..=44 => self.truncate(i),
            45..=52 => self.fork(i),
            53..=62 => self.destroy(i),
            63..=69 => self.swap(i),
            70..=84 => self.attend(i),
            85..=89 => self.misuse(i),
            _ => self.check(i),
        }
    }

    fn create(&mut self) {
        let mut handle = ptr::null_mut();
        // SAFETY: live handles and places.
        unsafe {
            let status = kvmgr_cache_sequence_create(self.cache, ptr::null(), &raw mut handle);
            assert_eq!(status, KVMGR_OK, "{}", message());
            // Prompts start alike, so that prefixes match.
            let tokens: Vec<i32> = (0..self.random.below(40) as i32).collect();
            let mut matched = 99;
            let status = kvmgr_sequence_match_prefix(
                handle,
                tokens.as_ptr(),
                tokens.len(),
                &raw mut matched,
            );
            assert_eq!(status, KVMGR_OK, "{}", message());
            assert!(matched <= tokens.len().saturating_sub(1) && matched % 8 == 0);
            let tokens = tokens[..matched].to_vec();
            self.sequences.push(Expected { handle, tokens, reserved: 0, preempted: false });
        }
    }

    fn extend(&mut self, i: usize) {
        let n = self.random.within(1, 20);
        let sequence = &mut self.sequences[i];
        let status = kvmgr_sequence_reserve(sequence.handle, n);
        if sequence.preempted {
            assert_eq!(status, KVMGR_INVALID_STATE);
            return;
        }
        if status == KVMGR_OUT_OF_BLOCKS {
            return self.destroy(i);
        }
        assert_eq!(status, KVMGR_OK, "{}", message());
        sequence.reserved += n;
        if self.random.chance(20) {
            return; // Left reserved; commit or truncate comes later.
        }
        let reserved = sequence.reserved;
        let mut rows = vec![0.5; reserved * HEADS * DIM];
        let view = tensor(&mut rows, reserved, HEADS);
        for layer in 0..LAYERS {
            // SAFETY: a live handle and tensors.
            let status = unsafe { kvmgr_sequence_append(sequence.handle, layer, &view, &view) };
            assert_eq!(status, KVMGR_OK, "{}", message());
        }
        let accepted = reserved - self.random.below(2).min(reserved);
        let start = sequence.tokens.len() as i32;
        let odd = if self.random.chance(70) { 0 } else { 1000 };
        let tokens: Vec<i32> = (start..start + accepted as i32).map(|t| t + odd).collect();
        // SAFETY: a live handle and tokens.
        let status = unsafe { kvmgr_sequence_commit(sequence.handle, tokens.as_ptr(), accepted) };
        assert_eq!(status, KVMGR_OK, "{}", message());
        sequence.tokens.extend(tokens);
        sequence.reserved = 0;
    }

    fn truncate(&mut self, i: usize) {
        let len = self.sequences[i].tokens.len();
        let n = self.random.below(len + 2);
        let sequence = &mut self.sequences[i];
        let status = kvmgr_sequence_truncate(sequence.handle, n);
        if sequence.preempted {
            assert_eq!(status, KVMGR_INVALID_STATE);
        } else if n > len {
            assert_eq!(status, KVMGR_INVALID_ARGUMENT);
        } else {
            assert_eq!(status, KVMGR_OK, "{}", message());
            sequence.tokens.truncate(n);
            sequence.reserved = 0;
        }
    }

    fn fork(&mut self, i: usize) {
        let sequence = &self.sequences[i];
        let mut child = ptr::dangling_mut();
        // SAFETY: a live handle and a place.
        let status = unsafe { kvmgr_sequence_fork(sequence.handle, &raw mut child) };
        if sequence.preempted || sequence.reserved > 0 {
            assert_eq!(status, KVMGR_INVALID_STATE);
            assert!(child.is_null());
            return;
        }
        assert_eq!(status, KVMGR_OK, "{}", message());
        let child = Expected { handle: child, ..sequence.clone() };
        self.sequences.push(child);
    }

    fn destroy(&mut self, i: usize) {
        let sequence = self.sequences.swap_remove(i);
        kvmgr_sequence_destroy(sequence.handle);
        self.dead.push(sequence.handle);
        if self.dead.len() > 100 {
            self.dead.remove(0);
        }
    }

    fn swap(&mut self, i: usize) {
        let sequence = &mut self.sequences[i];
        if sequence.preempted {
            let status = kvmgr_sequence_resume(sequence.handle);
            assert!(matches!(status, KVMGR_OK | KVMGR_OUT_OF_BLOCKS), "{}", message());
            sequence.preempted = status != KVMGR_OK;
        } else {
            let status = kvmgr_sequence_preempt(sequence.handle, self.store);
            if sequence.reserved > 0 {
                assert_eq!(status, KVMGR_INVALID_STATE);
            } else {
                assert_eq!(status, KVMGR_OK, "{}", message());
                sequence.preempted = true;
            }
        }
    }

    fn attend(&mut self, i: usize) {
        let sequence = &self.sequences[i];
        let one = 1;
        // SAFETY: live handles and arrays of one.
        let status = unsafe { kvmgr_attention_plan(self.attention, &sequence.handle, &one, 1) };
        if sequence.preempted {
            assert_eq!(status, KVMGR_INVALID_STATE);
            return;
        }
        if sequence.tokens.len() + sequence.reserved == 0 {
            assert_eq!(status, KVMGR_INVALID_ARGUMENT);
            return;
        }
        assert_eq!(status, KVMGR_OK, "{}", message());
        let (mut q, mut o) = (vec![0.1; 2 * HEADS * DIM], vec![f32::NAN; 2 * HEADS * DIM]);
        let (query, output) = (tensor(&mut q, 1, 2 * HEADS), tensor(&mut o, 1, 2 * HEADS));
        // SAFETY: a live handle and tensors.
        let status = unsafe {
            kvmgr_attention_run(self.attention, 1, &query, &output, ptr::null(), ptr::null(), 0, 1)
        };
        if sequence.reserved > 0 {
            assert_eq!(status, KVMGR_INVALID_STATE, "unwritten rows must stay invisible");
            return;
        }
        assert_eq!(status, KVMGR_OK, "{}", message());
        // Every value is 0.5, so is their mean.
        assert!(o.iter().all(|x| (x - 0.5).abs() < 1e-2), "{o:?}");
    }

    fn misuse(&mut self, i: usize) {
        let handle = self.sequences[i].handle;
        let mut number = 77;
        // SAFETY: every pointer is a place or one of the documented bad values.
        unsafe {
            if let Some(stale) = self.dead.last() {
                let status = kvmgr_sequence_length(*stale, &raw mut number);
                assert_eq!((status, number), (KVMGR_INVALID_HANDLE, 77));
                kvmgr_sequence_destroy(*stale);
            }
            let status = kvmgr_sequence_length(handle.cast_const(), ptr::null_mut());
            assert_eq!(status, KVMGR_INVALID_ARGUMENT);
            let status = kvmgr_sequence_kept(handle, LAYERS, 0, &raw mut number);
            assert_eq!(status, KVMGR_INVALID_ARGUMENT);
            let status = kvmgr_sequence_length(self.cache.cast(), &raw mut number);
            assert_eq!((status, number), (KVMGR_INVALID_HANDLE, 77));
            assert_eq!(kvmgr_sequence_reserve(ptr::null_mut(), 1), KVMGR_INVALID_HANDLE);
            let status = kvmgr_sequence_commit(handle, ptr::null(), 1 << 40);
            assert!(status != KVMGR_OK);
        }
    }

    fn check(&mut self, i: usize) {
        let sequence = &self.sequences[i];
        let (mut length, mut count) = (0, 0);
        // SAFETY: a live handle and places.
        unsafe {
            let status = kvmgr_sequence_length(sequence.handle, &raw mut length);
            assert_eq!(status, KVMGR_OK);
            assert_eq!(length, sequence.tokens.len());
            let total = length + sequence.reserved;
            let mut positions = vec![0; total + 1];
            let status = kvmgr_sequence_positions(
                sequence.handle,
                1,
                1,
                positions.as_mut_ptr(),
                total + 1,
                &raw mut count,
            );
            assert_eq!(status, KVMGR_OK, "{}", message());
            assert_eq!(count, total);
            assert!(positions[..count].iter().enumerate().all(|(i, p)| *p == i as i32));
        }
    }

    fn finish(mut self) {
        while !self.sequences.is_empty() {
            self.destroy(0);
        }
        // SAFETY: zeros are valid; live handles.
        unsafe {
            let mut stats: kvmgr_cache_stats = std::mem::zeroed();
            stats.struct_size = size_of::<kvmgr_cache_stats>();
            assert_eq!(kvmgr_cache_get_stats(self.cache, &raw mut stats), KVMGR_OK);
            assert_eq!((stats.bytes_used, stats.used_blocks, stats.num_sequences), (0, 0, 0));
            assert_eq!(stats.free_blocks + stats.idle_blocks, stats.num_blocks);
            let mut store: kvmgr_store_stats = std::mem::zeroed();
            store.struct_size = size_of::<kvmgr_store_stats>();
            assert_eq!(kvmgr_store_get_stats(self.store, &raw mut store), KVMGR_OK);
            assert_eq!(store.objects, 0, "preempted sequences leave nothing behind");
        }
        kvmgr_attention_destroy(self.attention);
        kvmgr_cache_release(self.cache);
        kvmgr_store_release(self.store);
    }
}

fn world(seed: u64) -> World {
    let specs = [
        c"full",
        c"quant(q8_0)",
        c"quant(k=had+q4_0, v=q4_0)",
        c"quant(q8_0, first=5, residual=20)",
    ];
    let (mut cache, mut store, mut attention) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
    let mut random = Random(seed);
    let mut config = cache_config(random.pick(&specs), 60 + random.below(200) as u64);
    config.lane_width = kvmgr_lane_width(random.within(1, 3) as u32);
    // SAFETY: valid configurations and places.
    unsafe {
        assert_eq!(kvmgr_cache_create(&config, &raw mut cache), KVMGR_OK, "{}", message());
        assert_eq!(kvmgr_store_create(c"host".as_ptr(), &raw mut store), KVMGR_OK);
        assert_eq!(kvmgr_attention_create(cache, &raw mut attention), KVMGR_OK);
    }
    World { cache, store, attention, sequences: Vec::new(), dead: Vec::new(), random }
}

#[test]
fn random_operations_agree_with_a_model() {
    let variable = |name: &str, default: u64| {
        std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    let ops = variable("KVMGR_OPS", 1_000_000);
    let per_world = 10_000;
    let first = variable("KVMGR_SEED", 1);
    for seed in first..first + ops.div_ceil(per_world) {
        let run = || {
            let mut world = world(seed);
            (0..per_world).for_each(|_| world.step());
            world.finish();
        };
        let result = std::panic::catch_unwind(run);
        assert!(
            result.is_ok(),
            "replay with KVMGR_SEED={seed} KVMGR_OPS={per_world} cargo test --test model"
        );
    }
}

#[test]
fn bad_configurations_are_refused_by_name() {
    let mut cache: *mut kvmgr_cache = ptr::dangling_mut();
    let mut refuse = |change: &dyn Fn(&mut kvmgr_cache_config), status, text: &str| {
        let mut config = cache_config(c"full", 16);
        change(&mut config);
        // SAFETY: a configuration and a place.
        let found = unsafe { kvmgr_cache_create(&config, &raw mut cache) };
        assert_eq!(found, status, "{text}: {}", message());
        assert!(message().contains(text), "{text}: {}", message());
        assert!(cache.is_null());
    };
    refuse(&|c| c.struct_size = 0, KVMGR_INVALID_ARGUMENT, "struct_size is 0");
    refuse(&|c| c.struct_size = 1 << 30, KVMGR_INVALID_ARGUMENT, "struct_size");
    refuse(&|c| c.num_layers = 0, KVMGR_INVALID_ARGUMENT, "num_layers is 0");
    refuse(&|c| c.num_q_heads = 3, KVMGR_INVALID_ARGUMENT, "num_q_heads is 3");
    refuse(&|c| c.head_dim = 5000, KVMGR_INVALID_ARGUMENT, "head_dim is 5000");
    refuse(&|c| c.num_blocks = 0, KVMGR_INVALID_ARGUMENT, "num_blocks is 0");
    let text = "num_blocks is 2147483649, must be in 1..=2147483648";
    refuse(&|c| c.num_blocks = (1 << 31) + 1, KVMGR_INVALID_ARGUMENT, text);
    refuse(&|c| c.block_size = 5000, KVMGR_INVALID_ARGUMENT, "block_size is 5000");
    refuse(&|c| c.dtype = kvmgr_dtype(9), KVMGR_INVALID_ARGUMENT, "dtype is 9");
    refuse(&|c| c.lane_width = kvmgr_lane_width(9), KVMGR_INVALID_ARGUMENT, "lane_width is 9");
    refuse(&|c| c.rope_style = kvmgr_rope_style(7), KVMGR_INVALID_ARGUMENT, "rope_style is 7");
    refuse(&|c| c.flags = 64, KVMGR_INVALID_ARGUMENT, "flags");
    refuse(&|c| c.value_dim = 2000, KVMGR_INVALID_ARGUMENT, "value_dim is 2000");
    let latent = |c: &mut kvmgr_cache_config| {
        (c.flags, c.value_dim) = (KVMGR_CACHE_VALUES_IN_KEYS, c.head_dim + 1);
    };
    refuse(&latent, KVMGR_INVALID_ARGUMENT, "value_dim is");
    let rotated = |c: &mut kvmgr_cache_config| {
        (c.rope_style, c.rope_dims, c.rope_first) = (KVMGR_ROPE_HALF, c.head_dim, 2);
    };
    refuse(&rotated, KVMGR_INVALID_ARGUMENT, "rope_first is 2, must be at most 0");
    for first in [1, 64, 1 << 31] {
        let behind = |c: &mut kvmgr_cache_config| {
            (c.rope_style, c.rope_first) = (KVMGR_ROPE_HALF, first);
        };
        let text = format!("rope_first is {first}, must leave");
        refuse(&behind, KVMGR_INVALID_ARGUMENT, &text);
    }
    refuse(&|c| c.evictor = c"mru".as_ptr(), KVMGR_INVALID_ARGUMENT, "mru");
    refuse(&|c| c.spec = c"snapkv | snap".as_ptr(), KVMGR_INVALID_ARGUMENT, "column 10");
    refuse(&|c| c.store = ptr::without_provenance_mut(64), KVMGR_INVALID_HANDLE, "kvmgr_store");
    let rope = c"stream(4, 60) | pos(cache_relative)";
    refuse(&|c| c.spec = rope.as_ptr(), KVMGR_UNSUPPORTED, "ROPE");
    let wide = |c: &mut kvmgr_cache_config| {
        c.spec = c"snapkv | keep(0.5)".as_ptr();
        c.lane_width = KVMGR_LANE_SEQUENCE;
    };
    refuse(&wide, KVMGR_UNSUPPORTED, "snapkv");
    // SAFETY: the documented bad values.
    unsafe {
        let config = cache_config(c"full", 16);
        assert_eq!(kvmgr_cache_create(ptr::null(), &raw mut cache), KVMGR_INVALID_ARGUMENT);
        assert_eq!(kvmgr_cache_create(&config, ptr::null_mut()), KVMGR_INVALID_ARGUMENT);
        let mut pool: *mut kvmgr_pool = ptr::null_mut();
        assert_eq!(kvmgr_pool_create(ptr::null(), &raw mut pool), KVMGR_INVALID_ARGUMENT);
    }
}
