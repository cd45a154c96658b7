//! Cost-aware: greedy dual with frequency. A slot is worth what it costs to compute again times
//! how often it was used; the clock rises to the worth of what was reclaimed, so that old worth
//! fades.
//!
//! ```text
//! worth = clock + uses * (1 + weight * depth)      depth in blocks: attention over the prefix
//! ```
//!
//! Paper: Cherkasova, "Improving WWW proxies performance with greedy-dual-size-frequency", 1998.

use super::{Entry, Evictor, Idle};
use crate::registry::{Domain, Param};
use crate::simd::prefetch;

pub(super) static ENTRY: Entry = Entry {
    name: "cost",
    summary: "cheapest to compute again first, by depth and uses (greedy dual)",
    params: &[Param {
        name: "weight",
        help: "cost of a block of prefix before it, next to its own cost of 1",
        domain: Domain::Real { default: 0.01, min: 0.0, max: 100.0 },
    }],
    create: |args, capacity| {
        let weight = args.real("weight") as f32;
        let nowhere = vec![NONE; capacity];
        let heap = Vec::with_capacity(capacity);
        Box::new(Cost { weight, clock: 0, keys: vec![0; capacity], heap, place: nowhere })
    },
};

const NONE: u32 = u32::MAX;

/// Worth is in 1/64 of a block, on a circle of 32 bits around the clock, so that the clock may
/// turn for ever: a key is at most `FAR` ahead of it, and doomed slots lie `FAR` behind.
const UNIT: f32 = 64.0;
const FAR: u32 = 1 << 30;

#[derive(Debug)]
struct Cost {
    weight: f32,
    clock: u32,
    /// Worth of each slot.
    keys: Vec<u32>,
    /// Slots, smallest worth first, as a binary heap.
    heap: Vec<u32>,
    /// Where each slot is in the heap.
    place: Vec<u32>,
}

impl Cost {
    /// How far a key is ahead of the clock.
    fn ahead(&self, key: u32) -> i32 {
        key.wrapping_sub(self.clock) as i32
    }

    fn worth(&self, idle: Idle, uses: bool) -> u32 {
        if idle.doomed {
            return self.clock.wrapping_sub(FAR);
        }
        let cost = (UNIT * (1.0 + self.weight * idle.depth as f32)) as u32;
        let old = if uses { self.ahead(self.keys[idle.slot as usize]).max(0) as u32 } else { 0 };
        self.clock.wrapping_add(old.saturating_add(cost).min(FAR))
    }

    /// Restores the order around a place whose key changed.
    fn settle(&mut self, at: usize) {
        let slot = self.heap[at];
        self.rise(at);
        self.sink(self.place[slot as usize] as usize);
    }

    fn put(&mut self, at: usize, slot: u32) {
        self.heap[at] = slot;
        self.place[slot as usize] = at as u32;
    }

    fn key(&self, at: usize) -> i32 {
        self.ahead(self.keys[self.heap[at] as usize])
    }

    fn rise(&mut self, mut at: usize) {
        let slot = self.heap[at];
        let key = self.key(at);
        while at > 0 && self.key((at - 1) / 2) > key {
            self.put(at, self.heap[(at - 1) / 2]);
            at = (at - 1) / 2;
        }
        self.put(at, slot);
    }

    fn sink(&mut self, mut at: usize) {
        let slot = self.heap[at];
        let key = self.key(at);
        loop {
            let mut child = 2 * at + 1;
            if child >= self.heap.len() {
                break;
            }
            if child + 1 < self.heap.len() && self.key(child + 1) < self.key(child) {
                child += 1;
            }
            if self.key(child) >= key {
                break;
            }
            self.put(at, self.heap[child]);
            at = child;
        }
        self.put(at, slot);
    }
}

impl Evictor for Cost {
    fn insert(&mut self, idle: Idle) {
        let slot = idle.slot as usize;
        self.keys[slot] = self.worth(idle, idle.reused);
        match self.place[slot] {
            NONE => {
                self.heap.push(idle.slot);
                self.rise(self.heap.len() - 1);
            }
            at => self.settle(at as usize),
        }
    }

    fn update(&mut self, idle: Idle) {
        let (slot, at) = (idle.slot as usize, self.place[idle.slot as usize]);
        if at != NONE && idle.doomed != (self.ahead(self.keys[slot]) < 0) {
            self.keys[slot] = self.worth(idle, false);
            self.settle(at as usize);
        }
    }

    fn pop(&mut self) -> Option<u32> {
        let slot = *self.heap.first()?;
        self.remove(slot);
        // The smallest key of the order: nothing falls behind the clock but what is doomed.
        if self.ahead(self.keys[slot as usize]) > 0 {
            self.clock = self.keys[slot as usize];
        }
        Some(slot)
    }

    fn remove(&mut self, slot: u32) -> bool {
        let at = std::mem::replace(&mut self.place[slot as usize], NONE);
        let Some(last) = (at != NONE).then(|| self.heap.pop()).flatten() else { return false };
        if last != slot {
            self.put(at as usize, last);
            self.settle(at as usize);
        }
        true
    }

    fn prefetch(&self, slots: &[u32]) {
        for slot in slots {
            prefetch(&self.keys, *slot as usize);
            prefetch(&self.place, *slot as usize);
        }
    }

    fn bytes(&self) -> usize {
        12 * self.place.len()
    }

    fn len(&self) -> usize {
        self.heap.len()
    }
}
