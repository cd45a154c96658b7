// Full open blocks become sealed ones: f16 or bf16 rows to the codes of a quantizer, to the bit as on the
// CPU (src/quantizer, src/simd/encode.rs), in the layout that kvm_quant.cuh describes.
//
// A launch does many blocks, a CTA one side of a cell of 64 tokens. Its warps read rows, make them finite and
// rotate them if keys or values are kept rotated; codes and what they are scaled by meet in shared memory,
// from where they are written fragment by fragment. Only the sign of a minimum that is 0 can be another one.
#include "kvm_quant.cuh"
#include "kvm_rows.cuh"

/// Blocks of a launch, so many that parameters fit 4 KiB.
static constexpr u32 KVM_SEAL_BLOCKS = 500;

/// A block is `num_cells` cells, each the K side [64, D] before the V side. `open_cell`, `sealed_cell` and
/// `sealed_v`, where the V side of a cell starts, are bytes.
struct KvmSeal {
    unsigned char* memory; // page i starts 256 * i bytes behind
    i64 open_cell, sealed_cell, sealed_v;
    u32 rotates; // 1: keys, 2: values, 3: both are rotated
    u32 num_cells;
    struct {
        u32 open, sealed;
    } pages[KVM_SEAL_BLOCKS]; // where blocks start; the grid says how many there are
};

template <class A, class B> struct KvmIsSame {
    static constexpr bool VALUE = false;
};
template <class A> struct KvmIsSame<A, A> {
    static constexpr bool VALUE = true;
};

/// What a CTA keeps in shared memory: rows as floats, codes, and for each token or channel s and m.
template <int D> struct KvmSealed {
    float rows[64][D];
    float s[D], m[D]; // at least of 64 tokens
    unsigned char codes[64][D];
};

/// Adding them rounds half to even and leaves an integer in the low bits.
static constexpr float KVM_ROUND = 12582912.f, KVM_ROUND_POSITIVE = 8388608.f;
static constexpr float KVM_LEAST_NORMAL = 1.17549435e-38f;

/// What scaled values are divided by: infinity where s is too small to divide.
KVM_DEVICE float kvm_divisor(float s) { return s >= KVM_LEAST_NORMAL ? s : kvm_infinity(); }

/// x / s rounded to E4M3, half to even.
KVM_DEVICE u32 kvm_e4m3(float x) {
    float size = x < 0 ? -x : x;
    size = size > 448 ? 448 : size;
    // Denormals count multiples of 2^-9.
    u32 small = kvm_bits(kvm_add(kvm_multiply(size, 512), KVM_ROUND)) & 0xff;
    u32 bits = kvm_bits(size), rounded = bits + 0x7ffff + (bits >> 20 & 1);
    u32 code = size < 0.015625f ? small : (rounded >> 20) - (120 << 3);
    return (code & 0xff) | (x < 0 ? 0x80 : 0);
}

/// The range of a row that a warp holds.
template <int N> KVM_DEVICE void kvm_range(const float (&x)[N], float& low, float& high) {
    float most = -kvm_infinity(), negated = -kvm_infinity();
#pragma unroll
    for (int i = 0; i < N; i++) {
        most = x[i] > most ? x[i] : most;
        negated = -x[i] > negated ? -x[i] : negated;
    }
    high = kvm_max_lanes(most), low = -kvm_max_lanes(negated);
}

/// Scales of KIVI for a range, rounded to f16, and the inverse, 0 where there is no range.
template <class F> KVM_DEVICE void kvm_kivi_scale(float low, float high, float& s, float& m, float& inverse) {
    constexpr float TOP = (1 << F::BITS) - 1;
    m = kvm_half_to_float(kvm_pack<false>(low, 0) & 0xffff);
    float range = kvm_add(high, -m);
    s = kvm_half_to_float(kvm_pack<false>(kvm_divide(range > 0 ? range : 0, TOP), 0) & 0xffff);
    inverse = s == 0 ? 0 : kvm_divide(1, s);
}

/// (x - m) / s of KIVI as a code.
template <class F> KVM_DEVICE u32 kvm_kivi_code(float x, float m, float inverse) {
    constexpr float TOP = (1 << F::BITS) - 1;
    float y = kvm_multiply(kvm_add(x, -m), inverse);
    y = y > 0 ? y : 0;
    y = y < TOP ? y : TOP;
    return kvm_bits(kvm_add(y, KVM_ROUND_POSITIVE)) & ((1 << F::BITS) - 1);
}

