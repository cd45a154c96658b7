//! The parts put together: a cache with a policy and a tier, and sequences that use them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::cache::{Cache, CacheConfig, CacheStats, MemoryFormats};
use crate::dtype::DType;
use crate::error::{Error, Kind, Result, bail, ensure};
use crate::policy::{Event, HeadInput, LayerInput, LayerSource, Pipeline, PositionMode};
use crate::quantizer::Side;
use crate::sequence::{Observation, Sequence, SequenceConfig};
use crate::shape::{LaneWidth, ModelShape, Needs, Rope};
use crate::store::{Key, Store};
use crate::tier::{self, Tier};

/// Everything a manager needs to know.
#[derive(Debug, Clone)]
pub struct ManagerConfig {
    /// The attention shape of the model.
    pub shape: ModelShape,
    /// Tokens of a block.
    pub block_size: usize,
    /// What one block table covers; `None` for the coarsest that the spec allows.
    pub lane_width: Option<LaneWidth>,
    /// Element type of open blocks.
    pub dtype: DType,
    /// Workers of this library; 0 for one for each core.
    pub num_threads: usize,
    /// Blocks.
    pub num_blocks: usize,
    /// Bytes of block memory; 0 for `num_blocks` open blocks.
    pub memory_limit: usize,
    /// The pipeline of new sequences.
    pub spec: String,
    /// The spec of the evictor.
    pub evictor: String,
    /// The operator's secret that separates prefix indexes.
    pub salt: u64,
    /// Whether full blocks are shared and kept by prefix.
    pub prefix: bool,
    /// How the model rotates queries and keys, if the engine told.
    pub rope: Option<Rope>,
    /// Where reclaimed prefixes go.
    pub store: Option<Arc<dyn Store>>,
}

/// A cache with a default policy, an optional tier and workers. Shared, any thread.
#[derive(Debug)]
pub struct Manager {
    cache: Arc<Cache>,
    policy: Arc<Pipeline>,
    tier: Option<Arc<Tier>>,
    num_threads: usize,
    workers: OnceLock<rayon::ThreadPool>,
}

/// What a manager holds and has done.
#[derive(Debug, Clone, Copy, Default)]
pub struct ManagerStats {
    /// The cache.
    pub cache: CacheStats,
    /// Prefix entries offloaded to the store.
    pub store_puts: u64,
    /// Prefix entries fetched from the store.
    pub store_hits: u64,
    /// Failures of the store, each of which counted as a miss.
    pub store_failures: u64,
}

impl Manager {
    /// Parses the spec, checks that it fits what the engine can hand over, and reserves memory.
    pub fn new(config: ManagerConfig) -> Result<Arc<Self>> {
        let policy = Pipeline::parse(&config.spec).map_err(|error| error.within("spec"))?;
        let (key, value) = policy.quantizers();
        let open = config.dtype.name();
        let cache = Cache::new(CacheConfig {
            shape: config.shape,
            block_size: config.block_size,
            lane_width: config.lane_width.unwrap_or(policy.lane_width().0),
            num_blocks: config.num_blocks,
            memory_limit: config.memory_limit,
            memory: Some(MemoryFormats {
                open: config.dtype,
                key: key.unwrap_or(open).to_string(),
                value: value.unwrap_or(open).to_string(),
            }),
            evictor: config.evictor,
            salt: config.salt,
            prefix: config.prefix,
            rope: config.rope,
        })?;
        check_policy(&cache, &policy)?;
        let tier = config.store.map(|store| Arc::new(Tier::new(store)));
        if let Some(tier) = &tier {
            cache.set_offload(Some(tier.clone()));
        }
        let policy = Arc::new(policy);
        let num_threads = config.num_threads;
        Ok(Arc::new(Self { cache, policy, tier, num_threads, workers: OnceLock::new() }))
    }

    /// The cache.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// The policy of sequences that do not bring their own.
    pub fn policy(&self) -> &Arc<Pipeline> {
        &self.policy
    }

    /// Runs `part(worker, num_workers)` on the library's own workers and waits for all of them.
    pub fn run_workers(&self, part: impl Fn(usize, usize) -> Result<()> + Sync) -> Result<()> {
        let workers = self.workers()?;
        workers.broadcast(|worker| part(worker.index(), worker.num_threads())).into_iter().collect()
    }

