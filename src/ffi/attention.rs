//! Attention over the sequences of a cache: plan once a step, append and run for each layer.

use std::sync::Arc;

use super::cache::kvmgr_cache;
use super::convert;
use super::guard::guard;
use super::handle::{self, Exclusive, Opaque};
use super::sequence::kvmgr_sequence;
use super::types::{kvmgr_status, kvmgr_tensor};
use crate::attention::{Attention, Options};
use crate::error::{Result, ensure};
use crate::manager::Manager;

/// Plans and runs attention. kvmgr_attention_plan wants the handle alone; append and run may be
/// called by many workers at once. A thread that breaks this gets KVMGR_BUSY.
#[derive(Debug)]
pub struct kvmgr_attention {
    _opaque: [u8; 0],
}

/// What a kvmgr_attention holds.
#[derive(Debug)]
pub(super) struct AttentionHandle {
    manager: Arc<Manager>,
    attention: Exclusive<Attention>,
}

impl Opaque for kvmgr_attention {
    type Inner = AttentionHandle;
    const NAME: &'static str = NAME;
}

const NAME: &str = "kvmgr_attention";

/// What a layer does to its logits. Set struct_size to its sizeof; zeros, or NULL instead of the
/// struct, mean plain softmax(q . k / sqrt(head_dim)).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_attention_options {
    /// sizeof(kvmgr_attention_options).
    pub struct_size: usize,
    /// Factor of q . k; 0 means 1 / sqrt(head_dim).
    pub scale: f32,
    /// Logits become softcap * tanh(logit / softcap); 0 means off.
    pub softcap: f32,
    /// Keys at this distance or further are invisible; 0 means off.
    pub sliding_window: u32,
    /// Reserved, 0.
    pub flags: u32,
    /// num_q_heads learned logits, an extra term of the denominator and of the LSE; or NULL.
    pub sinks: *const f32,
    /// num_q_heads slopes: logits lose slope * distance; or NULL.
    pub alibi_slopes: *const f32,
}

/// Makes an attention handle for the sequences of a cache.
///
/// @param out_attention receives an exclusive handle; NULL on failure
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_attention_create(
    cache: *mut kvmgr_cache,
    out_attention: *mut *mut kvmgr_attention,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a place for a pointer.
    guard(|| unsafe {
        let out = convert::handle_output(out_attention, "out_attention")?;
        handle::with(cache, |cache| {
            let manager = cache.0.clone();
            let attention = Exclusive::new(Attention::new(manager.cache().clone())?);
            *out = handle::create(AttentionHandle { manager, attention })?;
            Ok(())
        })
    })
}

/// Ends an attention handle. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_attention_destroy(attention: *mut kvmgr_attention) {
    guard(|| handle::release(attention));
}

/// Plans one step: a snapshot of the block tables. Sequence i contributes its last num_queries[i]
/// tokens, reserved ones included; their rows follow each other in Q, K, V, O and LSE. If one of
/// the sequences changes afterwards, append and run answer KVMGR_INVALID_STATE. On failure the
/// previous plan is gone. This is the only call that allocates, but for a selector in the spec: the first
/// run after a block was sealed grows what it knows of the blocks.
///
/// @param sequences num_sequences different sequences of the handle's cache
/// @param num_queries num_sequences numbers, each at least 1
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_attention_plan(
    attention: *mut kvmgr_attention,
    sequences: *const *mut kvmgr_sequence,
    num_queries: *const u32,
    num_sequences: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes handles and arrays of this length.
    guard(|| unsafe {
        handle::with(attention, |attention| {
            let handles = convert::slice(sequences, num_sequences, "sequences")?;
            let queries = convert::slice(num_queries, num_sequences, "num_queries")?;
            let mut borrowed = Vec::with_capacity(num_sequences);
            for (i, handle) in handles.iter().enumerate() {
                let sequence = handle::borrow::<kvmgr_sequence>(handle.cast_const());
                let name = || format!("sequences[{i}]");
                borrowed.push(sequence.map_err(|error| error.within(name()))?);
            }
            let guards: Result<Vec<_>> =
                borrowed.iter().map(|sequence| sequence.0.read("kvmgr_sequence")).collect();
            let guards = guards?;
            let batch: Vec<_> = guards
                .iter()
                .zip(queries)
                .map(|(session, n)| (session.sequence(), *n as usize))
                .collect();
            attention.attention.write(NAME)?.plan(&batch)
        })
    })
}

