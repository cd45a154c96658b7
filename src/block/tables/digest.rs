//! Digests of chunks: of a whole prompt at once, or of one chunk that became full.

use std::ops::Range;

use super::{NO_BLOCK, Request, Sequence, Tables};
use crate::block::groups::Group;
use crate::block::keys;
use crate::block::pool::BlockPool;
use crate::block::prefix::{self, Digest, Hash};

impl Tables {
    /// The digests of the full blocks of a prompt. See [`Request`].
    pub fn hash(&mut self, request: &Request<'_>) -> &[Digest] {
        let (size, hash) = (self.config.block_size, self.config.hash);
        self.digests.clear();
        if !request.digests.is_empty() {
            self.digests.extend_from_slice(request.digests);
        } else if request.extra.is_empty() && hash == Hash::Native {
            prefix::extend_run(&request.root, request.tokens, size, &mut self.digests);
        } else {
            let mut parent = request.root;
            for (chunk, tokens) in request.tokens.chunks_exact(size).enumerate() {
                let keys = keys::of_block(request.extra.iter().copied(), chunk * size, size);
                parent = prefix::extend_with(hash, &parent, tokens, request.adapter, &keys);
                self.digests.push(parent);
            }
        }
        &self.digests
    }

    /// The digests of two prompts at once, in little more time than those of one, into `outs`. Answers
    /// whether that is possible: their tokens alone must name them.
    pub fn hash_two(&self, requests: [&Request<'_>; 2], outs: [&mut Vec<Digest>; 2]) -> bool {
        let is_plain = |it: &Request<'_>| it.extra.is_empty() && it.digests.is_empty();
        if self.config.hash != Hash::Native || !requests.iter().all(|it| is_plain(it)) {
            return false;
        }
        let (roots, tokens) =
            (requests.each_ref().map(|it| &it.root), requests.map(|it| it.tokens));
        prefix::extend_runs(roots, tokens, self.config.block_size, outs);
        true
    }

    /// The digests of `chunks` of a sequence, which follow the chunk that its digest names, into
    /// `self.digests`; asks memory for the places of the entries to come.
    pub(super) fn hash_chunks(&mut self, pool: &BlockPool, slot: usize, chunks: Range<usize>) {
        let (size, hash) = (self.config.block_size, self.config.hash);
        let sequence = &self.sequences[slot];
        self.digests.clear();
        for chunk in chunks.clone() {
            let Some(digest) = sequence.pending_digest(chunk) else { break };
            self.digests.push(*digest);
        }
        let rest = chunks.start + self.digests.len()..chunks.end;
        if sequence.is_plain(hash) {
            let parent = *self.digests.last().unwrap_or(&sequence.digest);
            let tokens = &sequence.ids[rest.start * size..rest.end * size];
            prefix::extend_run(&parent, tokens, size, &mut self.digests);
        } else {
            for chunk in rest {
                let parent = self.digests.last().unwrap_or(&sequence.digest);
                let digest = sequence.next_digest(hash, parent, chunk, size);
                self.digests.push(digest);
            }
        }
        let groups = self.config.groups.len();
        for (digest, blocks) in
            self.digests.iter().zip(sequence.blocks[chunks.start * groups..].chunks(groups))
        {
            anticipate(pool, digest, blocks);
        }
    }

    /// The digests of the chunks that became full in `slots`, two sequences at a time, into
    /// `self.digests`: as many as slots, zeros for those whose chunk is still open.
    pub(super) fn hash_filled(&mut self, slots: &[u32]) {
        self.digests.clear();
        let mut rest = slots;
        while let [first, tail @ ..] = rest {
            let pair = tail.first().map(|second| [*first, *second]);
            match pair.filter(|pair| pair.iter().all(|slot| self.is_plain(*slot))) {
                Some(pair) => {
                    let [a, b] = pair.map(|slot| &self.sequences[slot as usize]);
                    let size = self.config.block_size;
                    let tokens = [a, b].map(|it| &it.ids[it.committed as usize - size..][..size]);
                    let both = prefix::extend_pair([&a.digest, &b.digest], tokens);
                    self.digests.extend(both);
                    rest = &tail[1..];
                }
                None => {
                    let digest = self.hash_one(*first);
                    self.digests.push(digest);
                    rest = tail;
                }
            }
        }
    }

    /// Asks memory for the places of the entries that closing the open chunks of `slots` makes.
    pub(super) fn expect_entries(&self, pool: &BlockPool, slots: &[u32], digests: &[Digest]) {
        let (size, groups) = (self.config.block_size, self.config.groups.len());
        for (slot, digest) in slots.iter().zip(digests) {
            let sequence = &self.sequences[*slot as usize];
            if self.is_full(sequence.committed) {
                let chunk = sequence.committed as usize / size - 1;
                anticipate(pool, digest, &sequence.blocks[chunk * groups..][..groups]);
            }
        }
    }

    /// Whether the chunk that ends with the last committed token is full and named by its tokens
    /// alone.
    fn is_plain(&self, slot: u32) -> bool {
        let sequence = &self.sequences[slot as usize];
        self.is_full(sequence.committed)
            && sequence.is_plain(self.config.hash)
            && sequence.pending.is_empty()
    }

    fn hash_one(&self, slot: u32) -> Digest {
        let sequence = &self.sequences[slot as usize];
        let size = self.config.block_size;
        if !self.is_full(sequence.committed) {
            return [0; 32];
        }
        let chunk = sequence.committed as usize / size - 1;
        match sequence.pending_digest(chunk) {
            Some(digest) => *digest,
            None => sequence.next_digest(self.config.hash, &sequence.digest, chunk, size),
        }
    }
}

/// Asks memory for what registering the blocks of a chunk will touch.
fn anticipate(pool: &BlockPool, digest: &Digest, blocks: &[u32]) {
    for (group, block) in blocks.iter().enumerate() {
        pool.anticipate(digest, group as u8, *block);
    }
}

impl Sequence {
    /// The digest of a full chunk, which every block carries that became an entry or a second copy of
    /// one: not those of states that run.
    pub(super) fn digest_of(
        &self,
        pool: &BlockPool,
        groups: &[Group],
        chunk: usize,
    ) -> Option<Digest> {
        let blocks = &self.blocks[chunk * groups.len()..][..groups.len()];
        let is_named =
            |(block, group): &(&u32, &Group)| **block != NO_BLOCK && group.is_kept(chunk);
        let (block, _) = blocks.iter().zip(groups).find(is_named)?;
        Some(pool.records[*block as usize].digest)
    }

    /// The digest of `chunk`, if it came with the prompt.
    fn pending_digest(&self, chunk: usize) -> Option<&Digest> {
        self.pending.get(chunk.checked_sub(self.pending_from as usize)?)
    }

    /// The digest of `chunk` behind `parent`.
    fn next_digest(&self, hash: Hash, parent: &Digest, chunk: usize, size: usize) -> Digest {
        let tokens = &self.ids[chunk * size..][..size];
        match &self.keys {
            None => prefix::extend_with(hash, parent, tokens, "", &[]),
            Some(keys) => {
                let of_block = keys.of_block(chunk * size, size);
                prefix::extend_with(hash, parent, tokens, &keys.adapter, &of_block)
            }
        }
    }

    /// Whether chunks are named by their tokens alone.
    fn is_plain(&self, hash: Hash) -> bool {
        hash == Hash::Native && self.keys.as_ref().is_none_or(|keys| keys.is_plain())
    }
}
