//! The numbers that describe a model, a block and a lane. Plain data, no behaviour beyond checks.

use std::ops::Range;

use crate::error::{Result, ensure};

/// The attention shape of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelShape {
    /// Layers that hold keys and values, at least 1.
    pub num_layers: usize,
    /// Query heads of a layer, a multiple of `num_kv_heads`.
    pub num_q_heads: usize,
    /// Key/value heads of a layer, at least 1.
    pub num_kv_heads: usize,
    /// Elements of one key and of one query vector, 1 to 1024.
    pub head_dim: usize,
    /// Where the values are.
    pub values: Values,
}

/// Where the values of a model are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// Rows of their own, of so many elements, 1 to 1024.
    Own(usize),
    /// The first so many elements of each key, 1 to `head_dim`: the latent of MLA (DeepSeek-V2, arXiv
    /// 2405.04434), whose key is the latent followed by a rotated part. Nothing is stored for them.
    InKeys(usize),
}

/// Largest head dimension that any kernel accepts.
pub const MAX_HEAD_DIM: usize = 1024;
/// Largest number of tokens in a block.
pub const MAX_BLOCK_SIZE: usize = 1024;

impl ModelShape {
    /// A model whose values have rows of their own, as long as keys.
    pub const fn new(
        num_layers: usize,
        num_q_heads: usize,
        num_kv_heads: usize,
        head_dim: usize,
    ) -> Self {
        Self { num_layers, num_q_heads, num_kv_heads, head_dim, values: Values::Own(head_dim) }
    }

    /// Elements of one value vector and of one output vector.
    pub const fn value_dim(&self) -> usize {
        match self.values {
            Values::Own(dim) | Values::InKeys(dim) => dim,
        }
    }

    /// Elements of the rows that values are read from: where these are keys, there are more than in a value.
    pub const fn value_row_dim(&self) -> usize {
        match self.values {
            Values::Own(dim) => dim,
            Values::InKeys(_) => self.head_dim,
        }
    }

    /// Whether values have rows of their own.
    pub const fn stores_values(&self) -> bool {
        matches!(self.values, Values::Own(_))
    }

    /// Query heads that share one key/value head.
    pub const fn group(&self) -> usize {
        self.num_q_heads / self.num_kv_heads
    }

    /// Checks every documented range.
    pub fn validate(&self) -> Result<()> {
        let Self { num_layers, num_q_heads, num_kv_heads, head_dim, values } = *self;
        check_range("num_layers", num_layers, 4096)?;
        check_range("num_kv_heads", num_kv_heads, 4096)?;
        check_range("num_q_heads", num_q_heads, 65536)?;
        check_range("head_dim", head_dim, MAX_HEAD_DIM)?;
        match values {
            Values::Own(dim) => check_range("value_dim", dim, MAX_HEAD_DIM)?,
            Values::InKeys(dim) => check_range("value_dim", dim, head_dim)?,
        }
        ensure!(
            num_q_heads.is_multiple_of(num_kv_heads),
            InvalidArgument,
            "num_q_heads is {num_q_heads}, must be a multiple of num_kv_heads {num_kv_heads}"
        );
        Ok(())
    }
}

/// Refuses a number outside of `1..=max`.
pub fn check_range(name: &str, value: usize, max: usize) -> Result<()> {
    ensure!((1..=max).contains(&value), InvalidArgument, "{name} is {value}, must be in 1..={max}");
    Ok(())
}

/// What one block table of a sequence covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LaneWidth {
    /// One table for all layers and heads: the plain paged layout.
    Sequence,
    /// One table for each layer.
    Layer,
    /// One table for each layer and KV head: real ragged memory.
    Head,
}

impl LaneWidth {
    /// Lanes of a sequence of a model of this shape.
    pub const fn num_lanes(self, shape: &ModelShape) -> usize {
        match self {
            Self::Sequence => 1,
            Self::Layer => shape.num_layers,
            Self::Head => shape.num_layers * shape.num_kv_heads,
        }
    }

    /// Cells in each block: the (layer, KV head) pairs whose rows one block holds.
    pub const fn cells(self, shape: &ModelShape) -> usize {
        shape.num_layers * shape.num_kv_heads / self.num_lanes(shape)
    }

    /// The lane that holds `(layer, kv_head)` and the cell inside a block of this lane.
    pub const fn locate(self, shape: &ModelShape, layer: usize, kv_head: usize) -> (usize, usize) {
        let heads = shape.num_kv_heads;
        match self {
            Self::Sequence => (0, layer * heads + kv_head),
            Self::Layer => (layer, kv_head),
            Self::Head => (layer * heads + kv_head, 0),
        }
    }
}

/// Which elements of a head RoPE pairs with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RopeStyle {
    /// Pairs `(i, i + dims/2)`: Hugging Face `rotate_half`, ggml NEOX.
    Half,
    /// Pairs `(2i, 2i + 1)`: the original RoFormer, ggml NORM.
    Interleaved,
}

/// Rotary position embedding: pair `i` turns by `position * inv_freq[i]` radians.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Which elements form a pair.
    pub style: RopeStyle,
    /// The first rotated element: 0 but for keys that start with a latent (MLA).
    pub first: usize,
    /// One frequency for each pair; twice its length is the number of rotated elements.
    pub inv_freq: Vec<f32>,
}

