//! The device memory of a plan.
//!
//! ```text
//! table 0 .. table n-1 | tickets | partial results
//! table = items | items of prompts | places (page, row) | notes (ring, position, capacity) | pages
//! ```
//!
//! Where things are depends on the capacities alone. So the addresses that kernels are given stay the
//! same from plan to plan until a capacity grows, which a captured graph relies on.

use std::sync::Arc;

use crate::device::cuda::params::Item;
use crate::device::cuda::{DeviceMemory, Gpu, Staging};
use crate::error::Result;

/// Words that say where the query of a token is noted.
pub(super) const NOTE_WORDS: usize = 4;

/// How much of everything there is room for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Capacity {
    /// Items of a table.
    pub(super) items: usize,
    /// Items of prompts of a table.
    pub(super) prompts: usize,
    /// Rows that are appended, over all heads that have a list of their own.
    pub(super) places: usize,
    /// Tokens of which it is said where their queries are noted.
    pub(super) notes: usize,
    /// Blocks of a table.
    pub(super) pages: usize,
    /// Partial results.
    pub(super) slots: usize,
    /// Heads that are cut.
    pub(super) tickets: usize,
}

impl Capacity {
    /// The larger of both in everything.
    pub(super) fn max(&self, other: &Self) -> Self {
        Self {
            items: self.items.max(other.items),
            prompts: self.prompts.max(other.prompts),
            places: self.places.max(other.places),
            notes: self.notes.max(other.notes),
            pages: self.pages.max(other.pages),
            slots: self.slots.max(other.slots),
            tickets: self.tickets.max(other.tickets),
        }
    }

    fn fits_in(&self, other: &Self) -> bool {
        self.items <= other.items
            && self.prompts <= other.prompts
            && self.places <= other.places
            && self.notes <= other.notes
            && self.pages <= other.pages
            && self.slots <= other.slots
            && self.tickets <= other.tickets
    }

    /// Room for both, with some to grow.
    fn grown(&self, other: &Self) -> Self {
        let grow = |a: usize, b: usize| a.max(b).max(64).next_power_of_two();
        Self {
            items: grow(self.items, other.items),
            prompts: grow(self.prompts, other.prompts),
            places: grow(self.places, other.places),
            notes: grow(self.notes, other.notes),
            pages: grow(self.pages, other.pages),
            slots: grow(self.slots, other.slots),
            tickets: grow(self.tickets, other.tickets),
        }
    }
}

/// The most that the engine says it will plan, and what its own tables need for it. Parts that only some plans
/// have take memory for all of it at once, when a plan first has them.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Limits {
    pub(super) num_sequences: usize,
    pub(super) num_queries: usize,
    pub(super) num_kv_heads: usize,
    /// Blocks of a table, and how many heads read each of them.
    pub(super) num_blocks: usize,
    pub(super) heads_per_block: usize,
    /// Of the tables for all blocks.
    pub(super) capacity: Capacity,
}

/// Words of 32 bits from the start of a table.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Layout {
    pub(super) prompts: usize,
    pub(super) places: usize,
    pub(super) notes: usize,
    pub(super) pages: usize,
    /// Words of a table.
    pub(super) words: usize,
}

/// Device memory with the pinned memory that it is filled from.
#[derive(Debug)]
pub(super) struct Workspace {
    gpu: Arc<Gpu>,
    num_tables: usize,
    /// Bytes of a partial result.
    slot_bytes: usize,
    capacity: Capacity,
    pub(super) layout: Layout,
    held: Option<(DeviceMemory, Staging)>,
    /// Changes when addresses do.
    pub(super) generation: u32,
}

impl Workspace {
    pub(super) fn new(gpu: &Arc<Gpu>, num_tables: usize, slot_bytes: usize) -> Self {
        let (capacity, layout) = (Capacity::default(), Layout::default());
        let gpu = gpu.clone();
        Self { gpu, num_tables, slot_bytes, capacity, layout, held: None, generation: 0 }
    }

    /// Makes room for `n` tables from the next [`Self::reserve`] on; never for less than before.
    pub(super) fn set_tables(&mut self, n: usize) {
        if n > self.num_tables {
            self.num_tables = n;
            self.held = None;
        }
    }

    /// Makes room for what a plan needs. Waits for the device if it has to grow; what was in the tables is
    /// gone then. Answers whether that is so.
    pub(super) fn reserve(&mut self, needed: &Capacity) -> Result<bool> {
        if self.held.is_some() && needed.fits_in(&self.capacity) {
            return Ok(false);
        }
        let capacity = self.capacity.grown(needed);
        let align = |words: usize| words.next_multiple_of(4);
        let prompts = capacity.items * Item::WORDS;
        let places = prompts + capacity.prompts * Item::WORDS;
        let notes = places + align(capacity.places * 2);
        let pages = notes + capacity.notes * NOTE_WORDS;
        let words = pages + align(capacity.pages);
        let layout = Layout { prompts, places, notes, pages, words };
        let table_bytes = layout.words * 4 * self.num_tables;
        let tickets = (capacity.tickets * 4).next_multiple_of(16);
        let bytes = table_bytes + tickets + capacity.slots * self.slot_bytes;
        // The old memory goes first: two of the larger ones may not fit.
        self.held = None;
        self.capacity = Capacity::default();
        let memory = DeviceMemory::allocate(&self.gpu, bytes)?;
        memory.clear(table_bytes, tickets)?;
        let staging = Staging::new(&self.gpu, table_bytes)?;
        self.held = Some((memory, staging));
        (self.capacity, self.layout) = (capacity, layout);
        self.generation += 1;
        Ok(true)
    }

    /// Lets `fill` write the tables, `layout.words` words each, and queues the copy to the device.
    /// `fill` answers how many pages each table has.
    pub(super) fn write(&mut self, fill: impl FnOnce(&mut [u32]) -> usize) -> Result<()> {
        let Some((memory, staging)) = &mut self.held else { return Ok(()) };
        let used = self.layout.pages + fill(staging.begin()?);
        let words = self.layout.words;
        // Small tables go as one.
        if self.num_tables == 1 || words * self.num_tables <= 1 << 18 {
            let words = words * (self.num_tables - 1) + used;
            return staging.send(memory, &[(0, words, 0)]);
        }
        let copies: Vec<_> =
            (0..self.num_tables).map(|i| (i * words, used, i * words * 4)).collect();
        staging.send(memory, &copies)
    }

    /// The device address of word `word` of a table.
    pub(super) fn address(&self, table: usize, word: usize) -> u64 {
        let base = self.held.as_ref().map_or(0, |(memory, _)| memory.address());
        base + ((table * self.layout.words + word) * 4) as u64
    }

    /// The device address of the tickets.
    pub(super) fn tickets(&self) -> u64 {
        self.address(self.num_tables, 0)
    }

    /// The device address of the partial results.
    pub(super) fn partials(&self) -> u64 {
        self.tickets() + (self.capacity.tickets * 4).next_multiple_of(16) as u64
    }
}
