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
    u32 next;        // index of the CTA's next item, 0 after its last
    u32 first;       // rows below are evicted; less than a block, and below end
    u32 fresh;       // rows from here on may be written by the kernel before
    u32 unused;
};

/// Strides of Q, O and open blocks are in elements. Rows of K and V are aligned to 16 bytes, of Q
/// and O to 4. A block is `pages[i]` strides from the start of its pool.
struct KvmDecode {
    const u16* q;
    u16* o;
    float* lse;         // [token, q_heads], natural logarithm; may be null
    const float* sinks; // [q_heads] extra logits; may be null
    const u32* pages;
    const KvmItem* items; // CTA i starts with item i; num_queries is 0 if there is nothing to do
    float* partials;      // [slot, 8 NT, D + 4]
    u32* tickets;
    const u16 *k, *v;                          // open blocks
    const unsigned char *sealed_k, *sealed_v;  // sealed blocks of another format; else null
    i64 q_token, q_head, o_token, o_head, lse_token, kv_block, kv_head, kv_token;
    i64 sealed_block, sealed_head; // bytes
    float scale, softcap;          // softcap 0: off
    u32 window, group, block_size; // window 0: off; block_size 16, 32 or 64
    u32 rotates;                   // of sealed blocks: 1: keys, 2: values, 3: both are rotated
    u32 is_bf16;                   // for kernels of both types: Q, O and open blocks are bf16, else f16
};

#define KVM_INF kvm_infinity()
static constexpr float KVM_LOG2E = 1.4426950408889634f, KVM_LN2 = 0.6931471805599453f;

/// Warps of a narrow CTA, whose shared memory stays below the 99 KiB that every device since sm_80
/// has. A wide one has twice as many: fewer parts to merge, where heads are few.
KVM_DEVICE constexpr int kvm_warps(int D) { return D == 256 ? 2 : 4; }

/// Bytes of shared memory of the tiles that are loaded ahead, and of the place where warps meet.
KVM_DEVICE constexpr int kvm_ring_bytes(int D, int warps) { return warps * 2 * 64 * D; }
KVM_DEVICE constexpr int kvm_meet_bytes(int NT, int warps) { return warps * 8 * NT * 68 * 4; }
/// Bytes for Q, where registers are too few for it.
KVM_DEVICE constexpr int kvm_q_bytes(int D, int NT) { return D * NT >= 512 ? D * NT * 16 : 0; }

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
            u32 begin = p.window > 0 && len > p.window ? len - p.window : 0;
            sight.begin[n][c] = begin > it.first ? begin : it.first;
        }
    return sight;
}

/// The first row of a part that a query of it sees, rounded down to a multiple of `step` rows.
KVM_DEVICE u32 kvm_first_row(const KvmDecode& p, const KvmItem& it, u32 step) {
    u32 hidden = p.window + it.num_queries - 1;
    if (p.window == 0 || it.len <= hidden) return it.begin;
    u32 row = (it.len - hidden) & ~(step - 1);
    return row > it.begin ? row : it.begin;
}

/// The address of a column of Q or O, whose strides are `by_token` and `by_head`.
KVM_DEVICE i64 kvm_column(const KvmDecode& p, const KvmItem& it, u32 column, i64 by_token,
                          i64 by_head) {
    return (it.token + column / p.group) * by_token +
           (it.kv_head * p.group + column % p.group) * by_head;
}

/// Q from a column on as right operands; columns that are not there are 0.
template <int D, int NT>
KVM_DEVICE void kvm_load_q(const KvmDecode& p, const KvmItem& it, u32 (&q)[D / 16][NT][2],
                           u32 first = 0) {
    u32 lane = kvm_tid() % 32;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        u32 column = first + n * 8 + lane / 4;
        bool is_there = column < it.num_queries * p.group;
        const u16* row = p.q + (is_there ? kvm_column(p, it, column, p.q_token, p.q_head) : 0);
#pragma unroll
        for (int ks = 0; ks < D / 16; ks++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                q[ks][n][r] = is_there ? *(const u32*)(row + ks * 16 + r * 8 + lane % 4 * 2) : 0;
    }
}

