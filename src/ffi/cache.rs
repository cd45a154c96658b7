//! Caches: memory, policies, sharing and tiers as one.

use std::ffi::{c_char, c_void};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::convert::{self, RopeFields};
use super::guard::{guard, guard_or};
use super::handle::{self, Exclusive, Opaque};
use super::policy::{KVMGR_NEEDS_OUTPUT_PROJECTION, kvmgr_policy};
use super::pool::to_usize;
use super::recurrent;
use super::sequence::{SequenceHandle, kvmgr_sequence};
use super::store::kvmgr_store;
use super::types::{
    KVMGR_DEVICE_CPU, KVMGR_DEVICE_CUDA, KVMGR_LANE_AUTO, KVMGR_LANE_HEAD, KVMGR_LANE_LAYER,
    KVMGR_LANE_SEQUENCE, kvmgr_device_type, kvmgr_dtype, kvmgr_lane_width, kvmgr_rope_style,
    kvmgr_status, kvmgr_tensor,
};
use crate::cache::DeviceConfig;
use crate::device::cuda::Gpu;
use crate::dtype::DType;
use crate::error::{Result, bail, ensure};
use crate::log::{Level, log};
use crate::manager::{Manager, ManagerConfig, Session};
use crate::shape::{LaneWidth, ModelShape, Values};
use crate::simd;

/// The KV cache of a model: block memory, formats, policies, prefix sharing and offload as one.
/// Shared: retain and release, any thread.
#[derive(Debug)]
pub struct kvmgr_cache {
    _opaque: [u8; 0],
}

/// What a kvmgr_cache holds.
#[derive(Debug)]
pub(super) struct CacheHandle(pub(super) Arc<Manager>);

impl Opaque for kvmgr_cache {
    type Inner = CacheHandle;
    const NAME: &'static str = "kvmgr_cache";
}

/// Flag: full blocks are kept after their sequence ends and shared by prefix.
pub const KVMGR_CACHE_PREFIX: u32 = 1;

/// Flag: values are the first value_dim elements of keys, and nothing is stored for them. That is MLA
/// (DeepSeek-V2, arXiv 2405.04434) in its absorbed form: one KV head, a key is the latent (512 elements)
/// and the rotated part (64), all query heads attend to it, and a value is the latent. The engine's scale
/// is not 1 / sqrt(head_dim) then: say it in kvmgr_attention_options. Keys and values have one format, and
/// stages that change values are refused.
pub const KVMGR_CACHE_VALUES_IN_KEYS: u32 = 2;

