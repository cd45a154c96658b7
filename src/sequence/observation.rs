//! What attention saw and a policy may ask for. Written by attention, read by policies; follows
//! its tokens through eviction, truncation and fork.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::index::BlockIndex;
use super::received::{MAX_DRAFTS, Received, keep_rows, reorder_rows};
use super::residual::Residual;
use super::ring::{NotedQueries, QueryRing};
use super::statistics::QueryStatistics;
use super::sums::{NotedSums, RowSums};
use crate::device::cuda::Gpu;
use crate::dtype::DType;
use crate::error::Result;
use crate::selector::Selector;
use crate::shape::{KeepSet, ModelShape, Needs};

/// Queries of earlier positions are left out of statistics: sinks are unlike all others.
pub const FIRST_STATISTIC: i32 = 4;

/// Observations of one sequence, one part for each (layer, KV head) so that workers that attend
/// for different heads never wait for each other.
#[derive(Debug)]
pub struct Observation {
    needs: Needs,
    window: usize,
    heads: Vec<Mutex<HeadObservation>>,
    num_kv_heads: usize,
    history: usize,
    selector: Option<Arc<dyn Selector>>,
    /// What reserved tokens replay, if they do.
    replay: RwLock<Option<Replay>>,
    /// For each layer, the lengths of the hidden states of the reserved tokens.
    replay_norms: Vec<RwLock<Vec<f32>>>,
    /// How much attention of each layer changes the residual stream.
    residuals: Vec<Mutex<Residual>>,
    /// Queries that are noted in the memory of a device.
    noted: Option<NotedQueries>,
    /// What rows receive there.
    noted_sums: Option<NotedSums>,
}

/// Tokens that reserved tokens read once more: the prompt, or a piece of it, repeated. A softmax is over
/// the sinks, them and the tokens that replay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replay {
    /// Positions of the tokens.
    pub tokens: Range<i32>,
    /// Leading tokens of the sequence that take part besides them.
    pub sinks: i32,
}

/// Observations of one (layer, KV head).
#[derive(Debug, Clone, Default)]
pub struct HeadObservation {
    /// The last queries, oldest first: position and `[group, head_dim]` elements each.
    queries: Vec<(i32, Box<[f32]>)>,
    /// Buffers of queries that are used again.
    spare_queries: Vec<Box<[f32]>>,
    /// Attention probability that each cached row received.
    pub received: Received,
    /// Queries that gave each row less than an even share since the last eviction.
    pub low_counts: Vec<f32>,
    /// Statistics of each query head of the group, from position [`FIRST_STATISTIC`] on. Tokens that
    /// are truncated or not committed stay in them as long as any token is left.
    pub statistics: Vec<QueryStatistics>,
    /// What the policy's gate made of the hidden state of each row, NaN where none was handed over.
    pub gate_scores: Vec<f32>,
    /// For each query head of the group, the largest probability that each row received from a token
    /// that replays it; NaN for rows that none has.
    pub replay_maxima: Vec<Vec<f32>>,
    /// What the selector knows of the blocks, once attention has asked it.
    pub index: Option<BlockIndex>,
}

impl Observation {
    /// Nothing observed yet; `window` is the number of queries to remember.
    pub fn new(shape: &ModelShape, needs: Needs, window: usize) -> Self {
        let heads = (0..shape.num_layers * shape.num_kv_heads).map(|_| Mutex::default()).collect();
        Self {
            needs,
            window,
            heads,
            num_kv_heads: shape.num_kv_heads,
            history: 0,
            selector: None,
            replay: RwLock::default(),
            replay_norms: (0..shape.num_layers).map(|_| RwLock::default()).collect(),
            residuals: (0..shape.num_layers).map(|_| Mutex::default()).collect(),
            noted: None,
            noted_sums: None,
        }
    }

    /// The same where attention runs on a device, with queries of `dtype`.
    #[must_use]
    pub fn on_device(self, gpu: &Arc<Gpu>, shape: &ModelShape, dtype: DType) -> Self {
        let asks = |what| self.needs.contains(what);
        let noted =
            asks(Needs::QUERY_WINDOW).then(|| NotedQueries::new(gpu, shape, dtype, self.window));
        let noted_sums = asks(Needs::COLUMN_SUM).then(|| NotedSums::new(gpu, self.heads.len()));
        Self { noted, noted_sums, ..self }
    }

    /// The same for a policy that counts the last `history` queries of each call.
    #[must_use]
    pub fn with_history(self, history: usize) -> Self {
        Self { history, ..self }
    }

    /// The same for a policy that chooses what decode steps read.
    #[must_use]
    pub fn with_selector(self, selector: Option<Arc<dyn Selector>>) -> Self {
        Self { selector, ..self }
    }

    /// What chooses the blocks that decode steps read, if not all of them.
    pub fn selector(&self) -> Option<&Arc<dyn Selector>> {
        self.selector.as_ref()
    }

