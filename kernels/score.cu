// Quest: which blocks a decode step reads (src/selector/quest.rs has the method).
//
//   keys --kvm_quest_bounds--> bounds of each block --kvm_quest_score--> scores --kvm_topk--> lists
#include "kvm_types.cuh"

/// Blocks of a launch, so many that parameters fit 4 KiB.
static constexpr u32 KVM_BOUNDS_BLOCKS = 500;

/// Full open blocks whose bounds are wanted. Rows of K and the bounds are aligned to 4 bytes; `dim` is even. The
/// bounds of a cell are [high, low][dim] in f16, those of a block are one after the other.
struct KvmQuestBounds {
    const u16* k; // of cell 0; page i starts 128 * i elements behind
    u16* bounds;
    i64 cell; // elements of K from cell to cell
    u32 num_blocks, num_cells, block_size, dim;
    struct {
        u32 page, slot; // where the block starts and where its bounds go
    } blocks[KVM_BOUNDS_BLOCKS];
};

/// What f16 can hold: infinity times 0 would be no number.
KVM_DEVICE float kvm_finite(float x) {
    constexpr float MOST = 65504;
    return x > MOST ? MOST : x < -MOST ? -MOST : x;
}

/// A warp for each cell, two channels for each lane. A maximum passes over NaN.
template <u32 TYPE> KVM_DEVICE void kvm_quest_bounds(const KvmQuestBounds& p) {
    u32 lane = kvm_tid() % 32, num_items = p.num_blocks * p.num_cells;
    for (u32 i = kvm_bid() * 8 + kvm_tid() / 32; i < num_items; i += kvm_grid() * 8) {
        u32 block = i / p.num_cells, cell = i % p.num_cells;
        const u16* rows = p.k + (i64)p.blocks[block].page * 128 + cell * p.cell;
        u16* bounds = p.bounds + ((i64)p.blocks[block].slot * p.num_cells + cell) * 2 * p.dim;
        for (u32 d = lane * 2; d < p.dim; d += 64) {
            float high[2] = {-kvm_infinity(), -kvm_infinity()};
            float low[2] = {kvm_infinity(), kvm_infinity()};
#pragma unroll 8
            for (u32 row = 0; row < p.block_size; row++) {
                u32 pair = *(const u32*)(rows + row * p.dim + d);
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float x = kvm_unpack<TYPE>(pair >> 16 * c & 0xffff);
                    high[c] = x > high[c] ? x : high[c];
                    low[c] = x < low[c] ? x : low[c];
                }
            }
            *(u32*)(bounds + d) = kvm_pack<false>(kvm_finite(high[0]), kvm_finite(high[1]));
            *(u32*)(bounds + p.dim + d) = kvm_pack<false>(kvm_finite(low[0]), kvm_finite(low[1]));
        }
    }
}

/// Any number of CTAs of 256 threads.
KVM_KERNEL(256, 4, kvm_quest_bounds_f16, KvmQuestBounds) { kvm_quest_bounds<KVM_F16>(p); }
KVM_KERNEL(256, 4, kvm_quest_bounds_bf16, KvmQuestBounds) { kvm_quest_bounds<KVM_BF16>(p); }

/// Some blocks of one KV head of one sequence; none if begin is end, which costs nothing.
struct KvmQuestItem {
    u32 token, kv_head; // whose query heads ask
    u32 first_slot;     // index of the slot of the head's block 0 in `slots`
    u32 begin, end;     // blocks
    u32 score;          // index of the score of block 0
};

/// Strides are in elements; `dim` is a multiple of 8 and each list of bounds is aligned to 16 bytes.
struct KvmQuest {
    const u16* q; // [token, q_head, dim], as it meets the keys: rotated, not scaled
    const u16* bounds;
    const u32* slots;
    float* scores;
    const KvmQuestItem* items;
    i64 q_token, q_head, bounds_slot, bounds_head;
    u32 num_items, group, dim;
};

