// Causal attention of many queries over paged f16 and bf16 keys and values.
//
//   S [row, token] = Q K^T        O [row, dim] = P V        64 tokens at a time
//
// Rows are (query, query head of a KV head) pairs: row r is head r % group of query r / group, so one
// tile of keys serves the whole group. A warp owns 16 MT rows, the four warps share K and V. While S is
// computed V is on its way, and the next K while O is.
#include "kvm_attn.cuh"

/// Tiles of 16 rows of a warp, and tokens of a step, such that O and S fit into registers.
KVM_DEVICE constexpr int kvm_row_tiles(int D) { return D == 256 ? 1 : 2; }
KVM_DEVICE constexpr int kvm_step(int D) { return D == 256 ? 32 : 64; }
KVM_DEVICE constexpr int kvm_rows(int D) { return 64 * kvm_row_tiles(D); }

/// Blocks of the rows of a step, one for each 16 rows.
template <int D> KVM_DEVICE void kvm_load_pages(const KvmDecode& p, const KvmItem& it, u32 first,
                                                u32 (&pages)[kvm_step(D) / 16]) {
#pragma unroll
    for (int i = 0; i < kvm_step(D) / 16; i++) pages[i] = kvm_page(p, it, first + i * 16);
}

/// Asks for the rows of a step from `pool`, which is K or V.
template <int D>
KVM_DEVICE void kvm_load_step(const KvmDecode& p, const KvmItem& it, const u16* pool, u32 first,
                              const u32 (&pages)[kvm_step(D) / 16], u16* tile) {
    constexpr int REACH = 1024 / D; // rows that 128 threads reach at once
    int row = kvm_tid() / (D / 8), chunk = kvm_tid() % (D / 8);
#pragma unroll
    for (int j = 0; j < kvm_step(D) / REACH; j++) {
        u32 t = first + j * REACH + row;
        i64 at = 0;
        if (t < it.end)
            at = pages[j * REACH / 16] * p.kv_block + it.kv_head * p.kv_head +
                 (t & (p.block_size - 1)) * p.kv_token + chunk * 8;
        kvm_cp_async16(tile + kvm_swizzle<D>(j * REACH + row, chunk), pool + at, t < it.end);
    }
}

/// Asks for Q; rows that are not there are 0.
template <int D> KVM_DEVICE void kvm_load_rows(const KvmDecode& p, const KvmItem& it, u16* tile) {
    constexpr int REACH = 1024 / D;
    int chunk = kvm_tid() % (D / 8);
#pragma unroll 4
    for (int j = 0; j < kvm_rows(D) / REACH; j++) {
        u32 row = j * REACH + kvm_tid() / (D / 8);
        bool is_there = row < it.num_queries * p.group;
        i64 at = is_there ? kvm_column(p, it, row, p.q_token, p.q_head) + chunk * 8 : 0;
        kvm_cp_async16(tile + kvm_swizzle<D>(row, chunk), p.q + at, is_there);
    }
}

/// What a warp has of its rows. A lane has two rows of each tile, lane / 4 and 8 more, and of `sum` only
/// what its own columns gave.
template <int D> struct KvmRows {
    static constexpr int MT = kvm_row_tiles(D);
    float o[MT][D / 8][4], max[MT][2], sum[MT][2];
};

/// The rows of K that the queries of this warp, or of a row, see: begin to end - 1.
struct KvmSpan {
    u32 begin, end;
};

KVM_DEVICE KvmSpan kvm_span(const KvmDecode& p, const KvmItem& it, u32 row) {
    u32 query = row / p.group;
    u32 hidden = query < it.num_queries ? it.num_queries - 1 - query : 0;
    u32 len = it.len > hidden ? it.len - hidden : 0;
    return {p.window > 0 && len > p.window ? len - p.window : 0, len < it.end ? len : it.end};
}

/// S of a warp, not scaled yet. `q` are its rows.
template <bool BF16, int D>
KVM_DEVICE void kvm_scores(const u16* q, const u16* k,
                           float (&s)[kvm_row_tiles(D)][kvm_step(D) / 8][4]) {
    constexpr int MT = kvm_row_tiles(D), NT = kvm_step(D) / 8;
    int lane = kvm_tid() % 32;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) s[m][n][r] = 0;
#pragma unroll 4
    for (int ks = 0; ks < D / 16; ks++) {
        u32 a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
            kvm_ldsm4(a[m], q + (kvm_swizzle<D>(m * 16 + lane % 16, lane / 16) ^ ks * 16));
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            u32 b[4];
            kvm_ldsm4(b, k + (kvm_swizzle<D>(n * 8 + lane / 16 * 8 + lane % 8, lane / 8 % 2) ^
                              ks * 16));
            u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < MT; m++) {
                kvm_mma<BF16>(s[m][n], a[m], left);
                kvm_mma<BF16>(s[m][n + 1], a[m], right);
            }
        }
    }
}

