//! Quantizers alone: encode, decode, dot and axpy on plain buffers.

use std::ffi::{c_char, c_void};
use std::sync::{Arc, LazyLock};

use super::convert;
use super::guard::{guard, guard_or};
use super::handle::{self, Opaque};
use super::types::{kvmgr_side, kvmgr_status};
use super::version::{Listing, describe};
use crate::error::{Result, ensure};
use crate::quantizer::{self, Cell, QUANTIZERS, Quantizer};
use crate::shape::{MAX_BLOCK_SIZE, MAX_HEAD_DIM};

/// The numeric format of keys or of values. Immutable. Shared: retain and release, any thread.
#[derive(Debug)]
pub struct kvmgr_quantizer {
    _opaque: [u8; 0],
}

/// What a kvmgr_quantizer holds.
#[derive(Debug)]
pub(super) struct QuantizerHandle(Arc<dyn Quantizer>);

impl Opaque for kvmgr_quantizer {
    type Inner = QuantizerHandle;
    const NAME: &'static str = "kvmgr_quantizer";
}

static LISTING: LazyLock<Listing> = LazyLock::new(|| {
    let line = |entry: &&quantizer::Entry| {
        (entry.name.to_string(), describe(entry.summary, entry.params, entry.paper))
    };
    Listing::new(QUANTIZERS.iter().map(line))
});

/// Kinds of quantizers.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_quantizer_count() -> usize {
    guard_or(0, || Ok(LISTING.len()))
}

/// The name of kind index; NULL past the end. Static.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_quantizer_name(index: usize) -> *const c_char {
    guard_or(std::ptr::null(), || Ok(LISTING.name(index)))
}

/// A line about kind index: purpose, parameters, paper; NULL past the end. Static.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_quantizer_help(index: usize) -> *const c_char {
    guard_or(std::ptr::null(), || Ok(LISTING.help(index)))
}

/// Makes the quantizer that spec names, such as "q8_0", "had+q4_0" or "kivi(bits=2)".
///
/// @param spec a NUL-terminated string
/// @param side which side it will store; some formats group keys and values differently
/// @param out_quantizer receives a handle with one reference; NULL on failure
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_quantizer_create(
    spec: *const c_char,
    side: kvmgr_side,
    out_quantizer: *mut *mut kvmgr_quantizer,
) -> kvmgr_status {
    guard(|| {
        // SAFETY: the caller passes a place for a pointer.
        let out = unsafe { convert::handle_output(out_quantizer, "out_quantizer") }?;
        // SAFETY: the caller passes NULL or a NUL-terminated string.
        let spec = unsafe { convert::required_text(spec, "spec") }?;
        let quantizer =
            quantizer::create(spec, side.parse()?).map_err(|error| error.within("spec"))?;
        *out = handle::create(QuantizerHandle(quantizer))?;
        Ok(())
    })
}

/// Adds a reference; answers the same handle, or NULL if it is not a live quantizer.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_quantizer_retain(quantizer: *mut kvmgr_quantizer) -> *mut kvmgr_quantizer {
    guard_or(std::ptr::null_mut(), || handle::retain(quantizer))
}

/// Drops a reference. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_quantizer_release(quantizer: *mut kvmgr_quantizer) {
    guard(|| handle::release(quantizer));
}

/// Bytes of num_tokens encoded rows of dim elements.
///
/// @param num_tokens 1 to 1024
/// @param dim 1 to 1024; formats with groups need a multiple of their group
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_quantizer_bytes(
    quantizer: *const kvmgr_quantizer,
    num_tokens: u32,
    dim: u32,
    out_bytes: *mut usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and a place for a number.
    guard(|| unsafe {
        handle::with(quantizer, |quantizer| {
            let bytes = quantizer.bytes(num_tokens, dim)?;
            *convert::output(out_bytes, "out_bytes")? = bytes;
            Ok(())
        })
    })
}

/// Encodes rows [num_tokens, dim] into out, which has exactly kvmgr_quantizer_bytes bytes.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_quantizer_encode(
    quantizer: *const kvmgr_quantizer,
    rows: *const f32,
    num_tokens: u32,
    dim: u32,
    out: *mut c_void,
    out_size: usize,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and buffers of these sizes.
    guard(|| unsafe {
        handle::with(quantizer, |quantizer| {
            quantizer.expect_bytes(num_tokens, dim, out_size, "out_size")?;
            let rows = convert::slice(rows, elements(num_tokens, dim), "rows")?;
            let out = convert::slice_mut(out.cast::<u8>(), out_size, "out")?;
            quantizer.0.encode(rows, dim as usize, out);
            Ok(())
        })
    })
}

