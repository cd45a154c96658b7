//! Plain types of the C ABI: statuses, newtypes of enums, the tensor view.

use std::ffi::c_void;

use crate::error::Kind;

/// The result of every call that can fail: 0 or a negative number that never changes its meaning.
/// After a failure `kvmgr_last_error_message` says which argument, which value and which limit.
pub type kvmgr_status = i32;

/// Success.
pub const KVMGR_OK: kvmgr_status = 0;
/// An argument is outside its documented range.
pub const KVMGR_INVALID_ARGUMENT: kvmgr_status = -1;
/// A handle is NULL, of another type, or already released (as far as that can be told).
pub const KVMGR_INVALID_HANDLE: kvmgr_status = -2;
/// The call is valid, but not in the current state of the object.
pub const KVMGR_INVALID_STATE: kvmgr_status = -3;
/// An exclusive handle is in use by another thread.
pub const KVMGR_BUSY: kvmgr_status = -4;
/// The named thing does not exist.
pub const KVMGR_NOT_FOUND: kvmgr_status = -5;
/// No free block is left: a normal answer, preempt a sequence and retry.
pub const KVMGR_OUT_OF_BLOCKS: kvmgr_status = -10;
/// A memory limit is reached or the system refused memory.
pub const KVMGR_OUT_OF_MEMORY: kvmgr_status = -11;
/// This build, device or pipeline cannot do what was asked.
pub const KVMGR_UNSUPPORTED: kvmgr_status = -20;
/// No device of the wanted type is usable on this machine; the message says why.
pub const KVMGR_NO_DEVICE: kvmgr_status = -21;
/// A device reported an error.
pub const KVMGR_DEVICE_ERROR: kvmgr_status = -30;
/// A store failed.
pub const KVMGR_STORE_ERROR: kvmgr_status = -31;
/// Bytes read back are not the bytes that were written.
pub const KVMGR_CORRUPT: kvmgr_status = -32;
/// A bug in the library. The handle that was in use answers this from now on.
pub const KVMGR_INTERNAL: kvmgr_status = -99;

/// The status of an error kind.
pub(super) fn status_of(kind: Kind) -> kvmgr_status {
    match kind {
        Kind::InvalidArgument => KVMGR_INVALID_ARGUMENT,
        Kind::InvalidHandle => KVMGR_INVALID_HANDLE,
        Kind::InvalidState => KVMGR_INVALID_STATE,
        Kind::Busy => KVMGR_BUSY,
        Kind::NotFound => KVMGR_NOT_FOUND,
        Kind::OutOfBlocks => KVMGR_OUT_OF_BLOCKS,
        Kind::OutOfMemory => KVMGR_OUT_OF_MEMORY,
        Kind::Unsupported => KVMGR_UNSUPPORTED,
        Kind::NoDevice => KVMGR_NO_DEVICE,
        Kind::Device => KVMGR_DEVICE_ERROR,
        Kind::Store => KVMGR_STORE_ERROR,
        Kind::Corrupt => KVMGR_CORRUPT,
        Kind::Internal => KVMGR_INTERNAL,
    }
}

/// Every status with its name.
pub(super) const STATUSES: &[(kvmgr_status, &std::ffi::CStr)] = &[
    (KVMGR_OK, c"OK"),
    (KVMGR_INVALID_ARGUMENT, c"INVALID_ARGUMENT"),
    (KVMGR_INVALID_HANDLE, c"INVALID_HANDLE"),
    (KVMGR_INVALID_STATE, c"INVALID_STATE"),
    (KVMGR_BUSY, c"BUSY"),
    (KVMGR_NOT_FOUND, c"NOT_FOUND"),
    (KVMGR_OUT_OF_BLOCKS, c"OUT_OF_BLOCKS"),
    (KVMGR_OUT_OF_MEMORY, c"OUT_OF_MEMORY"),
    (KVMGR_UNSUPPORTED, c"UNSUPPORTED"),
    (KVMGR_NO_DEVICE, c"NO_DEVICE"),
    (KVMGR_DEVICE_ERROR, c"DEVICE_ERROR"),
    (KVMGR_STORE_ERROR, c"STORE_ERROR"),
    (KVMGR_CORRUPT, c"CORRUPT"),
    (KVMGR_INTERNAL, c"INTERNAL"),
];

