// Blocks and rows change places: copy on write, staging for a swap, and the rows that a policy keeps.
// No target is a source of the same launch, and no two targets overlap.
#include "kvm_intrin.cuh"

/// Addresses that the device can reach, multiples of 16.
struct KvmCopy {
    u64 from, to;
};

struct KvmCopyBlocks {
    const KvmCopy* copies;
    u64 bytes; // of each copy; a multiple of 16
    u32 num_copies;
};

/// A row of an open block becomes a row of another: K and V of `num_heads` heads from `kv_head` on.
struct KvmMove {
    u32 from_page, from_row, to_page, to_row, kv_head;
};

/// Strides are in elements. All rows are aligned to 16 bytes and `dim` is a multiple of 8;
/// num_moves * num_heads * dim / 8 is below 2^32. Block `page` is `page` strides from k, v.
struct KvmMoveRows {
    u16 *k, *v;
    const KvmMove* moves;
    i64 kv_block, kv_head, kv_token;
    u32 num_moves, num_heads, dim;
};

/// Any number of CTAs of 256 threads. Each takes pieces of 1024 vectors, four for each thread.
KVM_KERNEL(256, 4, kvm_copy_blocks, KvmCopyBlocks) {
    u64 vectors = p.bytes / 16, pieces = (vectors + 1023) / 1024;
    for (u64 i = kvm_bid(); i < pieces * p.num_copies; i += kvm_grid()) {
        KvmCopy copy = p.copies[i / pieces];
        const u32x4* from = (const u32x4*)copy.from;
        u32x4* to = (u32x4*)copy.to;
        u64 first = i % pieces * 1024 + kvm_tid();
        u32x4 x[4]; // all reads before the first write
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (first + j * 256 < vectors) x[j] = from[first + j * 256];
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (first + j * 256 < vectors) to[first + j * 256] = x[j];
    }
}

/// Any number of CTAs of 256 threads; a thread moves eight elements of K and of V.
KVM_KERNEL(256, 4, kvm_move_rows, KvmMoveRows) {
    u32 chunks = p.dim / 8, total = p.num_moves * p.num_heads * chunks;
    for (u64 i = (u64)kvm_bid() * 256 + kvm_tid(); i < total; i += (u64)kvm_grid() * 256) {
        u32 row = (u32)i / chunks, d = (u32)i % chunks * 8;
        KvmMove move = p.moves[row / p.num_heads];
        i64 head = (move.kv_head + row % p.num_heads) * p.kv_head + d;
        i64 from = move.from_page * p.kv_block + move.from_row * p.kv_token + head;
        i64 to = move.to_page * p.kv_block + move.to_row * p.kv_token + head;
        u32x4 x = *(const u32x4*)(p.k + from), y = *(const u32x4*)(p.v + from);
        *(u32x4*)(p.k + to) = x;
        *(u32x4*)(p.v + to) = y;
    }
}
