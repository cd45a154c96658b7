// Rows times the orthonormal Sylvester matrix: what the quantizers `had+X` do to keys, values and
// queries, and what they undo in outputs. Adds in the order of the CPU, so f32 rows agree bit for bit.
#include "kvm_types.cuh"

/// Strides are in elements; rows are aligned to 16 bytes; num_tokens * num_heads is below 2^31. A row of
/// m * D elements, m odd, is rotated as m rows of D. `to` may be `from` with the same strides.
struct KvmHadamard {
    const void* from; // [token, head, D]
    void* to;
    i64 from_token, from_head, to_token, to_head;
    u32 num_tokens, num_heads;
    u32 sanitize; // not 0: rows are made finite first, as before they are encoded
};

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

/// NaN becomes 0; an infinity becomes the largest finite magnitude of the row; nothing exceeds what
/// keeps the sums of a rotation finite.
template <int N> KVM_DEVICE void kvm_sanitize(float (&x)[N]) {
    constexpr float LIMIT = 3.40282347e38f / 4096;
    float most = 0;
    bool is_fit = true;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float size = x[i] < 0 ? -x[i] : x[i];
        is_fit &= size <= LIMIT;
        if (size < kvm_infinity() && size > most) most = size;
    }
    most = kvm_max_lanes(most);
    float bad = kvm_max_lanes(is_fit ? 0.0f : 1.0f);
    if (bad == 0) return;
    if (most > LIMIT) most = LIMIT;
#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] = x[i] != x[i] ? 0 : x[i] < -most ? -most : x[i] > most ? most : x[i];
}

/// A warp rotates a row; lane i holds its elements i * D / 32 and on.
template <u32 TYPE, int D> KVM_DEVICE void kvm_hadamard(const KvmHadamard& p) {
    constexpr int N = D / 32;
    u32 lane = kvm_tid() % 32;
    // All lanes of a warp leave together.
    for (u32 row = kvm_bid() * 8 + kvm_tid() / 32; row < p.num_tokens * p.num_heads;
         row += kvm_grid() * 8) {
        i64 token = row / p.num_heads, head = row % p.num_heads;
        float x[N];
        kvm_load_lane<TYPE, N>(p.from, token * p.from_token + head * p.from_head + lane * N, x);
        if (p.sanitize) kvm_sanitize(x);
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
        constexpr float FACTOR = D == 64 ? 0.125f : D == 128 ? 0.0883883461f : 0.0625f;
#pragma unroll
        for (int i = 0; i < N; i++) x[i] *= FACTOR;
        kvm_store_lane<TYPE, N>(p.to, token * p.to_token + head * p.to_head + lane * N, x);
    }
}

/// Any number of CTAs of 256 threads.
KVM_KERNEL(256, 4, kvm_hadamard_f16_d64, KvmHadamard) { kvm_hadamard<KVM_F16, 64>(p); }
KVM_KERNEL(256, 4, kvm_hadamard_f16_d128, KvmHadamard) { kvm_hadamard<KVM_F16, 128>(p); }
KVM_KERNEL(256, 4, kvm_hadamard_f16_d256, KvmHadamard) { kvm_hadamard<KVM_F16, 256>(p); }
KVM_KERNEL(256, 4, kvm_hadamard_bf16_d64, KvmHadamard) { kvm_hadamard<KVM_BF16, 64>(p); }
KVM_KERNEL(256, 4, kvm_hadamard_bf16_d128, KvmHadamard) { kvm_hadamard<KVM_BF16, 128>(p); }
KVM_KERNEL(256, 4, kvm_hadamard_bf16_d256, KvmHadamard) { kvm_hadamard<KVM_BF16, 256>(p); }
KVM_KERNEL(256, 4, kvm_hadamard_f32_d64, KvmHadamard) { kvm_hadamard<KVM_F32, 64>(p); }
KVM_KERNEL(256, 4, kvm_hadamard_f32_d128, KvmHadamard) { kvm_hadamard<KVM_F32, 128>(p); }
KVM_KERNEL(256, 4, kvm_hadamard_f32_d256, KvmHadamard) { kvm_hadamard<KVM_F32, 256>(p); }