/// The element type of a tensor.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct kvmgr_dtype(pub u32);
/// IEEE 754 single precision.
pub const KVMGR_DTYPE_F32: kvmgr_dtype = kvmgr_dtype(1);
/// IEEE 754 half precision.
pub const KVMGR_DTYPE_F16: kvmgr_dtype = kvmgr_dtype(2);
/// bfloat16.
pub const KVMGR_DTYPE_BF16: kvmgr_dtype = kvmgr_dtype(3);

/// What one block table of a sequence covers.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct kvmgr_lane_width(pub u32);
/// The coarsest width that the spec of the cache allows.
pub const KVMGR_LANE_AUTO: kvmgr_lane_width = kvmgr_lane_width(0);
/// One table for all layers and heads: the plain paged layout.
pub const KVMGR_LANE_SEQUENCE: kvmgr_lane_width = kvmgr_lane_width(1);
/// One table for each layer.
pub const KVMGR_LANE_LAYER: kvmgr_lane_width = kvmgr_lane_width(2);
/// One table for each layer and KV head: heads keep different tokens and really free the others.
pub const KVMGR_LANE_HEAD: kvmgr_lane_width = kvmgr_lane_width(3);

/// Which elements of a head RoPE pairs.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct kvmgr_rope_style(pub u32);
/// The engine does not tell; specs that rotate keys are refused.
pub const KVMGR_ROPE_NONE: kvmgr_rope_style = kvmgr_rope_style(0);
/// Pairs (i, i + dims/2): Hugging Face rotate_half, ggml NEOX.
pub const KVMGR_ROPE_HALF: kvmgr_rope_style = kvmgr_rope_style(1);
/// Pairs (2i, 2i + 1): RoFormer, ggml NORM.
pub const KVMGR_ROPE_INTERLEAVED: kvmgr_rope_style = kvmgr_rope_style(2);

/// A side of the cache. Some quantizers group keys and values along different axes.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct kvmgr_side(pub u32);
/// Keys.
pub const KVMGR_SIDE_KEY: kvmgr_side = kvmgr_side(1);
/// Values.
pub const KVMGR_SIDE_VALUE: kvmgr_side = kvmgr_side(2);

/// Where memory is, in DLPack's numbering; 0 means CPU too.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct kvmgr_device_type(pub u32);
/// Host memory.
pub const KVMGR_DEVICE_CPU: kvmgr_device_type = kvmgr_device_type(1);
/// CUDA device memory.
pub const KVMGR_DEVICE_CUDA: kvmgr_device_type = kvmgr_device_type(2);

/// How important a log message is.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct kvmgr_log_level(pub u32);
/// No messages.
pub const KVMGR_LOG_OFF: kvmgr_log_level = kvmgr_log_level(0);
/// Something failed.
pub const KVMGR_LOG_ERROR: kvmgr_log_level = kvmgr_log_level(1);
/// Something works, but not as one would expect.
pub const KVMGR_LOG_WARN: kvmgr_log_level = kvmgr_log_level(2);
/// Rare events of interest.
pub const KVMGR_LOG_INFO: kvmgr_log_level = kvmgr_log_level(3);
/// For developers.
pub const KVMGR_LOG_DEBUG: kvmgr_log_level = kvmgr_log_level(4);

/// A strided view of the caller's memory. The library never keeps it beyond the call.
///
/// Shapes: Q and O are [tokens, q_heads, head_dim], K and V are [tokens, kv_heads, head_dim], LSE
/// is [tokens, q_heads]. The innermost dimension is contiguous.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_tensor {
    /// First element, aligned for `dtype`.
    pub data: *mut c_void,
    /// Type of the elements.
    pub dtype: kvmgr_dtype,
    /// Dimensions in use: 2 or 3.
    pub ndim: u32,
    /// Elements of each dimension.
    pub shape: [i64; 4],
    /// Distance between neighbours in elements; all zero means contiguous.
    pub strides: [i64; 4],
    /// Where the memory is; 0 means CPU.
    pub device_type: kvmgr_device_type,
    /// Which device.
    pub device_id: i32,
}
