//! Priority: lowest priority first, least recently used among equals. Priorities are what the
//! engine says and may change later: a system prompt 100, a finished session 0.

use super::lists::Ranks;
use super::{Entry, Evictor, Idle};

pub(super) static ENTRY: Entry = Entry {
    name: "priority",
    summary: "lowest priority first, then least recently used",
    params: &[],
    create: |_, capacity| Box::new(Priority(Ranks::new(capacity, LEVELS))),
};

/// Priorities 0 to 100, after the doomed.
const LEVELS: usize = 102;

fn list_for(idle: &Idle) -> usize {
    if idle.doomed { 0 } else { usize::from(idle.priority).min(LEVELS - 2) + 1 }
}

#[derive(Debug)]
struct Priority(Ranks);

impl Evictor for Priority {
    fn insert(&mut self, idle: Idle) {
        self.0.remove(idle.slot);
        self.0.push(list_for(&idle), idle.slot);
    }

    fn update(&mut self, idle: Idle) {
        // A slot whose list stays the same keeps its place in it.
        if self.0.list_of(idle.slot).is_some_and(|list| list != list_for(&idle)) {
            self.insert(idle);
        }
    }

    fn pop(&mut self) -> Option<u32> {
        self.0.pop()
    }

    fn remove(&mut self, slot: u32) -> bool {
        self.0.remove(slot)
    }

    fn has_priorities(&self) -> bool {
        true
    }

    fn prefetch(&self, slots: &[u32]) {
        self.0.prefetch(slots);
    }

    fn upcoming(&self, out: &mut [u32]) -> usize {
        self.0.first(out)
    }

    fn bytes(&self) -> usize {
        self.0.bytes()
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}
