//! Least frequently used, in O(1): one list for each number of uses up to 63, the least recently
//! used of the least used first. Uses are forgotten with the block.

use super::lists::Ranks;
use super::{Entry, Evictor, Idle};

pub(super) static ENTRY: Entry = Entry {
    name: "lfu",
    summary: "least frequently used, then least recently",
    params: &[],
    create: |_, capacity| {
        Box::new(Lfu { ranks: Ranks::new(capacity, LEVELS), uses: vec![0; capacity] })
    },
};

const LEVELS: usize = 64;
const DOOMED: usize = 0;

#[derive(Debug)]
struct Lfu {
    ranks: Ranks,
    uses: Vec<u8>,
}

impl Lfu {
    fn place(&mut self, idle: Idle) {
        let list = if idle.doomed { DOOMED } else { usize::from(self.uses[idle.slot as usize]) };
        self.ranks.push(list, idle.slot);
    }
}

impl Evictor for Lfu {
    fn insert(&mut self, idle: Idle) {
        self.ranks.remove(idle.slot);
        let uses = &mut self.uses[idle.slot as usize];
        *uses = if idle.reused { (*uses + 1).min(LEVELS as u8 - 1) } else { 1 };
        self.place(idle);
    }

    fn update(&mut self, idle: Idle) {
        if self.ranks.remove(idle.slot) {
            self.place(idle);
        }
    }

    fn pop(&mut self) -> Option<u32> {
        self.ranks.pop()
    }

    fn remove(&mut self, slot: u32) -> bool {
        self.ranks.remove(slot)
    }

    fn prefetch(&self, slots: &[u32]) {
        self.ranks.prefetch(slots);
    }

    fn upcoming(&self, out: &mut [u32]) -> usize {
        self.ranks.first(out)
    }

    fn bytes(&self) -> usize {
        self.ranks.bytes() + self.uses.len()
    }

    fn len(&self) -> usize {
        self.ranks.len()
    }
}
