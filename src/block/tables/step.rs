//! A step: reserve slots, commit what was written, truncate.

use super::{Copy, NO_BLOCK, Sequence, SequenceId, Tables};
use crate::block::events::Stored;
use crate::block::groups::Group;
use crate::block::pool::{BlockId, BlockPool, DEFAULT_PRIORITY};
use crate::block::prefix::Digest;
use crate::error::{Result, bail, ensure};

impl Tables {
    /// Gives each of `ids` slots for `counts` more tokens, or none to any: drafts, or the next piece
    /// of a conversation. A sequence may not occur twice.
    pub fn reserve(
        &mut self,
        pool: &mut BlockPool,
        ids: &[SequenceId],
        counts: &[u32],
    ) -> Result<()> {
        check_len("counts", counts.len(), ids.len())?;
        self.begin_batch(ids)?;
        let mut needed = 0;
        for (id, count) in ids.iter().zip(counts) {
            let slot = self.present(*id)?;
            let reserved = self.sequences[slot].reserved as usize;
            let end = reserved + *count as usize;
            ensure!(
                end <= i32::MAX as usize,
                InvalidArgument,
                "counts has {count} for a sequence of {reserved} tokens, the limit is {}",
                i32::MAX
            );
            needed += self.needed(pool, slot, reserved, end);
        }
        ensure_available(pool, needed)?;
        for (id, count) in ids.iter().zip(counts) {
            let slot = id.0 as u32 as usize;
            let end = self.sequences[slot].reserved as usize + *count as usize;
            self.grow(pool, slot, end)?;
        }
        Ok(())
    }

    /// Says that the next `counts[i]` reserved tokens of `ids[i]` have been written, for all or
    /// none. `tokens` names those that are not known yet, one sequence after the other: all but the
    /// rest of a prompt. Full blocks can be found by others from now on. Reserved tokens beyond are
    /// kept; [`Self::truncate`] drops them.
    pub fn commit(
        &mut self,
        pool: &mut BlockPool,
        ids: &[SequenceId],
        counts: &[u32],
        tokens: &[i32],
    ) -> Result<()> {
        check_len("counts", counts.len(), ids.len())?;
        self.begin_batch(ids)?;
        let mut unknown = 0;
        for (id, count) in ids.iter().zip(counts) {
            let sequence = &self.sequences[self.present(*id)?];
            let free = sequence.reserved - sequence.committed;
            ensure!(
                *count <= free,
                InvalidArgument,
                "counts has {count} for sequence {:#x}, only {free} tokens are reserved",
                id.0
            );
            unknown += sequence.unknown(*count);
        }
        check_len("tokens", tokens.len(), unknown)?;
        let mut tokens = tokens;
        for (id, count) in ids.iter().zip(counts) {
            let slot = id.0 as u32 as usize;
            let sequence = &mut self.sequences[slot];
            let (own, rest) = tokens.split_at(sequence.unknown(*count));
            tokens = rest;
            sequence.ids.extend_from_slice(own);
            let end = (sequence.committed + count) as usize;
            self.advance(pool, slot, end);
        }
        Ok(())
    }