    /// Bytes of what the selector knows of the blocks.
    pub fn selector_bytes(&self) -> usize {
        let bytes =
            |head: &Mutex<HeadObservation>| head.lock().index.as_ref().map_or(0, BlockIndex::bytes);
        self.heads.iter().map(bytes).sum()
    }

    /// Queries of each call that count.
    pub fn history(&self) -> usize {
        self.history
    }

    /// What the policy asked for.
    pub fn needs(&self) -> Needs {
        self.needs
    }

    /// Queries to remember.
    pub fn window(&self) -> usize {
        self.window
    }

    /// The observations of one head.
    pub fn head(&self, layer: usize, kv_head: usize) -> &Mutex<HeadObservation> {
        &self.heads[layer * self.num_kv_heads + kv_head]
    }

    /// Everything observed so far, apart from the original. What is on a device is copied there.
    pub fn fork(&self) -> Result<Self> {
        let copy = |head: &Mutex<HeadObservation>| Mutex::new(head.lock().clone());
        Ok(Self {
            needs: self.needs,
            window: self.window,
            heads: self.heads.iter().map(copy).collect(),
            num_kv_heads: self.num_kv_heads,
            history: self.history,
            selector: self.selector.clone(),
            replay: RwLock::default(),
            replay_norms: self.replay_norms.iter().map(|_| RwLock::default()).collect(),
            residuals: self.residuals.iter().map(|seen| Mutex::new(seen.lock().clone())).collect(),
            noted: self.noted.as_ref().map(NotedQueries::fork).transpose()?,
            noted_sums: self.noted_sums.as_ref().map(NotedSums::fork).transpose()?,
        })
    }

    /// Where a device notes the queries of the `n` tokens before position `end`, and how many of the last;
    /// `None` if it need not. The first time it takes memory.
    pub fn ring_for(&self, n: usize, end: usize) -> Result<Option<(Arc<QueryRing>, usize)>> {
        self.noted.as_ref().map_or(Ok(None), |noted| noted.ring_for(n, end))
    }

    /// Where a device adds up what rows receive, when heads have these numbers of rows, `[layer, kv_head]`;
    /// `None` if nobody asks. The first time, and when rows outgrow it, it takes memory.
    pub fn sums_for(&self, lens: &[usize]) -> Result<Option<Arc<RowSums>>> {
        let Some(sums) = &self.noted_sums else { return Ok(None) };
        if !sums.has_room(lens.iter().copied().max().unwrap_or(0)) {
            self.fetch_sums()?;
        }
        sums.prepare(lens).map(Some)
    }

    /// Brings what rows have received from the device, which waits for all queued work if there is something.
    pub fn fetch_sums(&self) -> Result<()> {
        let Some(sums) = &self.noted_sums else { return Ok(()) };
        sums.take(|head, rows| self.heads[head].lock().received.add(rows))
    }

    /// Forgets what is known of the rows of a head from `len` on.
    pub fn truncate_rows(&self, layer: usize, kv_head: usize, len: usize) {
        if let Some(sums) = &self.noted_sums {
            sums.truncate(layer * self.num_kv_heads + kv_head, len);
        }
        self.head(layer, kv_head).lock().truncate_rows(len);
    }

    /// Brings the queries of a layer from the device, which waits for all queued work.
    pub fn fetch_queries(&self, layer: usize) -> Result<()> {
        let Some(noted) = &self.noted else { return Ok(()) };
        let queries = noted.read(layer)?;
        for head in 0..self.num_kv_heads {
            let mut seen = self.head(layer, head).lock();
            seen.queries.clear();
            for (position, rows) in &queries {
                let own = rows.len() / self.num_kv_heads;
                seen.queries.push((*position, rows[head * own..][..own].into()));
            }
        }
        Ok(())
    }

    /// Says that nobody sees the queries of tokens below `limit` any more: they are those of a prefix.
    pub fn skip_queries(&self, limit: i32) {
        if let Some(noted) = &self.noted {
            noted.skip(limit);
        }
    }

    /// Says that the prompt has ended, and how many queries steps remember.
    pub fn end_prompt(&self, window: usize) {
        if let Some(noted) = &self.noted {
            noted.end_prompt(window);
        }
    }

    /// What the reserved tokens replay, if they do.
    pub fn replay(&self) -> Option<Replay> {
        self.replay.read().clone()
    }

    /// Says what the tokens that are reserved next replay; `None` for tokens that go on.
    pub fn set_replay(&self, replay: Option<Replay>) {
        *self.replay.write() = replay;
        self.replay_norms.iter().for_each(|norms| norms.write().clear());
    }

    /// The lengths of the hidden states of the tokens that replay, by layer.
    pub fn replay_norms(&self, layer: usize) -> &RwLock<Vec<f32>> {
        &self.replay_norms[layer]
    }

    /// How much attention of a layer changes the residual stream.
    pub fn residual(&self, layer: usize) -> &Mutex<Residual> {
        &self.residuals[layer]
    }

    /// Says how many of the reserved tokens, whose residual streams are known, are real.
    pub fn commit_residuals(&self, n: usize) {
        self.residuals.iter().for_each(|residual| residual.lock().commit(n));
    }

