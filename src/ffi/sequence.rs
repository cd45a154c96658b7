//! Sequences: the tokens of one request.

use super::convert;
use super::guard::guard;
use super::handle::{self, Exclusive, Opaque};
use super::policy::KVMGR_NEEDS_HIDDEN;
use super::store::kvmgr_store;
use super::types::{kvmgr_status, kvmgr_tensor};
use crate::attention;
use crate::error::{Result, ensure};
use crate::manager::Session;
use crate::sequence::{Lane, Sequence};

/// The tokens of one request and the rows that are kept of them. Exclusive: one thread at a time,
/// any thread; a second one gets KVMGR_BUSY.
///
/// The life of a step: reserve n tokens, append K and V to every layer, attend, commit. Every
/// failing call leaves the sequence as it was, unless it says otherwise.
#[derive(Debug)]
pub struct kvmgr_sequence {
    _opaque: [u8; 0],
}

/// What a kvmgr_sequence holds.
#[derive(Debug)]
pub(super) struct SequenceHandle(pub(super) Exclusive<Session>);

impl Opaque for kvmgr_sequence {
    type Inner = SequenceHandle;
    const NAME: &'static str = NAME;
}

const NAME: &str = "kvmgr_sequence";

/// A copy that an engine with its own tensors makes before it writes: a fork's open block.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_block_copy {
    /// Block to copy from.
    pub source: u32,
    /// Block to copy to.
    pub target: u32,
}

/// What a sequence holds. Set struct_size before the call.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct kvmgr_sequence_stats {
    /// sizeof(kvmgr_sequence_stats).
    pub struct_size: usize,
    /// Committed tokens, evicted ones included.
    pub num_tokens: u64,
    /// Reserved tokens.
    pub num_reserved: u64,
    /// Rows kept, summed over layers and KV heads.
    pub rows_kept: u64,
    /// Rows evicted, summed over layers and KV heads.
    pub rows_evicted: u64,
    /// Bytes of the blocks referred to, shared ones included.
    pub bytes: u64,
    /// Blocks referred to, shared ones included.
    pub num_blocks: u64,
    /// Bytes of what the spec's selector knows of the blocks; not part of `bytes`. 0 on a CUDA device, where
    /// that lies beside the blocks and is everybody's.
    pub selector_bytes: u64,
    /// Bytes of the states of recurrent layers and of snapshots, shared ones included; not part of `bytes`.
    pub state_bytes: u64,
    /// Bytes of the subspaces that were fitted to the sequence's prompt (k_rank, v_rank), which forks share;
    /// not part of `bytes`.
    pub basis_bytes: u64,
}

/// Ends a sequence and frees what only it refers to. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_sequence_destroy(sequence: *mut kvmgr_sequence) {
    guard(|| handle::release(sequence));
}

/// Makes a second sequence with the same tokens. It shares every block; the block that still fills
/// is copied by whoever writes first. States of recurrent layers are copied at once, for which one must be
/// free; snapshots are shared. KVMGR_INVALID_STATE while tokens are reserved, and while a graph is captured if
/// something has to be copied at once on a CUDA device.
///
/// @param out_child receives an exclusive handle; NULL on failure
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_sequence_fork(
    sequence: *const kvmgr_sequence,
    out_child: *mut *mut kvmgr_sequence,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a place for a pointer.
    guard(|| unsafe {
        let out = convert::handle_output(out_child, "out_child")?;
        read(sequence, |session| {
            *out = handle::create(SequenceHandle(Exclusive::new(session.fork()?)))?;
            Ok(())
        })
    })
}

/// Takes over the cached blocks of the longest known prefix of a prompt, from the cache or its
/// store, but always leaves at least one token to compute. The sequence must be empty. The matched
/// tokens are committed: go on with the tokens after them. With recurrent layers a prefix is as long as its
/// last block at whose end a state is kept (kvmgr_sequence_snapshot), which becomes that of the sequence;
/// without one it is 0 tokens.
///
/// @param tokens the prompt
/// @param out_num_matched receives the number of tokens taken over; 0 without the prefix flag
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_sequence_match_prefix(
    sequence: *mut kvmgr_sequence,
    tokens: *const i32,
    num_tokens: usize,
    out_num_matched: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle, tokens and a place for a number.
    guard(|| unsafe {
        write(sequence, |session| {
            let tokens = convert::slice(tokens, num_tokens, "tokens")?;
            let out = convert::output(out_num_matched, "out_num_matched")?;
            *out = session.match_prefix(tokens)?;
            Ok(())
        })
    })
}

