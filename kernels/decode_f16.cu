// Decoding attention over paged f16 and bf16 keys and values (kvm_attn.cuh has the layout).
//
// A group of 8 query heads wastes nothing. The last CTA of a head that was split merges the parts,
// so there is one launch whatever the lengths are. While a CTA finishes an item, the first tiles of
// its next one are on their way.
#include "kvm_attn.cuh"

template <bool BF16, int D, int NT, int STAGES>
KVM_DEVICE void kvm_decode(const KvmDecode& p, unsigned char* smem) {
    constexpr bool HAS_ROOM = D * NT < 512; // registers to know the next item early
    KvmRing<D, STAGES> ring(smem);
    KvmItem it = p.items[kvm_bid()];
    if (it.num_queries == 0) return;
    ring.begin(p, it);
    for (;;) {
        KvmItem next;
        if (HAS_ROOM) next = p.items[it.next];
        u32 q[D / 16][NT][2];
        kvm_load_q<D, NT>(p, it, q);
        KvmState<D, NT> st;
        kvm_clear(st);
        ring.template attend<BF16, NT>(p, it, kvm_sight<NT>(p, it), q, st);
        if (!HAS_ROOM) next = p.items[it.next];
        if (it.next) ring.begin(p, next);
        kvm_meet<BF16, D, NT>(p, it, st, (float*)(smem + kvm_ring_bytes(D, STAGES)));
        if (!it.next) return;
        it = next;
    }
}

/// Launched with kvm_warps(D) * 32 threads and kvm_ring_bytes(D, 2) + kvm_meet_bytes(D, NT) of shared
/// memory. The grid never changes: the work of a CTA is read here, so a plan can change under a graph.
#define KVM_DECODE(name, BF16, D, NT, CTAS)                                                       \
    KVM_KERNEL(kvm_warps(D) * 32, CTAS, name, KvmDecode) {                                        \
        KVM_DYN_SMEM(smem);                                                                       \
        kvm_decode<BF16, D, NT, 2>(p, smem);                                                      \
    }

KVM_DECODE(kvm_decode_f16_d64_g8, false, 64, 1, 3)
KVM_DECODE(kvm_decode_f16_d64_g16, false, 64, 2, 2)
KVM_DECODE(kvm_decode_f16_d128_g8, false, 128, 1, 3)
KVM_DECODE(kvm_decode_f16_d128_g16, false, 128, 2, 2)
KVM_DECODE(kvm_decode_f16_d256_g8, false, 256, 1, 3)
KVM_DECODE(kvm_decode_f16_d256_g16, false, 256, 2, 2)
KVM_DECODE(kvm_decode_bf16_d64_g8, true, 64, 1, 3)
KVM_DECODE(kvm_decode_bf16_d64_g16, true, 64, 2, 2)
KVM_DECODE(kvm_decode_bf16_d128_g8, true, 128, 1, 3)
KVM_DECODE(kvm_decode_bf16_d128_g16, true, 128, 2, 2)
KVM_DECODE(kvm_decode_bf16_d256_g8, true, 256, 1, 3)
KVM_DECODE(kvm_decode_bf16_d256_g16, true, 256, 2, 2)
