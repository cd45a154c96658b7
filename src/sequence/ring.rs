//! The last queries of a sequence in the memory of a device, where a kernel puts them as attention runs.
//! The host knows which of them count: a query of a rejected draft stays until its position is used again.
//!
//! ```text
//! layer = [capacity] (position, factor) | [capacity, num_q_heads, head_dim]
//! ```

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use half::{bf16, f16};
use parking_lot::Mutex;

use super::received::MAX_DRAFTS;
use crate::device::cuda::{DeviceMemory, Gpu};
use crate::dtype::DType;
use crate::error::Result;
use crate::shape::ModelShape;

/// Bytes of the position and the factor of a query.
const HEAD_BYTES: usize = 8;

/// A query of all heads at one position, `[num_q_heads, head_dim]`.
pub(super) type Query = (i32, Vec<f32>);

/// Memory for the last queries of each layer.
#[derive(Debug)]
pub struct QueryRing {
    memory: DeviceMemory,
    capacity: usize,
    layer_bytes: usize,
    row_bytes: usize,
    dtype: DType,
}

impl QueryRing {
    fn new(gpu: &Arc<Gpu>, shape: &ModelShape, dtype: DType, window: usize) -> Result<Self> {
        // Drafts must not push out the queries that stay if they are rejected.
        let capacity = window.saturating_add(window.max(MAX_DRAFTS)).next_multiple_of(8);
        let row_bytes = shape.num_q_heads * shape.head_dim * dtype.size();
        let layer_bytes = capacity * (HEAD_BYTES + row_bytes);
        let bytes = shape.num_layers * layer_bytes;
        let memory = DeviceMemory::reuse(gpu, bytes)?;
        let _entered = gpu.enter()?;
        memory.clear(0, bytes)?;
        Ok(Self { memory, capacity, layer_bytes, row_bytes, dtype })
    }

    /// Where it starts.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Queries of a layer; that at position `p` is at place `p % capacity`.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    fn copy(&self) -> Result<Self> {
        Ok(Self { memory: self.memory.duplicate()?, ..*self })
    }

    /// The queries of a layer at positions `from..to`, in order, each times its factor.
    fn read(&self, layer: usize, from: i32, to: i32) -> Result<Vec<Query>> {
        let mut bytes = vec![0; self.layer_bytes];
        self.memory.read(self.address() + (layer * self.layer_bytes) as u64, &mut bytes)?;
        let (heads, rows) = bytes.split_at(self.capacity * HEAD_BYTES);
        let word = |i: usize| [0, 1, 2, 3].map(|byte| heads[4 * i + byte]);
        let mut queries: Vec<Query> = (0..self.capacity)
            .map(|i| (i32::from_le_bytes(word(2 * i)), f32::from_le_bytes(word(2 * i + 1)), i))
            .filter(|(position, factor, _)| *factor != 0.0 && (from..to).contains(position))
            .map(|(position, factor, i)| {
                let row = &rows[i * self.row_bytes..][..self.row_bytes];
                let value = |pair: &[u8]| match self.dtype {
                    DType::Bf16 => bf16::from_le_bytes([pair[0], pair[1]]).to_f32(),
                    _ => f16::from_le_bytes([pair[0], pair[1]]).to_f32(),
                };
                (position, row.chunks_exact(2).map(|pair| factor * value(pair)).collect())
            })
            .collect();
        queries.sort_by_key(|(position, _)| *position);
        Ok(queries)
    }
}

/// What a sequence on a device knows of its last queries.
#[derive(Debug)]
pub(super) struct NotedQueries {
    gpu: Arc<Gpu>,
    shape: ModelShape,
    dtype: DType,
    window: usize,
    /// Taken when the first query is noted.
    ring: Mutex<Option<Arc<QueryRing>>>,
    /// Queries at positions `begin..end` count.
    begin: AtomicI32,
    end: AtomicI32,
    /// Positions that were planned since the last commit and of which some query is not noted: what the ring
    /// has there is of other tokens.
    gap: Mutex<Range<i32>>,
    /// Whether the query of a single token is of no use to anybody: it would be forgotten with its commit.
    skips_steps: AtomicBool,
    /// Whether the memory is given back once all queries are forgotten.
    gives_back: AtomicBool,
}

