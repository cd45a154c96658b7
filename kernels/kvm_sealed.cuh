// What decoding attention does with a chunk of sealed rows (kvm_quant.cuh has their layout).
//
//   x[token, column] = s (code . q) + m sum(q)        keys scaled by token
//   x[token, column] = code . (q s) + q . m           keys scaled by channel
//   O[channel, column] = sum of code (s p) + sum of m p
//
// where codes count from the middle one, whose value is m. Where keys are kept rotated, Q is rotated too;
// where values are, the rotation of what they add up to is taken back. Right operands are f16: Q is brought
// to about 1 by a power of two for each column, p s by one for all, which follows the largest scale of a chunk.
#pragma once
#include "kvm_quant.cuh"

/// What a right operand gives with middle codes, exactly as the tensor cores see it: sums of its columns,
/// times what fragments add.
template <class F, int STEPS, int NT>
KVM_DEVICE void kvm_middle_products(const u32 (&b)[STEPS][NT][2], float (&acc)[NT][4]) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
        for (int r = 0; r < 4; r++) acc[n][r] = 0;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const u32 a[4] = {F::middle(step, 0), F::middle(step, 1), F::middle(step, 2), F::middle(step, 3)};
            kvm_mma<false>(acc[n], a, b[step][n]);
        }
    }
}

/// Fragments of 1.
struct KvmOnes {
    KVM_DEVICE static constexpr u32 middle(int, int) { return 0x3c003c00; }
};

/// Q as f16, for the columns that this lane has of results; `gain` turns a product with `b` into a logit
/// in units of log2.
template <int D, int NT> struct KvmQueries {
    u32 b[D / 16][NT][2];
    float gain[NT][2];
    /// Where keys are scaled by token: the sums of the columns of `b`, if there are minima, and its products
    /// with middle codes.
    float sum[NT][2], middle[NT][4];
};

/// Elements of a pair a and b whose numbers differ in a bit, one step of a rotation.
KVM_DEVICE void kvm_butterfly(float& a, float& b) {
    float sum = a + b;
    b = a - b, a = sum;
}
/// The same where the other one is in the lane that `mask` tells apart.
KVM_DEVICE float kvm_butterfly(float x, u32 mask) {
    float other = kvm_shfl_xor(x, (int)mask);
    return kvm_tid() & mask ? other - x : x + other;
}

template <class F, bool BF16, int D, int NT>
KVM_DEVICE void kvm_prepare_q(const KvmDecode& p, const KvmItem& it, KvmQueries<D, NT>& q) {
    constexpr int N = D / 4; // elements of a column in a lane; its four lanes have pairs in turn
    u32 lane = kvm_tid() % 32;
    kvm_load_q<D, NT>(p, it, q.b);
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float x[N / 2][2], top = 0, unit = p.scale * KVM_LOG2E;
#pragma unroll
        for (int i = 0; i < N / 2; i++) kvm_unpack_pair<BF16>(q.b[i / 2][n][i % 2], x[i]);
        if (p.rotates & 1) {
#pragma unroll
            for (int half = 1; half < N; half *= 2)
#pragma unroll
                for (int i = 0; i < N; i++)
                    if (!(i & half)) kvm_butterfly(x[i / 2][i % 2], x[(i + half) / 2][(i + half) % 2]);
#pragma unroll
            for (int i = 0; i < N; i++)
                x[i / 2][i % 2] = kvm_butterfly(kvm_butterfly(x[i / 2][i % 2], 1), 2);
            unit *= kvm_rotation_factor<D>();
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            float y = x[i / 2][i % 2], size = y < 0 ? -y : y;
            top = size > top ? size : top;
        }
        top = kvm_max_over<1, 4>(top); // the lanes of a column
        // 2^e of the largest element; where that is 0, or not finite, nothing is gained.
        u32 e = kvm_bits(top) >> 23;
        e = e == 0 || e >= 254 ? 127 : e;
        float scale = kvm_float((254 - e) << 23);
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            q.b[i / 2][n][i % 2] = kvm_pack<false>(x[i][0] * scale, x[i][1] * scale);
        for (int c = 0; c < 2; c++)
            q.gain[n][c] = kvm_float(kvm_shfl(e << 23, (lane % 4 * 2 + c) * 4)) * unit;
    }
    if constexpr (F::IS_PER_CHANNEL) return;
    if constexpr (F::FLOATS == 2) { // there are minima
        float sum[NT][4];
        kvm_middle_products<KvmOnes>(q.b, sum);
        for (int n = 0; n < NT; n++) q.sum[n][0] = sum[n][0], q.sum[n][1] = sum[n][1];
    }
    if constexpr (F::HAS_OFFSET) kvm_middle_products<F>(q.b, q.middle);
}

