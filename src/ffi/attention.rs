//! Attention over the sequences of a cache: plan once a step, append and run for each layer.

use std::sync::Arc;

use super::cache::kvmgr_cache;
use super::convert;
use super::guard::guard;
use super::handle::{self, Exclusive, Opaque};
use super::sequence::kvmgr_sequence;
use super::types::{kvmgr_status, kvmgr_tensor};
use crate::attention::{Attention, DeviceOptions, Options};
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

/// Flag: sequences that start with the same blocks do not attend to them together but each for itself,
/// so that results do not depend on what else is planned. Equal for all workers of a run.
pub const KVMGR_ATTENTION_NO_CASCADE: u32 = 1;

/// What a plan shares between sequences. Set struct_size before the call.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct kvmgr_attention_stats {
    /// sizeof(kvmgr_attention_stats).
    pub struct_size: usize,
    /// Groups of sequences that start with the same blocks, which are read once for all of them.
    pub shared_groups: u64,
    /// Sequences in groups.
    pub shared_sequences: u64,
    /// Rows that a group shares, of its longest lane, summed over groups.
    pub shared_rows: u64,
    /// Tasks over shared rows that workers have done since the plan was made. 0 if the runs could not
    /// use them: with a sliding window, ALiBi, chosen blocks or KVMGR_ATTENTION_NO_CASCADE.
    pub shared_tasks_run: u64,
}

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
    /// 0 or KVMGR_ATTENTION_NO_CASCADE.
    pub flags: u32,
    /// num_q_heads learned logits, an extra term of the denominator and of the LSE; or NULL. In
    /// device memory for a cache on a CUDA device.
    pub sinks: *const f32,
    /// num_q_heads slopes: logits lose slope * distance; or NULL, which it must be on CUDA.
    pub alibi_slopes: *const f32,
}

/// Makes an attention handle for the sequences of a cache. On a CUDA device this loads the kernels,
/// which the driver compiles the first time.
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
/// run after a block was sealed grows what it knows of the blocks. On a CUDA device `run` never allocates; with
/// a selector plan waits for the stream if there are new blocks that came encoded from a store.
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
/// On a CUDA device it queues one copy, and not while the stream is being captured; graphs serve later lists
/// of the same layers (kvmgr_attention_graph_key). A sliding window then must not reach over blocks that
/// are not selected: run answers KVMGR_UNSUPPORTED.
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

/// What the current plan shares between sequences. Fewer than 128 rows are not shared, nor is anything on a
/// CUDA device, or by sequences that have more than 8 planned tokens, are cache relative, have a selector or
/// a replay, or whose policy wants to know what rows receive.
///
/// @param out_stats its struct_size must be set; receives the numbers
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_attention_get_stats(
    attention: *const kvmgr_attention,
    out_stats: *mut kvmgr_attention_stats,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a struct that starts with its size.
    guard(|| unsafe {
        handle::with(attention, |attention| {
            let stats = attention.attention.read(NAME)?.statistics();
            let stats = kvmgr_attention_stats {
                struct_size: size_of::<kvmgr_attention_stats>(),
                shared_groups: stats.shared_groups as u64,
                shared_sequences: stats.shared_sequences as u64,
                shared_rows: stats.shared_rows as u64,
                shared_tasks_run: stats.shared_tasks_run,
            };
            convert::fill_struct(out_stats, &stats, "kvmgr_attention_stats")
        })
    })
}

/// Writes K and V of the planned tokens into the rows that were reserved for them.
///
/// On a CUDA device K and V are of one dtype, any, with rows aligned to 16 bytes; worker 0 launches one
/// kernel on the cache's stream, the other workers have nothing to do. No allocation, no waiting, so the
/// call can be captured into a graph.
///
/// @param layer below num_layers
/// @param key [planned tokens, num_kv_heads, head_dim], rotated as the model wants it
/// @param value [planned tokens, num_kv_heads, value_dim]; NULL with KVMGR_CACHE_VALUES_IN_KEYS
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
            if let Some(id) = attention.device() {
                let key = convert::device_tensor(key, "key", 3, id)?;
                let value = convert::device_tensor(value, "value", 3, id)?;
                let part = device_part(worker, num_workers)?;
                let plan = attention.attention.read(NAME)?;
                return plan.append_on_device(layer as usize, &key, &value, part);
            }
            let key = convert::tensor(key, "key")?;
            let value = convert::optional_tensor(value, "value")?;
            let plan = attention.attention.read(NAME)?;
            in_parts(&attention.manager, worker, num_workers, |worker, num_workers| {
                plan.append(layer as usize, &key, value.as_ref(), worker, num_workers)
            })
        })
    })
}

/// Attends for the planned tokens: output = softmax(query . K) V. Token i of n of a sequence sees
/// all earlier tokens that were kept and itself. A query that sees nothing gets zeros and -inf.
///
/// On a CUDA device Q and O are of the cache's dtype with rows aligned to 16 bytes, LSE is f32 with
/// neighbouring heads; worker 0 launches one kernel on the cache's stream, or two if the plan has decode
/// steps and prompts, as kvmgr_attention_append does, and one more for each of these that a policy asks for: the
/// last queries, what rows receive, a list of blocks. A sliding_window in which a policy has evicted tokens is
/// KVMGR_UNSUPPORTED there. What rows receive there (h2o) is from all planned queries, also those of drafts
/// that are not committed later.
///
/// From compute capability 9.0 on, decode steps start while the kernel before them on the stream ends
/// (programmatic dependent launch), and read rows of earlier steps before they wait for it. So rows of the step
/// and Q may be written by that kernel, whoever launches it; rows of earlier steps must be complete before a
/// kernel that calls griddepcontrol.launch_dependents is launched in front of run. What this library queues
/// obeys.
///
/// @param layer below num_layers; all its reserved rows must have been appended. Layers of a model that
///        share the keys and values of one (CLA, YOCO, KVSharer) run with the layer that holds them.
/// @param query [planned tokens, num_q_heads, head_dim]
/// @param output [planned tokens, num_q_heads, value_dim]
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
            if let Some(id) = attention.device() {
                let query = convert::device_tensor(query, "query", 3, id)?;
                let output = convert::device_tensor(output, "output", 3, id)?;
                let lse = match lse.is_null() {
                    true => None,
                    false => Some(convert::device_tensor(lse, "lse", 2, id)?),
                };
                let options = parse_device_options(options)?;
                let part = device_part(worker, num_workers)?;
                let plan = attention.attention.read(NAME)?;
                let lse = lse.as_ref();
                return plan.run_on_device(layer as usize, &query, &output, lse, &options, part);
            }
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

