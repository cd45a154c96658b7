//! Numbers about a pool.

use std::ffi::c_char;

use super::convert;
use super::guard::guard;
use super::pool::{kvmgr_pool, read};
use super::types::kvmgr_status;
use crate::block::manager::{self, BlockStats};

/// What a pool holds now and what it has done since its creation. Set struct_size before the call.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct kvmgr_pool_stats {
    /// sizeof(kvmgr_pool_stats).
    pub struct_size: usize,
    /// Blocks of the pool.
    pub num_blocks: u64,
    /// Blocks nobody refers to.
    pub free_blocks: u64,
    /// Blocks that sequences and leases refer to.
    pub used_blocks: u64,
    /// Blocks that only the prefix index refers to; reclaimed when needed.
    pub idle_blocks: u64,
    /// Entries of the prefix index.
    pub prefix_entries: u64,
    /// Tokens of admitted prompts.
    pub prefix_query_tokens: u64,
    /// Tokens of them that were cached.
    pub prefix_hit_tokens: u64,
    /// Entries reclaimed.
    pub evictions: u64,
    /// Live sequences, parked ones included.
    pub num_sequences: u64,
    /// Leases that hold something.
    pub num_leases: u64,
    /// Bytes of bookkeeping for the blocks.
    pub metadata_bytes: u64,
    /// Sequences admitted.
    pub admissions: u64,
    /// Cached tokens that were copied from a part of a block.
    pub prefix_copied_tokens: u64,
    /// Tokens committed.
    pub committed_tokens: u64,
    /// Sequences forked.
    pub forks: u64,
    /// Sequences parked.
    pub preemptions: u64,
    /// Copies handed to the engine.
    pub copies: u64,
    /// Leases whose deadline passed.
    pub leases_expired: u64,
    /// Matches that ended at tokens never seen.
    pub misses_unknown: u64,
    /// Matches that ended at an entry that has been reclaimed.
    pub misses_evicted: u64,
    /// Matches that a window group ended.
    pub misses_window: u64,
    /// Matches that a recurrent group ended.
    pub misses_checkpoint: u64,
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
        let stats = read(pool, |manager| Ok(manager.stats()))?;
        convert::fill_struct(out_stats, &to_c(&stats), "kvmgr_pool_stats")
    })
}

fn to_c(s: &BlockStats) -> kvmgr_pool_stats {
    kvmgr_pool_stats {
        struct_size: 0,
        num_blocks: s.num_blocks,
        free_blocks: s.free_blocks,
        used_blocks: s.used_blocks,
        idle_blocks: s.idle_blocks,
        prefix_entries: s.prefix_entries,
        prefix_query_tokens: s.prefix_query_tokens,
        prefix_hit_tokens: s.prefix_hit_tokens,
        evictions: s.evictions,
        num_sequences: s.num_sequences,
        num_leases: s.num_leases,
        metadata_bytes: s.metadata_bytes,
        admissions: s.admissions,
        prefix_copied_tokens: s.prefix_copied_tokens,
        committed_tokens: s.committed_tokens,
        forks: s.forks,
        preemptions: s.preemptions,
        copies: s.copies,
        leases_expired: s.leases_expired,
        misses_unknown: s.misses_unknown,
        misses_evicted: s.misses_evicted,
        misses_window: s.misses_window,
        misses_checkpoint: s.misses_checkpoint,
    }
}

/// The numbers as Prometheus' text exposition format, without a final NUL.
///
/// @param labels put between braces on every line, such as "pool=\"0\""; NULL means none
/// @param out room for capacity bytes; NULL with capacity 0 asks for the size alone
/// @param out_size receives the number of bytes
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_prometheus(
    pool: *const kvmgr_pool,
    labels: *const c_char,
    out: *mut c_char,
    capacity: usize,
    out_size: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle, a string and room.
    guard(|| unsafe {
        let labels = convert::text(labels, "labels")?.unwrap_or("");
        let stats = read(pool, |manager| Ok(manager.stats()))?;
        let text = manager::prometheus(&stats, labels);
        convert::list(text.as_bytes(), out.cast(), capacity, out_size, "out")
    })
}
