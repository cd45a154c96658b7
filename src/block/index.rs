//! The prefix index: an open-addressed table from digest to block.
//!
//! ```text
//! slot (u64) = tag (high 32 bits of the digest's hash) | block + 1        0 = empty
//! home       = tag * capacity >> 32, then linear probing
//! ```
//!
//! The table holds no digests: those lie in the pool, one for each block, and are compared only
//! when the tag agrees. The home of a slot follows from its tag, so removal can shift entries back
//! without reading a digest. 12 bytes for each block of the pool, made once.

use super::prefix::Digest;
use crate::device::host;
use crate::simd::prefetch;

/// Where a digest is in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Its block.
    Taken(u32),
    /// The slot that [`Index::fill`] gives to its block.
    Empty(usize),
}

/// From digest to block number, over at most the number of blocks it was made for.
#[derive(Debug)]
pub(super) struct Index {
    slots: Vec<u64>,
    len: usize,
}

/// The hash of a digest in a group: its tag.
pub(super) fn tag(digest: &Digest, group: u8) -> u32 {
    let word = |i: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&digest[i * 8..][..8]);
        u64::from_le_bytes(bytes)
    };
    // Hashes that a caller supplies may be short and padded, so every word counts.
    let mixed = word(0) ^ word(1).rotate_left(17) ^ word(2).rotate_left(31) ^ word(3);
    let mixed = (mixed ^ u64::from(group)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    ((mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 32) as u32
}

impl Index {
    /// A table for `num_blocks` blocks: at most two thirds full.
    pub(super) fn new(num_blocks: usize) -> Self {
        Self { slots: host::large(num_blocks + num_blocks / 2 + 8, |_| 0), len: 0 }
    }

    /// Entries in the table.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of the table.
    pub(super) fn bytes(&self) -> usize {
        self.slots.len() * size_of::<u64>()
    }

    /// Asks memory for the slot where the search for `tag` starts.
    pub(super) fn prefetch(&self, tag: u32) {
        prefetch(&self.slots, self.home(tag));
    }

    /// The block that has `tag` among the first places of the search, without a branch that depends
    /// on which; a number of no block if none of them has. What has the tag need not be what is
    /// looked for, and what is looked for may be further on.
    pub(super) fn guess(&self, tag: u32) -> u32 {
        const NEAR: usize = 4;
        let home = self.home(tag);
        let mut guess = 0;
        for slot in self.slots.get(home..home + NEAR).unwrap_or(&[]).iter().rev() {
            guess = if (*slot >> 32) as u32 == tag { *slot as u32 } else { guess };
        }
        guess.wrapping_sub(1)
    }

    /// The block with `tag` for which `is_it` holds, or where it would be.
    pub(super) fn place(&self, tag: u32, is_it: impl Fn(u32) -> bool) -> Place {
        let mut at = self.home(tag);
        loop {
            let slot = self.slots[at];
            if slot == 0 {
                return Place::Empty(at);
            }
            let block = slot as u32 - 1;
            if (slot >> 32) as u32 == tag && is_it(block) {
                return Place::Taken(block);
            }
            at = self.next(at);
        }
    }

    /// Gives an empty slot, the [`Place`] of `tag`, to `block`.
    pub(super) fn fill(&mut self, at: usize, tag: u32, block: u32) {
        self.slots[at] = u64::from(tag) << 32 | u64::from(block + 1);
        self.len += 1;
    }

    /// Takes `block` out, which is in the table under `tag`.
    pub(super) fn remove(&mut self, tag: u32, block: u32) {
        let wanted = u64::from(tag) << 32 | u64::from(block + 1);
        let mut hole = self.home(tag);
        while self.slots[hole] != wanted {
            assert!(self.slots[hole] != 0, "block {block} is not in the index");
            hole = self.next(hole);
        }
        self.len -= 1;
        // Entries behind the hole move into it unless that would put them before their home.
        let mut at = self.next(hole);
        loop {
            let slot = self.slots[at];
            if slot == 0 {
                break;
            }
            let home = self.home((slot >> 32) as u32);
            if self.distance(home, at) >= self.distance(hole, at) {
                self.slots[hole] = slot;
                hole = at;
            }
            at = self.next(at);
        }
        self.slots[hole] = 0;
    }

    /// Every block in the table.
    pub(super) fn blocks(&self) -> impl Iterator<Item = u32> + '_ {
        self.slots.iter().filter(|slot| **slot != 0).map(|slot| *slot as u32 - 1)
    }

    fn home(&self, tag: u32) -> usize {
        ((u64::from(tag) * self.slots.len() as u64) >> 32) as usize
    }

    fn next(&self, at: usize) -> usize {
        if at + 1 == self.slots.len() { 0 } else { at + 1 }
    }

    fn distance(&self, from: usize, to: usize) -> usize {
        if to >= from { to - from } else { to + self.slots.len() - from }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn it_agrees_with_a_map_through_collisions_and_removals() {
        let mut index = Index::new(64);
        let mut model: HashMap<u32, u32> = HashMap::new();
        let mut random = 1u64;
        for _ in 0..200_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let block = (random >> 33) as u32 % 64;
            // Few distinct tags, so that clusters are long and wrap around.
            let tag = 0xFFFF_0000_u32.wrapping_mul((random >> 45) as u32 % 5 + 1);
            match model.remove(&block) {
                Some(tag) => index.remove(tag, block),
                None => {
                    let Place::Empty(at) = index.place(tag, |_| false) else { unreachable!() };
                    index.fill(at, tag, block);
                    model.insert(block, tag);
                }
            }
            assert_eq!(index.len(), model.len());
        }
        for block in 0..64 {
            let place = model.get(&block).map(|tag| index.place(*tag, |it| it == block));
            assert!(place.is_none_or(|place| place == Place::Taken(block)));
        }
        assert_eq!(index.blocks().count(), model.len());
    }

    #[test]
    fn every_byte_of_a_digest_and_the_group_count() {
        let base = tag(&[0; 32], 0);
        assert_ne!(base, tag(&[0; 32], 1));
        for byte in 0..32 {
            let mut digest = [0; 32];
            digest[byte] = 1;
            assert_ne!(base, tag(&digest, 0), "byte {byte}");
        }
    }
}