/// Makes room for the next num_tokens tokens in every layer, or answers KVMGR_OUT_OF_BLOCKS and
/// changes nothing. May be called again before a commit. On a CUDA device a shared block that has to be copied
/// first is KVMGR_INVALID_STATE while a graph is captured.
///
/// @param num_tokens at least 1
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_sequence_reserve(
    sequence: *mut kvmgr_sequence,
    num_tokens: usize,
) -> kvmgr_status {
    guard(|| write(sequence, |session| session.sequence_mut().reserve(num_tokens)))
}

/// Writes the keys and values of the next reserved tokens of one layer; several calls continue one
/// another. kvmgr_attention_append does the same for a whole batch with several workers.
///
/// @param layer below num_layers
/// @param key [n, num_kv_heads, head_dim], rotated as the model wants it
/// @param value [n, num_kv_heads, value_dim]; NULL with KVMGR_CACHE_VALUES_IN_KEYS
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_sequence_append(
    sequence: *mut kvmgr_sequence,
    layer: u32,
    key: *const kvmgr_tensor,
    value: *const kvmgr_tensor,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and tensors it may read.
    guard(|| unsafe {
        write(sequence, |session| {
            let key = convert::tensor(key, "key")?;
            let value = convert::optional_tensor(value, "value")?;
            attention::write_sequence(session.sequence(), layer as usize, &key, value.as_ref())
        })
    })
}

/// Hands over what the policy needs to know of the reserved tokens in a layer
/// (kvmgr_policy_needs), once for each layer before they are committed. A policy that does not need it
/// does not look at it.
///
/// @param layer below num_layers
/// @param what KVMGR_NEEDS_HIDDEN, also for KVMGR_NEEDS_REPLAY_HIDDEN while tokens replay
/// @param rows [reserved tokens, hidden_size]: the input of attention, after its norm
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_sequence_observe(
    sequence: *mut kvmgr_sequence,
    layer: u32,
    what: u32,
    rows: *const kvmgr_tensor,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a tensor it may read.
    guard(|| unsafe {
        write(sequence, |session| {
            ensure!(
                what == KVMGR_NEEDS_HIDDEN,
                InvalidArgument,
                "what is {what}, must be KVMGR_NEEDS_HIDDEN"
            );
            session.observe_hidden(layer as usize, &convert::matrix(rows, "rows")?)
        })
    })
}

/// Hands over how attention of a layer changes the residual stream of the reserved tokens
/// (KVMGR_NEEDS_RESIDUAL), once for each layer before they are committed. Both rows are at hand just
/// before the engine adds one to the other, in place or not. They are not kept, only the cosine between
/// the stream before and after. Only tokens of the prompt that the engine computes count, not those of a
/// shared prefix: a policy that does not need it, and any after kvmgr_sequence_end_prefill, does not look
/// at it.
///
/// @param layer below num_layers
/// @param hidden [reserved tokens, hidden_size]: the residual stream that the layer reads, before its norm
/// @param added [reserved tokens, hidden_size]: what is added to it, attention after its output projection
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_sequence_observe_residual(
    sequence: *mut kvmgr_sequence,
    layer: u32,
    hidden: *const kvmgr_tensor,
    added: *const kvmgr_tensor,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and tensors it may read.
    guard(|| unsafe {
        write(sequence, |session| {
            let hidden = convert::matrix(hidden, "hidden")?;
            let added = convert::matrix(added, "added")?;
            session.observe_residual(layer as usize, &hidden, &added)
        })
    })
}

/// Starts a replay (KVMGR_NEEDS_REPLAY): the engine feeds a request to repeat the prompt and then
/// tokens first to first + num of it once more, behind the prompt: reserve, append, attend. What that
/// reads of the prompt is noted, and kvmgr_sequence_commit of 0 tokens ends the replay, of which nothing
/// is left. With recurrent layers there must be a snapshot of the prompt's length. Long prompts are replayed in pieces. Before kvmgr_sequence_end_prefill.
///
/// @param first the first token that is replayed
/// @param num_tokens at least 1
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_sequence_replay(
    sequence: *mut kvmgr_sequence,
    first: usize,
    num_tokens: usize,
) -> kvmgr_status {
    guard(|| write(sequence, |session| session.replay(first..first.saturating_add(num_tokens))))
}

