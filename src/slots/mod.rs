//! The KV memory of one layer for engines that address it by *slot*.
//!
//! Such an engine (llama.cpp is one) gives every cached token a number, reuses numbers as it likes,
//! and says with a mask who sees whom. It hands over neither sequences nor their ends:
//!
//! ```text
//! K, V rows --write(slot)--> row of an open block --full--> sealed block
//! Q, mask, slots of Q --observe--> sequences as the mask shows them --policy--> evict, compact
//! Q, mask --attend--> O
//! ```
//!
//! Each KV head of each *stream* (a group of slots that one attention call reads) has a table of
//! its own, so heads may keep different tokens and memory follows what is kept. A slot is absent,
//! live or evicted; evicted ones stay known as such until they are written again.

mod attend;
mod dense;
mod lane;
mod observe;
mod side;
mod task;

use std::sync::Arc;

use crate::cache::Exact;
use crate::device::tensor::Tensor;
use crate::error::{Result, bail, ensure};
use crate::policy::{Event, Pipeline, PositionMode};
use crate::quantizer::Side;
use crate::shape::{MAX_HEAD_DIM, ModelShape, Needs, check_range};

pub use attend::{Masked, Meeting, Options};
pub use dense::Dense;
pub use lane::SlotState;

use lane::{Lane, MAX_BLOCK};
use observe::Tracked;
use side::SideStore;

/// The shape of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotsConfig {
    /// Index of the layer, below `num_layers`: policies may treat layers differently.
    pub layer: usize,
    /// Layers of the model.
    pub num_layers: usize,
    /// Query heads, a multiple of `num_kv_heads`.
    pub num_q_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Elements of a key.
    pub key_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
    /// Slots of a stream.
    pub num_slots: usize,
    /// Groups of slots that never see each other.
    pub num_streams: usize,
    /// Rows of a block, at most 64.
    pub block_size: usize,
    /// Whether the policy also runs after each piece of a prompt instead of at its end.
    pub pieces: bool,
}

/// What a layer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SlotsStats {
    /// Bytes of the blocks in use.
    pub bytes_used: usize,
    /// Largest `bytes_used` so far.
    pub bytes_peak: usize,
    /// (slot, KV head) pairs that are live.
    pub rows_live: usize,
    /// (slot, KV head) pairs evicted so far.
    pub rows_evicted: u64,
    /// (slot, side) pairs written so far.
    pub rows_written: u64,
}

/// The keys and values of one layer.
#[derive(Debug)]
pub struct Slots {
    config: SlotsConfig,
    policy: Arc<Pipeline>,
    sides: [SideStore; 2],
    streams: Vec<Stream>,
    rows_evicted: u64,
    rows_written: u64,
}

/// Slots that see each other.
#[derive(Debug, Default)]
struct Stream {
    /// One for each KV head.
    lanes: Vec<Lane>,
    /// When each slot got its token: the order of tokens, which slots themselves do not tell.
    ages: Vec<u32>,
    clock: u32,
    tracked: Vec<Tracked>,
}

impl SlotsConfig {
    fn validate(&self) -> Result<()> {
        let Self { layer, num_layers, num_q_heads, num_kv_heads, .. } = *self;
        check_range("key_dim", self.key_dim, MAX_HEAD_DIM)?;
        ModelShape::new(num_layers, num_q_heads, num_kv_heads, self.key_dim).validate()?;
        check_range("value_dim", self.value_dim, MAX_HEAD_DIM)?;
        check_range("num_slots", self.num_slots, 1 << 30)?;
        check_range("num_streams", self.num_streams, 4096)?;
        check_range("block_size", self.block_size, MAX_BLOCK)?;
        ensure!(
            layer < num_layers,
            InvalidArgument,
            "layer is {layer}, must be below num_layers {num_layers}"
        );
        Ok(())
    }

    fn group(&self) -> usize {
        self.num_q_heads / self.num_kv_heads
    }
}

/// What a cell-addressed engine hands over without being asked.
const OBSERVED: Needs = Needs(Needs::KEYS.0 | Needs::VALUES.0 | Needs::QUERY_WINDOW.0);

