//! The block manager: pool, tables, retention and a log of operations behind one clock.
//!
//! Everything it decides follows from its configuration and the calls in their order: the clock is
//! the caller's, nothing is random. A recorded log therefore replays to the same bytes.

mod codec;
mod leases;
mod log;
mod retention;
mod stats;

use parking_lot::Mutex;

use self::leases::Leases;
use self::retention::{Label, Retention};
use super::events::EventFormat;
use super::groups::Group;
use super::pool::BlockPool;
use super::prefix::{self, Digest, Hash};
use super::tables::{Admission, Copy, Placement, Request, SequenceId, Tables, TablesConfig};
use crate::error::{Result, ensure};
use crate::evictor;

pub use leases::LeaseId;
pub use log::{Recorder, TraceEvent, replay, trace};
pub use stats::{BlockStats, prometheus};

/// What a block manager is made from.
#[derive(Debug, Clone)]
pub struct BlockConfig {
    /// Blocks, 1 to 2^31.
    pub num_blocks: usize,
    /// The spec of the evictor.
    pub evictor: String,
    /// The tables.
    pub tables: TablesConfig,
    /// The digest of the empty prefix without a tenant.
    pub root: Digest,
    /// Whether blocks are reused in part by copying.
    pub partial: bool,
    /// Whether blocks handed out with the bytes of somebody before are listed.
    pub recycled: bool,
}

/// How long what a sequence leaves behind should stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// 0 to 100; counts with an evictor that knows priorities.
    pub priority: u8,
    /// Microseconds after the sequence ends until its entries go before all others; 0 for never.
    pub ttl: u64,
    /// What the sequence is a state of; 0 for nothing. The entries of an older state that a newer
    /// one does not share go before all others.
    pub session: u64,
}

impl Default for Keep {
    fn default() -> Self {
        Self { priority: super::pool::DEFAULT_PRIORITY, ttl: 0, session: 0 }
    }
}

/// Blocks, tables and what is known about them. Lookups share it, everything else is exclusive.
#[derive(Debug)]
pub struct BlockManager {
    config: BlockConfig,
    pool: BlockPool,
    tables: Tables,
    retention: Retention,
    leases: Mutex<Leases>,
    now: u64,
    stats: BlockStats,
    recorder: Option<Recorder>,
}

impl BlockManager {
    /// Every block free, nothing known.
    pub fn new(config: BlockConfig) -> Result<Self> {
        ensure!(
            (1..=evictor::MAX_SLOTS).contains(&config.num_blocks),
            InvalidArgument,
            "num_blocks is {}, must be in 1..={}",
            config.num_blocks,
            evictor::MAX_SLOTS
        );
        let evictor = evictor::create(&config.evictor, config.num_blocks)?;
        let mut pool = BlockPool::new(config.num_blocks, evictor);
        if config.partial {
            let is_plain = matches!(config.tables.groups[..], [Group::Full | Group::Latent]);
            ensure!(is_plain, Unsupported, "partial reuse needs exactly one full group");
            pool.remember_tokens(config.tables.block_size);
        }
        if config.recycled {
            pool.watch_recycled();
        }
        Ok(Self {
            pool,
            tables: Tables::new(config.tables.clone())?,
            retention: Retention::default(),
            leases: Mutex::default(),
            now: 0,
            stats: BlockStats::default(),
            recorder: None,
            config,
        })
    }

    /// What it was made from.
    pub fn config(&self) -> &BlockConfig {
        &self.config
    }

    /// The pool, to read.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// The tables, to read.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// The time of the last [`Self::tick`] in microseconds.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// The digest of the empty prefix of a tenant and an adapter, "" for neither.
    pub fn root(&self, salt: &[u8], adapter: &str) -> Digest {
        match self.config.tables.hash {
            Hash::Native => {
                prefix::adapter_root(&prefix::tenant_root(&self.config.root, salt), adapter)
            }
            // vLLM has one root and mixes both into the blocks as extra keys.
            Hash::VllmCbor => self.config.root,
        }
    }

    /// Makes a sequence of a prompt. See [`Tables::admit`].
    pub fn admit(&mut self, request: &Request<'_>, keep: Keep) -> Result<Admission> {
        let result = self.admit_quietly(request, keep);
        self.record(
            |out| log::admit(out, request, keep),
            |this, out| {
                out.result(&result, |out, it| out.table(&this.tables, it.id, it.num_cached));
            },
        );
        result
    }

