//! Reuse of a part of a block: the tokens of every entry, found through the digest of its parent.
//!
//! Memory beyond the pool's own: 4 bytes for each token of the pool and one list entry for each
//! cached block; nothing unless asked for.

use std::collections::HashMap;

use super::prefix::Digest;

/// Children of one parent that are looked at: the youngest ones.
const CANDIDATES: usize = 16;

/// The tokens of entries.
#[derive(Debug)]
pub(super) struct Partial {
    block_size: usize,
    tokens: Vec<i32>,
    parents: Vec<Digest>,
    /// Entries that continue a prefix, oldest first.
    children: HashMap<Digest, Vec<u32>>,
}

impl Partial {
    pub(super) fn new(num_blocks: usize, block_size: usize) -> Self {
        Self {
            block_size,
            tokens: vec![0; num_blocks * block_size],
            parents: vec![[0; 32]; num_blocks],
            children: HashMap::new(),
        }
    }

    /// Bytes held, the map's own overhead aside.
    pub(super) fn bytes(&self) -> usize {
        let child = size_of::<Digest>() + size_of::<Vec<u32>>() + size_of::<u32>();
        self.tokens.len() * 4 + self.parents.len() * 32 + self.children.len() * child
    }

    /// `block` became the entry for `tokens` behind `parent`.
    pub(super) fn store(&mut self, parent: &Digest, block: u32, tokens: &[i32]) {
        let place = block as usize;
        self.tokens[place * self.block_size..][..self.block_size].copy_from_slice(tokens);
        self.parents[place] = *parent;
        self.children.entry(*parent).or_default().push(block);
    }

    /// `block` is no entry any more.
    pub(super) fn remove(&mut self, block: u32) {
        let parent = self.parents[block as usize];
        let Some(children) = self.children.get_mut(&parent) else { return };
        if let Some(at) = children.iter().rposition(|child| *child == block) {
            children.swap_remove(at);
        }
        if children.is_empty() {
            self.children.remove(&parent);
        }
    }

    /// The child of `parent` that shares the most first tokens with `rest`, and how many, if any.
    pub(super) fn longest(&self, parent: &Digest, rest: &[i32]) -> Option<(u32, usize)> {
        let shared = |block: &u32| {
            let tokens = &self.tokens[*block as usize * self.block_size..][..self.block_size];
            let same = tokens.iter().zip(rest).take_while(|(a, b)| a == b).count();
            (*block, same.min(self.block_size - 1))
        };
        let candidates = self.children.get(parent)?.iter().rev().take(CANDIDATES).map(shared);
        candidates.max_by_key(|(_, same)| *same).filter(|(_, same)| *same > 0)
    }
}
