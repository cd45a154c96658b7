// Decoding attention over paged f16 and bf16 keys and values.
//
//   S^T [token, head] = K Q^T        O^T [dim, head] = V^T P        16 tokens at a time
//
// Tokens, and dims, are the 16 rows of the tensor cores' left operand and the query heads of a KV
// head its 8 columns, so a group of 8 wastes nothing. A warp owns every WARPS-th tile of 16 tokens
// of its work item and a ring of tiles in shared memory that it alone fills: the main loop has no
// barrier of the CTA. The last CTA of a head that was split merges the parts.
#include "kvm_intrin.cuh"

/// One part of the rows of one KV head of one sequence.
struct KvmItem {
    u32 token, kv_head; // row of Q, O and LSE; KV head
    u32 first_page;     // index of its first block id in `pages`
    u32 len, begin, end; // rows of the head; rows of this part, begin a multiple of 16
    u32 slot;           // first of its num_parts partial results
    u32 part, num_parts;
    u32 ticket;         // counts parts that are done; 0 before and after
};

/// Strides are in elements. Rows of K and V are aligned to 16 bytes, of Q and O to 4.
struct KvmDecode {
    const u16 *q, *k, *v;
    u16* o;
    float* lse;         // [token, q_heads], natural logarithm; may be null
    const float* sinks; // [q_heads] extra logits; may be null
    const int* pages;
    const KvmItem* items;
    const u32* num_items;
    float* partials; // [slot, group, D + 2]
    u32* tickets;
    i64 q_token, q_head, o_token, o_head, lse_token, kv_block, kv_head, kv_token;
    float scale, softcap; // softcap 0: off
    u32 window, group, block_size; // window 0: off; group at most 8 NT; block_size 16, 32 or 64
};

#define KVM_INF kvm_infinity()
static constexpr float KVM_LOG2E = 1.4426950408889634f, KVM_LN2 = 0.6931471805599453f;
static constexpr int KVM_STAGES = 3;

/// Warps of a CTA: the ring stays below the 99 KiB that every device since sm_80 has.
KVM_DEVICE constexpr int kvm_warps(int D) { return D == 256 ? 2 : 4; }

template <int D> KVM_DEVICE int kvm_swizzle(int row, int chunk) {
    return row * D + ((chunk ^ (row & 7)) << 3);
}

template <int D>
KVM_DEVICE void kvm_load_tile(const KvmDecode& p, const KvmItem& it, u32 first, u16* tile) {
    int lane = kvm_tid() % 32;
    bool has_tile = first < it.end;
    i64 page = has_tile ? p.pages[it.first_page + first / p.block_size] : 0;
    i64 base = page * p.kv_block + it.kv_head * p.kv_head + (first % p.block_size) * p.kv_token;
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
        int row = (j * 32 + lane) / (D / 8), chunk = (j * 32 + lane) % (D / 8);
        bool is_valid = first + row < it.end;
        i64 at = is_valid ? base + row * p.kv_token + chunk * 8 : 0;
        int to = kvm_swizzle<D>(row, chunk);
        kvm_cp_async16(tile + to, p.k + at, is_valid);
        kvm_cp_async16(tile + 16 * D + to, p.v + at, is_valid);
    }
}

/// A logit in units of log2, -inf where the row is hidden.
KVM_DEVICE float kvm_logit(const KvmDecode& p, const KvmItem& it, float dot, u32 token) {
    float x = dot * p.scale;
    if (p.softcap > 0) x = p.softcap * (1 - 2 / (1 + kvm_exp2(2 * KVM_LOG2E * x / p.softcap)));
    bool is_hidden = token >= it.end || (p.window > 0 && it.len - 1 - token >= p.window);
    return is_hidden ? -KVM_INF : x * KVM_LOG2E;
}

/// exp2(x - max) where -inf never meets -inf.
KVM_DEVICE float kvm_weight(float x, float max) { return kvm_exp2(x - (max == -KVM_INF ? 0 : max)); }

/// The state of the online softmax of a warp; column pairs as the tensor cores hold them.
template <int D, int NT> struct KvmState {
    float max[NT][2], sum[NT][2], o[D / 16][NT][4];
};

