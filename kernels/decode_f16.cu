// Decoding attention over paged f16 and bf16 keys and values (kvm_attn.cuh has the layout).
//
// A group of 8 query heads wastes nothing. The last CTA of a head that was split merges the parts,
// so there is one launch whatever the lengths are.
#include "kvm_attn.cuh"

/// Launched with kvm_warps(D) * 32 threads and 3 * kvm_warps(D) * 64 D bytes of shared memory. The
/// grid never changes: the work of a CTA is read here, so a plan can change under a CUDA graph.
#define KVM_DECODE(name, BF16, D, NT, CTAS)                                                       \
    KVM_KERNEL(kvm_warps(D) * 32, CTAS, name, KvmDecode) {                                        \
        KVM_DYN_SMEM(smem);                                                                       \
        for (u32 i = p.starts[kvm_bid()]; i < p.starts[kvm_bid() + 1]; i++) {                     \
            KvmItem it = p.items[i];                                                              \
            u32 q[D / 16][NT][2];                                                                 \
            kvm_load_q<D, NT>(p, it, q);                                                          \
            KvmState<D, NT> st;                                                                   \
            kvm_clear(st);                                                                        \
            kvm_open_rows<BF16, D, NT, 3>(p, it, kvm_sight<NT>(p, it), q, smem, st);              \
            kvm_meet<BF16, D, NT>(p, it, st, smem);                                               \
        }                                                                                         \
    }

KVM_DECODE(kvm_decode_f16_d64_g8, false, 64, 1, 2)
KVM_DECODE(kvm_decode_f16_d64_g16, false, 64, 2, 2)
KVM_DECODE(kvm_decode_f16_d128_g8, false, 128, 1, 2)
KVM_DECODE(kvm_decode_f16_d128_g16, false, 128, 2, 2)
KVM_DECODE(kvm_decode_f16_d256_g8, false, 256, 1, 2)
KVM_DECODE(kvm_decode_f16_d256_g16, false, 256, 2, 2)
KVM_DECODE(kvm_decode_bf16_d64_g8, true, 64, 1, 2)
KVM_DECODE(kvm_decode_bf16_d64_g16, true, 64, 2, 2)
KVM_DECODE(kvm_decode_bf16_d128_g8, true, 128, 1, 2)
KVM_DECODE(kvm_decode_bf16_d128_g16, true, 128, 2, 2)
KVM_DECODE(kvm_decode_bf16_d256_g8, true, 256, 1, 2)
KVM_DECODE(kvm_decode_bf16_d256_g16, true, 256, 2, 2)
