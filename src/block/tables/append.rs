//! One token more for each of many sequences: the step of an engine that decodes.

use super::step::{check_len, ensure_available};
use super::{RESERVED, Sequence, SequenceId, Tables, is_full};
use crate::block::pool::BlockPool;
use crate::block::prefix::Digest;
use crate::error::{Error, Kind, Result, bail};
use crate::simd::prefetch;

/// Sequences between the one whose token is stored and the one whose place is asked for.
const AHEAD: usize = 8;

/// Sequences whose full chunks are asked for together.
const BATCH: usize = 16;

impl Tables {
    /// Says that the reserved token of each of `ids` has been written and was `tokens[i]`, and
    /// reserves the next one; or does nothing at all. A sequence may not occur twice.
    pub fn append(
        &mut self,
        pool: &mut BlockPool,
        ids: &[SequenceId],
        tokens: &[i32],
    ) -> Result<()> {
        check_len("tokens", tokens.len(), ids.len())?;
        self.open_batch();
        self.filled.clear();
        self.filled.reserve(ids.len());
        for (i, (id, token)) in ids.iter().zip(tokens).enumerate() {
            self.expect_push(ids.get(i + AHEAD));
            if !self.push_token(*id, *token) {
                let error = self.refuse_append(*id);
                self.undo_append(&ids[..i]);
                return Err(error);
            }
        }
        if self.filled.is_empty() {
            return Ok(());
        }
        let needed = self.filled.iter().map(|slot| self.needed_behind(pool, *slot as usize)).sum();
        if let Err(error) = ensure_available(pool, needed) {
            self.undo_append(ids);
            return Err(error);
        }
        self.finish_append(pool)
    }

    /// Counts a token and reserves the next one if that takes no more than counting; otherwise notes
    /// the sequence in `filled`. False and no change if that is not allowed. One pass over the
    /// sequences, because fetching one costs more than counting.
    #[inline(always)]
    fn push_token(&mut self, id: SequenceId, token: i32) -> bool {
        let slot = id.0 as u32;
        let Some(sequence) = self.sequences.get_mut(slot as usize) else { return false };
        let (committed, reserved) = (sequence.committed, sequence.reserved);
        let is_ready = sequence.live
            && sequence.generation == (id.0 >> 32) as u32
            && sequence.batch < self.batch
            && !sequence.parked
            && committed < reserved
            && sequence.ids.len() == committed as usize;
        if !is_ready {
            return false;
        }
        sequence.batch = self.batch;
        sequence.ids.push(token);
        sequence.committed = committed + 1;
        let is_last = committed + 1 == reserved;
        if is_full(committed + 1, self.inverse) || is_last && sequence.tail_shared {
            self.filled.push(slot);
        } else if is_last {
            sequence.reserved = reserved + 1;
            sequence.batch |= RESERVED;
        }
        true
    }

    /// Why [`Self::push_token`] refused.
    #[cold]
    fn refuse_append(&mut self, id: SequenceId) -> Error {
        let slot = match self.join_batch(id) {
            Ok(slot) => slot,
            Err(error) => return error,
        };
        let Sequence { parked, committed, reserved, ids, .. } = &self.sequences[slot];
        let text = if *parked {
            format!("sequence {:#x} is parked", id.0)
        } else {
            format!(
                "sequence {:#x} has {committed} tokens of {} committed and {reserved} reserved: \
                 commit the prompt and reserve a token first",
                id.0,
                ids.len()
            )
        };
        Error::new(Kind::InvalidState, text)
    }

    /// Asks memory for where the next token of a sequence goes.
    #[inline(always)]
    fn expect_push(&self, id: Option<&SequenceId>) {
        if let Some(sequence) = id.and_then(|id| self.sequences.get(id.0 as u32 as usize)) {
            prefetch(&sequence.ids, sequence.ids.len().wrapping_sub(1));
        }
    }

    /// Takes back what [`Self::push_token`] did.
    #[cold]
    fn undo_append(&mut self, ids: &[SequenceId]) {
        for id in ids {
            let sequence = &mut self.sequences[id.0 as u32 as usize];
            sequence.ids.pop();
            sequence.committed -= 1;
            sequence.reserved -= (sequence.batch & RESERVED) as u32;
        }
    }

    /// Blocks that the next token of a sequence takes, if it has no row yet.
    fn needed_behind(&self, pool: &BlockPool, slot: usize) -> usize {
        let sequence = &self.sequences[slot];
        let end = sequence.committed as usize;
        if sequence.reserved > sequence.committed {
            return 0;
        }
        if self.slides || sequence.tail_shared {
            return self.needed(pool, slot, end, end + 1);
        }
        self.config.groups.len()
    }

    /// What an append does beyond counting: closes the chunks that became full, and finds blocks
    /// for tokens that have no row. Memory works ahead.
    fn finish_append(&mut self, pool: &mut BlockPool) -> Result<()> {
        let (filled, mut digests) = (std::mem::take(&mut self.filled), Vec::new());
        if self.config.prefix {
            self.hash_filled(&filled);
            digests = std::mem::take(&mut self.digests);
        }
        let mut ahead = filled.chunks(BATCH).zip(digests.chunks(BATCH));
        let mut expect = |this: &Self, pool: &BlockPool| {
            if let Some((slots, digests)) = ahead.next() {
                this.expect_entries(pool, slots, digests);
            }
        };
        expect(self, pool);
        for (i, slot) in filled.iter().enumerate() {
            if i % BATCH == 0 {
                expect(self, pool);
            }
            self.finish_token(pool, *slot as usize, digests.get(i))?;
        }
        (self.filled, self.digests) = (filled, digests);
        Ok(())
    }

    fn finish_token(
        &mut self,
        pool: &mut BlockPool,
        slot: usize,
        digest: Option<&Digest>,
    ) -> Result<()> {
        let size = self.config.block_size;
        let committed = self.sequences[slot].committed;
        if self.is_full(committed) {
            let committed = committed as usize;
            if let Some(digest) = digest {
                self.close(pool, slot, committed / size - 1, digest);
            }
            self.slide(pool, slot, committed - size, committed);
        }
        let sequence = &mut self.sequences[slot];
        if sequence.reserved > committed {
            return Ok(());
        }
        if self.slides || sequence.tail_shared {
            return self.grow(pool, slot, committed as usize + 1);
        }
        for _ in 0..self.config.groups.len() {
            let Some(block) = pool.take() else {
                bail!(Internal, "an available block is missing");
            };
            sequence.blocks.push(block.0);
        }
        sequence.reserved += 1;
        Ok(())
    }
}
