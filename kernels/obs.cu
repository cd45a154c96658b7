// What queries give the rows of a KV head, for policies: p = exp(logit - lse). Keys are read once for
// all queries of an item, values not at all.
//
//   SnapKV (src/policy/score/snapkv.rs): kvm_window for the last queries, then kvm_window_pool
//   H2O (src/policy/score/h2o.rs):       kvm_received with each step
#include "kvm_attn.cuh"
#include "kvm_types.cuh"

/// Some rows of one KV head of one sequence, and the queries that look at them.
struct KvmSeenItem {
    u64 sums;               // address of the sum of row 0 of layer 0; rows below `first` have none
    u32 token, num_queries; // first row of Q and LSE; at least one
    u32 kv_head;
    u32 first_page; // index of the head's first block in `pages`
    u32 len;        // rows that the last of the queries sees; each one before sees one less
    u32 begin, end; // rows of this item, none if equal; begin is a multiple of 16
    u32 first;      // rows below are evicted
    u32 sum_head;   // kvm_window: from the sums of a query head to those of the next
    u32 sum_layer;  // from the sums of a layer to those of the next
};

/// Strides are in elements. Rows of Q and K are aligned to 16 bytes. Items of a launch have no sum in
/// common.
struct KvmSeen {
    const u16* q;
    const float* lse; // [token, q_heads], natural logarithm
    const u32* pages;
    const u16* k; // open blocks
    const KvmSeenItem* items;
    i64 q_token, q_head, lse_token, kv_block, kv_head, kv_token;
    float scale, softcap;                     // softcap 0: off
    u32 window, num_items, group, block_size, layer; // window 0: off
};

/// Columns are (query head, query) pairs, a tile of 64 at a time. A warp holds 16 MT rows of K.
static constexpr int KVM_COLUMNS = 64;
KVM_DEVICE constexpr int kvm_seen_tiles(int D) { return D == 256 ? 1 : 2; }

/// A column of the tile in shared memory: which rows its query sees, and its LSE in units of log2.
struct KvmColumn {
    u32 begin, end;
    float lse;
};

/// The sum of row 0 of the layer.
KVM_DEVICE float* kvm_sums(const KvmSeen& p, const KvmSeenItem& it) {
    return (float*)it.sums + (u64)p.layer * it.sum_layer;
}

/// Columns of a query head. Where heads have their own sums, eight columns are of one head.
template <bool PER_HEAD> KVM_DEVICE u32 kvm_head_columns(const KvmSeenItem& it) {
    return PER_HEAD ? (it.num_queries + 7) / 8 * 8 : it.num_queries;
}

template <int ROWS, int D>
KVM_DEVICE void kvm_load_keys(const KvmSeen& p, const KvmSeenItem& it, u32 first, u16* tile) {
#pragma unroll
    for (int j = 0; j < ROWS * D / 1024; j++) {
        int i = j * 128 + kvm_tid(), row = i / (D / 8), chunk = i % (D / 8);
        u32 t = first + row;
        i64 at = 0;
        if (t < it.end)
            at = p.pages[it.first_page + t / p.block_size] * p.kv_block + it.kv_head * p.kv_head +
                 t % p.block_size * p.kv_token + chunk * 8;
        kvm_cp_async16(tile + kvm_swizzle<D>(row, chunk), p.k + at, t < it.end);
    }
}

/// Asks for a tile of queries and notes what they see. Columns that are not there see nothing.
template <int D, bool PER_HEAD>
KVM_DEVICE void kvm_load_columns(const KvmSeen& p, const KvmSeenItem& it, u32 first, u16* tile,
                                 KvmColumn* columns) {
    u32 per_head = kvm_head_columns<PER_HEAD>(it);
#pragma unroll 4
    for (int j = 0; j < D / 16; j++) {
        int i = j * 128 + kvm_tid(), row = i / (D / 8), chunk = i % (D / 8);
        u32 head = (first + row) / per_head, query = (first + row) % per_head;
        bool is_there = head < p.group && query < it.num_queries;
        i64 q_head = it.kv_head * p.group + head, token = it.token + query;
        i64 at = is_there ? token * p.q_token + q_head * p.q_head + chunk * 8 : 0;
        kvm_cp_async16(tile + kvm_swizzle<D>(row, chunk), p.q + at, is_there);
        if (chunk == 0) {
            u32 hidden = is_there ? it.num_queries - 1 - query : it.len;
            u32 len = it.len > hidden ? it.len - hidden : 0;
            float lse = is_there ? p.lse[token * p.lse_token + q_head] * KVM_LOG2E : 0;
            u32 begin = p.window > 0 && len > p.window ? len - p.window : 0;
            columns[row] = {begin, len < it.end ? len : it.end, lse};
        }
    }
}

