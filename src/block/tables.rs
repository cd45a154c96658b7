//! Block tables of many sequences over one pool, for engines with their own tensors and scheduler.
//!
//! ```text
//! admit (match, then blocks for the rest) --> append, append, ... --> free (cached blocks stay)
//!                                       \\--> fork (shares all; the open block is copied on write)
//! ```
//!
//! Calls take a batch, because a step of an engine does. A token that does not fill a block costs a
//! store and two additions; a token that does costs a digest and an entry in the index. Sequences
//! are slots that are used again, so a block costs no heap allocation once the slots have grown.

use super::pool::{BlockId, BlockPool};
use super::prefix::{self, Digest};
use crate::error::{Result, bail, ensure};

/// Names a sequence: a slot and how often it was used before. A stale name is an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SequenceId(pub u64);

/// How tables treat their sequences.
#[derive(Debug, Clone, Copy)]
pub struct TablesConfig {
    /// Tokens of a block, at least 1.
    pub block_size: usize,
    /// The digest of the empty prefix; see [`prefix::root`] and [`prefix::tenant_root`].
    pub root: Digest,
    /// Whether a full block whose prefix is known gives way to the one that is known. Otherwise
    /// the sequence keeps its own, and its table only ever grows at the end.
    pub dedup: bool,
    /// Blocks that admission leaves available for sequences that run.
    pub watermark: usize,
}

/// A copy that the engine makes before it writes, in the order of the list.
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
    /// Tokens of the open block of each sequence.
    open: Vec<i32>,
    copies: Vec<Copy>,
    batch: u64,
}

#[derive(Debug, Default)]
struct Sequence {
    generation: u32,
    live: bool,
    /// Whether somebody else may refer to the open block.
    tail_shared: bool,
    tokens: u32,
    /// Tokens in the open block; 0 when there is none.
    fill: u32,
    /// The last batch that named this sequence.
    batch: u64,
    blocks: Vec<u32>,
    /// The digest of the full blocks.
    digest: Digest,
}

impl Tables {
    /// No sequences.
    pub fn new(config: TablesConfig) -> Result<Self> {
        ensure!(config.block_size > 0, InvalidArgument, "block_size is 0, must be at least 1");
        Ok(Self {
            config,
            sequences: Vec::new(),
            free: Vec::new(),
            open: Vec::new(),
            copies: Vec::new(),
            batch: 0,
        })
    }

    /// A sequence with `tokens`: cached blocks for the longest known prefix, but at most all tokens
    /// except the last, and new blocks for the rest, whose keys and values the engine computes
    /// before it shares the step with another admission. `digests`, if not empty, has one digest
    /// for each full block of `tokens`, in place of hashing. Answers the tokens found.
    pub fn admit(
        &mut self,
        pool: &mut BlockPool,
        tokens: &[i32],
        digests: &[Digest],
    ) -> Result<(SequenceId, usize)> {
        let size = self.config.block_size;
        let full = tokens.len() / size;
        ensure!(!tokens.is_empty(), InvalidArgument, "num_tokens is 0, must be at least 1");
        ensure!(tokens.len() < i32::MAX as usize, InvalidArgument, "{} tokens", tokens.len());
        ensure!(
            digests.is_empty() || digests.len() == full,
            InvalidArgument,
            "num_digests is {}, must be 0 or {full}, the full blocks of {} tokens",
            digests.len(),
            tokens.len()
        );
        let slot = self.vacant();
        let usable = (tokens.len() - 1) / size;
        let sequence = &mut self.sequences[slot as usize];
        sequence.digest = self.config.root;
        let found = sequence.find_prefix(pool, &tokens[..usable * size], size, digests);
        let needed = tokens.len().div_ceil(size) - found;
        let available = pool.num_available();
        if needed + self.config.watermark > available {
            sequence.blocks.drain(..).rev().for_each(|block| pool.unshare(block));
            self.free.push(slot);
            bail!(
                OutOfBlocks,
                "need {needed} blocks and {} of watermark, {available} are available",
                self.config.watermark
            );
        }
        sequence.live = true;
        sequence.tail_shared = false;
        sequence.tokens = (found * size) as u32;
        sequence.fill = 0;
        for (i, chunk) in tokens[found * size..].chunks(size).enumerate() {
            let Some(block) = pool.take() else { bail!(Internal, "an available block is missing") };
            let sequence = &mut self.sequences[slot as usize];
            sequence.blocks.push(block.0);
            sequence.tokens += chunk.len() as u32;
            self.open[slot as usize * size..][..chunk.len()].copy_from_slice(chunk);
            if chunk.len() == size {
                self.close(pool, slot as usize, digests.get(found + i));
            } else {
                sequence.fill = chunk.len() as u32;
            }
        }
        let generation = self.sequences[slot as usize].generation;
        Ok((SequenceId(u64::from(generation) << 32 | u64::from(slot)), found * size))
    }