/// Settings of a cache. Set struct_size to its sizeof; every other zero means the default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_cache_config {
    /// sizeof(kvmgr_cache_config).
    pub struct_size: usize,
    /// Layers with keys and values, 1 to 4096. In a hybrid model only these: they are numbered 0 to
    /// num_layers - 1 in all calls but kvmgr_sequence_recurrent_state, budgets are divided among them, and
    /// skip_layers of a spec counts them.
    pub num_layers: u32,
    /// Query heads of a layer, a multiple of num_kv_heads.
    pub num_q_heads: u32,
    /// Key/value heads of a layer, 1 to 4096.
    pub num_kv_heads: u32,
    /// Elements of a key, and of a value unless value_dim says otherwise, 1 to 1024.
    pub head_dim: u32,
    /// Tokens of a block, 1 to 1024; 0 means 32.
    pub block_size: u32,
    /// What one block table covers; 0 means the coarsest that the spec allows.
    pub lane_width: kvmgr_lane_width,
    /// Element type of blocks that still fill; 0 means KVMGR_DTYPE_F16.
    pub dtype: kvmgr_dtype,
    /// Workers of the library for calls with num_workers 0; 0 means one for each core.
    pub num_threads: u32,
    /// Blocks, over all lanes of all sequences; 1 to 2^31.
    pub num_blocks: u64,
    /// Bytes of block memory; 0 means num_blocks unquantized blocks. Addresses are reserved at
    /// once, memory is taken as blocks are used.
    pub memory_limit: u64,
    /// The pipeline of new sequences; NULL means "full". Copied.
    pub spec: *const c_char,
    /// The evictor's spec; NULL means "lru". Copied.
    pub evictor: *const c_char,
    /// Where reclaimed prefixes go; may be NULL. The cache keeps a reference.
    pub store: *mut kvmgr_store,
    /// The operator's secret that separates tenants' prefixes.
    pub hash_salt: u64,
    /// KVMGR_CACHE_PREFIX, KVMGR_CACHE_VALUES_IN_KEYS, both or 0.
    pub flags: u32,
    /// How the model rotates queries and keys; needed by specs with pos(cache_relative).
    pub rope_style: kvmgr_rope_style,
    /// Rotated elements of a head, even; 0 means head_dim - rope_first.
    pub rope_dims: u32,
    /// Base of the frequencies; 0 means 10000.
    pub rope_base: f32,
    /// rope_dims / 2 frequencies in radians for each position, or NULL for powers of rope_base.
    /// Copied.
    pub rope_inv_freq: *const f32,
    /// Where the blocks are; 0 means KVMGR_DEVICE_CPU. On KVMGR_DEVICE_CUDA: head_dim 64, 128 or
    /// 256, block_size 16, 32 or 64, up to 16 query heads for each KV head, dtype f16 or bf16, the
    /// spec "full" or quant of int8, int4, fp8(e4m3) or kivi with group at least 64 and head_dim, for
    /// keys and values alike, or int8 for keys and int4 for values, with block_size 64, and skip_layers,
    /// first and residual. With quest the first sequence takes 4 * head_dim bytes more from the driver for
    /// each layer and KV head of each of num_blocks blocks.
    /// A store has the bytes of the host, so one may serve caches on either.
    pub device_type: kvmgr_device_type,
    /// Which CUDA device. The cache works in the calling thread's current context if that is one of
    /// this device, else in the device's primary context; either must outlive the cache. No call
    /// changes which context is current.
    pub device_id: i32,
    /// The engine's own device memory for the blocks, memory_limit bytes, aligned to 256; or NULL:
    /// the cache takes memory_limit bytes from the driver. It must stay until the cache is gone and
    /// the device is done with it. CUDA only.
    pub memory: *mut c_void,
    /// Elements of a value and of an output, 1 to 1024, with KVMGR_CACHE_VALUES_IN_KEYS at most head_dim;
    /// 0 means head_dim.
    pub value_dim: u32,
    /// The first rotated element of a head: the latent of MLA comes before those that are rotated.
    pub rope_first: u32,
    /// Layers with a recurrent state (Mamba, RWKV, linear attention), 0 to 4096; 0 means none. They are
    /// numbered 0 to recurrent_layers - 1, apart from those with keys and values. See
    /// kvmgr_sequence_recurrent_state.
    pub recurrent_layers: u32,
    /// Snapshots of a sequence at most, 1 to 1024; 0 means 4. One more takes the place of the oldest.
    /// With one after each draft, as many as drafts and one.
    pub recurrent_snapshots: u32,
    /// Bytes of the state of a recurrent layer, 1 to less than 4 GiB for all layers together. What a layer
    /// keeps apart, as the convolution and the scan of Mamba, are parts of it.
    pub recurrent_bytes: u64,
    /// States of all recurrent layers that there can be, 1 to 2^20: one for each sequence, one for each
    /// snapshot, one for each prefix that keeps one. Sequences times (1 + recurrent_snapshots) never run
    /// out. They have memory of their own beside memory_limit, on the same device, whole pages each; on
    /// the host it is taken as they are used. Required with recurrent_layers.
    pub num_states: u64,
}