/// Codes of a row that a warp holds, with its s and m.
template <class F, int N>
KVM_DEVICE void kvm_encode_row(float (&x)[N], bool is_kivi, u32 (&codes)[N], float& s, float& m) {
    constexpr bool IS_8_BITS = F::BITS == 8;
    float low, high, inverse;
    kvm_sanitize(x, is_kivi ? 65504.f : KVM_MOST / (F::BITS == 8 && F::HAS_OFFSET ? 2 : 4));
    kvm_range(x, low, high);
    if (is_kivi) {
        kvm_kivi_scale<F>(low, high, s, m, inverse);
#pragma unroll
        for (int i = 0; i < N; i++) codes[i] = kvm_kivi_code<F>(x[i], m, inverse);
        return;
    }
    float most = kvm_float(kvm_bits(high > -low ? high : -low) & 0x7fffffff);
    m = low;
    if (IS_8_BITS) s = kvm_divide(most, F::HAS_OFFSET ? 127.f : 448.f);
    else s = kvm_divide(kvm_add(high, -low), 15);
    float divisor = kvm_divisor(s);
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (!IS_8_BITS) {
            float y = kvm_divide(kvm_add(x[i], -low), divisor);
            codes[i] = kvm_bits(kvm_add(y < 15 ? y : 15, KVM_ROUND)) & 15;
        } else if (F::HAS_OFFSET) {
            codes[i] = (kvm_bits(kvm_add(kvm_divide(x[i], divisor), KVM_ROUND)) + 128) & 0xff;
        } else {
            codes[i] = kvm_e4m3(kvm_divide(x[i], divisor));
        }
    }
}

/// Keys of KIVI: a thread encodes a channel.
template <class F, int D> KVM_DEVICE void kvm_encode_channels(KvmSealed<D>& shared) {
    for (u32 c = kvm_tid(); c < D; c += 128) {
        // As kvm_sanitize, over the tokens.
        float most = 0, low = kvm_infinity(), high = -kvm_infinity(), s, m, inverse;
        for (int t = 0; t < 64; t++) {
            float x = shared.rows[t][c], size = x < 0 ? -x : x;
            if (size < kvm_infinity() && size > most) most = size;
        }
        if (most > 65504) most = 65504;
        for (int t = 0; t < 64; t++) {
            float x = shared.rows[t][c];
            x = x != x ? 0 : x < -most ? -most : x > most ? most : x;
            shared.rows[t][c] = x;
            low = x < low ? x : low, high = x > high ? x : high;
        }
        kvm_kivi_scale<F>(low, high, s, m, inverse);
        shared.s[c] = s, shared.m[c] = m;
        for (int t = 0; t < 64; t++)
            shared.codes[t][c] = (unsigned char)kvm_kivi_code<F>(shared.rows[t][c], m, inverse);
    }
}

/// Rows of a side of an open cell to codes in shared memory.
template <class F, u32 TYPE, int D>
KVM_DEVICE void kvm_encode_side(const u16* rows, bool is_key, bool is_rotated, KvmSealed<D>& shared) {
    constexpr int N = D / 32;
    u32 lane = kvm_tid() % 32;
    for (u32 t = kvm_tid() / 32; t < 64; t += 4) {
        float x[N];
        kvm_load_lane<TYPE, N>(rows, t * D + lane * N, x);
        if (is_rotated) {
            kvm_sanitize(x, KVM_ROTATED_MOST);
            kvm_rotate<D>(x);
        }
        if (F::IS_PER_CHANNEL && is_key) {
            for (int i = 0; i < N; i++) shared.rows[t][lane * N + i] = x[i];
            continue;
        }
        u32 codes[N];
        float s, m;
        kvm_encode_row<F>(x, F::IS_PER_CHANNEL, codes, s, m);
        for (int i = 0; i < N; i++) shared.codes[t][lane * N + i] = (unsigned char)codes[i];
        if (lane == 0) shared.s[t] = s, shared.m[t] = m;
    }
    if (F::IS_PER_CHANNEL && is_key) {
        kvm_sync();
        kvm_encode_channels<F>(shared);
    }
    kvm_sync();
}

/// A word of codes as fragments have it; `code(row, column)` is that of an element.
template <class F, class Code> KVM_DEVICE u32 kvm_code_word(u32 tile, u32 word, u32 lane, const Code& code) {
    u32 x = 0;
#pragma unroll
    for (u32 i = 0; i < 32 / F::BITS; i++) {
        // For 8 bits a word has half a step, for 2 bits two.
        u32 element = F::BITS == 8 ? word % 2 * 4 + i : i % 8;
        u32 step = F::BITS == 8 ? word / 2 : F::BITS == 4 ? word : word * 2 + i / 8;
        u32 r = element / 2, low = element % 2;
        u32 bits = code(tile * 16 + lane / 4 + r % 2 * 8, step * 16 + lane % 4 * 2 + low + r / 2 * 8);
        u32 at = F::BITS == 8   ? 8 * (r % 2 * 2 + low)
                 : F::BITS == 4 ? 2 + 16 * low + 4 * (r % 2) + 8 * (r / 2)
                                : 2 + 16 * low + 2 * (r % 2) + 8 * (r / 2) + 4 * (step % 2);
        x |= kvm_rotate_right(bits, (32 - at) % 32);
    }
    return x;
}

