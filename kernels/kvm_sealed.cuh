// What decoding attention does with a chunk of sealed rows (kvm_quant.cuh has their layout).
//
//   x[token, column] = s (code . q) + m sum(q)        keys scaled by token
//   x[token, column] = code . (q s) + q . m           keys scaled by channel
//   O[channel, column] = sum of code (s p) + sum of m p
//
// where codes count from the middle one, whose value is m. Where keys are kept rotated, Q is rotated too;
// where values are, the rotation of what they add up to is taken back. Right operands are f16: Q is brought
// to about 1 (kvm_queries.cuh), p s by a power of two for all columns, which follows the largest scale of a chunk.
#pragma once
#include "kvm_queries.cuh"

/// What a warp knows beside KvmState while it is in sealed blocks: outputs are in units of 1 / unit, lack
/// `middle` and have `excess` too much. `unit` is 0 before the first values.
template <int NT> struct KvmSealedState {
    float unit, middle[NT][2], excess[NT][4];
};

/// Weights are up to 2^KVM_SLACK and scales of values in `unit`s up to KVM_TOP_SCALE: f16 holds their
/// product, and what it loses below is 2^-24 / 16 of the largest term.
static constexpr float KVM_SLACK = 8, KVM_TOP_SCALE = 128;

/// Right operands of Q times the scales of channels: kept in registers or, where these are too few, made
/// from Q in shared memory when they are asked for.
template <int D, int NT, bool IS_SHARED = KVM_SHARES_Q<D, NT>> struct KvmScaled {
    u32 b[D / 16][NT][2];
};
template <int D, int NT> struct KvmScaled<D, NT, true> {
    struct Right {
        KvmSharedQ<NT> q;
        const u32* s;
    } b;
};
template <class Right>
KVM_DEVICE auto kvm_get_q(const Right& right, int ks, int n, u32 (&b)[2]) -> decltype(right.s, void()) {
    const u32* s = right.s + ks * 8 + kvm_tid() % 4;
    kvm_get_q(right.q, ks, n, b);
    b[0] = kvm_mul2(b[0], s[0]), b[1] = kvm_mul2(b[1], s[4]);
}

/// Keys scaled by channel: the right operand takes the scales of the channels. `start` is what the middles
/// of the channels add, less its products with middle codes.
template <class F, int D, int NT>
KVM_DEVICE void kvm_scale_queries(const KvmQueries<D, NT>& q, const u32* meta, KvmScaled<D, NT>& scaled,
                                  float (&start)[NT][4]) {
    float middle[NT][4] = {};
    if constexpr (KVM_SHARES_Q<D, NT>) scaled.b = {q.b, meta};
#pragma unroll
    for (int ks = 0; ks < D / 16; ks++) {
        const u32* s = meta + ks * 8 + kvm_tid() % 4;
        const u32 center = kvm_pack<false>(F::CENTER, F::CENTER);
        u32 low = kvm_fma2(s[0], center, s[D / 2]), high = kvm_fma2(s[4], center, s[D / 2 + 4]);
        const u32 m[4] = {low, low, high, high};
#pragma unroll
        for (int n = 0; n < NT; n++) {
            u32 b[2];
            kvm_get_q(q.b, ks, n, b);
            kvm_mma<false>(middle[n], m, b);
            if constexpr (!KVM_SHARES_Q<D, NT>)
                for (int r = 0; r < 2; r++) scaled.b[ks][n][r] = kvm_mul2(b[r], s[r * 4]);
        }
    }
    kvm_middle_products<F, D / 16>(scaled.b, start);
    for (int n = 0; n < NT; n++)
        for (int r = 0; r < 4; r++) start[n][r] = middle[n][r] - start[n][r];
}

/// Adds the products of the codes of a tile of 16 tokens with a right operand.
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