    fn workers(&self) -> Result<&rayon::ThreadPool> {
        if let Some(workers) = self.workers.get() {
            return Ok(workers);
        }
        let builder = rayon::ThreadPoolBuilder::new()
            .num_threads(self.num_threads)
            .thread_name(|i| format!("kvmgr-{i}"));
        let workers = builder.build().map_err(|error| {
            Error::new(Kind::OutOfMemory, format!("cannot start worker threads: {error}"))
        })?;
        Ok(self.workers.get_or_init(|| workers))
    }

    /// What it holds now.
    pub fn stats(&self) -> ManagerStats {
        let (store_puts, store_hits, store_failures) =
            self.tier.as_ref().map_or((0, 0, 0), |tier| tier.counts());
        ManagerStats { cache: self.cache.stats(), store_puts, store_hits, store_failures }
    }
}

/// Refuses a policy that the cache or the engine cannot serve, naming the stage and what is missing.
fn check_policy(cache: &Cache, policy: &Pipeline) -> Result<()> {
    // Attention of this library observes queries and probabilities; rotation must be told.
    let mut caps =
        Needs(Needs::KEYS.0 | Needs::VALUES.0).union(Needs::QUERY_WINDOW).union(Needs::COLUMN_SUM);
    if cache.config().rope.is_some() {
        // Statistics are of queries that are turned back.
        caps = caps.union(Needs::ROPE).union(Needs::QUERY_STATISTICS);
    }
    let missing = policy.needs().missing_from(caps);
    ensure!(
        missing.is_empty(),
        Unsupported,
        "{} needs {} from the engine: set rope_style in the cache configuration",
        policy.needed_by(policy.needs().without(caps)).unwrap_or(policy.spec()),
        missing.join(", ")
    );
    let rank = |width: LaneWidth| width.num_lanes(&cache.config().shape);
    let (needed, stage) = policy.lane_width();
    let found = cache.config().lane_width;
    if rank(found) < rank(needed) {
        let stage = stage.unwrap_or("the spec");
        bail!(Unsupported, "{stage} needs lanes of width {needed:?}, the cache has {found:?}");
    }
    Ok(())
}

/// A sequence with its policy. One thread at a time.
#[derive(Debug)]
pub struct Session {
    sequence: Sequence,
    manager: Option<Arc<Manager>>,
    policy: Arc<Pipeline>,
    /// Whether the prompt has ended: from then on each commit is a decode step.
    decoding: bool,
    steps: usize,
    parked: Option<Parked>,
}

/// Where the blocks of a preempted sequence are.
#[derive(Debug)]
struct Parked {
    store: Arc<dyn Store>,
    keys: Vec<Key>,
}

impl Session {
    /// A sequence of a cache, under `policy` or the cache's own.
    pub fn new(manager: &Arc<Manager>, policy: Option<Arc<Pipeline>>) -> Result<Self> {
        if let Some(policy) = &policy {
            check_policy(&manager.cache, policy)?;
            ensure!(
                policy.quantizers() == (None, None),
                Unsupported,
                "the policy of a sequence cannot choose quantizers: blocks have the cache's formats"
            );
        }
        let policy = policy.unwrap_or_else(|| manager.policy.clone());
        let cache = &manager.cache;
        let observation = observation_for(cache, &policy);
        let sealed = &cache.formats()[cache.sealed_format()];
        let config = SequenceConfig {
            cache_relative: policy.position_mode() == PositionMode::CacheRelative,
            // Prefixes are shared in sealed form, so they cannot wait for the policy.
            defer_sealing: policy.acts_on(Event::PrefillEnd)
                && !sealed.is_token_granular()
                && !cache.config().prefix,
        };
        let sequence = Sequence::new(cache.clone(), config, observation);
        Ok(Self::with(sequence, Some(manager.clone()), policy))
    }

    fn with(sequence: Sequence, manager: Option<Arc<Manager>>, policy: Arc<Pipeline>) -> Self {
        Self { sequence, manager, policy, decoding: false, steps: 0, parked: None }
    }

    /// The sequence.
    pub fn sequence(&self) -> &Sequence {
        &self.sequence
    }

    /// The sequence, to change.
    pub fn sequence_mut(&mut self) -> &mut Sequence {
        &mut self.sequence
    }