/// Makes the first num_tokens reserved tokens real and drops the others, which is how rejected
/// drafts are undone. Blocks that are full are encoded and, with the prefix flag, shared. After
/// kvmgr_sequence_end_prefill this is a decode step and runs the decode phase of the policy; if
/// that runs out of blocks the tokens are committed all the same and the next step tries again.
/// If reserved tokens are dropped and there is a snapshot after the committed ones, the states of recurrent
/// layers are set back to it, or as kvmgr_sequence_truncate does it; else they stay as the engine has written
/// them, unless there are snapshots after some of the reserved tokens: then the answer is KVMGR_INVALID_STATE.
/// On a CUDA device the encoding of full blocks is queued on the stream; while a graph is captured they stay
/// open and are encoded by a later commit. A policy that acts waits for the stream; while a graph is captured
/// a commit that may run one answers KVMGR_INVALID_STATE and changes nothing.
///
/// @param tokens the ids of the tokens, or NULL: the sequence is not shared by prefix from then on
/// @param num_tokens 0 to the number reserved
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_sequence_commit(
    sequence: *mut kvmgr_sequence,
    tokens: *const i32,
    num_tokens: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and NULL or tokens.
    guard(|| unsafe {
        write(sequence, |session| {
            // The count is checked before a slice of that length is made.
            let reserved = session.sequence().num_reserved();
            ensure!(
                num_tokens <= reserved,
                InvalidArgument,
                "num_tokens is {num_tokens}, only {reserved} are reserved"
            );
            let tokens = convert::optional_slice(tokens, num_tokens, "tokens")?;
            session.commit(num_tokens, tokens)
        })
    })
}

/// Says that the prompt, or one more piece of it, has been read: runs the prefill phase of the
/// policy. Commits are decode steps from then on. If it runs out of blocks, lanes that were
/// compacted already stay so, and the call may be repeated. On a CUDA device a policy waits for the stream,
/// which must not be captured.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_sequence_end_prefill(sequence: *mut kvmgr_sequence) -> kvmgr_status {
    guard(|| write(sequence, Session::end_prefill))
}

/// Forgets the tokens at position num_tokens and above, and any reservation, and ends a replay. With
/// recurrent layers their states are set back to a snapshot of that length, to what the prefix keeps there,
/// or to zeros at 0; if committed tokens would go and there is none, the answer is KVMGR_INVALID_STATE. At 0
/// the sequence starts anew: what comes is a prompt until kvmgr_sequence_end_prefill.
///
/// @param num_tokens 0 to the number of committed tokens
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_sequence_truncate(
    sequence: *mut kvmgr_sequence,
    num_tokens: usize,
) -> kvmgr_status {
    guard(|| write(sequence, |session| session.truncate(num_tokens)))
}

/// The number of committed tokens, evicted ones included: the position of the next token.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_sequence_length(
    sequence: *const kvmgr_sequence,
    out_num_tokens: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a place for a number.
    guard(|| unsafe {
        read(sequence, |session| {
            *convert::output(out_num_tokens, "out_num_tokens")? = session.sequence().num_tokens();
            Ok(())
        })
    })
}

/// The number of rows that one KV head of one layer holds, reserved ones included.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_sequence_kept(
    sequence: *const kvmgr_sequence,
    layer: u32,
    kv_head: u32,
    out_num_tokens: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a place for a number.
    guard(|| unsafe {
        read(sequence, |session| {
            let (_, lane) = lane_of(session.sequence(), layer, kv_head)?;
            *convert::output(out_num_tokens, "out_num_tokens")? = lane.len();
            Ok(())
        })
    })
}

/// The original positions of the rows of one KV head, ascending; those that a policy has demoted come
/// first, in blocks of their own that each ascend.
///
/// @param out_positions room for capacity numbers; NULL with capacity 0 asks for the length only
/// @param out_num receives the length
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_sequence_positions(
    sequence: *const kvmgr_sequence,
    layer: u32,
    kv_head: u32,
    out_positions: *mut i32,
    capacity: usize,
    out_num: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and room for the list.
    guard(|| unsafe {
        read(sequence, |session| {
            let (lane, _) = lane_of(session.sequence(), layer, kv_head)?;
            let mut positions = Vec::new();
            session.sequence().positions(lane, &mut positions);
            convert::list(&positions, out_positions, capacity, out_num, "out_positions")
        })
    })
}

/// The block table of one KV head.
///
/// @param out_blocks room for capacity numbers; NULL with capacity 0 asks for the length only
/// @param out_num receives the length
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_sequence_block_table(
    sequence: *const kvmgr_sequence,
    layer: u32,
    kv_head: u32,
    out_blocks: *mut u32,
    capacity: usize,
    out_num: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and room for the list.
    guard(|| unsafe {
        read(sequence, |session| {
            session.sequence().ensure_present()?;
            let (_, lane) = lane_of(session.sequence(), layer, kv_head)?;
            let blocks: Vec<u32> = lane.spans.iter().map(|span| span.block.id.0).collect();
            convert::list(&blocks, out_blocks, capacity, out_num, "out_blocks")
        })
    })
}

