//! From C arguments to Rust values: one helper for each kind of pointer, used everywhere.

use std::ffi::{CStr, c_char};

use super::device;
use super::types::{
    KVMGR_DEVICE_CPU, KVMGR_DEVICE_CUDA, KVMGR_DTYPE_BF16, KVMGR_DTYPE_F16, KVMGR_DTYPE_F32,
    KVMGR_ROPE_HALF, KVMGR_ROPE_INTERLEAVED, KVMGR_ROPE_NONE, KVMGR_SIDE_KEY, KVMGR_SIDE_VALUE,
    kvmgr_device_type, kvmgr_dtype, kvmgr_rope_style, kvmgr_side, kvmgr_tensor,
};
use crate::device::cuda::DeviceTensor;
use crate::device::tensor::{Tensor, TensorMut};
use crate::dtype::DType;
use crate::error::{Result, bail, ensure};
use crate::quantizer::Side;
use crate::shape::{MAX_HEAD_DIM, Rope, RopeStyle};
use crate::simd::Format;
use crate::slots::Dense;

/// `len` elements at `data`; NULL is fine when `len` is 0.
///
/// # Safety
/// If `data` is aligned and not NULL, `len` elements are readable there for `'a`.
pub(super) unsafe fn slice<'a, T>(data: *const T, len: usize, name: &str) -> Result<&'a [T]> {
    check_pointer(data, len, name)?;
    if len == 0 {
        return Ok(&[]);
    }
    // SAFETY: not NULL, aligned, of a possible size; the caller promises the rest.
    Ok(unsafe { std::slice::from_raw_parts(data, len) })
}

/// `len` elements at `data`, or none if it is NULL.
///
/// # Safety
/// As for [`slice`].
pub(super) unsafe fn optional_slice<'a, T>(
    data: *const T,
    len: usize,
    name: &str,
) -> Result<Option<&'a [T]>> {
    // SAFETY: the caller promises it.
    (!data.is_null()).then(|| unsafe { slice(data, len, name) }).transpose()
}

/// `len` elements at `data` to write; NULL is fine when `len` is 0.
///
/// # Safety
/// If `data` is aligned and not NULL, `len` elements there belong to the caller alone for `'a`.
pub(super) unsafe fn slice_mut<'a, T>(data: *mut T, len: usize, name: &str) -> Result<&'a mut [T]> {
    check_pointer(data, len, name)?;
    if len == 0 {
        return Ok(&mut []);
    }
    // SAFETY: not NULL, aligned, of a possible size; the caller promises the rest.
    Ok(unsafe { std::slice::from_raw_parts_mut(data, len) })
}

/// Where one value goes.
///
/// # Safety
/// If `out` is aligned and not NULL, one element there belongs to the caller alone for `'a`.
pub(super) unsafe fn output<'a, T>(out: *mut T, name: &str) -> Result<&'a mut T> {
    // SAFETY: the caller promises it.
    Ok(&mut unsafe { slice_mut(out, 1, name) }?[0])
}

/// Sets a handle output to NULL before anything else can fail.
///
/// # Safety
/// As for [`output`].
pub(super) unsafe fn handle_output<'a, T>(out: *mut *mut T, name: &str) -> Result<&'a mut *mut T> {
    // SAFETY: the caller promises it.
    let out = unsafe { output(out, name) }?;
    *out = std::ptr::null_mut();
    Ok(out)
}

/// A NUL-terminated UTF-8 string, `None` for NULL.
///
/// # Safety
/// `text` is NULL or ends in NUL within its memory, which lives for `'a`.
pub(super) unsafe fn text<'a>(text: *const c_char, name: &str) -> Result<Option<&'a str>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller promises it.
    match unsafe { CStr::from_ptr(text) }.to_str() {
        Ok(text) => Ok(Some(text)),
        Err(_) => bail!(InvalidArgument, "{name} is not UTF-8"),
    }
}

/// A string that must be there.
///
/// # Safety
/// As for [`text`].
pub(super) unsafe fn required_text<'a>(pointer: *const c_char, name: &str) -> Result<&'a str> {
    // SAFETY: the caller promises it.
    match unsafe { text(pointer, name) }? {
        Some(text) => Ok(text),
        None => bail!(InvalidArgument, "{name} is NULL"),
    }
}

