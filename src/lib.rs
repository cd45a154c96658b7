//! libkvmgr: the KV cache of an LLM inference engine behind one stable C ABI.

pub mod attention;
pub mod block;
pub mod cache;
pub mod device;
pub mod dtype;
pub mod error;
pub mod evictor;
pub mod ffi;
pub mod log;
pub mod manager;
mod order;
pub mod policy;
pub mod quantizer;
pub mod registry;
pub mod selector;
pub mod sequence;
pub mod shape;
pub mod simd;
pub mod slots;
pub mod spec;
pub mod store;
mod sync;
pub mod tier;