/// Where the reserved tokens go: block * block_size + row, in order.
///
/// @param out_slots room for capacity numbers; NULL with capacity 0 asks for the length only
/// @param out_num receives the length
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_sequence_slot_mapping(
    sequence: *const kvmgr_sequence,
    layer: u32,
    kv_head: u32,
    out_slots: *mut i64,
    capacity: usize,
    out_num: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and room for the list.
    guard(|| unsafe {
        read(sequence, |session| {
            let sequence = session.sequence();
            sequence.ensure_present()?;
            let (_, lane) = lane_of(sequence, layer, kv_head)?;
            let block_size = sequence.cache().config().block_size as i64;
            let runs = Lane::tail(&lane.spans, sequence.num_reserved());
            let slots: Vec<i64> = runs
                .flat_map(|(span, first, count)| {
                    let base = i64::from(span.block.id.0) * block_size;
                    (first..first + count).map(move |row| base + row as i64)
                })
                .collect();
            convert::list(&slots, out_slots, capacity, out_num, "out_slots")
        })
    })
}

/// The copies that an engine with its own tensors must make before it writes to the reserved
/// slots. They are handed out once. Caches with memory copy by themselves.
///
/// @param out_copies room for capacity copies; NULL with capacity 0 asks for the length only
/// @param out_num receives the length
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_sequence_take_copies(
    sequence: *mut kvmgr_sequence,
    out_copies: *mut kvmgr_block_copy,
    capacity: usize,
    out_num: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and room for the list.
    guard(|| unsafe {
        write(sequence, |session| {
            let sequence = session.sequence_mut();
            let copies = sequence.copies();
            let copies: Vec<_> = copies
                .iter()
                .map(|(source, target)| kvmgr_block_copy { source: source.0, target: target.0 })
                .collect();
            convert::list(&copies, out_copies, capacity, out_num, "out_copies")?;
            if capacity > 0 {
                sequence.clear_copies();
            }
            Ok(())
        })
    })
}

/// Moves the bytes of a sequence to a store and frees its blocks. The states of recurrent layers go with
/// them, snapshots are dropped. Until it is resumed, calls that
/// need them answer KVMGR_INVALID_STATE. The sequence keeps a reference to the store.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_sequence_preempt(
    sequence: *mut kvmgr_sequence,
    store: *mut kvmgr_store,
) -> kvmgr_status {
    guard(|| {
        write(sequence, |session| session.preempt(handle::borrow(store.cast_const())?.0.clone()))
    })
}

/// Brings the bytes of a preempted sequence back. On failure it stays preempted and the call may
/// be repeated; KVMGR_OUT_OF_BLOCKS says that there is no room yet.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_sequence_resume(sequence: *mut kvmgr_sequence) -> kvmgr_status {
    guard(|| write(sequence, Session::resume))
}

/// Numbers about a sequence.
///
/// @param out_stats its struct_size must be set; receives the numbers
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_sequence_get_stats(
    sequence: *const kvmgr_sequence,
    out_stats: *mut kvmgr_sequence_stats,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a struct that starts with its size.
    guard(|| unsafe {
        read(sequence, |session| {
            let sequence = session.sequence();
            let cells = {
                let config = sequence.cache().config();
                config.lane_width.cells(&config.shape)
            };
            let rows: usize = sequence.lanes().iter().map(Lane::len).sum();
            let stats = kvmgr_sequence_stats {
                struct_size: 0,
                num_tokens: sequence.num_tokens() as u64,
                num_reserved: sequence.num_reserved() as u64,
                rows_kept: (rows * cells) as u64,
                rows_evicted: sequence.num_evicted(),
                bytes: if sequence.is_swapped() { 0 } else { sequence.bytes() as u64 },
                num_blocks: if sequence.is_swapped() { 0 } else { sequence.num_blocks() as u64 },
                selector_bytes: sequence.observation().map_or(0, |seen| seen.selector_bytes())
                    as u64,
                state_bytes: sequence.state_bytes() as u64,
                basis_bytes: sequence.basis_bytes() as u64,
            };
            convert::fill_struct(out_stats, &stats, "kvmgr_sequence_stats")
        })
    })
}

pub(super) fn read(
    sequence: *const kvmgr_sequence,
    body: impl FnOnce(&Session) -> Result<()>,
) -> Result<()> {
    handle::with(sequence, |sequence| body(&*sequence.0.read(NAME)?))
}

pub(super) fn write(
    sequence: *mut kvmgr_sequence,
    body: impl FnOnce(&mut Session) -> Result<()>,
) -> Result<()> {
    handle::with(sequence.cast_const(), |sequence| body(&mut *sequence.0.write(NAME)?))
}

fn lane_of(sequence: &Sequence, layer: u32, kv_head: u32) -> Result<(usize, &Lane)> {
    let shape = &sequence.cache().config().shape;
    let (layers, heads) = (shape.num_layers, shape.num_kv_heads);
    ensure!((layer as usize) < layers, InvalidArgument, "layer is {layer}, the model has {layers}");
    ensure!(
        (kv_head as usize) < heads,
        InvalidArgument,
        "kv_head is {kv_head}, the model has {heads}"
    );
    let (lane, _) = sequence.locate(layer as usize, kv_head as usize);
    Ok((lane, &sequence.lanes()[lane]))
}
