//! The atomics of the parts that threads share, in one place, so that a model checker can take their
//! place: with `--cfg loom` they are loom's, and `tests/loom/pool.rs` tries every interleaving.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
