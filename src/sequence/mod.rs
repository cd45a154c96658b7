//! Sequences: the tokens of one request and the rows that are kept of them.
//!
//! ```text
//! reserve n --> append to each layer --> attend --> commit m <= n --> (compress) --> ...
//! ```
//!
//! Reserved rows belong to the sequence but are not hashed, sealed or shared until they are
//! committed; what is not committed is dropped. Every failing call leaves the sequence unchanged.

mod compact;
mod demote;
mod index;
mod lane;
mod observation;
mod on_device;
mod prefix;
mod received;
mod recurrent;
mod residual;
mod ring;
mod seal;
mod statistics;
mod subspace;
mod sums;
mod swap;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub use index::BlockIndex;
pub use lane::{Lane, Positions, Span};
pub use observation::{FIRST_STATISTIC, HeadObservation, Observation, Replay};
pub use received::{MAX_DRAFTS, Received};
pub use residual::{Residual, cosine};
pub use ring::QueryRing;
pub use statistics::QueryStatistics;
pub use sums::RowSums;

use crate::block::prefix::Digest;
use crate::block::{BlockId, EntryId};
use crate::cache::{Block, Cache, OPEN};
use crate::error::{Result, ensure};
use crate::quantizer::Side;
use crate::quantizer::basis::Bases;
use recurrent::Recurrent;

/// How a sequence treats what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SequenceConfig {
    /// Evicted rows close the gap: attention uses indices inside the cache instead of positions.
    pub cache_relative: bool,
    /// Full blocks stay open until [`Sequence::seal_deferred`], because a policy is going to evict
    /// single rows of a format that cannot lose them.
    pub defer_sealing: bool,
}

/// A sequence of tokens whose keys and values live in a [`Cache`]. One thread at a time.
#[derive(Debug)]
pub struct Sequence {
    cache: Arc<Cache>,
    config: SequenceConfig,
    lanes: Vec<Lane>,
    tokens: Vec<i32>,
    committed: usize,
    reserved: usize,
    /// Whether `tokens` names every committed token.
    hashable: bool,
    /// Whether every lane still holds every committed token in blocks aligned with chunks.
    lossless: bool,
    digests: Vec<Digest>,
    entries: Vec<EntryId>,
    /// Set when a fork may share the open tail.
    tail_shared: AtomicBool,
    defer: bool,
    /// Whether the prompt has ended: then subspaces may be fitted to what is there.
    may_fit: bool,
    swapped: bool,
    copies: Vec<(BlockId, BlockId)>,
    observation: Option<Arc<Observation>>,
    /// The state of the recurrent layers, if the model has some and the sequence is not swapped out.
    recurrent: Option<Recurrent>,
    /// The subspaces of blocks whose rows are coordinates, once they are known.
    bases: Option<Arc<Bases>>,
    shared: Arc<Shared>,
    evicted: u64,
}

/// What plans see of a sequence without borrowing it.
#[derive(Debug)]
pub struct Shared {
    /// Changes whenever block tables do.
    epoch: AtomicU64,
    /// For each layer, (row, KV head) pairs written since the last commit.
    written: Box<[AtomicU64]>,
}

impl Shared {
    /// The version of the block tables.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Notes that `rows` rows of one KV head of `layer` were written.
    pub fn note_written(&self, layer: usize, rows: usize) {
        self.written[layer].fetch_add(rows as u64, Ordering::AcqRel);
    }

    /// (row, KV head) pairs of `layer` written since the last commit.
    pub fn written(&self, layer: usize) -> usize {
        self.written[layer].load(Ordering::Acquire) as usize
    }
}

impl Sequence {
    /// An empty sequence. Fails only if a state of recurrent layers is needed and none is free.
    pub fn new(
        cache: Arc<Cache>,
        config: SequenceConfig,
        observation: Option<Arc<Observation>>,
    ) -> Result<Self> {
        let recurrent = Recurrent::new(&cache)?;
        Ok(Self::with_state(cache, config, observation, recurrent))
    }

