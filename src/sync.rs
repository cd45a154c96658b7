//! The atomics of the parts that threads share, in one place so that a model checker can take
//! their place: `tests/pool_loom.rs` compiles `block/counts.rs` against its own.

pub(crate) use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
