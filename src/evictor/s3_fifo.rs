//! S3-FIFO: a small queue filters what is used once, a main queue keeps the rest, and a ghost
//! queue remembers what the small one dropped, so that it enters the main queue when it returns.
//!
//! Paper: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.

use super::lists::Lists;
use super::{Entry, Evictor, Idle};
use crate::registry::{Domain, Param};

pub(super) static ENTRY: Entry = Entry {
    name: "s3_fifo",
    summary: "small, main and ghost FIFO queues (SOSP 2023)",
    params: &[Param {
        name: "small",
        help: "share of the slots in the small queue",
        domain: Domain::Real { default: 0.1, min: 0.01, max: 0.9 },
    }],
    create: |args, capacity| {
        let small = ((args.real("small") * capacity as f64) as usize).max(1);
        Box::new(S3Fifo {
            lists: Lists::new(capacity, 3),
            uses: vec![0; capacity],
            tags: vec![0; capacity],
            small,
            ghosts: vec![0; (capacity / 8).max(1)],
        })
    },
};

const SMALL: usize = 0;
const MAIN: usize = 1;
const DOOMED: usize = 2;
const MAX_USES: u8 = 3;

#[derive(Debug)]
struct S3Fifo {
    lists: Lists,
    /// Uses since the slot entered its queue, at most 3.
    uses: Vec<u8>,
    tags: Vec<u32>,
    /// Length of the small queue at which it is reclaimed from.
    small: usize,
    /// Tags dropped from the small queue; a later one takes the place of an earlier one with the
    /// same remainder, which keeps lookups O(1) without a second table.
    ghosts: Vec<u32>,
}

impl S3Fifo {
    fn ghost(&self, tag: u32) -> usize {
        tag as usize % self.ghosts.len()
    }
}

impl Evictor for S3Fifo {
    fn insert(&mut self, idle: Idle) {
        let slot = idle.slot as usize;
        if self.lists.list_of(idle.slot).is_some() {
            self.uses[slot] = (self.uses[slot] + 1).min(MAX_USES);
            return self.update(idle);
        }
        // A slot that was in use when its turn came has proved itself.
        let ghost = self.ghost(idle.tag);
        let to_main = idle.reused || self.ghosts[ghost] == idle.tag;
        self.uses[slot] = 0;
        self.tags[slot] = idle.tag;
        let list = if to_main { MAIN } else { SMALL };
        self.lists.push(if idle.doomed { DOOMED } else { list }, idle.slot);
    }

    fn update(&mut self, idle: Idle) {
        self.lists.redoom(idle, SMALL, DOOMED);
    }

    fn remove(&mut self, slot: u32) -> bool {
        self.lists.remove(slot).is_some()
    }

    fn pop(&mut self) -> Option<u32> {
        if let Some(slot) = self.lists.pop(DOOMED) {
            return Some(slot);
        }
        loop {
            let from_small = self.lists.len_of(SMALL) >= self.small || self.lists.len_of(MAIN) == 0;
            let queue = if from_small { SMALL } else { MAIN };
            let slot = self.lists.pop(queue)?;
            let uses = &mut self.uses[slot as usize];
            if *uses == 0 {
                if from_small {
                    let tag = self.tags[slot as usize];
                    let ghost = self.ghost(tag);
                    self.ghosts[ghost] = tag;
                }
                return Some(slot);
            }
            // Every turn costs a use, so the loop ends.
            *uses = if from_small { 0 } else { *uses - 1 };
            self.lists.push(MAIN, slot);
        }
    }

    fn prefetch(&self, slots: &[u32]) {
        self.lists.prefetch(slots);
    }

    fn bytes(&self) -> usize {
        self.lists.bytes() + self.uses.len() + (self.tags.len() + self.ghosts.len()) * 4
    }

    fn len(&self) -> usize {
        self.lists.len()
    }
}