    fn with_state(
        cache: Arc<Cache>,
        config: SequenceConfig,
        observation: Option<Arc<Observation>>,
        recurrent: Option<Recurrent>,
    ) -> Self {
        let num_lanes = cache.config().num_lanes();
        let written = (0..cache.config().shape.num_layers).map(|_| AtomicU64::new(0)).collect();
        Cache::count(&cache.counters.num_sequences, 1);
        let bases = cache.low_rank().and_then(|low_rank| low_rank.bases.clone());
        Self {
            cache,
            bases,
            config,
            lanes: vec![Lane::default(); num_lanes],
            tokens: Vec::new(),
            committed: 0,
            reserved: 0,
            hashable: true,
            lossless: true,
            digests: Vec::new(),
            entries: Vec::new(),
            tail_shared: AtomicBool::new(false),
            defer: config.defer_sealing,
            may_fit: false,
            swapped: false,
            copies: Vec::new(),
            observation,
            recurrent,
            shared: Arc::new(Shared { epoch: AtomicU64::new(0), written }),
            evicted: 0,
        }
    }

    /// A sequence with the same tokens that shares every block. The open tail is copied by whoever
    /// writes to it first, the state of recurrent layers at once. Fails while tokens are reserved.
    pub fn fork(&self) -> Result<Self> {
        self.ensure_present()?;
        ensure!(
            self.reserved == 0,
            InvalidState,
            "{} tokens are reserved; commit or truncate before a fork",
            self.reserved
        );
        let observation = match &self.observation {
            Some(observation) => Some(Arc::new(observation.fork()?)),
            None => None,
        };
        let recurrent = match &self.recurrent {
            Some(recurrent) => Some(recurrent.fork(&self.cache)?),
            None => None,
        };
        self.cache.retain(self.blocks());
        self.cache.hold(self.entries.iter().copied());
        self.tail_shared.store(true, Ordering::Relaxed);
        let mut child = Self::with_state(self.cache.clone(), self.config, None, recurrent);
        child.lanes.clone_from(&self.lanes);
        child.tokens.clone_from(&self.tokens);
        child.committed = self.committed;
        (child.hashable, child.lossless) = (self.hashable, self.lossless);
        child.digests.clone_from(&self.digests);
        child.entries.clone_from(&self.entries);
        child.tail_shared = AtomicBool::new(true);
        (child.defer, child.may_fit) = (self.defer, self.may_fit);
        child.observation = observation;
        child.bases.clone_from(&self.bases);
        child.evicted = self.evicted;
        Ok(child)
    }

    /// Makes room for `n` more tokens in every lane, or fails and changes nothing.
    pub fn reserve(&mut self, n: usize) -> Result<()> {
        self.ensure_present()?;
        ensure!(n > 0, InvalidArgument, "num_tokens is 0, must be at least 1");
        let next = self.committed + self.reserved;
        ensure!(
            n <= i32::MAX as usize - next,
            InvalidArgument,
            "num_tokens is {n}, the sequence has {next} of at most {} tokens",
            i32::MAX
        );
        let block_size = self.cache.config().block_size;
        let shared_tails = self.shared_tails();
        let fresh = |lane: &Lane| n.saturating_sub(lane.room(block_size)).div_ceil(block_size);
        let needed = shared_tails.len() + self.lanes.iter().map(fresh).sum::<usize>();
        let mut blocks = Vec::with_capacity(needed);
        self.cache.allocate(needed, OPEN, &mut blocks)?;
        if let Err(error) = self.copy_tails(&shared_tails, &blocks) {
            self.cache.release(blocks.iter().map(|block| block.id), std::iter::empty());
            return Err(error);
        }
        self.unshare_tails(&shared_tails, blocks.drain(..shared_tails.len()));

        let mut blocks = blocks.into_iter();
        for lane in &mut self.lanes {
            let mut left = n;
            if let Some(tail) = lane.spans.last_mut()
                && !tail.sealed
            {
                let take = left.min(block_size - tail.end());
                if take > 0 {
                    // A fork that is gone may have sealed it when it was full.
                    self.cache.forget_bounds(tail.block.id);
                }
                tail.count += take as u32;
                left -= take;
            }
            while left > 0 {
                let Some(block) = blocks.next() else { break };
                let take = left.min(block_size);
                lane.spans.push(Span {
                    block,
                    first: 0,
                    count: take as u32,
                    sealed: false,
                    demoted: false,
                    evicted_before: lane.evicted,
                    positions: Positions::From((next + n - left) as i32),
                });
                left -= take;
            }
        }
        self.reserved += n;
        self.touch();
        Ok(())
    }