/// Writes a side of a cell: its chunks, each codes and what they are scaled by.
template <class F, int D>
KVM_DEVICE void kvm_write_side(const KvmSealed<D>& shared, bool is_key, unsigned char* out) {
    using Chunk = KvmChunk<F, D>;
    for (u32 first = 0; first < 64; first += F::TOKENS, out += is_key ? Chunk::K : Chunk::V) {
        u32 words = is_key ? Chunk::K_WORDS : Chunk::V_WORDS, width = words < 4 ? words : 4;
        for (u32 i = kvm_tid(); i < Chunk::CODES / 4; i += 128) {
            u32 tile = i / (words * 32), piece = i / (width * 32) % (words / width);
            u32 lane = i / width % 32, word = piece * width + i % width;
            ((u32*)out)[i] = kvm_code_word<F>(tile, word, lane, [&](u32 row, u32 column) -> u32 {
                return is_key ? shared.codes[first + row][column] : shared.codes[first + column][row];
            });
        }
        float* scales = (float*)(out + Chunk::CODES);
        u32* pairs = (u32*)scales;
        if (F::IS_PER_CHANNEL && is_key) { // all s, then all m
            for (u32 i = kvm_tid(); i < D; i += 128) {
                const float* from = i < D / 2 ? shared.s + 2 * i : shared.m + 2 * i - D;
                pairs[i] = kvm_pack<false>(from[0], from[1]);
            }
        } else {
            for (u32 i = kvm_tid(); i < F::TOKENS; i += 128) {
                float s = shared.s[first + i], m = shared.m[first + i];
                if (F::IS_PER_CHANNEL) pairs[i] = kvm_pack<false>(s, m);
                else scales[i] = s;
                if (!F::IS_PER_CHANNEL && F::FLOATS == 2) scales[F::TOKENS + i] = m;
            }
        }
    }
}

/// What a CTA does with its side.
template <class F, u32 TYPE, int D>
KVM_DEVICE void kvm_seal_side(const u16* rows, bool is_key, bool is_rotated, KvmSealed<D>& shared,
                              unsigned char* out) {
    kvm_encode_side<F, TYPE, D>(rows, is_key, is_rotated, shared);
    kvm_write_side<F, D>(shared, is_key, out);
}

template <class K, class V, u32 TYPE, int D>
KVM_DEVICE void kvm_seal(const KvmSeal& p, unsigned char* smem) {
    KvmSealed<D>& shared = *(KvmSealed<D>*)smem;
    u32 side = kvm_bid() % 2, block = kvm_bid() / 2 / p.num_cells;
    i64 cell = kvm_bid() / 2 % p.num_cells;
    const unsigned char* open = p.memory + (u64)p.pages[block].open * 256 + cell * p.open_cell;
    unsigned char* sealed = p.memory + (u64)p.pages[block].sealed * 256 + cell * p.sealed_cell;
    const u16* rows = (const u16*)open + side * 64 * D;
    bool is_rotated = p.rotates >> side & 1;
    // Sides of one format share what is done with them.
    if (!KvmIsSame<K, V>::VALUE && side == 0)
        return kvm_seal_side<K, TYPE, D>(rows, true, is_rotated, shared, sealed);
    kvm_seal_side<V, TYPE, D>(rows, side == 0, is_rotated, shared, sealed + side * p.sealed_v);
}

/// Two CTAs of 128 threads for each cell of each block, with (64 * 5 + 8) * D bytes of shared memory.
#define KVM_SEAL(name, K, V, TYPE, D)                                                             \
    KVM_KERNEL(128, 2, name, KvmSeal) {                                                           \
        KVM_DYN_SMEM(smem);                                                                       \
        kvm_seal<K, V, TYPE, D>(p, smem);                                                         \
    }
#define KVM_SEALS(format, K, V)                                                                   \
    KVM_SEAL(kvm_seal_##format##_f16_d64, K, V, KVM_F16, 64)                                      \
    KVM_SEAL(kvm_seal_##format##_f16_d128, K, V, KVM_F16, 128)                                    \
    KVM_SEAL(kvm_seal_##format##_f16_d256, K, V, KVM_F16, 256)                                    \
    KVM_SEAL(kvm_seal_##format##_bf16_d64, K, V, KVM_BF16, 64)                                    \
    KVM_SEAL(kvm_seal_##format##_bf16_d128, K, V, KVM_BF16, 128)                                  \
    KVM_SEAL(kvm_seal_##format##_bf16_d256, K, V, KVM_BF16, 256)

KVM_SEALS(int8, KvmInt8, KvmInt8)
KVM_SEALS(fp8e4m3, KvmE4m3, KvmE4m3)
KVM_SEALS(int4, KvmInt4, KvmInt4)
KVM_SEALS(kivi4, KvmKivi4, KvmKivi4)
KVM_SEALS(kivi2, KvmKivi2, KvmKivi2)
KVM_SEALS(int8_int4, KvmInt8, KvmShortInt4)
