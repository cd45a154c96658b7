//! The rows of one KV head of one stream: which slot is in which row of which block.
//!
//! ```text
//! slots   0 1 2 3 4 5 ...         numbered by the engine
//!         | | x | | |             x: evicted
//! rows    [0 1 3 4] [5 ...]       blocks, filled from the front
//! ```

use super::side::{Place, SideStore};
use crate::error::Result;

/// Most rows of a block: one bit each.
pub(super) const MAX_BLOCK: usize = 64;

/// A slot that was never written.
const ABSENT: u32 = u32::MAX;
/// A slot whose token was evicted and that was not written since.
const EVICTED: u32 = u32::MAX - 1;

/// What one KV head holds of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotState {
    /// Never written.
    Absent,
    /// Present.
    Live,
    /// Evicted, and not written since.
    Evicted,
}

/// The slots of the rows of a block, in the order of the rows. Most are a run, which takes no list.
#[derive(Debug, Clone, Default)]
pub(super) struct SlotList {
    first: u32,
    len: u32,
    /// Empty as long as they are a run.
    list: Vec<u32>,
}

/// Rows that are encoded together and the slots they belong to.
#[derive(Debug, Clone)]
pub(super) struct Block {
    /// The slot of each row handed out.
    pub(super) slots: SlotList,
    /// Rows whose slot still points here.
    pub(super) live: u64,
    /// Rows written, for keys and for values.
    written: [u64; 2],
    /// Whether some row holds what a weight of 0 does not silence.
    pub(super) is_wild: bool,
    pub(super) places: [Place; 2],
}

/// The rows of one KV head.
#[derive(Debug, Default)]
pub(super) struct Lane {
    /// Row of each slot, as long as the highest slot ever used.
    rows: Vec<u32>,
    blocks: Vec<Option<Block>>,
    free: Vec<u32>,
    tail: Option<u32>,
    num_rows: usize,
    num_blocks: usize,
}

impl SlotList {
    pub(super) fn len(&self) -> usize {
        self.len as usize
    }

    /// The first slot, if the others are those after it.
    pub(super) fn run(&self) -> Option<usize> {
        self.list.is_empty().then_some(self.first as usize)
    }

    /// Every slot, unless they are a run.
    pub(super) fn list(&self) -> &[u32] {
        &self.list
    }

    fn get(&self, row: usize) -> u32 {
        self.list.get(row).copied().unwrap_or(self.first + row as u32)
    }

    fn push(&mut self, slot: u32) {
        if self.len == 0 {
            self.first = slot;
        } else if self.list.is_empty() && slot != self.first + self.len {
            self.list = (self.first..self.first + self.len).collect();
        }
        if !self.list.is_empty() {
            self.list.push(slot);
        }
        self.len += 1;
    }
}

impl Lane {
    pub(super) fn state(&self, slot: usize) -> SlotState {
        match self.rows.get(slot).copied().unwrap_or(ABSENT) {
            ABSENT => SlotState::Absent,
            EVICTED => SlotState::Evicted,
            _ => SlotState::Live,
        }
    }

    /// The blocks with at least one live row, in one of `parts` parts of the table.
    pub(super) fn blocks(&self, part: usize, parts: usize) -> impl Iterator<Item = &Block> {
        let len = self.blocks.len();
        let part = &self.blocks[len * part / parts..len * (part + 1) / parts];
        part.iter().flatten().filter(|block| block.live != 0)
    }

    /// Live rows.
    pub(super) fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Writes one side of a slot, which gets a row if it has none.
    pub(super) fn write(
        &mut self,
        sides: &mut [SideStore; 2],
        side: usize,
        slot: usize,
        values: &[f32],
    ) -> Result<()> {
        let size = sides[side].block_size();
        let row = match self.state(slot) {
            SlotState::Live if self.is_writable(sides, side, slot) => self.rows[slot],
            SlotState::Live => self.unseal(sides, side, slot)?,
            _ => self.append(sides, slot)?,
        };
        let (block, bit) = (row as usize / size, row as usize % size);
        let Some(block) = &mut self.blocks[block] else { return Ok(()) };
        sides[side].write(block.places[side], bit, values);
        block.written[side] |= 1 << bit;
        // Beyond f16 means infinite in raw formats, and 0 times infinity is not 0.
        block.is_wild |= !values.iter().all(|x| x.abs() <= 65504.0);
        self.seal(sides, row as usize / size, side)
    }