/// Decodes bytes, made by kvmgr_quantizer_encode with the same shape, into out_rows
/// [num_tokens, dim].
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_quantizer_decode(
    quantizer: *const kvmgr_quantizer,
    bytes: *const c_void,
    size: usize,
    num_tokens: u32,
    dim: u32,
    out_rows: *mut f32,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and buffers of these sizes.
    guard(|| unsafe {
        handle::with(quantizer, |quantizer| {
            let cell = quantizer.cell(bytes, size, num_tokens, dim)?;
            let out = convert::slice_mut(out_rows, elements(num_tokens, dim), "out_rows")?;
            quantizer.0.decode(&cell, out);
            Ok(())
        })
    })
}

/// out_scores[i, t] = queries[i] . row[t], without decoding to memory.
///
/// @param queries [num_queries, dim]
/// @param out_scores [num_queries, num_tokens]
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_quantizer_dot(
    quantizer: *const kvmgr_quantizer,
    bytes: *const c_void,
    size: usize,
    num_tokens: u32,
    dim: u32,
    queries: *const f32,
    num_queries: u32,
    out_scores: *mut f32,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and buffers of these sizes.
    guard(|| unsafe {
        handle::with(quantizer, |quantizer| {
            let cell = quantizer.cell(bytes, size, num_tokens, dim)?;
            let mut queries =
                convert::slice(queries, elements(num_queries, dim), "queries")?.to_vec();
            let scores = elements(num_queries, num_tokens);
            let scores = convert::slice_mut(out_scores, scores, "out_scores")?;
            quantizer.0.prepare_queries(dim as usize, &mut queries);
            quantizer.0.dot(&cell, &queries, scores);
            Ok(())
        })
    })
}

/// outputs[i] += sum over t of weights[i, t] * row[t], without decoding to memory.
///
/// @param weights [num_queries, num_tokens]
/// @param outputs [num_queries, dim], added to
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_quantizer_axpy(
    quantizer: *const kvmgr_quantizer,
    bytes: *const c_void,
    size: usize,
    num_tokens: u32,
    dim: u32,
    weights: *const f32,
    num_queries: u32,
    outputs: *mut f32,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and buffers of these sizes.
    guard(|| unsafe {
        handle::with(quantizer, |quantizer| {
            let cell = quantizer.cell(bytes, size, num_tokens, dim)?;
            let weights = convert::slice(weights, elements(num_queries, num_tokens), "weights")?;
            let outputs = convert::slice_mut(outputs, elements(num_queries, dim), "outputs")?;
            let mut sums = vec![0.0; outputs.len()];
            quantizer.0.axpy(&cell, weights, &mut sums);
            quantizer.0.finish_outputs(dim as usize, &mut sums);
            outputs.iter_mut().zip(sums).for_each(|(output, sum)| *output += sum);
            Ok(())
        })
    })
}

fn elements(a: u32, b: u32) -> usize {
    a as usize * b as usize
}

impl QuantizerHandle {
    fn bytes(&self, num_tokens: u32, dim: u32) -> Result<usize> {
        let (tokens, dim) = (num_tokens as usize, dim as usize);
        ensure!(
            (1..=MAX_BLOCK_SIZE).contains(&tokens),
            InvalidArgument,
            "num_tokens is {tokens}, must be in 1..={MAX_BLOCK_SIZE}"
        );
        ensure!(
            (1..=MAX_HEAD_DIM).contains(&dim),
            InvalidArgument,
            "dim is {dim}, must be in 1..={MAX_HEAD_DIM}"
        );
        self.0.check(tokens, dim)?;
        Ok(self.0.bytes(tokens, dim))
    }

    fn expect_bytes(&self, num_tokens: u32, dim: u32, size: usize, name: &str) -> Result<()> {
        let bytes = self.bytes(num_tokens, dim)?;
        ensure!(
            size == bytes,
            InvalidArgument,
            "{name} is {size}, {num_tokens} rows of {dim} in {} take {bytes} bytes",
            self.0.spec()
        );
        Ok(())
    }

    /// # Safety
    /// `bytes` is NULL or `size` readable bytes.
    unsafe fn cell<'a>(
        &self,
        bytes: *const c_void,
        size: usize,
        num_tokens: u32,
        dim: u32,
    ) -> Result<Cell<'a>> {
        self.expect_bytes(num_tokens, dim, size, "size")?;
        // SAFETY: the caller promises it.
        let bytes = unsafe { convert::slice(bytes.cast::<u8>(), size, "bytes") }?;
        let tokens = num_tokens as usize;
        Ok(Cell { bytes, tokens, dim: dim as usize, rows: 0..tokens, ahead: &[] })
    }
}