    /// Forgets the committed tokens from `num_tokens` on and every reservation. A recurrent group
    /// goes back to a state that is still cached: one at the end of a block, as often as its
    /// interval says.
    pub fn truncate(
        &mut self,
        pool: &mut BlockPool,
        id: SequenceId,
        num_tokens: usize,
    ) -> Result<()> {
        let slot = self.present(id)?;
        let size = self.config.block_size;
        let committed = self.sequences[slot].committed as usize;
        ensure!(
            num_tokens <= committed,
            InvalidArgument,
            "num_tokens is {num_tokens}, only {committed} are committed"
        );
        self.check_windows(slot, num_tokens)?;
        let (full, was_full) = (num_tokens / size, committed / size);
        let digest = match (self.config.prefix && full < was_full, full) {
            (false, _) => self.sequences[slot].digest,
            (true, 0) => self.sequences[slot].root,
            (true, full) => self.digest_of(pool, slot, full - 1)?,
        };
        let states = self.states_at(pool, slot, num_tokens, &digest)?;
        let groups = self.config.groups.len();
        let has_states =
            self.config.groups.iter().any(|group| matches!(group, Group::Recurrent(_)));
        let sequence = &mut self.sequences[slot];
        for (index, state) in states {
            let block = &mut sequence.blocks[(full - 1) * groups + index];
            if *block == NO_BLOCK {
                pool.share(state);
                pool.revive(state);
                *block = state;
            }
        }
        sequence.digest = digest;
        // A block that was full is an entry or may be: whoever writes to it again copies it first.
        sequence.tail_shared |= full < was_full;
        // A running state may lie in a block that was reserved; then such tables keep theirs.
        if !has_states || num_tokens < committed {
            sequence.drop_blocks(pool, num_tokens.div_ceil(size) * groups);
        }
        (sequence.committed, sequence.reserved) = (num_tokens as u32, num_tokens as u32);
        sequence.ids.truncate(num_tokens);
        sequence.pending.clear();
        Ok(())
    }

    /// The digest of a full chunk.
    fn digest_of(&self, pool: &BlockPool, slot: usize, chunk: usize) -> Result<Digest> {
        let groups = &self.config.groups;
        match self.sequences[slot].digest_of(pool, groups, chunk) {
            Some(digest) => Ok(digest),
            None => bail!(InvalidState, "no block of chunk {chunk} is left to go back to"),
        }
    }

    /// The states of the recurrent groups after `num_tokens` tokens, whose digest is `digest`: their
    /// groups and blocks. None if the sequence is there already.
    fn states_at(
        &self,
        pool: &BlockPool,
        slot: usize,
        num_tokens: usize,
        digest: &Digest,
    ) -> Result<Vec<(usize, u32)>> {
        let (size, groups) = (self.config.block_size, self.config.groups.len());
        let sequence = &self.sequences[slot];
        let mut states = Vec::new();
        if num_tokens == sequence.committed as usize || num_tokens == 0 {
            return Ok(states);
        }
        let chunk = num_tokens / size;
        for (index, group) in self.config.groups.iter().enumerate() {
            let Group::Recurrent(interval) = group else { continue };
            let is_kept = num_tokens.is_multiple_of(size) && chunk > 0 && group.is_kept(chunk - 1);
            ensure!(
                is_kept && self.config.prefix,
                Unsupported,
                "num_tokens is {num_tokens}: group {index} is recurrent, with a cached state after \
                 every {} tokens",
                *interval as usize * size
            );
            let own = sequence.blocks[(chunk - 1) * groups + index];
            let state = if own == NO_BLOCK { pool.find(digest, index as u8) } else { Some(own) };
            let Some(state) = state else {
                bail!(
                    InvalidState,
                    "num_tokens is {num_tokens}: the state of group {index} there has been reclaimed"
                );
            };
            states.push((index, state));
        }
        Ok(states)
    }

    /// Refuses to go back to where a window group has no rows any more.
    fn check_windows(&self, slot: usize, num_tokens: usize) -> Result<()> {
        let size = self.config.block_size;
        let sequence = &self.sequences[slot];
        let groups = self.config.groups.len();
        for (index, group) in self.config.groups.iter().enumerate() {
            if let Group::Recurrent(_) = group {
                continue;
            }
            let mut needed = group.first_needed(num_tokens, size)..num_tokens.div_ceil(size);
            ensure!(
                needed.all(|chunk| sequence.blocks[chunk * groups + index] != NO_BLOCK),
                InvalidState,
                "num_tokens is {num_tokens}: the window of group {index} has left those tokens"
            );
        }
        Ok(())
    }