/// The probability of a row for a column.
KVM_DEVICE float kvm_probability(const KvmSeen& p, float dot, u32 row, const KvmColumn& c) {
    float x = dot * p.scale;
    if (p.softcap > 0)
        x = p.softcap *
            (1 - 2 * kvm_reciprocal(1 + kvm_exp2(2 * KVM_LOG2E * x * kvm_reciprocal(p.softcap))));
    return row >= c.begin && row < c.end ? kvm_exp2(x * KVM_LOG2E - c.lse) : 0;
}

/// Adds the sums of a warp's rows to what is there, or puts them there, and starts anew.
template <int MT, bool ADD>
KVM_DEVICE void kvm_put_sums(const KvmSeenItem& it, u32 first, float* sums, float (&sum)[MT][2]) {
    u32 lane = kvm_tid() % 32;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float x = sum[m][r];
            x += kvm_shfl_xor(x, 1);
            x += kvm_shfl_xor(x, 2);
            u32 row = first + m * 16 + r * 8 + lane / 4;
            if (lane % 4 == 0 && row >= it.first && row < it.end) sums[row] = ADD ? sums[row] + x : x;
            sum[m][r] = 0;
        }
}

/// Adds what a tile of columns gives the rows of this warp, from `first` on.
template <bool BF16, int D, bool PER_HEAD, int MT>
KVM_DEVICE void kvm_add_columns(const KvmSeen& p, const KvmSeenItem& it, u32 first, u32 column,
                                const u32 (&k)[MT][D / 16][4], const u16* tile,
                                const KvmColumn* columns, float (&sum)[MT][2]) {
    u32 lane = kvm_tid() % 32, per_head = kvm_head_columns<PER_HEAD>(it);
    for (int n = 0; n < 8; n++, column += 8) {
        if (column >= per_head * p.group) return;
        const KvmColumn& any = columns[n * 8 + lane % 8];
        if (kvm_ballot(any.end > first && any.begin < first + MT * 16)) {
            float s[MT][4] = {};
#pragma unroll
            for (int ks = 0; ks < D / 16; ks += 2) {
                u32 b[4];
                kvm_ldsm4(b, tile + kvm_swizzle<D>(n * 8 + lane % 8, ks * 2 + lane / 8));
                u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    kvm_mma<BF16>(s[m], k[m][ks], low);
                    kvm_mma<BF16>(s[m], k[m][ks + 1], high);
                }
            }
#pragma unroll
            for (int c = 0; c < 2; c++) {
                KvmColumn seen = columns[n * 8 + lane % 4 * 2 + c];
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int r = 0; r < 2; r++)
                        sum[m][r] += kvm_probability(p, s[m][r * 2 + c],
                                                     first + m * 16 + r * 8 + lane / 4, seen);
            }
        }
        if (PER_HEAD && (column + 8) % per_head == 0) {
            u32 head = column / per_head;
            kvm_put_sums<MT, false>(it, first, kvm_sums(p, it) + (u64)head * it.sum_head, sum);
        }
    }
}

template <bool BF16, int D, bool PER_HEAD>
KVM_DEVICE void kvm_see(const KvmSeen& p, unsigned char* smem) {
    constexpr int MT = kvm_seen_tiles(D), ROWS = 64 * MT, COLUMNS = KVM_COLUMNS;
    u16 *keys = (u16*)smem, *queries = keys + ROWS * D;
    KvmColumn* columns = (KvmColumn*)(queries + 2 * COLUMNS * D);
    u32 lane = kvm_tid() % 32, mine = kvm_tid() / 32 * 16 * MT;
    for (u32 i = kvm_bid(); i < p.num_items; i += kvm_grid()) {
        KvmSeenItem it = p.items[i];
        u32 total = kvm_head_columns<PER_HEAD>(it) * p.group;
        for (u32 first = it.begin; first < it.end; first += ROWS) {
            float sum[MT][2] = {};
            u32 k[MT][D / 16][4];
            kvm_load_keys<ROWS, D>(p, it, first, keys);
            kvm_load_columns<D, PER_HEAD>(p, it, 0, queries, columns);
            kvm_cp_commit();
            for (u32 tile = 0, column = 0; column < total; tile ^= 1, column += COLUMNS) {
                if (column + COLUMNS < total)
                    kvm_load_columns<D, PER_HEAD>(p, it, column + COLUMNS,
                                                  queries + (tile ^ 1) * COLUMNS * D,
                                                  columns + (tile ^ 1) * COLUMNS);
                kvm_cp_commit();
                kvm_cp_wait<1>();
                kvm_sync(); // all copies of this tile have landed
                if (column == 0) {
#pragma unroll
                    for (int m = 0; m < MT; m++)
#pragma unroll
                        for (int ks = 0; ks < D / 16; ks++)
                            kvm_ldsm4(k[m][ks], keys + kvm_swizzle<D>(mine + m * 16 + lane % 16,
                                                                      ks * 2 + lane / 16));
                }
                kvm_add_columns<BF16, D, PER_HEAD, MT>(p, it, first + mine, column, k,
                                                       queries + tile * COLUMNS * D,
                                                       columns + tile * COLUMNS, sum);
                kvm_sync(); // the tile is free
            }
            kvm_cp_wait<0>();
            if (!PER_HEAD) kvm_put_sums<MT, true>(it, first + mine, kvm_sums(p, it), sum);
        }
    }
}