/// A lane for each block: sum over c of max(q[c] high[c], q[c] low[c]), the largest over the group. Parts
/// of the queries, [G][positive, negative][dim] in f32, are in shared memory.
template <u32 TYPE, int G> KVM_DEVICE void kvm_quest_score(const KvmQuest& p, float* parts) {
    for (u32 i = kvm_bid(); i < p.num_items; i += kvm_grid()) {
        KvmQuestItem it = p.items[i];
        if (it.begin == it.end) continue;
        kvm_sync(); // nobody reads the parts of the last item any more
        for (u32 e = kvm_tid(); e < G * p.dim; e += 128) {
            u32 g = e / p.dim, d = e % p.dim;
            float x = 0;
            if (g < p.group)
                x = kvm_unpack<TYPE>(
                    p.q[it.token * p.q_token + (it.kv_head * p.group + g) * p.q_head + d]);
            parts[g * 2 * p.dim + d] = x > 0 ? x : 0; // NaN counts as 0
            parts[(g * 2 + 1) * p.dim + d] = x < 0 ? x : 0;
        }
        kvm_sync();
        for (u32 block = it.begin + kvm_tid(); block < it.end; block += 128) {
            const u16* bounds = p.bounds + p.slots[it.first_slot + block] * p.bounds_slot +
                                it.kv_head * p.bounds_head;
            float sum[G] = {};
#pragma unroll 2
            for (u32 d = 0; d < p.dim; d += 8) {
                float high[8], low[8];
                kvm_load8<KVM_F16>(bounds, d, high);
                kvm_load8<KVM_F16>(bounds, p.dim + d, low);
#pragma unroll
                for (int g = 0; g < G; g++) {
                    float positive[8], negative[8];
                    kvm_load8<KVM_F32>(parts, g * 2 * p.dim + d, positive);
                    kvm_load8<KVM_F32>(parts, (g * 2 + 1) * p.dim + d, negative);
#pragma unroll
                    for (int c = 0; c < 8; c++)
                        sum[g] += high[c] * positive[c] + low[c] * negative[c];
                }
            }
            float most = -kvm_infinity();
#pragma unroll
            for (int g = 0; g < G; g++)
                if (g < p.group && sum[g] > most) most = sum[g];
            p.scores[it.score + block] = most;
        }
    }
}

/// Any number of CTAs of 128 threads and 8 G dim bytes of shared memory; G is at least the group.
#define KVM_QUEST(name, TYPE, G)                                                                  \
    KVM_KERNEL(128, 4, name, KvmQuest) {                                                          \
        KVM_DYN_SMEM(smem);                                                                       \
        kvm_quest_score<TYPE, G>(p, (float*)smem);                                                \
    }

KVM_QUEST(kvm_quest_score_f16_g4, KVM_F16, 4)
KVM_QUEST(kvm_quest_score_f16_g8, KVM_F16, 8)
KVM_QUEST(kvm_quest_score_f16_g16, KVM_F16, 16)
KVM_QUEST(kvm_quest_score_bf16_g4, KVM_BF16, 4)
KVM_QUEST(kvm_quest_score_bf16_g8, KVM_BF16, 8)
KVM_QUEST(kvm_quest_score_bf16_g16, KVM_BF16, 16)

/// The list of one KV head: its blocks before `begin`, the best `k` of begin to end - 1, those from
/// `end` on. It has begin + min(k, end - begin) + num_blocks - end elements.
struct KvmTopkItem {
    u32 score; // index of the score of block 0
    u32 begin, end, num_blocks, k;
    u32 first_page; // index of block 0 in `pages`
    u32 list;       // index of the list's first element in `blocks` and `list_pages`
};

/// Lists ascend; ties go to the earlier block; NaN is below everything and the two zeros are equal.
struct KvmTopk {
    const float* scores;
    const u32* pages; // may be null if `list_pages` is
    u32* blocks;      // indices of blocks; may be null
    u32* list_pages;  // their pages, as attention reads them; may be null
    const KvmTopkItem* items;
    u32 num_items;
};

static constexpr u32 KVM_TOPK_THREADS = 512, KVM_TOPK_WARPS = KVM_TOPK_THREADS / 32;

/// Floats as integers of the same order.
KVM_DEVICE u32 kvm_ordered(float x) {
    u32 bits = kvm_bits(x);
    if (x != x) return 0;
    if (x == 0) return 1u << 31;
    return bits >> 31 ? ~bits : bits | 1u << 31;
}

/// The sum over this lane and those below.
KVM_DEVICE u32 kvm_scan(u32 x) {
    u32 lane = kvm_tid() % 32;
#pragma unroll
    for (u32 by = 1; by < 32; by *= 2) {
        u32 below = kvm_shfl(x, lane < by ? lane : lane - by);
        x += lane < by ? 0 : below;
    }
    return x;
}

/// Adds a digit for each lane that has one. Many lanes tend to have the same: those of the first go in
/// one step.
KVM_DEVICE void kvm_count(u32* counts, bool has_digit, u32 digit) {
    u32 first = kvm_shfl(digit, 0), lane = kvm_tid() % 32;
    u32 same = kvm_ballot(has_digit && digit == first);
    if (lane == 0 && same) kvm_atomic_add(counts + first, kvm_popc(same));
    if (has_digit && digit != first) kvm_atomic_add(counts + digit, 1);
}

