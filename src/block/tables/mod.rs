//! Block tables of many sequences over one pool, for engines with their own tensors and scheduler.
//!
//! ```text
//! admit (match, then blocks for the rest) -> commit -> append, append, ... -> release
//!                                                  \-> fork (shares all, copies on write)
//!                                                  \-> reserve, commit some: drafts
//!                                                  \-> park -> resume
//! ```
//!
//! *Reserved* tokens have slots that the engine may write; *committed* ones have been written. Only
//! a block whose tokens are all committed gets a digest and can be found by others.
//!
//! Calls take a batch, because a step of an engine does. A token that does not fill a block costs a
//! store and a few additions; one that does costs a digest and an entry in the index. Sequences are
//! slots that are used again, so a block costs no heap allocation once the slots have grown.
//!
//! A table has one block for each chunk of tokens and each group: `blocks[chunk * groups + group]`,
//! [`NO_BLOCK`] where a group needs none ([`super::groups`]).

mod admit;
mod append;
mod digest;
mod fork;
mod step;

use super::groups::{Group, MAX_GROUPS};
use super::keys::{Keys, Range};
use super::pool::{BlockId, BlockPool};
use super::prefix::{Digest, Hash};
use crate::error::{Result, bail, ensure};
use crate::simd::prefetch;

pub use admit::{Admission, Request};
pub use fork::Placement;

/// Where a table has no block.
pub const NO_BLOCK: u32 = u32::MAX;

/// Names a sequence: a slot and how often it was used before. A stale name is an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SequenceId(pub u64);

/// How tables treat their sequences.
#[derive(Debug, Clone)]
pub struct TablesConfig {
    /// Tokens of a block, at least 1.
    pub block_size: usize,
    /// The groups of the model, at least one.
    pub groups: Vec<Group>,
    /// How digests are chained.
    pub hash: Hash,
    /// Whether full blocks are shared and kept by prefix.
    pub prefix: bool,
    /// Whether a full block whose prefix is known gives way to the one that is known. Otherwise
    /// the sequence keeps its own, and its table only ever grows at the end.
    pub dedup: bool,
    /// Blocks that admission leaves available for sequences that run.
    pub watermark: usize,
}

impl TablesConfig {
    /// One full group, prefixes on, tables that only grow at the end.
    pub fn new(block_size: usize) -> Self {
        Self {
            block_size,
            groups: vec![Group::Full],
            hash: Hash::Native,
            prefix: true,
            dedup: false,
            watermark: 0,
        }
    }
}

/// A copy that the engine makes before anything is written, in the order of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copy {
    /// From where.
    pub source: BlockId,
    /// To where.
    pub target: BlockId,
}

/// The tables. Exclusive access; the pool is passed to each call, so that others can use it too.
#[derive(Debug)]
pub struct Tables {
    config: TablesConfig,
    sequences: Vec<Sequence>,
    free: Vec<u32>,
    copies: Vec<Copy>,
    /// The batch at hand: an even number that grows.
    batch: u64,
    /// Whether a group gives up blocks or moves them.
    slides: bool,
    /// 2^64 / block_size, rounded up: see [`Tables::is_full`].
    inverse: u64,
    /// Digests of the prompt at hand, or of the chunks that are being closed.
    digests: Vec<Digest>,
    /// Slots of the sequences whose open chunk a step has filled.
    filled: Vec<u32>,
}

/// The bit of [`Sequence::batch`] that says that the batch reserved a token.
const RESERVED: u64 = 1;

/// The first cache line is all that a token touches unless it fills a block.
#[derive(Debug, Default)]
#[repr(C, align(64))]
struct Sequence {
    generation: u32,
    live: bool,
    /// Whether the blocks are with the engine.
    parked: bool,
    /// Whether somebody else may refer to the open chunk.
    tail_shared: bool,
    priority: u8,
    committed: u32,
    /// Tokens with slots, committed ones included.
    reserved: u32,
    /// The last batch that named this sequence, and [`RESERVED`].
    batch: u64,
    /// Every token that is known: at least the committed ones, more while a prompt is computed.
    ids: Vec<i32>,
    /// The table: one block for each chunk and group.
    blocks: Vec<u32>,
    root: Digest,
    /// The digest of the full committed chunks.
    digest: Digest,
    /// Digests of the prompt's chunks from `pending_from` on; of all chunks while parked.
    pending: Vec<Digest>,
    pending_from: u32,
    /// What the request or the engine said besides, if anything.
    keys: Option<Box<Keys>>,
}