    /// See [`Sequence::fork`]. The child goes on under the same policy.
    pub fn fork(&self) -> Result<Self> {
        Ok(Self {
            sequence: self.sequence.fork()?,
            manager: self.manager.clone(),
            policy: self.policy.clone(),
            decoding: self.decoding,
            steps: self.steps,
            parked: None,
        })
    }

    /// See [`Sequence::match_prefix`]; goes on with what the store has.
    pub fn match_prefix(&mut self, tokens: &[i32]) -> Result<usize> {
        let mut matched = self.sequence.match_prefix(tokens)?;
        let tier = self.manager.as_ref().and_then(|manager| manager.tier.clone());
        let Some(tier) = tier.filter(|_| self.sequence.cache().config().prefix) else {
            return Ok(matched);
        };
        let before = matched;
        while let Some(digest) = self.sequence.next_digest(tokens) {
            let cache = self.sequence.cache().clone();
            if !tier.fetch(&cache, &digest) {
                break;
            }
            let extended = self.sequence.extend_match(tokens)?;
            if extended == matched {
                break; // Reclaimed again before it could be held.
            }
            matched = extended;
        }
        let cache = self.sequence.cache();
        Cache::count(&cache.counters.prefix_hit_tokens, matched - before);
        Ok(matched)
    }

    /// See [`Sequence::commit`]. After the prompt has ended this is a decode step: the decode
    /// phase of the policy runs when it is due.
    pub fn commit(&mut self, n: usize, tokens: Option<&[i32]>) -> Result<()> {
        self.sequence.commit(n, tokens)?;
        if self.decoding && n > 0 {
            self.steps += 1;
            self.run_policy(Event::Step)?;
        }
        Ok(())
    }

    /// Says that the prompt, or one more piece of it, has been read: the prefill phase of the
    /// policy runs, and commits are decode steps from now on.
    pub fn end_prefill(&mut self) -> Result<()> {
        self.sequence.ensure_present()?;
        self.run_policy(Event::PrefillEnd)?;
        self.sequence.seal_deferred();
        self.decoding = true;
        Ok(())
    }

    /// Moves the bytes of the sequence to `store` and frees its blocks.
    pub fn preempt(&mut self, store: Arc<dyn Store>) -> Result<()> {
        let mut keys: Vec<Key> = Vec::new();
        let result = self.sequence.swap_out(&mut |_, bytes| {
            let key = fresh_key();
            store.put(&key, &tier::seal(&key, &[bytes]))?;
            keys.push(key);
            Ok(())
        });
        if let Err(error) = result {
            forget(&*store, &keys);
            return Err(error);
        }
        self.parked = Some(Parked { store, keys });
        Ok(())
    }

    /// Brings the bytes back. On failure the sequence stays preempted and can be resumed later.
    pub fn resume(&mut self) -> Result<()> {
        let Some(parked) = &self.parked else {
            bail!(InvalidState, "the sequence is not preempted");
        };
        self.sequence.swap_in(&mut |i, bytes| {
            let key = &parked.keys[i];
            let mut object = vec![0; tier::object_len(bytes.len())];
            let found = parked.store.get(key, &mut object)?;
            ensure!(found, Store, "the store has lost block {i} of the preempted sequence");
            bytes.copy_from_slice(tier::verify(&object, key)?);
            Ok(())
        })?;
        if let Some(parked) = self.parked.take() {
            forget(&*parked.store, &parked.keys);
        }
        Ok(())
    }

    fn run_policy(&mut self, event: Event) -> Result<()> {
        let policy = self.policy.clone();
        let longest = self.sequence.lanes().iter().map(|lane| lane.len()).max().unwrap_or(0);
        if !policy.is_due(event, self.steps, longest, self.sequence.num_tokens()) {
            return Ok(());
        }
        let kept = policy.select(event, &mut Layers::new(&self.sequence, policy.needs()))?;
        let mut done = vec![false; self.sequence.lanes().len()];
        for (layer, heads) in kept.iter().enumerate() {
            for (head, keep) in heads.iter().enumerate() {
                let (lane, _) = self.sequence.locate(layer, head);
                // Heads that share a lane share a keep set: the width was checked at creation.
                if !std::mem::replace(&mut done[lane], true) {
                    self.sequence.compact(lane, keep)?;
                }
            }
        }
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(parked) = self.parked.take() {
            forget(&*parked.store, &parked.keys);
        }
    }
}

