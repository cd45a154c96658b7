//! The prefix index of a pool: leases, retention, events.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use super::convert;
use super::guard::guard;
use super::handle::{self, Opaque};
use super::pool::{
    Listener, PoolHandle, Shared, digests, in_callback, kvmgr_pool, read, to_usize, write,
};
use super::pool_request::keep;
use super::pool_sequence::kvmgr_pool_sequence;
use super::types::kvmgr_status;
use crate::block::SequenceId;
use crate::block::keys::Range;
use crate::block::manager::LeaseId;
use crate::error::{Result, bail, ensure};

/// Cached blocks that are held apart from any sequence: what a lookup found, or a pin. They are
/// neither reclaimed nor changed until the lease is destroyed or its deadline passes, whichever is
/// first. Exclusive: destroy once. A lease keeps its pool alive.
#[derive(Debug)]
pub struct kvmgr_lease {
    _opaque: [u8; 0],
}

/// What a kvmgr_lease holds.
pub(super) struct LeaseHandle {
    pool: Arc<Shared>,
    id: LeaseId,
}

impl Opaque for kvmgr_lease {
    type Inner = LeaseHandle;
    const NAME: &'static str = "kvmgr_lease";
}

impl Drop for LeaseHandle {
    fn drop(&mut self) {
        self.pool.end_lease(self.id);
    }
}

/// Receives a batch of events: msgpack as vLLM sends it.
///
/// Called within the call that caused the events, in the order of number, which counts from 0
/// without gaps. It must not call a pool, throw or longjmp. `data` is valid during the call.
pub type kvmgr_events_fn = Option<
    unsafe extern "C" fn(user_data: *mut c_void, number: u64, data: *const c_void, size: usize),
>;

/// Holds the longest run of hashes, from the first on, that is cached. Runs beside other lookups.
///
/// @param hashes 32 bytes for each block, as kvmgr_pool_hash answers them
/// @param group below num_groups
/// @param deadline on the pool's clock, later than now; 0 for none
/// @param out_blocks room for num_hashes blocks; may be NULL
/// @param out_num_found receives how many blocks are held
/// @param out_lease receives an exclusive handle, also if nothing was found; NULL on failure
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_lookup(
    pool: *mut kvmgr_pool,
    hashes: *const u8,
    num_hashes: usize,
    group: u32,
    deadline: u64,
    out_blocks: *mut u32,
    out_num_found: *mut usize,
    out_lease: *mut *mut kvmgr_lease,
) -> kvmgr_status {
    // SAFETY: the caller passes hashes and room for the answers.
    guard(|| unsafe {
        let out = convert::handle_output(out_lease, "out_lease")?;
        let digests = digests(hashes, num_hashes, "hashes")?;
        let num = convert::output(out_num_found, "out_num_found")?;
        let room = if out_blocks.is_null() { 0 } else { num_hashes };
        let blocks_out = convert::slice_mut(out_blocks, room, "out_blocks")?;
        let pool: Arc<Shared> = handle::with(pool, |pool: &PoolHandle| Ok(pool.0.clone()))?;
        let group = group_index(&pool, group)?;
        let mut blocks = Vec::with_capacity(num_hashes);
        let id = if pool.read(|manager| Ok(manager.is_logged()))? {
            pool.write(|manager| manager.lookup_logged(digests, group, deadline, &mut blocks))?
        } else {
            pool.read(|manager| manager.lookup(digests, group, deadline, &mut blocks))?
        };
        *out = handle::create(LeaseHandle { pool, id })?;
        *num = blocks.len();
        blocks_out.iter_mut().zip(&blocks).for_each(|(out, block)| *out = *block);
        Ok(())
    })
}

