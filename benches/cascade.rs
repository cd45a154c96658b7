//! Decode of sequences that share a prefix, with the cascade on and off, alternating: 32 query heads,
//! 8 KV heads, head dimension 128, one query each, four layers in turn.
//!
//! ```text
//! cargo bench --bench cascade                 # 16 sequences, 8192 shared and 64 own tokens
//! cargo bench --bench cascade -- 4 1024 64    # sequences, shared tokens, own tokens
//! ```
//!
//! A row of the table has medians over all rounds and the median of the ratios of neighbouring runs.

#![expect(clippy::print_stdout, reason = "a program that prints a table")]

use std::sync::Arc;
use std::time::Instant;

use kvmgr::attention::{Attention, Options, write_sequence};
use kvmgr::cache::{Cache, CacheConfig, MemoryFormats};
use kvmgr::device::tensor::{Tensor, TensorMut};
use kvmgr::dtype::DType;
use kvmgr::sequence::{Sequence, SequenceConfig};
use kvmgr::shape::ModelShape;

const SHAPE: ModelShape = ModelShape::new(4, 32, 8, 128);
const BLOCK_SIZE: usize = 32;
const SPECS: [&str; 3] = ["f16", "q8_0", "q4_0"];
const ROUNDS: usize = 12;

fn noise(n: usize) -> Vec<f32> {
    let mut state = n as u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// What is measured.
#[derive(Clone, Copy)]
struct Batch {
    sequences: usize,
    shared: usize,
    own: usize,
}

struct Setup {
    /// Plans refer to them.
    _sequences: Vec<Sequence>,
    attention: Attention,
    query: Vec<f32>,
    output: Vec<f32>,
}

fn write(sequence: &mut Sequence, n: usize) {
    let shape = [n, SHAPE.num_kv_heads, SHAPE.head_dim];
    let rows = noise(shape.iter().product());
    let rows = Tensor::from_slice(&rows, shape);
    sequence.reserve(n).expect("room");
    for layer in 0..SHAPE.num_layers {
        write_sequence(sequence, layer, &rows, Some(&rows)).expect("reserved rows");
    }
}

impl Setup {
    fn new(spec: &str, batch: Batch) -> Self {
        let Batch { sequences: count, shared, own } = batch;
        let blocks = shared.div_ceil(BLOCK_SIZE) + count * ((own + 1).div_ceil(BLOCK_SIZE) + 1);
        let cache = Cache::new(CacheConfig {
            memory: Some(MemoryFormats::new(DType::F16, spec, spec)),
            ..CacheConfig::new(SHAPE, BLOCK_SIZE, blocks + 1)
        });
        let cache = cache.expect("a valid configuration");
        let leader = Sequence::new(Arc::clone(&cache), SequenceConfig::default(), None);
        let mut leader = leader.expect("no states are needed");
        write(&mut leader, shared);
        leader.commit(shared, None).expect("written tokens");
        let fork = |_| {
            let mut sequence = leader.fork().expect("nothing reserved");
            write(&mut sequence, own);
            sequence.commit(own, None).expect("written tokens");
            write(&mut sequence, 1);
            sequence
        };
        let sequences: Vec<_> = (0..count).map(fork).collect();
        let mut attention = Attention::new(cache).expect("a cache with memory");
        let planned: Vec<_> = sequences.iter().map(|sequence| (sequence, 1)).collect();
        attention.plan(&planned).expect("sequences of this cache");
        let query = noise(count * SHAPE.num_q_heads * SHAPE.head_dim);
        let output = vec![0.0; query.len()];
        Self { _sequences: sequences, attention, query, output }
    }

    /// Milliseconds for a layer.
    fn run(&mut self, layer: usize, threads: usize, no_cascade: bool) -> f64 {
        let shape = [self.attention.num_tokens(), SHAPE.num_q_heads, SHAPE.head_dim];
        let query = Tensor::from_slice(&self.query, shape);
        let output = TensorMut::from_slice(&mut self.output, shape);
        let options = Options { no_cascade, ..Options::default() };
        let part = |worker| {
            let result =
                self.attention.run(layer, &query, &output, None, &options, worker, threads);
            result.expect("a current plan");
        };
        let start = Instant::now();
        rayon::scope(|scope| {
            (1..threads).for_each(|worker| {
                let part = &part;
                scope.spawn(move |_| part(worker));
            });
            part(0);
        });
        start.elapsed().as_secs_f64() * 1e3
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let numbers: Vec<usize> = std::env::args().filter_map(|x| x.parse().ok()).collect();
    let [sequences, shared, own] = numbers.try_into().unwrap_or([16, 8192, 64]);
    let batch = Batch { sequences, shared, own };
    // Multiply-adds of the shared part.
    let work = 2 * shared * sequences * SHAPE.num_q_heads * SHAPE.head_dim;
    println!("{sequences} sequences, {shared} shared and {own} own tokens");
    println!("| format | threads | off, ms | on, ms | ratio | on, GMAC/s |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for spec in SPECS {
        let mut setup = Setup::new(spec, batch);
        for threads in [1, 2] {
            let (mut on, mut off, mut ratios) = (vec![], vec![], vec![]);
            for round in 0..ROUNDS + 1 {
                let layer = round % SHAPE.num_layers;
                let (without, with) =
                    (setup.run(layer, threads, true), setup.run(layer, threads, false));
                if round > 0 {
                    off.push(without);
                    on.push(with);
                    ratios.push(without / with);
                }
            }
            let (off, on, ratio) = (median(&mut off), median(&mut on), median(&mut ratios));
            let rate = work as f64 / on / 1e6;
            println!("| {spec} | {threads} | {off:.2} | {on:.2} | {ratio:.2} | {rate:.0} |");
        }
        assert!(setup.attention.statistics().shared_tasks_run > 0, "the cascade was taken");
    }
}
