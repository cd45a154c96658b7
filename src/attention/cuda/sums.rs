//! What queries give the rows that they read, for policies that ask for it: one more pass over the keys of a
//! layer, once the log-sum-exp of its queries is known.

use std::sync::Arc;

use super::table::{Table, lanes_of_table};
use super::workspace::{Capacity, Limits, Workspace};
use crate::cache::Cache;
use crate::device::cuda::params::{Decode, Seen, SeenItem};
use crate::device::cuda::{Gpu, Kernel};
use crate::dtype::DType;
use crate::error::Result;
use crate::sequence::{RowSums, Sequence};

/// Threads of the kernel.
const THREADS: u32 = 128;

/// Rows of an item.
const ROWS: u32 = 1024;

/// What a plan adds up. Buffers are reused.
#[derive(Debug)]
pub(super) struct Sums {
    /// Loaded when a plan needs it.
    kernel: Option<Kernel>,
    /// Of each table; empty if nobody asks.
    items: Vec<Vec<u32>>,
    /// They stay as long as the plan does.
    sums: Vec<Arc<RowSums>>,
    /// Places of a table are its items; partial results are the LSE of queries whose engine does not ask for it.
    workspace: Workspace,
}

impl Sums {
    pub(super) fn new(gpu: &Arc<Gpu>, num_tables: usize) -> Self {
        let workspace = Workspace::new(gpu, num_tables, size_of::<f32>());
        Self { kernel: None, items: Vec::new(), sums: Vec::new(), workspace }
    }

    /// Lists the rows that sequences want to know of, and queues the copy of the lists. The tables are made.
    pub(super) fn plan(
        &mut self,
        gpu: &Arc<Gpu>,
        cache: &Cache,
        batch: &[(&Sequence, usize)],
        tables: &[Table],
        limits: &Limits,
    ) -> Result<()> {
        self.clear();
        let shape = &cache.config().shape;
        let mut token = 0;
        for (i, (sequence, n)) in batch.iter().enumerate() {
            if let Some(observation) = sequence.observation().filter(|_| *n > 0) {
                let heads = 0..shape.num_layers * shape.num_kv_heads;
                let lens: Vec<usize> = heads
                    .map(|i| sequence.locate(i / shape.num_kv_heads, i % shape.num_kv_heads).0)
                    .map(|lane| sequence.lanes()[lane].len())
                    .collect();
                if let Some(sums) = observation.sums_for(&lens)? {
                    self.items.resize_with(tables.len(), Vec::new);
                    for (table, items) in tables.iter().zip(&mut self.items) {
                        push_items(cache, table, (i, token, *n), &sums, items);
                    }
                    self.sums.push(sums);
                }
            }
            token += n;
        }
        if !self.has_any() {
            return Ok(());
        }
        if self.kernel.is_none() {
            self.kernel = Some(load(gpu, cache)?);
        }
        let words = self.items.iter().map(Vec::len).max().unwrap_or(0);
        // Of each block at most one piece, which may begin another part.
        let most = 2 * limits.num_blocks * limits.heads_per_block * SeenItem::WORDS;
        let slots = token.max(limits.num_queries) * shape.num_q_heads;
        let places = words.max(most).div_ceil(2);
        self.workspace.reserve(&Capacity { places, slots, ..Capacity::default() })?;
        self.send()
    }

    /// Nothing is added up.
    pub(super) fn clear(&mut self) {
        self.items.clear();
        self.sums.clear();
    }

    /// Whether somebody asks.
    pub(super) fn has_any(&self) -> bool {
        !self.items.is_empty()
    }

    /// Changes when addresses do.
    pub(super) fn generation(&self) -> u32 {
        self.workspace.generation
    }

    fn send(&mut self) -> Result<()> {
        let (layout, items) = (self.workspace.layout, &self.items);
        self.workspace.write(|words| {
            for (words, items) in words.chunks_exact_mut(layout.words).zip(items) {
                let places = &mut words[layout.places..layout.notes];
                // Items that are not there have no rows.
                places.fill(0);
                places[..items.len()].copy_from_slice(items);
            }
            0
        })
    }

    /// Where queries leave their LSE if the engine does not ask for it.
    pub(super) fn lse(&self) -> u64 {
        self.workspace.partials()
    }

    /// Queues the sums of a layer, whose attention `params` has queued. The context is current.
    pub(super) fn launch(
        &self,
        gpu: &Gpu,
        layer: usize,
        table: usize,
        params: &Decode,
    ) -> Result<()> {
        let Some(kernel) = self.kernel.as_ref().filter(|_| self.has_any()) else { return Ok(()) };
        let layout = &self.workspace.layout;
        let params = Seen {
            q: params.q,
            lse: params.lse,
            pages: params.pages,
            k: params.k,
            items: self.workspace.address(table, layout.places),
            q_token: params.q_token,
            q_head: params.q_head,
            lse_token: params.lse_token,
            kv_block: params.kv_block,
            kv_head: params.kv_head,
            kv_token: params.kv_token,
            scale: params.scale,
            softcap: params.softcap,
            window: params.window,
            num_items: ((layout.notes - layout.places) / SeenItem::WORDS) as u32,
            group: params.group,
            block_size: params.block_size,
            layer: layer as u32,
        };
        gpu.launch(kernel, gpu.num_sms() * kernel.ctas_per_sm, &params)
    }
}

/// Adds the rows of all heads of a table that the `n` queries from `token` on of the `sequence`-th sequence see.
fn push_items(
    cache: &Cache,
    table: &Table,
    (sequence, token, n): (usize, usize, usize),
    sums: &RowSums,
    items: &mut Vec<u32>,
) {
    let heads = cache.config().shape.num_kv_heads;
    let num_lanes = lanes_of_table(cache.config());
    for head in 0..heads {
        let lane = &table.lanes[sequence * num_lanes + head * num_lanes / heads];
        let own = sums.address().wrapping_add((4 * head * sums.rows()) as u64);
        for segment in &table.segments[lane.segments.clone()] {
            let (first, end) = (segment.rows.start, segment.rows.end);
            // The kernel counts rows from the start of the segment's first block.
            let whole = SeenItem {
                sums: own.wrapping_add_signed(4 * segment.shift),
                token: token as u32,
                num_queries: n as u32,
                kv_head: head as u32,
                first_page: segment.first_page,
                len: (lane.len as i64 - segment.shift) as u32,
                first,
                sum_layer: (heads * sums.rows()) as u32,
                ..SeenItem::default()
            };
            for begin in (first / 16 * 16..end).step_by(ROWS as usize) {
                let item = SeenItem { begin, end: end.min(begin + ROWS), ..whole };
                items.extend(item.words());
            }
        }
    }
}

fn load(gpu: &Gpu, cache: &Cache) -> Result<Kernel> {
    let config = cache.config();
    let dtype = config.memory.as_ref().map_or(DType::F16, |memory| memory.open);
    let dim = config.shape.head_dim;
    // Keys, two tiles of queries and what their columns see, as in kernels/obs.cu.
    let shared = if dim == 256 { 384 } else { 512 } * dim + 1536;
    gpu.kernel(&format!("kvm_received_{}_d{dim}", dtype.name()), THREADS, shared as u32)
}