    /// Makes the first `n` reserved tokens real and drops the others. `tokens`, if given, has one
    /// id for each; without them the sequence cannot be shared by prefix from here on. Full blocks
    /// are sealed and registered.
    pub fn commit(&mut self, n: usize, tokens: Option<&[i32]>) -> Result<()> {
        self.ensure_present()?;
        ensure!(
            n <= self.reserved,
            InvalidArgument,
            "num_tokens is {n}, only {} are reserved",
            self.reserved
        );
        if self.has_memory() {
            let heads = self.cache.config().shape.num_kv_heads;
            for layer in 0..self.cache.config().shape.num_layers {
                let rows = self.shared.written(layer) / heads;
                ensure!(
                    rows >= n,
                    InvalidState,
                    "layer {layer} has {rows} of {n} tokens written; append before commit"
                );
            }
        }
        if n < self.reserved {
            self.shorten_state(self.committed + n)?;
        }
        self.drop_rows_from((self.committed + n) as i32);
        self.reserved = 0;
        self.committed += n;
        self.drop_snapshots_after(self.committed);
        match tokens {
            Some(tokens) if self.hashable => self.tokens.extend_from_slice(tokens),
            // Dropping a reservation says nothing about the tokens that are there.
            _ => self.hashable &= n == 0,
        }
        self.shared.written.iter().for_each(|layer| layer.store(0, Ordering::Release));
        if let Some(observation) = &self.observation {
            observation.commit(self.committed as i32);
        }
        if !self.defer {
            self.seal_full();
        }
        self.register_full();
        Cache::count(&self.cache.counters.tokens_appended, n);
        self.touch();
        Ok(())
    }

    /// Forgets every token at position `n` and above, and any reservation.
    pub fn truncate(&mut self, n: usize) -> Result<()> {
        self.ensure_present()?;
        ensure!(
            n <= self.committed,
            InvalidArgument,
            "num_tokens is {n}, the sequence has {}",
            self.committed
        );
        self.shorten_state(n)?;
        self.truncate_rows(n);
        Ok(())
    }

    /// [`Self::truncate`] once the state is that after `n` tokens.
    fn truncate_rows(&mut self, n: usize) {
        self.drop_rows_from(n as i32);
        self.forget_bases();
        self.drop_snapshots_after(n);
        self.shared.written.iter().for_each(|layer| layer.store(0, Ordering::Release));
        self.reserved = 0;
        self.committed = n;
        self.tokens.truncate(n);
        // A full block that a fork shares may be an open tail again.
        self.tail_shared.store(true, Ordering::Relaxed);
        let full = n / self.cache.config().block_size;
        self.digests.truncate(full);
        if self.entries.len() > full {
            let dropped = self.entries.split_off(full);
            self.cache.release(std::iter::empty(), dropped.into_iter());
        }
        if n == 0 {
            // What comes is another text.
            (self.hashable, self.lossless, self.defer) = (true, true, self.config.defer_sealing);
        }
        // A cut inside a sealed block leaves a span that no chunk matches any more.
        self.lossless &= n.is_multiple_of(self.cache.config().block_size)
            || self.lanes.iter().all(|lane| lane.spans.last().is_none_or(|tail| !tail.sealed));
        if let Some(observation) = &self.observation {
            observation.truncate(n as i32);
        }
        self.touch();
    }

    /// Seals the full blocks that were kept open for a policy; from now on blocks are sealed when
    /// they fill.
    pub fn seal_deferred(&mut self) {
        self.defer = false;
        self.may_fit = true;
        self.seal_full();
        self.register_full();
        self.touch();
    }

    /// The cache this sequence lives in.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// How the sequence treats what it holds.
    pub fn config(&self) -> SequenceConfig {
        self.config
    }

