//! AVX2 with FMA and F16C: every x86 server since 2013 (Intel) and 2015 (AMD).

#![expect(unsafe_code, reason = "intrinsics and raw loads")]

mod encode;
mod format;
mod integer;
mod math;
mod raw;
mod rows;
mod whole;

use super::Kernels;
use super::rows::RowKernels;
use format::{Raw, Affine2, Affine4, Bf16, Codes2, Codes4, F16, F32, Q4_0, Q8_0};
use whole::Whole;

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
    hadamard: |values, size| unsafe { math::hadamard(values, size) },
};

const fn raw_kernels<F: Raw>() -> RowKernels {
    RowKernels {
        // SAFETY: as for `KERNELS`; `Rows::check` has proved that every row lies in the bytes.
        dot: |rows, queries, scores| unsafe { raw::dot::<F>(rows, queries, scores) },
        // SAFETY: as above.
        axpy: |rows, weights, outputs| unsafe { raw::axpy::<F>(rows, weights, outputs) },
        // SAFETY: as above.
        decode: |rows, out| unsafe { rows::decode::<F>(rows, out) },
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
    }
}
