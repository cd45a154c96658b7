//! AVX-512 with its byte, integer and bit instructions: Intel since Ice Lake (2019), AMD since Zen 4
//! (2022). What gains nothing from wider vectors is the AVX2 level's.

#![expect(unsafe_code, reason = "intrinsics and raw loads")]

mod axpy;
mod codebook;
mod dot;
mod encode;
mod fifth;
mod formats;
mod integer;
mod many;
mod many_axpy;
mod many_dot;
mod math;
mod queries;
mod raw;
mod turn;
mod words;

use super::prepared::IntegerKernels;
use super::rows::{Format, RowKernels};
use super::{Kernels, avx2};
use avx2::{
    Affine2, Affine4, Codes2, Codes4, Int4, Int8, Iq4Nl, Mxfp4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Tq,
};
use raw::{Bf16, F16, F32, Raw};

/// The loops over rows of integers.
macro_rules! words {
    ($name:ident) => {
        words!($name, $name)
    };
    ($type:ty, $format:ident) => {
        RowKernels {
            // SAFETY: as for `raw_kernels`.
            dot: |rows, queries, scores| unsafe {
                let plain = (Format::$format, &avx2::KERNELS.rows[Format::$format as usize]);
                dot::dot::<$type>(plain, rows, queries, scores);
            },
            // SAFETY: as above.
            axpy: |rows, weights, outputs| unsafe {
                let plain = (Format::$format, &avx2::KERNELS.rows[Format::$format as usize]);
                axpy::axpy::<$type>(plain, rows, weights, outputs);
            },
            decode: plain(Format::$format).decode,
            integers: Some(IntegerKernels {
                // SAFETY: as above.
                prepare: |dim, queries, out| unsafe {
                    queries::prepare::<$type>(dim, queries, out)
                },
                // SAFETY: as above.
                dot: |rows, queries, scores| unsafe {
                    dot::dot_prepared::<$type>(Format::$format, rows, queries, scores);
                },
                max_dim: integer::MAX_DIM,
            }),
        }
    };
}

pub(super) static KERNELS: Kernels = Kernels {
    name: "avx512",
    is_available: || {
        (avx2::KERNELS.is_available)()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512vbmi2")
            && is_x86_feature_detected!("avx512vnni")
    },
    rows: [
        raw_kernels::<F32>(plain(Format::F32)),
        raw_kernels::<F16>(plain(Format::F16)),
        raw_kernels::<Bf16>(plain(Format::Bf16)),
        words!(Q8_0),
        words!(Q4_0),
        words!(Affine4),
        words!(Affine2),
        words!(Codes4),
        words!(Codes2),
        words!(Q4_1),
        words!(Q5_0),
        words!(Q5_1),
        words!(Iq4Nl),
        words!(Mxfp4),
        plain(Format::Nvfp4),
        words!(Int8),
        words!(Int4),
        words!(Tq<2>, Tq2),
        words!(Tq<3>, Tq3),
        words!(Tq<4>, Tq4),
        plain(Format::E4m3),
        plain(Format::E5m2),
    ],
    // SAFETY: a `Kernels` is handed out only after `is_available` said yes, and its methods have
    // checked the lengths.
    encode_f16: |values, out| unsafe { encode::f16(values, out) },
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
    weigh: |scores, softmax| unsafe { math::weigh(scores, softmax) },
    ..avx2::KERNELS
};

/// The loops of the AVX2 level.
const fn plain(format: Format) -> RowKernels {
    avx2::KERNELS.rows[format as usize]
}

const fn raw_kernels<F: Raw>(plain: RowKernels) -> RowKernels {
    RowKernels {
        // SAFETY: as for `KERNELS`; `Rows::check` has proved that every row lies in the bytes.
        dot: |rows, queries, scores| unsafe { raw::dot::<F>(rows, queries, scores) },
        // SAFETY: as above.
        axpy: |rows, weights, outputs| unsafe { raw::axpy::<F>(rows, weights, outputs) },
        decode: plain.decode,
        integers: None,
    }
}
