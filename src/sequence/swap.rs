//! Preemption: the bytes of a sequence leave the cache and come back later.

use super::{Lane, Recurrent, Sequence};
use crate::cache::{Block, BlockView};
use crate::error::{Result, ensure};

impl Sequence {
    /// Hands the bytes of every block and, last, of the state of recurrent layers to `put` with its index,
    /// then frees all of them; snapshots are dropped. If `put` fails the sequence is unchanged. Nothing
    /// may be reserved.
    pub fn swap_out(&mut self, put: &mut dyn FnMut(usize, &[u8]) -> Result<()>) -> Result<()> {
        self.ensure_present()?;
        ensure!(self.has_memory(), Unsupported, "a sequence of a pool has no bytes to preempt");
        ensure!(
            self.reserved == 0,
            InvalidState,
            "{} tokens are reserved; commit or truncate before preempting",
            self.reserved
        );
        for (i, block) in self.lanes.iter().flat_map(Lane::blocks).enumerate() {
            put(i, &self.cache.block_bytes(&block.view)?)?;
        }
        if let Some(recurrent) = &self.recurrent {
            put(self.num_blocks(), &self.cache.state_bytes(recurrent.state())?)?;
        }
        let blocks: Vec<_> = self.blocks().collect();
        let entries = std::mem::take(&mut self.entries);
        self.lossless = false;
        self.cache.release(blocks.into_iter(), entries.into_iter());
        let states = self.recurrent.take().into_iter().flat_map(Recurrent::into_states);
        self.cache.release_states(states);
        self.swapped = true;
        self.touch();
        Ok(())
    }

    /// Allocates every block, and the state, again and lets `get` fill it. On failure the sequence stays out.
    pub fn swap_in(&mut self, get: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>) -> Result<()> {
        ensure!(self.swapped, InvalidState, "the sequence is not preempted");
        let mut blocks = Vec::new();
        let mut result = self.allocate_and_fill(&mut blocks, get);
        if result.is_ok() {
            result = self.swap_in_state(get);
        }
        if let Err(error) = result {
            self.cache.release(blocks.iter().map(|block| block.id), std::iter::empty());
            return Err(error);
        }
        let mut blocks = blocks.into_iter();
        let mut more = Vec::new();
        for lane in &mut self.lanes {
            for spans in lane.spans.chunk_by_mut(|a, b| a.block.id == b.block.id) {
                let Some(block) = blocks.next() else { break };
                more.extend(std::iter::repeat_n(block.id, spans.len() - 1));
                spans.iter_mut().for_each(|span| span.block = block);
            }
        }
        self.cache.retain(more);
        self.swapped = false;
        self.touch();
        Ok(())
    }

    /// Whether the bytes are elsewhere.
    pub fn is_swapped(&self) -> bool {
        self.swapped
    }

    /// Blocks that the sequence refers to, or will when it is back.
    pub fn num_blocks(&self) -> usize {
        self.lanes.iter().map(|lane| lane.blocks().count()).sum()
    }

    fn swap_in_state(&mut self, get: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>) -> Result<()> {
        let Some(recurrent) = Recurrent::new(&self.cache)? else { return Ok(()) };
        let i = self.num_blocks();
        let result = self.cache.fill_state(recurrent.state(), &mut |bytes| get(i, bytes));
        match result {
            Ok(()) => self.recurrent = Some(recurrent),
            Err(_) => self.cache.release_states(recurrent.into_states()),
        }
        result
    }

    fn allocate_and_fill(
        &self,
        blocks: &mut Vec<Block>,
        get: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        for (i, block) in self.lanes.iter().flat_map(Lane::blocks).enumerate() {
            self.cache.allocate(1, block.view.format(), blocks)?;
            let view: BlockView = blocks[i].view;
            self.cache.fill_block(&view, &mut |bytes| get(i, bytes))?;
        }
        Ok(())
    }
}