/// Holds the cached blocks of a sequence beyond its end: a pin.
///
/// @param deadline on the pool's clock, later than now; 0 for none
/// @param out_lease receives an exclusive handle; NULL on failure
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_pin(
    pool: *mut kvmgr_pool,
    sequence: kvmgr_pool_sequence,
    deadline: u64,
    out_lease: *mut *mut kvmgr_lease,
) -> kvmgr_status {
    // SAFETY: the caller passes a place for a pointer.
    guard(|| unsafe {
        let out = convert::handle_output(out_lease, "out_lease")?;
        let pool: Arc<Shared> = handle::with(pool, |pool: &PoolHandle| Ok(pool.0.clone()))?;
        let id = pool.write(|manager| manager.pin(SequenceId(sequence), deadline))?;
        *out = handle::create(LeaseHandle { pool, id })?;
        Ok(())
    })
}

/// Moves the deadline of a lease. KVMGR_INVALID_STATE if it has passed.
///
/// @param deadline on the pool's clock, later than now; 0 for none
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_lease_extend(lease: *mut kvmgr_lease, deadline: u64) -> kvmgr_status {
    guard(|| {
        handle::with(lease, |lease| {
            lease.pool.write(|manager| manager.extend_lease(lease.id, deadline))
        })
    })
}

/// Gives the blocks of a lease back. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_lease_destroy(lease: *mut kvmgr_lease) {
    guard(|| handle::release(lease));
}

/// Changes what a request said about how long its entries stay, those it made already included.
///
/// @param priority 1 to 100, or 0 for 35
/// @param ttl microseconds after its end, or 0 for never
/// @param session what it is a state of, or 0
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_pool_keep(
    pool: *mut kvmgr_pool,
    sequence: kvmgr_pool_sequence,
    priority: u32,
    ttl: u64,
    session: u64,
) -> kvmgr_status {
    guard(|| {
        let keep = keep(priority, ttl, session)?;
        write(pool, |manager| manager.set_keep(SequenceId(sequence), keep))
    })
}

/// Changes how long a part of a sequence stays: the blocks that its tokens touch, as they are now and
/// as they become entries later. What is said last about a block counts.
///
/// @param start first token
/// @param end behind the last token, larger than start; may lie beyond the tokens so far
/// @param priority 1 to 100, or 0 for 35
/// @param ttl microseconds after the end of the sequence, or 0 for never
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_pool_keep_range(
    pool: *mut kvmgr_pool,
    sequence: kvmgr_pool_sequence,
    start: u64,
    end: u64,
    priority: u32,
    ttl: u64,
) -> kvmgr_status {
    guard(|| {
        let keep = keep(priority, ttl, 0)?;
        let (start, end) = (to_usize(start, "start")?, to_usize(end, "end")?);
        let range = Range { start, end, priority: keep.priority, ttl };
        write(pool, |manager| manager.keep_range(SequenceId(sequence), range))
    })
}

/// Changes how long entries stay whose sequences have ended.
///
/// @param hashes 32 bytes for each block; unknown ones are passed over
/// @param group below num_groups
/// @param priority 1 to 100, or 0 for 35
/// @param ttl microseconds from now, or 0 for never
/// @param out_num_found receives how many are cached; may be NULL
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_keep_entries(
    pool: *mut kvmgr_pool,
    hashes: *const u8,
    num_hashes: usize,
    group: u32,
    priority: u32,
    ttl: u64,
    out_num_found: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes hashes and NULL or a place for a number.
    guard(|| unsafe {
        let digests = digests(hashes, num_hashes, "hashes")?;
        let keep = keep(priority, ttl, 0)?;
        let pool: Arc<Shared> = handle::with(pool, |pool: &PoolHandle| Ok(pool.0.clone()))?;
        let group = group_index(&pool, group)?;
        let found = pool.write(|manager| manager.keep_entries(digests, group, keep))?;
        optional(out_num_found, found)
    })
}

/// Says that a session has ended: entries of its last state are reclaimed before all others.
/// KVMGR_NOT_FOUND if no sequence of it has ended.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_pool_end_session(pool: *mut kvmgr_pool, session: u64) -> kvmgr_status {
    guard(|| {
        let found = write(pool, |manager| Ok(manager.end_session(session)))?;
        ensure!(found, NotFound, "session {session} has left nothing behind");
        Ok(())
    })
}

