//! Least recently used: the slot that became idle first goes first. Since the pool inserts
//! children before parents, chains are reclaimed leaf first.

use super::lists::Lists;
use super::{Entry, Evictor, Idle};

pub(super) static ENTRY: Entry = Entry {
    name: "lru",
    summary: "least recently used, leaf first",
    params: &[],
    create: |_, capacity| Box::new(Lru(Lists::new(capacity, 1))),
};

#[derive(Debug)]
struct Lru(Lists);

impl Evictor for Lru {
    fn insert(&mut self, idle: Idle) {
        self.0.remove(idle.slot);
        self.0.push(0, idle.slot);
    }

    fn pop(&mut self) -> Option<u32> {
        self.0.pop(0)
    }

    fn bytes(&self) -> usize {
        self.0.bytes()
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}