/// Removes objects that nobody will ask for again; a store that fails here only keeps garbage.
fn forget(store: &dyn Store, keys: &[Key]) {
    for key in keys {
        _ = store.remove(key);
    }
}

/// A key that no other object of any process has: private blocks are not shared by content.
fn fresh_key() -> Key {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    static PROCESS: OnceLock<[u8; 24]> = OnceLock::new();
    let process = PROCESS.get_or_init(|| {
        use std::hash::{BuildHasher, RandomState};
        let mut bytes = [0; 24];
        for part in bytes.chunks_exact_mut(8) {
            part.copy_from_slice(&RandomState::new().hash_one(0).to_le_bytes());
        }
        bytes
    });
    let mut key = [0; 32];
    key[..24].copy_from_slice(process);
    key[24..].copy_from_slice(&COUNTER.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    key
}

fn observation_for(cache: &Cache, policy: &Pipeline) -> Option<Arc<Observation>> {
    let attention = Needs::QUERY_WINDOW.union(Needs::COLUMN_SUM).union(Needs::QUERY_STATISTICS);
    let needs = policy.needs();
    (needs.0 & attention.0 != 0)
        .then(|| Arc::new(Observation::new(&cache.config().shape, needs, policy.query_window())))
}

/// The layers of a sequence as a policy sees them, decoded one at a time.
struct Layers<'a> {
    sequence: &'a Sequence,
    needs: Needs,
    heads: Vec<HeadBuffers>,
}

#[derive(Default)]
struct HeadBuffers {
    /// The lane that `positions` belongs to.
    lane: Option<usize>,
    positions: Vec<i32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
    num_queries: usize,
    column_sums: Vec<f32>,
    query_mean: Vec<f32>,
    query_covariance: Vec<f32>,
}

impl<'a> Layers<'a> {
    fn new(sequence: &'a Sequence, needs: Needs) -> Self {
        let num_heads = sequence.cache().config().shape.num_kv_heads;
        let heads = (0..num_heads).map(|_| HeadBuffers::default()).collect();
        Self { sequence, needs, heads }
    }

    fn load(&mut self, layer: usize) {
        let shape = self.sequence.cache().config().shape;
        for (head, buffers) in self.heads.iter_mut().enumerate() {
            let (lane, _) = self.sequence.locate(layer, head);
            if buffers.lane.replace(lane) != Some(lane) {
                self.sequence.positions(lane, &mut buffers.positions);
            }
            if self.needs.contains(Needs::KEYS) {
                self.sequence.decode(layer, head, Side::Key, &mut buffers.keys);
            }
            if self.needs.contains(Needs::VALUES) {
                self.sequence.decode(layer, head, Side::Value, &mut buffers.values);
            }
            if let Some(observation) = self.sequence.observation() {
                let seen = observation.head(layer, head).lock();
                seen.queries_by_head(shape.group(), shape.head_dim, &mut buffers.queries);
                buffers.num_queries = seen.num_queries();
                buffers.column_sums.clone_from(&seen.column_sums);
                buffers.query_mean.clear();
                buffers.query_covariance.clear();
                for statistics in &seen.statistics {
                    buffers.query_mean.extend_from_slice(statistics.mean());
                    buffers.query_covariance.extend(statistics.covariance());
                }
            }
        }
    }
}

impl LayerSource for Layers<'_> {
    fn num_layers(&self) -> usize {
        self.sequence.cache().config().shape.num_layers
    }

    fn visit(
        &mut self,
        layer: usize,
        f: &mut dyn FnMut(&LayerInput<'_>) -> Result<()>,
    ) -> Result<()> {
        self.load(layer);
        let config = self.sequence.cache().config();
        let heads = self.heads.iter().map(|head| HeadInput {
            positions: &head.positions,
            keys: &head.keys,
            values: &head.values,
            queries: &head.queries,
            num_queries: head.num_queries,
            column_sums: &head.column_sums,
            query_mean: &head.query_mean,
            query_covariance: &head.query_covariance,
        });
        f(&LayerInput {
            layer,
            num_layers: config.shape.num_layers,
            group: config.shape.group(),
            head_dim: config.shape.head_dim,
            sequence_len: self.sequence.num_tokens(),
            heads: heads.collect(),
            rope: config.rope.as_ref(),
        })
    }
}