/// What a cache holds and has done. Set struct_size before the call. Bytes are bytes of blocks as
/// they are allocated.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct kvmgr_cache_stats {
    /// sizeof(kvmgr_cache_stats).
    pub struct_size: usize,
    /// Blocks of the cache.
    pub num_blocks: u64,
    /// Blocks nobody refers to.
    pub free_blocks: u64,
    /// Blocks that sequences refer to.
    pub used_blocks: u64,
    /// Blocks that only the prefix index refers to; reclaimed when needed.
    pub idle_blocks: u64,
    /// Bytes of used blocks.
    pub bytes_used: u64,
    /// Bytes of idle blocks.
    pub bytes_idle: u64,
    /// Bytes taken from the system; pages that were never written cost nothing yet.
    pub bytes_committed: u64,
    /// Largest bytes_used since creation or kvmgr_cache_reset_peak.
    pub bytes_peak: u64,
    /// Prefixes in the index.
    pub prefix_entries: u64,
    /// Tokens asked for in kvmgr_sequence_match_prefix since creation.
    pub prefix_query_tokens: u64,
    /// Tokens found there since creation.
    pub prefix_hit_tokens: u64,
    /// Prefixes reclaimed since creation.
    pub evictions: u64,
    /// Prefixes offloaded to the store since creation.
    pub store_puts: u64,
    /// Prefixes fetched from the store since creation.
    pub store_hits: u64,
    /// Failures of the store since creation; each counted as a miss.
    pub store_failures: u64,
    /// Tokens committed since creation.
    pub tokens_appended: u64,
    /// (layer, KV head) rows that policies evicted since creation.
    pub rows_evicted: u64,
    /// Live sequences.
    pub num_sequences: u64,
    /// States of recurrent layers that there can be. Those of all layers of a sequence are one, and the
    /// numbers of blocks and their bytes above do not count them.
    pub num_states: u64,
    /// States nobody refers to.
    pub free_states: u64,
    /// States of sequences, snapshots included.
    pub used_states: u64,
    /// States that only the prefix index refers to; dropped when needed.
    pub idle_states: u64,
    /// Bytes of used states.
    pub state_bytes_used: u64,
    /// Bytes of idle states.
    pub state_bytes_idle: u64,
    /// Bytes of states taken from the system: used, idle, and a few free ones.
    pub state_bytes_committed: u64,
    /// Largest state_bytes_used since creation or kvmgr_cache_reset_peak.
    pub state_bytes_peak: u64,
}

/// Makes a cache. A spec that needs what the engine cannot hand over is refused with the stage
/// and what is missing.
///
/// @param config settings; the model's shape and num_blocks are required
/// @param out_cache receives a handle with one reference; NULL on failure
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_cache_create(
    config: *const kvmgr_cache_config,
    out_cache: *mut *mut kvmgr_cache,
) -> kvmgr_status {
    guard(|| {
        if let Some(error) = simd::forced_error() {
            log(Level::Warn, format_args!("{error}"));
        }
        // SAFETY: the caller passes a place for a pointer.
        let out = unsafe { convert::handle_output(out_cache, "out_cache") }?;
        // SAFETY: the caller passes NULL or a struct that starts with its size.
        let config = unsafe { convert::config(config, "kvmgr_cache_config") }?;
        // SAFETY: the caller passes valid pointers inside the struct.
        let config = unsafe { parse_config(&config) }?;
        *out = handle::create(CacheHandle(Manager::new(config)?))?;
        Ok(())
    })
}

/// Adds a reference; answers the same handle, or NULL if it is not a live cache.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_cache_retain(cache: *mut kvmgr_cache) -> *mut kvmgr_cache {
    guard_or(std::ptr::null_mut(), || handle::retain(cache))
}

/// Drops a reference. NULL is fine. Sequences and attention handles keep the cache alive.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_cache_release(cache: *mut kvmgr_cache) {
    guard(|| handle::release(cache));
}

/// Numbers about a cache.
///
/// @param out_stats its struct_size must be set; receives the numbers
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_cache_get_stats(
    cache: *const kvmgr_cache,
    out_stats: *mut kvmgr_cache_stats,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a struct that starts with its size.
    guard(|| unsafe {
        handle::with(cache, |cache| {
            convert::fill_struct(out_stats, &stats_of(&cache.0), "kvmgr_cache_stats")
        })
    })
}

/// Starts a new bytes_peak, and state_bytes_peak, at what is used now.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_cache_reset_peak(cache: *mut kvmgr_cache) -> kvmgr_status {
    guard(|| {
        handle::with(cache.cast_const(), |cache| {
            cache.0.cache().reset_peak();
            Ok(())
        })
    })
}