template <bool BF16, int D, int NT>
KVM_DEVICE void kvm_tile(const KvmDecode& p, const KvmItem& it, u32 first, const u16* tile,
                         const u32 (&q)[D / 16][NT][2], KvmState<D, NT>& st) {
    int lane = kvm_tid() % 32;
    float s[NT][4] = {};
#pragma unroll
    for (int ks = 0; ks < D / 16; ks++) {
        u32 a[4];
        kvm_ldsm4(a, tile + kvm_swizzle<D>(lane % 16, ks * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < NT; n++) kvm_mma<BF16>(s[n], a, q[ks][n]);
    }
    u32 pb[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float alpha[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
            s[n][c] = kvm_logit(p, it, s[n][c], first + lane / 4);
            s[n][c + 2] = kvm_logit(p, it, s[n][c + 2], first + lane / 4 + 8);
            float max = s[n][c] > s[n][c + 2] ? s[n][c] : s[n][c + 2];
            for (int mask = 4; mask < 32; mask *= 2) {
                float other = kvm_shfl_xor(max, mask);
                max = other > max ? other : max;
            }
            max = st.max[n][c] > max ? st.max[n][c] : max;
            alpha[c] = kvm_weight(st.max[n][c], max);
            st.max[n][c] = max;
            s[n][c] = kvm_weight(s[n][c], max);
            s[n][c + 2] = kvm_weight(s[n][c + 2], max);
            st.sum[n][c] = st.sum[n][c] * alpha[c] + s[n][c] + s[n][c + 2];
        }
        pb[n][0] = kvm_movm(kvm_pack<BF16>(s[n][0], s[n][1]));
        pb[n][1] = kvm_movm(kvm_pack<BF16>(s[n][2], s[n][3]));
#pragma unroll
        for (int d = 0; d < D / 16; d++)
#pragma unroll
            for (int r = 0; r < 4; r++) st.o[d][n][r] *= alpha[r & 1];
    }
    int row = lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
        u32 a[4];
        kvm_ldsm4_trans(a, tile + 16 * D + kvm_swizzle<D>(row, d * 2 + lane / 8 % 2));
#pragma unroll
        for (int n = 0; n < NT; n++) kvm_mma<BF16>(st.o[d][n], a, pb[n]);
    }
}

/// One result from `count` of them, `stride` floats apart: outputs d and d + 1 of a head.
template <int D, bool GLOBAL>
KVM_DEVICE void kvm_merge(const float* parts, u32 count, u32 stride, u32 d, float (&r)[4]) {
    r[0] = -KVM_INF;
    r[1] = r[2] = r[3] = 0;
    for (u32 i = 0; i < count; i++, parts += stride) {
        auto at = [&](u32 j) { return GLOBAL ? kvm_ld_cg(parts + j) : parts[j]; };
        float other = at(D), max = other > r[0] ? other : r[0];
        float a = kvm_weight(r[0], max), b = kvm_weight(other, max);
        r[0] = max;
        r[1] = r[1] * a + at(D + 1) * b;
        r[2] = r[2] * a + at(d) * b;
        r[3] = r[3] * a + at(d + 1) * b;
    }
}

template <bool BF16>
KVM_DEVICE void kvm_finish(const KvmDecode& p, const KvmItem& it, u32 head, u32 d, float (&r)[4]) {
    u32 q_head = it.kv_head * p.group + head;
    if (p.sinks) {
        float sink = p.sinks[q_head] * KVM_LOG2E, max = sink > r[0] ? sink : r[0];
        float a = kvm_weight(r[0], max);
        r[1] = r[1] * a + kvm_weight(sink, max);
        r[2] *= a;
        r[3] *= a;
        r[0] = max;
    }
    float inverse = r[1] > 0 ? 1 / r[1] : 0;
    u16* o = p.o + it.token * p.o_token + q_head * p.o_head + d;
    *(u32*)o = kvm_pack<BF16>(r[2] * inverse, r[3] * inverse);
    if (p.lse && d == 0)
        p.lse[it.token * p.lse_token + q_head] = (r[0] + kvm_log2(r[1])) * KVM_LN2;
}

