// Decoding attention over sealed blocks of 8, 4 and 2 bits, and the open f16 or bf16 rows behind them.
//
//   x[token, column] = s (code . q) + m sum(q)        keys scaled by token
//   x[token, column] = code . (q s) + q . m           keys scaled by channel
//   O[channel, column] = sum of code (s p) + sum of m p
//
// A warp owns every WARPS-th chunk of tokens of its item (kvm_quant.cuh) and two places for chunks in
// shared memory, which it fills ahead: while warps meet in the one, the first chunk of the next item is on
// its way to the other. Right operands are f16: Q is brought to about 1 by a power of two
// for each column, p s by one for all, which follows the largest scale of a chunk.
#include "kvm_quant.cuh"

/// Q as f16, for the columns that this lane has of results: the sums of what is in `b`, and what turns a
/// product with `b` into a logit in units of log2.
template <int D, int NT> struct KvmQueries {
    u32 b[D / 16][NT][2];
    float gain[NT][2], sum[NT][2];
};

/// Sums of the columns of a right operand, exactly as the tensor cores see it.
template <int KS, int NT>
KVM_DEVICE void kvm_column_sums(const u32 (&b)[KS][NT][2], float (&sum)[NT][2]) {
    const u32 ones[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float all[4] = {};
#pragma unroll
        for (int ks = 0; ks < KS; ks++) kvm_mma<false>(all, ones, b[ks][n]);
        sum[n][0] = all[0], sum[n][1] = all[1];
    }
}

template <bool BF16, int D, int NT>
KVM_DEVICE void kvm_prepare_q(const KvmDecode& p, const u32 (&raw)[D / 16][NT][2],
                              KvmQueries<D, NT>& q) {
    u32 lane = kvm_tid() % 32;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float top = 0;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            float x[2];
            kvm_unpack_pair<BF16>(raw[i / 2][n][i % 2], x);
            for (int j = 0; j < 2; j++) {
                float size = x[j] < 0 ? -x[j] : x[j];
                top = size > top ? size : top;
            }
        }
        top = kvm_max_over<1, 4>(top); // the lanes of a column
        // 2^e of the largest element; where that is 0, or not finite, nothing is gained.
        u32 e = kvm_bits(top) >> 23;
        e = e == 0 || e >= 254 ? 127 : e;
        float scale = kvm_float((254 - e) << 23);
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            float x[2];
            kvm_unpack_pair<BF16>(raw[i / 2][n][i % 2], x);
            q.b[i / 2][n][i % 2] = kvm_pack<false>(x[0] * scale, x[1] * scale);
        }
        for (int c = 0; c < 2; c++)
            q.gain[n][c] = kvm_float(kvm_shfl(e << 23, (lane % 4 * 2 + c) * 4)) *
                           (p.scale * KVM_LOG2E);
    }
    kvm_column_sums(q.b, q.sum);
}

/// What a warp knows beside KvmState while it is in sealed blocks: outputs are in units of 1 / unit,
/// rows g+8 in units of HIGH_ROW times that, and lack `minimum`. `unit` is 0 before the first values.
template <int NT> struct KvmSealedState {
    float unit, minimum[NT][2];
};

/// Weights are up to 2^KVM_SLACK and scales of values in `unit`s up to KVM_TOP_SCALE: f16 holds their
/// product, and what it loses below is 2^-24 / 16 of the largest term.
static constexpr float KVM_SLACK = 8, KVM_TOP_SCALE = 128;