/// A right operand of Q, from registers or, where there are too few of them, from shared memory.
template <int KS, int NT>
KVM_DEVICE void kvm_get_q(const u32 (&q)[KS][NT][2], int ks, int n, u32 (&b)[2]) {
    b[0] = q[ks][n][0], b[1] = q[ks][n][1];
}
template <int NT> struct KvmSharedQ {
    u32* words; // [ks][n][2][lane]
};
template <int NT> KVM_DEVICE void kvm_get_q(const KvmSharedQ<NT>& q, int ks, int n, u32 (&b)[2]) {
    const u32* word = q.words + (ks * NT + n) * 64 + kvm_tid() % 32;
    b[0] = word[0], b[1] = word[32];
}

/// Q of an item in shared memory, by one warp; all see it after a barrier.
template <int D, int NT>
KVM_DEVICE void kvm_share_q(const KvmDecode& p, const KvmItem& it, KvmSharedQ<NT> shared) {
    u32 q[D / 16][NT][2];
    kvm_load_q<D, NT>(p, it, q);
#pragma unroll
    for (int ks = 0; ks < D / 16; ks++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                shared.words[((ks * NT + n) * 2 + r) * 32 + kvm_tid() % 32] = q[ks][n][r];
}

/// cap tanh(x / cap)
KVM_DEVICE float kvm_cap(float cap, float x) {
    float y = kvm_exp2(2 * KVM_LOG2E * x * kvm_reciprocal(cap));
    return cap * (1 - 2 * kvm_reciprocal(1 + y));
}

/// A logit in units of log2; -inf if the row is hidden.
KVM_DEVICE float kvm_logit(const KvmDecode& p, float dot, bool is_seen) {
    float x = dot * p.scale;
    if (p.softcap > 0) x = kvm_cap(p.softcap, x);
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

/// The number of the block that holds a row of the head, 0 if the part has no such row.
KVM_DEVICE u32 kvm_page(const KvmDecode& p, const KvmItem& it, u32 row) {
    return row < it.end ? p.pages[it.first_page + (row >> kvm_log2_of(p.block_size))] : 0;
}

/// Asks for 16 rows of K and V of the open block `page`; those that are not of the part become 0, because
/// what they hold may not even be finite. IS_HINTED: they leave the second-level cache first.
template <int D, bool IS_HINTED>
KVM_DEVICE void kvm_load_tile(const KvmDecode& p, const KvmItem& it, u32 first, u32 page,
                              u16* tile) {
    u32 lane = kvm_tid() % 32, row = lane / (D / 8), chunk = lane % (D / 8);
    constexpr u32 STEP = 256 / D; // rows that the lanes of a warp reach at once
    u64 policy = IS_HINTED ? kvm_read_once() : 0;
    i64 at = page * p.kv_block + it.kv_head * p.kv_head +
             ((first & (p.block_size - 1)) + row) * p.kv_token + chunk * 8;
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
        bool is_valid = first + row + j * STEP - it.first < it.end - it.first;
        i64 from = is_valid ? at + j * STEP * p.kv_token : 0;
        int to = kvm_swizzle<D>(row + j * STEP, chunk);
        if (IS_HINTED) {
            kvm_cp_async16(tile + to, p.k + from, is_valid, policy);
            kvm_cp_async16(tile + 16 * D + to, p.v + from, is_valid, policy);
        } else {
            kvm_cp_async16(tile + to, p.k + from, is_valid);
            kvm_cp_async16(tile + 16 * D + to, p.v + from, is_valid);
        }
    }
}

/// Attends to 16 rows of an open block.
template <bool BF16, int D, int NT, class Q>
KVM_DEVICE void kvm_tile(const KvmDecode& p, const KvmSight<NT>& sight, u32 first, const u16* tile,
                         const Q& q, KvmState<D, NT>& st) {
    int lane = kvm_tid() % 32;
    float s[NT][4] = {};
#pragma unroll
    for (int ks = 0; ks < D / 16; ks++) {
        u32 a[4];
        kvm_ldsm4(a, tile + kvm_swizzle<D>(lane % 16, ks * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < NT; n++) {
            u32 b[2];
            kvm_get_q(q, ks, n, b);
            kvm_mma<BF16>(s[n], a, b);
        }
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

/// The blocks of the first two tiles or chunks of a warp in a part.
struct KvmFirstPages {
    u32 first, second;
};

/// The rows of a part that lie in open blocks. A warp owns every WARPS-th tile of 16 rows, and two places for
/// tiles in shared memory that it alone fills: there is no barrier of the CTA.
template <int D, int WARPS = kvm_warps(D), bool IS_HINTED = true> struct KvmRing {
    static constexpr u32 STEP = WARPS * 16, TILE = 2 * 16 * D;
    u16* tiles;

    KVM_DEVICE KvmRing(unsigned char* smem) : tiles((u16*)smem + kvm_tid() / 32 * 2 * TILE) {}

    KVM_DEVICE u32 first(const KvmDecode& p, const KvmItem& it) const {
        u32 begin = kvm_first_row(p, it, 16);
        return (begin > it.sealed_end ? begin : it.sealed_end) + kvm_tid() / 32 * 16;
    }

    KVM_DEVICE KvmFirstPages pages(const KvmDecode& p, const KvmItem& it) const {
        u32 row = first(p, it);
        return {kvm_page(p, it, row), kvm_page(p, it, row + STEP)};
    }

    /// Asks for the first tiles of a part.
    KVM_DEVICE void begin(const KvmDecode& p, const KvmItem& it, const KvmFirstPages& pages) const {
        u32 row = first(p, it);
        kvm_load_tile<D, IS_HINTED>(p, it, row, pages.first, tiles);
        kvm_cp_commit();
        kvm_load_tile<D, IS_HINTED>(p, it, row + STEP, pages.second, tiles + TILE);
        kvm_cp_commit();
    }

    /// The row behind those that `begin` asks for.
    KVM_DEVICE u32 begun(const KvmDecode& p, const KvmItem& it) const {
        u32 end = first(p, it) + STEP + 16;
        return end < it.end ? end : it.end;
    }

    /// Attends to all rows of a part that has begun.
    template <bool BF16, int NT, class Q>
    KVM_DEVICE void attend(const KvmDecode& p, const KvmItem& it, const KvmSight<NT>& sight,
                           const Q& q, KvmState<D, NT>& st) const {
        u32 row = first(p, it);
        for (u16* tile = tiles; row < it.end; row += STEP) {
            u32 page = kvm_page(p, it, row + 2 * STEP); // known when it is needed
            kvm_cp_wait<1>();
            kvm_syncwarp(); // the copies of all lanes have landed
            kvm_tile<BF16, D, NT>(p, sight, row, tile, q, st);
            kvm_syncwarp(); // all lanes have left the tile
            kvm_load_tile<D, IS_HINTED>(p, it, row + 2 * STEP, page, tile);
            kvm_cp_commit();
            tile = tile == tiles ? tiles + TILE : tiles;
        }
        kvm_cp_wait<0>();
        kvm_syncwarp(); // the tiles are free
    }
};

/// Part of a result: four channels with the maximum and the sum that they refer to.
struct KvmPart {
    float max, sum, o[4];

    /// Takes in another part.
    KVM_DEVICE void add(float max2, float sum2, const float (&o2)[4]) {
        float top = max2 > max ? max2 : max;
        float a = kvm_weight(max, top), b = kvm_weight(max2, top);
        max = top;
        sum = sum * a + sum2 * b;
#pragma unroll
        for (int i = 0; i < 4; i++) o[i] = o[i] * a + o2[i] * b;
    }
};

/// The type of O, where it is not BF16 or not: `is_bf16` says it.
static constexpr int KVM_ANY_HALF = 2;
template <int BF16> KVM_DEVICE u32 kvm_pack_output(const KvmDecode& p, float low, float high) {
    if constexpr (BF16 != KVM_ANY_HALF) return kvm_pack<BF16 != 0>(low, high);
    return p.is_bf16 ? kvm_pack<true>(low, high) : kvm_pack<false>(low, high);
}

/// Writes channels d to d + 3 of a column of O, and its LSE.
template <int BF16>
KVM_DEVICE void kvm_finish(const KvmDecode& p, const KvmItem& it, u32 column, u32 d, KvmPart r) {
    u32 q_head = it.kv_head * p.group + column % p.group;
    if (p.sinks) {
        float none[4] = {};
        r.add(p.sinks[q_head] * KVM_LOG2E, 1, none);
    }
    float inverse = r.sum > 0 ? kvm_reciprocal(r.sum) : 0;
    u32* o = (u32*)(p.o + kvm_column(p, it, column, p.o_token, p.o_head) + d);
    o[0] = kvm_pack_output<BF16>(p, r.o[0] * inverse, r.o[1] * inverse);
    o[1] = kvm_pack_output<BF16>(p, r.o[2] * inverse, r.o[3] * inverse);
    if (p.lse && d == 0)
        p.lse[(it.token + column / p.group) * p.lse_token + q_head] =
            (r.max + kvm_log2(r.sum)) * KVM_LN2;
}

/// By the CTA that finishes a head last: makes one result of its parts.
template <int BF16, int D, int NT, int WARPS>
KVM_DEVICE void kvm_merge_head(const KvmDecode& p, const KvmItem& it, u32 columns) {
    constexpr int ROW = D + 4;
    for (u32 i = kvm_tid(); i < columns * D / 4; i += WARPS * 32) {
        u32 column = i / (D / 4), d = i % (D / 4) * 4;
        const float* row = p.partials + ((i64)it.slot * 8 * NT + column) * ROW;
        KvmPart r = {-KVM_INF, 0, {}};
#pragma unroll 8
        for (u32 part = 0; part < it.num_parts; part++, row += 8 * NT * ROW) {
            float o[4], seen[4];
            kvm_ld_cg4(o, row + d);
            kvm_ld_cg4(seen, row + D);
            r.add(seen[0], seen[1], o);
        }
        kvm_finish<BF16>(p, it, column, d, r);
    }
}

/// Makes one result of what the warps have and writes it, 64 channels at a time; the last CTA of a
/// head that was split merges the parts. `meet` is shared memory, kvm_meet_bytes.
template <int BF16, int D, int NT, int WARPS = kvm_warps(D)>
KVM_DEVICE void kvm_meet(const KvmDecode& p, const KvmItem& it, const KvmState<D, NT>& st,
                         float* meet) {
    constexpr int ROW = 68;
    u32 lane = kvm_tid() % 32, warp = kvm_tid() / 32, columns = it.num_queries * p.group;
    float* partial = p.partials + ((i64)it.slot + it.part) * 8 * NT * (D + 4);
    float sum[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++)
        for (int c = 0; c < 2; c++) sum[n][c] = kvm_sum_rows(st.sum[n][c]);
#pragma unroll
    for (int first = 0; first < D; first += 64) {
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                u32 column = n * 8 + lane % 4 * 2 + c;
                float* row = meet + (warp * 8 * NT + column) * ROW;
#pragma unroll
                for (int d = 0; d < 4; d++) {
                    row[d * 16 + lane / 4] = st.o[first / 16 + d][n][c];
                    row[d * 16 + lane / 4 + 8] = st.o[first / 16 + d][n][c + 2];
                }
                if (lane / 4 == 0) row[64] = st.max[n][c], row[65] = sum[n][c];
            }
        kvm_sync();
        for (u32 i = kvm_tid(); i < columns * 16; i += WARPS * 32) {
            u32 column = i / 16, d = i % 16 * 4;
            KvmPart r = {-KVM_INF, 0, {}};
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float* row = meet + (w * 8 * NT + column) * ROW;
                float o[4] = {row[d], row[d + 1], row[d + 2], row[d + 3]};
                r.add(row[64], row[65], o);
            }
            if (it.num_parts == 1) {
                kvm_finish<BF16>(p, it, column, first + d, r);
            } else {
                float* to = partial + column * (D + 4);
                *(f32x4*)(to + first + d) = {r.o[0], r.o[1], r.o[2], r.o[3]};
                if (first + d == 0) to[D] = r.max, to[D + 1] = r.sum;
            }
        }
        kvm_sync(); // the place is free for the next channels
    }
    if (it.num_parts > 1) {
        u32* done = (u32*)meet + 66; // a word that no row uses
        if (kvm_tid() == 0) {
            kvm_fence(); // the CTA's part before its ticket
            *done = kvm_atomic_add(p.tickets + it.ticket, 1);
            kvm_fence(); // the last ticket before the parts of the others
        }
        kvm_sync();
        if (*done + 1 == it.num_parts) {
            kvm_merge_head<BF16, D, NT, WARPS>(p, it, columns);
            if (kvm_tid() == 0) p.tickets[it.ticket] = 0;
        }
    }
}
