//! Segmented LRU: new slots are on probation; a slot that somebody came back for is protected.
//! Probation is reclaimed first. Protection holds at most a share of all slots; beyond that its
//! least recently used returns to probation.
//!
//! Paper: Karedla, Love, Wherry, "Caching strategies to improve disk system performance", 1994.

use super::lists::Lists;
use super::{Entry, Evictor, Idle};
use crate::registry::{Domain, Param};

pub(super) static ENTRY: Entry = Entry {
    name: "slru",
    summary: "segmented LRU: what was used again outlives what was not",
    params: &[Param {
        name: "protected",
        help: "largest share of the slots that is protected",
        domain: Domain::Real { default: 0.8, min: 0.0, max: 1.0 },
    }],
    create: |args, capacity| {
        let limit = (args.real("protected") * capacity as f64) as usize;
        Box::new(Slru { lists: Lists::new(capacity, 3), limit })
    },
};

const PROBATION: usize = 0;
const PROTECTED: usize = 1;
const DOOMED: usize = 2;

#[derive(Debug)]
struct Slru {
    lists: Lists,
    limit: usize,
}

impl Evictor for Slru {
    fn insert(&mut self, idle: Idle) {
        self.lists.remove(idle.slot);
        let list = match idle {
            Idle { doomed: true, .. } => DOOMED,
            Idle { reused: true, .. } => PROTECTED,
            _ => PROBATION,
        };
        self.lists.push(list, idle.slot);
        if self.lists.len_of(PROTECTED) > self.limit
            && let Some(demoted) = self.lists.pop(PROTECTED)
        {
            self.lists.push(PROBATION, demoted);
        }
    }

    fn update(&mut self, idle: Idle) {
        self.lists.redoom(idle, PROBATION, DOOMED);
    }

    fn pop(&mut self) -> Option<u32> {
        [DOOMED, PROBATION, PROTECTED].into_iter().find_map(|list| self.lists.pop(list))
    }

    fn remove(&mut self, slot: u32) -> bool {
        self.lists.remove(slot).is_some()
    }

    fn prefetch(&self, slots: &[u32]) {
        self.lists.prefetch(slots);
    }

    fn upcoming(&self, out: &mut [u32]) -> usize {
        let lists = [DOOMED, PROBATION, PROTECTED];
        lists.into_iter().map(|list| self.lists.first(list, out)).find(|n| *n > 0).unwrap_or(0)
    }

    fn bytes(&self) -> usize {
        self.lists.bytes()
    }

    fn len(&self) -> usize {
        self.lists.len()
    }
}
