//! Sequences that branch, leave for a while, and end.

use super::{Copy, NO_BLOCK, SequenceId, Tables};
use crate::block::groups::Group;
use crate::block::pool::{BlockId, BlockPool};
use crate::error::{Result, bail, ensure};

/// Where the bytes of a block of a parked sequence belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Place in the table: `chunk * groups + group`.
    pub place: u32,
    /// The block of the engine's memory.
    pub block: BlockId,
}

impl Tables {
    /// A sequence with the committed tokens of `parent` that shares every block of them. The open
    /// block is copied by whoever reserves in it first; [`Self::take_copies`] tells. The state of
    /// a recurrent group is copied at once, for which a block must be available.
    pub fn fork(&mut self, pool: &mut BlockPool, parent: SequenceId) -> Result<SequenceId> {
        let from = self.present(parent)?;
        let (size, groups) = (self.config.block_size, self.config.groups.len());
        let committed = self.sequences[from].committed as usize;
        ensure!(
            self.sequences[from].ids.len() == committed,
            InvalidState,
            "sequence {:#x} has {committed} of {} prompt tokens committed, must have all",
            parent.0,
            self.sequences[from].ids.len()
        );
        let states = self.config.groups.iter().filter(|group| matches!(group, Group::Recurrent(_)));
        let (needed, available) = (states.count(), pool.num_available());
        ensure!(
            needed <= available,
            OutOfBlocks,
            "need {needed} blocks for states, {available} are available"
        );
        let child = self.vacant();
        let Ok([parent, sequence]) = self.sequences.get_disjoint_mut([from, child]) else {
            bail!(Internal, "a fork has the slot of its parent");
        };
        let shared = committed.div_ceil(size) * groups;
        sequence.blocks.clear();
        sequence.blocks.extend_from_slice(&parent.blocks[..shared]);
        sequence.ids.clear();
        sequence.ids.extend_from_slice(&parent.ids);
        sequence.pending.clear();
        sequence.keys.clone_from(&parent.keys);
        (sequence.root, sequence.digest) = (parent.root, parent.digest);
        (sequence.committed, sequence.reserved) = (parent.committed, parent.committed);
        (sequence.live, sequence.parked, sequence.priority) = (true, false, parent.priority);
        (sequence.tail_shared, parent.tail_shared) = (true, true);
        if needed == 0 {
            for block in sequence.blocks.iter().filter(|block| **block != NO_BLOCK) {
                pool.share(*block);
            }
        } else {
            self.share_with_states(pool, from, child)?;
        }
        Ok(self.name(child))
    }

    /// Shares the blocks of `child`, but gives it states of its own: a running state is written in
    /// place by every token.
    fn share_with_states(
        &mut self,
        pool: &mut BlockPool,
        parent: usize,
        child: usize,
    ) -> Result<()> {
        let groups = self.config.groups.len();
        let size = self.config.block_size;
        for place in 0..self.sequences[child].blocks.len() {
            let block = self.sequences[child].blocks[place];
            if block != NO_BLOCK {
                pool.share(block);
            }
        }
        let committed = self.sequences[child].committed as usize;
        if committed == 0 {
            return Ok(());
        }
        let last = (committed - 1) / size;
        for (index, group) in self.config.groups.iter().enumerate() {
            let Group::Recurrent(_) = group else { continue };
            // The state of the last committed token is in the first block from its chunk on.
            let blocks = &self.sequences[parent].blocks;
            let places = (last..blocks.len() / groups).map(|chunk| chunk * groups + index);
            let Some(at) = places.into_iter().find(|place| blocks[*place] != NO_BLOCK) else {
                continue;
            };
            let source = blocks[at];
            let is_checkpoint = group.is_kept(at / groups) && committed.is_multiple_of(size);
            if at / groups == last && is_checkpoint {
                continue;
            }
            let Some(target) = pool.take() else {
                bail!(Internal, "an available block is missing")
            };
            let own = &mut self.sequences[child].blocks[last * groups + index];
            if *own != NO_BLOCK {
                pool.unshare(*own);
            }
            *own = target.0;
            self.copies.push(Copy { source: BlockId(source), target });
        }
        Ok(())
    }

