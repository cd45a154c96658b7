// Sealed blocks of small integers or 8-bit floats, in the order of the tensor cores' fragments.
//
// A cell side of 64 tokens is cut into chunks of TOKENS tokens, one after the other:
//
//   K chunk   codes [tile of 16 tokens][piece][lane][W words]     then what they are scaled by
//   V chunk   codes [tile of 16 channels][piece][lane][W words]   then what they are scaled by
//
// The words of a lane are its fragments of a left operand: of K, whose rows are tokens, for all steps
// of 16 channels; of V^T, whose rows are channels, for all steps of 16 tokens. W is 4, a load of 16
// bytes, or what there is if that is less. With g = lane / 4 and t = lane % 4, a fragment has the
// elements (row, column) = (g, 2t), (g, 2t+1) | (g+8, 2t), (g+8, 2t+1) | (g, 2t+8), (g, 2t+9) |
// (g+8, 2t+8), (g+8, 2t+9): the four registers of the operand.
//
//   8 bits   2 words a step: bytes in this order
//   4 bits   1 word a step: register 0 in bits 0-3 and 16-19, 1 in 4-7 and 20-23, 2 in 8-11 and
//            24-27, 3 in 12-15 and 28-31
//   2 bits   1 word for two steps: as 4 bits, the first step in the lower two bits of pairs of
//            register 0 and 1 (0-1, 16-17 and 2-3, 18-19), the second above (4-5, 20-21 and 6-7,
//            22-23); registers 2 and 3 8 bits higher
//
// Codes become f16 by putting them into the fraction of 1024: 1024 + c, or 1024 + 4c and so on for
// higher bits. What that adds is known from the sum of the right operand, as the tensor cores see it,
// and taken away again; the factor of rows g+8 goes into their result, that of second steps into the
// right operand. So the codes themselves cost one instruction for two.
//
//   token formats    K, V: s f32 [TOKENS], m f32 [TOKENS] if there is a minimum
//   channel formats  K: s f16 [D], m f16 [D]      V: (s, m) f16 [TOKENS]
#pragma once
#include "kvm_attn.cuh"

/// 4 bits, s and m for each token (the quantizer `int4`).
struct KvmInt4 {
    static constexpr int BITS = 4, TOKENS = 64, FLOATS = 2;
    static constexpr bool IS_PER_CHANNEL = false;
    /// Fragments are (OFFSET + code * (1 or HIGH_ROW)) / GAIN.
    static constexpr float OFFSET = 1024, GAIN = 1, HIGH_ROW = 16, SECOND = 1;

    KVM_DEVICE static void fragment(const u32* words, int step, u32 (&a)[4]) {
        u32 x = words[step];
        a[0] = kvm_and_or(x, 0x000f000f, 0x64006400), a[1] = kvm_and_or(x, 0x00f000f0, 0x64006400);
        x >>= 8;
        a[2] = kvm_and_or(x, 0x000f000f, 0x64006400), a[3] = kvm_and_or(x, 0x00f000f0, 0x64006400);
    }
};

/// 8 bits, s for each token (the quantizer `int8`). Codes are stored with 128 added.
struct KvmInt8 {
    static constexpr int BITS = 8, TOKENS = 32, FLOATS = 1;
    static constexpr bool IS_PER_CHANNEL = false;
    static constexpr float OFFSET = 1152, GAIN = 1, HIGH_ROW = 1, SECOND = 1;

    KVM_DEVICE static void fragment(const u32* words, int step, u32 (&a)[4]) {
        for (int i = 0; i < 2; i++) {
            u32 x = words[2 * step + i];
            a[2 * i] = kvm_prmt(x, 0x64646464, 0x4140);
            a[2 * i + 1] = kvm_prmt(x, 0x64646464, 0x4342);
        }
    }
};

/// E4M3 and s for each token (the quantizer `fp8(e4m3)`). Bits are moved, so f16 sees x / 256.
struct KvmE4m3 {
    static constexpr int BITS = 8, TOKENS = 32, FLOATS = 1;
    static constexpr bool IS_PER_CHANNEL = false;
    static constexpr float OFFSET = 0, GAIN = 256, HIGH_ROW = 1, SECOND = 1;

    KVM_DEVICE static void fragment(const u32* words, int step, u32 (&a)[4]) {
        for (int i = 0; i < 2; i++) {
            u32 low = kvm_prmt(words[2 * step + i], 0, 0x1404);
            u32 high = kvm_prmt(words[2 * step + i], 0, 0x3424);
            a[2 * i] = (low & 0x80008000) | ((low & 0x7f007f00) >> 1);
            a[2 * i + 1] = (high & 0x80008000) | ((high & 0x7f007f00) >> 1);
        }
    }
};

/// 4 bits, keys scaled by channel (the quantizer `kivi(bits=4)` with groups of a block or more).
struct KvmKivi4 : KvmInt4 {
    static constexpr bool IS_PER_CHANNEL = true;
};

/// 2 bits, keys scaled by channel (the quantizer `kivi(bits=2)` with groups of a block or more).
struct KvmKivi2 {
    static constexpr int BITS = 2, TOKENS = 64, FLOATS = 2;
    static constexpr bool IS_PER_CHANNEL = true;
    static constexpr float OFFSET = 1024, GAIN = 1, HIGH_ROW = 4, SECOND = 1.f / 16;

    KVM_DEVICE static void fragment(const u32* words, int step, u32 (&a)[4]) {
        u32 x = words[step / 2], first = step % 2 ? 0x00300030 : 0x00030003, second = first << 2;
        a[0] = kvm_and_or(x, first, 0x64006400), a[1] = kvm_and_or(x, second, 0x64006400);
        x >>= 8;
        a[2] = kvm_and_or(x, first, 0x64006400), a[3] = kvm_and_or(x, second, 0x64006400);
    }
};

/// Sizes of a chunk.
template <class F, int D> struct KvmChunk {
    static constexpr int CODES = F::TOKENS * D * F::BITS / 8;
    static constexpr int K = CODES + (F::IS_PER_CHANNEL ? 4 * D : 4 * F::FLOATS * F::TOKENS);
    static constexpr int V = CODES + (F::IS_PER_CHANNEL ? 4 * F::TOKENS : 4 * F::FLOATS * F::TOKENS);
    /// Words of a lane for a tile of K and for one of V.
    static constexpr int K_WORDS = D * F::BITS / 64, V_WORDS = F::TOKENS * F::BITS / 64;
};

/// Two 16-bit elements as floats.
template <bool BF16> KVM_DEVICE void kvm_unpack_pair(u32 pair, float (&x)[2]) {
    x[0] = BF16 ? kvm_float(pair << 16) : kvm_half_to_float(pair & 0xffff);
    x[1] = BF16 ? kvm_float(pair & 0xffff0000) : kvm_half_to_float(pair >> 16);
}

/// The words of this lane for one tile.
template <int WORDS> KVM_DEVICE void kvm_words(const unsigned char* codes, int tile, u32 (&w)[WORDS]) {
    constexpr int W = WORDS < 4 ? WORDS : 4;
    const u32* from = (const u32*)codes + tile * WORDS * 32 + kvm_tid() % 32 * W;
#pragma unroll
    for (int i = 0; i < WORDS / W; i++) {
        struct alignas(4 * W) Words {
            u32 x[W];
        } words = *(const Words*)(from + i * 32 * W);
        for (int j = 0; j < W; j++) w[i * W + j] = words.x[j];
    }
}