/// Chunks of the sealed rows of a part.
template <class F, int D, int WARPS> struct KvmSealedRing {
    using Chunk = KvmChunk<F, D>;
    static constexpr u32 STEP = WARPS * F::TOKENS;
    /// Places are filled 512 bytes at a time; what is more than a chunk is not copied.
    static constexpr int V_PLACE = (Chunk::K + 511) / 512 * 512;
    static constexpr int BYTES = V_PLACE + (Chunk::V + 511) / 512 * 512;
    unsigned char* places;

    KVM_DEVICE KvmSealedRing(unsigned char* smem) : places(smem + kvm_tid() / 32 * 2 * BYTES) {}

    KVM_DEVICE static u32 first(const KvmDecode& p, const KvmItem& it) {
        return kvm_first_row(p, it, F::TOKENS) + kvm_tid() / 32 * F::TOKENS;
    }
    KVM_DEVICE static u32 end(const KvmItem& it) {
        return it.end < it.sealed_end ? it.end : it.sealed_end;
    }

    /// Asks for a chunk of a block of a head.
    KVM_DEVICE void load(const KvmDecode& p, u32 kv_head, u32 page, u32 chunk, int place) const {
        i64 at = page * p.sealed_block + kv_head * p.sealed_head + kvm_tid() % 32 * 16;
        unsigned char* to = places + place * BYTES + kvm_tid() % 32 * 16;
        copy<Chunk::K>(to, p.sealed_k + at + chunk * Chunk::K);
        copy<Chunk::V>(to + V_PLACE, p.sealed_v + at + chunk * Chunk::V);
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

/// Keys scaled by channel: the right operand takes the scales of the channels. Answers it with the sums of
/// its columns and what the minima of the channels add.
template <class F, int D, int NT>
KVM_DEVICE void kvm_scale_queries(const KvmQueries<D, NT>& q, const u32* meta,
                                  u32 (&scaled)[D / 16][NT][2], float (&sum)[NT][2],
                                  float (&minimum)[NT][2]) {
    float all[NT][4] = {};
#pragma unroll
    for (int ks = 0; ks < D / 16; ks++) {
        const u32* s = meta + ks * 8 + kvm_tid() % 4;
        const u32 m[4] = {s[D / 2], s[D / 2], s[D / 2 + 4], s[D / 2 + 4]};
#pragma unroll
        for (int n = 0; n < NT; n++) {
            kvm_mma<false>(all[n], m, q.b[ks][n]);
            for (int r = 0; r < 2; r++) {
                u32 y = kvm_mul2(q.b[ks][n][r], s[r * 4]);
                scaled[ks][n][r] = F::SECOND != 1 && ks % 2 ? kvm_mul2(y, 0x2c002c00) : y;
            }
        }
    }
    kvm_column_sums(scaled, sum);
    for (int n = 0; n < NT; n++)
        for (int c = 0; c < 2; c++) minimum[n][c] = all[n][c];
}

/// Products of the codes of a tile of 16 tokens with a right operand.
template <class F, int D, int NT>
KVM_DEVICE void kvm_tile_products(const unsigned char* k, int tile, const u32 (&b)[D / 16][NT][2],
                                  float (&acc)[NT][4]) {
    u32 w[KvmChunk<F, D>::K_WORDS];
    kvm_words(k, tile, w);
#pragma unroll
    for (int ks = 0; ks < D / 16; ks++) {
        u32 a[4];
        F::fragment(w, ks, a);
#pragma unroll
        for (int n = 0; n < NT; n++) kvm_mma<false>(acc[n], a, b[ks][n]);
    }
}

/// Logits of a chunk in units of log2, none hidden and without a soft cap.
template <class F, int D, int NT>
KVM_DEVICE void kvm_chunk_logits(const KvmQueries<D, NT>& q, const unsigned char* k,
                                 float (&x)[F::TOKENS / 16][NT][4]) {
    const unsigned char* meta = k + KvmChunk<F, D>::CODES;
    u32 scaled[F::IS_PER_CHANNEL ? D / 16 : 1][NT][2];
    float sum[NT][2], minimum[NT][2];
    if constexpr (F::IS_PER_CHANNEL)
        kvm_scale_queries<F, D, NT>(q, (const u32*)meta, scaled, sum, minimum);
#pragma unroll
    for (int tile = 0; tile < F::TOKENS / 16; tile++) {
        float acc[NT][4] = {};
        if constexpr (F::IS_PER_CHANNEL) kvm_tile_products<F, D, NT>(k, tile, scaled, acc);
        else kvm_tile_products<F, D, NT>(k, tile, q.b, acc);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            constexpr float HIGH = 1 / F::HIGH_ROW;
            const float* token = (const float*)meta + tile * 16 + kvm_tid() % 32 / 4 + r / 2 * 8;
            float s = F::IS_PER_CHANNEL ? r < 2 ? 1 : HIGH : token[0] * (r < 2 ? F::GAIN : F::GAIN * HIGH);
            float m = F::IS_PER_CHANNEL || F::FLOATS == 1 ? 0 : token[F::TOKENS];
#pragma unroll
            for (int n = 0; n < NT; n++) {
                float rest = F::IS_PER_CHANNEL ? minimum[n][r % 2] - F::OFFSET * s * sum[n][r % 2]
                                               : (m - F::OFFSET * s) * q.sum[n][r % 2];
                x[tile][n][r] = (s * acc[n][r] + rest) * q.gain[n][r % 2];
            }
        }
    }
}

/// Caps logits, and hides rows that a column does not see.
template <class F, int NT>
KVM_DEVICE void kvm_hide(const KvmDecode& p, const KvmSight<NT>& sight, u32 row,
                         float (&x)[F::TOKENS / 16][NT][4]) {
    if (p.softcap > 0) {
#pragma unroll
        for (int i = 0; i < F::TOKENS / 16 * NT * 4; i++) {
            float& y = x[i / 4 / NT][i / 4 % NT][i % 4];
            y = kvm_cap(p.softcap, y * KVM_LN2) * KVM_LOG2E;
        }
    }
#pragma unroll
    for (int i = 0; i < F::TOKENS / 8; i++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                u32 token = row + kvm_tid() % 32 / 4 + i * 8;
                bool is_seen = token >= sight.begin[n][c] && token < sight.end[n][c];
                if (!is_seen) x[i / 2][n][i % 2 * 2 + c] = -KVM_INF;
            }
}

/// Scale and minimum of the values of a token of a chunk.
template <class F>
KVM_DEVICE void kvm_value_scale(const unsigned char* meta, u32 token, float& s, float& m) {
    if constexpr (F::IS_PER_CHANNEL) {
        u32 pair = ((const u32*)meta)[token];
        s = kvm_half_to_float(pair & 0xffff), m = kvm_half_to_float(pair >> 16);
    } else {
        const float* at = (const float*)meta + token;
        s = at[0] * F::GAIN, m = F::FLOATS == 2 ? at[F::TOKENS] : 0;
    }
}

/// Brings the state to a new maximum of logits and, if need be, a new unit of outputs. `max` is of the
/// logits of this lane, `top` of its scales of values.
template <int D, int NT>
KVM_DEVICE void kvm_rescale(const float (&max)[NT][2], float top, KvmState<D, NT>& st,
                            KvmSealedState<NT>& sealed) {
    top = kvm_max_rows(top);
    float factor = 1;
    if (sealed.unit == 0 ? top > 0 : top * sealed.unit > KVM_TOP_SCALE) {
        // From here on the largest scale is 16 to 32. Smaller ones later lose nothing that counts.
        u32 e = kvm_bits(top) >> 23;
        float unit = kvm_float((e > 240 ? 18 : e < 20 ? 238 : 258 - e) << 23);
        factor = sealed.unit == 0 ? 1 : unit * kvm_reciprocal(sealed.unit);
        sealed.unit = unit;
    }
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float now = kvm_max_rows(max[n][c]), old = st.max[n][c];
            now = old > now ? old : now;
            float alpha = kvm_weight(old, now);
            st.max[n][c] = now;
            st.sum[n][c] *= alpha;
            sealed.minimum[n][c] *= alpha;
#pragma unroll
            for (int d = 0; d < D / 16; d++)
#pragma unroll
                for (int r = c; r < 4; r += 2) st.o[d][n][r] *= alpha * factor;
        }
}