/// The same for all tiles of a chunk, with a right operand that is asked for: once, for all of them.
template <class F, int D, int NT, class Right>
KVM_DEVICE void kvm_chunk_products(const unsigned char* k, const Right& right,
                                   float (&x)[F::TOKENS / 16][NT][4]) {
    constexpr int PIECES = KvmChunk<F, D>::K_WORDS / 4, STEPS = D / 16 / PIECES;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        u32 w[F::TOKENS / 16][4];
#pragma unroll
        for (int tile = 0; tile < F::TOKENS / 16; tile++) kvm_words(k, tile * PIECES + piece, w[tile]);
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 b[NT][2];
#pragma unroll
            for (int n = 0; n < NT; n++) kvm_get_q(right, piece * STEPS + step, n, b[n]);
#pragma unroll
            for (int tile = 0; tile < F::TOKENS / 16; tile++) {
                u32 a[4];
                F::fragment(w[tile], step, a);
#pragma unroll
                for (int n = 0; n < NT; n++) kvm_mma<false>(x[tile][n], a, b[n]);
            }
        }
    }
}

/// Products with a tile of keys scaled by token become logits: x = s (code . q) + m sum(q).
template <class F, int D, int NT>
KVM_DEVICE void kvm_token_logits(const KvmQueries<D, NT>& q, const unsigned char* k, int tile,
                                 float (&x)[NT][4]) {
    const float* meta = (const float*)(k + KvmChunk<F, D>::CODES) + tile * 16 + kvm_tid() % 32 / 4;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        float s = meta[r / 2 * 8] * F::GAIN;
        float m = F::FLOATS == 1 ? 0 : meta[F::TOKENS + r / 2 * 8] + F::CENTER * s;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float rest = F::FLOATS == 1 ? 0 : m * q.column(n, r % 2).sum;
            x[n][r] = (s * x[n][r] + rest) * q.column(n, r % 2).gain;
        }
    }
}