/// Hides what rows do not see. `first` is the first row of K, `mine` the first row of the warp.
template <int MT, int NT>
KVM_DEVICE void kvm_hide(const KvmDecode& p, const KvmItem& it, u32 first, u32 mine,
                         float (&s)[MT][NT][4]) {
    u32 lane = kvm_tid() % 32;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            KvmSpan seen = kvm_span(p, it, mine + m * 16 + h * 8 + lane / 4);
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    u32 t = first + n * 8 + lane % 4 * 2 + c;
                    if (t < seen.begin || t >= seen.end) s[m][n][h * 2 + c] = -KVM_INF;
                }
        }
}

/// Turns S into weights and what the rows have to what they would have with the new maxima. `factor`
/// makes units of log2 of S.
template <int D>
KVM_DEVICE void kvm_soften(float factor, float (&s)[kvm_row_tiles(D)][kvm_step(D) / 8][4],
                           KvmRows<D>& rows) {
    constexpr int NT = kvm_step(D) / 8;
#pragma unroll
    for (int m = 0; m < KvmRows<D>::MT; m++) {
        float alpha[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float max = rows.max[m][h];
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int c = 0; c < 2; c++) max = kvm_max(max, s[m][n][h * 2 + c]);
#pragma unroll
            for (int mask = 1; mask < 4; mask *= 2) max = kvm_max(max, kvm_shfl_xor(max, mask));
            float base = max == -KVM_INF ? 0 : max * factor, sum = 0;
            alpha[h] = kvm_exp2(rows.max[m][h] * factor - base);
            rows.max[m][h] = max;
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int c = 0; c < 2; c++)
                    sum += s[m][n][h * 2 + c] = kvm_exp2(s[m][n][h * 2 + c] * factor - base);
            rows.sum[m][h] = rows.sum[m][h] * alpha[h] + sum;
        }
        if (!kvm_ballot(alpha[0] != 1 || alpha[1] != 1)) continue; // maxima seldom rise
#pragma unroll
        for (int d = 0; d < D / 8; d++)
#pragma unroll
            for (int r = 0; r < 4; r++) rows.o[m][d][r] *= alpha[r / 2];
    }
}

/// O += P V.
template <bool BF16, int D>
KVM_DEVICE void kvm_values(const float (&s)[kvm_row_tiles(D)][kvm_step(D) / 8][4], const u16* v,
                           KvmRows<D>& rows) {
    constexpr int MT = kvm_row_tiles(D), NT = kvm_step(D) / 8;
    int lane = kvm_tid() % 32;
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
        u32 a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                a[m][r] = kvm_pack<BF16>(s[m][n + r / 2][r % 2 * 2], s[m][n + r / 2][r % 2 * 2 + 1]);
#pragma unroll
        for (int d = 0; d < D / 8; d += 2) {
            u32 b[4];
            kvm_ldsm4_trans(b, v + (kvm_swizzle<D>(n * 8 + lane % 16, lane / 16) ^ d * 8));
            u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < MT; m++) {
                kvm_mma<BF16>(rows.o[m][d], a[m], left);
                kvm_mma<BF16>(rows.o[m][d + 1], a[m], right);
            }
        }
    }
}

/// Writes O and LSE of a warp's rows, from `mine` on. `stage` is where its rows of Q were.
template <bool BF16, int D>
KVM_DEVICE void kvm_put_rows(const KvmDecode& p, const KvmItem& it, u32 mine, float factor,
                             const KvmRows<D>& rows, u16* stage) {
    u32 lane = kvm_tid() % 32, count = it.num_queries * p.group;
#pragma unroll
    for (int m = 0; m < KvmRows<D>::MT; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 local = m * 16 + h * 8 + lane / 4, row = mine + local;
            u32 q_head = it.kv_head * p.group + row % p.group;
            float sum = rows.sum[m][h], max = rows.max[m][h] * factor;
            sum += kvm_shfl_xor(sum, 1);
            sum += kvm_shfl_xor(sum, 2);
            float alpha = 1;
            if (p.sinks && row < count) {
                float sink = p.sinks[q_head] * KVM_LOG2E, rise = sink > max ? sink : max;
                alpha = kvm_weight(max, rise);
                sum = sum * alpha + kvm_weight(sink, rise);
                max = rise;
            }
            float inverse = sum > 0 ? alpha / sum : 0;
#pragma unroll
            for (int d = 0; d < D / 8; d++)
                *(u32*)(stage + kvm_swizzle<D>(local, d) + lane % 4 * 2) = kvm_pack<BF16>(
                    rows.o[m][d][h * 2] * inverse, rows.o[m][d][h * 2 + 1] * inverse);
            if (p.lse && lane % 4 == 0 && row < count)
                p.lse[(it.token + row / p.group) * p.lse_token + q_head] =
                    (max + kvm_log2(sum)) * KVM_LN2;
        }
    kvm_syncwarp(); // the rows are complete
#pragma unroll 4
    for (int i = 0; i < KvmRows<D>::MT * D / 16; i++) {
        u32 local = (i * 32 + lane) / (D / 8), chunk = (i * 32 + lane) % (D / 8);
        if (mine + local < count)
            *(u32x4*)(p.o + kvm_column(p, it, mine + local, p.o_token, p.o_head) + chunk * 8) =
                *(const u32x4*)(stage + kvm_swizzle<D>(local, chunk));
    }
}