/// Parses a spec and checks that it can be served by slot, for shapes not yet known.
pub fn parse_spec(spec: &str) -> Result<Pipeline> {
    let policy = Pipeline::parse(spec).map_err(|error| error.within("spec"))?;
    ensure!(
        ![Event::PrefillEnd, Event::Step].iter().any(|event| policy.changes_values(*event)),
        Unsupported,
        "slots cannot change values of tokens that stay, as merging does"
    );
    if let Some((stage, _)) = policy.demoted().next() {
        bail!(
            Unsupported,
            "column {}: {stage} needs blocks of several formats, which slots do not have",
            policy.column_of(stage)
        );
    }
    let Exact { first, residual, .. } = policy.exact();
    ensure!(
        first == 0 && residual == 0,
        Unsupported,
        "column {}: slots have no order in which tokens could be first or residual",
        policy.column_of("quant")
    );
    ensure!(
        policy.selector().is_none(),
        Unsupported,
        "slots are read as the mask says, a selector would have to choose among them"
    );
    let missing = policy.needs().without(OBSERVED);
    let stage = policy.needed_by(missing).unwrap_or("pos");
    ensure!(
        missing == Needs::NONE && policy.position_mode() == PositionMode::Keep,
        Unsupported,
        "column {}: {stage:?} needs {}, which an engine that addresses its cache by slot does not hand \
         over",
        policy.column_of(stage),
        policy.needs().missing_from(OBSERVED).join(" and ")
    );
    Ok(policy)
}

impl Slots {
    /// Empty slots under `spec`. Addresses are reserved, memory is taken as slots are written.
    pub fn new(config: SlotsConfig, spec: &str) -> Result<Self> {
        config.validate()?;
        let policy = Arc::new(parse_spec(spec)?);
        ensure!(
            policy.query_window() == 0 || config.key_dim == config.value_dim,
            Unsupported,
            "key_dim {} and value_dim {} differ, which policies do not support",
            config.key_dim,
            config.value_dim
        );
        let lanes = config.num_streams * config.num_kv_heads;
        // Blocks with holes are compacted when holes exceed a quarter; see `Lane::is_sparse`.
        let blocks = lanes * (2 * config.num_slots.div_ceil(config.block_size) + 6);
        let exact = policy.exact();
        exact.check(config.num_layers)?;
        let (key, value) = match exact.skips(config.layer, config.num_layers) {
            true => (None, None),
            false => policy.quantizers(),
        };
        let stay = !policy.acts_on(Event::PrefillEnd) && !policy.acts_on(Event::Step);
        let side = |spec: Option<&str>, side, dim| {
            SideStore::new(spec.unwrap_or("f16"), side, config.block_size, dim, blocks, stay)
        };
        let keys = side(key, Side::Key, config.key_dim).map_err(|error| error.within("keys"))?;
        let values =
            side(value, Side::Value, config.value_dim).map_err(|error| error.within("values"))?;
        let stream = || Stream {
            lanes: (0..config.num_kv_heads).map(|_| Lane::default()).collect(),
            ..Stream::default()
        };
        let streams = (0..config.num_streams).map(|_| stream()).collect();
        let sides = [keys, values];
        Ok(Self { config, policy, sides, streams, rows_evicted: 0, rows_written: 0 })
    }

    /// The shape.
    pub fn config(&self) -> &SlotsConfig {
        &self.config
    }

    /// Writes one side of slots, `[slots, num_kv_heads, dim]`. New tokens, unless `same_tokens`:
    /// then only what is live changes.
    pub fn write(
        &mut self,
        side: Side,
        slots: &[u32],
        values: &Tensor<'_>,
        same_tokens: bool,
    ) -> Result<()> {
        let SlotsConfig { num_slots, num_kv_heads, block_size, .. } = self.config;
        let dim = self.dim(side);
        self.check_slots(slots)?;
        check_shape("values", values.shape(), [slots.len(), num_kv_heads, dim])?;
        let mut row = vec![0.0; dim];
        for (i, slot) in slots.iter().enumerate() {
            let stream = &mut self.streams[*slot as usize / num_slots];
            let slot = *slot as usize % num_slots;
            if !same_tokens && side == Side::Key {
                stream.renew(slot);
            }
            for (head, lane) in stream.lanes.iter_mut().enumerate() {
                if same_tokens && lane.state(slot) != SlotState::Live {
                    continue;
                }
                values.read(i, head, &mut row);
                lane.write(&mut self.sides, side as usize, slot, &row)?;
                if lane.is_sparse(block_size) {
                    lane.compact(&mut self.sides)?;
                }
            }
        }
        self.rows_written += slots.len() as u64;
        Ok(())
    }

    /// Decodes one side of a slot into `out`, `[num_kv_heads, dim]`, zeros where nothing is, and
    /// says what each head holds.
    pub fn read(
        &self,
        side: Side,
        slot: u32,
        out: &mut [f32],
        mut state: impl FnMut(usize, SlotState),
    ) -> Result<()> {
        self.check_slots(&[slot])?;
        let (stream, slot) = self.locate(slot);
        let rows = out.chunks_exact_mut(self.dim(side));
        for (head, (lane, row)) in self.streams[stream].lanes.iter().zip(rows).enumerate() {
            state(head, lane.state(slot));
            match lane.state(slot) {
                SlotState::Live => lane.read(&self.sides, side as usize, slot, row),
                _ => row.fill(0.0),
            }
        }
        Ok(())
    }

