//! AVX2 with FMA and F16C: every x86 server since 2013 (Intel) and 2015 (AMD).

#![expect(unsafe_code, reason = "intrinsics and raw loads")]

mod encode;
mod format;
mod hadamard;
mod levels;
mod math;
mod rows;

use super::Kernels;
use super::rows::RowKernels;
use format::{Affine2, Affine4, Bf16, Codes2, Codes4, F16, F32, Format, Q4_0, Q8_0};
use levels::{E4m3, E5m2, Int4, Int8, Iq4Nl, Mxfp4, Nvfp4, Q4_1, Q5_0, Q5_1, Tq};

pub(super) static KERNELS: Kernels = Kernels {
    name: "avx2",
    is_available: || {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    },
    rows: [
        row_kernels::<F32>(),
        row_kernels::<F16>(),
        row_kernels::<Bf16>(),
        row_kernels::<Q8_0>(),
        row_kernels::<Q4_0>(),
        row_kernels::<Affine4>(),
        row_kernels::<Affine2>(),
        row_kernels::<Codes4>(),
        row_kernels::<Codes2>(),
        row_kernels::<Q4_1>(),
        row_kernels::<Q5_0>(),
        row_kernels::<Q5_1>(),
        row_kernels::<Iq4Nl>(),
        row_kernels::<Mxfp4>(),
        row_kernels::<Nvfp4>(),
        row_kernels::<Int8>(),
        row_kernels::<Int4>(),
        row_kernels::<Tq<2>>(),
        row_kernels::<Tq<3>>(),
        row_kernels::<Tq<4>>(),
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
    hadamard: |values, size| unsafe { hadamard::hadamard(values, size) },
};

const fn row_kernels<F: Format>() -> RowKernels {
    RowKernels {
        // SAFETY: as for `KERNELS`; `Rows::check` has proved that every row lies in the bytes.
        dot: |rows, queries, scores| unsafe { rows::dot::<F>(rows, queries, scores) },
        // SAFETY: as above.
        axpy: |rows, weights, outputs| unsafe { rows::axpy::<F>(rows, weights, outputs) },
        // SAFETY: as above.
        decode: |rows, out| unsafe { rows::decode::<F>(rows, out) },
    }
}
