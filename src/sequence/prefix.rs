//! Sharing by prefix: full, sealed, lossless blocks are registered under the digest of all tokens
//! up to their end, and found again by sequences that start with the same tokens.

use super::{Lane, Positions, Sequence, Span};
use crate::block::BlockId;
use crate::block::prefix;
use crate::cache::{Block, Cache};
use crate::error::{Result, ensure};

impl Sequence {
    /// Takes over cached blocks of the longest known prefix of `tokens`, at most all but the last
    /// token (an engine needs one to compute). Answers the number of tokens taken. The sequence
    /// must be empty. With recurrent layers the prefix is the longest whose state is known, too.
    pub fn match_prefix(&mut self, tokens: &[i32]) -> Result<usize> {
        self.begin_match(tokens)?;
        self.settle_match(&mut |_, _| false)?;
        Cache::count(&self.cache.counters.prefix_hit_tokens, self.committed);
        Ok(self.committed)
    }

    /// [`Self::match_prefix`] without its end: takes over the blocks that are in the cache.
    pub fn begin_match(&mut self, tokens: &[i32]) -> Result<usize> {
        self.ensure_present()?;
        ensure!(
            self.committed == 0 && self.reserved == 0,
            InvalidState,
            "the sequence has {} tokens, must be empty to match a prefix",
            self.committed + self.reserved
        );
        if !self.cache.config().prefix {
            return Ok(0);
        }
        let counters = &self.cache.counters;
        Cache::count(&counters.prefix_query_tokens, tokens.len());
        self.extend_match(tokens)
    }

    /// Goes on with a match after a tier brought more entries in. Answers the tokens held.
    pub fn extend_match(&mut self, tokens: &[i32]) -> Result<usize> {
        let block_size = self.cache.config().block_size;
        let usable = tokens.len().saturating_sub(1) / block_size;
        let mut blocks = Vec::new();
        for chunk in self.digests.len()..usable {
            let ids = &tokens[chunk * block_size..][..block_size];
            let digest = prefix::extend(self.last_digest(), ids);
            blocks.clear();
            let Some(entry) = self.cache.find(&digest, &mut blocks) else { break };
            self.push_chunk(chunk, &blocks);
            self.tokens.extend_from_slice(ids);
            self.digests.push(digest);
            self.entries.push(entry);
            self.committed += block_size;
        }
        if let Some(observation) = &self.observation {
            observation.skip_queries(self.committed as i32);
        }
        self.touch();
        Ok(self.committed)
    }

    /// The digest of the next chunk of `tokens` that is not held, if a whole one is left.
    pub fn next_digest(&self, tokens: &[i32]) -> Option<prefix::Digest> {
        let block_size = self.cache.config().block_size;
        let chunk = self.digests.len();
        let usable = tokens.len().saturating_sub(1) / block_size;
        (chunk < usable).then(|| {
            prefix::extend(self.last_digest(), &tokens[chunk * block_size..][..block_size])
        })
    }

    fn last_digest(&self) -> &prefix::Digest {
        self.digests.last().unwrap_or(self.cache.root())
    }

    fn push_chunk(&mut self, chunk: usize, blocks: &[Block]) {
        let block_size = self.cache.config().block_size;
        for (lane, block) in self.lanes.iter_mut().zip(blocks) {
            lane.spans.push(Span {
                block: *block,
                first: 0,
                count: block_size as u32,
                sealed: true,
                demoted: false,
                evicted_before: 0,
                positions: Positions::From((chunk * block_size) as i32),
            });
        }
    }

    /// Registers full sealed chunks that are not registered yet.
    pub(super) fn register_full(&mut self) {
        if !self.cache.config().prefix || !self.hashable || !self.lossless {
            return;
        }
        let block_size = self.cache.config().block_size;
        // Registration stops for good at the first chunk that somebody else registered: its
        // successors would hang on an entry that this sequence does not hold.
        if self.entries.len() < self.digests.len() {
            return;
        }
        for chunk in self.digests.len()..self.committed / block_size {
            let is_sealed = |lane: &Lane| lane.spans.get(chunk).is_some_and(|span| span.sealed);
            if !self.lanes.iter().all(is_sealed) {
                return;
            }
            let tokens = &self.tokens[chunk * block_size..][..block_size];
            let digest = prefix::extend(self.last_digest(), tokens);
            let blocks: Vec<BlockId> =
                self.lanes.iter().map(|lane| lane.spans[chunk].block.id).collect();
            let entry = self
                .cache
                .register(&digest, &blocks)
                .or_else(|| self.adopt(chunk, &digest, &blocks));
            self.digests.push(digest);
            let Some(entry) = entry else { return };
            self.entries.push(entry);
            self.keep_snapshot((chunk + 1) * block_size);
        }
    }

    /// Swaps the blocks of `chunk` for those of the entry that already exists: the same tokens in
    /// the same format, so the duplicates can go.
    fn adopt(
        &mut self,
        chunk: usize,
        digest: &prefix::Digest,
        own: &[BlockId],
    ) -> Option<crate::block::EntryId> {
        let mut blocks = Vec::new();
        let entry = self.cache.find(digest, &mut blocks)?;
        for (lane, block) in self.lanes.iter_mut().zip(&blocks) {
            lane.spans[chunk].block = *block;
        }
        self.cache.release(own.iter().copied(), std::iter::empty());
        Some(entry)
    }

    /// Lets go of the prefix entries, because a lane is about to differ from its prefix.
    pub(super) fn leave_prefix(&mut self) {
        self.lossless = false;
        let entries = std::mem::take(&mut self.entries);
        self.cache.release(std::iter::empty(), entries.into_iter());
    }
}
