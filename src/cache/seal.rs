//! Full open blocks become sealed ones: on the host one after the other, on a device many with a launch.

use super::device::Sealer;
use super::{Block, BlockView, Cache, OPEN};
use crate::device::cuda::params::Seal;
use crate::quantizer::Side;
use crate::quantizer::basis::Basis;

/// A block, by its index among those to be sealed, and memory for what it becomes.
#[derive(Debug)]
struct Target {
    index: usize,
    view: BlockView,
}

impl Cache {
    /// Seals full open blocks: encodes their cells once. Answers what each of them is now: `None` if it is
    /// shared or there is no memory for it; it stays open and can be sealed later. `basis` names that of a side
    /// of a cell of a block whose rows become coordinates.
    pub fn seal<'a>(
        &self,
        blocks: &[Block],
        basis: &dyn Fn(usize, usize, Side) -> Option<&'a Basis>,
    ) -> Vec<Option<BlockView>> {
        match &self.sealer {
            None => {
                let blocks = blocks.iter().enumerate();
                blocks.map(|(i, block)| self.seal_on_host(*block, &|c, s| basis(i, c, s))).collect()
            }
            Some(sealer) => self.seal_on_device(blocks, sealer),
        }
    }

    fn seal_on_host<'a>(
        &self,
        block: Block,
        basis: &dyn Fn(usize, Side) -> Option<&'a Basis>,
    ) -> Option<BlockView> {
        self.replace(block, self.sealed_format(), |target| {
            let tokens = self.config().block_size;
            let mut rows = Vec::new();
            for cell in 0..self.config().lane_width.cells(&self.config().shape) {
                for side in self.sides() {
                    rows.resize(tokens * self.formats()[OPEN].dim(*side), 0.0);
                    self.read_rows(&block.view, cell, *side, 0..tokens, None, &mut rows);
                    self.encode_cell(target, cell, *side, &rows, basis(cell, *side));
                }
            }
        })
    }

    /// Queues kernels that encode the blocks, after all that writes them. Blocks stay open while a graph is
    /// captured, and those of a launch that the driver refuses.
    fn seal_on_device(&self, blocks: &[Block], sealer: &Sealer) -> Vec<Option<BlockView>> {
        let mut sealed = vec![None; blocks.len()];
        let Some(gpu) = self.gpu().filter(|_| !blocks.is_empty()) else { return sealed };
        let Ok(_entered) = gpu.enter() else { return sealed };
        if gpu.ensure_not_capturing("commit").is_err() {
            return sealed;
        }
        let mut params = self.seal_params(sealer);
        let most = sealer.blocks_of_launch(params.num_cells);
        let mut next = 0;
        while next < blocks.len() {
            let targets = self.seal_targets(blocks, &mut next, most);
            for (pages, target) in params.pages.iter_mut().zip(&targets) {
                let open = &blocks[target.index].view;
                *pages = [self.page(open), self.page(&target.view)];
            }
            let grid = 2 * params.num_cells * targets.len() as u32;
            // A block without bounds gets them when somebody asks for them.
            let open = |target: &Target| &blocks[target.index];
            _ = self
                .queue_bounds(targets.iter().map(|target| (open(target).id, &open(target).view)));
            let is_queued =
                grid > 0 && gpu.launch_on_old_rows(&sealer.kernel, grid, &params).is_ok();
            self.settle_targets(blocks, &targets, is_queued);
            if !is_queued {
                break;
            }
            targets.iter().for_each(|target| sealed[target.index] = Some(target.view));
        }
        sealed
    }

    /// What all launches share.
    fn seal_params(&self, sealer: &Sealer) -> Seal {
        let [open, sealed] = [OPEN, self.sealed_format()].map(|i| &self.formats()[i]);
        let start = |side| sealed.range(0, side).start;
        Seal {
            memory: self.device_base(),
            open_cell: (open.key_bytes + open.value_bytes) as i64,
            sealed_cell: (sealed.key_bytes + sealed.value_bytes) as i64,
            sealed_v: (start(Side::Value) - start(Side::Key)) as i64,
            rotates: sealer.rotates,
            num_cells: self.config().lane_width.cells(&self.config().shape) as u32,
            pages: [[0; 2]; Seal::BLOCKS],
        }
    }

    /// Memory for up to `most` of `blocks` from index `next` on, which moves behind the last block that was
    /// looked at. Open blocks keep theirs until their kernel is queued: so nothing that is queued before it
    /// can write there, and no other block of the same launch. If memory runs out in between, the blocks
    /// before are sealed first, which frees some.
    fn seal_targets(&self, blocks: &[Block], next: &mut usize, most: usize) -> Vec<Target> {
        let mut targets = Vec::with_capacity(most.min(blocks.len() - *next));
        let mut state = self.state.write();
        let state = &mut *state;
        while targets.len() < most && *next < blocks.len() {
            let index = *next;
            if state.pool.refs(blocks[index].id) == 1 {
                let view = state.slab.as_mut().and_then(|slab| slab.allocate(self.sealed));
                match view {
                    Some(view) => targets.push(Target { index, view }),
                    None if !targets.is_empty() => break,
                    None => {}
                }
            }
            *next += 1;
        }
        targets
    }

    /// Blocks get their new memory, and the old one is free; or, if no kernel was queued, the new one is.
    fn settle_targets(&self, blocks: &[Block], targets: &[Target], is_queued: bool) {
        let mut state = self.state.write();
        let state = &mut *state;
        for Target { index, view } in targets {
            let block = &blocks[*index];
            if is_queued {
                state.views[block.id.0 as usize] = *view;
            }
            if let Some(slab) = &mut state.slab {
                slab.free(if is_queued { block.view } else { *view });
            }
        }
        state.note_peak();
    }
}
