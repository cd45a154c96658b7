//! The kernels of attention by name, with what they are launched with.

use crate::device::cuda::{Gpu, Kernel};
use crate::device::layout::{Sealed, TOKENS};
use crate::dtype::DType;
use crate::error::Result;

/// Which decode kernel: for how many columns (query heads of some queries) at a time, and whether CTAs
/// have twice the warps, for few heads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Variant {
    pub(super) has_16_columns: bool,
    pub(super) is_wide: bool,
}

/// The decode kernels of a cache. A device may lack the shared memory for wide CTAs; groups of more than
/// 8 heads do not fit 8 columns.
#[derive(Debug)]
pub(super) struct Decoders {
    pub(super) kernels: Vec<(Variant, Kernel)>,
    /// Warps of a CTA that is not wide.
    warps: u32,
    /// Rows that a warp does at a time.
    warp_rows: u32,
}

impl Decoders {
    pub(super) fn load(gpu: &Gpu, dtype: DType, dim: usize, group: usize) -> Result<Self> {
        let (dim, mut kernels) = (dim as u32, Vec::new());
        let narrow = if dim == 256 { 2 } else { 4 };
        for columns in [8, 16].into_iter().filter(|columns| group <= *columns) {
            for (is_wide, warps) in [(false, narrow), (true, 2 * narrow)] {
                let columns = columns as u32;
                // Two tiles of 16 rows of K and V for each warp, the place where warps meet, and Q
                // where registers are too few: as in kernels/kvm_attn.cuh.
                let q = if dim * columns >= 4096 { 2 * dim * columns } else { 0 };
                let shared = warps * (2 * 64 * dim + columns * 68 * 4) + q;
                if is_wide && shared > gpu.max_shared_bytes() {
                    continue;
                }
                let wide = if is_wide { "_wide" } else { "" };
                let name = format!("kvm_decode_{}_d{dim}_g{columns}{wide}", dtype.name());
                let variant = Variant { has_16_columns: columns == 16, is_wide };
                kernels.push((variant, gpu.kernel(&name, warps * 32, shared)?));
            }
        }
        Ok(Self { kernels, warps: narrow, warp_rows: 16 })
    }

    /// The kernels for sealed blocks of another format, which do open rows too.
    pub(super) fn load_quantized(
        gpu: &Gpu,
        layout: Sealed,
        dtype: DType,
        dim: usize,
        group: usize,
    ) -> Result<Self> {
        let (warps, mut kernels) = (4, Vec::new());
        // Two chunks of K and V for each warp, in units of 512 bytes, or two tiles of open rows: as in
        // kernels/decode_q.cu.
        let chunk =
            |is_key| (layout.bytes(dim, is_key) * layout.chunk() / TOKENS).next_multiple_of(512);
        let ring = 2 * (chunk(true) + chunk(false)).max(64 * dim);
        for columns in [8, 16].into_iter().filter(|columns| group <= *columns) {
            let shared = warps * ring;
            let name = format!("kvm_decode_{}_{}_d{dim}_g{columns}", layout.name(), dtype.name());
            let variant = Variant { has_16_columns: columns == 16, is_wide: false };
            kernels.push((variant, gpu.kernel(&name, warps as u32 * 32, shared as u32)?));
        }
        Ok(Self { kernels, warps: warps as u32, warp_rows: layout.chunk() as u32 })
    }

    /// The variant that is there and closest to what is wanted.
    pub(super) fn choose(&self, wanted: Variant) -> Variant {
        let has = |variant: &Variant| self.kernels.iter().any(|(other, _)| other == variant);
        let with_16 = Variant { has_16_columns: true, ..wanted };
        let plain = Variant { is_wide: false, ..wanted };
        let choices = [wanted, with_16, plain, Variant { has_16_columns: true, ..plain }];
        choices.into_iter().find(has).unwrap_or_default()
    }

    pub(super) fn kernel(&self, variant: Variant) -> &Kernel {
        let found = self.kernels.iter().find(|(other, _)| *other == variant);
        &found.unwrap_or(&self.kernels[0]).1
    }

    /// Rows that a CTA does at a time.
    pub(super) fn rows(&self, variant: Variant) -> u32 {
        self.warp_rows * self.warps * if variant.is_wide { 2 } else { 1 }
    }
}

/// Whether so many queries of a sequence are a job for the kernel that reads keys once for many.
pub(super) fn is_prompt(num_queries: usize, group: usize) -> bool {
    num_queries * group > 64
}

/// (query, head) rows of an item of that kernel; as in kernels/prefill.cu.
pub(super) fn prefill_rows(dim: usize) -> usize {
    if dim == 256 { 64 } else { 128 }
}

pub(super) fn load_prefill(gpu: &Gpu, dtype: DType, dim: usize) -> Result<Kernel> {
    let step = if dim == 256 { 32 } else { 64 };
    let shared = (prefill_rows(dim) + 2 * step) * 2 * dim + 64;
    gpu.kernel(&format!("kvm_prefill_{}_d{dim}", dtype.name()), 128, shared as u32)
}

/// Queries that are attended together.
pub(super) fn tile_of(has_16_columns: bool, group: usize) -> usize {
    (if has_16_columns { 16 } else { 8 } / group).max(1)
}