template <bool BF16, int D, int NT>
KVM_DEVICE void kvm_run_item(const KvmDecode& p, const KvmItem& it, unsigned char* smem) {
    constexpr int WARPS = kvm_warps(D), TILE = 2 * 16 * D, STRIDE = D + 2;
    int lane = kvm_tid() % 32, warp = kvm_tid() / 32;
    u16* ring = (u16*)smem + warp * KVM_STAGES * TILE;
    u32 q[D / 16][NT][2];
#pragma unroll
    for (int ks = 0; ks < D / 16; ks++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                u32 head = n * 8 + lane / 4;
                const u16* row = p.q + it.token * p.q_token + (it.kv_head * p.group + head) * p.q_head;
                q[ks][n][r] =
                    head < p.group ? *(const u32*)(row + ks * 16 + r * 8 + lane % 4 * 2) : 0;
            }
    KvmState<D, NT> st = {};
    for (int n = 0; n < NT; n++) st.max[n][0] = st.max[n][1] = -KVM_INF;

    u32 first = it.begin + warp * 16;
    for (int i = 0; i < KVM_STAGES - 1; i++) {
        kvm_load_tile<D>(p, it, first + i * WARPS * 16, ring + i * TILE);
        kvm_cp_commit();
    }
    for (int i = 0; first < it.end; i = i + 1 == KVM_STAGES ? 0 : i + 1, first += WARPS * 16) {
        kvm_cp_wait<KVM_STAGES - 2>();
        kvm_syncwarp(); // all lanes' copies have landed, all lanes have left the oldest tile
        int free = i == 0 ? KVM_STAGES - 1 : i - 1;
        kvm_load_tile<D>(p, it, first + (KVM_STAGES - 1) * WARPS * 16, ring + free * TILE);
        kvm_cp_commit();
        kvm_tile<BF16, D, NT>(p, it, first, ring + i * TILE, q, st);
    }
    kvm_cp_wait<0>();
    kvm_sync(); // the rings become the meeting place of the warps

    float* meet = (float*)smem;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float sum = st.sum[n][c];
            for (int mask = 4; mask < 32; mask *= 2) sum += kvm_shfl_xor(sum, mask);
            u32 head = n * 8 + lane % 4 * 2 + c;
            if (head >= p.group) continue;
            float* row = meet + (warp * p.group + head) * STRIDE;
#pragma unroll
            for (int d = 0; d < D / 16; d++) {
                row[d * 16 + lane / 4] = st.o[d][n][c];
                row[d * 16 + lane / 4 + 8] = st.o[d][n][c + 2];
            }
            if (lane / 4 == 0) row[D] = st.max[n][c], row[D + 1] = sum;
        }
    kvm_sync();

    u32 size = p.group * STRIDE;
    float* partial = p.partials + (i64)it.slot * size;
    for (u32 i = kvm_tid(); i < p.group * D / 2; i += WARPS * 32) {
        u32 head = i / (D / 2), d = i % (D / 2) * 2;
        float r[4];
        kvm_merge<D, false>(meet + head * STRIDE, WARPS, size, d, r);
        if (it.num_parts == 1) {
            kvm_finish<BF16>(p, it, head, d, r);
        } else {
            float* row = partial + it.part * size + head * STRIDE;
            row[d] = r[2], row[d + 1] = r[3];
            if (d == 0) row[D] = r[0], row[D + 1] = r[1];
        }
    }
    if (it.num_parts > 1) {
        kvm_fence(); // my part before my ticket
        kvm_sync();
        u32* done = (u32*)smem;
        if (kvm_tid() == 0) *done = kvm_atomic_add(p.tickets + it.ticket, 1);
        kvm_sync();
        if (*done + 1 == it.num_parts) {
            kvm_fence(); // the last ticket before the parts of the others
            for (u32 i = kvm_tid(); i < p.group * D / 2; i += WARPS * 32) {
                u32 head = i / (D / 2), d = i % (D / 2) * 2;
                float r[4];
                kvm_merge<D, true>(partial + head * STRIDE, it.num_parts, size, d, r);
                kvm_finish<BF16>(p, it, head, d, r);
            }
            if (kvm_tid() == 0) p.tickets[it.ticket] = 0;
        }
    }
    kvm_sync(); // the next item fills the rings again
}

/// The grid never changes: the number of items is read here, so a plan can change under a graph.
#define KVM_DECODE(name, BF16, D, NT)                                                             \
    KVM_KERNEL(kvm_warps(D) * 32) name(const KvmDecode p) {                                       \
        KVM_DYN_SMEM(smem);                                                                       \
        for (u32 i = kvm_bid(); i < *p.num_items; i += kvm_grid())                                \
            kvm_run_item<BF16, D, NT>(p, p.items[i], smem);                                       \
    }

KVM_DECODE(kvm_decode_f16_d64_g8, false, 64, 1)
KVM_DECODE(kvm_decode_f16_d64_g16, false, 64, 2)
KVM_DECODE(kvm_decode_f16_d128_g8, false, 128, 1)
KVM_DECODE(kvm_decode_f16_d128_g16, false, 128, 2)
KVM_DECODE(kvm_decode_f16_d256_g8, false, 256, 1)
KVM_DECODE(kvm_decode_f16_d256_g16, false, 256, 2)
KVM_DECODE(kvm_decode_bf16_d64_g8, true, 64, 1)
KVM_DECODE(kvm_decode_bf16_d64_g16, true, 64, 2)
KVM_DECODE(kvm_decode_bf16_d128_g8, true, 128, 1)
KVM_DECODE(kvm_decode_bf16_d128_g16, true, 128, 2)
KVM_DECODE(kvm_decode_bf16_d256_g8, true, 256, 1)
KVM_DECODE(kvm_decode_bf16_d256_g16, true, 256, 2)
