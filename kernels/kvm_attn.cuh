// What all kernels of decoding attention share: the work they are given, the online softmax over
// open blocks, and how the results of warps and of parts become one.
//
//   S^T [token, column] = K Q^T        O^T [dim, column] = V^T P        16 tokens at a time
//
// Tokens, and dims, are the 16 rows of the tensor cores' left operand. Columns are the query heads
// of a KV head, for one query or a few: column c is head c % group of query c / group.
#pragma once
#include "kvm_intrin.cuh"

/// One part of the rows of one KV head of one sequence, for some of its queries.
struct KvmItem {
    u32 token, num_queries; // first row of Q, O and LSE; num_queries * group is at most 8 NT
    u32 kv_head;
    u32 first_page;  // index of the head's first block in `pages`
    u32 len;         // rows that the last of the queries sees; each one before sees one less
    u32 begin, end;  // rows of this part; begin is a multiple of the rows of a block or of 16
    u32 sealed_end;  // rows below lie in sealed blocks; a multiple of block_size
    u32 slot;        // first of its num_parts partial results
    u32 part, num_parts;
    u32 ticket;      // counts parts that are done; 0 before and after
};

/// Strides of Q, O and open blocks are in elements. Rows of K and V are aligned to 16 bytes, of Q
/// and O to 4. A block is `pages[i]` strides from the start of its pool.
struct KvmDecode {
    const u16* q;
    u16* o;
    float* lse;         // [token, q_heads], natural logarithm; may be null
    const float* sinks; // [q_heads] extra logits; may be null
    const u32* pages;
    const KvmItem* items;
    const u32* starts; // [grid + 1]: CTA i does the items starts[i] to starts[i + 1] - 1
    float* partials;   // [slot, 8 NT, D + 2]
    u32* tickets;
    const u16 *k, *v;                          // open blocks
    const unsigned char *sealed_k, *sealed_v;  // sealed blocks of another format; else null
    i64 q_token, q_head, o_token, o_head, lse_token, kv_block, kv_head, kv_token;
    i64 sealed_block, sealed_head; // bytes
    float scale, softcap;          // softcap 0: off
    u32 window, group, block_size; // window 0: off; block_size 16, 32 or 64
};

#define KVM_INF kvm_infinity()
static constexpr float KVM_LOG2E = 1.4426950408889634f, KVM_LN2 = 0.6931471805599453f;

/// Warps of a CTA: the ring stays below the 99 KiB that every device since sm_80 has.
KVM_DEVICE constexpr int kvm_warps(int D) { return D == 256 ? 2 : 4; }

/// The rows that each column of this lane sees: begin to end - 1.
template <int NT> struct KvmSight {
    u32 begin[NT][2], end[NT][2];
};

template <int NT> KVM_DEVICE KvmSight<NT> kvm_sight(const KvmDecode& p, const KvmItem& it) {
    KvmSight<NT> sight;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            u32 query = (n * 8 + kvm_tid() % 4 * 2 + c) / p.group;
            u32 hidden = query < it.num_queries ? it.num_queries - 1 - query : 0;
            u32 len = it.len > hidden ? it.len - hidden : 0;
            sight.end[n][c] = len < it.end ? len : it.end;
            sight.begin[n][c] = p.window > 0 && len > p.window ? len - p.window : 0;
        }
    return sight;
}

/// The address of a column of Q or O, whose strides are `by_token` and `by_head`.
KVM_DEVICE i64 kvm_column(const KvmDecode& p, const KvmItem& it, u32 column, i64 by_token,
                          i64 by_head) {
    return (it.token + column / p.group) * by_token +
           (it.kv_head * p.group + column % p.group) * by_head;
}

