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
//   4 bits   1 word a step: register 0 in bits 2-5 and 18-21, 1 in 6-9 and 22-25, 2 in 10-13 and
//            26-29, 3 in 14-17 and 30-33; bits from 32 on are those from 0 on
//   2 bits   1 word for two steps: the first step has register 0 in bits 2-3 and 18-19, 1 in 4-5 and
//            20-21, the second step has them 4 bits higher; registers 2 and 3 are 8 bits above 0 and 1
//
// Codes become f16 in one instruction for two: their bits are put into the fraction of a number whose
// exponent makes the lowest of them worth 1. So 4 bits from bit 2 on are 256 + c, from bit 6 on 16 + c.
// What that adds is what the same fragments of the middle code CENTER give, and is taken away again; so
// the minimum m becomes m + CENTER s. It must not be large: the tensor cores cut off what is 2^-23 or so
// of the largest term. Nor should codes be, whose right operand is rounded to f16 where that of m is not.
//
//   token formats    K, V: s f32 [TOKENS], m f32 [TOKENS] if there is a minimum
//   channel formats  K: s f16 [D], m f16 [D]      V: (s, m) f16 [TOKENS]
#pragma once
#include "kvm_attn.cuh"

/// 4 bits, s and m for each token (the quantizer `int4`).
struct KvmInt4 {
    static constexpr int BITS = 4, TOKENS = 64, FLOATS = 2;
    static constexpr bool IS_PER_CHANNEL = false, HAS_OFFSET = true;
    /// Fragments are middle() plus (code - CENTER) / GAIN.
    static constexpr float GAIN = 1, CENTER = 7.5f;

    KVM_DEVICE static void fragment(const u32* words, int step, u32 (&a)[4]) {
        for (int i = 0; i < 2; i++) {
            u32 x = i ? kvm_rotate_right(words[step], 8) : words[step];
            a[2 * i] = kvm_and_or(x, 0x003c003c, 0x5c005c00);
            a[2 * i + 1] = kvm_and_or(x, 0x03c003c0, 0x4c004c00);
        }
    }
    /// Register r of a fragment of middle codes: 16 and 256 plus 7.5.
    KVM_DEVICE static constexpr u32 middle(int, int r) { return r % 2 ? 0x4de04de0 : 0x5c1e5c1e; }
};

/// The same beside keys of 8 bits, in chunks as short as theirs.
struct KvmShortInt4 : KvmInt4 {
    static constexpr int TOKENS = 32;
};

/// 8 bits, s for each token (the quantizer `int8`). Codes are stored with 128 added.
struct KvmInt8 {
    static constexpr int BITS = 8, TOKENS = 32, FLOATS = 1;
    static constexpr bool IS_PER_CHANNEL = false, HAS_OFFSET = true;
    static constexpr float GAIN = 1, CENTER = 0;

    KVM_DEVICE static void fragment(const u32* words, int step, u32 (&a)[4]) {
        for (int i = 0; i < 2; i++) {
            u32 x = words[2 * step + i];
            a[2 * i] = kvm_prmt(x, 0x64646464, 0x4140);
            a[2 * i + 1] = kvm_prmt(x, 0x64646464, 0x4342);
        }
    }
    KVM_DEVICE static constexpr u32 middle(int, int) { return 0x64806480; } // 1024 + 128
};

/// E4M3 and s for each token (the quantizer `fp8(e4m3)`). Bits are moved, so f16 sees x / 256.
struct KvmE4m3 {
    static constexpr int BITS = 8, TOKENS = 32, FLOATS = 1;
    static constexpr bool IS_PER_CHANNEL = false, HAS_OFFSET = false;
    static constexpr float GAIN = 256, CENTER = 0;

    KVM_DEVICE static void fragment(const u32* words, int step, u32 (&a)[4]) {
        for (int i = 0; i < 2; i++) {
            u32 low = kvm_prmt(words[2 * step + i], 0, 0x1404);
            u32 high = kvm_prmt(words[2 * step + i], 0, 0x3424);
            a[2 * i] = kvm_and_or(low, 0x80008000, low >> 1 & 0x3f803f80);
            a[2 * i + 1] = kvm_and_or(high, 0x80008000, high >> 1 & 0x3f803f80);
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
    static constexpr bool IS_PER_CHANNEL = true, HAS_OFFSET = true;
    static constexpr float GAIN = 1, CENTER = 1.5f;

    KVM_DEVICE static void fragment(const u32* words, int step, u32 (&a)[4]) {
        for (int i = 0; i < 2; i++) {
            // All from bit 6 on: codes are so small that more added would be felt.
            u32 x = kvm_rotate_right(words[step / 2], (step % 2 * 4 + i * 8 + 28) % 32);
            a[2 * i] = kvm_and_or(x, 0x00c000c0, 0x4c004c00);
            a[2 * i + 1] = kvm_and_or(x, 0x03000300, 0x44004400);
        }
    }
    /// 16 and 4 plus 1.5.
    KVM_DEVICE static constexpr u32 middle(int, int r) { return r % 2 ? 0x45804580 : 0x4c604c60; }
};

/// Sizes of a chunk, of which keys and values may have formats of their own.
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
