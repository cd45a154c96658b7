//! First in, first out: the order in which slots first became idle; coming back for one does not
//! help it, unless it was in use when its turn came.

use super::lists::Lists;
use super::{Entry, Evictor, Idle};

pub(super) static ENTRY: Entry = Entry {
    name: "fifo",
    summary: "first in, first out",
    params: &[],
    create: |_, capacity| Box::new(Fifo(Lists::new(capacity, 2))),
};

const LIVE: usize = 0;
const DOOMED: usize = 1;

#[derive(Debug)]
struct Fifo(Lists);

impl Evictor for Fifo {
    fn insert(&mut self, idle: Idle) {
        match self.0.list_of(idle.slot) {
            None => self.0.push(if idle.doomed { DOOMED } else { LIVE }, idle.slot),
            Some(_) => self.update(idle),
        }
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
