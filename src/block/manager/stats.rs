//! Numbers about a block manager, for people and for Prometheus.

use std::fmt::Write;

use super::BlockManager;
use crate::block::groups::Reason;
use crate::block::tables::Admission;

/// What a manager holds now, and what it has done since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// Blocks of the pool.
    pub num_blocks: u64,
    /// Blocks nobody refers to.
    pub free_blocks: u64,
    /// Blocks that sequences and leases refer to.
    pub used_blocks: u64,
    /// Blocks that only the prefix index refers to; reclaimed when needed.
    pub idle_blocks: u64,
    /// Entries of the prefix index.
    pub prefix_entries: u64,
    /// Live sequences, parked ones included.
    pub num_sequences: u64,
    /// Leases that hold something.
    pub num_leases: u64,
    /// Bytes of bookkeeping for the blocks.
    pub metadata_bytes: u64,
    /// Sequences admitted.
    pub admissions: u64,
    /// Tokens of admitted prompts.
    pub prefix_query_tokens: u64,
    /// Tokens of them that were cached.
    pub prefix_hit_tokens: u64,
    /// Of these, tokens that were copied from a part of a block.
    pub prefix_copied_tokens: u64,
    /// Tokens committed.
    pub committed_tokens: u64,
    /// Entries reclaimed.
    pub evictions: u64,
    /// Sequences forked.
    pub forks: u64,
    /// Sequences parked.
    pub preemptions: u64,
    /// Copies handed to the engine.
    pub copies: u64,
    /// Leases whose deadline passed.
    pub leases_expired: u64,
    /// Matches that ended at tokens never seen.
    pub misses_unknown: u64,
    /// Matches that ended at an entry that has been reclaimed.
    pub misses_evicted: u64,
    /// Matches that a window group ended.
    pub misses_window: u64,
    /// Matches that a recurrent group ended.
    pub misses_checkpoint: u64,
}

impl BlockStats {
    pub(super) fn note_admission(&mut self, num_tokens: usize, admission: &Admission) {
        self.admissions += 1;
        self.prefix_query_tokens += num_tokens as u64;
        self.prefix_hit_tokens += admission.num_cached as u64;
        self.prefix_copied_tokens += admission.num_copied as u64;
        match admission.miss.reason {
            Reason::Complete => {}
            Reason::Unknown => self.misses_unknown += 1,
            Reason::Evicted => self.misses_evicted += 1,
            Reason::Window => self.misses_window += 1,
            Reason::Checkpoint => self.misses_checkpoint += 1,
        }
    }
}

impl BlockManager {
    /// The numbers now.
    pub fn stats(&self) -> BlockStats {
        let pool = &self.pool;
        let (blocks, free, idle) = (pool.num_blocks(), pool.num_free(), pool.num_idle());
        BlockStats {
            num_blocks: blocks as u64,
            free_blocks: free as u64,
            used_blocks: (blocks - free - idle) as u64,
            idle_blocks: idle as u64,
            prefix_entries: pool.num_entries() as u64,
            num_sequences: self.tables.num_sequences() as u64,
            num_leases: self.num_leases() as u64,
            metadata_bytes: pool.metadata_bytes() as u64,
            evictions: pool.evictions(),
            ..self.stats
        }
    }
}

/// The numbers in Prometheus' text exposition format. `labels` goes into every line as it is,
/// such as `pool="0"`; it may be empty.
pub fn prometheus(stats: &BlockStats, labels: &str) -> String {
    let mut out = String::new();
    let labels = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
    let mut line = |kind: &str, name: &str, help: &str, value: u64| {
        let total = if kind == "counter" { "_total" } else { "" };
        _ = writeln!(out, "# HELP kvmgr_pool_{name}{total} {help}");
        _ = writeln!(out, "# TYPE kvmgr_pool_{name}{total} {kind}");
        _ = writeln!(out, "kvmgr_pool_{name}{total}{labels} {value}");
    };
    let s = stats;
    let gauges = [
        ("blocks", "Blocks of the pool.", s.num_blocks),
        ("free_blocks", "Blocks nobody refers to.", s.free_blocks),
        ("used_blocks", "Blocks that sequences and leases refer to.", s.used_blocks),
        ("idle_blocks", "Blocks that only the prefix index refers to.", s.idle_blocks),
        ("prefix_entries", "Entries of the prefix index.", s.prefix_entries),
        ("sequences", "Live sequences.", s.num_sequences),
        ("leases", "Leases that hold something.", s.num_leases),
        ("metadata_bytes", "Bytes of bookkeeping for the blocks.", s.metadata_bytes),
    ];
    gauges.iter().for_each(|(name, help, value)| line("gauge", name, help, *value));
    let counters = [
        ("admissions", "Sequences admitted.", s.admissions),
        ("prefix_query_tokens", "Tokens of admitted prompts.", s.prefix_query_tokens),
        ("prefix_hit_tokens", "Tokens of prompts that were cached.", s.prefix_hit_tokens),
        ("prefix_copied_tokens", "Cached tokens copied from a block.", s.prefix_copied_tokens),
        ("committed_tokens", "Tokens committed.", s.committed_tokens),
        ("evictions", "Entries reclaimed.", s.evictions),
        ("forks", "Sequences forked.", s.forks),
        ("preemptions", "Sequences parked.", s.preemptions),
        ("copies", "Copies handed to the engine.", s.copies),
        ("leases_expired", "Leases whose deadline passed.", s.leases_expired),
        ("misses_unknown", "Matches that ended at new tokens.", s.misses_unknown),
        ("misses_evicted", "Matches that ended at a reclaimed entry.", s.misses_evicted),
        ("misses_window", "Matches that a window group ended.", s.misses_window),
        ("misses_checkpoint", "Matches that a recurrent group ended.", s.misses_checkpoint),
    ];
    counters.iter().for_each(|(name, help, value)| line("counter", name, help, *value));
    out
}
