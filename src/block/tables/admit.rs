//! Admission: what of a prompt is cached, and blocks for the rest.

use super::{Copy, NO_BLOCK, SequenceId, Tables};
use crate::block::groups::{Group, Miss, Reason, reconcile};
use crate::block::keys::{Extra, Keys};
use crate::block::pool::{BlockId, BlockPool, DEFAULT_PRIORITY};
use crate::block::prefix::Digest;
use crate::error::{Result, bail, ensure};

/// A prompt that wants to become a sequence.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The prompt.
    pub tokens: &'a [i32],
    /// The digest of the empty prefix: model, tenant, adapter. See
    /// [`crate::block::prefix::tenant_root`].
    pub root: Digest,
    /// If not empty, one digest for each full block of `tokens`, in place of hashing.
    pub digests: &'a [Digest],
    /// What distinguishes equal tokens: the hashes of images behind placeholder tokens.
    pub extra: &'a [Extra<'a>],
    /// The name of the adapter, or "". Events tell it; vLLM's hash has it in every block. With the
    /// library's own hash it belongs into `root`.
    pub adapter: &'a str,
    /// The priority of the sequence's entries.
    pub priority: u8,
}

/// A prompt that became a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission {
    /// Its name.
    pub id: SequenceId,
    /// Tokens found; they are committed.
    pub num_cached: usize,
    /// Of these, tokens of the last block, which the engine copies: [`Tables::take_copies`].
    pub num_copied: usize,
    /// Why not more.
    pub miss: Miss,
}

impl<'a> Request<'a> {
    /// A prompt below `root`.
    pub fn new(tokens: &'a [i32], root: Digest) -> Self {
        Self { tokens, root, digests: &[], extra: &[], adapter: "", priority: DEFAULT_PRIORITY }
    }
}

impl Tables {
    /// Makes a sequence of a prompt: cached blocks for the longest known prefix, but at most all
    /// tokens except the last, which are committed, and new blocks for the rest, which is reserved.
    /// `OutOfBlocks` and no change if fewer than the watermark would stay available.
    pub fn admit(&mut self, pool: &mut BlockPool, request: &Request<'_>) -> Result<Admission> {
        self.check(request)?;
        let slot = self.vacant();
        let size = self.config.block_size;
        let sequence = &mut self.sequences[slot];
        (sequence.root, sequence.digest) = (request.root, request.root);
        sequence.blocks.clear();
        // Room for what is generated, so that the table does not grow step by step.
        let chunks = request.tokens.len().div_ceil(size) + 1;
        sequence.blocks.reserve((chunks * self.config.groups.len()).next_power_of_two());
        let (chunks, miss) = if self.config.prefix {
            self.hash(request);
            self.take_prefix(pool, slot, (request.tokens.len() - 1) / size)
        } else {
            (0, Miss::default())
        };
        let needed = self.needed(pool, slot, chunks * size, request.tokens.len());
        let available = pool.num_available();
        if needed + self.config.watermark > available {
            self.abandon(pool, slot);
            bail!(
                OutOfBlocks,
                "need {needed} blocks and {} of watermark, {available} are available",
                self.config.watermark
            );
        }
        let sequence = &mut self.sequences[slot];
        if chunks > 0 {
            sequence.digest = self.digests[chunks - 1];
        }
        sequence.pending.clear();
        sequence.pending.extend_from_slice(self.digests.get(chunks..).unwrap_or(&[]));
        sequence.pending_from = chunks as u32;
        sequence.ids.clear();
        // Room for what is generated, so that the first token does not copy the prompt.
        sequence.ids.reserve((request.tokens.len() + 1).next_power_of_two());
        sequence.ids.extend_from_slice(request.tokens);
        (sequence.committed, sequence.reserved) = ((chunks * size) as u32, (chunks * size) as u32);
        (sequence.live, sequence.parked, sequence.tail_shared) = (true, false, false);
        sequence.priority = request.priority;
        sequence.keys = Keys::of(request.adapter, request.extra);
        let part = self.find_part(pool, slot, request.tokens, chunks * size);
        self.grow(pool, slot, request.tokens.len())?;
        let num_copied = part.map_or(0, |(source, rows)| self.use_part(slot, source, rows));
        let num_cached = chunks * size + num_copied;
        Ok(Admission { id: self.name(slot), num_cached, num_copied, miss })
    }

