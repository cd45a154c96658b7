// New keys and values become rows of open blocks.
#include "kvm_types.cuh"

/// The row of an open block that a row of K and V goes to.
struct KvmPlace {
    u32 page; // ~0: the row is not stored
    u32 row;
};

/// Strides are in elements. All rows are aligned to 16 bytes and `dim` is a multiple of 8;
/// num_tokens * num_kv_heads * dim / 8 is below 2^32.
struct KvmAppend {
    const void *k, *v; // [token, kv_head, dim]
    u16 *to_k, *to_v;  // open blocks; block `page` is `page` strides from here
    const KvmPlace* places; // of head h of token t: t * place_token + h * place_head
    i64 k_token, k_head, v_token, v_head, kv_block, kv_head, kv_token, place_token, place_head;
    u32 num_tokens, num_kv_heads, dim;
};

/// Eight elements of K and of V of a row, for each thread.
template <u32 FROM, u32 TO> KVM_DEVICE void kvm_append(const KvmAppend& p) {
    u32 chunks = p.dim / 8, total = p.num_tokens * p.num_kv_heads * chunks;
    for (u64 i = (u64)kvm_bid() * 256 + kvm_tid(); i < total; i += (u64)kvm_grid() * 256) {
        u32 row = (u32)i / chunks, d = (u32)i % chunks * 8;
        i64 token = row / p.num_kv_heads, head = row % p.num_kv_heads;
        KvmPlace place = p.places[token * p.place_token + head * p.place_head];
        if (place.page == ~0u) continue;
        i64 k = token * p.k_token + head * p.k_head + d;
        i64 v = token * p.v_token + head * p.v_head + d;
        i64 to = place.page * p.kv_block + head * p.kv_head + place.row * p.kv_token + d;
        if constexpr (FROM == TO) { // bit for bit
            u32x4 x = *(const u32x4*)((const u16*)p.k + k), y = *(const u32x4*)((const u16*)p.v + v);
            *(u32x4*)(p.to_k + to) = x;
            *(u32x4*)(p.to_v + to) = y;
        } else {
            float x[8], y[8];
            kvm_load8<FROM>(p.k, k, x);
            kvm_load8<FROM>(p.v, v, y);
            kvm_store8<TO>(p.to_k, to, x);
            kvm_store8<TO>(p.to_v, to, y);
        }
    }
}

/// kvm_append_<of K and V>_<of the blocks>: any number of CTAs of 256 threads.
KVM_KERNEL(256, 4, kvm_append_f16_f16, KvmAppend) { kvm_append<KVM_F16, KVM_F16>(p); }
KVM_KERNEL(256, 4, kvm_append_bf16_f16, KvmAppend) { kvm_append<KVM_BF16, KVM_F16>(p); }
KVM_KERNEL(256, 4, kvm_append_f32_f16, KvmAppend) { kvm_append<KVM_F32, KVM_F16>(p); }
KVM_KERNEL(256, 4, kvm_append_f16_bf16, KvmAppend) { kvm_append<KVM_F16, KVM_BF16>(p); }
KVM_KERNEL(256, 4, kvm_append_bf16_bf16, KvmAppend) { kvm_append<KVM_BF16, KVM_BF16>(p); }
KVM_KERNEL(256, 4, kvm_append_f32_bf16, KvmAppend) { kvm_append<KVM_F32, KVM_BF16>(p); }