/// A struct whose first field is its size as the caller knows it. Fields that an older caller does
/// not know are zero; bytes that a newer caller sets and this library does not know are an error.
///
/// # Safety
/// `config` is NULL or starts with a `size_t` that tells how many bytes are readable. `T` is valid
/// when all its bytes are zero and has no padding.
pub(super) unsafe fn config<T: Copy>(config: *const T, name: &str) -> Result<T> {
    check_pointer(config, 1, name)?;
    // SAFETY: not NULL and aligned; the caller promises a size first.
    let size = unsafe { config.cast::<usize>().read() };
    let own = size_of::<T>();
    ensure!(
        (size_of::<usize>()..=MAX_STRUCT).contains(&size),
        InvalidArgument,
        "{name}.struct_size is {size}, must be sizeof({name}), here {own}"
    );
    // SAFETY: the caller promises `size` readable bytes.
    let bytes = unsafe { std::slice::from_raw_parts(config.cast::<u8>(), size) };
    if let Some(unknown) = bytes.get(own..)
        && let Some(offset) = unknown.iter().position(|byte| *byte != 0)
    {
        let offset = own + offset;
        bail!(
            InvalidArgument,
            "{name} has an unknown setting at byte {offset}: the caller is newer than the library"
        );
    }
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: both are at least that long and do not overlap; zero is valid for the rest of `T`.
    unsafe {
        let source = config.cast::<u8>();
        source.copy_to_nonoverlapping(value.as_mut_ptr().cast(), size.min(own));
        Ok(value.assume_init())
    }
}

/// Writes as much of `value` as the caller has room for; its `struct_size` field says how much.
///
/// # Safety
/// As for [`config`], with the bytes writable. `value` has a `size_t` first.
pub(super) unsafe fn fill_struct<T: Copy>(out: *mut T, value: &T, name: &str) -> Result<()> {
    check_pointer(out.cast_const(), 1, name)?;
    // SAFETY: not NULL and aligned; the caller promises a size first.
    let size = unsafe { out.cast::<usize>().read() };
    let own = size_of::<T>();
    ensure!(
        (size_of::<usize>()..=MAX_STRUCT).contains(&size),
        InvalidArgument,
        "{name}.struct_size is {size}, must be sizeof({name}), here {own}"
    );
    let head = size_of::<usize>();
    // SAFETY: the caller promises `size` writable bytes; the size field itself is kept.
    unsafe {
        let source = std::ptr::from_ref(value).cast::<u8>().add(head);
        source.copy_to_nonoverlapping(out.cast::<u8>().add(head), size.min(own) - head);
    }
    Ok(())
}

/// The fields with which a struct says how a model rotates.
pub(super) struct RopeFields {
    pub(super) style: kvmgr_rope_style,
    pub(super) first: u32,
    pub(super) dims: u32,
    pub(super) base: f32,
    pub(super) inv_freq: *const f32,
    pub(super) head_dim: u32,
}

/// How a model rotates, `None` if the caller does not say.
///
/// # Safety
/// `inv_freq` is NULL or has half as many elements as are rotated.
pub(super) unsafe fn rope(fields: &RopeFields) -> Result<Option<Rope>> {
    let style = match fields.style {
        KVMGR_ROPE_NONE => return Ok(None),
        KVMGR_ROPE_HALF => RopeStyle::Half,
        KVMGR_ROPE_INTERLEAVED => RopeStyle::Interleaved,
        kvmgr_rope_style(value) => {
            bail!(InvalidArgument, "rope_style is {value}, not a kvmgr_rope_style")
        }
    };
    let rest = fields.head_dim.saturating_sub(fields.first);
    let dims = if fields.dims == 0 { rest } else { fields.dims } as usize;
    let first = fields.first as usize;
    ensure!(
        fields.dims > 0 || first == 0 || (dims > 0 && dims.is_multiple_of(2)),
        InvalidArgument,
        "rope_first is {first}, must leave an even number of the {} elements of a head, or rope_dims must \
         say how many rotate",
        fields.head_dim
    );
    ensure!(
        dims.is_multiple_of(2) && (2..=MAX_HEAD_DIM).contains(&dims),
        InvalidArgument,
        "rope_dims is {dims}, must be even and in 2..={MAX_HEAD_DIM}"
    );
    let base = if fields.base == 0.0 { 10_000.0 } else { fields.base };
    ensure!(
        base.is_finite() && base > 0.0,
        InvalidArgument,
        "rope_base is {base}, must be finite and positive"
    );
    if fields.inv_freq.is_null() {
        return Ok(Some(Rope { first, ..Rope::new(style, dims, base) }));
    }
    // SAFETY: the caller promises the frequencies.
    let inv_freq = unsafe { slice(fields.inv_freq, dims / 2, "rope_inv_freq") }?;
    Ok(Some(Rope { style, first, inv_freq: inv_freq.to_vec() }))
}

