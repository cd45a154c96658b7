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
        Box::new(Cost { weight, clock: 0.0, keys: vec![0.0; capacity], heap, place: nowhere })
    },
};

const NONE: u32 = u32::MAX;

#[derive(Debug)]
struct Cost {
    weight: f32,
    clock: f32,
    /// Worth of each slot.
    keys: Vec<f32>,
    /// Slots, smallest worth first, as a binary heap.
    heap: Vec<u32>,
    /// Where each slot is in the heap.
    place: Vec<u32>,
}

impl Cost {
    fn put(&mut self, at: usize, slot: u32) {
        self.heap[at] = slot;
        self.place[slot as usize] = at as u32;
    }

    fn key(&self, at: usize) -> f32 {
        self.keys[self.heap[at] as usize]
    }

    fn rise(&mut self, mut at: usize) {
        let slot = self.heap[at];
        while at > 0 && self.key((at - 1) / 2) > self.keys[slot as usize] {
            self.put(at, self.heap[(at - 1) / 2]);
            at = (at - 1) / 2;
        }
        self.put(at, slot);
    }

    fn sink(&mut self, mut at: usize) {
        let slot = self.heap[at];
        loop {
            let mut child = 2 * at + 1;
            if child >= self.heap.len() {
                break;
            }
            if child + 1 < self.heap.len() && self.key(child + 1) < self.key(child) {
                child += 1;
            }
            if self.key(child) >= self.keys[slot as usize] {
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
        let cost = 1.0 + self.weight * idle.depth as f32;
        let old = if idle.reused { self.keys[slot] } else { 0.0 };
        self.keys[slot] = old.max(self.clock) + cost;
        match self.place[slot] {
            NONE => {
                self.heap.push(idle.slot);
                self.rise(self.heap.len() - 1);
            }
            at => {
                self.rise(at as usize);
                self.sink(self.place[slot] as usize);
            }
        }
    }

    fn pop(&mut self) -> Option<u32> {
        let slot = *self.heap.first()?;
        let last = self.heap.pop()?;
        if last != slot {
            self.put(0, last);
            self.sink(0);
        }
        self.place[slot as usize] = NONE;
        self.clock = self.keys[slot as usize];
        Some(slot)
    }

    fn bytes(&self) -> usize {
        12 * self.place.len()
    }

    fn len(&self) -> usize {
        self.heap.len()
    }
}
