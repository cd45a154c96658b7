//! What is different for a sequence whose blocks are on a device: policies see rows that are fetched, and
//! survivors are moved by kernels.
//!
//! ```text
//! open rows     -> an open block, by a kernel; a full one is sealed with the next commit
//! sealed rows   -> fetched, moved on the host as those of a cache there, and brought back
//! ```

use super::compact::{NewBlock, Source};
use super::{Sequence, Span};
use crate::cache::{Block, HostBlock, OPEN, RowMove};
use crate::error::Result;
use crate::quantizer::Side;

impl Sequence {
    /// As [`Self::decode`], also where blocks are on a device, from which rows are fetched: that waits for
    /// all queued work.
    pub fn read(&self, layer: usize, kv_head: usize, side: Side, out: &mut Vec<f32>) -> Result<()> {
        if self.cache.gpu().is_none() {
            self.decode(layer, kv_head, side, out);
            return Ok(());
        }
        let (lane, cell) = self.locate(layer, kv_head);
        let spans = &self.lanes[lane].spans;
        let dim = self.cache.formats()[OPEN].dim(side);
        out.resize(self.lanes[lane].len() * dim, 0.0);
        let views: Vec<_> = spans.iter().map(|span| span.block.view).collect();
        let bytes = self.cache.fetch_sides(&views, cell, side)?;
        let (mut bytes, mut rest) = (&bytes[..], &mut out[..]);
        for span in spans {
            let format = span.block.view.format();
            let len = self.cache.formats()[format].range(cell, side).len();
            let (own, after) = bytes.split_at(len);
            let (rows, tail) = rest.split_at_mut(span.count as usize * dim);
            self.cache.decode_side(format, side, own, span.first as usize..span.end(), rows);
            (bytes, rest) = (after, tail);
        }
        Ok(())
    }

    /// The format of a new block on a device, and whether it is sealed, for which `format` was chosen:
    /// rows of open blocks are encoded where they are, once they have been moved.
    pub(super) fn format_on_device(
        &self,
        index: usize,
        (format, sealed): (usize, bool),
        rows: &[Source],
    ) -> (usize, bool) {
        let spans = &self.lanes[index].spans;
        let is_open = |span: &Span| span.block.view.format() == OPEN;
        match rows.iter().all(|source| is_open(&spans[source.span as usize])) {
            true if format != OPEN => (OPEN, false),
            _ => (format, sealed),
        }
    }

    /// Brings the rows of lane `index` that `plan` names into `blocks`.
    pub(super) fn fill_on_device(
        &self,
        index: usize,
        plan: &[NewBlock<'_>],
        blocks: &[Block],
        evicted: i32,
    ) -> Result<()> {
        let spans = &self.lanes[index].spans;
        let mut moves = Vec::new();
        for (new, block) in plan.iter().zip(blocks) {
            let views = new.rows.iter().map(|source| &spans[source.span as usize].block.view);
            match views.chain([&block.view]).all(|view| view.format() == OPEN) {
                true => moves.extend(new.rows.iter().zip(0..).map(|(source, row)| RowMove {
                    from: (spans[source.span as usize].block.view, source.row),
                    to: (block.view, row),
                })),
                false => self.fill_through_host(index, new, block, evicted)?,
            }
        }
        self.cache.move_rows(&moves)
    }

    /// Fills a block with rows of which some are sealed: as a cache on the host does, with copies.
    fn fill_through_host(
        &self,
        index: usize,
        new: &NewBlock<'_>,
        block: &Block,
        evicted: i32,
    ) -> Result<()> {
        let spans = &self.lanes[index].spans;
        let mut views: Vec<_> = spans.iter().map(|span| span.block.view).collect();
        let mut copies: Vec<HostBlock> = Vec::new();
        for run in new.rows.chunk_by(|a, b| a.span == b.span) {
            let view = &mut views[run[0].span as usize];
            let copy = self.cache.fetch_block(view)?;
            *view = *copy.view();
            copies.push(copy);
        }
        let target = self.cache.host_block(block.view.format())?;
        self.fill(index, new, target.view(), &views, evicted, &[]);
        self.cache.store_block(&target, &block.view)
    }
}
