// Decoding attention over paged f16 and bf16 keys and values (kvm_attn.cuh has the layout).
//
// A group of 8 query heads wastes nothing. The last CTA of a head that was split merges the parts,
// so there is one launch whatever the lengths are. While a CTA finishes an item, the first tiles of
// its next one are on their way.
#include "kvm_attn.cuh"

template <bool BF16, int D, int NT, int WARPS>
KVM_DEVICE void kvm_decode(const KvmDecode& p, unsigned char* smem) {
    KvmRing<D, WARPS> ring(smem);
    float* meet = (float*)(smem + kvm_ring_bytes(D, WARPS));
    // Lists of blocks, and rows below `fresh`, are older than the kernel before.
    KvmItem it = p.items[kvm_bid()];
    auto pages = ring.pages(p, it);
    bool is_early = ring.begun(p, it) <= it.fresh;
    if (!is_early) kvm_wait_for_previous();
    ring.begin(p, it, pages);
    if (is_early) kvm_wait_for_previous();
    kvm_let_next_start();
    if (it.num_queries == 0) return;
    for (;;) {
        KvmItem next = p.items[it.next];
        KvmState<D, NT> st;
        kvm_clear(st);
        if constexpr (kvm_q_bytes(D, NT) > 0) {
            KvmSharedQ<NT> q = {(u32*)(meet + kvm_meet_bytes(NT, WARPS) / 4)};
            if (kvm_tid() < 32) kvm_share_q<D>(p, it, q);
            kvm_sync();
            ring.template attend<BF16, NT>(p, it, kvm_sight<NT>(p, it), q, st);
        } else {
            u32 q[D / 16][NT][2];
            kvm_load_q<D, NT>(p, it, q);
            ring.template attend<BF16, NT>(p, it, kvm_sight<NT>(p, it), q, st);
        }
        if (it.next) ring.begin(p, next, ring.pages(p, next));
        kvm_meet<BF16, D, NT, WARPS>(p, it, st, meet);
        if (!it.next) return;
        it = next;
    }
}

/// Launched with WARPS * 32 threads and kvm_ring_bytes(D, WARPS) + kvm_meet_bytes(NT, WARPS) +
/// kvm_q_bytes(D, NT) of shared memory. The grid never changes: the work of a CTA is read here, so a plan
/// can change under a CUDA graph.
#define KVM_DECODE(name, BF16, D, NT, WARPS, CTAS)                                                \
    KVM_KERNEL((WARPS) * 32, CTAS, name, KvmDecode) {                                             \
        KVM_DYN_SMEM(smem);                                                                       \
        kvm_decode<BF16, D, NT, WARPS>(p, smem);                                                  \
    }
#define KVM_DECODES(type, BF16, D)                                                                \
    KVM_DECODE(kvm_decode_##type##_d##D##_g8, BF16, D, 1, kvm_warps(D), 3)                        \
    KVM_DECODE(kvm_decode_##type##_d##D##_g16, BF16, D, 2, kvm_warps(D), 2)                       \
    KVM_DECODE(kvm_decode_##type##_d##D##_g8_wide, BF16, D, 1, 2 * kvm_warps(D), 1)               \
    KVM_DECODE(kvm_decode_##type##_d##D##_g16_wide, BF16, D, 2, 2 * kvm_warps(D), 1)

KVM_DECODES(f16, false, 64)
KVM_DECODES(f16, false, 128)
KVM_DECODES(f16, false, 256)
KVM_DECODES(bf16, true, 64)
KVM_DECODES(bf16, true, 128)
KVM_DECODES(bf16, true, 256)