    fn is_writable(&self, sides: &[SideStore; 2], side: usize, slot: usize) -> bool {
        let block = self.rows[slot] as usize / sides[side].block_size();
        let block = self.blocks[block].as_ref();
        block.is_some_and(|block| sides[side].is_writable(block.places[side]))
    }

    fn seal(&mut self, sides: &mut [SideStore; 2], block: usize, side: usize) -> Result<()> {
        let full = u64::MAX >> (MAX_BLOCK - sides[side].block_size());
        if let Some(block) = &mut self.blocks[block]
            && sides[side].seals()
            && block.places[side].format == 0
            && block.written[side] == full
        {
            block.places[side] = sides[side].seal(block.places[side])?;
        }
        Ok(())
    }

    /// Moves a slot out of a sealed block so that `side` of it can be written, which is not copied:
    /// the copy could fill the new block and seal it.
    fn unseal(&mut self, sides: &mut [SideStore; 2], side: usize, slot: usize) -> Result<u32> {
        let size = sides[0].block_size();
        let (block, bit) = (self.rows[slot] as usize / size, self.rows[slot] as usize % size);
        let Some(mut old) = self.blocks[block].clone() else { return self.append(sides, slot) };
        old.written[side] &= !(1 << bit);
        let row = self.take_row(sides, slot)?;
        self.copy_row(sides, &old, bit, row)?;
        self.drop_row(sides, block, bit);
        self.rows[slot] = row;
        Ok(row)
    }

    fn append(&mut self, sides: &mut [SideStore; 2], slot: usize) -> Result<u32> {
        let row = self.take_row(sides, slot)?;
        self.make_room(slot);
        self.rows[slot] = row;
        Ok(row)
    }

    /// Grows by whole pages: doubling would waste as much as a lane of few bits per row holds.
    fn make_room(&mut self, slot: usize) {
        if self.rows.len() <= slot {
            let room = (slot + 1).next_multiple_of(1024);
            self.rows.reserve_exact(room - self.rows.len());
            self.rows.resize(slot + 1, ABSENT);
        }
    }

    /// Hands out the next row of the last block.
    fn take_row(&mut self, sides: &mut [SideStore; 2], slot: usize) -> Result<u32> {
        let size = sides[0].block_size();
        let has_room = |block: &Block| block.slots.len() < size;
        let tail =
            self.tail.filter(|tail| self.blocks[*tail as usize].as_ref().is_some_and(has_room));
        let tail = match tail {
            Some(tail) => tail,
            None => self.new_block(sides)?,
        };
        self.tail = Some(tail);
        let Some(block) = &mut self.blocks[tail as usize] else { return Ok(ABSENT) };
        let bit = block.slots.len();
        block.slots.push(slot as u32);
        block.live |= 1 << bit;
        self.num_rows += 1;
        Ok(tail * size as u32 + bit as u32)
    }

    fn new_block(&mut self, sides: &mut [SideStore; 2]) -> Result<u32> {
        let key = sides[0].open()?;
        let value = sides[1].open().inspect_err(|_| sides[0].release(key))?;
        let slots = SlotList::default();
        let places = [key, value];
        let block = Some(Block { slots, live: 0, written: [0; 2], is_wild: false, places });
        self.num_blocks += 1;
        Ok(match self.free.pop() {
            Some(index) => {
                self.blocks[index as usize] = block;
                index
            }
            None => {
                self.blocks.push(block);
                self.blocks.len() as u32 - 1
            }
        })
    }

    /// Forgets a row; the last one of a block frees it.
    fn drop_row(&mut self, sides: &mut [SideStore; 2], index: usize, bit: usize) {
        self.num_rows -= 1;
        let Some(block) = &mut self.blocks[index] else { return };
        block.live &= !(1 << bit);
        let is_tail = self.tail == Some(index as u32) && block.slots.len() < sides[0].block_size();
        if block.live == 0 && !is_tail {
            self.drop_block(sides, index);
        }
    }

    fn drop_block(&mut self, sides: &mut [SideStore; 2], index: usize) {
        if let Some(block) = self.blocks[index].take() {
            sides.iter_mut().zip(block.places).for_each(|(side, place)| side.release(place));
            self.free.push(index as u32);
            self.num_blocks -= 1;
            self.tail = self.tail.filter(|tail| *tail as usize != index);
        }
    }