    /// Ends `ids`, or none of them. Full blocks stay cached until they are reclaimed.
    pub fn release(&mut self, pool: &mut BlockPool, ids: &[SequenceId]) -> Result<()> {
        self.begin_batch(ids)?;
        for (i, id) in ids.iter().enumerate() {
            if let Some(next) = ids.get(i + 1) {
                self.sequences[next.0 as u32 as usize].expect_drop();
            }
            let slot = id.0 as u32;
            let sequence = &mut self.sequences[slot as usize];
            if sequence.parked {
                // The table only remembers where blocks were.
                sequence.blocks.clear();
            }
            sequence.drop_blocks(pool, 0);
            sequence.live = false;
            // Generation 0 stays unused, so that 0 never names a sequence.
            sequence.generation = sequence.generation.wrapping_add(1).max(1);
            self.free.push(slot);
        }
        Ok(())
    }

    /// Frees the blocks of a sequence but keeps its name and tokens: preemption. Answers the blocks
    /// whose bytes the engine keeps if it does not want to compute them again; it copies them
    /// before anything is written. Reservations are dropped.
    pub fn park(&mut self, pool: &mut BlockPool, id: SequenceId) -> Result<Vec<Placement>> {
        let slot = self.present(id)?;
        let (size, groups) = (self.config.block_size, self.config.groups.len());
        let sequence = &mut self.sequences[slot];
        let committed = sequence.committed as usize;
        let states = self.config.groups.iter().any(|group| matches!(group, Group::Recurrent(_)));
        if !states {
            sequence.drop_blocks(pool, committed.div_ceil(size) * groups);
        }
        sequence.pending.clear();
        sequence.pending_from = 0;
        for chunk in 0..committed / size {
            // A chunk without a name has no entry to come back to.
            let digest = sequence.digest_of(pool, &self.config.groups, chunk);
            sequence.pending.push(digest.unwrap_or_default());
        }
        let placements = placements(&sequence.blocks);
        // The table keeps its shape: where a block was, one comes back.
        let shape: Vec<u32> = sequence.blocks.clone();
        sequence.drop_blocks(pool, 0);
        sequence.blocks.extend(shape);
        (sequence.parked, sequence.tail_shared) = (true, false);
        sequence.reserved = sequence.committed;
        Ok(placements)
    }

    /// Gives a parked sequence blocks again, or `OutOfBlocks` and no change. Blocks whose content
    /// is still cached come back as they are; the others are answered, and the engine copies or
    /// computes their bytes before anything reads them.
    pub fn resume(&mut self, pool: &mut BlockPool, id: SequenceId) -> Result<Vec<Placement>> {
        let slot = self.slot(id)?;
        ensure!(self.sequences[slot].parked, InvalidState, "sequence {:#x} is not parked", id.0);
        let groups = self.config.groups.len();
        let sequence = &mut self.sequences[slot];
        let mut found = vec![NO_BLOCK; sequence.blocks.len()];
        let (mut needed, full) = (0, sequence.pending.len());
        for place in (0..found.len()).filter(|place| sequence.blocks[*place] != NO_BLOCK) {
            let (chunk, group) = (place / groups, place % groups);
            if self.config.prefix && chunk < full && self.config.groups[group].is_kept(chunk) {
                let block = pool.find_held(&sequence.pending[chunk], group as u8);
                found[place] = block.unwrap_or(NO_BLOCK);
            }
            needed += usize::from(found[place] == NO_BLOCK);
        }
        let available = pool.num_available();
        if needed > available {
            for block in found.iter().rev().filter(|block| **block != NO_BLOCK) {
                pool.unshare(*block);
            }
            bail!(OutOfBlocks, "need {needed} blocks, {available} are available");
        }
        for block in found.iter().filter(|block| **block != NO_BLOCK) {
            pool.revive(*block);
        }
        let mut missing = Vec::with_capacity(needed);
        for (place, block) in sequence.blocks.iter_mut().enumerate() {
            if *block != NO_BLOCK && found[place] == NO_BLOCK {
                let Some(fresh) = pool.take() else { bail!(Internal, "a block is missing") };
                found[place] = fresh.0;
                missing.push(Placement { place: place as u32, block: fresh });
                if place / groups < full {
                    pool.records[fresh.0 as usize].digest = sequence.pending[place / groups];
                }
            }
            *block = found[place];
        }
        sequence.pending.clear();
        sequence.parked = false;
        Ok(missing)
    }
}

fn placements(blocks: &[u32]) -> Vec<Placement> {
    let block =
        |(place, block): (usize, &u32)| Placement { place: place as u32, block: BlockId(*block) };
    blocks.iter().enumerate().filter(|(_, block)| **block != NO_BLOCK).map(block).collect()
}
