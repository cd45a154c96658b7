//! Strided views of a caller's tensor `[tokens, heads, dim]`, read and written row by row.
//!
//! The element type is converted on the way: rows are f32 inside the library. Several workers may
//! write through one [`TensorMut`] at a time as long as they write different rows; that is the
//! contract of the one `unsafe` constructor.

#![expect(unsafe_code, reason = "views of memory that the caller owns")]

use std::marker::PhantomData;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::dtype::DType;

/// A read-only tensor `[tokens, heads, dim]` whose innermost dimension is contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    raw: Raw,
    memory: PhantomData<&'a [u8]>,
}

/// A writable tensor `[tokens, heads, dim]` whose innermost dimension is contiguous.
#[derive(Debug, Clone, Copy)]
pub struct TensorMut<'a> {
    raw: Raw,
    memory: PhantomData<&'a mut [u8]>,
}

/// Address, element type, shape and strides in elements.
#[derive(Debug, Clone, Copy)]
struct Raw {
    data: *mut u8,
    dtype: DType,
    shape: [usize; 3],
    strides: [isize; 2],
}

// SAFETY: a view is an address and numbers; its constructors promise that the memory may be read
// (Tensor) or written at disjoint rows (TensorMut) from any thread while the view lives.
unsafe impl Send for Raw {}
// SAFETY: as above.
unsafe impl Sync for Raw {}

impl<'a> Tensor<'a> {
    /// A contiguous f32 tensor. Panics if the slice is shorter than the shape.
    pub fn from_slice(data: &'a [f32], shape: [usize; 3]) -> Self {
        assert!(data.len() >= shape.iter().product(), "slice shorter than shape {shape:?}");
        let raw = Raw::contiguous(data.as_ptr().cast_mut().cast(), shape);
        Self { raw, memory: PhantomData }
    }

    /// A view of foreign memory.
    ///
    /// # Safety
    /// Every row of `shape` at `strides` (elements, for tokens and heads) is readable, aligned
    /// for `dtype`, and not written while the view lives.
    pub unsafe fn from_raw(
        data: *const u8,
        dtype: DType,
        shape: [usize; 3],
        strides: [isize; 2],
    ) -> Self {
        Self { raw: Raw { data: data.cast_mut(), dtype, shape, strides }, memory: PhantomData }
    }

    /// `[tokens, heads, dim]`.
    pub fn shape(&self) -> [usize; 3] {
        self.raw.shape
    }

    /// Copies one row into `out`, which is `dim` long, as f32.
    pub fn read(&self, token: usize, head: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.raw.shape[2], "row buffer has the wrong length");
        self.read_part(token, head, 0, out);
    }

    /// Copies the elements of one row from `start` on into `out`, as f32.
    pub fn read_part(&self, token: usize, head: usize, start: usize, out: &mut [f32]) {
        let dim = out.len();
        assert!(start + dim <= self.raw.shape[2], "a part outside the row");
        let row = self.raw.row(token, head).wrapping_add(start * self.raw.dtype.size());
        match self.raw.dtype {
            // SAFETY: `row` checked the indices; the constructor promised readable rows.
            DType::F32 => out.copy_from_slice(unsafe { slice(row, dim) }),
            // SAFETY: as above.
            DType::F16 => unsafe { slice::<f16>(row, dim) }.convert_to_f32_slice(out),
            // SAFETY: as above.
            DType::Bf16 => unsafe { slice::<bf16>(row, dim) }.convert_to_f32_slice(out),
        }
    }

    /// Copies the elements of one row at `indices` into `out`, as f32; `otherwise` for indices beyond
    /// the row.
    pub fn gather(
        &self,
        token: usize,
        head: usize,
        indices: &[u32],
        otherwise: f32,
        out: &mut [f32],
    ) {
        assert_eq!(out.len(), indices.len(), "indices and out must be equally long");
        let row = self.raw.row(token, head);
        match self.raw.dtype {
            // SAFETY: `row` checked token and head; the constructor promised readable rows.
            DType::F32 => pick(unsafe { slice(row, self.raw.shape[2]) }, indices, otherwise, out),
            DType::F16 => {
                // SAFETY: as above.
                let row = unsafe { slice::<f16>(row, self.raw.shape[2]) };
                pick_half(row, indices, f16::from_f32(otherwise), out);
            }
            DType::Bf16 => {
                // SAFETY: as above.
                let row = unsafe { slice::<bf16>(row, self.raw.shape[2]) };
                pick_half(row, indices, bf16::from_f32(otherwise), out);
            }
        }
    }
}

impl<'a> TensorMut<'a> {
    /// A contiguous f32 tensor. Panics if the slice is shorter than the shape.
    pub fn from_slice(data: &'a mut [f32], shape: [usize; 3]) -> Self {
        assert!(data.len() >= shape.iter().product(), "slice shorter than shape {shape:?}");
        Self { raw: Raw::contiguous(data.as_mut_ptr().cast(), shape), memory: PhantomData }
    }

