//! Least frequently used, in O(1): one list for each number of uses up to 63, the least recently
//! used of the least used first. Uses are forgotten with the block.

use super::lists::Lists;
use super::{Entry, Evictor, Idle};

pub(super) static ENTRY: Entry = Entry {
    name: "lfu",
    summary: "least frequently used, then least recently",
    params: &[],
    create: |_, capacity| {
        Box::new(Lfu { lists: Lists::new(capacity, LEVELS), uses: vec![0; capacity], present: 0 })
    },
};

const LEVELS: usize = 64;
const DOOMED: usize = 0;

#[derive(Debug)]
struct Lfu {
    lists: Lists,
    uses: Vec<u8>,
    /// Bit for each list that is not empty.
    present: u64,
}

impl Lfu {
    fn place(&mut self, idle: Idle) {
        let list = if idle.doomed { DOOMED } else { usize::from(self.uses[idle.slot as usize]) };
        self.lists.push(list, idle.slot);
        self.note(list);
    }

    fn note(&mut self, list: usize) {
        let bit = 1 << list;
        self.present =
            if self.lists.len_of(list) > 0 { self.present | bit } else { self.present & !bit };
    }
}

impl Evictor for Lfu {
    fn insert(&mut self, idle: Idle) {
        if let Some(list) = self.lists.remove(idle.slot) {
            self.note(list);
        }
        let uses = &mut self.uses[idle.slot as usize];
        *uses = if idle.reused { (*uses + 1).min(LEVELS as u8 - 1) } else { 1 };
        self.place(idle);
    }

    fn update(&mut self, idle: Idle) {
        if let Some(list) = self.lists.remove(idle.slot) {
            self.note(list);
            self.place(idle);
        }
    }

    fn pop(&mut self) -> Option<u32> {
        if self.present == 0 {
            return None;
        }
        let list = self.present.trailing_zeros() as usize;
        let slot = self.lists.pop(list);
        self.note(list);
        slot
    }

    fn remove(&mut self, slot: u32) -> bool {
        let Some(list) = self.lists.remove(slot) else { return false };
        self.note(list);
        true
    }

    fn bytes(&self) -> usize {
        self.lists.bytes() + self.uses.len()
    }

    fn len(&self) -> usize {
        self.lists.len()
    }
}