    fn admit_quietly(&mut self, request: &Request<'_>, keep: Keep) -> Result<Admission> {
        self.check_keep(keep)?;
        let request = Request { priority: keep.priority, ..*request };
        let admission = self.tables.admit(&mut self.pool, &request)?;
        self.retention.set_label(admission.id, Label { ttl: keep.ttl, session: keep.session });
        self.stats.note_admission(request.tokens.len(), &admission);
        Ok(admission)
    }

    fn check_keep(&self, keep: Keep) -> Result<()> {
        let limit = super::pool::MAX_PRIORITY;
        let is_default = keep.priority == super::pool::DEFAULT_PRIORITY;
        ensure!(
            keep.priority <= limit,
            InvalidArgument,
            "priority is {}, must be in 0..={limit}",
            keep.priority
        );
        ensure!(
            is_default || self.pool.has_priorities(),
            Unsupported,
            "priority is {}, but the evictor {} orders by use alone; \"priority\" knows priorities",
            keep.priority,
            self.config.evictor
        );
        Ok(())
    }

    /// The digests of the full blocks of a prompt.
    pub fn hash(&mut self, request: &Request<'_>) -> &[Digest] {
        self.tables.hash(request)
    }

    /// See [`Tables::reserve`].
    pub fn reserve(&mut self, ids: &[SequenceId], counts: &[u32]) -> Result<()> {
        let result = self.tables.reserve(&mut self.pool, ids, counts);
        self.record(
            |out| log::reserve(out, ids, counts),
            |this, out| {
                out.result(&result, |out, ()| out.tails(&this.tables, ids));
            },
        );
        result
    }

    /// See [`Tables::commit`].
    pub fn commit(&mut self, ids: &[SequenceId], counts: &[u32], tokens: &[i32]) -> Result<()> {
        let result = self.tables.commit(&mut self.pool, ids, counts, tokens);
        if result.is_ok() {
            self.stats.committed_tokens +=
                counts.iter().map(|count| u64::from(*count)).sum::<u64>();
        }
        self.record(
            |out| log::commit(out, ids, counts, tokens),
            |this, out| {
                out.result(&result, |out, ()| out.tails(&this.tables, ids));
            },
        );
        result
    }

    /// See [`Tables::append`].
    pub fn append(&mut self, ids: &[SequenceId], tokens: &[i32]) -> Result<()> {
        let result = self.tables.append(&mut self.pool, ids, tokens);
        if result.is_ok() {
            self.stats.committed_tokens += ids.len() as u64;
        }
        self.record(
            |out| log::append(out, ids, tokens),
            |this, out| {
                out.result(&result, |out, ()| out.tails(&this.tables, ids));
            },
        );
        result
    }

    /// See [`Tables::truncate`].
    pub fn truncate(&mut self, id: SequenceId, num_tokens: usize) -> Result<()> {
        let result = self.tables.truncate(&mut self.pool, id, num_tokens);
        self.record(
            |out| log::truncate(out, id, num_tokens),
            |this, out| {
                out.result(&result, |out, ()| out.tails(&this.tables, &[id]));
            },
        );
        result
    }

    /// See [`Tables::fork`]. The child is labelled like its parent.
    pub fn fork(&mut self, parent: SequenceId) -> Result<SequenceId> {
        let result = self.tables.fork(&mut self.pool, parent);
        if let Ok(child) = result {
            let label = self.retention.label(parent);
            self.retention.set_label(child, label);
            self.stats.forks += 1;
        }
        self.record(
            |out| log::fork(out, parent),
            |this, out| {
                out.result(&result, |out, child| out.table(&this.tables, *child, 0));
            },
        );
        result
    }

    /// Ends sequences, all or none. What they leave behind is kept as their labels say.
    pub fn release(&mut self, ids: &[SequenceId]) -> Result<()> {
        let result = self.release_quietly(ids);
        self.record(|out| log::release(out, ids), |_, out| out.result(&result, |_, ()| {}));
        result
    }

