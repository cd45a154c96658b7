//! The KV memory of one layer, for an engine that addresses its cache by slot and says with a mask
//! who sees whom.

use std::ffi::c_char;

use super::convert;
use super::guard::guard;
use super::handle::{self, Exclusive, Opaque};
use super::masked::{kvmgr_mask_options, masked, meeting};
use super::types::{kvmgr_side, kvmgr_status, kvmgr_tensor};
use crate::error::{Result, ensure};
use crate::slots::{self, SlotState, Slots, SlotsConfig};

/// The keys and values of one layer, addressed by slot. For engines that give every cached token a
/// number, reuse numbers, and hand over a mask instead of sequences. Exclusive, except that
/// kvmgr_slots_read and kvmgr_slots_attend may be called by many workers at once. A thread that
/// breaks this gets KVMGR_BUSY.
///
/// The life of a step: write keys and values, observe, attend. A slot holds at most one token for
/// each KV head: absent, live, or evicted by the policy and remembered as such until it is written.
#[derive(Debug)]
pub struct kvmgr_slots {
    _opaque: [u8; 0],
}

/// What a kvmgr_slots holds.
#[derive(Debug)]
pub(super) struct SlotsHandle(Exclusive<Slots>);

impl Opaque for kvmgr_slots {
    type Inner = SlotsHandle;
    const NAME: &'static str = NAME;
}

const NAME: &str = "kvmgr_slots";

/// Flag: the prefill phase of the policy also runs before each further piece of a prompt, instead
/// of only when the prompt has ended.
pub const KVMGR_SLOTS_PIECES: u32 = 1;

/// Flag of a write: other values for the tokens that are there, such as keys rotated to other
/// positions. Slots that are absent or evicted stay so.
pub const KVMGR_SLOTS_SAME_TOKENS: u32 = 1;

/// The slot was never written.
pub const KVMGR_SLOT_ABSENT: u8 = 0;
/// The slot holds a token.
pub const KVMGR_SLOT_LIVE: u8 = 1;
/// The token of the slot was evicted and the slot was not written since.
pub const KVMGR_SLOT_EVICTED: u8 = 2;

/// Settings of the slots of a layer. Set struct_size to its sizeof; zeros mean the default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_slots_config {
    /// sizeof(kvmgr_slots_config).
    pub struct_size: usize,
    /// Index of the layer; policies may treat layers differently.
    pub layer: u32,
    /// Layers of the model; 0 means layer + 1.
    pub num_layers: u32,
    /// Query heads, a multiple of num_kv_heads.
    pub num_q_heads: u32,
    /// Key/value heads, 1 to 4096.
    pub num_kv_heads: u32,
    /// Elements of a key, 1 to 1024.
    pub key_dim: u32,
    /// Elements of a value; 0 means key_dim.
    pub value_dim: u32,
    /// Slots of a stream, at least 1. Addresses are reserved, memory is taken as slots are written.
    pub num_slots: u32,
    /// Groups of slots that never see each other; 0 means 1. Slot s of stream i is number
    /// i * num_slots + s.
    pub num_streams: u32,
    /// Rows of a block, at most 64; 0 means 64.
    pub block_size: u32,
    /// KVMGR_SLOTS_PIECES or 0.
    pub flags: u32,
    /// The pipeline; NULL means "full". Copied. Stages may need keys, values and the last queries;
    /// column sums and rotations are refused.
    pub spec: *const c_char,
}

/// What the slots of a layer hold and have done. Set struct_size before the call.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_slots_stats {
    /// sizeof(kvmgr_slots_stats).
    pub struct_size: usize,
    /// Bytes of blocks in use.
    pub bytes_used: u64,
    /// Largest bytes_used since creation.
    pub bytes_peak: u64,
    /// Live (slot, KV head) pairs.
    pub rows_live: u64,
    /// (slot, KV head) pairs evicted since creation.
    pub rows_evicted: u64,
    /// (slot, side) pairs written since creation.
    pub rows_written: u64,
}

/// Checks a spec before shapes are known: a stage that slots cannot serve is refused by name.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_slots_check_spec(spec: *const c_char) -> kvmgr_status {
    guard(|| {
        // SAFETY: the caller passes NULL or a NUL-terminated string.
        let spec = unsafe { convert::required_text(spec, "spec") }?;
        slots::parse_spec(spec).map(|_| ())
    })
}