/// Any number of CTAs of 128 threads; shared memory: 512 D + 1536 bytes, 384 D + 1536 if D is 256.
///
/// kvm_window puts, for each query head, the sum over the queries: sums[head * sum_head + row].
/// kvm_received adds the sum over queries and query heads to sums[row].
#define KVM_SEE(name, BF16, D, PER_HEAD)                                                          \
    KVM_KERNEL(128, 2, name, KvmSeen) {                                                           \
        KVM_DYN_SMEM(smem);                                                                       \
        kvm_see<BF16, D, PER_HEAD>(p, smem);                                                      \
    }

KVM_SEE(kvm_window_f16_d64, false, 64, true)
KVM_SEE(kvm_window_f16_d128, false, 128, true)
KVM_SEE(kvm_window_f16_d256, false, 256, true)
KVM_SEE(kvm_window_bf16_d64, true, 64, true)
KVM_SEE(kvm_window_bf16_d128, true, 128, true)
KVM_SEE(kvm_window_bf16_d256, true, 256, true)
KVM_SEE(kvm_received_f16_d64, false, 64, false)
KVM_SEE(kvm_received_f16_d128, false, 128, false)
KVM_SEE(kvm_received_f16_d256, false, 256, false)
KVM_SEE(kvm_received_bf16_d64, true, 64, false)
KVM_SEE(kvm_received_bf16_d128, true, 128, false)
KVM_SEE(kvm_received_bf16_d256, true, 256, false)

/// Some rows before the window of one KV head.
struct KvmPoolItem {
    u32 sum, sum_head; // as kvm_window put them
    u32 num_queries;   // of the window
    u32 old;           // rows before the window: neighbours beyond them count as none
    u32 begin, end;    // rows of this item, at most `old`
    u32 score;         // index of the score of row 0
};

struct KvmWindowPool {
    const float* sums;
    float* scores;
    const KvmPoolItem* items;
    u32 num_items, group;
    u32 kernel;           // neighbours, odd
    u32 max_pool, max_agg; // not 0: the most instead of the mean, over neighbours and query heads
};

/// Any number of CTAs of 256 threads. The mean over neighbours divides by `kernel` at the ends too.
KVM_KERNEL(256, 4, kvm_window_pool, KvmWindowPool) {
    u32 half = p.kernel / 2;
    for (u32 i = kvm_bid(); i < p.num_items; i += kvm_grid()) {
        KvmPoolItem it = p.items[i];
        for (u32 row = it.begin + kvm_tid(); row < it.end; row += 256) {
            u32 first = row > half ? row - half : 0, last = row + half;
            if (last >= it.old) last = it.old - 1;
            float score = p.max_agg ? -kvm_infinity() : 0;
            for (u32 head = 0; head < p.group; head++) {
                const float* sums = p.sums + it.sum + (u64)head * it.sum_head;
                float pooled = p.max_pool ? -kvm_infinity() : 0;
                for (u32 j = first; j <= last; j++) {
                    float mean = sums[j] / it.num_queries;
                    if (!p.max_pool) pooled += mean;
                    else if (mean > pooled) pooled = mean;
                }
                if (!p.max_pool) pooled /= p.kernel;
                if (!p.max_agg) score += pooled;
                else if (pooled > score) score = pooled;
            }
            p.scores[it.score + row] = p.max_agg ? score : score / p.group;
        }
    }
}
