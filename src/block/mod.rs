//! Blocks: fixed-size runs of tokens, reference counted, shared through a prefix index.

mod counts;
mod index;
pub mod pool;
pub mod prefix;
pub mod tables;

pub use pool::{BlockId, BlockPool, EntryId, Released};
pub use tables::{SequenceId, Tables, TablesConfig};
