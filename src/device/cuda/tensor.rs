//! A tensor in device memory: an address and numbers. The host never reads or writes it.

use crate::dtype::DType;
use crate::error::{Result, ensure};

/// A tensor `[tokens, heads, dim]` in device memory.
#[derive(Debug, Clone, Copy)]
pub struct DeviceTensor {
    /// The first element.
    pub address: u64,
    /// Type of the elements.
    pub dtype: DType,
    /// `[tokens, heads, dim]`.
    pub shape: [usize; 3],
    /// Distance in elements between tokens and between heads; the elements of a row are neighbours.
    pub strides: [isize; 2],
}

impl DeviceTensor {
    /// Checks the element type, and that every row is aligned to `alignment` bytes.
    pub fn check(&self, name: &str, dtype: DType, alignment: usize) -> Result<()> {
        ensure!(
            self.dtype == dtype,
            Unsupported,
            "{name}.dtype is {}, must be {} for this cache on a CUDA device",
            self.dtype.name(),
            dtype.name()
        );
        ensure!(
            self.address.is_multiple_of(alignment as u64),
            InvalidArgument,
            "{name}.data is not aligned to {alignment} bytes"
        );
        let elements = (alignment / dtype.size()).max(1);
        for (i, stride) in self.strides.iter().enumerate().take(2) {
            ensure!(
                stride.unsigned_abs().is_multiple_of(elements) || self.shape[i] <= 1,
                InvalidArgument,
                "{name}.strides[{i}] is {stride}, must be a multiple of {elements}: rows on a \
                 device are aligned to {alignment} bytes"
            );
        }
        Ok(())
    }
}