/// No struct of this library will ever be larger.
const MAX_STRUCT: usize = 4096;

/// A list that the caller has room for: writes it and its length, or only the length.
///
/// # Safety
/// `out_num` as for [`output`], `out` as for [`slice_mut`] with `capacity` elements.
pub(super) unsafe fn list<T: Copy>(
    values: &[T],
    out: *mut T,
    capacity: usize,
    out_num: *mut usize,
    name: &str,
) -> Result<()> {
    // SAFETY: the caller promises it.
    let num = unsafe { output(out_num, "out_num") }?;
    // SAFETY: the caller promises it.
    if let Some(out) = unsafe { room(out, capacity, values.len(), (name, "elements")) }? {
        out.copy_from_slice(values);
    }
    *num = values.len();
    Ok(())
}

/// The room for `needed` values that a caller offers; `None` if NULL with capacity 0 asks for their
/// number alone. `what` they are is for the message.
///
/// # Safety
/// As for [`slice_mut`] with `capacity` elements.
pub(super) unsafe fn room<'a, T>(
    out: *mut T,
    capacity: usize,
    needed: usize,
    (name, what): (&str, &str),
) -> Result<Option<&'a mut [T]>> {
    if out.is_null() && capacity == 0 {
        return Ok(None);
    }
    ensure!(
        needed <= capacity,
        InvalidArgument,
        "{name} needs room for {needed} {what}, capacity is {capacity}"
    );
    // SAFETY: the caller promises it.
    Ok(Some(&mut unsafe { slice_mut(out, capacity, name) }?[..needed]))
}

impl kvmgr_dtype {
    pub(super) fn parse(self, name: &str) -> Result<DType> {
        Ok(match self {
            KVMGR_DTYPE_F32 => DType::F32,
            KVMGR_DTYPE_F16 => DType::F16,
            KVMGR_DTYPE_BF16 => DType::Bf16,
            Self(value) => bail!(InvalidArgument, "{name} is {value}, not a kvmgr_dtype"),
        })
    }
}

impl kvmgr_side {
    pub(super) fn parse(self) -> Result<Side> {
        Ok(match self {
            KVMGR_SIDE_KEY => Side::Key,
            KVMGR_SIDE_VALUE => Side::Value,
            Self(value) => bail!(InvalidArgument, "side is {value}, not a kvmgr_side"),
        })
    }
}

/// What a checked tensor looks like: address, type, `[tokens, heads, dim]`, strides.
type Parts = (*mut u8, DType, [usize; 3], [isize; 2]);

/// A tensor to read.
///
/// # Safety
/// `tensor` is NULL or readable, and describes memory that may be read for `'a`.
pub(super) unsafe fn tensor<'a>(tensor: *const kvmgr_tensor, name: &str) -> Result<Tensor<'a>> {
    // SAFETY: the caller promises it.
    let (data, dtype, shape, strides) = unsafe { tensor_parts(tensor, name, 3) }?;
    // SAFETY: the caller promises it.
    Ok(unsafe { Tensor::from_raw(data, dtype, shape, strides) })
}

