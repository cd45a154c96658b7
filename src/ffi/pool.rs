//! Pools: block bookkeeping without memory, for engines with their own tensors.

use std::ffi::c_char;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::convert;
use super::guard::{guard, guard_or};
use super::handle::{self, Exclusive, Opaque};
use super::sequence::{SequenceHandle, kvmgr_sequence};
use super::types::kvmgr_status;
use crate::cache::{Cache, CacheConfig};
use crate::error::{Result, bail, ensure};
use crate::manager::Session;
use crate::shape::{LaneWidth, ModelShape};

/// A paged block allocator with reference counts, copy-on-write forks and a prefix index, for an
/// engine whose keys and values are in its own memory. Shared: retain and release, any thread.
#[derive(Debug)]
pub struct kvmgr_pool {
    _opaque: [u8; 0],
}

/// What a kvmgr_pool holds.
#[derive(Debug)]
pub(super) struct PoolHandle(Arc<Cache>);

impl Opaque for kvmgr_pool {
    type Inner = PoolHandle;
    const NAME: &'static str = "kvmgr_pool";
}

/// Flag: full blocks are kept after their sequence ends and shared by prefix.
pub const KVMGR_POOL_PREFIX: u32 = 1;

/// Settings of a pool. Set struct_size to its sizeof; every other zero means the default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_pool_config {
    /// sizeof(kvmgr_pool_config).
    pub struct_size: usize,
    /// Blocks, at least 1.
    pub num_blocks: u64,
    /// Tokens of a block, 1 to 1024; 0 means 16.
    pub block_size: u32,
    /// KVMGR_POOL_PREFIX or 0.
    pub flags: u32,
    /// The evictor's spec; NULL means "lru".
    pub evictor: *const c_char,
    /// The operator's secret that separates tenants' prefixes.
    pub hash_salt: u64,
}

/// What a pool holds. Set struct_size before the call.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct kvmgr_pool_stats {
    /// sizeof(kvmgr_pool_stats).
    pub struct_size: usize,
    /// Blocks of the pool.
    pub num_blocks: u64,
    /// Blocks nobody refers to.
    pub free_blocks: u64,
    /// Blocks that sequences refer to.
    pub used_blocks: u64,
    /// Blocks that only the prefix index refers to; reclaimed when needed.
    pub idle_blocks: u64,
    /// Prefixes in the index.
    pub prefix_entries: u64,
    /// Tokens asked for in kvmgr_sequence_match_prefix since creation.
    pub prefix_query_tokens: u64,
    /// Tokens found there since creation.
    pub prefix_hit_tokens: u64,
    /// Prefixes reclaimed since creation.
    pub evictions: u64,
}

/// Makes a pool.
///
/// @param config settings; num_blocks is required
/// @param out_pool receives a handle with one reference; NULL on failure
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_create(
    config: *const kvmgr_pool_config,
    out_pool: *mut *mut kvmgr_pool,
) -> kvmgr_status {
    guard(|| {
        // SAFETY: the caller passes a place for a pointer.
        let out = unsafe { convert::handle_output(out_pool, "out_pool") }?;
        // SAFETY: the caller passes NULL or a struct that starts with its size.
        let config = unsafe { convert::config(config, "kvmgr_pool_config") }?;
        // SAFETY: the caller passes NULL or a NUL-terminated string.
        let evictor = unsafe { convert::text(config.evictor, "evictor") }?;
        let flags = config.flags;
        ensure!(
            flags & !KVMGR_POOL_PREFIX == 0,
            InvalidArgument,
            "flags has unknown bits {flags:#x}"
        );
        let cache = Cache::new(CacheConfig {
            shape: ModelShape { num_layers: 1, num_q_heads: 1, num_kv_heads: 1, head_dim: 1 },
            block_size: if config.block_size == 0 { 16 } else { config.block_size as usize },
            lane_width: LaneWidth::Sequence,
            num_blocks: to_usize(config.num_blocks, "num_blocks")?,
            memory_limit: 0,
            memory: None,
            evictor: evictor.unwrap_or("lru").to_string(),
            salt: config.hash_salt,
            prefix: flags & KVMGR_POOL_PREFIX != 0,
            rope: None,
        })?;
        *out = handle::create(PoolHandle(cache))?;
        Ok(())
    })
}

/// Adds a reference; answers the same handle, or NULL if it is not a live pool.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_pool_retain(pool: *mut kvmgr_pool) -> *mut kvmgr_pool {
    guard_or(std::ptr::null_mut(), || handle::retain(pool))
}

/// Drops a reference. NULL is fine. Sequences keep the pool alive.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_pool_release(pool: *mut kvmgr_pool) {
    guard(|| handle::release(pool));
}

/// Numbers about a pool.
///
/// @param out_stats its struct_size must be set; receives the numbers
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_get_stats(
    pool: *const kvmgr_pool,
    out_stats: *mut kvmgr_pool_stats,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a struct that starts with its size.
    guard(|| unsafe {
        handle::with(pool, |pool| {
            let (stats, counters) = (pool.0.stats(), &pool.0.counters);
            let stats = kvmgr_pool_stats {
                struct_size: 0,
                num_blocks: stats.num_blocks,
                free_blocks: stats.free_blocks,
                used_blocks: stats.used_blocks,
                idle_blocks: stats.idle_blocks,
                prefix_entries: stats.prefix_entries,
                prefix_query_tokens: counters.prefix_query_tokens.load(Ordering::Relaxed),
                prefix_hit_tokens: counters.prefix_hit_tokens.load(Ordering::Relaxed),
                evictions: stats.evictions,
            };
            convert::fill_struct(out_stats, &stats, "kvmgr_pool_stats")
        })
    })
}

/// Makes an empty sequence whose block table the engine reads with kvmgr_sequence_block_table and
/// kvmgr_sequence_slot_mapping (layer 0, KV head 0 for all layers and heads).
///
/// @param out_sequence receives an exclusive handle; NULL on failure
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_sequence_create(
    pool: *mut kvmgr_pool,
    out_sequence: *mut *mut kvmgr_sequence,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a place for a pointer.
    guard(|| unsafe {
        let out = convert::handle_output(out_sequence, "out_sequence")?;
        handle::with(pool, |pool| {
            let session = Session::of_pool(&pool.0)?;
            *out = handle::create(SequenceHandle(Exclusive::new(session)))?;
            Ok(())
        })
    })
}

/// A 64-bit number as a size of this machine.
pub(super) fn to_usize(value: u64, name: &str) -> Result<usize> {
    match usize::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => bail!(InvalidArgument, "{name} is {value}, larger than this machine can address"),
    }
}
