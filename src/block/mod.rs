//! Blocks: fixed-size runs of tokens, reference counted, shared through a prefix index.

pub mod pool;
pub mod prefix;

pub use pool::{BlockId, BlockPool, EntryId, Released};