/// Takes entries out of the index because their content turned out to be wrong. Sequences that use
/// the blocks keep them.
///
/// @param hashes 32 bytes for each block
/// @param group below num_groups
/// @param out_num_found receives how many there were; may be NULL
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_forget(
    pool: *mut kvmgr_pool,
    hashes: *const u8,
    num_hashes: usize,
    group: u32,
    out_num_found: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes hashes and NULL or a place for a number.
    guard(|| unsafe {
        let digests = digests(hashes, num_hashes, "hashes")?;
        let pool: Arc<Shared> = handle::with(pool, |pool: &PoolHandle| Ok(pool.0.clone()))?;
        let group = group_index(&pool, group)?;
        let found = pool.write(|manager| Ok(manager.forget(digests, group)))?;
        optional(out_num_found, found)
    })
}

/// Flag of kvmgr_pool_listen: events as arrays by position instead of maps by name.
pub const KVMGR_EVENTS_ARRAYS: u32 = 1;

/// Sends what happens to the prefix index to a function, from now on: BlockStored, BlockRemoved and
/// AllBlocksCleared of vLLM. Once for each pool.
///
/// @param flags 0 or KVMGR_EVENTS_ARRAYS
/// @param num_kept batches kept for kvmgr_pool_replay_events, at least 1
/// @param medium what the events say about the place of the blocks; NULL means "GPU"
/// @param user_data passed to every call
/// @param destroy called once with user_data when the pool ends; may be NULL
/// @param function receives the batches
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_listen(
    pool: *mut kvmgr_pool,
    flags: u32,
    num_kept: u32,
    medium: *const c_char,
    user_data: *mut c_void,
    destroy: Option<unsafe extern "C" fn(user_data: *mut c_void)>,
    function: kvmgr_events_fn,
) -> kvmgr_status {
    guard(|| {
        // SAFETY: the caller passes NULL or a string.
        let medium = unsafe { convert::text(medium, "medium") }?.unwrap_or("GPU");
        let unknown = flags & !KVMGR_EVENTS_ARRAYS;
        ensure!(unknown == 0, InvalidArgument, "flags has unknown bits {unknown:#x}");
        ensure!(num_kept > 0, InvalidArgument, "num_kept is 0, must be at least 1");
        let Some(function) = function else { bail!(InvalidArgument, "function is NULL") };
        handle::with(pool, |pool: &PoolHandle| {
            pool.0.write(|manager| {
                let is_first = manager.pool().events().is_none();
                ensure!(is_first, InvalidState, "the pool has a listener already");
                manager.listen(flags & KVMGR_EVENTS_ARRAYS != 0, medium, num_kept as usize);
                *pool.0.listener.lock() = Some(Listener { user_data, function, destroy });
                Ok(())
            })
        })
    })
}

/// Sends the batches from number first on once more, as far as they are kept, to a function.
///
/// @param first a batch number; older ones than are kept are passed over
/// @param function called within this call, in order
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_replay_events(
    pool: *mut kvmgr_pool,
    first: u64,
    user_data: *mut c_void,
    function: kvmgr_events_fn,
) -> kvmgr_status {
    guard(|| {
        let Some(function) = function else { bail!(InvalidArgument, "function is NULL") };
        read(pool, |manager| {
            let Some(events) = manager.pool().events() else {
                bail!(InvalidState, "the pool has no listener");
            };
            for (number, bytes) in events.replay(first) {
                let (data, size) = (bytes.as_ptr().cast(), bytes.len());
                // SAFETY: the engine's function with the engine's pointer and live bytes.
                in_callback(|| unsafe { function(user_data, number, data, size) });
            }
            Ok(())
        })
    })
}

fn group_index(pool: &Shared, group: u32) -> Result<u8> {
    let groups = pool.read(|manager| Ok(manager.config().tables.groups.len()))?;
    ensure!((group as usize) < groups, InvalidArgument, "group is {group}, must be below {groups}");
    Ok(group as u8)
}

/// # Safety
/// `out` is NULL or a place for a number.
unsafe fn optional(out: *mut usize, value: usize) -> Result<()> {
    if !out.is_null() {
        // SAFETY: the caller promises it.
        *unsafe { convert::output(out, "out_num_found") }? = value;
    }
    Ok(())
}
