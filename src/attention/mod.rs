//! Attention over block tables and quantized blocks, on the CPU and on CUDA devices.
//!
//! ```text
//! plan, once a step:   sequences -> snapshot of spans, tasks and their costs
//! append, each layer:  K, V      -> rows of open blocks
//! run, each layer:     Q         -> attend per block format -> merge (o, lse) -> O, LSE
//! ```
//!
//! A task is one KV head of one sequence and a tile of its queries: all query heads of the group
//! go through K and V together, so each row is read and dequantized once for the tile. Tasks write
//! disjoint rows of the output, which is what lets the engine's own threads share the work as
//! `(worker, num_workers)`. With few queries over a long context the rows are split as well, and
//! the last worker to finish a head merges. Outputs do not depend on the number of workers.
//!
//! Sequences that start with the same blocks attend to them together (`cascade`), and merge that with
//! what each has alone. So what is in a batch may change the rounding of a result.
//!
//! A sequence whose policy has a selector chooses for itself which blocks a decode step reads.
//!
//! Row `t` of a lane is visible to query `i` of `n` if `t <= len - n + i` and, with a sliding
//! window, if their distance is below it. Distances are differences of original positions, or of
//! indices inside the cache for sequences that are cache relative.

mod cascade;
mod choose;
mod counts;
mod cpu;
mod cuda;
pub(crate) mod decoded;
mod job;
mod plan;
mod received;
pub mod reference;
mod replay;
pub(crate) mod split;
mod state;
mod tasks;
mod walk;
mod write;

use std::sync::Arc;

pub use cascade::PlanStatistics;
pub(crate) use state::States;
pub use write::write_sequence;

use self::cuda::Cuda;
use self::plan::Plan;
use crate::cache::Cache;
use crate::device::cuda::DeviceTensor;
use crate::device::tensor::{Tensor, TensorMut};
use crate::error::{Result, bail, ensure};
use crate::sequence::Sequence;

/// What a layer does to its logits. The default is plain scaled dot-product attention.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// Factor of `q . k`; 0 for `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Logits become `cap * tanh(logit / cap)`; 0 for off.
    pub softcap: f32,
    /// Keys at this distance or further are invisible; 0 for off.
    pub sliding_window: u32,
    /// Learned logits, `[num_q_heads]`: an extra term of the softmax denominator and of the LSE.
    pub sinks: Option<&'a [f32]>,
    /// Slopes, `[num_q_heads]`: logits lose `slope * distance`.
    pub alibi_slopes: Option<&'a [f32]>,
    /// Every sequence attends for itself, also where several share the first blocks. Equal for all
    /// workers of a run.
    pub no_cascade: bool,
}

/// [`Options`] of a layer on a device.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeviceOptions {
    /// Everything that is not a list.
    pub common: Options<'static>,
    /// The device address of the sinks; 0 for none.
    pub sinks: u64,
}

/// Plans and runs attention for the sequences of one cache.
#[derive(Debug)]
pub struct Attention {
    cache: Arc<Cache>,
    plan: Plan,
    /// Where the cache is on a device.
    cuda: Option<Box<Cuda>>,
}

impl Attention {
    /// An empty plan over `cache`, which must have memory.
    pub fn new(cache: Arc<Cache>) -> Result<Self> {
        ensure!(!cache.formats().is_empty(), Unsupported, "the cache has no memory to attend to");
        let cuda = cache.gpu().map(|gpu| Cuda::new(&cache, gpu)).transpose()?.map(Box::new);
        Ok(Self { cache, plan: Plan::default(), cuda })
    }

    /// Plans one step: sequence `i` contributes its last `num_queries` tokens, reserved ones
    /// included. The only call that allocates, but for the indexes of selectors, which grow in the first
    /// run after a block was sealed. On failure the previous plan is gone.
    pub fn plan(&mut self, batch: &[(&Sequence, usize)]) -> Result<()> {
        self.plan.clear();
        let result = match &mut self.cuda {
            None => self.plan.fill(&self.cache, batch),
            Some(cuda) => self
                .plan
                .fill_for_device(&self.cache, batch)
                .and_then(|()| cuda.plan(&self.cache, batch)),
        };
        if result.is_err() {
            self.plan.clear();
            self.cuda.iter_mut().for_each(|cuda| cuda.clear());
        }
        result
    }