impl Tables {
    /// No sequences.
    pub fn new(config: TablesConfig) -> Result<Self> {
        ensure!(config.block_size > 0, InvalidArgument, "block_size is 0, must be at least 1");
        let num_groups = config.groups.len();
        ensure!(
            (1..=MAX_GROUPS).contains(&num_groups),
            InvalidArgument,
            "num_groups is {num_groups}, must be in 1..={MAX_GROUPS}"
        );
        config.groups.iter().try_for_each(|group| group.validate())?;
        let (sequences, free) = (Vec::new(), Vec::new());
        let (copies, digests, filled) = (Vec::new(), Vec::new(), Vec::new());
        let inverse = (u64::MAX / config.block_size as u64).wrapping_add(1);
        let slides = config
            .groups
            .iter()
            .any(|group| matches!(group, Group::Window(_) | Group::Recurrent(_)));
        Ok(Self { config, sequences, free, copies, batch: 0, slides, inverse, digests, filled })
    }

    /// What they were made from.
    pub fn config(&self) -> &TablesConfig {
        &self.config
    }

    /// Live sequences.
    pub fn num_sequences(&self) -> usize {
        self.sequences.len() - self.free.len()
    }

    /// The block table of a sequence, all groups of a chunk side by side.
    pub fn blocks(&self, id: SequenceId) -> Result<&[u32]> {
        Ok(&self.sequences[self.slot(id)?].blocks)
    }

    /// Committed tokens of a sequence.
    pub fn num_tokens(&self, id: SequenceId) -> Result<usize> {
        Ok(self.sequences[self.slot(id)?].committed as usize)
    }

    /// Tokens of a sequence that have slots.
    pub fn num_reserved(&self, id: SequenceId) -> Result<usize> {
        Ok(self.sequences[self.slot(id)?].reserved as usize)
    }

    /// The known tokens of a sequence.
    pub fn tokens(&self, id: SequenceId) -> Result<&[i32]> {
        Ok(&self.sequences[self.slot(id)?].ids)
    }

    /// Whether the blocks of a sequence are with the engine.
    pub fn is_parked(&self, id: SequenceId) -> Result<bool> {
        Ok(self.sequences[self.slot(id)?].parked)
    }

    /// Gives the entries of a sequence another priority, and those it will make.
    pub fn set_priority(
        &mut self,
        pool: &mut BlockPool,
        id: SequenceId,
        priority: u8,
    ) -> Result<()> {
        let slot = self.present(id)?;
        let sequence = &mut self.sequences[slot];
        sequence.priority = priority;
        for block in sequence.blocks.iter().filter(|block| **block != NO_BLOCK) {
            pool.set_priority(BlockId(*block), priority);
        }
        Ok(())
    }

    /// Gives the entries of the blocks that a part of a sequence touches another priority, now and
    /// when they are made; says how long they stay, see [`Self::ranges`]. What is said later counts.
    pub fn set_range(&mut self, pool: &mut BlockPool, id: SequenceId, range: Range) -> Result<()> {
        let slot = self.present(id)?;
        ensure!(
            range.start < range.end,
            InvalidArgument,
            "the range is {}..{}, must not be empty",
            range.start,
            range.end
        );
        let (size, groups) = (self.config.block_size, self.config.groups.len());
        let sequence = &mut self.sequences[slot];
        let chunks = range.start / size..range.end.div_ceil(size);
        for block in sequence.blocks.chunks(groups).take(chunks.end).skip(chunks.start).flatten() {
            if *block != NO_BLOCK {
                pool.set_priority(BlockId(*block), range.priority);
            }
        }
        let ranges = &mut sequence.keys.get_or_insert_default().ranges;
        ranges.retain(|old| old.start < range.start || old.end > range.end);
        ranges.push(range);
        Ok(())
    }

    /// For each block of the table what [`Self::set_range`] said last about its tokens.
    pub fn ranges(&self, id: SequenceId) -> Result<impl Iterator<Item = Option<&Range>>> {
        let sequence = &self.sequences[self.slot(id)?];
        let (size, groups) = (self.config.block_size, self.config.groups.len());
        let of = move |place: usize| {
            sequence.keys.as_ref().and_then(|keys| keys.range_of(place / groups * size, size))
        };
        Ok((0..sequence.blocks.len()).map(of))
    }

    /// Whether [`Self::set_range`] was called for a sequence.
    pub fn has_ranges(&self, id: SequenceId) -> Result<bool> {
        let sequence = &self.sequences[self.slot(id)?];
        Ok(sequence.keys.as_ref().is_some_and(|keys| !keys.ranges.is_empty()))
    }

    /// The table of what a sequence would leave behind if it ended now. Of a parked one these are the entries that
    /// are still there: its blocks may be others' by now.
    pub fn left(&self, pool: &BlockPool, id: SequenceId) -> Result<impl Iterator<Item = u32>> {
        let sequence = &self.sequences[self.slot(id)?];
        let groups = self.config.groups.len();
        Ok(sequence.blocks.iter().enumerate().map(move |(place, block)| {
            if !sequence.parked || *block == NO_BLOCK {
                return *block;
            }
            let digest = sequence.pending.get(place / groups);
            let entry = digest.and_then(|digest| pool.find(digest, (place % groups) as u8));
            entry.unwrap_or(NO_BLOCK)
        }))
    }

