//! Digests of chunks: of a whole prompt at once, or of one chunk that became full.

use super::{Extra, OwnedExtra, Request, Sequence, Tables};
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
                let keys =
                    request.extra.iter().filter_map(|it| it.key_of(hash, chunk * size, size));
                parent = extend(hash, &parent, tokens, &keys.collect::<Vec<_>>());
                self.digests.push(parent);
            }
        }
        &self.digests
    }
}

impl Sequence {
    /// The digest of `chunk`, which follows the chunk that `self.digest` names.
    pub(super) fn next_digest(&self, hash: Hash, chunk: usize, size: usize) -> Digest {
        let pending = chunk.checked_sub(self.pending_from as usize);
        if let Some(digest) = pending.and_then(|at| self.pending.get(at)) {
            return *digest;
        }
        let tokens = &self.ids[chunk * size..][..size];
        if self.extra.is_empty() && hash == Hash::Native {
            return prefix::extend(&self.digest, tokens);
        }
        let keys = self.extra.iter().filter_map(|it| it.view().key_of(hash, chunk * size, size));
        extend(hash, &self.digest, tokens, &keys.collect::<Vec<_>>())
    }
}

impl Extra<'_> {
    pub(super) fn owned(&self) -> OwnedExtra {
        OwnedExtra { start: self.start, end: self.end, key: self.key.to_vec() }
    }

    /// What goes into the digest of the block that starts at token `start`, if the key touches it.
    /// The distance tells the parts of one image apart; vLLM hashes plain texts.
    fn key_of(&self, hash: Hash, start: usize, size: usize) -> Option<Vec<u8>> {
        let touches = self.start < start + size && self.end > start;
        let offset = (self.start as i64 - start as i64).to_le_bytes();
        touches.then(|| match hash {
            Hash::Native => [self.key, &offset].concat(),
            Hash::VllmCbor => self.key.to_vec(),
        })
    }
}

impl OwnedExtra {
    fn view(&self) -> Extra<'_> {
        Extra { start: self.start, end: self.end, key: &self.key }
    }
}

fn extend(hash: Hash, parent: &Digest, tokens: &[i32], keys: &[Vec<u8>]) -> Digest {
    let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
    prefix::extend_with(hash, parent, tokens, &keys)
}
