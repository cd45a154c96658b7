// Rows times the orthonormal Sylvester matrix: what the quantizers `had+X` do to keys, values and
// queries, and what they undo in outputs. Adds in the order of the CPU, so f32 rows agree bit for bit.
#include "kvm_rows.cuh"

/// Strides are in elements; rows are aligned to 16 bytes; num_tokens * num_heads is below 2^31. A row of
/// m * D elements, m odd, is rotated as m rows of D. `to` may be `from` with the same strides.
struct KvmHadamard {
    const void* from; // [token, head, D]
    void* to;
    i64 from_token, from_head, to_token, to_head;
    u32 num_tokens, num_heads;
    u32 sanitize; // not 0: rows are made finite first, as before they are encoded
};

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
        if (p.sanitize) kvm_sanitize(x, KVM_ROTATED_MOST);
        kvm_rotate<D>(x);
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