    fn release_quietly(&mut self, ids: &[SequenceId]) -> Result<()> {
        if !self.retention.has_labels() {
            return self.tables.release(&mut self.pool, ids);
        }
        let mut left = Vec::new();
        for id in ids {
            let label = self.retention.label(*id);
            if label != Label::default() || self.tables.has_ranges(*id)? {
                let ttls = self.tables.ranges(*id)?.map(|it| it.map_or(label.ttl, |it| it.ttl));
                let blocks = self.tables.left(&self.pool, *id)?;
                left.push((label.session, blocks.zip(ttls).collect::<Vec<_>>()));
            }
        }
        self.tables.release(&mut self.pool, ids)?;
        for (session, blocks) in left {
            self.retention.leave(&mut self.pool, session, &blocks, self.now);
        }
        Ok(())
    }

    /// See [`Tables::park`].
    pub fn park(&mut self, id: SequenceId) -> Result<Vec<Placement>> {
        let result = self.tables.park(&mut self.pool, id);
        self.stats.preemptions += u64::from(result.is_ok());
        self.record(
            |out| log::park(out, id),
            |_, out| out.result(&result, |out, it| out.places(it)),
        );
        result
    }

    /// See [`Tables::resume`].
    pub fn resume(&mut self, id: SequenceId) -> Result<Vec<Placement>> {
        let result = self.tables.resume(&mut self.pool, id);
        self.record(
            |out| log::resume(out, id),
            |_, out| out.result(&result, |out, it| out.places(it)),
        );
        result
    }

    /// See [`Tables::take_copies`].
    pub fn take_copies(&mut self) -> Vec<Copy> {
        let copies = self.tables.take_copies();
        self.stats.copies += copies.len() as u64;
        self.record(log::take_copies, |_, out| {
            copies.iter().for_each(|copy| out.pair(copy.source.0, copy.target.0));
        });
        copies
    }

    /// See [`BlockPool::take_recycled`].
    pub fn take_recycled(&mut self) -> Option<Vec<u32>> {
        self.pool.take_recycled()
    }

    /// Sets the clock, which never goes back: leases and times to live that have passed end.
    pub fn tick(&mut self, now: u64) -> Result<()> {
        ensure!(
            now >= self.now,
            InvalidArgument,
            "now is {now}, the clock is at {} already",
            self.now
        );
        self.now = now;
        self.stats.leases_expired += self.leases.get_mut().expire(&mut self.pool, now);
        self.retention.expire(&mut self.pool, now);
        self.record(|out| log::tick(out, now), |_, _| {});
        Ok(())
    }

    /// Takes the entries of `digests` out of the index, because their content turned out to be
    /// wrong. Answers how many there were.
    pub fn forget(&mut self, digests: &[Digest], group: u8) -> usize {
        let forgotten = digests.iter().filter(|it| self.pool.forget(it, group)).count();
        self.record(|out| log::forget(out, digests, group), |_, out| out.word(forgotten as u32));
        forgotten
    }

    /// Reclaims every entry that nobody holds. Answers how many.
    pub fn clear(&mut self) -> usize {
        let cleared = self.pool.clear();
        self.record(log::clear, |_, out| out.word(cleared as u32));
        cleared
    }

    /// Writes down from now on which entries come and go.
    pub fn listen(&mut self, arrays: bool, medium: &str, capacity: usize) {
        self.pool.listen(EventFormat {
            arrays,
            medium: medium.to_string(),
            block_size: self.config.tables.block_size,
            groups: self.config.tables.groups.clone(),
            capacity,
        });
    }

    /// The next batch of events, if anything has happened: its number and its bytes.
    pub fn publish(&mut self) -> Option<(u64, &[u8])> {
        self.pool.publish(self.now as f64 / 1e6)
    }

    /// Blocks that the next `num_tokens` tokens of a sequence can take, over all groups, at most.
    pub fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.config.tables.block_size) * self.config.tables.groups.len()
    }

    /// Tokens that can be admitted now without a hit, beyond the watermark.
    pub fn num_admissible_tokens(&self) -> usize {
        let free = self.pool.num_available().saturating_sub(self.config.tables.watermark);
        free / self.config.tables.groups.len() * self.config.tables.block_size
    }

    /// Checks every invariant; for tests and debugging. O(blocks).
    pub fn check_integrity(&self) {
        self.pool.check_integrity();
    }
}