/// What a warp knows beside KvmState while it is in sealed blocks: outputs are in units of 1 / unit, lack
/// `middle` and have `excess` too much. `unit` is 0 before the first values.
template <int NT> struct KvmSealedState {
    float unit, middle[NT][2], excess[NT][4];
};

/// Weights are up to 2^KVM_SLACK and scales of values in `unit`s up to KVM_TOP_SCALE: f16 holds their
/// product, and what it loses below is 2^-24 / 16 of the largest term.
static constexpr float KVM_SLACK = 8, KVM_TOP_SCALE = 128;

/// Keys scaled by channel: the right operand takes the scales of the channels. `start` is what the middles
/// of the channels add, less its products with middle codes.
template <class F, int D, int NT>
KVM_DEVICE void kvm_scale_queries(const KvmQueries<D, NT>& q, const u32* meta,
                                  u32 (&scaled)[D / 16][NT][2], float (&start)[NT][4]) {
    float middle[NT][4] = {};
#pragma unroll
    for (int ks = 0; ks < D / 16; ks++) {
        const u32* s = meta + ks * 8 + kvm_tid() % 4;
        const u32 center = kvm_pack<false>(F::CENTER, F::CENTER);
        u32 low = kvm_fma2(s[0], center, s[D / 2]), high = kvm_fma2(s[4], center, s[D / 2 + 4]);
        const u32 m[4] = {low, low, high, high};
#pragma unroll
        for (int n = 0; n < NT; n++) {
            kvm_mma<false>(middle[n], m, q.b[ks][n]);
            for (int r = 0; r < 2; r++) scaled[ks][n][r] = kvm_mul2(q.b[ks][n][r], s[r * 4]);
        }
    }
    kvm_middle_products<F>(scaled, start);
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

/// Logits of a tile of keys scaled by token: x = s (code . q) + m sum(q).
template <class F, int D, int NT>
KVM_DEVICE void kvm_token_logits(const KvmQueries<D, NT>& q, const unsigned char* k, int tile,
                                 float (&x)[NT][4]) {
    for (int n = 0; n < NT; n++)
        for (int r = 0; r < 4; r++) x[n][r] = F::HAS_OFFSET ? -q.middle[n][r] : 0;
    kvm_tile_products<F, D, NT>(k, tile, q.b, x);
    const float* meta = (const float*)(k + KvmChunk<F, D>::CODES) + tile * 16 + kvm_tid() % 32 / 4;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        float s = meta[r / 2 * 8] * F::GAIN;
        float m = F::FLOATS == 1 ? 0 : meta[F::TOKENS + r / 2 * 8] + F::CENTER * s;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float rest = F::FLOATS == 1 ? 0 : m * q.sum[n][r % 2];
            x[n][r] = (s * x[n][r] + rest) * q.gain[n][r % 2];
        }
    }
}

/// Logits of a chunk in units of log2, none hidden and without a soft cap.
template <class F, int D, int NT>
KVM_DEVICE void kvm_chunk_logits(const KvmQueries<D, NT>& q, const unsigned char* k,
                                 float (&x)[F::TOKENS / 16][NT][4]) {
    if constexpr (F::IS_PER_CHANNEL) {
        u32 scaled[D / 16][NT][2];
        float start[NT][4];
        kvm_scale_queries<F>(q, (const u32*)(k + KvmChunk<F, D>::CODES), scaled, start);
#pragma unroll
        for (int tile = 0; tile < F::TOKENS / 16; tile++) {
            for (int n = 0; n < NT; n++)
                for (int r = 0; r < 4; r++) x[tile][n][r] = start[n][r];
            kvm_tile_products<F, D, NT>(k, tile, scaled, x[tile]);
            for (int n = 0; n < NT; n++)
                for (int r = 0; r < 4; r++) x[tile][n][r] *= q.gain[n][r % 2];
        }
    } else {
#pragma unroll
        for (int tile = 0; tile < F::TOKENS / 16; tile++) kvm_token_logits<F>(q, k, tile, x[tile]);
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
        kvm_middle_products<F>(pb, middle);
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
