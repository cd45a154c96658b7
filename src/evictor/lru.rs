//! Least recently used: the slot that became idle first goes first. Since the pool inserts
//! children before parents, chains are reclaimed leaf first.

use super::lists::Lists;
use super::{Entry, Evictor, Idle};

pub(super) static ENTRY: Entry = Entry {
    name: "lru",
    summary: "least recently used, leaf first",
    params: &[],
    create: |_, capacity| Box::new(Lru(Lists::new(capacity, 2))),
};

const LIVE: usize = 0;
const DOOMED: usize = 1;

#[derive(Debug)]
struct Lru(Lists);

impl Evictor for Lru {
    fn insert(&mut self, idle: Idle) {
        self.0.remove(idle.slot);
        self.0.push(if idle.doomed { DOOMED } else { LIVE }, idle.slot);
    }

    fn update(&mut self, idle: Idle) {
        self.0.redoom(idle, LIVE, DOOMED);
    }

    fn pop(&mut self) -> Option<u32> {
        self.0.pop(DOOMED).or_else(|| self.0.pop(LIVE))
    }

    fn remove(&mut self, slot: u32) -> bool {
        self.0.remove(slot).is_some()
    }

    fn prefetch(&self, slots: &[u32]) {
        self.0.prefetch(slots);
    }

    fn upcoming(&self, out: &mut [u32]) -> usize {
        match self.0.first(DOOMED, out) {
            0 => self.0.first(LIVE, out),
            count => count,
        }
    }

    fn bytes(&self) -> usize {
        self.0.bytes()
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}
