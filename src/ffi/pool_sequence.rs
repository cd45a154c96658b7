//! Sequences of a pool: numbers, not handles, so that one call takes a whole batch.

use super::convert;
use super::guard::guard;
use super::pool::{kvmgr_pool, write};
use super::pool_request::{Parsed, kvmgr_pool_admission, kvmgr_pool_request, to_c};
use super::types::kvmgr_status;
use crate::block::manager::BlockManager;
use crate::block::prefix::Digest;
use crate::block::tables::{NO_BLOCK, Placement, Request};
use crate::block::{Admission, SequenceId};
use crate::error::{Kind, Result, ensure};

/// Names a sequence of a pool. Never 0; a number whose sequence has ended, or of another pool, is
/// an error wherever it is used.
pub type kvmgr_pool_sequence = u64;

/// In a block table: the group keeps no block here.
pub const KVMGR_NO_BLOCK: u32 = u32::MAX;

/// Where the bytes of a block of a parked sequence belong.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_placement {
    /// Place in the tables: block of tokens * num_groups + group.
    pub place: u32,
    /// The block of the engine's memory.
    pub block: u32,
}

/// Makes sequences of prompts, in order, until one does not fit. Cached blocks are taken over for
/// the longest known prefix, at most all tokens but the last; blocks for the rest are reserved. The
/// engine writes the rows of the rest and says so with kvmgr_pool_commit.
///
/// KVMGR_OUT_OF_BLOCKS only if not even the first fits; any other error admits none.
///
/// @param requests the prompts
/// @param out_admissions room for num_requests
/// @param out_num_admitted receives how many became sequences
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_admit(
    pool: *mut kvmgr_pool,
    requests: *const kvmgr_pool_request,
    num_requests: usize,
    out_admissions: *mut kvmgr_pool_admission,
    out_num_admitted: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes requests and room for the answers.
    guard(|| unsafe {
        let requests = convert::slice(requests, num_requests, "requests")?;
        let out = convert::slice_mut(out_admissions, num_requests, "out_admissions")?;
        let num = convert::output(out_num_admitted, "out_num_admitted")?;
        let requests: Vec<Parsed<'_>> =
            requests.iter().map(|it| Parsed::new(it)).collect::<Result<_>>()?;
        write(pool, |manager| {
            let mut admitted: Vec<Admission> = Vec::with_capacity(requests.len());
            let hashed = hash_pairs(manager, &requests)?;
            for (parsed, digests) in requests.iter().zip(&hashed) {
                let admit = |manager: &mut BlockManager, request: &Request<'_>| {
                    let known = if digests.is_empty() { request.digests } else { digests };
                    manager.admit(&Request { digests: known, ..*request }, parsed.keep)
                };
                match parsed.with(manager, admit) {
                    Ok(admission) => admitted.push(admission),
                    Err(error) if error.kind() == Kind::OutOfBlocks && !admitted.is_empty() => {
                        break;
                    }
                    Err(error) => {
                        let ids: Vec<_> = admitted.iter().map(|it| it.id).collect();
                        manager.release(&ids)?;
                        return Err(error);
                    }
                }
            }
            *num = admitted.len();
            out.iter_mut().zip(&admitted).for_each(|(out, it)| *out = to_c(it));
            Ok(())
        })
    })
}

/// The hashes under which the full blocks of a prompt are cached, for a router, for
/// kvmgr_pool_lookup, or to admit the prompt again and again without hashing.
///
/// @param request the prompt; only tokens, salt and extra keys count
/// @param out_hashes room for 32 bytes for each full block; NULL with capacity 0 asks for the number
/// @param capacity in hashes
/// @param out_num_hashes receives the number of full blocks
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_hash(
    pool: *mut kvmgr_pool,
    request: *const kvmgr_pool_request,
    out_hashes: *mut u8,
    capacity: usize,
    out_num_hashes: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a request and room for the answer.
    guard(|| unsafe {
        let parsed = Parsed::new(&convert::slice(request, 1, "request")?[0])?;
        write(pool, |manager| {
            parsed.with(manager, |manager, request| {
                let request = Request { digests: &[], ..*request };
                let digests = manager.hash(&request);
                convert::list(digests, out_hashes.cast(), capacity, out_num_hashes, "out_hashes")
            })
        })
    })
}