    /// Forgets all but the last `keep` queries of each head.
    pub fn forget_queries(&self, keep: usize) {
        if let Some(noted) = &self.noted {
            noted.forget(keep);
        }
        for head in &self.heads {
            let queries = &mut head.lock().queries;
            if queries.len() > keep {
                queries.drain(..queries.len() - keep);
                queries.shrink_to(keep);
            }
        }
    }

    /// Says that the tokens below `limit` are real and that no others are reserved.
    pub fn commit(&self, limit: i32) {
        if let Some(noted) = &self.noted {
            noted.commit(limit);
        }
        for head in &self.heads {
            head.lock().commit(limit, self.window, self.needs);
        }
    }

    /// Forgets queries at positions of `limit` and above, and ends a replay. Means over tokens are without
    /// those that were reserved; of others that are gone they know as long as any token is left.
    pub fn truncate(&self, limit: i32) {
        self.set_replay(None);
        match limit {
            0 => self.residuals.iter().for_each(|residual| *residual.lock() = Residual::default()),
            _ => self.commit_residuals(0),
        }
        if let Some(noted) = &self.noted {
            noted.commit(limit);
        }
        for head in &self.heads {
            let mut head = head.lock();
            head.commit(limit, self.window, Needs::NONE);
            if limit == 0 {
                head.statistics.clear();
            }
        }
    }
}

impl HeadObservation {
    /// Remembers the query of one position. A commit drops the oldest beyond `window`; before it the
    /// queries of drafts must not push out those that stay if they are rejected. Workers may bring the
    /// tiles of one step in any order.
    pub fn push_query(&mut self, window: usize, position: i32, query: &[f32]) {
        let place = self.queries.partition_point(|(other, _)| *other < position);
        if self.queries.len() < window.saturating_add(window.max(MAX_DRAFTS)) {
            let mut row = self.spare_queries.pop().unwrap_or_else(|| query.into());
            row.copy_from_slice(query);
            self.queries.insert(place, (position, row));
        } else if place > 0 {
            // The oldest makes room, and its allocation is used again.
            self.queries[0].0 = position;
            self.queries[0].1.copy_from_slice(query);
            self.queries[..place].rotate_left(1);
        }
    }

    /// Queries remembered.
    pub fn num_queries(&self) -> usize {
        self.queries.len()
    }

    /// Copies the queries of the group to `[group, num_queries, head_dim]`.
    pub fn queries_by_head(&self, group: usize, head_dim: usize, out: &mut Vec<f32>) {
        out.clear();
        for g in 0..group {
            for (_, query) in &self.queries {
                out.extend_from_slice(&query[g * head_dim..][..head_dim]);
            }
        }
    }

    /// Puts the gate's scores of the rows from `first` on; rows before it that have none get NaN.
    pub fn put_gate_scores(&mut self, first: usize, scores: &[f32]) {
        self.gate_scores.resize(first, f32::NAN);
        self.gate_scores.extend_from_slice(scores);
    }

    /// Keeps what is known of the surviving rows of a lane. Counts start anew.
    pub fn keep(&mut self, keep: &KeepSet, len: usize) {
        self.low_counts.clear();
        self.received.keep(keep, len);
        if let Some(index) = &mut self.index {
            index.keep(keep);
        }
        keep_rows(&mut self.gate_scores, keep, len, f32::NAN);
        for plane in &mut self.replay_maxima {
            keep_rows(plane, keep, len, f32::NAN);
        }
    }

    /// Follows rows of a lane to other places: row `i` is now what row `order[i]` of `len` was. Counts
    /// start anew.
    pub fn reorder(&mut self, order: &[u32], len: usize) {
        self.low_counts.clear();
        self.received.reorder(order, len);
        if let Some(index) = &mut self.index {
            index.truncate_rows(0);
        }
        reorder_rows(&mut self.gate_scores, order, len, f32::NAN);
        for plane in &mut self.replay_maxima {
            reorder_rows(plane, order, len, f32::NAN);
        }
    }

    /// Tokens below `limit` are real: what is known of queries of others is forgotten, and of those that
    /// count the last `window` stay.
    fn commit(&mut self, limit: i32, window: usize, asked: Needs) {
        let real = self.queries.partition_point(|(position, _)| *position < limit);
        let spare = &mut self.spare_queries;
        spare.extend(self.queries.drain(real..).map(|(_, row)| row));
        spare.extend(self.queries.drain(..real.saturating_sub(window)).map(|(_, row)| row));
        spare.truncate(MAX_DRAFTS);
        self.received.commit(limit, asked);
    }

    /// Forgets what is known of rows from `len` on.
    pub fn truncate_rows(&mut self, len: usize) {
        self.received.truncate_rows(len);
        if let Some(index) = &mut self.index {
            index.truncate_rows(len);
        }
        self.low_counts.truncate(len);
        self.gate_scores.truncate(len);
        self.replay_maxima.iter_mut().for_each(|plane| plane.truncate(len));
    }
}