/// A tensor to read, or NULL.
///
/// # Safety
/// As for [`tensor`].
pub(super) unsafe fn optional_tensor<'a>(
    tensor: *const kvmgr_tensor,
    name: &str,
) -> Result<Option<Tensor<'a>>> {
    if tensor.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller promises it.
    unsafe { self::tensor(tensor, name) }.map(Some)
}

/// A matrix to read, as `[rows, 1, columns]`.
///
/// # Safety
/// As for [`tensor`].
pub(super) unsafe fn matrix<'a>(tensor: *const kvmgr_tensor, name: &str) -> Result<Tensor<'a>> {
    // SAFETY: the caller promises it.
    let (data, dtype, [rows, columns, _], strides) = unsafe { tensor_parts(tensor, name, 2) }?;
    ensure!(
        strides[1] == 1,
        InvalidArgument,
        "{name}.strides[1] is {}, must be 1: rows are contiguous",
        strides[1]
    );
    // SAFETY: the caller promises it.
    Ok(unsafe { Tensor::from_raw(data, dtype, [rows, 1, columns], [strides[0], 1]) })
}

/// A tensor to write; `ndim` is 3, or 2 for one number in each row.
///
/// # Safety
/// `tensor` is NULL or readable, and describes memory that may be written for `'a`.
pub(super) unsafe fn tensor_mut<'a>(
    tensor: *const kvmgr_tensor,
    name: &str,
    ndim: u32,
) -> Result<TensorMut<'a>> {
    // SAFETY: the caller promises it.
    let (data, dtype, shape, strides) = unsafe { tensor_parts(tensor, name, ndim) }?;
    // SAFETY: the caller promises it.
    Ok(unsafe { TensorMut::from_raw(data, dtype, shape, strides) })
}

/// A tensor in the memory of CUDA device `id`; `ndim` is 3, or 2 for one number in each row.
///
/// # Safety
/// `tensor` is NULL or readable.
pub(super) unsafe fn device_tensor(
    tensor: *const kvmgr_tensor,
    name: &str,
    ndim: u32,
    id: i32,
) -> Result<DeviceTensor> {
    // SAFETY: the caller promises a readable tensor.
    let tensor = &unsafe { slice(tensor, 1, name) }?[0];
    match tensor.device_type {
        KVMGR_DEVICE_CUDA => ensure!(
            tensor.device_id == id,
            InvalidArgument,
            "{name}.device_id is {}, the cache is on CUDA device {id}",
            tensor.device_id
        ),
        kvmgr_device_type(0) | KVMGR_DEVICE_CPU => {
            bail!(InvalidArgument, "{name}.device_type is CPU, the cache is on CUDA device {id}")
        }
        kvmgr_device_type(value) => {
            bail!(InvalidArgument, "{name}.device_type is {value}, not a kvmgr_device_type")
        }
    }
    let (data, dtype, shape, strides) = described_parts(tensor, name, ndim)?;
    Ok(DeviceTensor { address: data.addr() as u64, dtype, shape, strides })
}

/// Rows in the engine's memory, for attention without a copy.
///
/// # Safety
/// As for [`tensor`]; what lies between the rows may be read as well.
pub(super) unsafe fn dense<'a>(tensor: *const kvmgr_tensor, name: &str) -> Result<Dense<'a>> {
    // SAFETY: the caller promises it.
    let (data, dtype, shape, strides) = unsafe { tensor_parts(tensor, name, 3) }?;
    let [num_rows, num_heads, dim] = shape;
    ensure!(
        strides.iter().all(|stride| *stride >= 0) && !shape.contains(&0),
        InvalidArgument,
        "{name} has the shape {shape:?} and the strides {strides:?}, none may be empty or negative"
    );
    let format = match dtype {
        DType::F32 => Format::F32,
        DType::F16 => Format::F16,
        DType::Bf16 => Format::Bf16,
    };
    let [row_stride, head_stride] = strides.map(|stride| stride as usize * dtype.size());
    let end = (num_rows - 1) * row_stride + (num_heads - 1) * head_stride + dim * dtype.size();
    // SAFETY: the caller promises it.
    let bytes = unsafe { slice(data.cast_const(), end, name) }?;
    Ok(Dense { bytes, format, num_rows, num_heads, dim, row_stride, head_stride })
}