/// Gives each sequence slots for more tokens, or none to any: drafts, or the next message of a
/// conversation. No sequence may occur twice.
///
/// @param counts tokens for each sequence
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_reserve(
    pool: *mut kvmgr_pool,
    sequences: *const kvmgr_pool_sequence,
    counts: *const u32,
    num_sequences: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes lists of that length.
    guard(|| unsafe {
        let ids = ids(sequences, num_sequences)?;
        let counts = convert::slice(counts, num_sequences, "counts")?;
        write(pool, |manager| manager.reserve(&ids, counts))
    })
}

/// Says that the next reserved tokens of each sequence have been written, for all or none. Blocks
/// that are full can be found by others from now on. Reserved tokens beyond stay reserved;
/// kvmgr_pool_truncate drops them, which is how rejected drafts are undone.
///
/// @param counts tokens for each sequence
/// @param tokens the ids of those that are not part of an admitted prompt, sequence by sequence
/// @param num_tokens how many those are
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_commit(
    pool: *mut kvmgr_pool,
    sequences: *const kvmgr_pool_sequence,
    counts: *const u32,
    num_sequences: usize,
    tokens: *const i32,
    num_tokens: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes lists of that length.
    guard(|| unsafe {
        let ids = ids(sequences, num_sequences)?;
        let counts = convert::slice(counts, num_sequences, "counts")?;
        let tokens = convert::slice(tokens, num_tokens, "tokens")?;
        write(pool, |manager| manager.commit(&ids, counts, tokens))
    })
}

/// The call of a decode step: says that the reserved token of each sequence has been written and
/// was tokens[i], and reserves the next one. KVMGR_OUT_OF_BLOCKS changes nothing: preempt somebody
/// and call again.
///
/// @param tokens one for each sequence
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_append(
    pool: *mut kvmgr_pool,
    sequences: *const kvmgr_pool_sequence,
    tokens: *const i32,
    num_sequences: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes lists of that length.
    guard(|| unsafe {
        let ids = ids(sequences, num_sequences)?;
        let tokens = convert::slice(tokens, num_sequences, "tokens")?;
        write(pool, |manager| manager.append(&ids, tokens))
    })
}

/// Forgets the committed tokens from num_tokens on and every reservation. A recurrent group goes back
/// to a cached state, which there is after every `value` blocks: KVMGR_UNSUPPORTED elsewhere,
/// KVMGR_INVALID_STATE if it has been reclaimed or where a window has left those tokens.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_pool_truncate(
    pool: *mut kvmgr_pool,
    sequence: kvmgr_pool_sequence,
    num_tokens: usize,
) -> kvmgr_status {
    guard(|| write(pool, |manager| manager.truncate(SequenceId(sequence), num_tokens)))
}

/// Makes sequences with the committed tokens of another, which share every block, or none. A block
/// that still fills is copied by whoever reserves in it first: kvmgr_pool_take_copies. A prompt must
/// be committed whole.
///
/// @param out_children room for num_children
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_fork(
    pool: *mut kvmgr_pool,
    parent: kvmgr_pool_sequence,
    out_children: *mut kvmgr_pool_sequence,
    num_children: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes room for the children.
    guard(|| unsafe {
        let out = convert::slice_mut(out_children, num_children, "out_children")?;
        write(pool, |manager| {
            let mut children = Vec::with_capacity(num_children);
            for _ in 0..num_children {
                match manager.fork(SequenceId(parent)) {
                    Ok(child) => children.push(child),
                    Err(error) => {
                        manager.release(&children)?;
                        return Err(error);
                    }
                }
            }
            out.iter_mut().zip(children).for_each(|(out, child)| *out = child.0);
            Ok(())
        })
    })
}

/// Ends sequences, all or none. Their full blocks stay cached until somebody needs the place.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_end(
    pool: *mut kvmgr_pool,
    sequences: *const kvmgr_pool_sequence,
    num_sequences: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a list of that length.
    guard(|| unsafe {
        let ids = ids(sequences, num_sequences)?;
        write(pool, |manager| manager.release(&ids))
    })
}