template <bool BF16, int D>
KVM_DEVICE void kvm_prefill_item(const KvmDecode& p, const KvmItem& it, u16* smem) {
    constexpr int MT = kvm_row_tiles(D), STEP = kvm_step(D);
    u16 *k = smem + kvm_rows(D) * D, *v = k + STEP * D;
    u32 mine = kvm_tid() / 32 * 16 * MT;
    u16* q = smem + mine * D;
    float factor = (p.softcap > 0 ? 1 : p.scale) * KVM_LOG2E;
    KvmSpan low = kvm_span(p, it, mine), high = kvm_span(p, it, mine + 16 * MT - 1);
    u32 begin = kvm_span(p, it, 0).begin / 16 * 16, end = it.len < it.end ? it.len : it.end;
    if (begin < it.begin) begin = it.begin;
    KvmRows<D> rows = {};
#pragma unroll
    for (int m = 0; m < MT; m++) rows.max[m][0] = rows.max[m][1] = -KVM_INF;
    u32 pages[STEP / 16];
    kvm_load_pages<D>(p, it, begin, pages);
    kvm_load_rows<D>(p, it, smem);
    kvm_load_step<D>(p, it, p.k, begin, pages, k);
    kvm_cp_commit();
    for (u32 first = begin; first < end; first += STEP) {
        kvm_cp_wait<0>();
        kvm_sync(); // K has landed, nobody reads the last V any more
        kvm_load_step<D>(p, it, p.v, first, pages, v);
        kvm_cp_commit();
        kvm_load_pages<D>(p, it, first + STEP, pages); // known when they are needed
        float s[MT][STEP / 8][4];
        bool is_seen = first < high.end && first + STEP > low.begin;
        if (is_seen) kvm_scores<BF16, D>(q, k, s);
        kvm_cp_wait<0>();
        kvm_sync(); // V has landed, nobody reads this K any more
        if (first + STEP < end) kvm_load_step<D>(p, it, p.k, first + STEP, pages, k);
        kvm_cp_commit();
        if (!is_seen) continue;
        if (p.softcap > 0) {
            float inner = 2 * KVM_LOG2E * p.scale / p.softcap;
#pragma unroll
            for (int i = 0; i < MT * STEP / 2; i++) {
                float& x = s[i / (STEP / 2)][i / 4 % (STEP / 8)][i % 4];
                x = p.softcap * (1 - 2 * kvm_reciprocal(1 + kvm_exp2(inner * x)));
            }
        }
        if (first + STEP > low.end || first < high.begin)
            kvm_hide(p, it, first, mine, s);
        kvm_soften<D>(factor, s, rows);
        kvm_values<BF16, D>(s, v, rows);
    }
    kvm_cp_wait<0>();
    kvm_sync(); // Q has landed, also if there was nothing to see
    kvm_put_rows<BF16, D>(p, it, mine, factor, rows, q);
}

/// Bytes of shared memory: tiles of Q, K and V, and the item, which would not fit into registers.
KVM_DEVICE constexpr int kvm_prefill_bytes(int D) {
    return (kvm_rows(D) + 2 * kvm_step(D)) * 2 * D + 64;
}

template <bool BF16, int D> KVM_DEVICE void kvm_prefill(const KvmDecode& p, unsigned char* smem) {
    KvmItem& it = *(KvmItem*)(smem + kvm_prefill_bytes(D) - 64);
    u32 next = kvm_bid();
    do {
        kvm_sync(); // nobody needs the last item, or what it left, any more
        if (kvm_tid() < 16) ((u32*)&it)[kvm_tid()] = ((const u32*)(p.items + next))[kvm_tid()];
        kvm_sync();
        next = it.next;
        if (it.num_queries > 0) kvm_prefill_item<BF16, D>(p, it, (u16*)smem);
    } while (next);
}

/// Launched with 128 threads and kvm_prefill_bytes(D). Takes what decode takes, but: num_queries * group is
/// at most kvm_rows(D), 128 or, if D is 256, 64; all rows are in open blocks and num_parts is 1; rows of
/// Q and O are aligned to 16 bytes; scale is positive. Queries of a chunk of a prompt are the last rows
/// of what is cached.
#define KVM_PREFILL(name, BF16, D)                                                                \
    KVM_KERNEL(128, 2, name, KvmDecode) {                                                         \
        KVM_DYN_SMEM(smem);                                                                       \
        kvm_prefill<BF16, D>(p, smem);                                                            \
    }

KVM_PREFILL(kvm_prefill_f16_d64, false, 64)
KVM_PREFILL(kvm_prefill_f16_d128, false, 128)
KVM_PREFILL(kvm_prefill_f16_d256, false, 256)
KVM_PREFILL(kvm_prefill_bf16_d64, true, 64)
KVM_PREFILL(kvm_prefill_bf16_d128, true, 128)
KVM_PREFILL(kvm_prefill_bf16_d256, true, 256)