unsafe fn tensor_parts(tensor: *const kvmgr_tensor, name: &str, ndim: u32) -> Result<Parts> {
    // SAFETY: the caller promises a readable tensor.
    let tensor = &unsafe { slice(tensor, 1, name) }?[0];
    check_device(tensor, name)?;
    described_parts(tensor, name, ndim)
}

fn described_parts(tensor: &kvmgr_tensor, name: &str, ndim: u32) -> Result<Parts> {
    let dtype = match tensor.dtype.parse("dtype") {
        Ok(dtype) => dtype,
        // The name is made for the message alone: this is a hot path.
        Err(_) => tensor.dtype.parse(&format!("{name}.dtype"))?,
    };
    ensure!(tensor.ndim == ndim, InvalidArgument, "{name}.ndim is {}, must be {ndim}", tensor.ndim);
    let mut shape = [1usize; 3];
    for (i, target) in shape.iter_mut().enumerate().take(ndim as usize) {
        let size = tensor.shape[i];
        ensure!(
            (0..=MAX_DIM).contains(&size),
            InvalidArgument,
            "{name}.shape[{i}] is {size}, must be in 0..={MAX_DIM}"
        );
        *target = size as usize;
    }
    let strides = tensor_strides(tensor, name, ndim, &shape)?;
    let is_empty = shape.contains(&0);
    ensure!(is_empty || !tensor.data.is_null(), InvalidArgument, "{name}.data is NULL");
    ensure!(
        tensor.data.addr().is_multiple_of(dtype.size()),
        InvalidArgument,
        "{name}.data is not aligned to {} bytes",
        dtype.size()
    );
    Ok((tensor.data.cast(), dtype, shape, strides))
}

/// Refuses memory that is not the CPU's, with the reason that helps most.
fn check_device(tensor: &kvmgr_tensor, name: &str) -> Result<()> {
    match tensor.device_type {
        kvmgr_device_type(0) | KVMGR_DEVICE_CPU => Ok(()),
        KVMGR_DEVICE_CUDA => {
            device::cuda_devices().map_err(|error| error.within(format!("{name}.device_type")))?;
            bail!(Unsupported, "{name}.device_type is CUDA, this call reads CPU memory only")
        }
        kvmgr_device_type(value) => {
            bail!(InvalidArgument, "{name}.device_type is {value}, not a kvmgr_device_type")
        }
    }
}

fn tensor_strides(
    tensor: &kvmgr_tensor,
    name: &str,
    ndim: u32,
    shape: &[usize; 3],
) -> Result<[isize; 2]> {
    let given = &tensor.strides[..ndim as usize];
    if given.iter().all(|stride| *stride == 0) {
        return Ok([(shape[1] * shape[2]) as isize, shape[2] as isize]);
    }
    for (i, stride) in given.iter().enumerate() {
        ensure!(
            (-MAX_DIM..=MAX_DIM).contains(stride),
            InvalidArgument,
            "{name}.strides[{i}] is {stride}, must be in {}..={MAX_DIM}",
            -MAX_DIM
        );
    }
    if ndim == 3 {
        ensure!(
            given[2] == 1,
            InvalidArgument,
            "{name}.strides[2] is {}, the innermost dimension must be contiguous",
            given[2]
        );
    }
    Ok([given[0] as isize, given[1] as isize])
}

/// Large enough for any tensor, small enough that products of two do not overflow.
const MAX_DIM: i64 = 1 << 40;

fn check_pointer<T>(data: *const T, len: usize, name: &str) -> Result<()> {
    if len == 0 {
        return Ok(());
    }
    ensure!(!data.is_null(), InvalidArgument, "{name} is NULL");
    ensure!(
        data.is_aligned(),
        InvalidArgument,
        "{name} is not aligned to {} bytes",
        align_of::<T>()
    );
    let fits = len.checked_mul(size_of::<T>()).is_some_and(|bytes| isize::try_from(bytes).is_ok());
    ensure!(fits, InvalidArgument, "{name} has an impossible length of {len}");
    Ok(())
}