    /// Restricts `layer` of the current plan to blocks, for selected attention such as Quest: head
    /// `h` of sequence `s` attends to `blocks[starts[i]..starts[i + 1]]` with
    /// `i = s * num_kv_heads + h`, ascending indices into the block table of its lane. The blocks
    /// that hold the planned tokens are attended in any case. It holds for the runs of this layer
    /// until the next plan; nobody may run the layer meanwhile. On failure the layer is back to
    /// all blocks. Buffers are reused. On a device it queues one copy.
    pub fn select(&mut self, layer: usize, starts: &[u32], blocks: &[u32]) -> Result<()> {
        self.check(layer, 0, 1)?;
        let result = self.check_lists(starts, blocks);
        let lists = result.map(|()| (&starts[1..], blocks));
        match &mut self.cuda {
            None => self.plan.select(&self.cache, layer, lists),
            Some(cuda) => {
                let num_queries = |i: usize| self.plan.sequences[i].num_queries;
                cuda.select(&self.cache, layer, &num_queries, lists)
            }
        }
    }

    /// Refuses lists that are not one for each head of the plan.
    fn check_lists(&self, starts: &[u32], blocks: &[u32]) -> Result<()> {
        let heads = self.plan.sequences.len() * self.cache.config().shape.num_kv_heads;
        ensure!(
            starts.len() == heads + 1,
            InvalidArgument,
            "starts has {} values, must have {heads} + 1: one for each KV head of each sequence",
            starts.len()
        );
        let (first, last) = (starts[0] as usize, starts[heads] as usize);
        ensure!(first == 0, InvalidArgument, "starts[0] is {first}, must be 0");
        ensure!(
            last == blocks.len(),
            InvalidArgument,
            "starts[{heads}] is {last}, must be the number of blocks, {}",
            blocks.len()
        );
        if let Some(i) = starts.windows(2).position(|pair| pair[0] > pair[1]) {
            let (this, next) = (starts[i], starts[i + 1]);
            bail!(InvalidArgument, "starts[{}] is {next}, below starts[{i}], {this}", i + 1);
        }
        Ok(())
    }

    /// What the current plan shares between sequences; zeros on a device, which shares nothing.
    pub fn statistics(&self) -> PlanStatistics {
        self.plan.cascade.statistics()
    }

    /// Tokens of the planned batch: rows of Q and O.
    pub fn num_tokens(&self) -> usize {
        self.plan.num_tokens
    }

    /// Writes K (`[num_tokens, num_kv_heads, head_dim]`, plan order) and V (the same with `value_dim`, or
    /// none if values are in keys) of the planned tokens into their reserved rows of `layer`. Workers
    /// `0..num_workers` each do a part; the caller waits for all of them before any runs.
    pub fn append(
        &self,
        layer: usize,
        key: &Tensor<'_>,
        value: Option<&Tensor<'_>>,
        worker: usize,
        num_workers: usize,
    ) -> Result<()> {
        self.check(layer, worker, num_workers)?;
        self.ensure_on_host("key")?;
        write::check_rows(&self.cache.config().shape, self.plan.num_tokens, key, value)?;
        self.plan.append(&self.cache, layer, key, value, worker, num_workers)
    }

    /// Attends: `output[i] = softmax(query[i] . K) V` for queries `[num_tokens, num_q_heads, head_dim]`
    /// and outputs `[num_tokens, num_q_heads, value_dim]`, and the log-sum-exp of the logits into `lse`
    /// (`[num_tokens, num_q_heads, 1]`). A query that
    /// sees nothing gets zeros and negative infinity. Workers `0..num_workers` each do a part, in any
    /// order and at once; the caller waits for all of them before it runs another layer. After a
    /// run that some workers did not do, plan again.
    #[expect(clippy::too_many_arguments, reason = "the C function with the same arguments")]
    pub fn run(
        &self,
        layer: usize,
        query: &Tensor<'_>,
        output: &TensorMut<'_>,
        lse: Option<&TensorMut<'_>>,
        options: &Options<'_>,
        worker: usize,
        num_workers: usize,
    ) -> Result<()> {
        self.check(layer, worker, num_workers)?;
        self.ensure_on_host("query")?;
        let shape = &self.cache.config().shape;
        let (tokens, heads) = (self.plan.num_tokens, shape.num_q_heads);
        check_shape("query", query.shape(), [tokens, heads, shape.head_dim])?;
        check_shape("output", output.shape(), [tokens, heads, shape.value_dim()])?;
        if let Some(lse) = lse {
            check_shape("lse", lse.shape(), [tokens, heads, 1])?;
        }
        options.check(heads)?;
        self.plan.check_written(layer, shape.num_kv_heads)?;
        let call = cpu::Call { cache: &self.cache, plan: &self.plan, layer, options };
        call.run(query, output, lse, worker, num_workers);
        Ok(())
    }