    /// Writes what is written of a row of `source` to another row.
    fn copy_row(
        &mut self,
        sides: &mut [SideStore; 2],
        source: &Block,
        bit: usize,
        row: u32,
    ) -> Result<()> {
        let size = sides[0].block_size();
        let (index, target_bit) = (row as usize / size, row as usize % size);
        let Some(block) = &mut self.blocks[index] else { return Ok(()) };
        block.is_wild |= source.is_wild;
        for (side, store) in sides.iter_mut().enumerate() {
            if source.written[side] >> bit & 1 == 1 {
                store.move_row((source.places[side], bit), (block.places[side], target_bit));
                block.written[side] |= 1 << target_bit;
            }
        }
        (0..2).try_for_each(|side| self.seal(sides, index, side))
    }

    /// Evicts the token of a slot. Its row is memory again only after [`Self::compact`].
    pub(super) fn evict(&mut self, sides: &mut [SideStore; 2], slot: usize) {
        self.make_room(slot);
        if self.state(slot) == SlotState::Live {
            let (row, size) = (self.rows[slot] as usize, sides[0].block_size());
            self.drop_row(sides, row / size, row % size);
        }
        self.rows[slot] = EVICTED;
    }

    /// Whether dead rows take more than their share: a quarter, beyond two blocks.
    pub(super) fn is_sparse(&self, size: usize) -> bool {
        let rows = self.num_blocks * size;
        rows > 2 * size + self.num_rows + self.num_rows / 3
    }

    /// Moves the live rows of every block with holes to the end, so that the holes become memory.
    pub(super) fn compact(&mut self, sides: &mut [SideStore; 2]) -> Result<()> {
        let size = sides[0].block_size();
        let full = u64::MAX >> (MAX_BLOCK - size);
        // The tail is closed: otherwise it would be both source and target.
        self.tail = None;
        for index in 0..self.blocks.len() {
            let Some(block) = &self.blocks[index] else { continue };
            // What moved to the end already has no holes but its unused rows.
            if block.live == full || self.tail == Some(index as u32) {
                continue;
            }
            let block = block.clone();
            for bit in 0..block.slots.len() {
                if block.live >> bit & 1 == 1 {
                    let slot = block.slots.get(bit) as usize;
                    let row = self.take_row(sides, slot)?;
                    self.copy_row(sides, &block, bit, row)?;
                    self.rows[slot] = row;
                    self.num_rows -= 1;
                }
            }
            self.drop_block(sides, index);
        }
        Ok(())
    }

    /// Decodes one side of a live slot.
    pub(super) fn read(&self, sides: &[SideStore; 2], side: usize, slot: usize, out: &mut [f32]) {
        let size = sides[side].block_size();
        let row = self.rows[slot] as usize;
        match &self.blocks[row / size] {
            Some(block) => sides[side].read(block.places[side], row % size, out),
            None => out.fill(0.0),
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self, sides: &mut [SideStore; 2]) {
        for index in 0..self.blocks.len() {
            self.drop_block(sides, index);
        }
        *self = Self::default();
    }

    /// The same rows with bytes of their own.
    pub(super) fn duplicate(&self, sides: &mut [SideStore; 2]) -> Result<Self> {
        let mut copy = Self {
            rows: self.rows.clone(),
            blocks: Vec::with_capacity(self.blocks.len()),
            free: self.free.clone(),
            ..*self
        };
        for block in &self.blocks {
            let block = match block {
                None => None,
                Some(block) => {
                    let key = sides[0].duplicate(block.places[0])?;
                    let value = sides[1].duplicate(block.places[1])?;
                    Some(Block { places: [key, value], ..block.clone() })
                }
            };
            copy.blocks.push(block);
        }
        Ok(copy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_a_run_until_they_are_not() {
        let mut slots = SlotList::default();
        for (i, slot) in [7, 8, 9, 3, 4].into_iter().enumerate() {
            slots.push(slot);
            assert_eq!((slots.len(), slots.get(i)), (i + 1, slot));
            assert_eq!(slots.run(), (i < 3).then_some(7));
        }
        assert_eq!(slots.list(), [7, 8, 9, 3, 4]);
    }
}
