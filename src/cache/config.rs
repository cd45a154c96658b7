//! What a cache is made from.

use std::sync::Arc;

use crate::device::cuda::Gpu;
use crate::dtype::DType;
use crate::error::{Result, ensure};
use crate::evictor;
use crate::quantizer::basis::Bases;
use crate::shape::{LaneWidth, MAX_BLOCK_SIZE, ModelShape, Rope};

use super::{Format, RecurrentConfig};

/// Everything a cache needs to know. Fixed for its life.
#[derive(Debug, Clone)]
pub struct CacheConfig {
    /// The attention shape of the model.
    pub shape: ModelShape,
    /// Tokens of a block, 1 to 1024.
    pub block_size: usize,
    /// What one block table covers.
    pub lane_width: LaneWidth,
    /// Blocks, 1 to [`evictor::MAX_SLOTS`].
    pub num_blocks: usize,
    /// Bytes of block memory; 0 for `num_blocks` open blocks.
    pub memory_limit: usize,
    /// The formats of the memory; `None` for bookkeeping without memory.
    pub memory: Option<MemoryFormats>,
    /// The spec of the evictor.
    pub evictor: String,
    /// The operator's secret that separates prefix indexes.
    pub salt: u64,
    /// Whether full blocks are shared and kept by prefix.
    pub prefix: bool,
    /// How the model rotates queries and keys, if the caller told.
    pub rope: Option<Rope>,
    /// The device whose memory the blocks are in; `None` for the host.
    pub device: Option<DeviceConfig>,
    /// The recurrent layers of the model, if it has some.
    pub recurrent: Option<RecurrentConfig>,
}

/// Where the blocks of a cache on a device are.
#[derive(Debug, Clone)]
pub struct DeviceConfig {
    /// The device.
    pub gpu: Arc<Gpu>,
    /// The engine's memory, `memory_limit` bytes; 0 takes memory from the driver.
    pub memory: u64,
}

/// The formats of a cache with memory.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryFormats {
    /// Of open blocks.
    pub open: DType,
    /// Quantizer spec of the keys of sealed blocks.
    pub key: String,
    /// Quantizer spec of the values of sealed blocks.
    pub value: String,
    /// What stays in the format of open blocks.
    pub exact: Exact,
    /// Which sides of sealed blocks are kept as coordinates in a subspace.
    pub low_rank: LowRank,
    /// Quantizer specs of keys and values for rows that policies demote.
    pub demoted: Vec<[String; 2]>,
}

/// What stays in the format of open blocks although it could be quantized. Blocks have one format, so
/// tokens stay as whole blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Exact {
    /// So many layers at either end of the model.
    pub skip_layers: usize,
    /// So many tokens at the start of a sequence, for good.
    pub first: usize,
    /// The latest so many tokens: a block is sealed once none of its tokens is among them.
    pub residual: usize,
}

/// Rows of sealed blocks that are kept as their coordinates in a subspace: [`crate::quantizer::basis`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LowRank {
    /// Dimensions that are kept of keys and of values; `None` for whole rows.
    pub ranks: [Option<usize>; 2],
    /// The subspaces of the model; without, each sequence has its own, fitted to its prompt.
    pub bases: Option<Arc<Bases>>,
    /// What tells the subspaces of this file from those of another.
    pub digest: [u8; 32],
}

impl LowRank {
    /// Whether no side is kept so.
    pub fn is_none(&self) -> bool {
        self.ranks == [None, None]
    }

    fn check(&self, config: &CacheConfig) -> Result<()> {
        if self.is_none() {
            return Ok(());
        }
        let shape = &config.shape;
        let names = [("k_rank", shape.head_dim), ("v_rank", shape.value_dim())];
        for (rank, (name, dim)) in self.ranks.iter().zip(names) {
            let rank = rank.unwrap_or(1);
            ensure!(
                (1..=dim).contains(&rank),
                InvalidArgument,
                "{name} is {rank}, must be in 1..={dim}, the elements of a row"
            );
        }
        ensure!(
            shape.stores_values(),
            Unsupported,
            "k_rank and v_rank need values with rows of their own; those of this model are in keys"
        );
        ensure!(
            self.bases.is_some() || !config.prefix,
            Unsupported,
            "prefixes are shared, but each prompt would have a basis of its own: name a file, basis=\"...\""
        );
        Ok(())
    }
}

impl MemoryFormats {
    /// Sealed blocks of these quantizers, nothing stays as it is.
    pub fn new(open: DType, key: &str, value: &str) -> Self {
        Self {
            open,
            key: key.into(),
            value: value.into(),
            exact: Exact::default(),
            low_rank: LowRank::default(),
            demoted: Vec::new(),
        }
    }
}

