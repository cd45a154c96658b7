// Decoding attention over sealed blocks of 8, 4 and 2 bits, and the open f16 or bf16 rows behind them.
//
//   x[token, column] = s (code . q) + m sum(q)        keys scaled by token
//   x[token, column] = code . (q s) + q . m           keys scaled by channel
//   O[channel, column] = sum of code (s p) + sum of m p
//
// A warp owns every WARPS-th chunk of tokens of its item (kvm_quant.cuh) and two places for chunks in
// shared memory, which it fills ahead. Right operands are f16: Q is brought to about 1 by a power of two
// for each column, p s by one for all, which follows the largest scale of a chunk.
#include "kvm_quant.cuh"

/// Q as f16, with what brings it back, for the columns that this lane has of results.
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
KVM_DEVICE void kvm_prepare_q(const KvmDecode& p, const KvmItem& it, KvmQueries<D, NT>& q) {
    u32 lane = kvm_tid() % 32;
    kvm_load_q<D, NT>(p, it, q.b);
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float top = 0;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            float x[2];
            kvm_unpack_pair<BF16>(q.b[i / 2][n][i % 2], x);
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
            kvm_unpack_pair<BF16>(q.b[i / 2][n][i % 2], x);
            q.b[i / 2][n][i % 2] = kvm_pack<false>(x[0] * scale, x[1] * scale);
        }
        for (int c = 0; c < 2; c++)
            q.gain[n][c] = kvm_float(kvm_shfl(e << 23, (lane % 4 * 2 + c) * 4));
    }
    kvm_column_sums(q.b, q.sum);
}

/// What a warp knows beside KvmState while it is in sealed blocks: outputs are in units of 1 / unit,
/// rows g+8 in units of HIGH_ROW times that, and lack `minimum`. `unit` is 0 before the first values.
template <int NT> struct KvmSealedState {
    float unit, minimum[NT][2];
};

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

    /// Asks for the chunk that starts at a row, if the part has it.
    KVM_DEVICE void load(const KvmDecode& p, const KvmItem& it, u32 row, int place) const {
        if (row >= end(it)) return;
        i64 at = p.pages[it.first_page + row / 64] * p.sealed_block + it.kv_head * p.sealed_head;
        u32 chunk = row % 64 / F::TOKENS;
        copy<Chunk::K>(places + place * BYTES, p.sealed_k + at + chunk * Chunk::K);
        copy<Chunk::V>(places + place * BYTES + V_PLACE, p.sealed_v + at + chunk * Chunk::V);
    }

    /// Without the hint that memory is read once: with it ptxas (13.0, and the driver's) makes illegal
    /// instructions of these copies, and of those of the open rows behind.
    template <int N> KVM_DEVICE static void copy(unsigned char* to, const unsigned char* from) {
        u32 lane = kvm_tid() % 32;
#pragma unroll
        for (int i = 0; i < N; i += 512) {
            u32 at = i + lane * 16;
            kvm_cp_async16(to + at, from + (at < N ? at : 0), at < N);
        }
    }
};

/// Logits of a chunk in units of log2, from what the tensor cores give.
template <class F, int D, int NT>
KVM_DEVICE void kvm_chunk_logits(const KvmQueries<D, NT>& q, const unsigned char* k,
                                 float (&x)[F::TOKENS / 16][NT][4]) {
    using Chunk = KvmChunk<F, D>;
    constexpr int TILES = F::TOKENS / 16;
    u32 lane = kvm_tid() % 32;
    const unsigned char* meta = k + Chunk::CODES;
    u32 scaled[F::IS_PER_CHANNEL ? D / 16 : 1][NT][2];
    float sum[NT][2], minimum[NT][2];
    if constexpr (F::IS_PER_CHANNEL) {
        float all[NT][4] = {};
#pragma unroll
        for (int ks = 0; ks < D / 16; ks++) {
            u32 at = ks * 8 + lane % 4;
            const u32* s = (const u32*)meta + at;
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
            for (int c = 0; c < 2; c++) minimum[n][c] = all[n][c] * q.gain[n][c];
    } else {
        for (int n = 0; n < NT; n++)
            for (int c = 0; c < 2; c++) sum[n][c] = q.sum[n][c], minimum[n][c] = 0;
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        u32 w[Chunk::K_WORDS];
        kvm_words(k, tile, w);
        float acc[NT][4] = {};
#pragma unroll
        for (int ks = 0; ks < D / 16; ks++) {
            u32 a[4];
            F::fragment(w, ks, a);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                if constexpr (F::IS_PER_CHANNEL) kvm_mma<false>(acc[n], a, scaled[ks][n]);
                else kvm_mma<false>(acc[n], a, q.b[ks][n]);
            }
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const float* token = (const float*)meta + tile * 16 + lane / 4 + r / 2 * 8;
            float high = r < 2 ? 1 : 1 / F::HIGH_ROW;
            float s = F::IS_PER_CHANNEL ? high : token[0] * (F::GAIN * high);
            float shift = F::IS_PER_CHANNEL || F::FLOATS == 1 ? -F::OFFSET * s
                                                              : token[F::TOKENS] - F::OFFSET * s;
#pragma unroll
            for (int n = 0; n < NT; n++)
                x[tile][n][r] = (s * acc[n][r] + shift * sum[n][r % 2]) * q.gain[n][r % 2] +
                                minimum[n][r % 2];
        }
    }
}