    /// Adds one token to each of `ids`, or none to any. A sequence may not occur twice.
    pub fn append(
        &mut self,
        pool: &mut BlockPool,
        ids: &[SequenceId],
        tokens: &[i32],
    ) -> Result<()> {
        ensure!(
            ids.len() == tokens.len(),
            InvalidArgument,
            "num_tokens is {}, must be {}, one for each sequence",
            tokens.len(),
            ids.len()
        );
        self.batch += 1;
        let mut needed = 0;
        for id in ids {
            let slot = self.slot(*id)?;
            let sequence = &mut self.sequences[slot];
            ensure!(sequence.batch != self.batch, InvalidArgument, "sequence {} twice", id.0);
            sequence.batch = self.batch;
            needed += usize::from(sequence.fill == 0 || sequence.has_shared_tail(pool));
        }
        let available = pool.num_available();
        ensure!(
            needed <= available,
            OutOfBlocks,
            "need {needed} blocks, {available} are available"
        );
        let size = self.config.block_size;
        for (id, token) in ids.iter().zip(tokens) {
            let slot = id.0 as u32 as usize;
            self.make_room(pool, slot)?;
            let sequence = &mut self.sequences[slot];
            self.open[slot * size + sequence.fill as usize] = *token;
            sequence.fill += 1;
            sequence.tokens += 1;
            if sequence.fill as usize == size {
                sequence.fill = 0;
                self.close(pool, slot, None);
            }
        }
        Ok(())
    }

    /// A sequence with the same tokens that shares every block. The open block is copied by whoever
    /// writes first; [`Self::take_copies`] tells.
    pub fn fork(&mut self, pool: &mut BlockPool, parent: SequenceId) -> Result<SequenceId> {
        let parent = self.slot(parent)?;
        let child = self.vacant() as usize;
        // Two sequences of one vector: the parent's table is lent for the copy.
        let blocks = std::mem::take(&mut self.sequences[parent].blocks);
        blocks.iter().for_each(|block| pool.share(*block));
        let (tokens, fill, digest) = {
            let parent = &mut self.sequences[parent];
            parent.tail_shared = true;
            (parent.tokens, parent.fill, parent.digest)
        };
        let sequence = &mut self.sequences[child];
        sequence.blocks.extend_from_slice(&blocks);
        (sequence.tokens, sequence.fill, sequence.digest) = (tokens, fill, digest);
        (sequence.live, sequence.tail_shared) = (true, true);
        let generation = sequence.generation;
        self.sequences[parent].blocks = blocks;
        let size = self.config.block_size;
        let start = parent * size;
        self.open.copy_within(start..start + fill as usize, child * size);
        Ok(SequenceId(u64::from(generation) << 32 | child as u64))
    }

    /// Ends `ids`, or none of them. Full blocks stay cached until they are reclaimed.
    pub fn release(&mut self, pool: &mut BlockPool, ids: &[SequenceId]) -> Result<()> {
        self.batch += 1;
        for id in ids {
            let slot = self.slot(*id)?;
            let sequence = &mut self.sequences[slot];
            ensure!(sequence.batch != self.batch, InvalidArgument, "sequence {} twice", id.0);
            sequence.batch = self.batch;
        }
        for id in ids {
            let slot = id.0 as u32;
            let sequence = &mut self.sequences[slot as usize];
            // Last first, so that leaves are reclaimed first.
            sequence.blocks.iter().rev().for_each(|block| pool.unshare(*block));
            sequence.blocks.clear();
            sequence.live = false;
            sequence.generation = sequence.generation.wrapping_add(1);
            self.free.push(slot);
        }
        Ok(())
    }

