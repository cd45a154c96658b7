//! AVX2 with FMA and F16C: every x86 server since 2013 (Intel) and 2015 (AMD).

#![expect(unsafe_code, reason = "intrinsics and raw loads")]

mod codebook;
mod encode;
mod format;
mod hadamard;
mod integer;
mod levels;
mod math;
mod raw;
mod rows;
mod whole;

use super::Kernels;
use super::rows::RowKernels;
// What the AVX-512 level shares.
pub(super) use codebook::UNIT as TQ_UNIT;
pub(super) use encode::f16_of;
pub(super) use format::{Affine2, Affine4, Codes2, Codes4, Q4_0, Q8_0};
use format::{Bf16, F16, F32, Format, Raw};
pub(super) use integer::{HUGE, TINY};
use levels::{E4m3, E5m2, Nvfp4};
pub(super) use levels::{Int4, Int8, Iq4Nl, Mxfp4, Q4_1, Q5_0, Q5_1, Tq};
pub(super) use whole::{Factor, Whole, metadata_at};

pub(super) static KERNELS: Kernels = Kernels {
    name: "avx2",
    is_available: || {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    },
    rows: [
        raw_kernels::<F32>(),
        raw_kernels::<F16>(),
        raw_kernels::<Bf16>(),
        whole_kernels::<Q8_0>(),
        whole_kernels::<Q4_0>(),
        whole_kernels::<Affine4>(),
        whole_kernels::<Affine2>(),
        whole_kernels::<Codes4>(),
        whole_kernels::<Codes2>(),
        whole_kernels::<Q4_1>(),
        whole_kernels::<Q5_0>(),
        whole_kernels::<Q5_1>(),
        whole_kernels::<Iq4Nl>(),
        whole_kernels::<Mxfp4>(),
        row_kernels::<Nvfp4>(),
        whole_kernels::<Int8>(),
        whole_kernels::<Int4>(),
        whole_kernels::<Tq<2>>(),
        whole_kernels::<Tq<3>>(),
        whole_kernels::<Tq<4>>(),
        row_kernels::<E4m3>(),
        row_kernels::<E5m2>(),
    ],
    // SAFETY: a `Kernels` is handed out only after `is_available` said yes, and its methods have
    // checked the lengths.
    encode_f16: |values, out| unsafe { encode::f16(values, out) },
    // SAFETY: as above.
    encode_bf16: |values, out| unsafe { encode::bf16(values, out) },
    // SAFETY: as above.
    encode_q8_0: |values, out| unsafe { encode::q8_0(values, out) },
    // SAFETY: as above.
    encode_q4_0: |values, out| unsafe { encode::q4_0(values, out) },
    // SAFETY: as above.
    encode_rows: |format, values, dim, out| unsafe { encode::rows(format, values, dim, out) },
    // SAFETY: as above.
    all_within: |values, limit| unsafe { encode::all_within(values, limit) },
    // SAFETY: as above.
    channel_ranges: |values, low, high| unsafe { encode::channel_ranges(values, low, high) },
    // SAFETY: as above.
    group_ranges: |row, group, low, high| unsafe { encode::group_ranges(row, group, low, high) },
    // SAFETY: as above.
    encode_codes: |bits, values, inverse, m, out| unsafe {
        encode::codes(bits, values, inverse, m, out)
    },
    // SAFETY: as above.
    dot_f32: |a, b| unsafe { math::dot(a, b) },
    // SAFETY: as above.
    axpy_f32: |factor, x, y| unsafe { math::axpy(factor, x, y) },
    // SAFETY: as above.
    scale: |values, factor| unsafe { math::scale(values, factor) },
    // SAFETY: as above.
    max: |values| unsafe { math::max(values) },
    // SAFETY: as above.
    exp_sub: |scores, max| unsafe { math::exp_sub(scores, max) },
    // SAFETY: as above.
    weigh: |scores, softmax| unsafe { math::weigh(scores, softmax) },
    // SAFETY: as above.
    hadamard: |values, size| unsafe { hadamard::hadamard(values, size) },
};

const fn raw_kernels<F: Raw>() -> RowKernels {
    RowKernels {
        // SAFETY: as for `KERNELS`; `Rows::check` has proved that every row lies in the bytes.
        dot: |rows, queries, scores| unsafe { raw::dot::<F>(rows, queries, scores) },
        // SAFETY: as above.
        axpy: |rows, weights, outputs| unsafe { raw::axpy::<F>(rows, weights, outputs) },
        // SAFETY: as above.
        decode: |rows, out| unsafe { rows::decode::<F>(rows, out) },
        integers: None,
    }
}

const fn row_kernels<F: Format>() -> RowKernels {
    RowKernels {
        // SAFETY: as for `raw_kernels`.
        dot: |rows, queries, scores| unsafe { rows::dot::<F>(rows, queries, scores) },
        // SAFETY: as above.
        axpy: |rows, weights, outputs| unsafe { rows::axpy::<F>(rows, weights, outputs) },
        // SAFETY: as above.
        decode: |rows, out| unsafe { rows::decode::<F>(rows, out) },
        integers: None,
    }
}

const fn whole_kernels<F: Whole>() -> RowKernels {
    RowKernels {
        // SAFETY: as for `raw_kernels`.
        dot: |rows, queries, scores| unsafe { integer::dot::<F>(rows, queries, scores) },
        // SAFETY: as above.
        axpy: |rows, weights, outputs| unsafe { integer::axpy::<F>(rows, weights, outputs) },
        // SAFETY: as above.
        decode: |rows, out| unsafe { rows::decode::<F>(rows, out) },
        integers: None,
    }
}
