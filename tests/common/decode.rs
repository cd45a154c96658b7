//! What the kernels of attention are launched with.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses a part")]

/// `KvmItem` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Item {
    pub token: u32,
    pub num_queries: u32,
    pub kv_head: u32,
    pub first_page: u32,
    pub len: u32,
    pub begin: u32,
    pub end: u32,
    pub sealed_end: u32,
    pub slot: u32,
    pub part: u32,
    pub num_parts: u32,
    pub ticket: u32,
    pub next: u32,
    pub unused: [u32; 3],
}

/// `KvmDecode` of the kernels.
#[repr(C)]
#[derive(Debug)]
pub struct Params {
    pub q: *const u16,
    pub o: *mut u16,
    pub lse: *mut f32,
    pub sinks: *const f32,
    pub pages: *const u32,
    pub items: *const Item,
    pub partials: *mut f32,
    pub tickets: *mut u32,
    pub open: [*const u16; 2],
    pub sealed: [*const u8; 2],
    pub strides: [i64; 10],
    pub scale: f32,
    pub softcap: f32,
    pub window: u32,
    pub group: u32,
    pub block_size: u32,
}
