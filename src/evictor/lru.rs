//! Least recently used: the slot that became idle first goes first. Since the pool inserts
//! children before parents, chains are reclaimed leaf first.

use super::{Entry, Evictor};

pub(super) static ENTRY: Entry = Entry {
    name: "lru",
    summary: "least recently used, leaf first",
    params: &[],
    create: |_, capacity| Box::new(Lru::new(capacity)),
};

/// No neighbour.
const NONE: u32 = u32::MAX;

/// A doubly linked list threaded through two flat arrays.
#[derive(Debug)]
struct Lru {
    links: Vec<Link>,
    head: u32,
    tail: u32,
    len: usize,
}

#[derive(Debug, Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
}

impl Lru {
    fn new(capacity: usize) -> Self {
        let links = vec![Link { previous: NONE, next: NONE }; capacity];
        Self { links, head: NONE, tail: NONE, len: 0 }
    }
}

impl Evictor for Lru {
    fn insert(&mut self, slot: u32) {
        self.links[slot as usize] = Link { previous: self.tail, next: NONE };
        match self.tail {
            NONE => self.head = slot,
            tail => self.links[tail as usize].next = slot,
        }
        self.tail = slot;
        self.len += 1;
    }

    fn remove(&mut self, slot: u32) {
        let Link { previous, next } = self.links[slot as usize];
        match previous {
            NONE => self.head = next,
            previous => self.links[previous as usize].next = next,
        }
        match next {
            NONE => self.tail = previous,
            next => self.links[next as usize].previous = previous,
        }
        self.len -= 1;
    }

    fn pop(&mut self) -> Option<u32> {
        let slot = self.head;
        (slot != NONE).then(|| {
            self.remove(slot);
            slot
        })
    }

    fn len(&self) -> usize {
        self.len
    }
}