    /// The block table of a sequence: block numbers in token order.
    pub fn blocks(&self, id: SequenceId) -> Result<&[u32]> {
        Ok(&self.sequences[self.slot(id)?].blocks)
    }

    /// Tokens of a sequence.
    pub fn num_tokens(&self, id: SequenceId) -> Result<usize> {
        Ok(self.sequences[self.slot(id)?].tokens as usize)
    }

    /// The copies to make since the last call, in order.
    pub fn take_copies(&mut self) -> Vec<Copy> {
        std::mem::take(&mut self.copies)
    }

    fn slot(&self, id: SequenceId) -> Result<usize> {
        let slot = id.0 as u32 as usize;
        match self.sequences.get(slot) {
            Some(sequence) if sequence.live && u64::from(sequence.generation) == id.0 >> 32 => {
                Ok(slot)
            }
            Some(_) => bail!(InvalidHandle, "sequence {} has been released", id.0),
            None => bail!(InvalidHandle, "sequence {} is not one of these tables", id.0),
        }
    }

    /// A slot without blocks that is in no list.
    fn vacant(&mut self) -> u32 {
        if let Some(slot) = self.free.pop() {
            return slot;
        }
        self.sequences.push(Sequence::default());
        self.open.resize(self.sequences.len() * self.config.block_size, 0);
        self.sequences.len() as u32 - 1
    }

    /// Makes sure that the next token has a block of its own.
    fn make_room(&mut self, pool: &mut BlockPool, slot: usize) -> Result<()> {
        let sequence = &mut self.sequences[slot];
        let is_shared = sequence.has_shared_tail(pool);
        sequence.tail_shared = false;
        if sequence.fill > 0 && !is_shared {
            return Ok(());
        }
        let Some(target) = pool.take() else { bail!(Internal, "an available block is missing") };
        match sequence.blocks.last_mut().filter(|_| is_shared) {
            Some(tail) => {
                let source = std::mem::replace(tail, target.0);
                self.copies.push(Copy { source: BlockId(source), target });
                pool.unshare(source);
            }
            None => sequence.blocks.push(target.0),
        }
        Ok(())
    }

    /// The last block is full: names it and makes it an entry.
    fn close(&mut self, pool: &mut BlockPool, slot: usize, digest: Option<&Digest>) {
        let size = self.config.block_size;
        let sequence = &mut self.sequences[slot];
        sequence.digest = match digest {
            Some(digest) => *digest,
            None => prefix::extend(&sequence.digest, &self.open[slot * size..][..size]),
        };
        let depth = sequence.tokens / size as u32;
        let Some(block) = sequence.blocks.last_mut() else { return };
        let Some(known) = pool.register_one(&sequence.digest, 0, depth, *block) else { return };
        if self.config.dedup {
            pool.share(known);
            pool.unshare(std::mem::replace(block, known));
        }
    }
}

impl Sequence {
    fn has_shared_tail(&self, pool: &BlockPool) -> bool {
        self.tail_shared
            && self.fill > 0
            && self.blocks.last().is_some_and(|tail| pool.refs(BlockId(*tail)) > 1)
    }

    /// Takes over the blocks of the longest known prefix of `tokens`. Answers how many.
    fn find_prefix(
        &mut self,
        pool: &BlockPool,
        tokens: &[i32],
        size: usize,
        digests: &[Digest],
    ) -> usize {
        for (i, chunk) in tokens.chunks_exact(size).enumerate() {
            let digest = match digests.get(i) {
                Some(digest) => *digest,
                None => prefix::extend(&self.digest, chunk),
            };
            let Some(block) = pool.find_held(&digest, 0) else { return i };
            self.blocks.push(block);
            self.digest = digest;
        }
        tokens.len() / size
    }
}
