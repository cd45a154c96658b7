//! States of recurrent layers: Mamba, RWKV, linear attention beside attention.

use std::ffi::c_void;

use super::cache::kvmgr_cache_config;
use super::convert;
use super::guard::guard;
use super::pool::to_usize;
use super::sequence::{kvmgr_sequence, read, write};
use super::types::kvmgr_status;
use crate::cache::{DEFAULT_SNAPSHOTS, RecurrentConfig};
use crate::error::{Result, ensure};

/// The state of a recurrent layer of a sequence, which the engine reads and writes in place. It is zero
/// at first, aligned to 64 bytes, and stays at its address until the sequence is destroyed or preempted.
/// On a CUDA device the address is one of device memory, and whatever this library does to a state is
/// queued on the stream of the cache.
///
/// Every token changes a state, and a state cannot be cut like rows of keys, so the engine says where it
/// may want to go back to: kvmgr_sequence_snapshot. With drafts, one of
///   snapshot(n); reserve k; run; commit(0): the state is as before; reserve m; run again; commit(m)
///   reserve k; snapshot(n + i) after i drafts, 0 to k; commit(m): the state is that after the good ones
///   reserve k; run with states of the drafts in memory of the engine; write the right one; commit(m)
///
/// @param layer below recurrent_layers: recurrent layers are numbered apart from those with keys and values
/// @param out_state receives the address of the first byte
/// @param out_bytes receives recurrent_bytes; may be NULL
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_sequence_recurrent_state(
    sequence: *const kvmgr_sequence,
    layer: u32,
    out_state: *mut *mut c_void,
    out_bytes: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle, a place for a pointer and NULL or a place for a number.
    guard(|| unsafe {
        let out = convert::handle_output(out_state, "out_state")?;
        read(sequence, |session| {
            let (state, bytes) = session.sequence().recurrent_state(layer as usize)?;
            if !out_bytes.is_null() {
                *convert::output(out_bytes, "out_bytes")? = bytes;
            }
            *out = state.as_ptr().cast();
            Ok(())
        })
    })
}

/// Keeps a copy of the states of all recurrent layers as those after num_tokens tokens, until the
/// sequence gets shorter than that, is preempted or ends. It takes the place of one of the same length;
/// else, if there are recurrent_snapshots of them already, that of the one taken first. KVMGR_OUT_OF_BLOCKS,
/// and no change, if num_states is reached. Costs one copy of the states, and no allocation but where the
/// prefix keeps it.
///
/// A snapshot at the end of a block whose tokens are shared by prefix is kept with the prefix: another
/// sequence starts from there. The last such length of a prompt of n tokens that a prompt like it can
/// use is (n - 1) / block_size * block_size; prompts that share less need one at the end of what they
/// share. If no state is free, those that only prefixes keep are dropped or go to the store of the cache,
/// least recently used first.
///
/// @param num_tokens from the committed tokens to those and all reserved ones: what the states, as they
///        are now, have seen
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_sequence_snapshot(
    sequence: *mut kvmgr_sequence,
    num_tokens: usize,
) -> kvmgr_status {
    guard(|| write(sequence, |session| session.sequence_mut().snapshot(num_tokens)))
}

/// Sets the states of all recurrent layers back to those after num_tokens tokens, from a snapshot or from
/// what the prefix keeps; 0 makes them zero. Forgets no token: kvmgr_sequence_truncate, which does both,
/// and kvmgr_sequence_commit of fewer tokens than are reserved do this by themselves.
/// KVMGR_INVALID_STATE if there is no snapshot of that length.
///
/// @param num_tokens from the committed tokens to those and all reserved ones
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_sequence_restore(
    sequence: *mut kvmgr_sequence,
    num_tokens: usize,
) -> kvmgr_status {
    guard(|| write(sequence, |session| session.sequence_mut().restore(num_tokens)))
}

/// The lengths of the snapshots of a sequence, ascending. What prefixes keep is not among them.
///
/// @param out_lengths room for capacity numbers; NULL with capacity 0 asks for their number only
/// @param out_num receives their number
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_sequence_snapshots(
    sequence: *const kvmgr_sequence,
    out_lengths: *mut usize,
    capacity: usize,
    out_num: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and room for the list.
    guard(|| unsafe {
        read(sequence, |session| {
            let lengths = session.sequence().snapshots();
            convert::list(&lengths, out_lengths, capacity, out_num, "out_lengths")
        })
    })
}

/// The recurrent layers that a configuration asks for.
pub(super) fn parse(config: &kvmgr_cache_config) -> Result<Option<RecurrentConfig>> {
    let kvmgr_cache_config { recurrent_layers, recurrent_snapshots, recurrent_bytes, .. } = *config;
    if recurrent_layers == 0 {
        ensure!(
            recurrent_snapshots == 0 && recurrent_bytes == 0 && config.num_states == 0,
            InvalidArgument,
            "recurrent_layers is 0, but recurrent_snapshots is {recurrent_snapshots}, recurrent_bytes \
             {recurrent_bytes} and num_states {}; these must be 0 then",
            config.num_states
        );
        return Ok(None);
    }
    let max_snapshots = match recurrent_snapshots {
        0 => DEFAULT_SNAPSHOTS,
        snapshots => snapshots as usize,
    };
    Ok(Some(RecurrentConfig {
        num_layers: recurrent_layers as usize,
        bytes: to_usize(recurrent_bytes, "recurrent_bytes")?,
        num_states: to_usize(config.num_states, "num_states")?,
        max_snapshots,
    }))
}