    /// A view of foreign memory.
    ///
    /// # Safety
    /// Every row of `shape` at `strides` (elements, for tokens and heads) is writable, aligned for
    /// `dtype`, rows do not overlap, nobody else touches them while the view lives, and users of
    /// the view write a given row from one thread only.
    pub unsafe fn from_raw(
        data: *mut u8,
        dtype: DType,
        shape: [usize; 3],
        strides: [isize; 2],
    ) -> Self {
        Self { raw: Raw { data, dtype, shape, strides }, memory: PhantomData }
    }

    /// `[tokens, heads, dim]`.
    pub fn shape(&self) -> [usize; 3] {
        self.raw.shape
    }

    /// Overwrites one row with `values`, which is `dim` long, converted to the element type.
    /// Concurrent calls must name different rows.
    pub fn write(&self, token: usize, head: usize, values: &[f32]) {
        let (row, dim) = (self.raw.row(token, head), self.raw.shape[2]);
        assert_eq!(values.len(), dim, "row has the wrong length");
        match self.raw.dtype {
            // SAFETY: `row` checked the indices; the constructor promised writable rows that no
            // other thread touches.
            DType::F32 => unsafe { slice_mut(row, dim) }.copy_from_slice(values),
            DType::F16 => {
                // SAFETY: as above.
                unsafe { slice_mut::<f16>(row, dim) }.convert_from_f32_slice(values);
            }
            DType::Bf16 => {
                // SAFETY: as above.
                unsafe { slice_mut::<bf16>(row, dim) }.convert_from_f32_slice(values);
            }
        }
    }
}

impl Raw {
    fn contiguous(data: *mut u8, shape: [usize; 3]) -> Self {
        let strides = [(shape[1] * shape[2]) as isize, shape[2] as isize];
        Self { data, dtype: DType::F32, shape, strides }
    }

    fn row(&self, token: usize, head: usize) -> *mut u8 {
        let [tokens, heads, _] = self.shape;
        assert!(token < tokens && head < heads, "row ({token}, {head}) outside {:?}", self.shape);
        let elements = token as isize * self.strides[0] + head as isize * self.strides[1];
        self.data.wrapping_offset(elements * self.dtype.size() as isize)
    }
}

fn pick<T: Copy>(row: &[T], indices: &[u32], otherwise: T, out: &mut [T]) {
    for (x, i) in out.iter_mut().zip(indices) {
        *x = row.get(*i as usize).copied().unwrap_or(otherwise);
    }
}

/// Converts many at a time, which is what conversion is fast at.
fn pick_half<T: Copy>(row: &[T], indices: &[u32], otherwise: T, out: &mut [f32])
where
    [T]: HalfFloatSliceExt,
{
    const RUN: usize = 64;
    for (indices, out) in indices.chunks(RUN).zip(out.chunks_mut(RUN)) {
        let mut picked = [otherwise; RUN];
        pick(row, indices, otherwise, &mut picked[..indices.len()]);
        picked[..indices.len()].convert_to_f32_slice(out);
    }
}

/// # Safety
/// `len` elements of `T` are readable at `data` for `'a`.
unsafe fn slice<'a, T>(data: *const u8, len: usize) -> &'a [T] {
    // SAFETY: the caller promises it.
    unsafe { std::slice::from_raw_parts(data.cast(), len) }
}

/// # Safety
/// `len` elements of `T` at `data` belong to the caller alone for `'a`.
unsafe fn slice_mut<'a, T>(data: *mut u8, len: usize) -> &'a mut [T] {
    // SAFETY: the caller promises it.
    unsafe { std::slice::from_raw_parts_mut(data.cast(), len) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_convert_and_strides_are_respected() {
        let data: Vec<f16> = (0..24).map(|i| f16::from_f32(i as f32)).collect();
        // [tokens 2, heads 3, dim 4] stored head-major: token stride 4, head stride 8.
        // SAFETY: all rows lie inside `data`.
        let view = unsafe { Tensor::from_raw(data.as_ptr().cast(), DType::F16, [2, 3, 4], [4, 8]) };
        let mut row = [0.0; 4];
        view.read(1, 2, &mut row);
        assert_eq!(row, [20.0, 21.0, 22.0, 23.0]);
        view.gather(1, 2, &[3, 9, 0], -1.0, &mut row[..3]);
        assert_eq!(row, [23.0, -1.0, 20.0, 23.0]);
        Tensor::from_slice(&[5.0, 6.0], [1, 1, 2]).gather(0, 0, &[1, 2], 0.5, &mut row[..2]);
        assert_eq!(row[..2], [6.0, 0.5]);

        let mut out = vec![bf16::ZERO; 8];
        // SAFETY: both rows lie inside `out`.
        let view =
            unsafe { TensorMut::from_raw(out.as_mut_ptr().cast(), DType::Bf16, [2, 1, 4], [4, 4]) };
        view.write(1, 0, &[1.0, 2.0, 3.0, f32::NAN]);
        assert_eq!(out[4..7], [1.0, 2.0, 3.0].map(bf16::from_f32));
        assert!(out[7].is_nan() && out[..4].iter().all(|x| *x == bf16::ZERO));
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn a_row_outside_the_shape_panics() {
        Tensor::from_slice(&[0.0; 8], [1, 2, 4]).read(1, 0, &mut [0.0; 4]);
    }
}
