//! The C ABI: validation, conversion and a panic guard around the Rust API, and nothing else.
//!
//! The doc comments in this folder become the text of `include/kvmgr.h`; they are written for the C
//! reader. Functions are plain items, never made by macros, because cbindgen does not expand those.

#![expect(unsafe_code, reason = "the C ABI receives raw pointers")]
#![expect(clippy::missing_safety_doc, reason = "the contract is stated in the words of C")]
#![expect(non_camel_case_types, reason = "C names")]
#![expect(rustdoc::broken_intra_doc_links, reason = "brackets are shapes in the C documentation")]

pub mod attention;
pub mod cache;
mod convert;
pub mod device;
mod guard;
mod handle;
pub mod masked;
pub mod policy;
pub mod pool;
pub mod pool_index;
pub mod pool_request;
pub mod pool_sequence;
pub mod pool_stats;
pub mod pool_tables;
pub mod quantizer;
pub mod recurrent;
pub mod schedule;
pub mod score;
pub mod sequence;
pub mod slots;
pub mod store;
pub mod types;
pub mod version;