    /// [`Self::append`] for a cache on a device: worker 0 queues all of it, the others nothing.
    pub fn append_on_device(
        &self,
        layer: usize,
        key: &DeviceTensor,
        value: &DeviceTensor,
        (worker, num_workers): (usize, usize),
    ) -> Result<()> {
        self.check(layer, worker, num_workers)?;
        let cuda = self.cuda()?;
        if worker == 0 {
            self.plan.check_reserved()?;
            cuda.append(&self.cache, layer, key, value)?;
            self.plan.note_layer(layer, self.cache.config().shape.num_kv_heads);
        }
        Ok(())
    }

    /// [`Self::run`] for a cache on a device: worker 0 queues all of it, the others nothing.
    pub fn run_on_device(
        &self,
        layer: usize,
        query: &DeviceTensor,
        output: &DeviceTensor,
        lse: Option<&DeviceTensor>,
        options: &DeviceOptions,
        (worker, num_workers): (usize, usize),
    ) -> Result<()> {
        self.check(layer, worker, num_workers)?;
        let cuda = self.cuda()?;
        if worker == 0 {
            let shape = &self.cache.config().shape;
            options.common.check(shape.num_q_heads)?;
            self.plan.check_written(layer, shape.num_kv_heads)?;
            cuda.run(&self.cache, layer, query, output, lse, options)?;
        }
        Ok(())
    }

    /// Takes the device memory for every plan of so many sequences, queries, and blocks of a layer. The current
    /// plan is gone, unless the stream is being captured.
    pub fn reserve(
        &mut self,
        num_sequences: usize,
        num_queries: usize,
        num_blocks: usize,
    ) -> Result<()> {
        self.cuda()?.check_not_capturing("reserve")?;
        self.plan.clear();
        match &mut self.cuda {
            Some(cuda) => cuda.reserve(&self.cache, num_sequences, num_queries, num_blocks),
            None => Ok(()),
        }
    }

    /// Equal for two plans of this object if a CUDA graph that was captured under one does the work of
    /// the other.
    pub fn graph_key(&self) -> Result<u64> {
        self.plan.check_current()?;
        Ok(self.cuda()?.graph_key())
    }

    /// Notes that a captured graph has queued the appends of all layers of the plan.
    pub fn graph_launched(&self) -> Result<()> {
        self.plan.check_current()?;
        self.cuda()?;
        self.plan.check_reserved()?;
        let shape = &self.cache.config().shape;
        (0..shape.num_layers).for_each(|layer| self.plan.note_layer(layer, shape.num_kv_heads));
        Ok(())
    }

    fn ensure_on_host(&self, tensor: &str) -> Result<()> {
        ensure!(
            self.cuda.is_none(),
            InvalidArgument,
            "{tensor} is in host memory, the cache is on a CUDA device"
        );
        Ok(())
    }

    fn cuda(&self) -> Result<&Cuda> {
        match &self.cuda {
            Some(cuda) => Ok(cuda),
            None => bail!(Unsupported, "the cache is in host memory, not on a CUDA device"),
        }
    }

    fn check(&self, layer: usize, worker: usize, num_workers: usize) -> Result<()> {
        let layers = self.cache.config().shape.num_layers;
        ensure!(layer < layers, InvalidArgument, "layer is {layer}, the model has {layers}");
        ensure!(
            worker < num_workers,
            InvalidArgument,
            "worker is {worker}, must be below num_workers {num_workers}"
        );
        self.plan.check_current()
    }
}

impl Options<'_> {
    fn check(&self, num_q_heads: usize) -> Result<()> {
        for (name, value) in [("scale", self.scale), ("softcap", self.softcap)] {
            ensure!(
                value.is_finite() && value >= 0.0,
                InvalidArgument,
                "{name} is {value}, must be finite and not negative"
            );
        }
        for (name, list) in [("sinks", self.sinks), ("alibi_slopes", self.alibi_slopes)] {
            if let Some(list) = list {
                ensure!(
                    list.len() == num_q_heads,
                    InvalidArgument,
                    "{name} has {} values, must have one for each of {num_q_heads} query heads",
                    list.len()
                );
            }
        }
        Ok(())
    }

    /// The factor of `q . k` for vectors of `head_dim` elements.
    pub(crate) fn scale_for(&self, head_dim: usize) -> f32 {
        if self.scale == 0.0 { 1.0 / (head_dim as f32).sqrt() } else { self.scale }
    }
}

fn check_shape(name: &str, found: [usize; 3], expected: [usize; 3]) -> Result<()> {
    ensure!(
        found == expected,
        InvalidArgument,
        "{name} has shape {found:?}, must have {expected:?}"
    );
    Ok(())
}