    /// Blocks that reserving up to `end` takes, at most.
    pub(super) fn needed(&self, pool: &BlockPool, slot: usize, from: usize, end: usize) -> usize {
        let sequence = &self.sequences[slot];
        let size = self.config.block_size;
        let have = from.div_ceil(size);
        let last = end.saturating_sub(1) / size;
        let mut needed = 0;
        if end > from && sequence.tail_shared {
            needed += sequence.shared_tail(pool, size, self.config.groups.len()).count();
        }
        for group in &self.config.groups {
            needed += match group {
                Group::Recurrent(_) => {
                    (have..=last).filter(|chunk| group.has_block(*chunk, last)).count()
                }
                _ => end.div_ceil(size).saturating_sub(have),
            };
        }
        needed
    }

    /// Reserves up to `end`; the blocks are available.
    pub(super) fn grow(&mut self, pool: &mut BlockPool, slot: usize, end: usize) -> Result<()> {
        let size = self.config.block_size;
        let groups = self.config.groups.len();
        if end > self.sequences[slot].reserved as usize {
            self.own_tail(pool, slot)?;
        }
        let sequence = &mut self.sequences[slot];
        let have = sequence.blocks.len() / groups;
        let chunks = end.div_ceil(size);
        for chunk in have..chunks {
            for group in &self.config.groups {
                if !group.has_block(chunk, chunks - 1) {
                    sequence.blocks.push(NO_BLOCK);
                    continue;
                }
                let Some(block) = take_or_move(pool, &mut sequence.blocks, *group, groups, chunk)
                else {
                    bail!(Internal, "an available block is missing");
                };
                sequence.blocks.push(block);
            }
        }
        sequence.reserved = sequence.reserved.max(end as u32);
        Ok(())
    }

    /// Copies the blocks of the open chunk that somebody else refers to.
    fn own_tail(&mut self, pool: &mut BlockPool, slot: usize) -> Result<()> {
        let sequence = &mut self.sequences[slot];
        if !std::mem::replace(&mut sequence.tail_shared, false) {
            return Ok(());
        }
        let groups = self.config.groups.len();
        let shared: Vec<usize> =
            sequence.shared_tail(pool, self.config.block_size, groups).collect();
        for place in shared {
            let Some(target) = pool.take() else {
                bail!(Internal, "an available block is missing")
            };
            let source = std::mem::replace(&mut self.sequences[slot].blocks[place], target.0);
            self.copies.push(Copy { source: BlockId(source), target });
            pool.unshare(source);
        }
        Ok(())
    }

    /// Commits up to `end`: closes the chunks that became full and gives up what no group needs.
    pub(super) fn advance(&mut self, pool: &mut BlockPool, slot: usize, end: usize) {
        let size = self.config.block_size;
        let from = self.sequences[slot].committed as usize;
        self.sequences[slot].committed = end as u32;
        if self.config.prefix {
            self.hash_chunks(pool, slot, from / size..end / size);
            for (i, chunk) in (from / size..end / size).enumerate() {
                let digest = self.digests[i];
                self.close(pool, slot, chunk, &digest);
            }
            let sequence = &mut self.sequences[slot];
            if end / size >= sequence.pending_from as usize + sequence.pending.len() {
                sequence.pending.clear();
            }
        }
        self.slide(pool, slot, from, end);
    }

