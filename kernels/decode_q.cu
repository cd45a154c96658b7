// Decoding attention over sealed blocks of 8, 4 and 2 bits, and the open f16 or bf16 rows behind them.
//
// A warp owns every WARPS-th chunk of tokens of its item and two places for chunks in shared memory, which
// it fills ahead; kvm_sealed.cuh has what it does with a chunk.
#include "kvm_sealed.cuh"

/// Chunks of the sealed rows of a part, keys in format K and values in format V.
template <class K, class V, int D, int WARPS> struct KvmSealedRing {
    static constexpr int K_BYTES = KvmChunk<K, D>::K, V_BYTES = KvmChunk<V, D>::V;
    static constexpr u32 STEP = WARPS * K::TOKENS;
    /// Places are filled 512 bytes at a time; what is more than a chunk is not copied.
    static constexpr int V_PLACE = (K_BYTES + 511) / 512 * 512;
    static constexpr int BYTES = V_PLACE + (V_BYTES + 511) / 512 * 512;
    unsigned char* places;

    KVM_DEVICE KvmSealedRing(unsigned char* smem) : places(smem + kvm_tid() / 32 * 2 * BYTES) {}

    KVM_DEVICE static u32 first(const KvmDecode& p, const KvmItem& it) {
        return kvm_first_row(p, it, K::TOKENS) + kvm_tid() / 32 * K::TOKENS;
    }
    KVM_DEVICE static u32 end(const KvmItem& it) {
        return it.end < it.sealed_end ? it.end : it.sealed_end;
    }

    /// The number of the block that holds a row, 0 if the part has no such sealed row.
    KVM_DEVICE static u32 page(const KvmDecode& p, const KvmItem& it, u32 row) {
        return row < end(it) ? p.pages[it.first_page + row / 64] : 0;
    }

    /// Asks for the chunk that starts at a row of the block `page`, if the part has it.
    KVM_DEVICE void load(const KvmDecode& p, const KvmItem& it, u32 row, u32 page, int place) const {
        if (row >= end(it)) return;
        i64 at = page * p.sealed_block + it.kv_head * p.sealed_head + kvm_tid() % 32 * 16;
        u32 chunk = row % 64 / K::TOKENS;
        unsigned char* to = places + place * BYTES + kvm_tid() % 32 * 16;
        copy<K_BYTES>(to, p.sealed_k + at + chunk * K_BYTES);
        copy<V_BYTES>(to + V_PLACE, p.sealed_v + at + chunk * V_BYTES);
    }

    /// 512 bytes at a time, 16 of each lane. Without the hint that memory is read once: with it ptxas
    /// (13.0, and the driver's) makes illegal instructions of these copies, and of those of the open
    /// rows behind.
    template <int N, int FIRST = 0>
    KVM_DEVICE static void copy(unsigned char* to, const unsigned char* from) {
        if constexpr (FIRST + 512 <= N) {
            kvm_cp_async16_at<FIRST>(to, from);
            copy<N, FIRST + 512>(to, from);
        } else if constexpr (FIRST < N) {
            if (FIRST + kvm_tid() % 32 * 16 < N) kvm_cp_async16_at<FIRST>(to, from);
        }
    }
};

template <class K, class V, int D, int WARPS>
KVM_DEVICE KvmFirstPages kvm_first_pages(const KvmDecode& p, const KvmItem& it) {
    using Ring = KvmSealedRing<K, V, D, WARPS>;
    u32 row = Ring::first(p, it);
    return {Ring::page(p, it, row), Ring::page(p, it, row + Ring::STEP)};
}

/// Asks for the first two chunks of a warp in a part.
template <class K, class V, int D, int WARPS>
KVM_DEVICE void kvm_load_first(const KvmDecode& p, const KvmItem& it, KvmFirstPages pages,
                               unsigned char* smem) {
    using Ring = KvmSealedRing<K, V, D, WARPS>;
    if (it.begin >= it.sealed_end) return;
    Ring ring(smem);
    u32 row = Ring::first(p, it);
    ring.load(p, it, row, pages.first, 0);
    kvm_cp_commit();
    ring.load(p, it, row + Ring::STEP, pages.second, 1);
    kvm_cp_commit();
}

