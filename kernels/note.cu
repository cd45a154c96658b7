// The last queries of sequences whose policies ask for them (src/sequence/ring.rs).
#include "kvm_types.cuh"

/// Where the query of a token goes.
struct KvmNote {
    u64 ring; // 0: it is not noted
    int position;
    u32 capacity; // queries of a layer of the ring, a multiple of 2; the place is position % capacity
};

/// What is known of a noted query besides its elements. A factor of 0: no query.
struct KvmNoted {
    int position;
    float factor; // what the policy multiplies it by
};

/// A ring has, for each layer, [capacity] of KvmNoted, then queries [capacity, q_head, dim]. Strides are in
/// elements; all rows are aligned to 16 bytes; `dim` is a multiple of 8; num_tokens * num_heads * dim / 8 is
/// below 2^32.
struct KvmNoteQueries {
    const u16* q; // [token, q_head, dim]
    const KvmNote* notes; // of each token; no two have one place
    i64 q_token, q_head;
    u32 num_tokens, num_heads, dim, layer;
    float factor;
};

/// Any number of CTAs of 256 threads; a thread copies eight elements.
KVM_KERNEL(256, 4, kvm_note_queries, KvmNoteQueries) {
    u32 chunks = p.num_heads * p.dim / 8, total = p.num_tokens * chunks;
    for (u64 i = (u64)kvm_bid() * 256 + kvm_tid(); i < total; i += (u64)kvm_grid() * 256) {
        u32 token = (u32)i / chunks, chunk = (u32)i % chunks;
        KvmNote note = p.notes[token];
        if (note.ring == 0) continue;
        u64 row = (u64)p.num_heads * p.dim * 2, place = (u32)note.position % note.capacity;
        u64 layer = note.ring + p.layer * (note.capacity * (sizeof(KvmNoted) + row));
        if (chunk == 0) ((KvmNoted*)layer)[place] = {note.position, p.factor};
        u64 to = layer + note.capacity * sizeof(KvmNoted) + place * row + chunk * 16;
        u32 head = chunk * 8 / p.dim, d = chunk * 8 % p.dim;
        *(u32x4*)to = *(const u32x4*)(p.q + token * p.q_token + head * p.q_head + d);
    }
}