    /// Committed tokens, evicted ones included: the position of the next token.
    pub fn num_tokens(&self) -> usize {
        self.committed
    }

    /// Reserved tokens.
    pub fn num_reserved(&self) -> usize {
        self.reserved
    }

    /// (layer, KV head) rows that were evicted.
    pub fn num_evicted(&self) -> u64 {
        self.evicted
    }

    /// Block tables.
    pub fn lanes(&self) -> &[Lane] {
        &self.lanes
    }

    /// The part that plans keep.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// What attention saw, if the policy wants to know.
    pub fn observation(&self) -> Option<&Arc<Observation>> {
        self.observation.as_ref()
    }

    /// The subspaces of blocks whose rows are coordinates, once they are known.
    pub fn bases(&self) -> Option<&Arc<Bases>> {
        self.bases.as_ref()
    }

    /// Bytes of the blocks that the sequence refers to, shared ones included.
    pub fn bytes(&self) -> usize {
        let bytes = |lane: &Lane| lane.blocks().map(|block| block.view.len()).sum::<usize>();
        self.lanes.iter().map(bytes).sum()
    }

    /// Copies that an engine with its own tensors must make before it writes: (source, target).
    pub fn copies(&self) -> &[(BlockId, BlockId)] {
        &self.copies
    }

    /// Forgets the copies, because the engine has taken them.
    pub fn clear_copies(&mut self) {
        self.copies.clear();
    }

    /// The error for a sequence whose bytes are in a store.
    pub fn ensure_present(&self) -> Result<()> {
        ensure!(!self.swapped, InvalidState, "the sequence is preempted; resume it first");
        Ok(())
    }

    /// The block of each span: one for each reference.
    fn blocks(&self) -> impl DoubleEndedIterator<Item = BlockId> + '_ {
        self.lanes.iter().flat_map(|lane| lane.spans.iter().map(|span| span.block.id))
    }

    fn touch(&self) {
        self.shared.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// Lanes whose open tail somebody else refers to.
    fn shared_tails(&self) -> Vec<usize> {
        if !self.tail_shared.load(Ordering::Relaxed) {
            return Vec::new();
        }
        let block_size = self.cache.config().block_size;
        let is_shared = |lane: &Lane| {
            let tail = lane.spans.last().filter(|_| lane.room(block_size) > 0);
            tail.is_some_and(|tail| self.cache.is_shared(tail.block.id))
        };
        (0..self.lanes.len()).filter(|i| is_shared(&self.lanes[*i])).collect()
    }

    /// Copies the open tails of `lanes` over the first of `blocks`.
    fn copy_tails(&self, lanes: &[usize], blocks: &[Block]) -> Result<()> {
        for (lane, target) in lanes.iter().zip(blocks) {
            if let Some(tail) = self.lanes[*lane].spans.last().filter(|_| self.has_memory()) {
                self.cache.copy_block(&tail.block.view, &target.view)?;
            }
        }
        Ok(())
    }

    /// Gives each of `lanes` the copy of its open tail.
    fn unshare_tails(&mut self, lanes: &[usize], blocks: impl Iterator<Item = Block>) {
        let mut released = Vec::with_capacity(lanes.len());
        for (lane, target) in lanes.iter().zip(blocks) {
            let Some(tail) = self.lanes[*lane].spans.last_mut() else { continue };
            let source = std::mem::replace(&mut tail.block, target);
            if target.view.is_empty() {
                self.copies.push((source.id, target.id));
            }
            released.push(source.id);
        }
        self.cache.release(released.into_iter(), std::iter::empty());
        self.tail_shared.store(false, Ordering::Relaxed);
    }

    /// Drops rows at positions of `limit` and above, and blocks that become empty.
    fn drop_rows_from(&mut self, limit: i32) {
        let mut released = Vec::new();
        let mut dropped = false;
        // Whether committed tokens go: what is demoted or evicted was committed.
        let is_rollback = (limit as usize) < self.committed;
        for index in 0..self.lanes.len() {
            if is_rollback {
                dropped |= self.drop_demoted_from(index, limit, &mut released);
            }
            let lane = &mut self.lanes[index];
            while let Some(tail) = lane.spans.last_mut() {
                let keep = tail.rows_below(limit);
                dropped |= keep < tail.count as usize;
                if keep > 0 {
                    tail.count = keep as u32;
                    if let Positions::List(list) = &mut tail.positions {
                        relist(list, (tail.first as usize) + keep, limit);
                    }
                    break;
                }
                released.push(tail.block.id);
                lane.spans.pop();
            }
            lane.close_gap(limit);
            if is_rollback {
                lane.forget_evicted(limit, self.config.cache_relative);
            }
        }
        if !released.is_empty() {
            self.cache.release(released.into_iter(), std::iter::empty());
        }
        if dropped {
            self.truncate_observed();
        }
    }

    /// What is known of rows never outlives them.
    fn truncate_observed(&self) {
        let Some(observation) = &self.observation else { return };
        let shape = &self.cache.config().shape;
        for layer in 0..shape.num_layers {
            for head in 0..shape.num_kv_heads {
                let len = self.lanes[self.locate(layer, head).0].len();
                observation.truncate_rows(layer, head, len);
            }
        }
    }
}

