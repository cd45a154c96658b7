//! Preemption: the bytes of a sequence leave the cache and come back later.

use super::Sequence;
use crate::cache::{Block, BlockView};
use crate::error::{Result, ensure};

impl Sequence {
    /// Hands the bytes of every block to `put` with its index, then frees all blocks. If `put`
    /// fails the sequence is unchanged. Nothing may be reserved.
    pub fn swap_out(&mut self, put: &mut dyn FnMut(usize, &[u8]) -> Result<()>) -> Result<()> {
        self.ensure_present()?;
        ensure!(self.has_memory(), Unsupported, "a sequence of a pool has no bytes to preempt");
        ensure!(
            self.reserved == 0,
            InvalidState,
            "{} tokens are reserved; commit or truncate before preempting",
            self.reserved
        );
        for (i, span) in self.lanes.iter().flat_map(|lane| &lane.spans).enumerate() {
            put(i, span.block.view.bytes())?;
        }
        let blocks: Vec<_> = self.blocks().collect();
        let entries = std::mem::take(&mut self.entries);
        self.lossless = false;
        self.cache.release(blocks.into_iter(), entries.into_iter());
        self.swapped = true;
        self.touch();
        Ok(())
    }

    /// Allocates every block again and lets `get` fill it. On failure the sequence stays out.
    pub fn swap_in(&mut self, get: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>) -> Result<()> {
        ensure!(self.swapped, InvalidState, "the sequence is not preempted");
        let mut blocks = Vec::new();
        let result = self.allocate_and_fill(&mut blocks, get);
        if let Err(error) = result {
            self.cache.release(blocks.iter().map(|block| block.id), std::iter::empty());
            return Err(error);
        }
        let spans = self.lanes.iter_mut().flat_map(|lane| &mut lane.spans);
        for (span, block) in spans.zip(blocks) {
            span.block = block;
        }
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
        self.lanes.iter().map(|lane| lane.spans.len()).sum()
    }

    fn allocate_and_fill(
        &self,
        blocks: &mut Vec<Block>,
        get: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        for (i, span) in self.lanes.iter().flat_map(|lane| &lane.spans).enumerate() {
            self.cache.allocate(1, span.block.view.format(), blocks)?;
            let view: BlockView = blocks[i].view;
            get(i, view.write(0..view.len()))?;
        }
        Ok(())
    }
}