/// Restricts a layer of the current plan to blocks: selected attention, such as Quest. KV head h of
/// the batch's sequence s attends to blocks[starts[i]] to blocks[starts[i + 1] - 1] with
/// i = s * num_kv_heads + h: ascending indices into the block table of its lane. The blocks that
/// hold the planned tokens are attended in any case, so an empty list leaves those. It holds for
/// the runs of this layer until the next plan, and comes before what a selector in the spec would
/// choose. On failure the layer is back to all blocks.
/// Wants the handle alone; allocates only while its buffers still grow.
///
/// @param layer below num_layers
/// @param starts num_sequences * num_kv_heads + 1 ascending numbers, the first 0 and the last
///        num_blocks
/// @param num_starts length of starts, checked against the plan
/// @param blocks num_blocks indices; may be NULL if num_blocks is 0
/// @param num_blocks length of blocks
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_attention_select(
    attention: *mut kvmgr_attention,
    layer: u32,
    starts: *const u32,
    num_starts: usize,
    blocks: *const u32,
    num_blocks: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and arrays of these lengths.
    guard(|| unsafe {
        handle::with(attention, |attention| {
            let starts = convert::slice(starts, num_starts, "starts")?;
            let blocks = convert::slice(blocks, num_blocks, "blocks")?;
            attention.attention.write(NAME)?.select(layer as usize, starts, blocks)
        })
    })
}

/// Writes K and V of the planned tokens into the rows that were reserved for them.
///
/// @param layer below num_layers
/// @param key [planned tokens, num_kv_heads, head_dim], rotated as the model wants it
/// @param value [planned tokens, num_kv_heads, head_dim]
/// @param worker which part of the work to do, below num_workers. The caller waits for all parts
///        before it runs the layer.
/// @param num_workers parts; 0 (with worker 0) lets the library's own threads do all of them
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_attention_append(
    attention: *const kvmgr_attention,
    layer: u32,
    key: *const kvmgr_tensor,
    value: *const kvmgr_tensor,
    worker: u32,
    num_workers: u32,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and tensors it may read.
    guard(|| unsafe {
        handle::with(attention, |attention| {
            let key = convert::tensor(key, "key")?;
            let value = convert::tensor(value, "value")?;
            let plan = attention.attention.read(NAME)?;
            in_parts(&attention.manager, worker, num_workers, |worker, num_workers| {
                plan.append(layer as usize, &key, &value, worker, num_workers)
            })
        })
    })
}

/// Attends for the planned tokens: output = softmax(query . K) V. Token i of n of a sequence sees
/// all earlier tokens that were kept and itself. A query that sees nothing gets zeros and -inf.
///
/// @param layer below num_layers; all its reserved rows must have been appended. Layers of a model that
///        share the keys and values of one (CLA, YOCO, KVSharer) run with the layer that holds them.
/// @param query [planned tokens, num_q_heads, head_dim]
/// @param output [planned tokens, num_q_heads, head_dim]
/// @param lse [planned tokens, num_q_heads]: receives the log-sum-exp of the logits; may be NULL
/// @param options may be NULL
/// @param worker which part of the work to do, below num_workers. The caller waits for all parts
///        before it runs another layer; after a run that lacks parts it plans again.
/// @param num_workers parts; 0 (with worker 0) lets the library's own threads do all of them
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_attention_run(
    attention: *const kvmgr_attention,
    layer: u32,
    query: *const kvmgr_tensor,
    output: *const kvmgr_tensor,
    lse: *const kvmgr_tensor,
    options: *const kvmgr_attention_options,
    worker: u32,
    num_workers: u32,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle, tensors it may read or write, and NULL or options.
    guard(|| unsafe {
        handle::with(attention, |attention| {
            let query = convert::tensor(query, "query")?;
            let output = convert::tensor_mut(output, "output", 3)?;
            let lse = match lse.is_null() {
                true => None,
                false => Some(convert::tensor_mut(lse, "lse", 2)?),
            };
            let num_q_heads = attention.manager.cache().config().shape.num_q_heads;
            let options = parse_options(options, num_q_heads)?;
            let plan = attention.attention.read(NAME)?;
            in_parts(&attention.manager, worker, num_workers, |worker, num_workers| {
                let lse = lse.as_ref();
                plan.run(layer as usize, &query, &output, lse, &options, worker, num_workers)
            })
        })
    })
}

fn in_parts(
    manager: &Manager,
    worker: u32,
    num_workers: u32,
    part: impl Fn(usize, usize) -> Result<()> + Sync,
) -> Result<()> {
    if num_workers > 0 {
        return part(worker as usize, num_workers as usize);
    }
    ensure!(worker == 0, InvalidArgument, "worker is {worker}, must be 0 when num_workers is 0");
    manager.run_workers(part)
}

/// # Safety
/// `options` is NULL or a struct that starts with its size; its lists are NULL or have
/// `num_q_heads` elements.
unsafe fn parse_options<'a>(
    options: *const kvmgr_attention_options,
    num_q_heads: usize,
) -> Result<Options<'a>> {
    if options.is_null() {
        return Ok(Options::default());
    }
    // SAFETY: the caller promises it.
    let options = unsafe { convert::config(options, "kvmgr_attention_options") }?;
    ensure!(options.flags == 0, InvalidArgument, "flags has unknown bits {:#x}", options.flags);
    let list = |data: *const f32, name: &str| {
        // SAFETY: the caller promises it.
        unsafe { convert::optional_slice(data, num_q_heads, name) }
    };
    Ok(Options {
        scale: options.scale,
        softcap: options.softcap,
        sliding_window: options.sliding_window,
        sinks: list(options.sinks, "sinks")?,
        alibi_slopes: list(options.alibi_slopes, "alibi_slopes")?,
    })
}