impl Rope {
    /// The usual frequencies `base^(-2i/dims)`.
    pub fn new(style: RopeStyle, dims: usize, base: f32) -> Self {
        let freq = |i: usize| f64::from(base).powf(-2.0 * i as f64 / dims as f64) as f32;
        Self { style, first: 0, inv_freq: (0..dims / 2).map(freq).collect() }
    }

    /// The elements of pair `i`.
    pub fn pair(&self, i: usize) -> (usize, usize) {
        let (a, b) = match self.style {
            RopeStyle::Half => (i, i + self.inv_freq.len()),
            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
        };
        (self.first + a, self.first + b)
    }

    /// Turns `row` by `delta` positions in place, in f64 angles: a key at `p` becomes the key at
    /// `p + delta`.
    pub fn rotate(&self, row: &mut [f32], delta: i32) {
        for (i, &freq) in self.inv_freq.iter().enumerate() {
            let (a, b) = self.pair(i);
            let (sin, cos) = (f64::from(delta) * f64::from(freq)).sin_cos();
            let (sin, cos) = (sin as f32, cos as f32);
            let (x, y) = (row[a], row[b]);
            row[a] = x * cos - y * sin;
            row[b] = x * sin + y * cos;
        }
    }
}

/// What a pipeline must observe, or what an engine can hand over: a set of bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Needs(pub u32);

impl Needs {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// The cached keys.
    pub const KEYS: Self = Self(1);
    /// The cached values.
    pub const VALUES: Self = Self(1 << 1);
    /// The last `w` queries of each head, after RoPE.
    pub const QUERY_WINDOW: Self = Self(1 << 2);
    /// Attention probabilities summed over queries, one number for each cached token.
    pub const COLUMN_SUM: Self = Self(1 << 3);
    /// The rotation parameters of the model.
    pub const ROPE: Self = Self(1 << 4);

    /// Mean and covariance of the queries of each head before RoPE.
    pub const QUERY_STATISTICS: Self = Self(1 << 5);
    /// The input of attention in each layer, after its norm, for each token.
    pub const HIDDEN: Self = Self(1 << 6);
    /// The output projection of each layer.
    pub const OUTPUT_PROJECTION: Self = Self(1 << 7);

    /// The prompt read a second time, its probabilities noted.
    pub const REPLAY: Self = Self(1 << 8);
    /// The hidden states of the tokens that do so.
    pub const REPLAY_HIDDEN: Self = Self(1 << 9);

    /// How many queries gave each cached token less than an even share.
    pub const LOW_COUNT: Self = Self(1 << 10);

    /// The attention probabilities of the last query, summed over the query heads of a group. Attention
    /// of this library knows them, so scores may ask it for them instead of computing them again.
    pub const LAST_ROW: Self = Self(1 << 11);

    /// The residual stream before attention and what attention adds to it, in each layer for each token
    /// of the prompt.
    pub const RESIDUAL: Self = Self(1 << 12);

    const NAMES: [(Self, &'static str); 13] = [
        (Self::KEYS, "KEYS"),
        (Self::VALUES, "VALUES"),
        (Self::QUERY_WINDOW, "QUERY_WINDOW"),
        (Self::COLUMN_SUM, "COLUMN_SUM"),
        (Self::ROPE, "ROPE"),
        (Self::QUERY_STATISTICS, "QUERY_STATISTICS"),
        (Self::HIDDEN, "HIDDEN"),
        (Self::OUTPUT_PROJECTION, "OUTPUT_PROJECTION"),
        (Self::REPLAY, "REPLAY"),
        (Self::REPLAY_HIDDEN, "REPLAY_HIDDEN"),
        (Self::LOW_COUNT, "LOW_COUNT"),
        (Self::LAST_ROW, "LAST_ROW"),
        (Self::RESIDUAL, "RESIDUAL"),
    ];

    /// Both sets together.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The bits of this set that `other` lacks.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether every bit of `other` is in this set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The bits of this set that `other` lacks, by name.
    pub fn missing_from(self, other: Self) -> Vec<&'static str> {
        let lacks = |bit: Self| self.contains(bit) && !other.contains(bit);
        Self::NAMES.iter().filter(|(bit, _)| lacks(*bit)).map(|(_, name)| *name).collect()
    }
}

/// Which tokens of one lane survive: ascending, disjoint, non-adjacent ranges of lane indices.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeepSet {
    ranges: Vec<Range<usize>>,
}

impl KeepSet {
    /// Every index of a lane of `len` tokens.
    pub fn all(len: usize) -> Self {
        let mut set = Self::default();
        set.push_range(0..len);
        set
    }

    /// From ascending indices without repeats.
    pub fn from_indices(indices: impl IntoIterator<Item = usize>) -> Self {
        let mut set = Self::default();
        for index in indices {
            set.push_range(index..index + 1);
        }
        set
    }

    /// Appends a range that starts at or after the end of the last one.
    pub fn push_range(&mut self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        match self.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            last => {
                assert!(last.is_none_or(|last| last.end < range.start), "ranges must ascend");
                self.ranges.push(range);
            }
        }
    }

    /// The ranges.
    pub fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// Indices in the set.
    pub fn len(&self) -> usize {
        self.ranges.iter().map(ExactSizeIterator::len).sum()
    }

    /// Whether nothing survives.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The end of the last range: a lane must be at least this long.
    pub fn end(&self) -> usize {
        self.ranges.last().map_or(0, |range| range.end)
    }

    /// The indices in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.ranges.iter().cloned().flatten()
    }
}
