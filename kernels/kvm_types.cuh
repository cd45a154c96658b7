// Rows of f16, bf16 and f32 in memory, 8 elements at a time.
#pragma once
#include "kvm_intrin.cuh"

/// Types of elements, as parameters name them.
static constexpr u32 KVM_F16 = 0, KVM_BF16 = 1, KVM_F32 = 2;

KVM_DEVICE constexpr int kvm_bytes(u32 type) { return type == KVM_F32 ? 4 : 2; }

/// The float nearest to what 16 bits mean; exact.
template <u32 TYPE> KVM_DEVICE float kvm_unpack(u32 bits) {
    return TYPE == KVM_BF16 ? kvm_float(bits << 16) : kvm_half_to_float(bits);
}

/// Reads elements `at` to `at` + 7 of `from`; their address is a multiple of 16.
template <u32 TYPE> KVM_DEVICE void kvm_load8(const void* from, i64 at, float (&x)[8]) {
    if constexpr (TYPE == KVM_F32) {
        const u32x4* p = (const u32x4*)((const float*)from + at);
        u32x4 low = p[0], high = p[1];
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = kvm_float(low.x[i]), x[i + 4] = kvm_float(high.x[i]);
    } else {
        u32x4 bits = *(const u32x4*)((const u16*)from + at);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[2 * i] = kvm_unpack<TYPE>(bits.x[i] & 0xffff);
            x[2 * i + 1] = kvm_unpack<TYPE>(bits.x[i] >> 16);
        }
    }
}

template <u32 TYPE> KVM_DEVICE void kvm_store8(void* to, i64 at, const float (&x)[8]) {
    if constexpr (TYPE == KVM_F32) {
        u32x4* p = (u32x4*)((float*)to + at);
        u32x4 low, high;
#pragma unroll
        for (int i = 0; i < 4; i++) low.x[i] = kvm_bits(x[i]), high.x[i] = kvm_bits(x[i + 4]);
        p[0] = low, p[1] = high;
    } else {
        u32x4 bits;
#pragma unroll
        for (int i = 0; i < 4; i++)
            bits.x[i] = kvm_pack<TYPE == KVM_BF16>(x[2 * i], x[2 * i + 1]);
        *(u32x4*)((u16*)to + at) = bits;
    }
}

/// The same where the type is known to the launch only; all threads of a warp agree on it.
KVM_DEVICE void kvm_load8(u32 type, const void* from, i64 at, float (&x)[8]) {
    if (type == KVM_F16) kvm_load8<KVM_F16>(from, at, x);
    else if (type == KVM_BF16) kvm_load8<KVM_BF16>(from, at, x);
    else kvm_load8<KVM_F32>(from, at, x);
}
KVM_DEVICE void kvm_store8(u32 type, void* to, i64 at, const float (&x)[8]) {
    if (type == KVM_F16) kvm_store8<KVM_F16>(to, at, x);
    else if (type == KVM_BF16) kvm_store8<KVM_BF16>(to, at, x);
    else kvm_store8<KVM_F32>(to, at, x);
}
