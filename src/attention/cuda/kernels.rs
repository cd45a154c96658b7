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
        let (narrow, mut kernels) = (narrow_warps(dim), Vec::new());
        for columns in [8, 16].into_iter().filter(|columns| group <= *columns) {
            for (is_wide, warps) in [(false, narrow), (true, 2 * narrow)] {
                // Two tiles of 16 rows of K and V for each warp, the place where warps meet, and Q: as in
                // kernels/kvm_attn.cuh.
                let of_a_warp = 2 * 64 * dim + columns * 68 * 4;
                let shared = warps * of_a_warp as u32 + q_bytes(dim, columns) as u32;
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
        dim: usize,
        group: usize,
    ) -> Result<Self> {
        let (warps, mut kernels) = (narrow_warps(dim), Vec::new());
        // Two chunks of K and V for each warp, in units of 512 bytes, or two tiles of open rows: as in
        // kernels/decode_q.cu.
        let chunk =
            |is_key| (layout.bytes(dim, is_key) * layout.chunk() / TOKENS).next_multiple_of(512);
        let ring = 2 * (chunk(true) + chunk(false)).max(64 * dim);
        for columns in [8, 16].into_iter().filter(|columns| group <= *columns) {
            // What belongs to each column lies behind Q, and the number of an item.
            let q = match q_bytes(dim, columns) {
                0 => 0,
                q => q + 16 * columns + 16,
            };
            let shared = warps as usize * ring + q;
            let name = format!("kvm_decode_{}_d{dim}_g{columns}", layout.name());
            let variant = Variant { has_16_columns: columns == 16, is_wide: false };
            kernels.push((variant, gpu.kernel(&name, warps * 32, shared as u32)?));
        }
        Ok(Self { kernels, warps, warp_rows: layout.chunk() as u32 })
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

/// Warps of a CTA that is not wide: `kvm_warps` of kernels/kvm_attn.cuh.
fn narrow_warps(dim: usize) -> u32 {
    if dim == 256 { 2 } else { 4 }
}

/// Bytes of shared memory for Q where registers are too few: `kvm_q_bytes` there.
fn q_bytes(dim: usize, columns: usize) -> usize {
    if dim * columns >= 4096 { 2 * dim * columns } else { 0 }
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