/// Takes the device memory that plans need, so that no later plan within these limits takes more:
/// kvmgr_attention_graph_key then stays the same. Without it the memory grows in kvmgr_attention_plan, and
/// with it where policies have left sequences in more pieces than they have blocks. What selectors, selected
/// blocks and policies that want to know what rows receive need beside it is taken by the first plan or
/// selection of that kind, at once for these limits. Not counted is memory of single sequences, which no key
/// depends on: plans take it for policies that want the last queries or what rows receive. The current plan is
/// gone, but not if the stream is being captured: that is KVMGR_INVALID_STATE and changes nothing. CUDA only.
///
/// @param max_sequences most sequences of a plan
/// @param max_queries most tokens of a plan, over all sequences
/// @param max_blocks most blocks of a plan in one layer, over all sequences and their lanes
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_attention_reserve(
    attention: *mut kvmgr_attention,
    max_sequences: usize,
    max_queries: usize,
    max_blocks: usize,
) -> kvmgr_status {
    guard(|| {
        handle::with(attention.cast_const(), |attention| {
            let limits = [max_sequences, max_queries, max_blocks];
            for (name, n) in ["max_sequences", "max_queries", "max_blocks"].iter().zip(limits) {
                let most = u32::MAX as usize;
                ensure!(n <= most, InvalidArgument, "{name} is {n}, must be at most {most}");
            }
            attention.attention.write(NAME)?.reserve(max_sequences, max_queries, max_blocks)
        })
    })
}

/// A number that says what a CUDA graph is good for. Capture kvmgr_attention_append and
/// kvmgr_attention_run of all layers under one plan; after another kvmgr_attention_plan with the same
/// number, launching that graph does the work of that plan: what changes from plan to plan is read
/// from device memory. The number depends on how many tokens are planned and on what policies want to know of
/// them, not on how long sequences are, as long as the plan's device memory has not grown; kvmgr_attention_reserve sizes it once.
/// Plan outside of the capture. CUDA only.
///
/// @param out_key receives the number
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_attention_graph_key(
    attention: *const kvmgr_attention,
    out_key: *mut u64,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a place for a number.
    guard(|| unsafe {
        handle::with(attention, |attention| {
            let out = convert::output(out_key, "out_key")?;
            *out = attention.attention.read(NAME)?.graph_key()?;
            Ok(())
        })
    })
}

/// Says that a graph with the appends of all layers was launched for the current plan, instead of
/// kvmgr_attention_append, so that the tokens can be committed. CUDA only.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_attention_graph_launched(attention: *mut kvmgr_attention) -> kvmgr_status {
    guard(|| {
        handle::with(attention.cast_const(), |attention| {
            attention.attention.read(NAME)?.graph_launched()
        })
    })
}

impl AttentionHandle {
    /// The CUDA device of the cache, if it is on one.
    fn device(&self) -> Option<i32> {
        self.manager.cache().gpu().map(|gpu| gpu.id())
    }
}

/// Which part a call is: a device does all in one.
fn device_part(worker: u32, num_workers: u32) -> Result<(usize, usize)> {
    if num_workers > 0 {
        return Ok((worker as usize, num_workers as usize));
    }
    ensure!(worker == 0, InvalidArgument, "worker is {worker}, must be 0 when num_workers is 0");
    Ok((0, 1))
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
/// `options` is NULL or a struct that starts with its size.
unsafe fn parse_device_options(options: *const kvmgr_attention_options) -> Result<DeviceOptions> {
    if options.is_null() {
        return Ok(DeviceOptions::default());
    }
    // SAFETY: the caller promises it.
    let options = unsafe { convert::config(options, "kvmgr_attention_options") }?;
    let unknown = options.flags & !KVMGR_ATTENTION_NO_CASCADE;
    ensure!(unknown == 0, InvalidArgument, "flags has unknown bits {unknown:#x}");
    ensure!(
        options.alibi_slopes.is_null(),
        Unsupported,
        "alibi_slopes is not NULL, which attention on a CUDA device cannot do"
    );
    let kvmgr_attention_options { scale, softcap, sliding_window, sinks, .. } = options;
    ensure!(sinks.is_aligned(), InvalidArgument, "sinks is not aligned to 4 bytes");
    let common = Options { scale, softcap, sliding_window, ..Options::default() };
    Ok(DeviceOptions { common, sinks: sinks.addr() as u64 })
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
    let unknown = options.flags & !KVMGR_ATTENTION_NO_CASCADE;
    ensure!(unknown == 0, InvalidArgument, "flags has unknown bits {unknown:#x}");
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
        no_cascade: options.flags & KVMGR_ATTENTION_NO_CASCADE != 0,
    })
}
