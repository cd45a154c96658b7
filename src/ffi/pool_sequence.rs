//! Sequences of a pool: numbers, not handles, so that one call takes a whole batch.

use std::ffi::c_char;

use super::convert;
use super::guard::guard;
use super::pool::{digests, kvmgr_pool, write};
use super::types::kvmgr_status;
use crate::block::groups::Reason;
use crate::block::keys::{Extra, Kind};
use crate::block::manager::{BlockManager, Keep};
use crate::block::pool::DEFAULT_PRIORITY;
use crate::block::prefix::{Digest, Hash};
use crate::block::tables::{NO_BLOCK, Placement, Request};
use crate::block::{Admission, SequenceId};
use crate::error::{self, Result, bail, ensure};

/// Names a sequence of a pool. Never 0; a number whose sequence has ended, or of another pool, is
/// an error wherever it is used.
pub type kvmgr_pool_sequence = u64;

/// In a block table: the group keeps no block here.
pub const KVMGR_NO_BLOCK: u32 = u32::MAX;

/// Why a match ended.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct kvmgr_miss(pub u32);
/// It did not: everything but the last token, which is always computed, was cached.
pub const KVMGR_MISS_NONE: kvmgr_miss = kvmgr_miss(0);
/// Tokens that were never seen, as far as is remembered.
pub const KVMGR_MISS_UNKNOWN: kvmgr_miss = kvmgr_miss(1);
/// An entry that has been reclaimed.
pub const KVMGR_MISS_EVICTED: kvmgr_miss = kvmgr_miss(2);
/// Blocks of a window group are missing.
pub const KVMGR_MISS_WINDOW: kvmgr_miss = kvmgr_miss(3);
/// A recurrent group has no state at a usable place.
pub const KVMGR_MISS_CHECKPOINT: kvmgr_miss = kvmgr_miss(4);

/// What an extra key is.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct kvmgr_key_kind(pub u32);
/// The identifier of an image or another input behind placeholder tokens. Its distance from the
/// start of the block is hashed with it, which tells its parts apart.
pub const KVMGR_KEY_ITEM: kvmgr_key_kind = kvmgr_key_kind(0);
/// A text.
pub const KVMGR_KEY_TEXT: kvmgr_key_kind = kvmgr_key_kind(1);
/// Bytes: the hash of prompt embeddings.
pub const KVMGR_KEY_BYTES: kvmgr_key_kind = kvmgr_key_kind(2);

/// What distinguishes equal tokens of a prompt: the hash of the image behind placeholder tokens. It
/// becomes part of the hash of every block that the tokens touch, and events tell it. With
/// KVMGR_HASH_VLLM items and texts are UTF-8.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_extra_key {
    /// First token.
    pub start: u64,
    /// Behind the last token.
    pub end: u64,
    /// The key.
    pub key: *const u8,
    /// Bytes of the key.
    pub key_size: usize,
    /// KVMGR_KEY_ITEM, _TEXT or _BYTES.
    pub kind: kvmgr_key_kind,
    /// Must be 0.
    pub reserved: u32,
}

/// A prompt that wants to become a sequence. Zero the struct; every zero but tokens is a default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_pool_request {
    /// The prompt, at least one token.
    pub tokens: *const i32,
    /// How many.
    pub num_tokens: usize,
    /// NULL, or 32 bytes for each full block of the prompt, in place of hashing here. The caller is
    /// then the one who keeps tenants apart.
    pub hashes: *const u8,
    /// 0, or the full blocks of the prompt.
    pub num_hashes: usize,
    /// The operator's secret for this tenant: prompts with different salts share nothing and learn
    /// nothing of one another. NULL for none.
    pub salt: *const u8,
    /// Bytes of the salt.
    pub salt_size: usize,
    /// NULL, or keys of parts of the prompt.
    pub extra_keys: *const kvmgr_extra_key,
    /// How many.
    pub num_extra_keys: usize,
    /// The name of the adapter (LoRA) that computes the sequence, which shares nothing with others.
    /// Events tell it. NULL or "" for none.
    pub adapter: *const c_char,
    /// Microseconds after the sequence ends until its entries are reclaimed before all others; 0
    /// for never.
    pub ttl: u64,
    /// The session that the sequence is a state of; 0 for none. When it ends, entries of the state
    /// before that it does not share are reclaimed before all others.
    pub session: u64,
    /// Priority of its entries, 1 to 100, with an evictor that knows priorities; 0 means 35.
    pub priority: u32,
    /// Must be 0.
    pub reserved: u32,
}

