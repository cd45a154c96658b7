// Attention of the same queries over several sets of rows becomes attention over all of them.
//
//   m = max lse[i]    l = sum exp(lse[i] - m)    o = sum exp(lse[i] - m) o[i] / l    lse = m + ln l
#include "kvm_types.cuh"

/// What one set of rows gave. Strides are in elements; rows of O are aligned to 16 bytes.
struct KvmMergePart {
    const void* o;    // [token, head, dim]; rows whose lse is -inf are not read
    const float* lse; // [token, head], natural logarithm
    i64 o_token, o_head, lse_token, lse_head;
    u32 type, reserved; // KVM_F16, KVM_BF16 or KVM_F32
};

/// Rows without any part get zeros and -inf. `o` may be that of a part of the same type and strides;
/// `lse` may be null, but not be that of a part. `dim` is a multiple of 8;
/// num_tokens * num_heads * dim / 8 is below 2^32.
struct KvmMerge {
    const KvmMergePart* parts;
    void* o;
    float* lse;
    i64 o_token, o_head, lse_token, lse_head;
    u32 num_parts, num_tokens, num_heads, dim, type;
};

/// Any number of CTAs of 256 threads; a thread merges eight elements of a row.
KVM_KERNEL(256, 2, kvm_merge_parts, KvmMerge) {
    u32 chunks = p.dim / 8, total = p.num_tokens * p.num_heads * chunks;
    for (u64 i = (u64)kvm_bid() * 256 + kvm_tid(); i < total; i += (u64)kvm_grid() * 256) {
        u32 row = (u32)i / chunks, d = (u32)i % chunks * 8;
        i64 token = row / p.num_heads, head = row % p.num_heads;
        float max = -kvm_infinity(), sum = 0, o[8] = {};
        for (u32 j = 0; j < p.num_parts; j++) {
            const KvmMergePart& part = p.parts[j];
            float lse = part.lse[token * part.lse_token + head * part.lse_head];
            if (lse == -kvm_infinity()) continue;
            float rise = lse > max ? lse : max, x[8];
            float a = kvm_exp2((max - rise) * 1.4426950408889634f);
            float b = kvm_exp2((lse - rise) * 1.4426950408889634f);
            kvm_load8(part.type, part.o, token * part.o_token + head * part.o_head + d, x);
#pragma unroll
            for (int e = 0; e < 8; e++) o[e] = o[e] * a + x[e] * b;
            sum = sum * a + b;
            max = rise;
        }
        float inverse = sum == 0 ? 0 : 1 / sum;
#pragma unroll
        for (int e = 0; e < 8; e++) o[e] *= inverse;
        kvm_store8(p.type, p.o, token * p.o_token + head * p.o_head + d, o);
        if (p.lse && d == 0)
            p.lse[token * p.lse_token + head * p.lse_head] =
                max + kvm_log2(sum) * 0.6931471805599453f;
    }
}