/// Gives the rows of an open block from `row` on the positions that follow `next - 1`.
fn relist(list: &mut Arc<[i32]>, row: usize, next: i32) {
    let updated = list
        .iter()
        .enumerate()
        .map(|(i, position)| if i < row { *position } else { next + (i - row) as i32 });
    *list = updated.collect();
}

impl Drop for Sequence {
    fn drop(&mut self) {
        self.touch();
        self.cache.counters.num_sequences.fetch_sub(1, Ordering::Relaxed);
        let blocks = if self.swapped { Vec::new() } else { self.blocks().collect() };
        self.cache.release(blocks.into_iter(), self.entries.drain(..));
        let states = self.recurrent.take().into_iter().flat_map(Recurrent::into_states);
        self.cache.release_states(states);
    }
}

/// The rows of one head as a policy sees them.
impl Sequence {
    /// The lane and cell of a head.
    pub fn locate(&self, layer: usize, kv_head: usize) -> (usize, usize) {
        self.cache.config().lane_width.locate(&self.cache.config().shape, layer, kv_head)
    }

    /// Original positions of the rows of a lane.
    pub fn positions(&self, lane: usize, out: &mut Vec<i32>) {
        out.clear();
        out.reserve(self.lanes[lane].len());
        for span in &self.lanes[lane].spans {
            let rows = span.first as usize..span.end();
            match &span.positions {
                Positions::From(start) => {
                    out.extend((start + rows.start as i32)..(start + rows.end as i32));
                }
                Positions::List(list) => out.extend_from_slice(&list[rows]),
            }
        }
    }

    /// Decodes every row of one head into `out`, `[rows, head_dim]` or `[rows, value_dim]`.
    pub fn decode(&self, layer: usize, kv_head: usize, side: Side, out: &mut Vec<f32>) {
        let Some(open) = self.cache.formats().first() else { return out.clear() };
        let dim = open.dim(side);
        let (lane, cell) = self.locate(layer, kv_head);
        out.resize(self.lanes[lane].len() * dim, 0.0);
        let mut rest = &mut out[..];
        for span in &self.lanes[lane].spans {
            let (rows, tail) = rest.split_at_mut(span.count as usize * dim);
            let range = span.first as usize..span.end();
            let view = &span.block.view;
            let basis = self.basis(lane, cell, side, view.format());
            self.cache.read_rows(view, cell, side, range, basis, rows);
            rest = tail;
        }
        if side == Side::Value && !self.cache.config().shape.stores_values() {
            let value_dim = self.cache.config().shape.value_dim();
            for row in 0..out.len() / dim {
                out.copy_within(row * dim..row * dim + value_dim, row * value_dim);
            }
            out.truncate(out.len() / dim * value_dim);
        }
    }

    /// Whether the blocks have memory; those of a pool are numbers for the engine's own.
    pub fn has_memory(&self) -> bool {
        !self.cache.formats().is_empty()
    }
}