    /// The digest of the full committed chunks of a sequence.
    pub fn digest(&self, id: SequenceId) -> Result<Digest> {
        Ok(self.sequences[self.slot(id)?].digest)
    }

    /// The slot in the engine's tensors of a token: `block * block_size + row`, -1 where the group
    /// keeps no row of it.
    pub fn slot_of(&self, id: SequenceId, group: usize, token: usize) -> Result<i64> {
        let sequence = &self.sequences[self.slot(id)?];
        let size = self.config.block_size;
        let chunk = token / size;
        match sequence.blocks.get(chunk * self.config.groups.len() + group) {
            None | Some(&NO_BLOCK) => Ok(-1),
            Some(block) => Ok((*block as usize * size + token % size) as i64),
        }
    }

    /// The copies to make since the last call, in order.
    pub fn take_copies(&mut self) -> Vec<Copy> {
        std::mem::take(&mut self.copies)
    }

    /// How many copies wait for [`Self::take_copies`].
    pub fn num_copies(&self) -> usize {
        self.copies.len()
    }

    /// The slot of a live sequence that has its blocks.
    fn present(&self, id: SequenceId) -> Result<usize> {
        let slot = self.slot(id)?;
        ensure!(!self.sequences[slot].parked, InvalidState, "sequence {:#x} is parked", id.0);
        Ok(slot)
    }

    fn slot(&self, id: SequenceId) -> Result<usize> {
        let slot = id.0 as u32 as usize;
        match self.sequences.get(slot) {
            Some(sequence) if sequence.live && u64::from(sequence.generation) == id.0 >> 32 => {
                Ok(slot)
            }
            Some(_) => bail!(InvalidHandle, "sequence {:#x} has been released", id.0),
            None => bail!(InvalidHandle, "sequence {:#x} is not one of this pool", id.0),
        }
    }

    fn name(&self, slot: usize) -> SequenceId {
        SequenceId(u64::from(self.sequences[slot].generation) << 32 | slot as u64)
    }

    /// Whether `num_tokens` end at the end of a block.
    fn is_full(&self, num_tokens: u32) -> bool {
        is_full(num_tokens, self.inverse)
    }

    fn open_batch(&mut self) {
        self.batch += 2;
    }

    /// Starts a batch: no sequence may occur twice, and each must be there.
    fn begin_batch(&mut self, ids: &[SequenceId]) -> Result<()> {
        self.open_batch();
        ids.iter().try_for_each(|id| self.join_batch(*id).map(|_| ()))
    }

    /// The slot of a live sequence that is not in this batch yet.
    #[inline]
    fn join_batch(&mut self, id: SequenceId) -> Result<usize> {
        let slot = self.slot(id)?;
        let sequence = &mut self.sequences[slot];
        ensure!(
            sequence.batch < self.batch,
            InvalidArgument,
            "sequence {:#x} occurs twice in the batch",
            id.0
        );
        sequence.batch = self.batch;
        Ok(slot)
    }

    /// An empty slot that is in no list; it becomes live when its sequence is complete.
    fn vacant(&mut self) -> usize {
        if let Some(slot) = self.free.pop() {
            return slot as usize;
        }
        // Generation 0 stays unused, so that 0 never names a sequence.
        self.sequences.push(Sequence { generation: 1, ..Sequence::default() });
        self.sequences.len() - 1
    }

    /// Gives a slot back that did not become live.
    fn abandon(&mut self, pool: &mut BlockPool, slot: usize) {
        self.sequences[slot].drop_blocks(pool, 0);
        self.free.push(slot as u32);
    }
}

impl Sequence {
    /// Asks memory for the end of the table, from where it is given up.
    fn expect_drop(&self) {
        const LINE: usize = 16;
        (1..=4).for_each(|i| prefetch(&self.blocks, self.blocks.len().wrapping_sub(i * LINE)));
    }

    /// Gives up the blocks from index `first` on, the last one first, so that leaves are
    /// reclaimed before their parents.
    fn drop_blocks(&mut self, pool: &mut BlockPool, first: usize) {
        pool.unshare_run(&self.blocks[first..]);
        self.blocks.truncate(first);
    }
}

/// Whether `num_tokens` end at the end of a block, of whose size `inverse` is the [`Tables::inverse`]:
/// without a division.
///
/// Paper: Lemire, Kaser, Kurz, "Faster remainder by direct computation", 2019.
fn is_full(num_tokens: u32, inverse: u64) -> bool {
    u64::from(num_tokens).wrapping_mul(inverse) <= inverse.wrapping_sub(1)
}