/// Q as right operands; columns that are not there are 0.
template <int D, int NT>
KVM_DEVICE void kvm_load_q(const KvmDecode& p, const KvmItem& it, u32 (&q)[D / 16][NT][2]) {
    u32 lane = kvm_tid() % 32;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        u32 column = n * 8 + lane / 4;
        bool is_there = column < it.num_queries * p.group;
        const u16* row = p.q + (is_there ? kvm_column(p, it, column, p.q_token, p.q_head) : 0);
#pragma unroll
        for (int ks = 0; ks < D / 16; ks++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                q[ks][n][r] = is_there ? *(const u32*)(row + ks * 16 + r * 8 + lane % 4 * 2) : 0;
    }
}

/// A logit in units of log2; -inf if the row is hidden.
KVM_DEVICE float kvm_logit(const KvmDecode& p, float dot, bool is_seen) {
    float x = dot * p.scale;
    if (p.softcap > 0) x = p.softcap * (1 - 2 / (1 + kvm_exp2(2 * KVM_LOG2E * x / p.softcap)));
    return is_seen ? x * KVM_LOG2E : -KVM_INF;
}

/// exp2(x - max) where -inf never meets -inf.
KVM_DEVICE float kvm_weight(float x, float max) { return kvm_exp2(x - (max == -KVM_INF ? 0 : max)); }

/// The state of the online softmax of a warp; column pairs as the tensor cores hold them.
template <int D, int NT> struct KvmState {
    float max[NT][2], sum[NT][2], o[D / 16][NT][4];
};

template <int D, int NT> KVM_DEVICE void kvm_clear(KvmState<D, NT>& st) {
    st = {};
#pragma unroll
    for (int n = 0; n < NT; n++) st.max[n][0] = st.max[n][1] = -KVM_INF;
}

template <int D> KVM_DEVICE int kvm_swizzle(int row, int chunk) {
    return row * D + ((chunk ^ (row & 7)) << 3);
}

/// Asks for 16 rows of K and V of an open block.
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