impl NotedQueries {
    pub(super) fn new(gpu: &Arc<Gpu>, shape: &ModelShape, dtype: DType, window: usize) -> Self {
        Self {
            gpu: gpu.clone(),
            shape: *shape,
            dtype,
            window,
            ring: Mutex::default(),
            begin: AtomicI32::new(0),
            end: AtomicI32::new(0),
            gap: Mutex::default(),
            skips_steps: AtomicBool::new(false),
            gives_back: AtomicBool::new(false),
        }
    }

    /// Everything once more, apart from the original. Queues a copy, if any query counts.
    pub(super) fn fork(&self) -> Result<Self> {
        let counts = self.begin.load(Ordering::Relaxed) < self.end.load(Ordering::Relaxed);
        let ring = self.ring.lock().clone().filter(|_| counts);
        let ring = ring.map(|ring| ring.copy()).transpose()?;
        Ok(Self {
            ring: Mutex::new(ring.map(Arc::new)),
            begin: AtomicI32::new(self.begin.load(Ordering::Relaxed)),
            end: AtomicI32::new(self.end.load(Ordering::Relaxed)),
            skips_steps: AtomicBool::new(self.skips_steps.load(Ordering::Relaxed)),
            gives_back: AtomicBool::new(self.gives_back.load(Ordering::Relaxed)),
            ..Self::new(&self.gpu, &self.shape, self.dtype, self.window)
        })
    }

    /// Where the queries of the `n` tokens before position `end` go, and how many of the last count; `None` if
    /// none does.
    pub(super) fn ring_for(&self, n: usize, end: usize) -> Result<Option<(Arc<QueryRing>, usize)>> {
        let skips = n == 1 && self.skips_steps.load(Ordering::Relaxed);
        // Any of a few drafts may turn out to be the last that counts.
        let newest = match n {
            _ if skips => 0,
            n if n <= MAX_DRAFTS => n,
            n => n.min(self.window),
        };
        if newest < n {
            let (from, to) = ((end - n) as i32, (end - newest) as i32);
            let mut gap = self.gap.lock();
            *gap = if gap.is_empty() { from..to } else { gap.start.min(from)..gap.end.max(to) };
        }
        if newest == 0 {
            return Ok(None);
        }
        let mut ring = self.ring.lock();
        let ring = match &*ring {
            Some(ring) => ring.clone(),
            None => {
                let new = QueryRing::new(&self.gpu, &self.shape, self.dtype, self.window)?;
                ring.insert(Arc::new(new)).clone()
            }
        };
        Ok(Some((ring, newest)))
    }

    /// The last queries of a layer that count. Waits for all queued work.
    pub(super) fn read(&self, layer: usize) -> Result<Vec<Query>> {
        let ring = self.ring.lock().clone();
        let Some(ring) = ring else { return Ok(Vec::new()) };
        let end = self.end.load(Ordering::Relaxed);
        let begin = self.begin.load(Ordering::Relaxed).max(end.saturating_sub(self.window as i32));
        ring.read(layer, begin, end)
    }

    /// Tokens below `limit` are real, and no others are reserved.
    pub(super) fn commit(&self, limit: i32) {
        self.end.store(limit, Ordering::Relaxed);
        self.begin.fetch_min(limit, Ordering::Relaxed);
        let gap = std::mem::take(&mut *self.gap.lock());
        if gap.start < limit {
            self.begin.fetch_max(gap.end.min(limit), Ordering::Relaxed);
        }
        if limit == 0 {
            // What comes is a prompt.
            self.end_prompt(usize::MAX);
        }
    }

    /// What the ring has at positions below `limit` is of other tokens.
    pub(super) fn skip(&self, limit: i32) {
        self.begin.fetch_max(limit, Ordering::Relaxed);
    }

    /// Forgets all but the last `keep` queries.
    pub(super) fn forget(&self, keep: usize) {
        let end = self.end.load(Ordering::Relaxed);
        self.begin.fetch_max(end.saturating_sub(keep as i32), Ordering::Relaxed);
        if keep == 0 && self.gives_back.swap(false, Ordering::Relaxed) {
            *self.ring.lock() = None;
        }
    }

    /// The prompt has ended; steps use the last `window` queries.
    pub(super) fn end_prompt(&self, window: usize) {
        self.skips_steps.store(window == 0, Ordering::Relaxed);
        self.gives_back.store(window == 0, Ordering::Relaxed);
    }
}
