// Rows of 64, 128 or 256 elements that a warp holds: read, written, made finite, rotated.
#pragma once
#include "kvm_types.cuh"

/// Elements a lane holds, one after the other, in up to 16 bytes.
template <u32 TYPE, int N> KVM_DEVICE void kvm_load_lane(const void* from, i64 at, float (&x)[N]) {
    if constexpr (N == 8) {
        kvm_load8<TYPE>(from, at, x);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            if constexpr (TYPE == KVM_F32) {
                u64 pair = *(const u64*)((const float*)from + at + i);
                x[i] = kvm_float((u32)pair), x[i + 1] = kvm_float((u32)(pair >> 32));
            } else {
                u32 pair = *(const u32*)((const u16*)from + at + i);
                x[i] = kvm_unpack<TYPE>(pair & 0xffff), x[i + 1] = kvm_unpack<TYPE>(pair >> 16);
            }
        }
    }
}

template <u32 TYPE, int N> KVM_DEVICE void kvm_store_lane(void* to, i64 at, const float (&x)[N]) {
    if constexpr (N == 8) {
        kvm_store8<TYPE>(to, at, x);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            if constexpr (TYPE == KVM_F32)
                *(u64*)((float*)to + at + i) = kvm_bits(x[i]) | (u64)kvm_bits(x[i + 1]) << 32;
            else
                *(u32*)((u16*)to + at + i) = kvm_pack<TYPE == KVM_BF16>(x[i], x[i + 1]);
        }
    }
}

/// The largest float, and the largest magnitude whose rows have finite rotations.
static constexpr float KVM_MOST = 3.40282347e38f, KVM_ROTATED_MOST = KVM_MOST / 4096;

/// A row that a warp holds becomes fit to be encoded: NaN becomes 0, an infinity the largest finite
/// magnitude of the row, and nothing exceeds `limit`.
template <int N> KVM_DEVICE void kvm_sanitize(float (&x)[N], float limit) {
    float most = 0;
    bool is_fit = true;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float size = x[i] < 0 ? -x[i] : x[i];
        is_fit &= size <= limit;
        if (size < kvm_infinity() && size > most) most = size;
    }
    most = kvm_max_lanes(most);
    float bad = kvm_max_lanes(is_fit ? 0.0f : 1.0f);
    if (bad == 0) return;
    if (most > limit) most = limit;
#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] = x[i] != x[i] ? 0 : x[i] < -most ? -most : x[i] > most ? most : x[i];
}

/// Multiplies a row of D elements by the orthonormal Sylvester matrix; lane i of a warp holds elements
/// i * D / 32 and on. Adds in the order of the CPU.
template <int D> KVM_DEVICE void kvm_rotate(float (&x)[D / 32]) {
    constexpr int N = D / 32;
    u32 lane = kvm_tid() % 32;
#pragma unroll
    for (int half = 1; half < N; half *= 2)
#pragma unroll
        for (int i = 0; i < N; i++)
            if (!(i & half)) {
                float a = x[i], b = x[i + half];
                x[i] = a + b, x[i + half] = a - b;
            }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2)
#pragma unroll
        for (int i = 0; i < N; i++) {
            float other = kvm_shfl_xor(x[i], mask);
            x[i] = lane & mask ? other - x[i] : x[i] + other;
        }
#pragma unroll
    for (int i = 0; i < N; i++) x[i] *= kvm_rotation_factor<D>();
}