/// Attends to the sealed rows of a part whose first chunks have been asked for, unless registers are too few to
/// do that ahead.
template <class K, class V, int D, int NT, int WARPS>
KVM_DEVICE void kvm_sealed_rows(const KvmDecode& p, const KvmItem& it, KvmFirstPages pages,
                                const KvmSight<NT>& sight, unsigned char* smem, u32* shared_q,
                                KvmState<D, NT>& st) {
    constexpr bool IS_AHEAD = !KVM_SHARES_Q<D, NT>;
    using Ring = KvmSealedRing<K, V, D, WARPS>;
    Ring ring(smem);
    KvmQueries<D, NT> q;
    const u32 first = Ring::first(p, it);
    u32 row = first, page = pages.second; // of the next chunk
    if constexpr (!IS_AHEAD) {
        ring.load(p, it, row, pages.first, 0);
        kvm_cp_commit();
    }
    kvm_prepare_q<K, D, NT, WARPS>(p, it, shared_q, q);
    KvmSealedState<NT> sealed = {0, {}, {}};
    // The rows that all queries see, those of the first and of the last query.
    u32 seen_end = it.len + 1 > it.num_queries ? it.len + 1 - it.num_queries : 0;
    seen_end = seen_end < it.end ? seen_end : it.end;
    u32 seen_begin = p.window > 0 && it.len > p.window ? it.len - p.window : 0;
    seen_begin = seen_begin > it.first ? seen_begin : it.first;
    for (int place = 0; row < Ring::end(it); place ^= 1, row += Ring::STEP) {
        if (!IS_AHEAD || row != first) {
            ring.load(p, it, row + Ring::STEP, page, place ^ 1);
            kvm_cp_commit();
        }
        page = Ring::page(p, it, row + 2 * Ring::STEP); // known when it is needed
        kvm_cp_wait<1>();
        kvm_syncwarp(); // the copies of all lanes have landed
        bool is_partial = p.softcap > 0 || row < seen_begin || row + K::TOKENS > seen_end;
        const unsigned char* chunk = ring.places + place * Ring::BYTES;
        kvm_chunk<K, V>(p, sight, row, is_partial, q, chunk, chunk + Ring::V_PLACE, st, sealed);
        kvm_syncwarp(); // all lanes have left the place that is filled next
    }
    kvm_cp_wait<0>();
    float inverse = sealed.unit > 0 ? kvm_reciprocal(sealed.unit) : 0;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            // Each lane has the middles of its tokens only.
            float middle = V::FLOATS == 2 ? kvm_sum_rows(sealed.middle[n][c]) : 0;
#pragma unroll
            for (int d = 0; d < D / 16; d++) {
                for (int r = c; r < 4; r += 2)
                    st.o[d][n][r] = (st.o[d][n][r] - sealed.excess[n][r]) * inverse + middle;
            }
        }
    if (p.rotates & 2) kvm_rotate_outputs(st);
}

/// Bytes of shared memory: the places for sealed chunks, for open tiles and where warps meet are the
/// same, one after the other, so that three CTAs fit.
template <class K, class V, int D, int WARPS> KVM_DEVICE constexpr int kvm_quant_bytes() {
    constexpr int SEALED = WARPS * 2 * KvmSealedRing<K, V, D, WARPS>::BYTES;
    constexpr int OPEN = kvm_ring_bytes(D, WARPS);
    static_assert(OPEN >= kvm_meet_bytes(2, WARPS));
    return SEALED > OPEN ? SEALED : OPEN;
}

/// Attends to the open rows of a part, of either type.
template <int D, int NT, int WARPS>
KVM_DEVICE void kvm_open_rows(const KvmDecode& p, const KvmItem& it, const KvmSight<NT>& sight,
                              unsigned char* smem, u32* shared_q, KvmState<D, NT>& st) {
    KvmRing<D, WARPS, false> ring(smem);
    KvmQueries<D, NT> q;
    if constexpr (KVM_SHARES_Q<D, NT>) q.b = {shared_q};
    else kvm_load_q<D, NT>(p, it, q.b);
    kvm_sync(); // places of chunks become places of tiles of other warps
    ring.begin(p, it, ring.pages(p, it));
    if constexpr (KVM_SHARES_Q<D, NT>) {
        if (kvm_tid() < 32) kvm_share_q<D>(p, it, q.b);
        kvm_sync(); // all see Q
    }
    if (p.is_bf16) ring.template attend<true, NT>(p, it, sight, q.b, st);
    else ring.template attend<false, NT>(p, it, sight, q.b, st);
}