/// Attends to 16 rows of an open block.
template <bool BF16, int D, int NT>
KVM_DEVICE void kvm_tile(const KvmDecode& p, const KvmSight<NT>& sight, u32 first, const u16* tile,
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
            u32 row = first + lane / 4, begin = sight.begin[n][c], end = sight.end[n][c];
            s[n][c] = kvm_logit(p, s[n][c], row >= begin && row < end);
            s[n][c + 2] = kvm_logit(p, s[n][c + 2], row + 8 >= begin && row + 8 < end);
            float max = kvm_max_rows(s[n][c] > s[n][c + 2] ? s[n][c] : s[n][c + 2]);
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

/// Attends to the open rows of an item. A warp owns every kvm_warps(D)-th tile of 16 rows and a ring
/// of STAGES tiles in shared memory that it alone fills: there is no barrier of the CTA.
template <bool BF16, int D, int NT, int STAGES>
KVM_DEVICE void kvm_open_rows(const KvmDecode& p, const KvmItem& it, const KvmSight<NT>& sight,
                              const u32 (&q)[D / 16][NT][2], unsigned char* smem,
                              KvmState<D, NT>& st) {
    constexpr int WARPS = kvm_warps(D), TILE = 2 * 16 * D;
    u32 warp = kvm_tid() / 32;
    u16* ring = (u16*)smem + warp * STAGES * TILE;
    u32 first = (it.begin > it.sealed_end ? it.begin : it.sealed_end) + warp * 16;
    for (int i = 0; i < STAGES - 1; i++) {
        kvm_load_tile<D>(p, it, first + i * WARPS * 16, ring + i * TILE);
        kvm_cp_commit();
    }
    for (int i = 0; first < it.end; i = i + 1 == STAGES ? 0 : i + 1, first += WARPS * 16) {
        kvm_cp_wait<STAGES - 2>();
        kvm_syncwarp(); // all lanes' copies have landed, all lanes have left the oldest tile
        int free = i == 0 ? STAGES - 1 : i - 1;
        kvm_load_tile<D>(p, it, first + (STAGES - 1) * WARPS * 16, ring + free * TILE);
        kvm_cp_commit();
        kvm_tile<BF16, D, NT>(p, sight, first, ring + i * TILE, q, st);
    }
    kvm_cp_wait<0>();
}

/// One result from `count` of them, `stride` floats apart: outputs d and d + 1 of a column.
template <int D, bool GLOBAL>
KVM_DEVICE void kvm_merge(const float* parts, u32 count, u32 stride, u32 d, float (&r)[4]) {
    r[0] = -KVM_INF;
    r[1] = r[2] = r[3] = 0;
#pragma unroll 4
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
KVM_DEVICE void kvm_finish(const KvmDecode& p, const KvmItem& it, u32 column, u32 d,
                           float (&r)[4]) {
    u32 q_head = it.kv_head * p.group + column % p.group;
    if (p.sinks) {
        float sink = p.sinks[q_head] * KVM_LOG2E, max = sink > r[0] ? sink : r[0];
        float a = kvm_weight(r[0], max);
        r[1] = r[1] * a + kvm_weight(sink, max);
        r[2] *= a;
        r[3] *= a;
        r[0] = max;
    }
    float inverse = r[1] > 0 ? 1 / r[1] : 0;
    u16* o = p.o + kvm_column(p, it, column, p.o_token, p.o_head) + d;
    *(u32*)o = kvm_pack<BF16>(r[2] * inverse, r[3] * inverse);
    if (p.lse && d == 0)
        p.lse[(it.token + column / p.group) * p.lse_token + q_head] =
            (r[0] + kvm_log2(r[1])) * KVM_LN2;
}

/// Merges what the warps have, and, by the last CTA of a head, its parts. Shared memory is the
/// meeting place: 4 * warps * 8 NT * (D + 2) bytes.
template <bool BF16, int D, int NT>
KVM_DEVICE void kvm_meet(const KvmDecode& p, const KvmItem& it, const KvmState<D, NT>& st,
                         unsigned char* smem) {
    constexpr int WARPS = kvm_warps(D), STRIDE = D + 2;
    u32 lane = kvm_tid() % 32, warp = kvm_tid() / 32, columns = it.num_queries * p.group;
    float* meet = (float*)smem;
    kvm_sync(); // nobody reads from the rings any more
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float sum = kvm_sum_rows(st.sum[n][c]);
            u32 column = n * 8 + lane % 4 * 2 + c;
            if (column >= columns) continue;
            float* row = meet + (warp * columns + column) * STRIDE;
#pragma unroll
            for (int d = 0; d < D / 16; d++) {
                row[d * 16 + lane / 4] = st.o[d][n][c];
                row[d * 16 + lane / 4 + 8] = st.o[d][n][c + 2];
            }
            if (lane / 4 == 0) row[D] = st.max[n][c], row[D + 1] = sum;
        }
    kvm_sync();

    u32 size = columns * STRIDE;
    float* partial = p.partials + (i64)it.slot * 8 * NT * STRIDE;
    for (u32 i = kvm_tid(); i < columns * D / 2; i += WARPS * 32) {
        u32 column = i / (D / 2), d = i % (D / 2) * 2;
        float r[4];
        kvm_merge<D, false>(meet + column * STRIDE, WARPS, size, d, r);
        if (it.num_parts == 1) {
            kvm_finish<BF16>(p, it, column, d, r);
        } else {
            float* row = partial + it.part * size + column * STRIDE;
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
            for (u32 i = kvm_tid(); i < columns * D / 2; i += WARPS * 32) {
                u32 column = i / (D / 2), d = i % (D / 2) * 2;
                float r[4];
                kvm_merge<D, true>(partial + column * STRIDE, it.num_parts, size, d, r);
                kvm_finish<BF16>(p, it, column, d, r);
            }
            if (kvm_tid() == 0) p.tickets[it.ticket] = 0;
        }
    }
    kvm_sync(); // the next item fills the rings again
}