/// Turns logits into weights p, and takes them into the state. The state's maximum may be exceeded by
/// 2^KVM_SLACK, so that lanes seldom have to agree on a new one.
template <class F, int D, int NT>
KVM_DEVICE void kvm_chunk_softmax(float (&x)[F::TOKENS / 16][NT][4], float top, KvmState<D, NT>& st,
                                  KvmSealedState<NT>& sealed) {
    float max[NT][2];
    bool is_over = sealed.unit == 0 ? top > 0 : top * sealed.unit > KVM_TOP_SCALE;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            max[n][c] = -KVM_INF;
#pragma unroll
            for (int i = 0; i < F::TOKENS / 8; i++)
                max[n][c] = kvm_max(max[n][c], x[i / 2][n][i % 2 * 2 + c]);
            is_over |= max[n][c] > st.max[n][c] + KVM_SLACK;
        }
    if (kvm_ballot(is_over)) kvm_rescale(max, top, st, sealed);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float base = st.max[n][c] == -KVM_INF ? 0 : st.max[n][c];
#pragma unroll
            for (int i = 0; i < F::TOKENS / 8; i++) {
                float& y = x[i / 2][n][i % 2 * 2 + c];
                y = kvm_exp2(y - base);
                st.sum[n][c] += y;
            }
        }
}

