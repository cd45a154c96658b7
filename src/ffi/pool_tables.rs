//! What an engine's kernels need of a pool: copies, block tables, slots.

use super::convert;
use super::guard::guard;
use super::pool::{kvmgr_pool, read, write};
use super::pool_sequence::{ids, kvmgr_pool_sequence};
use super::sequence::kvmgr_block_copy;
use super::types::kvmgr_status;
use crate::block::SequenceId;
use crate::block::manager::BlockManager;
use crate::block::tables::NO_BLOCK;
use crate::error::{Result, bail, ensure};

/// The copies between blocks that the engine makes before it writes anything, in this order.
/// Asking takes them.
///
/// @param out room for capacity; NULL with capacity 0 asks for the number and takes nothing
/// @param out_num receives how many there are
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_take_copies(
    pool: *mut kvmgr_pool,
    out: *mut kvmgr_block_copy,
    capacity: usize,
    out_num: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes room for the answer.
    guard(|| unsafe {
        let num = convert::output(out_num, "out_num")?;
        write(pool, |manager| {
            let needed = manager.tables().num_copies();
            if let Some(out) = convert::room(out, capacity, needed, ("out", "copies"))? {
                for (out, copy) in out.iter_mut().zip(manager.take_copies()) {
                    *out = kvmgr_block_copy { source: copy.source.0, target: copy.target.0 };
                }
            }
            *num = needed;
            Ok(())
        })
    })
}

/// The blocks that were handed out since the last call and still hold the bytes of a sequence before.
/// An engine wipes them, or in a debug build fills them with NaN, before it makes copies or writes.
/// Needs KVMGR_POOL_RECYCLED.
///
/// @param out room for capacity; NULL with capacity 0 asks for the number and takes nothing
/// @param out_num receives how many there are
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_take_recycled(
    pool: *mut kvmgr_pool,
    out: *mut u32,
    capacity: usize,
    out_num: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes room for the answer.
    guard(|| unsafe {
        let num = convert::output(out_num, "out_num")?;
        write(pool, |manager| {
            let Some(needed) = manager.pool().num_recycled() else {
                bail!(InvalidState, "the pool was made without KVMGR_POOL_RECYCLED");
            };
            if let Some(out) = convert::room(out, capacity, needed, ("out", "blocks"))? {
                out.copy_from_slice(&manager.take_recycled().unwrap_or_default());
            }
            *num = needed;
            Ok(())
        })
    })
}

/// Tokens of a sequence.
///
/// @param out_committed receives the committed ones; may be NULL
/// @param out_reserved receives those with slots, committed ones included; may be NULL
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_num_tokens(
    pool: *const kvmgr_pool,
    sequence: kvmgr_pool_sequence,
    out_committed: *mut usize,
    out_reserved: *mut usize,
) -> kvmgr_status {
    guard(|| {
        let (committed, reserved) = read(pool, |manager| {
            let (tables, id) = (manager.tables(), SequenceId(sequence));
            Ok((tables.num_tokens(id)?, tables.num_reserved(id)?))
        })?;
        for (out, value) in [(out_committed, committed), (out_reserved, reserved)] {
            if !out.is_null() {
                // SAFETY: the caller passes NULL or a place for a number.
                *unsafe { convert::output(out, "out_committed or out_reserved") }? = value;
            }
        }
        Ok(())
    })
}

/// The block tables of a batch for one group, as an attention kernel wants them: row i holds the
/// blocks of sequences[i] in token order, then KVMGR_NO_BLOCK.
///
/// @param group below num_groups
/// @param out room for num_sequences rows of `columns` blocks; KVMGR_INVALID_ARGUMENT names the
///   columns that a longer table needs
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_block_tables(
    pool: *const kvmgr_pool,
    sequences: *const kvmgr_pool_sequence,
    num_sequences: usize,
    group: u32,
    out: *mut u32,
    columns: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes lists and room of that size.
    guard(|| unsafe {
        let ids = ids(sequences, num_sequences)?;
        let room = num_sequences.saturating_mul(columns);
        let out = convert::slice_mut(out, room, "out")?;
        read(pool, |manager| {
            let groups = check_group(manager, group)?;
            for id in &ids {
                let needed = present_blocks(manager, *id)?.len() / groups;
                ensure!(
                    needed <= columns,
                    InvalidArgument,
                    "columns is {columns}, sequence {:#x} has {needed} blocks",
                    id.0
                );
            }
            for (row, id) in out.chunks_exact_mut(columns.max(1)).zip(&ids) {
                let blocks = manager.tables().blocks(*id)?;
                row.fill(NO_BLOCK);
                let own = blocks.iter().skip(group as usize).step_by(groups);
                row.iter_mut().zip(own).for_each(|(out, block)| *out = *block);
            }
            Ok(())
        })
    })
}

/// The slots of the next reserved tokens of a batch for one group, as a cache-write kernel wants
/// them: block * block_size + row, sequence by sequence; -1 where the group keeps no row. A
/// recurrent group has its state at the block of the last token instead: kvmgr_pool_block_tables.
///
/// @param counts tokens for each sequence, at most those that are reserved
/// @param out room for capacity slots, at least the sum of counts
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_slot_mapping(
    pool: *const kvmgr_pool,
    sequences: *const kvmgr_pool_sequence,
    counts: *const u32,
    num_sequences: usize,
    group: u32,
    out: *mut i64,
    capacity: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes lists and room of that size.
    guard(|| unsafe {
        let ids = ids(sequences, num_sequences)?;
        let counts = convert::slice(counts, num_sequences, "counts")?;
        let out = convert::slice_mut(out, capacity, "out")?;
        read(pool, |manager| {
            check_group(manager, group)?;
            let tables = manager.tables();
            let mut total = 0;
            for (id, count) in ids.iter().zip(counts) {
                let free = tables.num_reserved(*id)? - tables.num_tokens(*id)?;
                ensure!(
                    *count as usize <= free,
                    InvalidArgument,
                    "counts has {count} for sequence {:#x}, only {free} tokens are reserved",
                    id.0
                );
                total += *count as usize;
            }
            ensure!(
                total <= capacity,
                InvalidArgument,
                "out needs room for {total} slots, capacity is {capacity}"
            );
            let mut out = out.iter_mut();
            for (id, count) in ids.iter().zip(counts) {
                let start = tables.num_tokens(*id)?;
                for (token, out) in (start..start + *count as usize).zip(&mut out) {
                    *out = tables.slot_of(*id, group as usize, token)?;
                }
            }
            Ok(())
        })
    })
}

/// The table of a sequence that has its blocks.
fn present_blocks(manager: &BlockManager, id: SequenceId) -> Result<&[u32]> {
    ensure!(!manager.tables().is_parked(id)?, InvalidState, "sequence {:#x} is parked", id.0);
    manager.tables().blocks(id)
}

fn check_group(manager: &BlockManager, group: u32) -> Result<usize> {
    let groups = manager.config().tables.groups.len();
    ensure!((group as usize) < groups, InvalidArgument, "group is {group}, must be below {groups}");
    Ok(groups)
}