/// Sets the CUDA stream that all work of a cache on a CUDA device is queued on: plans, appends, runs,
/// copies of blocks. At first it is the legacy default stream. The order of the stream is what makes it
/// safe to free blocks at once, so if work is still queued on the old one, the engine makes the new one
/// wait for it. Not while another thread uses the cache.
///
/// @param stream a CUstream (or cudaStream_t) of the cache's context; NULL is the legacy default stream
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_cache_set_stream(
    cache: *mut kvmgr_cache,
    stream: *mut c_void,
) -> kvmgr_status {
    guard(|| {
        handle::with(cache.cast_const(), |cache| match cache.0.cache().gpu() {
            Some(gpu) => {
                gpu.set_stream(stream);
                Ok(())
            }
            None => bail!(Unsupported, "the cache is in host memory, not on a CUDA device"),
        })
    })
}

/// Hands over what a policy needs to know of a layer once (kvmgr_policy_needs). The memory is not
/// copied: it must stay as it is until the cache is destroyed. A sequence whose policy needs it can
/// be made when every layer has it.
///
/// @param what KVMGR_NEEDS_OUTPUT_PROJECTION: weights is [hidden_size, num_q_heads * value_dim], row
///        i makes element i of the output
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_cache_set_weights(
    cache: *mut kvmgr_cache,
    layer: u32,
    what: u32,
    weights: *const kvmgr_tensor,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a tensor that stays readable.
    guard(|| unsafe {
        handle::with(cache.cast_const(), |cache| {
            ensure!(
                what == KVMGR_NEEDS_OUTPUT_PROJECTION,
                InvalidArgument,
                "what is {what}, must be KVMGR_NEEDS_OUTPUT_PROJECTION"
            );
            let weights = convert::matrix(weights, "weights")?;
            cache.0.set_output_projection(layer as usize, weights)
        })
    })
}

/// Makes an empty sequence. KVMGR_OUT_OF_BLOCKS if the model has recurrent layers and no state is left.
///
/// @param policy the policy of this sequence, without quant(...), or NULL for the cache's spec
/// @param out_sequence receives an exclusive handle; NULL on failure
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_cache_sequence_create(
    cache: *mut kvmgr_cache,
    policy: *const kvmgr_policy,
    out_sequence: *mut *mut kvmgr_sequence,
) -> kvmgr_status {
    // SAFETY: the caller passes handles and a place for a pointer.
    guard(|| unsafe {
        let out = convert::handle_output(out_sequence, "out_sequence")?;
        handle::with(cache, |cache| {
            let policy = match policy.is_null() {
                true => None,
                false => Some(handle::borrow(policy)?.0.clone()),
            };
            let session = Session::new(&cache.0, policy)?;
            *out = handle::create(SequenceHandle(Exclusive::new(session)))?;
            Ok(())
        })
    })
}

