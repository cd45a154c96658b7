//! The parts put together: a cache with a policy and a tier, and sequences that use them.

mod layers;
mod observe;
mod recurrent;
mod serve;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::cache::{Cache, CacheConfig, CacheStats, DeviceConfig, MemoryFormats, RecurrentConfig};
use crate::device::tensor::Tensor;
use crate::dtype::DType;
use crate::error::{Error, Kind, Result, bail, ensure};
use crate::policy::{Event, Pipeline, PositionMode};
use crate::sequence::{Lane, Sequence, SequenceConfig};
use crate::shape::{KeepSet, LaneWidth, ModelShape, Needs, Rope};
use crate::store::{Key, Store};
use crate::tier::{self, Tier};
use layers::Layers;
use parking_lot::RwLock;
use serve::{check_policy, demoted_format, observation_for, offered};

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
    /// The device whose memory the blocks are in; `None` for the host.
    pub device: Option<DeviceConfig>,
    /// The recurrent layers of the model, if it has some.
    pub recurrent: Option<RecurrentConfig>,
}

/// A cache with a default policy, an optional tier and workers. Shared, any thread.
#[derive(Debug)]
pub struct Manager {
    cache: Arc<Cache>,
    policy: Arc<Pipeline>,
    tier: Option<Arc<Tier>>,
    num_threads: usize,
    workers: OnceLock<rayon::ThreadPool>,
    /// The output projection of each layer, in the engine's memory.
    projections: RwLock<Vec<Option<Tensor<'static>>>>,
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
        // Values in keys have the format of keys.
        let fallback = key.filter(|_| !config.shape.stores_values()).unwrap_or(open);
        let cache = Cache::new(CacheConfig {
            shape: config.shape,
            block_size: config.block_size,
            lane_width: config.lane_width.unwrap_or(policy.lane_width().0),
            num_blocks: config.num_blocks,
            memory_limit: config.memory_limit,
            memory: Some(MemoryFormats {
                open: config.dtype,
                key: key.unwrap_or(open).to_string(),
                value: value.unwrap_or(fallback).to_string(),
                exact: policy.exact(),
                low_rank: policy
                    .low_rank()
                    .resolve(&config.shape)
                    .map_err(|error| error.within("spec"))?,
                demoted: policy.demoted().map(|(_, names)| names.map(str::to_string)).collect(),
            }),
            evictor: config.evictor,
            salt: config.salt,
            prefix: config.prefix,
            rope: config.rope,
            device: config.device,
            recurrent: config.recurrent,
        })?;
        // The engine hands over weights once the cache exists.
        check_policy(&cache, &policy, Needs::OUTPUT_PROJECTION)?;
        let tier = config.store.map(|store| Arc::new(Tier::new(store)));
        if let Some(tier) = &tier {
            cache.set_offload(Some(tier.clone()));
        }
        let policy = Arc::new(policy);
        let num_threads = config.num_threads;
        let workers = OnceLock::new();
        let projections = RwLock::new(vec![None; config.shape.num_layers]);
        Ok(Arc::new(Self { cache, policy, tier, num_threads, workers, projections }))
    }

    /// The cache.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// Tells the output projection of a layer, `[hidden, 1, num_q_heads * value_dim]`, which policies
    /// may read as long as the manager lives.
    pub fn set_output_projection(&self, layer: usize, weights: Tensor<'static>) -> Result<()> {
        let shape = &self.cache.config().shape;
        ensure!(
            layer < shape.num_layers,
            InvalidArgument,
            "layer is {layer}, the model has {}",
            shape.num_layers
        );
        let (found, width) = (weights.shape(), shape.num_q_heads * shape.value_dim());
        ensure!(
            found[0] > 0 && found[2] == width,
            InvalidArgument,
            "weights has {} rows of {}, must have rows of num_q_heads * value_dim = {width}",
            found[0],
            found[2]
        );
        self.projections.write()[layer] = Some(weights);
        Ok(())
    }

    /// What the engine has told besides the cache's configuration.
    fn told(&self) -> Needs {
        match self.projections.read().iter().all(Option::is_some) {
            true => Needs::OUTPUT_PROJECTION,
            false => Needs::NONE,
        }
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
            ensure!(
                policy.quantizers() == (None, None),
                Unsupported,
                "the policy of a sequence cannot choose quantizers: blocks have the cache's formats"
            );
        }
        let policy = policy.unwrap_or_else(|| manager.policy.clone());
        let cache = &manager.cache;
        check_policy(cache, &policy, manager.told())?;
        let observation = observation_for(cache, &policy);
        if policy.selector().is_some() {
            cache.keep_bounds()?;
        }
        let sealed = &cache.formats()[cache.sealed_format()];
        let config = SequenceConfig {
            cache_relative: policy.position_mode() == PositionMode::CacheRelative,
            // Prefixes are shared in sealed form, so they cannot wait for the policy. On a device rows of
            // open blocks alone are moved without the host.
            defer_sealing: policy.acts_on(Event::PrefillEnd)
                && (!sealed.is_token_granular() || cache.gpu().is_some())
                && !cache.config().prefix,
        };
        let sequence = Sequence::new(cache.clone(), config, observation)?;
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
        let tier = self.manager.as_ref().and_then(|manager| manager.tier.clone());
        let Some(tier) = tier.filter(|_| self.sequence.cache().config().prefix) else {
            return self.sequence.match_prefix(tokens);
        };
        if self.sequence.has_state() {
            let matched = self.match_with_state(tokens, &tier)?;
            Cache::count(&self.sequence.cache().counters.prefix_hit_tokens, matched);
            return Ok(matched);
        }
        let mut matched = self.sequence.match_prefix(tokens)?;
        let before = matched;
        while let Some(digest) = self.sequence.next_digest(tokens) {
            let cache = self.sequence.cache().clone();
            if !tier.fetch(&cache, &digest, matched) {
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
        if self.is_replaying() {
            return self.end_replay(n);
        }
        if n <= self.sequence.num_reserved() {
            self.check_observed(n)?;
        }
        if self.decoding && n > 0 {
            self.ensure_can_act(Event::Step)?;
        }
        self.sequence.commit(n, tokens)?;
        if let Some(observation) = self.sequence.observation().filter(|_| !self.decoding) {
            observation.commit_residuals(n);
        }
        if self.decoding && n > 0 {
            self.steps += 1;
            self.run_policy(Event::Step)?;
            // All queries of a prompt were for its end; a piece of several tokens may be one more.
            let keep = self.policy.step_query_window();
            if let Some(observation) =
                self.sequence.observation().filter(|seen| n == 1 && seen.window() > keep)
            {
                observation.forget_queries(keep);
            }
        }
        Ok(())
    }

    /// Says that the prompt, or one more piece of it, has been read: the prefill phase of the
    /// policy runs, and commits are decode steps from now on.
    pub fn end_prefill(&mut self) -> Result<()> {
        self.sequence.ensure_present()?;
        ensure!(!self.is_replaying(), InvalidState, "commit 0 tokens to end the replay first");
        self.ensure_can_act(Event::PrefillEnd)?;
        self.run_policy(Event::PrefillEnd)?;
        self.sequence.seal_deferred();
        if let Some(observation) = self.sequence.observation() {
            observation.end_prompt(self.policy.step_query_window());
        }
        self.decoding = true;
        Ok(())
    }

    /// See [`Sequence::truncate`]. Without tokens the sequence starts anew: what comes is a prompt.
    pub fn truncate(&mut self, n: usize) -> Result<()> {
        self.sequence.truncate(n)?;
        if n == 0 {
            (self.decoding, self.steps) = (false, 0);
        }
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

    /// Fails where a policy that acts would wait for a stream that is being captured.
    fn ensure_can_act(&self, event: Event) -> Result<()> {
        match self.sequence.cache().gpu().filter(|_| self.policy.acts_on(event)) {
            None => Ok(()),
            Some(gpu) => {
                let _entered = gpu.enter()?;
                gpu.ensure_not_capturing("run policies")
            }
        }
    }

    fn run_policy(&mut self, event: Event) -> Result<()> {
        let policy = self.policy.clone();
        let demoted = policy.demotes(event);
        // What is demoted does not count, and less than a block of the others cannot be.
        let rows = |lane: &Lane| match demoted {
            Some(_) => (lane.len() - lane.num_demoted())
                .saturating_sub(self.sequence.cache().config().block_size - 1),
            None => lane.len(),
        };
        let longest = self.sequence.lanes().iter().map(rows).max().unwrap_or(0);
        if !policy.is_due(event, self.steps, longest, self.sequence.num_tokens()) {
            return Ok(());
        }
        if policy.changes_values(event) {
            return self.run_with_values(event, &policy);
        }
        let needs = policy.needs_with(offered(self.sequence.cache()));
        let mut layers = Layers::new(&self.sequence, self.manager.as_deref(), needs);
        let kept = policy.select(event, &mut layers)?;
        let format = match demoted {
            Some([key, value]) => Some(demoted_format(self.sequence.cache(), key, value)?),
            None => None,
        };
        let mut done = vec![false; self.sequence.lanes().len()];
        for (layer, heads) in kept.iter().enumerate() {
            for (head, keep) in heads.iter().enumerate() {
                let (lane, _) = self.sequence.locate(layer, head);
                // Heads that share a lane share a keep set: the width was checked at creation.
                if std::mem::replace(&mut done[lane], true) {
                    continue;
                }
                match format {
                    Some(format) => self.sequence.demote(lane, keep, format)?,
                    None => self.sequence.compact(lane, keep)?,
                }
            }
        }
        Ok(())
    }

    /// Runs a policy that changes values of survivors: one layer at a time, so that only the values of
    /// one are held. The lanes are no wider than a layer.
    fn run_with_values(&mut self, event: Event, policy: &Pipeline) -> Result<()> {
        let shape = self.sequence.cache().config().shape;
        for layer in 0..shape.num_layers {
            let kept = {
                let manager = self.manager.as_deref();
                let needs = policy.needs_with(offered(self.sequence.cache()));
                let mut layers = Layers::new(&self.sequence, manager, needs);
                policy.select_layer(event, &mut layers, layer)?
            };
            let mut lanes: Vec<(usize, KeepSet, Vec<Vec<f32>>)> = Vec::new();
            for (head, kept) in kept.into_iter().enumerate() {
                let (lane, _) = self.sequence.locate(layer, head);
                match lanes.last_mut() {
                    Some((last, _, values)) if *last == lane => values.push(kept.values),
                    _ => lanes.push((lane, kept.set, vec![kept.values])),
                }
            }
            for (lane, keep, values) in lanes {
                self.sequence.compact_with(lane, &keep, &values)?;
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