/// Turns logits into weights, and takes them into the state; alpha is what older outputs are worth.
template <class F, int D, int NT>
KVM_DEVICE void kvm_chunk_softmax(const KvmDecode& p, const KvmSight<NT>& sight, u32 row,
                                  float (&x)[F::TOKENS / 16][NT][4], KvmState<D, NT>& st,
                                  float (&alpha)[NT][2]) {
    constexpr int TILES = F::TOKENS / 16;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float max = -KVM_INF;
#pragma unroll
            for (int i = 0; i < 2 * TILES; i++) {
                u32 token = row + kvm_tid() % 32 / 4 + i * 8;
                float& y = x[i / 2][n][i % 2 * 2 + c];
                y = kvm_logit(p, y, token >= sight.begin[n][c] && token < sight.end[n][c]);
                max = y > max ? y : max;
            }
            max = kvm_max_rows(max);
            max = st.max[n][c] > max ? st.max[n][c] : max;
            alpha[n][c] = kvm_weight(st.max[n][c], max);
            st.max[n][c] = max;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 2 * TILES; i++) {
                float& y = x[i / 2][n][i % 2 * 2 + c];
                y = kvm_weight(y, max);
                sum += y;
            }
            st.sum[n][c] = st.sum[n][c] * alpha[n][c] + sum;
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

/// Adds the values of a chunk, weighted by p, to the outputs.
template <class F, int D, int NT>
KVM_DEVICE void kvm_chunk_values(const unsigned char* v, float (&x)[F::TOKENS / 16][NT][4],
                                 const float (&alpha)[NT][2], KvmState<D, NT>& st,
                                 KvmSealedState<NT>& sealed) {
    using Chunk = KvmChunk<F, D>;
    constexpr int TILES = F::TOKENS / 16;
    u32 lane = kvm_tid() % 32;
    const unsigned char* meta = v + Chunk::CODES;
    float s[2 * TILES], m[2 * TILES], top = 0;
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
        kvm_value_scale<F>(meta, lane / 4 + i * 8, s[i], m[i]);
        top = s[i] > top ? s[i] : top;
    }
    top = kvm_max_rows(top);
    float factor = 1;
    if (sealed.unit == 0 ? top > 0 : top * sealed.unit > 4096) {
        // From here on the largest scale is 64 to 128. Smaller ones later lose nothing that counts.
        u32 e = kvm_bits(top) >> 23;
        float unit = kvm_float((e > 240 ? 20 : e < 20 ? 240 : 260 - e) << 23);
        factor = sealed.unit == 0 ? 1 : unit * kvm_reciprocal(sealed.unit);
        sealed.unit = unit;
    }
    u32 pb[TILES][NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) sealed.minimum[n][c] *= alpha[n][c];
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
    float sum[NT][2];
    if (F::OFFSET != 0) kvm_column_sums(pb, sum);
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
        u32 w[Chunk::V_WORDS];
        kvm_words(v, d, w);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                float offset = F::OFFSET != 0 ? F::OFFSET * sum[n][r % 2] : 0;
                st.o[d][n][r] = st.o[d][n][r] * (alpha[n][r % 2] * factor) - offset;
            }
#pragma unroll
        for (int step = 0; step < TILES; step++) {
            u32 a[4];
            F::fragment(w, step, a);
#pragma unroll
            for (int n = 0; n < NT; n++) kvm_mma<false>(st.o[d][n], a, pb[step][n]);
        }
    }
}

/// Attends to the sealed rows of a part.
template <class F, bool BF16, int D, int NT, int WARPS>
KVM_DEVICE void kvm_sealed_rows(const KvmDecode& p, const KvmItem& it, const KvmSight<NT>& sight,
                                unsigned char* smem, KvmState<D, NT>& st) {
    using Ring = KvmSealedRing<F, D, WARPS>;
    Ring ring(smem);
    KvmQueries<D, NT> q;
    u32 row = Ring::first(p, it);
    ring.load(p, it, row, 0);
    kvm_cp_commit();
    kvm_prepare_q<BF16>(p, it, q);
    KvmSealedState<NT> sealed = {0, {}};
    for (int place = 0; row < Ring::end(it); place ^= 1, row += Ring::STEP) {
        ring.load(p, it, row + Ring::STEP, place ^ 1);
        kvm_cp_commit();
        kvm_cp_wait<1>();
        kvm_syncwarp(); // the copies of all lanes have landed
        float x[F::TOKENS / 16][NT][4], alpha[NT][2];
        const unsigned char* chunk = ring.places + place * Ring::BYTES;
        kvm_chunk_logits<F>(q, chunk, x);
        kvm_chunk_softmax<F>(p, sight, row, x, st, alpha);
        kvm_chunk_values<F>(chunk + Ring::V_PLACE, x, alpha, st, sealed);
        kvm_syncwarp(); // all lanes have left the place that is filled next
    }
    kvm_cp_wait<0>();
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

template <class F, bool BF16, int D, int NT, int WARPS>
KVM_DEVICE void kvm_decode_quant(const KvmDecode& p, unsigned char* smem) {
    kvm_let_next_start();
    KvmItem it = p.items[kvm_bid()];
    kvm_wait_for_previous();
    if (it.num_queries == 0) return;
    for (;;) {
        KvmState<D, NT> st;
        kvm_clear(st);
        KvmSight<NT> sight = kvm_sight<NT>(p, it);
        if (it.begin < it.sealed_end) kvm_sealed_rows<F, BF16, D, NT, WARPS>(p, it, sight, smem, st);
        if (it.end > it.sealed_end) {
            u32 q[D / 16][NT][2];
            kvm_load_q<D, NT>(p, it, q);
            kvm_sync(); // places of chunks become places of tiles of other warps
            KvmRing<D, 2, WARPS, false> ring(smem);
            ring.begin(p, it);
            ring.template attend<BF16, NT>(p, it, sight, q, st);
        }
        kvm_sync(); // nobody reads tiles or chunks any more
        kvm_meet<BF16, D, NT, WARPS>(p, it, st, (float*)smem);
        if (!it.next) return;
        it = p.items[it.next];
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
