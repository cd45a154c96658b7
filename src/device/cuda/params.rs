//! The structs that kernels take, field by field as `kernels/*.cuh` declare them. Pointers are
//! addresses of device memory, strides are in elements unless said otherwise.

/// What a kernel takes: one struct, by value.
///
/// # Safety
/// The type is `repr(C)` and the one that its kernels declare.
pub unsafe trait Params: Copy + 'static {}

/// `KvmItem`: one part of the rows of one KV head of one sequence, for some of its queries.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Item {
    /// First row of Q, O and LSE.
    pub token: u32,
    /// Queries.
    pub num_queries: u32,
    /// The head.
    pub kv_head: u32,
    /// Index of its first block in the page table.
    pub first_page: u32,
    /// Rows that the last query sees; each one before sees one less.
    pub len: u32,
    /// First row of the part.
    pub begin: u32,
    /// The row after the last of the part.
    pub end: u32,
    /// Rows below lie in sealed blocks.
    pub sealed_end: u32,
    /// First of its `num_parts` partial results.
    pub slot: u32,
    /// Which part.
    pub part: u32,
    /// Parts of the head.
    pub num_parts: u32,
    /// The counter of its parts.
    pub ticket: u32,
    /// Index of the CTA's next item, 0 after its last.
    pub next: u32,
    /// Rows below are evicted; less than a block.
    pub first: u32,
    /// Reserved, 0.
    pub unused: [u32; 2],
}

impl Item {
    /// Words of 32 bits.
    pub const WORDS: usize = size_of::<Self>() / 4;

    /// As the kernels read it.
    pub fn words(&self) -> [u32; Self::WORDS] {
        let Self { token, num_queries, kv_head, first_page, len, begin, end, .. } = *self;
        let Self { sealed_end, slot, part, num_parts, ticket, next, first, .. } = *self;
        let [x, y] = self.unused;
        let words = [token, num_queries, kv_head, first_page, len, begin, end, sealed_end];
        let [a, b, c, d, e, f, g, h] = words;
        [a, b, c, d, e, f, g, h, slot, part, num_parts, ticket, next, first, x, y]
    }
}

/// `KvmDecode`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[expect(missing_docs, reason = "kernels/kvm_attn.cuh describes them")]
pub struct Decode {
    pub q: u64,
    pub o: u64,
    pub lse: u64,
    pub sinks: u64,
    pub pages: u64,
    pub items: u64,
    pub partials: u64,
    pub tickets: u64,
    pub k: u64,
    pub v: u64,
    pub sealed_k: u64,
    pub sealed_v: u64,
    pub q_token: i64,
    pub q_head: i64,
    pub o_token: i64,
    pub o_head: i64,
    pub lse_token: i64,
    pub kv_block: i64,
    pub kv_head: i64,
    pub kv_token: i64,
    pub sealed_block: i64,
    pub sealed_head: i64,
    pub scale: f32,
    pub softcap: f32,
    pub window: u32,
    pub group: u32,
    pub block_size: u32,
    pub rotates: u32,
    pub is_bf16: u32,
}

// SAFETY: the fields of KvmDecode in kernels/kvm_attn.cuh.
unsafe impl Params for Decode {}

/// `KvmAppend`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "kernels/append.cu describes them")]
pub struct Append {
    pub k: u64,
    pub v: u64,
    pub to_k: u64,
    pub to_v: u64,
    pub places: u64,
    pub k_token: i64,
    pub k_head: i64,
    pub v_token: i64,
    pub v_head: i64,
    pub kv_block: i64,
    pub kv_head: i64,
    pub kv_token: i64,
    pub place_token: i64,
    pub place_head: i64,
    pub num_tokens: u32,
    pub num_kv_heads: u32,
    pub dim: u32,
}

// SAFETY: the fields of KvmAppend in kernels/append.cu.
unsafe impl Params for Append {}

/// `KvmSeal`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "kernels/seal.cu describes them")]
pub struct Seal {
    pub memory: u64,
    pub open_cell: i64,
    pub sealed_cell: i64,
    pub sealed_v: i64,
    pub rotates: u32,
    pub num_cells: u32,
    /// Open and sealed.
    pub pages: [[u32; 2]; Self::BLOCKS],
}

impl Seal {
    /// The most blocks of a launch.
    pub const BLOCKS: usize = 500;
}

// SAFETY: the fields of KvmSeal in kernels/seal.cu.
unsafe impl Params for Seal {}

/// `KvmCopyBlocks`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "kernels/blocks.cu describes them")]
pub struct CopyBlocks {
    pub copies: u64,
    pub bytes: u64,
    pub num_copies: u32,
}

// SAFETY: the fields of KvmCopyBlocks in kernels/blocks.cu.
unsafe impl Params for CopyBlocks {}

/// `KvmMoveRows`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "kernels/blocks.cu describes them")]
pub struct MoveRows {
    pub k: u64,
    pub v: u64,
    pub moves: u64,
    pub kv_block: i64,
    pub kv_head: i64,
    pub kv_token: i64,
    pub num_moves: u32,
    pub num_heads: u32,
    pub dim: u32,
}