/// Makes the empty slots of a layer.
///
/// @param config settings; the shape is required
/// @param out_slots receives an exclusive handle; NULL on failure
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_slots_create(
    config: *const kvmgr_slots_config,
    out_slots: *mut *mut kvmgr_slots,
) -> kvmgr_status {
    // SAFETY: the caller passes a struct with its size and a place for a pointer.
    guard(|| unsafe {
        let out = convert::handle_output(out_slots, "out_slots")?;
        let config = convert::config(config, "kvmgr_slots_config")?;
        let spec = convert::text(config.spec, "spec")?.unwrap_or("full");
        let slots = Slots::new(parse_config(&config)?, spec)?;
        *out = handle::create(SlotsHandle(Exclusive::new(slots)))?;
        Ok(())
    })
}

/// Ends slots. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_slots_destroy(slots: *mut kvmgr_slots) {
    guard(|| handle::release(slots));
}

/// Writes the keys or the values of slots: new tokens, whatever the slots held before.
///
/// @param indices num different slots, in the order of their tokens
/// @param values [num, num_kv_heads, dim of the side], keys rotated as the model wants it
/// @param flags KVMGR_SLOTS_SAME_TOKENS or 0
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_slots_write(
    slots: *mut kvmgr_slots,
    side: kvmgr_side,
    indices: *const u32,
    num: usize,
    values: *const kvmgr_tensor,
    flags: u32,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle, num slots and a tensor it may read.
    guard(|| unsafe {
        handle::with(slots, |slots| {
            let indices = convert::slice(indices, num, "indices")?;
            let values = convert::tensor(values, "values")?;
            ensure!(
                flags & !KVMGR_SLOTS_SAME_TOKENS == 0,
                InvalidArgument,
                "flags has unknown bits {flags:#x}"
            );
            let same_tokens = flags & KVMGR_SLOTS_SAME_TOKENS != 0;
            slots.0.write(NAME)?.write(side.parse()?, indices, &values, same_tokens)
        })
    })
}

/// Decodes the keys or the values of slots.
///
/// @param out_values [num, num_kv_heads, dim of the side]; zeros where a head holds nothing
/// @param out_states [num, num_kv_heads]: KVMGR_SLOT_ABSENT, LIVE or EVICTED; may be NULL
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_slots_read(
    slots: *const kvmgr_slots,
    side: kvmgr_side,
    indices: *const u32,
    num: usize,
    out_values: *mut f32,
    out_states: *mut u8,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle, num slots and buffers of these sizes.
    guard(|| unsafe {
        handle::with(slots, |slots| {
            let indices = convert::slice(indices, num, "indices")?;
            let slots = slots.0.read(NAME)?;
            let (side, heads) = (side.parse()?, slots.config().num_kv_heads);
            let wide = heads * slots.dim(side);
            let values = convert::slice_mut(out_values, num.saturating_mul(wide), "out_values")?;
            let mut none = [];
            let states = match out_states.is_null() {
                true => &mut none[..],
                false => convert::slice_mut(out_states, num * heads, "out_states")?,
            };
            for (i, (slot, row)) in indices.iter().zip(values.chunks_exact_mut(wide)).enumerate() {
                slots.read(side, *slot, row, |head, state| {
                    if let Some(out) = states.get_mut(i * heads + head) {
                        *out = state_code(state);
                    }
                })?;
            }
            Ok(())
        })
    })
}

/// Evicts the tokens of slots from one KV head and frees their memory. They are remembered as
/// evicted, for instance to restore a saved state.
///
/// @param kv_head below num_kv_heads
/// @param indices num slots
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_slots_evict(
    slots: *mut kvmgr_slots,
    kv_head: u32,
    indices: *const u32,
    num: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and num slots.
    guard(|| unsafe {
        handle::with(slots, |slots| {
            let indices = convert::slice(indices, num, "indices")?;
            slots.0.write(NAME)?.evict(kv_head as usize, indices)
        })
    })
}

/// Makes every slot of a stream absent and frees its memory.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_slots_clear(slots: *mut kvmgr_slots, stream: u32) -> kvmgr_status {
    guard(|| handle::with(slots, |slots| slots.0.write(NAME)?.clear(stream as usize)))
}

/// Makes one stream a copy of another, evicted slots included.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_slots_copy_stream(
    slots: *mut kvmgr_slots,
    source: u32,
    target: u32,
) -> kvmgr_status {
    guard(|| {
        handle::with(slots, |slots| {
            slots.0.write(NAME)?.copy_stream(source as usize, target as usize)
        })
    })
}

