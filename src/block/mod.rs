//! Blocks: fixed-size runs of tokens, reference counted, shared through a prefix index.

mod counts;
mod entries;
pub mod events;
pub mod groups;
mod index;
pub mod keys;
pub mod manager;
mod partial;
pub mod pool;
pub mod prefix;
mod reclaim;
pub mod schedule;
pub mod tables;

pub use pool::{BlockId, BlockPool, EntryId, Released};
pub use tables::{Admission, Request, SequenceId, Tables, TablesConfig};
