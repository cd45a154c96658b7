//! Demotion: rows that a policy ranks low stay, in blocks of a lower format.
//!
//! ```text
//! before   | h l h h | l h l l | h h l h | h h . . |        h: stays as it is, l: demoted
//! after    | l l l l | h h h h | h h h l | h h . . |        full blocks of l come first; what does
//! by format    low       high      high     open             not fill one stays as it is
//! ```
//!
//! Attention does not care about the order of rows, as long as those of queries come last. Who does asks
//! for it: [`Lane::order`].

use super::compact::{Source, sources};
use super::{Lane, Sequence};
use crate::block::BlockId;
use crate::error::{Result, ensure};
use crate::shape::KeepSet;

/// The rows of a lane by what becomes of them.
#[derive(Debug, Default)]
pub(super) struct Groups {
    /// Indices of demoted spans that stay as they are.
    pub(super) whole: Vec<usize>,
    /// Rows for new demoted blocks, by position; whole blocks of them.
    pub(super) low: Vec<Source>,
    /// The others, by position.
    pub(super) high: Vec<Source>,
}

impl Groups {
    /// The rows of `keep`; of those that are not demoted, the ones in `victims`, ascending, are to be.
    pub(super) fn new(lane: &Lane, keep: &KeepSet, victims: &[usize], block_size: usize) -> Self {
        let mut groups = Self::default();
        let mut victims = victims.iter().copied().peekable();
        let rows: Vec<(usize, Source)> = keep.iter().zip(sources(lane, keep)).collect();
        for run in rows.chunk_by(|a, b| a.1.span == b.1.span) {
            let span = run[0].1.span as usize;
            let is_demoted = lane.spans[span].demoted;
            if is_demoted && run.len() == block_size {
                groups.whole.push(span);
                continue;
            }
            for (row, source) in run {
                let is_low = is_demoted || victims.next_if_eq(row).is_some();
                if is_low { &mut groups.low } else { &mut groups.high }.push(*source);
            }
        }
        groups.low.sort_by_key(|source| source.position(lane));
        let full = groups.low.len() / block_size * block_size;
        groups.high.extend(groups.low.drain(full..));
        groups.high.sort_by_key(|source| source.position(lane));
        groups
    }

    /// Rows of all groups.
    pub(super) fn len(&self, lane: &Lane) -> usize {
        let whole: u32 = self.whole.iter().map(|i| lane.spans[*i].count).sum();
        whole as usize + self.low.len() + self.high.len()
    }

    /// For each row where it was in `lane`; `None` if all rows keep their order.
    pub(super) fn order(&self, lane: &Lane) -> Option<Vec<u32>> {
        if self.low.is_empty() && lane.num_demoted_spans() == 0 {
            return None;
        }
        let mut starts = Vec::with_capacity(lane.spans.len());
        let mut start = 0;
        for span in &lane.spans {
            starts.push(start);
            start += span.count;
        }
        let whole = self.whole.iter().flat_map(|i| starts[*i]..starts[*i] + lane.spans[*i].count);
        let place = |source: &Source| {
            let span = source.span as usize;
            starts[span] + source.row - lane.spans[span].first
        };
        Some(whole.chain(self.low.iter().map(place)).chain(self.high.iter().map(place)).collect())
    }
}