/// A prompt that became a sequence.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_pool_admission {
    /// Its name.
    pub sequence: kvmgr_pool_sequence,
    /// Tokens that were cached; they are committed.
    pub num_cached: u64,
    /// Of these, tokens in a block that the engine copies: kvmgr_pool_take_copies.
    pub num_copied: u64,
    /// The first token that was not cached, before copies.
    pub miss_token: u64,
    /// Why not.
    pub miss: kvmgr_miss,
    /// The group that ended the match.
    pub miss_group: u32,
}

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
                    Err(error)
                        if error.kind() == error::Kind::OutOfBlocks && !admitted.is_empty() =>
                    {
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

/// A request whose pointers are checked.
pub(super) struct Parsed<'a> {
    tokens: &'a [i32],
    digests: &'a [Digest],
    salt: &'a [u8],
    extra: Vec<Extra<'a>>,
    adapter: &'a str,
    keep: Keep,
}

impl<'a> Parsed<'a> {
    /// # Safety
    /// The request's pointers are what the header says, for `'a`.
    unsafe fn new(request: &'a kvmgr_pool_request) -> Result<Self> {
        ensure!(
            request.reserved == 0,
            InvalidArgument,
            "reserved is {}, must be 0",
            request.reserved
        );
        // SAFETY: the caller promises the lists.
        let (tokens, digests, salt, keys) = unsafe {
            (
                convert::slice(request.tokens, request.num_tokens, "tokens")?,
                digests(request.hashes, request.num_hashes, "hashes")?,
                convert::slice(request.salt, request.salt_size, "salt")?,
                convert::slice(request.extra_keys, request.num_extra_keys, "extra_keys")?,
            )
        };
        let mut extra = Vec::with_capacity(keys.len());
        for it in keys {
            // SAFETY: the caller promises the key.
            let key = unsafe { convert::slice(it.key, it.key_size, "extra_keys.key") }?;
            let limit = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
            ensure!(
                it.reserved == 0,
                InvalidArgument,
                "reserved of an extra key is {}, must be 0",
                it.reserved
            );
            let Some(kind) = Kind::ALL.get(it.kind.0 as usize) else {
                bail!(InvalidArgument, "kind is {}, not a kvmgr_key_kind", it.kind.0);
            };
            extra.push(Extra { start: limit(it.start), end: limit(it.end), kind: *kind, key });
        }
        // SAFETY: the caller promises NULL or a string.
        let adapter = unsafe { convert::text(request.adapter, "adapter") }?.unwrap_or("");
        let keep = keep(request.priority, request.ttl, request.session)?;
        Ok(Self { tokens, digests, salt, extra, adapter, keep })
    }

    /// The request below the root of its tenant.
    fn with<R>(
        &self,
        manager: &mut BlockManager,
        body: impl FnOnce(&mut BlockManager, &Request<'_>) -> Result<R>,
    ) -> Result<R> {
        let root = manager.root(self.salt, self.adapter);
        let mut extra = self.extra.clone();
        if manager.config().tables.hash == Hash::VllmCbor {
            let texts = extra.iter().filter(|it| it.kind != Kind::Bytes).map(|it| it.key);
            for key in texts.chain([self.salt]) {
                let is_text = std::str::from_utf8(key).is_ok();
                ensure!(is_text, InvalidArgument, "salts and extra keys of vLLM are UTF-8 texts");
            }
            if !self.salt.is_empty() && !self.tokens.is_empty() {
                extra.push(Extra { start: 0, end: 1, kind: Kind::Text, key: self.salt });
            }
        }
        let (digests, adapter) = (self.digests, self.adapter);
        let request =
            Request { digests, extra: &extra, adapter, ..Request::new(self.tokens, root) };
        body(manager, &request)
    }
}

/// What C says about retention.
pub(super) fn keep(priority: u32, ttl: u64, session: u64) -> Result<Keep> {
    let limit = u32::from(crate::block::pool::MAX_PRIORITY);
    ensure!(priority <= limit, InvalidArgument, "priority is {priority}, must be in 0..={limit}");
    let priority = if priority == 0 { DEFAULT_PRIORITY } else { priority as u8 };
    Ok(Keep { priority, ttl, session })
}

fn to_c(admission: &Admission) -> kvmgr_pool_admission {
    kvmgr_pool_admission {
        sequence: admission.id.0,
        num_cached: admission.num_cached as u64,
        num_copied: admission.num_copied as u64,
        miss_token: admission.miss.token as u64,
        miss: match admission.miss.reason {
            Reason::Complete => KVMGR_MISS_NONE,
            Reason::Unknown => KVMGR_MISS_UNKNOWN,
            Reason::Evicted => KVMGR_MISS_EVICTED,
            Reason::Window => KVMGR_MISS_WINDOW,
            Reason::Checkpoint => KVMGR_MISS_CHECKPOINT,
        },
        miss_group: admission.miss.group as u32,
    }
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