/// Adds the values of a chunk, weighted by p, to the outputs.
template <class F, int D, int NT>
KVM_DEVICE void kvm_chunk_values(const unsigned char* v, const float (&s)[F::TOKENS / 8],
                                 const float (&m)[F::TOKENS / 8],
                                 const float (&x)[F::TOKENS / 16][NT][4], KvmState<D, NT>& st,
                                 KvmSealedState<NT>& sealed) {
    using Chunk = KvmChunk<F, D>;
    constexpr int TILES = F::TOKENS / 16;
    u32 pb[TILES][NT][2];
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
        float scale = s[i] * sealed.unit * (F::SECOND != 1 && i / 2 % 2 ? F::SECOND : 1);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float p0 = x[i / 2][n][i % 2 * 2], p1 = x[i / 2][n][i % 2 * 2 + 1];
            if (F::FLOATS == 2) sealed.minimum[n][0] += m[i] * p0, sealed.minimum[n][1] += m[i] * p1;
            pb[i / 2][n][i % 2] = kvm_movm(kvm_pack<false>(p0 * scale, p1 * scale));
        }
    }
    if constexpr (F::OFFSET != 0) {
        float sum[NT][2];
        kvm_column_sums(pb, sum);
#pragma unroll
        for (int d = 0; d < D / 16; d++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int r = 0; r < 4; r++) st.o[d][n][r] -= F::OFFSET * sum[n][r % 2];
    }
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
        u32 w[Chunk::V_WORDS];
        kvm_words(v, d, w);
#pragma unroll
        for (int step = 0; step < TILES; step++) {
            u32 a[4];
            F::fragment(w, step, a);
#pragma unroll
            for (int n = 0; n < NT; n++) kvm_mma<false>(st.o[d][n], a, pb[step][n]);
        }
    }
}

/// Attends to a chunk; all its rows are seen and there is no soft cap, unless `is_partial`.
template <class F, int D, int NT>
KVM_DEVICE void kvm_chunk(const KvmDecode& p, const KvmSight<NT>& sight, u32 row, bool is_partial,
                          const KvmQueries<D, NT>& q, const unsigned char* k, const unsigned char* v,
                          KvmState<D, NT>& st, KvmSealedState<NT>& sealed) {
    float x[F::TOKENS / 16][NT][4], s[F::TOKENS / 8], m[F::TOKENS / 8], top = 0;
    kvm_chunk_logits<F>(q, k, x);
    if (is_partial) kvm_hide<F>(p, sight, row, x);
#pragma unroll
    for (int i = 0; i < F::TOKENS / 8; i++) {
        kvm_value_scale<F>(v + KvmChunk<F, D>::CODES, kvm_tid() % 32 / 4 + i * 8, s[i], m[i]);
        top = kvm_max(top, s[i]);
    }
    kvm_chunk_softmax<F>(x, top, st, sealed);
    kvm_chunk_values<F>(v, s, m, x, st, sealed);
}

/// What a warp has asked for when it comes to an item: its first chunk, if `is_asked`, goes to `place`.
struct KvmAhead {
    int place;
    bool is_asked;
};

/// A chunk of some head: its number in the block `pages[index]`.
struct KvmChunkAt {
    u32 kv_head, index, chunk;
    bool is_there;
};

/// The first chunk of this warp in an item.
template <class F, class Ring> KVM_DEVICE KvmChunkAt kvm_first_chunk(const KvmDecode& p, const KvmItem& it) {
    u32 row = Ring::first(p, it);
    return {it.kv_head, it.first_page + row / 64, row % 64 / F::TOKENS, row < Ring::end(it)};
}