/// Tells the policy about a batch that is written and has not attended yet, and runs the policy
/// where it is due. A query continues the sequence of another if it sees its slot; a sequence that
/// goes on with a single query has ended its prompt, and so has one that goes on with drafts: with at
/// most 17 queries after as few, or after some of the last ones have been taken back. An engine
/// without a policy need not call it.
///
/// @param query [num_queries, num_q_heads, key_dim]
/// @param mask [num_queries, 1 or num_q_heads, visible slots of the stream]
/// @param indices num_queries slots: where the token of each query was written
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_slots_observe(
    slots: *mut kvmgr_slots,
    stream: u32,
    query: *const kvmgr_tensor,
    mask: *const kvmgr_tensor,
    indices: *const u32,
    num_queries: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle, tensors it may read and num_queries slots.
    guard(|| unsafe {
        handle::with(slots, |slots| {
            let query = convert::tensor(query, "query")?;
            let mask = convert::tensor(mask, "mask")?;
            let indices = convert::slice(indices, num_queries, "indices")?;
            slots.0.write(NAME)?.observe(stream as usize, &query, &mask, indices)
        })
    })
}

/// Runs the policy at once for prompts that wait for their end and among whose tokens are these slots.
/// To be called before slots are read to save them: a saved state says what was evicted, but not that
/// the policy has yet to run.
///
/// @param indices num slots
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_slots_settle(
    slots: *mut kvmgr_slots,
    indices: *const u32,
    num: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and num slots.
    guard(|| unsafe {
        handle::with(slots, |slots| {
            let indices = convert::slice(indices, num, "indices")?;
            slots.0.write(NAME)?.settle(indices)
        })
    })
}

/// Attends to the first slots of a stream: output = softmax(scale * query . K + mask) V. What is
/// hidden by negative infinity, absent or evicted takes no part; a query that sees nothing gets
/// zeros.
///
/// @param query [num_queries, num_q_heads, key_dim]
/// @param mask [num_queries, 1 or num_q_heads, visible slots of the stream]; NULL shows all
/// @param output [num_queries, num_q_heads, value_dim]
/// @param options may be NULL
/// @param worker which part of the work to do, below num_workers
/// @param num_workers parts, at least 1; the output is complete when all are done
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_slots_attend(
    slots: *const kvmgr_slots,
    stream: u32,
    query: *const kvmgr_tensor,
    mask: *const kvmgr_tensor,
    output: *const kvmgr_tensor,
    options: *const kvmgr_mask_options,
    worker: u32,
    num_workers: u32,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle, tensors it may read or write, and NULL or options.
    guard(|| unsafe {
        handle::with(slots, |slots| {
            let slots = slots.0.read(NAME)?;
            let meeting = meeting(options)?;
            let call = masked(query, mask, output, options, meeting.as_deref())?;
            slots.attend(stream as usize, &call, worker as usize, num_workers as usize)
        })
    })
}

/// Numbers about the slots of a layer.
///
/// @param out_stats its struct_size must be set; receives the numbers
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_slots_get_stats(
    slots: *const kvmgr_slots,
    out_stats: *mut kvmgr_slots_stats,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a struct with its size.
    guard(|| unsafe {
        handle::with(slots, |slots| {
            let stats = slots.0.read(NAME)?.stats();
            let stats = kvmgr_slots_stats {
                struct_size: 0,
                bytes_used: stats.bytes_used as u64,
                bytes_peak: stats.bytes_peak as u64,
                rows_live: stats.rows_live as u64,
                rows_evicted: stats.rows_evicted,
                rows_written: stats.rows_written,
            };
            convert::fill_struct(out_stats, &stats, "kvmgr_slots_stats")
        })
    })
}

fn parse_config(config: &kvmgr_slots_config) -> Result<SlotsConfig> {
    ensure!(
        config.flags & !KVMGR_SLOTS_PIECES == 0,
        InvalidArgument,
        "flags has unknown bits {:#x}",
        config.flags
    );
    let or = |value: u32, default: u32| if value == 0 { default } else { value } as usize;
    Ok(SlotsConfig {
        layer: config.layer as usize,
        num_layers: or(config.num_layers, config.layer.saturating_add(1)),
        num_q_heads: config.num_q_heads as usize,
        num_kv_heads: config.num_kv_heads as usize,
        key_dim: config.key_dim as usize,
        value_dim: or(config.value_dim, config.key_dim),
        num_slots: config.num_slots as usize,
        num_streams: or(config.num_streams, 1),
        block_size: or(config.block_size, 64),
        pieces: config.flags & KVMGR_SLOTS_PIECES != 0,
    })
}

fn state_code(state: SlotState) -> u8 {
    match state {
        SlotState::Absent => KVMGR_SLOT_ABSENT,
        SlotState::Live => KVMGR_SLOT_LIVE,
        SlotState::Evicted => KVMGR_SLOT_EVICTED,
    }
}