/// # Safety
/// The pointers in `config` are NULL or valid for what their fields say.
unsafe fn parse_config(config: &kvmgr_cache_config) -> Result<ManagerConfig> {
    let shape = ModelShape::new(
        config.num_layers as usize,
        config.num_q_heads as usize,
        config.num_kv_heads as usize,
        config.head_dim as usize,
    );
    let flags = config.flags;
    let known = KVMGR_CACHE_PREFIX | KVMGR_CACHE_VALUES_IN_KEYS;
    ensure!(flags & !known == 0, InvalidArgument, "flags has unknown bits {flags:#x}");
    let value_dim = if config.value_dim == 0 { config.head_dim } else { config.value_dim } as usize;
    let values = match flags & KVMGR_CACHE_VALUES_IN_KEYS {
        0 => Values::Own(value_dim),
        _ => Values::InKeys(value_dim),
    };
    let shape = ModelShape { values, ..shape };
    shape.validate()?;
    let lane_width = match config.lane_width {
        KVMGR_LANE_AUTO => None,
        KVMGR_LANE_SEQUENCE => Some(LaneWidth::Sequence),
        KVMGR_LANE_LAYER => Some(LaneWidth::Layer),
        KVMGR_LANE_HEAD => Some(LaneWidth::Head),
        kvmgr_lane_width(value) => {
            bail!(InvalidArgument, "lane_width is {value}, not a kvmgr_lane_width")
        }
    };
    let dtype = match config.dtype {
        kvmgr_dtype(0) => DType::F16,
        dtype => dtype.parse("dtype")?,
    };
    // SAFETY: the caller promises strings.
    let (spec, evictor) =
        unsafe { (convert::text(config.spec, "spec")?, convert::text(config.evictor, "evictor")?) };
    let store = match config.store.is_null() {
        true => None,
        false => Some(handle::borrow(config.store.cast_const())?.0.clone()),
    };
    Ok(ManagerConfig {
        shape,
        block_size: if config.block_size == 0 { 32 } else { config.block_size as usize },
        lane_width,
        dtype,
        num_threads: config.num_threads.min(1024) as usize,
        num_blocks: to_usize(config.num_blocks, "num_blocks")?,
        memory_limit: to_usize(config.memory_limit, "memory_limit")?,
        spec: spec.unwrap_or("full").to_string(),
        evictor: evictor.unwrap_or("lru").to_string(),
        salt: config.hash_salt,
        prefix: flags & KVMGR_CACHE_PREFIX != 0,
        // SAFETY: the caller promises the frequencies.
        rope: unsafe {
            convert::rope(&RopeFields {
                style: config.rope_style,
                first: config.rope_first,
                dims: config.rope_dims,
                base: config.rope_base,
                inv_freq: config.rope_inv_freq,
                head_dim: config.head_dim,
            })
        }?,
        store,
        device: parse_device(config)?,
        recurrent: recurrent::parse(config)?,
    })
}

fn parse_device(config: &kvmgr_cache_config) -> Result<Option<DeviceConfig>> {
    let (id, memory) = (config.device_id, config.memory.addr() as u64);
    match config.device_type {
        kvmgr_device_type(0) | KVMGR_DEVICE_CPU => {
            ensure!(memory == 0, Unsupported, "memory is given, but device_type is not CUDA");
            Ok(None)
        }
        KVMGR_DEVICE_CUDA => {
            let Ok(id) = u32::try_from(id) else {
                bail!(InvalidArgument, "device_id is {id}, must be at least 0")
            };
            ensure!(
                memory == 0 || config.memory_limit > 0,
                InvalidArgument,
                "memory is given, but memory_limit is 0: how long is it?"
            );
            Ok(Some(DeviceConfig { gpu: Gpu::open(id)?, memory }))
        }
        kvmgr_device_type(value) => {
            bail!(InvalidArgument, "device_type is {value}, not a kvmgr_device_type")
        }
    }
}

fn stats_of(manager: &Manager) -> kvmgr_cache_stats {
    let stats = manager.stats();
    let counters = &manager.cache().counters;
    let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    kvmgr_cache_stats {
        struct_size: 0,
        num_blocks: stats.cache.num_blocks,
        free_blocks: stats.cache.free_blocks,
        used_blocks: stats.cache.used_blocks,
        idle_blocks: stats.cache.idle_blocks,
        bytes_used: stats.cache.bytes_used,
        bytes_idle: stats.cache.bytes_idle,
        bytes_committed: stats.cache.bytes_committed,
        bytes_peak: stats.cache.bytes_peak,
        prefix_entries: stats.cache.prefix_entries,
        prefix_query_tokens: load(&counters.prefix_query_tokens),
        prefix_hit_tokens: load(&counters.prefix_hit_tokens),
        evictions: stats.cache.evictions,
        store_puts: stats.store_puts,
        store_hits: stats.store_hits,
        store_failures: stats.store_failures,
        tokens_appended: load(&counters.tokens_appended),
        rows_evicted: load(&counters.tokens_evicted),
        num_sequences: load(&counters.num_sequences),
        num_states: stats.cache.states.num_states,
        free_states: stats.cache.states.free_states,
        used_states: stats.cache.states.used_states,
        idle_states: stats.cache.states.idle_states,
        state_bytes_used: stats.cache.states.bytes_used,
        state_bytes_idle: stats.cache.states.bytes_idle,
        state_bytes_committed: stats.cache.states.bytes_committed,
        state_bytes_peak: stats.cache.states.bytes_peak,
    }
}