/// Attends to the sealed rows of a part; asks for the first chunk of the next item, if there is one.
template <class F, bool BF16, int D, int NT, int WARPS>
KVM_DEVICE void kvm_sealed_rows(const KvmDecode& p, const KvmItem& it, const KvmChunkAt& next,
                                bool looks_ahead, const KvmSight<NT>& sight,
                                const u32 (&raw)[D / 16][NT][2],
                                const KvmSealedRing<F, D, WARPS>& ring, KvmAhead& ahead,
                                KvmState<D, NT>& st) {
    using Ring = KvmSealedRing<F, D, WARPS>;
    u32 row = Ring::first(p, it), end = Ring::end(it);
    auto page_of = [&](u32 row) {
        return row < end || next.is_there ? p.pages[row < end ? it.first_page + row / 64 : next.index] : 0;
    };
    auto ask = [&](u32 row, u32 page, int place) {
        bool is_here = row < end;
        if (is_here || next.is_there)
            ring.load(p, is_here ? it.kv_head : next.kv_head, page,
                      is_here ? row % 64 / F::TOKENS : next.chunk, place);
        kvm_cp_commit();
    };
    // The page of a chunk is asked for a chunk before it is needed, and `next` may be on its way too.
    bool is_last = row + Ring::STEP >= end;
    u32 page = is_last ? 0 : page_of(row + Ring::STEP);
    if (!ahead.is_asked || row >= end) ask(row, page_of(row), ahead.place);
    KvmQueries<D, NT> q;
    kvm_prepare_q<BF16>(p, raw, q);
    if (is_last) page = page_of(end);
    KvmSealedState<NT> sealed = {0, {}};
    // The rows that all queries see, those of the first and of the last query.
    u32 seen_end = it.len + 1 > it.num_queries ? it.len + 1 - it.num_queries : 0;
    u32 seen_begin = p.window > 0 && it.len > p.window ? it.len - p.window : 0;
    for (; row < end; ahead.place ^= 1, row += Ring::STEP) {
        ask(row + Ring::STEP, page, ahead.place ^ 1);
        page = page_of(row + 2 * Ring::STEP);
        kvm_cp_wait<1>();
        kvm_syncwarp(); // the copies of all lanes have landed
        bool is_partial = p.softcap > 0 || row < seen_begin || row + F::TOKENS > seen_end ||
                          row + F::TOKENS > it.end;
        const unsigned char* chunk = ring.places + ahead.place * Ring::BYTES;
        kvm_chunk<F>(p, sight, row, is_partial, q, chunk, chunk + Ring::V_PLACE, st, sealed);
        kvm_syncwarp(); // all lanes have left the place that is filled next
    }
    ahead.is_asked = looks_ahead;
    if (!looks_ahead) kvm_cp_wait<0>();
    float inverse = sealed.unit > 0 ? kvm_reciprocal(sealed.unit) : 0;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            // Each lane has the minima of its tokens only.
            float minimum = F::FLOATS == 2 ? kvm_sum_rows(sealed.minimum[n][c]) : 0;
#pragma unroll
            for (int d = 0; d < D / 16; d++) {
                st.o[d][n][c] = st.o[d][n][c] * inverse + minimum;
                st.o[d][n][c + 2] = st.o[d][n][c + 2] * (inverse / F::HIGH_ROW) + minimum;
            }
        }
}

/// Bytes of shared memory: the places for sealed chunks, for open tiles and where warps meet are the
/// same, one after the other, so that three CTAs fit.
template <class F, int D, int WARPS> KVM_DEVICE constexpr int kvm_quant_bytes() {
    constexpr int SEALED = WARPS * 2 * KvmSealedRing<F, D, WARPS>::BYTES;
    constexpr int OPEN = kvm_ring_bytes(D, 2, WARPS);
    static_assert(OPEN >= kvm_meet_bytes(2, WARPS));
    return SEALED > OPEN ? SEALED : OPEN;
}

/// Where warps meet: each in the place that it fills next. `places` has a bit for each warp.
template <class F, int D, int WARPS> struct KvmPlaceMeeting {
    unsigned char* smem;
    u32 places;

    KVM_DEVICE float* of(u32 warp) const {
        return (float*)(smem + (warp * 2 + (~places >> warp & 1)) * KvmSealedRing<F, D, WARPS>::BYTES);
    }

    /// Warps go on to other places if they have an odd number of chunks of an item.
    KVM_DEVICE void pass(const KvmDecode& p, const KvmItem& it) {
        u32 begin = kvm_first_row(p, it, F::TOKENS), end = KvmSealedRing<F, D, WARPS>::end(it);
        u32 chunks = begin < end ? (end - begin + F::TOKENS - 1) / F::TOKENS : 0;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) places ^= ((chunks + WARPS - 1 - w) / WARPS & 1) << w;
    }
};