impl Sequence {
    /// Moves rows of lane `index` to blocks of `format`: the oldest that are not in `keep`, which counts
    /// rows by ascending position ([`Lane::order`]), as far as they fill blocks. What is demoted stays so;
    /// what [`crate::cache::Exact`] names is never demoted. Fails without a change if no block is free.
    pub fn demote(&mut self, index: usize, keep: &KeepSet, format: usize) -> Result<()> {
        self.ensure_compactable()?;
        let is_on_host = self.cache.gpu().is_none();
        ensure!(is_on_host, Unsupported, "rows on a CUDA device cannot be demoted yet");
        ensure!(
            format < self.cache.formats().len(),
            InvalidArgument,
            "format is {format}, the cache has {}",
            self.cache.formats().len()
        );
        let block_size = self.cache.config().block_size;
        let lane = &self.lanes[index];
        let len = lane.len();
        ensure!(
            keep.end() <= len,
            InvalidArgument,
            "the keep set ends at {}, the lane has {len} rows",
            keep.end()
        );
        let mut victims = self.victims(index, keep);
        victims.truncate(victims.len() / block_size * block_size);
        if victims.is_empty() {
            return Ok(());
        }
        let groups = Groups::new(lane, &KeepSet::all(len), &victims, block_size);
        let regrouped = self.gather(index, &groups, format, &[])?;
        let order = groups.order(lane).unwrap_or_default();
        self.install(index, regrouped, len, |head| head.reorder(&order, len));
        Ok(())
    }

    /// Rows of lane `index` that may be demoted and are not in `keep`, ascending.
    fn victims(&self, index: usize, keep: &KeepSet) -> Vec<usize> {
        let exact = self.cache.config().exact();
        if self.cache.skips(index) {
            return Vec::new();
        }
        let lane = &self.lanes[index];
        let mut stays = vec![false; lane.len()];
        let order = lane.order();
        for i in keep.iter() {
            stays[order.as_ref().map_or(i, |order| order[i] as usize)] = true;
        }
        let mut positions = Vec::new();
        self.positions(index, &mut positions);
        let movable = exact.first as i32..self.residual_start();
        let demoted = lane.num_demoted();
        (demoted..lane.len()).filter(|i| !stays[*i] && movable.contains(&positions[*i])).collect()
    }

    /// Drops demoted rows of lane `index` at positions of `limit` and above; says whether there were
    /// any. Observations follow.
    pub(super) fn drop_demoted_from(
        &mut self,
        index: usize,
        limit: i32,
        released: &mut Vec<BlockId>,
    ) -> bool {
        let lane = &self.lanes[index];
        let demoted = lane.num_demoted_spans();
        let is_cut = |i: usize| lane.spans[i].rows_below(limit) < lane.spans[i].count as usize;
        if !(0..demoted).any(is_cut) {
            return false;
        }
        let len = lane.len();
        let mut kept = KeepSet::default();
        let mut start = 0;
        for (i, span) in lane.spans.iter().enumerate() {
            let below = if i < demoted { span.rows_below(limit) } else { span.count as usize };
            if below > 0 {
                kept.push_range(start..start + below);
            }
            start += span.count as usize;
        }
        let spans = std::mem::take(&mut self.lanes[index].spans);
        let cut = |(i, mut span): (usize, super::Span)| {
            if i < demoted {
                span.count = span.rows_below(limit) as u32;
            }
            if span.count == 0 {
                released.push(span.block.id);
            }
            (span.count > 0).then_some(span)
        };
        let lane = &mut self.lanes[index];
        lane.spans = spans.into_iter().enumerate().filter_map(cut).collect();
        let gone = demoted - lane.num_demoted_spans();
        lane.first_open = lane.first_open.saturating_sub(gone);
        self.follow_lane(index, |head| head.keep(&kept, len));
        true
    }

    /// Lets the observations of the heads of lane `index` follow it; answers how many heads it has.
    pub(super) fn follow_lane(
        &self,
        index: usize,
        follow: impl Fn(&mut super::HeadObservation),
    ) -> usize {
        let shape = self.cache.config().shape;
        let heads = (0..shape.num_layers * shape.num_kv_heads)
            .map(|i| (i / shape.num_kv_heads, i % shape.num_kv_heads))
            .filter(|(layer, head)| self.locate(*layer, *head).0 == index);
        let mut count = 0;
        for (layer, head) in heads {
            count += 1;
            if let Some(observation) = &self.observation {
                follow(&mut observation.head(layer, head).lock());
            }
        }
        count
    }
}
