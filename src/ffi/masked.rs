//! Attention under an engine's own mask: its options, where its workers meet, and the keys and values
//! in the engine's own memory.

use super::convert;
use super::guard::guard;
use super::handle::{self, Borrowed, Opaque};
use super::types::{kvmgr_status, kvmgr_tensor};
use crate::error::Result;
use crate::slots::{Dense, Masked, Meeting, Options};

/// Where the workers of one attention meet: with it, kvmgr_slots_attend and kvmgr_attend_dense split
/// a few queries over many rows by rows, and not only by KV heads. Calls that use it at the same time
/// must be the workers of one attention, with the same num_workers; the next attention may use it
/// when all of them have returned.
#[derive(Debug)]
pub struct kvmgr_meeting {
    _opaque: [u8; 0],
}

impl Opaque for kvmgr_meeting {
    type Inner = Meeting;
    const NAME: &'static str = "kvmgr_meeting";
}

/// What a layer does to its logits under a mask. Set struct_size to its sizeof; zeros, or NULL
/// instead of the struct, mean plain softmax(q . k / sqrt(key_dim) + mask).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_mask_options {
    /// sizeof(kvmgr_mask_options).
    pub struct_size: usize,
    /// Factor of q . k; 0 means 1 / sqrt(key_dim).
    pub scale: f32,
    /// Logits become softcap * tanh(logit / softcap); 0 means off.
    pub softcap: f32,
    /// num_q_heads learned logits, an extra term of the denominator; or NULL.
    pub sinks: *const f32,
    /// num_q_heads factors of the mask; or NULL for 1.
    pub mask_slopes: *const f32,
    /// Where the workers of the call meet; or NULL, then workers share heads but no rows.
    pub meeting: *const kvmgr_meeting,
}

/// Makes a place for the workers of an attention to meet.
///
/// @param out_meeting receives the handle; NULL on failure
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_meeting_create(
    out_meeting: *mut *mut kvmgr_meeting,
) -> kvmgr_status {
    // SAFETY: the caller passes a place for a pointer.
    guard(|| unsafe {
        let out = convert::handle_output(out_meeting, "out_meeting")?;
        *out = handle::create(Meeting::default())?;
        Ok(())
    })
}

/// Ends a meeting place. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_meeting_destroy(meeting: *mut kvmgr_meeting) {
    guard(|| handle::release(meeting));
}

/// Attends to keys and values in the engine's own memory, under its mask. Needs no handle.
///
/// @param query [num_queries, num_q_heads, key_dim]
/// @param key [rows, num_kv_heads, key_dim]
/// @param value [rows, num_kv_heads, value_dim]
/// @param mask [num_queries, 1 or num_q_heads, rows]; NULL shows all
/// @param output [num_queries, num_q_heads, value_dim]
/// @param options may be NULL
/// @param worker which part of the work to do, below num_workers
/// @param num_workers parts, at least 1; the output is complete when all are done
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_attend_dense(
    query: *const kvmgr_tensor,
    key: *const kvmgr_tensor,
    value: *const kvmgr_tensor,
    mask: *const kvmgr_tensor,
    output: *const kvmgr_tensor,
    options: *const kvmgr_mask_options,
    worker: u32,
    num_workers: u32,
) -> kvmgr_status {
    // SAFETY: the caller passes tensors it may read or write, and NULL or options.
    guard(|| unsafe {
        let meeting = meeting(options)?;
        let call = masked(query, mask, output, options, meeting.as_deref())?;
        let (key, value) = (convert::dense(key, "key")?, convert::dense(value, "value")?);
        let heads = call.query.shape()[1];
        Dense::attend(&key, &value, heads, &call, worker as usize, num_workers as usize)
    })
}

/// # Safety
/// The tensors are NULL or describe memory to read, and `output` memory to write; `options` is NULL
/// or a struct that starts with its size, whose lists have one number for each query head.
pub(super) unsafe fn masked<'a>(
    query: *const kvmgr_tensor,
    mask: *const kvmgr_tensor,
    output: *const kvmgr_tensor,
    options: *const kvmgr_mask_options,
    meeting: Option<&'a Meeting>,
) -> Result<Masked<'a>> {
    // SAFETY: the caller promises it.
    unsafe {
        let query = convert::tensor(query, "query")?;
        let mask = match mask.is_null() {
            true => None,
            false => Some(convert::tensor(mask, "mask")?),
        };
        let output = convert::tensor_mut(output, "output", 3)?;
        let options = Options { meeting, ..parse_options(options, query.shape()[1])? };
        Ok(Masked { query, output, mask, options })
    }
}

/// # Safety
/// As for [`masked`].
unsafe fn parse_options<'a>(
    options: *const kvmgr_mask_options,
    num_q_heads: usize,
) -> Result<Options<'a>> {
    if options.is_null() {
        return Ok(Options::default());
    }
    // SAFETY: the caller promises it.
    let options = unsafe { convert::config(options, "kvmgr_mask_options") }?;
    let list = |data: *const f32, name: &str| {
        // SAFETY: the caller promises it.
        unsafe { convert::optional_slice(data, num_q_heads, name) }
    };
    Ok(Options {
        scale: options.scale,
        softcap: options.softcap,
        sinks: list(options.sinks, "sinks")?,
        mask_slopes: list(options.mask_slopes, "mask_slopes")?,
        meeting: None,
    })
}

/// # Safety
/// As for [`masked`].
pub(super) unsafe fn meeting(
    options: *const kvmgr_mask_options,
) -> Result<Option<Borrowed<kvmgr_meeting>>> {
    if options.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller promises it.
    let options = unsafe { convert::config(options, "kvmgr_mask_options") }?;
    if options.meeting.is_null() {
        return Ok(None);
    }
    handle::borrow(options.meeting).map(Some)
}