template <class F, bool BF16, int D, int NT, int WARPS>
KVM_DEVICE void kvm_decode_quant(const KvmDecode& p, unsigned char* smem) {
    // With 16 columns there is no room, and registers are too few, to look ahead to the next item.
    constexpr bool LOOKS_AHEAD = NT == 1;
    KvmSealedRing<F, D, WARPS> ring(smem);
    static_assert(!LOOKS_AHEAD || ring.BYTES >= kvm_meet_bytes(NT, 1));
    KvmPlaceMeeting<F, D, WARPS> meeting = {smem, 0};
    KvmAhead ahead = {0, false};
    kvm_let_next_start();
    u32 me = kvm_bid();
    KvmItem it = p.items[me];
    kvm_wait_for_previous();
    if (it.num_queries == 0) return;
    u32 q[D / 16][NT][2];
    kvm_load_q<D, NT>(p, it, q);
    for (;;) {
        KvmState<D, NT> st;
        kvm_clear(st);
        KvmSight<NT> sight = kvm_sight<NT>(p, it);
        if (it.begin < it.sealed_end) {
            bool looks_ahead = LOOKS_AHEAD && it.next && it.end <= it.sealed_end;
            KvmChunkAt next = {};
            if (looks_ahead)
                next = kvm_first_chunk<F, KvmSealedRing<F, D, WARPS>>(p, p.items[it.next]);
            kvm_sealed_rows<F, BF16>(p, it, next, looks_ahead, sight, q, ring, ahead, st);
            it = p.items[me]; // again, so that it needs no registers meanwhile
            meeting.pass(p, it);
        } else {
            ahead.is_asked = false; // it had nothing to ask for
        }
        if (it.end > it.sealed_end) {
            kvm_load_q<D, NT>(p, it, q);
            kvm_sync(); // places of chunks become places of tiles of other warps
            KvmRing<D, 2, WARPS, false> open(smem);
            open.begin(p, it);
            open.template attend<BF16, NT>(p, it, sight, q, st);
        }
        KvmItem next = p.items[it.next];
        if (LOOKS_AHEAD && it.next) kvm_load_q<D, NT>(p, next, q);
        if (!LOOKS_AHEAD || it.end > it.sealed_end) kvm_sync(); // nobody reads tiles or chunks any more
        if constexpr (LOOKS_AHEAD) kvm_meet<BF16, D, NT, WARPS>(p, it, st, meeting);
        else kvm_meet<BF16, D, NT, WARPS>(p, it, st, KvmMeeting<NT>{(float*)smem});
        if (!it.next) return;
        me = it.next;
        it = next;
        if (!LOOKS_AHEAD) kvm_load_q<D, NT>(p, it, q);
        kvm_sync(); // all know whether theirs was the last part
    }
}

/// Launched with kvm_warps(D) * 32 threads and kvm_quant_bytes of shared memory.
#define KVM_DECODE_QUANT(name, F, BF16, D, NT, CTAS)                                                    \
    KVM_KERNEL(kvm_warps(D) * 32, CTAS, name, KvmDecode) {                                        \
        KVM_DYN_SMEM(smem);                                                                       \
        kvm_decode_quant<F, BF16, D, NT, kvm_warps(D)>(p, smem);                                  \
    }
#define KVM_DECODE_QUANTS(format, F, D)                                                                \
    KVM_DECODE_QUANT(kvm_decode_##format##_f16_d##D##_g8, F, false, D, 1, 3)                            \
    KVM_DECODE_QUANT(kvm_decode_##format##_f16_d##D##_g16, F, false, D, 2, 2)                           \
    KVM_DECODE_QUANT(kvm_decode_##format##_bf16_d##D##_g8, F, true, D, 1, 3)                            \
    KVM_DECODE_QUANT(kvm_decode_##format##_bf16_d##D##_g16, F, true, D, 2, 2)

KVM_DECODE_QUANTS(int8, KvmInt8, 64)
KVM_DECODE_QUANTS(int8, KvmInt8, 128)
KVM_DECODE_QUANTS(fp8e4m3, KvmE4m3, 64)
KVM_DECODE_QUANTS(fp8e4m3, KvmE4m3, 128)
KVM_DECODE_QUANTS(int4, KvmInt4, 64)
KVM_DECODE_QUANTS(int4, KvmInt4, 128)
KVM_DECODE_QUANTS(kivi4, KvmKivi4, 64)
KVM_DECODE_QUANTS(kivi4, KvmKivi4, 128)
KVM_DECODE_QUANTS(kivi2, KvmKivi2, 64)
KVM_DECODE_QUANTS(kivi2, KvmKivi2, 128)
