//! Selectors: which blocks a decode step reads. Nothing is evicted, so nothing is lost for good; what
//! is saved is reading, not memory.
//!
//! ```text
//! keys of a sealed block --extend--> index: a small summary of each block
//! queries of a group     --score---> a score for each block --> the best `tokens` worth of them
//! ```
//!
//! Where the papers choose tokens, or pages for each query head, these choose blocks for each KV head:
//! one list serves all query heads of the group, and a block is read as a whole. The first `sink` and
//! the last `recent` tokens, blocks that are not sealed yet and those of the step itself are always
//! read and come on top of the budget.
//!
//! To add a selector: one file with an `ENTRY` and one word below.

mod rows;

use std::fmt::Debug;

use crate::registry::{Args, Domain, Param, StageEntry, registry};
use crate::shape::Needs;

pub(crate) use self::quest::extremes;

registry! {
    /// Every selector, in the order of the documentation.
    pub static SELECTORS: Entry = { quest, shadowkv, infllm, doublesparsity, pqcache, }
}

/// Says which blocks to read, by an index for each KV head.
pub trait Selector: Debug + Send + Sync {
    /// How much is read.
    fn reach(&self) -> Reach;

    /// What attention has to observe.
    fn needs(&self) -> Needs {
        Needs::NONE
    }

    /// An index without blocks for keys of `dim` elements.
    fn index(&self, dim: usize) -> Box<dyn Index>;
}

/// What a selector knows of the blocks of one KV head.
pub trait Index: Debug + Send + Sync {
    /// Adds blocks behind those that are there.
    fn extend(&mut self, blocks: &NewBlocks<'_>);

    /// Forgets all but the first `blocks`.
    fn truncate(&mut self, blocks: usize);

    /// How much it matters to read each block, `[blocks]`, for the queries of a group,
    /// `[group, dim]`, as they meet the keys: rotated, not scaled. Higher is better.
    fn score(&mut self, queries: &[f32], scores: &mut [f32]);

    /// The same index once more.
    fn fork(&self) -> Box<dyn Index>;

    /// Bytes of what it holds of its blocks.
    fn bytes(&self) -> usize;
}

/// Blocks that an index gets to know.
#[derive(Debug, Clone, Copy)]
pub struct NewBlocks<'a> {
    /// Keys as attention sees them, `[rows, dim]`, block after block.
    pub keys: &'a [f32],
    /// Rows of each block, at least 1.
    pub rows: &'a [u32],
    /// The attention that each row has received, `[rows]`; empty unless the selector needs it.
    pub received: &'a [f32],
}

impl<'a> NewBlocks<'a> {
    /// The keys of each block and what they have received.
    fn each(&self, dim: usize) -> impl Iterator<Item = (&'a [f32], &'a [f32])> {
        let Self { keys, rows, received } = *self;
        let mut start = 0;
        rows.iter().map(move |rows| {
            let range = start..start + *rows as usize;
            start = range.end;
            let received = received.get(range.clone()).unwrap_or(&[]);
            (&keys[range.start * dim..range.end * dim], received)
        })
    }
}

/// How much a selector reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// Tokens that are chosen, in whole blocks; at least one block is.
    pub tokens: usize,
    /// Leading tokens that are read besides.
    pub sink: usize,
    /// Tokens before the step that are read besides.
    pub recent: usize,
    /// Leading layers that read everything.
    pub dense: usize,
}

impl Reach {
    fn from_args(args: &Args) -> Self {
        let [tokens, sink, recent, dense] =
            ["tokens", "sink", "recent", "dense"].map(|name| args.count(name));
        Self { tokens, sink, recent, dense }
    }
}

/// The parameters of [`Reach`], which all selectors begin with, with their defaults.
const fn reach(tokens: i64, sink: i64, recent: i64, dense: i64) -> [Param; 4] {
    [
        count("tokens", "tokens that are chosen, in whole blocks", tokens, 1),
        count("sink", "leading tokens that are always read", sink, 0),
        count("recent", "latest tokens that are always read", recent, 0),
        count("dense", "leading layers that read everything", dense, 0),
    ]
}

/// A parameter that is a number.
const fn count(name: &'static str, help: &'static str, default: i64, min: i64) -> Param {
    Param { name, help, domain: Domain::Int { default, min, max: 1 << 30 } }
}

/// How the registry describes a selector.
pub type Entry = StageEntry<dyn Selector>;
