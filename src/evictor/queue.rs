//! Slots in the order in which they became idle; what is doomed goes before everything else.

use super::lists::Lists;
use super::{Evictor, Idle};

const LIVE: usize = 0;
const DOOMED: usize = 1;

#[derive(Debug)]
pub(super) struct Queue {
    lists: Lists,
    /// Whether a slot that becomes idle again stays where it was, if it still has a place.
    keeps_places: bool,
}

impl Queue {
    pub(super) fn new(capacity: usize, keeps_places: bool) -> Self {
        Self { lists: Lists::new(capacity, 2), keeps_places }
    }
}

impl Evictor for Queue {
    fn insert(&mut self, idle: Idle) {
        if self.keeps_places && self.lists.list_of(idle.slot).is_some() {
            return self.update(idle);
        }
        self.lists.remove(idle.slot);
        self.lists.push(if idle.doomed { DOOMED } else { LIVE }, idle.slot);
    }

    fn insert_all(&mut self, list: &[Idle]) {
        if self.keeps_places || list.iter().any(|idle| idle.doomed) {
            return list.iter().for_each(|idle| self.insert(*idle));
        }
        for idle in list {
            self.lists.remove(idle.slot);
        }
        self.lists.push_all(LIVE, list.iter().map(|idle| idle.slot));
    }

    fn update(&mut self, idle: Idle) {
        self.lists.redoom(idle, LIVE, DOOMED);
    }

    fn pop(&mut self) -> Option<u32> {
        self.lists.pop(DOOMED).or_else(|| self.lists.pop(LIVE))
    }

    fn remove(&mut self, slot: u32) -> bool {
        self.lists.remove(slot).is_some()
    }

    fn prefetch(&self, slots: &[u32]) {
        self.lists.prefetch(slots);
    }

    fn upcoming(&self, out: &mut [u32]) -> usize {
        match self.lists.first(DOOMED, out) {
            0 => self.lists.first(LIVE, out),
            count => count,
        }
    }

    fn bytes(&self) -> usize {
        self.lists.bytes()
    }

    fn len(&self) -> usize {
        self.lists.len()
    }
}