impl Exact {
    /// Whether a layer stays in the format of open blocks.
    pub fn skips(&self, layer: usize, num_layers: usize) -> bool {
        layer < self.skip_layers || layer + self.skip_layers >= num_layers
    }

    /// Refuses to skip every layer of a model: then nothing would be quantized.
    pub fn check(&self, num_layers: usize) -> Result<()> {
        ensure!(
            2 * self.skip_layers < num_layers || self.skip_layers == 0,
            InvalidArgument,
            "skip_layers is {}, which at either end of a model of {num_layers} layers leaves none to \
             quantize",
            self.skip_layers
        );
        Ok(())
    }
}

impl CacheConfig {
    /// Bookkeeping without memory: lanes as wide as a sequence, `lru`, no prefix index, on the host.
    pub fn new(shape: ModelShape, block_size: usize, num_blocks: usize) -> Self {
        Self {
            shape,
            block_size,
            lane_width: LaneWidth::Sequence,
            num_blocks,
            memory_limit: 0,
            memory: None,
            evictor: "lru".into(),
            salt: 0,
            prefix: false,
            rope: None,
            device: None,
            recurrent: None,
        }
    }

    /// Lanes of each sequence.
    pub fn num_lanes(&self) -> usize {
        self.lane_width.num_lanes(&self.shape)
    }

    /// What stays in the format of open blocks.
    pub fn exact(&self) -> Exact {
        self.memory.as_ref().map_or_else(Exact::default, |memory| memory.exact)
    }

    /// Whether the layer of `lane` stays in the format of open blocks.
    pub(super) fn skips(&self, lane: usize) -> bool {
        let (exact, layers) = (self.exact(), self.shape.num_layers);
        exact.skip_layers > 0 && exact.skips(lane * layers / self.num_lanes(), layers)
    }

    /// Checks every documented range.
    pub(super) fn validate(&self) -> Result<()> {
        self.shape.validate()?;
        ensure!(
            (1..=MAX_BLOCK_SIZE).contains(&self.block_size),
            InvalidArgument,
            "block_size is {}, must be in 1..={MAX_BLOCK_SIZE}",
            self.block_size
        );
        ensure!(
            (1..=evictor::MAX_SLOTS).contains(&self.num_blocks),
            InvalidArgument,
            "num_blocks is {}, must be in 1..={}",
            self.num_blocks,
            evictor::MAX_SLOTS
        );
        if let Some(rope) = &self.rope {
            let (dims, head_dim) = (2 * rope.inv_freq.len(), self.shape.head_dim);
            ensure!(
                dims > 0 && dims <= head_dim,
                InvalidArgument,
                "rope_dims is {dims}, must be in 2..={head_dim} (head_dim)"
            );
            let first = rope.first;
            ensure!(
                first <= head_dim - dims,
                InvalidArgument,
                "rope_first is {first}, must be at most {} (head_dim - rope_dims)",
                head_dim - dims
            );
        }
        if let Some(memory) = &self.memory {
            memory.low_rank.check(self)?;
        }
        if let Some(recurrent) = &self.recurrent {
            recurrent.validate()?;
        }
        let exact = self.exact();
        exact.check(self.shape.num_layers)?;
        ensure!(
            exact.skip_layers == 0 || self.num_lanes() >= self.shape.num_layers,
            Unsupported,
            "skip_layers needs lanes of width Layer: a block has one format, and those of width {:?} \
             hold all layers",
            self.lane_width
        );
        Ok(())
    }

    /// Text that tells apart prefixes whose bytes could not be exchanged.
    pub(super) fn scope(&self, formats: &[Format]) -> String {
        let formats: Vec<_> = formats.iter().map(Format::spec).collect();
        let mut scope =
            format!("{:?} {:?} {:?} {:?}", self.shape, self.lane_width, formats, self.rope);
        let Exact { skip_layers, first, .. } = self.exact();
        if skip_layers > 0 || first > 0 {
            scope += &format!(" exact {skip_layers} {first}");
        }
        if let Some(MemoryFormats { low_rank, .. }) = &self.memory
            && !low_rank.is_none()
        {
            scope += &format!(" basis {:02x?}", low_rank.digest);
        }
        if let Some(RecurrentConfig { num_layers, bytes, .. }) = self.recurrent {
            scope += &format!(" recurrent {num_layers} {bytes}");
        }
        scope
    }
}