/// Preempts a sequence: its blocks go, its name and its tokens stay. To keep the bytes, the engine
/// copies the blocks it is told out of its memory before it writes anything. Reservations are
/// dropped.
///
/// @param out_places room for capacity; NULL with capacity 0 parks without asking
/// @param out_num receives how many blocks there were
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_park(
    pool: *mut kvmgr_pool,
    sequence: kvmgr_pool_sequence,
    out_places: *mut kvmgr_placement,
    capacity: usize,
    out_num: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes room for the answer.
    guard(|| unsafe {
        let (num, out) = places_output(out_places, capacity, out_num)?;
        write(pool, |manager| {
            check_room(manager, sequence, out_places.is_null(), capacity)?;
            *num = answer(&manager.park(SequenceId(sequence))?, out);
            Ok(())
        })
    })
}

/// Gives a parked sequence blocks again, or KVMGR_OUT_OF_BLOCKS. Blocks that are still cached come
/// back as they are; for the others the engine copies the bytes back or computes them before
/// anything reads them.
///
/// @param out_places room for as many as kvmgr_pool_park answered: where bytes are missing
/// @param out_num receives how many are missing
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_pool_resume(
    pool: *mut kvmgr_pool,
    sequence: kvmgr_pool_sequence,
    out_places: *mut kvmgr_placement,
    capacity: usize,
    out_num: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes room for the answer.
    guard(|| unsafe {
        let (num, out) = places_output(out_places, capacity, out_num)?;
        write(pool, |manager| {
            check_room(manager, sequence, false, capacity)?;
            *num = answer(&manager.resume(SequenceId(sequence))?, out);
            Ok(())
        })
    })
}

/// The digests of requests that are hashed two at a time; nothing for those that are not.
fn hash_pairs(manager: &mut BlockManager, requests: &[Parsed<'_>]) -> Result<Vec<Vec<Digest>>> {
    let mut digests = vec![Vec::new(); requests.len()];
    if !manager.config().tables.prefix {
        return Ok(digests);
    }
    for (pair, outs) in requests.chunks_exact(2).zip(digests.chunks_exact_mut(2)) {
        let [first, second] = outs else { continue };
        pair[0].with(manager, |manager, a| {
            pair[1].with(manager, |manager, b| {
                manager.tables().hash_two([a, b], [first, second]);
                Ok(())
            })
        })?;
    }
    Ok(digests)
}

/// Names of sequences.
///
/// # Safety
/// As for [`convert::slice`].
pub(super) unsafe fn ids(
    sequences: *const kvmgr_pool_sequence,
    num: usize,
) -> Result<Vec<SequenceId>> {
    // SAFETY: the caller promises it.
    let sequences = unsafe { convert::slice(sequences, num, "sequences") }?;
    Ok(sequences.iter().map(|id| SequenceId(*id)).collect())
}

/// Where placements go.
///
/// # Safety
/// As for [`convert::output`] and [`convert::slice_mut`].
unsafe fn places_output<'a>(
    out: *mut kvmgr_placement,
    capacity: usize,
    out_num: *mut usize,
) -> Result<(&'a mut usize, &'a mut [kvmgr_placement])> {
    // SAFETY: the caller promises it.
    let num = unsafe { convert::output(out_num, "out_num") }?;
    // SAFETY: the caller promises it.
    Ok((num, unsafe { convert::slice_mut(out, capacity, "out_places") }?))
}

fn check_room(manager: &BlockManager, sequence: u64, is_null: bool, capacity: usize) -> Result<()> {
    let needed = manager.tables().blocks(SequenceId(sequence))?.iter();
    let needed = needed.filter(|block| **block != NO_BLOCK).count();
    ensure!(
        needed <= capacity || is_null,
        InvalidArgument,
        "out_places needs room for {needed} elements, capacity is {capacity}"
    );
    Ok(())
}

fn answer(places: &[Placement], out: &mut [kvmgr_placement]) -> usize {
    for (out, it) in out.iter_mut().zip(places) {
        *out = kvmgr_placement { place: it.place, block: it.block.0 };
    }
    places.len()
}
