//! Priority: lowest priority first, least recently used among equals. Priorities are what the
//! engine says and may change later: a system prompt 100, a finished session 0.

use super::lists::Lists;
use super::{Entry, Evictor, Idle};

pub(super) static ENTRY: Entry = Entry {
    name: "priority",
    summary: "lowest priority first, then least recently used",
    params: &[],
    create: |_, capacity| Box::new(Priority { lists: Lists::new(capacity, LEVELS), present: 0 }),
};

/// Priorities 0 to 100, after the doomed.
const LEVELS: usize = 102;

fn list_for(idle: &Idle) -> usize {
    if idle.doomed { 0 } else { usize::from(idle.priority).min(LEVELS - 2) + 1 }
}

#[derive(Debug)]
struct Priority {
    lists: Lists,
    /// Bit for each list that is not empty.
    present: u128,
}

impl Priority {
    fn place(&mut self, idle: Idle) {
        let list = list_for(&idle);
        self.lists.push(list, idle.slot);
        self.note(list);
    }

    fn note(&mut self, list: usize) {
        let bit = 1 << list;
        self.present =
            if self.lists.len_of(list) > 0 { self.present | bit } else { self.present & !bit };
    }
}

impl Evictor for Priority {
    fn insert(&mut self, idle: Idle) {
        if let Some(list) = self.lists.remove(idle.slot) {
            self.note(list);
        }
        self.place(idle);
    }

    fn update(&mut self, idle: Idle) {
        // A slot whose list stays the same keeps its place in it.
        if self.lists.list_of(idle.slot).is_some_and(|list| list != list_for(&idle)) {
            self.insert(idle);
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

    fn has_priorities(&self) -> bool {
        true
    }

    fn bytes(&self) -> usize {
        self.lists.bytes()
    }

    fn len(&self) -> usize {
        self.lists.len()
    }
}
