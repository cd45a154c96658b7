//! First in, first out: the order in which slots first became idle; coming back for one does not
//! help it, unless it was in use when its turn came.

use super::lists::Lists;
use super::{Entry, Evictor, Idle};

pub(super) static ENTRY: Entry = Entry {
    name: "fifo",
    summary: "first in, first out",
    params: &[],
    create: |_, capacity| Box::new(Fifo(Lists::new(capacity, 1))),
};

#[derive(Debug)]
struct Fifo(Lists);

impl Evictor for Fifo {
    fn insert(&mut self, idle: Idle) {
        if self.0.list_of(idle.slot).is_none() {
            self.0.push(0, idle.slot);
        }
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
