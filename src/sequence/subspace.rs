//! Blocks whose rows are coordinates in a subspace: which one, and how a sequence comes by it.

use std::sync::Arc;

use super::{Lane, Sequence};
use crate::cache::OPEN;
use crate::quantizer::Side;
use crate::quantizer::basis::{Bases, Basis};

/// Rows for each dimension that a subspace is fitted to, at least: with fewer it would be theirs alone.
const ROWS_PER_DIMENSION: usize = 2;

impl Sequence {
    /// The subspace of one side of a cell of a lane in blocks of `format`; `None` for whole rows.
    pub(super) fn basis(
        &self,
        lane: usize,
        cell: usize,
        side: Side,
        format: usize,
    ) -> Option<&Basis> {
        // Lanes are of consecutive heads.
        let config = self.cache.config();
        let head = lane * config.lane_width.cells(&config.shape) + cell;
        self.cache.basis(self.bases.as_deref(), head, side, format)
    }

    /// Whether no block can be sealed yet, because the subspaces of its rows are not known.
    pub(super) fn awaits_bases(&self) -> bool {
        self.cache.low_rank().is_some() && self.bases.is_none()
    }

    /// Fits subspaces to the rows of all heads, if they are needed and the prompt has left enough rows.
    pub(super) fn fit_bases(&mut self) {
        let Some(low_rank) = self.cache.low_rank() else { return };
        if self.bases.is_some() || !self.may_fit {
            return;
        }
        let ranks = low_rank.ranks;
        let most = ranks.iter().flatten().max().map_or(0, |rank| ROWS_PER_DIMENSION * rank);
        // Rows that are reserved are not written yet.
        let written = |lane: &Lane| lane.len() - self.reserved;
        if self.lanes.iter().map(written).min().unwrap_or(0) < most {
            return;
        }
        let shape = self.cache.config().shape;
        let mut rows = Vec::new();
        let mut fit = |layer: usize, head: usize, side: Side| {
            let rank = ranks[side as usize]?;
            self.decode(layer, head, side, &mut rows);
            let dim = self.cache.formats()[OPEN].dim(side);
            let (lane, _) = self.locate(layer, head);
            Some(Basis::fit(&rows[..written(&self.lanes[lane]) * dim], dim, rank))
        };
        let heads = (0..shape.num_layers * shape.num_kv_heads)
            .map(|i| (i / shape.num_kv_heads, i % shape.num_kv_heads))
            .map(|(layer, head)| [Side::Key, Side::Value].map(|side| fit(layer, head, side)))
            .collect();
        self.bases = Some(Arc::new(Bases::new(heads)));
    }

    /// Forgets subspaces that were fitted to a prompt of which nothing is left.
    pub(super) fn forget_bases(&mut self) {
        let Some(low_rank) = self.cache.low_rank() else { return };
        if low_rank.bases.is_none() && self.lanes.iter().all(Lane::is_empty) {
            (self.bases, self.may_fit) = (None, false);
        }
    }

    /// Bytes of subspaces that are fitted to the sequence, shared with its forks; 0 if they are the cache's.
    pub fn basis_bytes(&self) -> usize {
        let is_own = self.cache.low_rank().is_some_and(|low_rank| low_rank.bases.is_none());
        self.bases.as_ref().filter(|_| is_own).map_or(0, |bases| bases.bytes())
    }
}