    /// A chunk is full: names it and makes its blocks entries.
    pub(super) fn close(
        &mut self,
        pool: &mut BlockPool,
        slot: usize,
        chunk: usize,
        digest: &Digest,
    ) {
        let size = self.config.block_size;
        let groups = self.config.groups.len();
        let sequence = &mut self.sequences[slot];
        let parent = std::mem::replace(&mut sequence.digest, *digest);
        let tokens = &sequence.ids[chunk * size..][..size];
        for (index, group) in self.config.groups.iter().enumerate() {
            let block = &mut sequence.blocks[chunk * groups + index];
            if *block == NO_BLOCK || !group.is_kept(chunk) {
                continue;
            }
            match pool.register_one(digest, index as u8, chunk as u32 + 1, *block) {
                None => {
                    if let Some(partial) = &mut pool.partial {
                        partial.store(&parent, *block, tokens);
                    }
                    let keys = sequence.keys.as_deref();
                    let range = keys.and_then(|keys| keys.range_of(chunk * size, size));
                    let priority = range.map_or(sequence.priority, |range| range.priority);
                    if priority != DEFAULT_PRIORITY {
                        pool.set_priority(BlockId(*block), priority);
                    }
                    if let Some(journal) = &mut pool.journal {
                        let parent = (chunk > 0).then_some(&parent);
                        let of_block = keys.map(|keys| keys.of_block(chunk * size, size));
                        journal.stored(&Stored {
                            group: index as u8,
                            parent,
                            digest,
                            tokens,
                            adapter: keys.map_or("", |keys| &keys.adapter),
                            keys: &of_block.unwrap_or_default(),
                        });
                    }
                }
                Some(known) if self.config.dedup && known != *block => {
                    pool.share(known);
                    pool.unshare(std::mem::replace(block, known));
                }
                // A duplicate carries its digest too, so that a rollback finds it.
                Some(_) => pool.records[*block as usize].digest = *digest,
            }
        }
    }

    /// Gives up blocks that the token at `from` needed and the one at `end` does not.
    pub(super) fn slide(&mut self, pool: &mut BlockPool, slot: usize, from: usize, end: usize) {
        if !self.slides {
            return;
        }
        let size = self.config.block_size;
        let groups = self.config.groups.len();
        let sequence = &mut self.sequences[slot];
        for (index, group) in self.config.groups.iter().enumerate() {
            for chunk in group.first_needed(from, size)..group.first_needed(end, size) {
                let block = &mut sequence.blocks[chunk * groups + index];
                if *block != NO_BLOCK {
                    pool.unshare(std::mem::replace(block, NO_BLOCK));
                }
            }
        }
    }
}

impl Sequence {
    /// Tokens that a commit of `count` must name.
    fn unknown(&self, count: u32) -> usize {
        ((self.committed + count) as usize).saturating_sub(self.ids.len())
    }

    /// Places of the open chunk's blocks that somebody else refers to.
    fn shared_tail<'a>(
        &'a self,
        pool: &'a BlockPool,
        size: usize,
        groups: usize,
    ) -> impl Iterator<Item = usize> + 'a {
        let open = !(self.committed as usize).is_multiple_of(size);
        let first = self.committed as usize / size * groups;
        let places = if open { first..self.blocks.len().min(first + groups) } else { 0..0 };
        places.filter(|place| {
            let block = self.blocks[*place];
            block != NO_BLOCK && pool.refs(BlockId(block)) > 1
        })
    }
}

/// A block for `chunk`: a running state moves along, everything else is new.
fn take_or_move(
    pool: &mut BlockPool,
    blocks: &mut [u32],
    group: Group,
    groups: usize,
    chunk: usize,
) -> Option<u32> {
    if let Group::Recurrent(_) = group
        && chunk > 0
        && !group.is_kept(chunk - 1)
    {
        let index = blocks.len() % groups;
        let before = (0..chunk).rev().map(|chunk| chunk * groups + index);
        for place in before {
            if blocks[place] == NO_BLOCK {
                continue;
            }
            // A checkpoint stays; the state that runs goes where it is completed.
            if !group.is_kept(place / groups) {
                return Some(std::mem::replace(&mut blocks[place], NO_BLOCK));
            }
            break;
        }
    }
    pool.take().map(|block| block.0)
}

pub(super) fn ensure_available(pool: &BlockPool, needed: usize) -> Result<()> {
    let available = pool.num_available();
    ensure!(needed <= available, OutOfBlocks, "need {needed} blocks, {available} are available");
    Ok(())
}

pub(super) fn check_len(name: &str, found: usize, expected: usize) -> Result<()> {
    ensure!(found == expected, InvalidArgument, "num_{name} is {found}, must be {expected}");
    Ok(())
}