/// The k-th largest key and how many of its equals are among the k, by digits of 8 bits from the top.
/// 1 <= k <= n. `shared` has 258 elements.
KVM_DEVICE void kvm_select(const float* scores, u32 n, u32 k, u32* shared, u32& key, u32& ties) {
    u32 lane = kvm_tid() % 32, rounds = (n + KVM_TOPK_THREADS - 1) / KVM_TOPK_THREADS;
    key = 0, ties = k;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (u32 i = kvm_tid(); i < 256; i += KVM_TOPK_THREADS) shared[i] = 0;
        kvm_sync();
        for (u32 r = 0; r < rounds; r++) {
            u32 i = r * KVM_TOPK_THREADS + kvm_tid(), x = i < n ? kvm_ordered(scores[i]) : 0;
            bool is_alive = i < n && (shift == 24 || x >> (shift + 8) == key >> (shift + 8));
            kvm_count(shared, is_alive, x >> shift & 255);
        }
        kvm_sync();
        if (kvm_tid() < 32) { // lane i has the digits 255 - 8 i and the seven below
            u32 sum = 0, counts[8];
#pragma unroll
            for (int j = 0; j < 8; j++) sum += counts[j] = shared[255 - lane * 8 - j];
            u32 above = kvm_scan(sum) - sum;
            if (above < ties && ties <= above + sum) {
                u32 digit = 255 - lane * 8;
#pragma unroll
                for (int j = 0; j < 7; j++)
                    if (above + counts[j] < ties && digit == 255 - lane * 8 - j)
                        above += counts[j], digit--;
                shared[256] = digit, shared[257] = ties - above;
            }
        }
        kvm_sync();
        key |= shared[256] << shift, ties = shared[257];
    }
}

KVM_DEVICE void kvm_put(const KvmTopk& p, const KvmTopkItem& it, u32 at, u32 block) {
    if (p.blocks) p.blocks[it.list + at] = block;
    if (p.list_pages) p.list_pages[it.list + at] = p.pages[it.first_page + block];
}

/// Writes the blocks above `key` and the first `ties` of its equals, in order.
KVM_DEVICE void kvm_put_best(const KvmTopk& p, const KvmTopkItem& it, u32 key, u32 ties, u32* shared) {
    u32 lane = kvm_tid() % 32, warp = kvm_tid() / 32, below = (1u << lane) - 1;
    u32 above_before = 0, equal_before = 0;
    for (u32 first = it.begin; first < it.end; first += KVM_TOPK_THREADS) {
        u32 block = first + kvm_tid();
        u32 x = block < it.end ? kvm_ordered(p.scores[it.score + block]) : 0;
        bool is_above = block < it.end && x > key, is_equal = block < it.end && x == key;
        u32 above = kvm_ballot(is_above), equal = kvm_ballot(is_equal);
        kvm_sync(); // nobody reads the last counts any more
        if (lane == 0) shared[warp] = kvm_popc(above), shared[32 + warp] = kvm_popc(equal);
        kvm_sync();
        u32 my_above = above_before + kvm_popc(above & below);
        u32 my_equal = equal_before + kvm_popc(equal & below);
        for (u32 w = 0; w < KVM_TOPK_WARPS; w++) {
            u32 a = shared[w], e = shared[32 + w];
            my_above += w < warp ? a : 0, my_equal += w < warp ? e : 0;
            above_before += a, equal_before += e;
        }
        if (is_above || (is_equal && my_equal < ties))
            kvm_put(p, it, it.begin + my_above + (my_equal < ties ? my_equal : ties), block);
    }
}

/// Any number of CTAs of 512 threads and 1032 bytes of shared memory; a CTA makes a list.
KVM_KERNEL(512, 2, kvm_topk, KvmTopk) {
    KVM_DYN_SMEM(smem);
    u32* shared = (u32*)smem;
    for (u32 i = kvm_bid(); i < p.num_items; i += kvm_grid()) {
        KvmTopkItem it = p.items[i];
        if (it.num_blocks == 0) continue;
        u32 n = it.end - it.begin, chosen = it.k < n ? it.k : n, key = 0, ties = n;
        if (chosen > 0) {
            if (chosen < n) kvm_select(p.scores + it.score + it.begin, n, chosen, shared, key, ties);
            kvm_put_best(p, it, key, ties, shared);
        }
        for (u32 block = kvm_tid(); block < it.begin; block += KVM_TOPK_THREADS)
            kvm_put(p, it, block, block);
        for (u32 block = it.end + kvm_tid(); block < it.num_blocks; block += KVM_TOPK_THREADS)
            kvm_put(p, it, it.begin + chosen + block - it.end, block);
        kvm_sync(); // the next list counts in the same memory
    }
}
