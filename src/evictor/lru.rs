//! Least recently used: the slot that became idle first goes first. Since the pool inserts
//! children before parents, chains are reclaimed leaf first.

use super::Entry;
use super::queue::Queue;

pub(super) static ENTRY: Entry = Entry {
    name: "lru",
    summary: "least recently used, leaf first",
    params: &[],
    create: |_, capacity| Box::new(Queue::new(capacity, false)),
};