template <class K, class V, int D, int NT, int WARPS>
KVM_DEVICE void kvm_decode_quant(const KvmDecode& p, unsigned char* smem) {
    // Lists of blocks and sealed rows are older than the kernel before.
    KvmItem it = p.items[kvm_bid()];
    auto pages = kvm_first_pages<K, V, D, WARPS>(p, it);
    if constexpr (!KVM_SHARES_Q<D, NT>) kvm_load_first<K, V, D, WARPS>(p, it, pages, smem);
    kvm_wait_for_previous();
    kvm_let_next_start();
    if (it.num_queries == 0) return;
    u32* shared_q = (u32*)(smem + kvm_quant_bytes<K, V, D, WARPS>());
    u32* at = shared_q + kvm_q_bytes(D, NT) / 4 + NT * 32; // which item, where registers are too few for it
    if (KVM_SHARES_Q<D, NT> && kvm_tid() == 0) *at = kvm_bid();
    for (;;) {
        KvmState<D, NT> st;
        kvm_clear(st);
        KvmSight<NT> sight = kvm_sight<NT>(p, it);
        if constexpr (KVM_SHARES_Q<D, NT> && !K::IS_PER_CHANNEL)
            for (int i = 0; i < NT * 2; i++)
                kvm_settle(sight.begin[i / 2][i % 2]), kvm_settle(sight.end[i / 2][i % 2]);
        if (it.begin < it.sealed_end)
            kvm_sealed_rows<K, V, D, NT, WARPS>(p, it, pages, sight, smem, shared_q, st);
        if (it.end > it.sealed_end) kvm_open_rows<D, NT, WARPS>(p, it, sight, smem, shared_q, st);
        kvm_sync(); // nobody reads tiles or chunks any more
        if constexpr (KVM_SHARES_Q<D, NT>) it = p.items[*at];
        kvm_meet<KVM_ANY_HALF, D, NT, WARPS>(p, it, st, (float*)smem);
        if (!it.next) return;
        if (KVM_SHARES_Q<D, NT> && kvm_tid() == 0) *at = it.next;
        it = p.items[it.next];
        pages = kvm_first_pages<K, V, D, WARPS>(p, it);
        kvm_sync(); // all know whether theirs was the last part
        if constexpr (!KVM_SHARES_Q<D, NT>) kvm_load_first<K, V, D, WARPS>(p, it, pages, smem);
    }
}

/// Launched with kvm_warps(D) * 32 threads and kvm_quant_bytes of shared memory; where Q is there too, with
/// kvm_q_bytes(D, NT) + NT * 128 + 16 bytes more.
#define KVM_DECODE_QUANT(name, K, V, D, NT, CTAS)                                                    \
    KVM_KERNEL(kvm_warps(D) * 32, CTAS, name, KvmDecode) {                                        \
        KVM_DYN_SMEM(smem);                                                                       \
        kvm_decode_quant<K, V, D, NT, kvm_warps(D)>(p, smem);                                        \
    }
#define KVM_DECODE_QUANTS(format, K, V, D)                                                           \
    KVM_DECODE_QUANT(kvm_decode_##format##_d##D##_g8, K, V, D, 1, 3)                                 \
    KVM_DECODE_QUANT(kvm_decode_##format##_d##D##_g16, K, V, D, 2, 2)

KVM_DECODE_QUANTS(int8, KvmInt8, KvmInt8, 64)
KVM_DECODE_QUANTS(int8, KvmInt8, KvmInt8, 128)
KVM_DECODE_QUANTS(int8, KvmInt8, KvmInt8, 256)
KVM_DECODE_QUANTS(fp8e4m3, KvmE4m3, KvmE4m3, 64)
KVM_DECODE_QUANTS(fp8e4m3, KvmE4m3, KvmE4m3, 128)
KVM_DECODE_QUANTS(fp8e4m3, KvmE4m3, KvmE4m3, 256)
KVM_DECODE_QUANTS(int4, KvmInt4, KvmInt4, 64)
KVM_DECODE_QUANTS(int4, KvmInt4, KvmInt4, 128)
KVM_DECODE_QUANTS(int4, KvmInt4, KvmInt4, 256)
KVM_DECODE_QUANTS(kivi4, KvmKivi4, KvmKivi4, 64)
KVM_DECODE_QUANTS(kivi4, KvmKivi4, KvmKivi4, 128)
KVM_DECODE_QUANTS(kivi4, KvmKivi4, KvmKivi4, 256)
KVM_DECODE_QUANTS(kivi2, KvmKivi2, KvmKivi2, 64)
KVM_DECODE_QUANTS(kivi2, KvmKivi2, KvmKivi2, 128)
KVM_DECODE_QUANTS(kivi2, KvmKivi2, KvmKivi2, 256)
KVM_DECODE_QUANTS(int8_int4, KvmInt8, KvmShortInt4, 64)
KVM_DECODE_QUANTS(int8_int4, KvmInt8, KvmShortInt4, 128)
KVM_DECODE_QUANTS(int8_int4, KvmInt8, KvmShortInt4, 256)