// SAFETY: the fields of KvmMoveRows in kernels/blocks.cu.
unsafe impl Params for MoveRows {}

/// `KvmNoteQueries`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "kernels/note.cu describes them")]
pub struct NoteQueries {
    pub q: u64,
    pub notes: u64,
    pub q_token: i64,
    pub q_head: i64,
    pub num_tokens: u32,
    pub num_heads: u32,
    pub dim: u32,
    pub layer: u32,
    pub factor: f32,
}

// SAFETY: the fields of KvmNoteQueries in kernels/note.cu.
unsafe impl Params for NoteQueries {}

/// `KvmQuestBounds`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "kernels/score.cu describes them")]
pub struct QuestBounds {
    pub k: u64,
    pub bounds: u64,
    pub cell: i64,
    pub num_blocks: u32,
    pub num_cells: u32,
    pub block_size: u32,
    pub dim: u32,
    /// Page and slot.
    pub blocks: [[u32; 2]; Self::BLOCKS],
}

impl QuestBounds {
    /// The most blocks of a launch.
    pub const BLOCKS: usize = 500;
}

// SAFETY: the fields of KvmQuestBounds in kernels/score.cu.
unsafe impl Params for QuestBounds {}

/// `KvmQuest`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "kernels/score.cu describes them")]
pub struct Quest {
    pub q: u64,
    pub bounds: u64,
    pub slots: u64,
    pub scores: u64,
    pub items: u64,
    pub q_token: i64,
    pub q_head: i64,
    pub bounds_slot: i64,
    pub bounds_head: i64,
    pub num_items: u32,
    pub group: u32,
    pub dim: u32,
}

// SAFETY: the fields of KvmQuest in kernels/score.cu.
unsafe impl Params for Quest {}

/// `KvmTopk`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "kernels/score.cu describes them")]
pub struct Topk {
    pub scores: u64,
    pub pages: u64,
    pub blocks: u64,
    pub list_pages: u64,
    pub items: u64,
    pub num_items: u32,
}

// SAFETY: the fields of KvmTopk in kernels/score.cu.
unsafe impl Params for Topk {}

/// `KvmSeenItem`: some rows of one KV head of one sequence, and the queries that look at them.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[expect(missing_docs, reason = "kernels/obs.cu describes them")]
pub struct SeenItem {
    pub sums: u64,
    pub token: u32,
    pub num_queries: u32,
    pub kv_head: u32,
    pub first_page: u32,
    pub len: u32,
    pub begin: u32,
    pub end: u32,
    pub first: u32,
    pub sum_head: u32,
    pub sum_layer: u32,
}

impl SeenItem {
    /// Words of 32 bits.
    pub const WORDS: usize = size_of::<Self>() / 4;

    /// As the kernels read it.
    pub fn words(&self) -> [u32; Self::WORDS] {
        let Self { sums, token, num_queries, kv_head, first_page, len, begin, end, .. } = *self;
        let Self { first, sum_head, sum_layer, .. } = *self;
        let (low, high) = (sums as u32, (sums >> 32) as u32);
        let words = [low, high, token, num_queries, kv_head, first_page];
        let [a, b, c, d, e, f] = words;
        [a, b, c, d, e, f, len, begin, end, first, sum_head, sum_layer]
    }
}

/// `KvmSeen`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "kernels/obs.cu describes them")]
pub struct Seen {
    pub q: u64,
    pub lse: u64,
    pub pages: u64,
    pub k: u64,
    pub items: u64,
    pub q_token: i64,
    pub q_head: i64,
    pub lse_token: i64,
    pub kv_block: i64,
    pub kv_head: i64,
    pub kv_token: i64,
    pub scale: f32,
    pub softcap: f32,
    pub window: u32,
    pub num_items: u32,
    pub group: u32,
    pub block_size: u32,
    pub layer: u32,
}

// SAFETY: the fields of KvmSeen in kernels/obs.cu.
unsafe impl Params for Seen {}

// The compiler of the kernels pads structs to their alignment as repr(C) does.
const _: () = assert!(size_of::<QuestBounds>() == 3 * 8 + 4 * 4 + 500 * 8);
const _: () = assert!(size_of::<Quest>() == 9 * 8 + 3 * 4 + 4);
const _: () = assert!(size_of::<Topk>() == 5 * 8 + 4 + 4);
const _: () = assert!(size_of::<Decode>() == 22 * 8 + 7 * 4 + 4);
const _: () = assert!(size_of::<Append>() == 14 * 8 + 3 * 4 + 4);
const _: () = assert!(size_of::<Seal>() == 4 * 8 + 2 * 4 + 500 * 8);
const _: () = assert!(size_of::<CopyBlocks>() == 2 * 8 + 4 + 4);
const _: () = assert!(size_of::<MoveRows>() == 6 * 8 + 3 * 4 + 4);
const _: () = assert!(size_of::<NoteQueries>() == 4 * 8 + 5 * 4 + 4);
const _: () = assert!(size_of::<Seen>() == 11 * 8 + 7 * 4 + 4);
// What a kernel can take on any device.
const _: () = assert!(size_of::<Seal>() <= 4096 && size_of::<QuestBounds>() <= 4096);