    /// A cached block that continues the match with some of the next tokens, but not all of a
    /// block, and how many. The last token is always computed.
    fn find_part(
        &self,
        pool: &BlockPool,
        slot: usize,
        tokens: &[i32],
        found: usize,
    ) -> Option<(u32, usize)> {
        let rest = &tokens[found..tokens.len() - 1];
        pool.partial.as_ref()?.longest(&self.sequences[slot].digest, rest)
    }

    /// Lets the engine copy `rows` rows of `source` into the first new block. The copy runs before
    /// anything is written, so it does not matter if `source` was handed out meanwhile.
    fn use_part(&mut self, slot: usize, source: u32, rows: usize) -> usize {
        let sequence = &mut self.sequences[slot];
        let target = sequence.blocks[sequence.committed as usize / self.config.block_size];
        if source != target {
            self.copies.push(Copy { source: BlockId(source), target: BlockId(target) });
        }
        sequence.committed += rows as u32;
        rows
    }

    fn check(&self, request: &Request<'_>) -> Result<()> {
        let (num_tokens, num_digests) = (request.tokens.len(), request.digests.len());
        let full = num_tokens / self.config.block_size;
        let limit = i32::MAX as usize;
        ensure!(
            (1..=limit).contains(&num_tokens),
            InvalidArgument,
            "num_tokens is {num_tokens}, must be in 1..={limit}"
        );
        ensure!(
            num_digests == 0 || num_digests == full,
            InvalidArgument,
            "num_hashes is {num_digests}, must be 0 or {full}, the full blocks of {num_tokens} tokens"
        );
        for (i, extra) in request.extra.iter().enumerate() {
            ensure!(
                extra.start < extra.end && extra.end <= num_tokens,
                InvalidArgument,
                "extra_keys[{i}] covers {}..{}, must be a range of the {num_tokens} tokens",
                extra.start,
                extra.end
            );
        }
        Ok(())
    }

    /// Takes over cached blocks for at most `usable` chunks. Answers how many and why not more.
    fn take_prefix(&mut self, pool: &mut BlockPool, slot: usize, usable: usize) -> (usize, Miss) {
        let blocks = &mut self.sequences[slot].blocks;
        let (chunks, limiting) = if let [Group::Full | Group::Latent] = self.config.groups[..] {
            let chunks = pool.take_run(&self.digests[..usable], 0, blocks);
            (chunks, (chunks < usable).then_some(0))
        } else {
            let has =
                |group: usize, chunk: usize| pool.find(&self.digests[chunk], group as u8).is_some();
            let found = reconcile(&self.config.groups, self.config.block_size, usable, &has);
            for chunk in 0..found.0 {
                for (index, group) in self.config.groups.iter().enumerate() {
                    let first = group
                        .first_needed(found.0 * self.config.block_size, self.config.block_size);
                    let needed = chunk >= first && group.is_kept(chunk);
                    let digest = &self.digests[chunk];
                    let block = needed.then(|| pool.find_held(digest, index as u8)).flatten();
                    blocks.push(block.unwrap_or(NO_BLOCK));
                }
            }
            for block in blocks.iter().filter(|block| **block != NO_BLOCK) {
                pool.revive(*block);
            }
            found
        };
        let Some(group) = limiting else { return (chunks, Miss::default()) };
        let reason = match self.config.groups[group] {
            Group::Window(_) => Reason::Window,
            Group::Recurrent(_) => Reason::Checkpoint,
            _ if pool.was_evicted(&self.digests[chunks], group as u8) => Reason::Evicted,
            _ => Reason::Unknown,
        };
        (chunks, Miss { reason, token: chunks * self.config.block_size, group })
    }
}