/// Logits of a chunk in units of log2, none hidden and without a soft cap.
template <class F, int D, int NT>
KVM_DEVICE void kvm_chunk_logits(const KvmQueries<D, NT>& q, const unsigned char* k,
                                 float (&x)[F::TOKENS / 16][NT][4]) {
    constexpr int TILES = F::TOKENS / 16;
    KvmScaled<D, NT> scaled;
    float start[NT][4];
    if constexpr (F::IS_PER_CHANNEL)
        kvm_scale_queries<F>(q, (const u32*)(k + KvmChunk<F, D>::CODES), scaled, start);
    else
        for (int n = 0; n < NT; n++)
            for (int r = 0; r < 4; r++)
                start[n][r] = F::HAS_OFFSET ? -q.column(n, r % 2).middle[r / 2] : 0;
    if constexpr (KVM_SHARES_Q<D, NT>) {
#pragma unroll
        for (int i = 0; i < TILES * NT * 4; i++) x[i / 4 / NT][i / 4 % NT][i % 4] = start[i / 4 % NT][i % 4];
        kvm_syncwarp(); // or compilers keep in registers what `start` was made of
        if constexpr (F::IS_PER_CHANNEL) kvm_chunk_products<F, D>(k, scaled.b, x);
        else kvm_chunk_products<F, D>(k, q.b, x);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        if constexpr (!KVM_SHARES_Q<D, NT>) {
            for (int n = 0; n < NT; n++)
                for (int r = 0; r < 4; r++) x[tile][n][r] = start[n][r];
            if constexpr (F::IS_PER_CHANNEL) kvm_tile_products<F, D, NT>(k, tile, scaled.b, x[tile]);
            else kvm_tile_products<F, D, NT>(k, tile, q.b, x[tile]);
        }
        if constexpr (KVM_SHARES_Q<D, NT>) kvm_syncwarp(); // or registers keep columns for all tiles
        if constexpr (!F::IS_PER_CHANNEL) kvm_token_logits<F>(q, k, tile, x[tile]);
        else
            for (int n = 0; n < NT; n++)
                for (int r = 0; r < 4; r++) x[tile][n][r] *= q.column(n, r % 2).gain;
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

/// Scale and middle of the values of a token of a chunk.
template <class F>
KVM_DEVICE void kvm_value_scale(const unsigned char* meta, u32 token, float& s, float& m) {
    if constexpr (F::IS_PER_CHANNEL) {
        u32 pair = ((const u32*)meta)[token];
        s = kvm_half_to_float(pair & 0xffff), m = kvm_half_to_float(pair >> 16) + F::CENTER * s;
    } else {
        const float* at = (const float*)meta + token;
        s = at[0] * F::GAIN, m = F::FLOATS == 2 ? at[F::TOKENS] + F::CENTER * s : 0;
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
            sealed.middle[n][c] *= alpha;
#pragma unroll
            for (int d = 0; d < D / 16; d++)
#pragma unroll
                for (int r = c; r < 4; r += 2)
                    st.o[d][n][r] = (st.o[d][n][r] - sealed.excess[n][r]) * (alpha * factor);
            for (int r = c; r < 4; r += 2) sealed.excess[n][r] = 0;
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

/// Adds the values of a chunk, weighted by p, to the outputs. Half of what the products with middle codes
/// make too much is taken away before, half with that of the next chunk: so sums go from below to above
/// what they mean, and what tensor cores cut off towards 0 nearly cancels.
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
        float scale = s[i] * sealed.unit;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float p0 = x[i / 2][n][i % 2 * 2], p1 = x[i / 2][n][i % 2 * 2 + 1];
            if (F::FLOATS == 2) sealed.middle[n][0] += m[i] * p0, sealed.middle[n][1] += m[i] * p1;
            pb[i / 2][n][i % 2] = kvm_movm(kvm_pack<false>(p0 * scale, p1 * scale));
        }
    }
    if constexpr (F::HAS_OFFSET) {
        float middle[NT][4];
        kvm_middle_products<F, TILES>(pb, middle);
        for (int n = 0; n < NT; n++)
            for (int r = 0; r < 4; r++) {
                float half = 0.5f * middle[n][r], excess = sealed.excess[n][r] + half;
                sealed.excess[n][r] = half;
#pragma unroll
                for (int d = 0; d < D / 16; d++) st.o[d][n][r] -= excess;
            }
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

/// Attends to a chunk of keys of format K and values of format V; all its rows are seen and there is no soft
/// cap, unless `is_partial`.
template <class K, class V, int D, int NT>
KVM_DEVICE void kvm_chunk(const KvmDecode& p, const KvmSight<NT>& sight, u32 row, bool is_partial,
                          const KvmQueries<D, NT>& q, const unsigned char* k, const unsigned char* v,
                          KvmState<D, NT>& st, KvmSealedState<NT>& sealed) {
    static_assert(K::TOKENS == V::TOKENS);
    float x[K::TOKENS / 16][NT][4], s[V::TOKENS / 8], m[V::TOKENS / 8], top = 0;
    kvm_chunk_logits<K>(q, k, x);
    if (is_partial) kvm_hide<K>(p, sight, row, x);
#pragma unroll
    for (int i = 0; i < V::TOKENS / 8; i++) {
        kvm_value_scale<V>(v + KvmChunk<V, D>::CODES, kvm_tid() % 32 / 4 + i * 8, s[i], m[i]);
        top = kvm_max(top, s[i]);
    }
    kvm_chunk_softmax<V>(x, top, st, sealed);
    if constexpr (KVM_SHARES_Q<D, NT>) {
        kvm_syncwarp(); // read once more rather than kept
#pragma unroll
        for (int i = 0; i < V::TOKENS / 8; i++)
            kvm_value_scale<V>(v + KvmChunk<V, D>::CODES, kvm_tid() % 32 / 4 + i * 8, s[i], m[i]);
    }
    kvm_chunk_values<V>(v, s, m, x, st, sealed);
}

/// Takes the rotation of values back.
template <int D, int NT> KVM_DEVICE void kvm_rotate_outputs(KvmState<D, NT>& st) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int d = 0; d < D / 16; d++) kvm_butterfly(st.o[d][n][c], st.o[d][n][c + 2]);
#pragma unroll
            for (int half = 1; half < D / 16; half *= 2)
#pragma unroll
                for (int d = 0; d < D / 16; d++)
                    if (!(d & half))
                        for (int r = c; r < 4; r += 2)
                            kvm_butterfly(st.o[d][n][r], st.o[d + half][n][r]);
#pragma unroll
            for (int d = 0; d < D / 16; d++)
#pragma unroll
                for (int r = c; r < 4; r += 2) {
                    float x = kvm_butterfly(kvm_butterfly(st.o[d][n][r], 4), 8);
                    st.o[d][n][r] = kvm_butterfly(x, 16) * kvm_rotation_factor<D>();
                }
        }
}