    /// Evicts the tokens of slots from one KV head and gives their memory back.
    pub fn evict(&mut self, kv_head: usize, slots: &[u32]) -> Result<()> {
        self.check_slots(slots)?;
        let SlotsConfig { num_slots, num_kv_heads, .. } = self.config;
        ensure!(
            kv_head < num_kv_heads,
            InvalidArgument,
            "kv_head is {kv_head}, must be below num_kv_heads {num_kv_heads}"
        );
        for slot in slots {
            let stream = &mut self.streams[*slot as usize / num_slots];
            stream.lanes[kv_head].evict(&mut self.sides, *slot as usize % num_slots);
        }
        self.rows_evicted += slots.len() as u64;
        self.compact(kv_head)
    }

    fn compact(&mut self, kv_head: usize) -> Result<()> {
        for stream in &mut self.streams {
            let lane = &mut stream.lanes[kv_head];
            if lane.is_sparse(self.config.block_size) {
                lane.compact(&mut self.sides)?;
            }
        }
        Ok(())
    }

    /// Makes every slot of a stream absent.
    pub fn clear(&mut self, stream: usize) -> Result<()> {
        self.check_stream(stream, "stream")?;
        let stream = &mut self.streams[stream];
        stream.lanes.iter_mut().for_each(|lane| lane.clear(&mut self.sides));
        (stream.ages, stream.clock, stream.tracked) = (Vec::new(), 0, Vec::new());
        Ok(())
    }

    /// Makes stream `target` a copy of stream `source`.
    pub fn copy_stream(&mut self, source: usize, target: usize) -> Result<()> {
        self.check_stream(source, "source")?;
        self.check_stream(target, "target")?;
        if source == target {
            return Ok(());
        }
        self.clear(target)?;
        for head in 0..self.config.num_kv_heads {
            let copy = self.streams[source].lanes[head].duplicate(&mut self.sides)?;
            self.streams[target].lanes[head] = copy;
        }
        let (ages, clock) = (self.streams[source].ages.clone(), self.streams[source].clock);
        let tracked = self.streams[source].tracked.clone();
        let target = &mut self.streams[target];
        (target.ages, target.clock, target.tracked) = (ages, clock, tracked);
        Ok(())
    }

    /// Numbers.
    pub fn stats(&self) -> SlotsStats {
        let lanes = self.streams.iter().flat_map(|stream| &stream.lanes);
        SlotsStats {
            bytes_used: self.sides.iter().map(SideStore::used_bytes).sum(),
            bytes_peak: self.sides.iter().map(SideStore::peak_bytes).sum(),
            rows_live: lanes.map(Lane::num_rows).sum(),
            rows_evicted: self.rows_evicted,
            rows_written: self.rows_written,
        }
    }

    /// Elements of a row of one side.
    pub fn dim(&self, side: Side) -> usize {
        match side {
            Side::Key => self.config.key_dim,
            Side::Value => self.config.value_dim,
        }
    }

    fn locate(&self, slot: u32) -> (usize, usize) {
        (slot as usize / self.config.num_slots, slot as usize % self.config.num_slots)
    }

    fn check_slots(&self, slots: &[u32]) -> Result<()> {
        let limit = self.config.num_slots * self.config.num_streams;
        for (i, slot) in slots.iter().enumerate() {
            ensure!(
                (*slot as usize) < limit,
                InvalidArgument,
                "slots[{i}] is {slot}, must be below {limit}"
            );
        }
        Ok(())
    }

    fn check_stream(&self, stream: usize, name: &str) -> Result<()> {
        let limit = self.config.num_streams;
        ensure!(stream < limit, InvalidArgument, "{name} is {stream}, must be below {limit}");
        Ok(())
    }
}

/// Refuses a tensor of another shape.
fn check_shape(name: &str, found: [usize; 3], expected: [usize; 3]) -> Result<()> {
    ensure!(
        found == expected,
        InvalidArgument,
        "{name} has the shape {found:?}, must be {expected:?}"
    );
    Ok(())
}

impl Stream {
    /// A slot has a new token.
    fn renew(&mut self, slot: usize) {
        if self.ages.len() <= slot {
            self.ages.resize(slot + 1, 0);
        }
        self.clock += 1;
        self.ages[slot] = self.clock;
    }

    fn age(&self, slot: usize) -> u32 {
        self.ages.get(slot).copied().unwrap_or(0)
    }
}
