//! Attention on one thread: 32 query heads, 8 KV heads, head dimension 128.
//!
//! * `read`: the bytes of one layer in f16, only added up: what the memory of this machine gives.
//! * `decode`: one query over 4096 cached tokens; the throughput is bytes of K and V.
//! * `prefill`: 256 queries over 2048 tokens, the last 256 of which are their own; an element is
//!   a multiply-add.
//!
//! Decode walks over four layers, so that f16 rows do not stay in a cache.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvmgr::attention::{Attention, Options, write_sequence};
use kvmgr::cache::{Cache, CacheConfig, MemoryFormats};
use kvmgr::device::tensor::{Tensor, TensorMut};
use kvmgr::dtype::DType;
use kvmgr::sequence::{Sequence, SequenceConfig};
use kvmgr::shape::ModelShape;

const SHAPE: ModelShape = ModelShape::new(4, 32, 8, 128);
const BLOCK_SIZE: usize = 32;
const SPECS: [(&str, &str); 6] = [
    ("f16", "f16"),
    ("f32", "f32"),
    ("q8_0", "q8_0"),
    ("q4_0", "q4_0"),
    ("had+q4_0", "q4_0"),
    ("kivi(bits=2)", "kivi(bits=2)"),
];

fn noise(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// A sequence of `committed` tokens in blocks of a format, and `reserved` more.
struct Setup {
    sequence: Sequence,
    attention: Attention,
    query: Vec<f32>,
    output: Vec<f32>,
}

impl Setup {
    fn new((key, value): (&str, &str), committed: usize, reserved: usize) -> Self {
        let open = if key == "f32" { DType::F32 } else { DType::F16 };
        let cache = Cache::new(CacheConfig {
            memory: Some(MemoryFormats::new(open, key, value)),
            ..CacheConfig::new(SHAPE, BLOCK_SIZE, (committed + reserved).div_ceil(BLOCK_SIZE) + 1)
        });
        let cache = cache.expect("a valid configuration");
        let sequence = Sequence::new(Arc::clone(&cache), SequenceConfig::default(), None);
        let mut sequence = sequence.expect("no states are needed");
        let mut write = |n: usize| {
            let shape = [n, SHAPE.num_kv_heads, SHAPE.head_dim];
            let rows = noise(shape.iter().product());
            let rows = Tensor::from_slice(&rows, shape);
            sequence.reserve(n).expect("room");
            for layer in 0..SHAPE.num_layers {
                write_sequence(&sequence, layer, &rows, Some(&rows)).expect("reserved rows");
            }
        };
        write(committed);
        sequence.commit(committed, None).expect("written tokens");
        let mut attention = Attention::new(cache).expect("a cache with memory");
        sequence.reserve(reserved).expect("room");
        attention.plan(&[(&sequence, reserved)]).expect("a sequence of this cache");
        let shape = [reserved, SHAPE.num_kv_heads, SHAPE.head_dim];
        let rows = noise(shape.iter().product());
        let rows = Tensor::from_slice(&rows, shape);
        for layer in 0..SHAPE.num_layers {
            attention.append(layer, &rows, Some(&rows), 0, 1).expect("reserved rows");
        }
        let query = noise(reserved * SHAPE.num_q_heads * SHAPE.head_dim);
        let output = vec![0.0; query.len()];
        Self { sequence, attention, query, output }
    }

    fn run(&mut self, layer: usize) {
        let shape = [self.attention.num_tokens(), SHAPE.num_q_heads, SHAPE.head_dim];
        let query = Tensor::from_slice(&self.query, shape);
        let output = TensorMut::from_slice(&mut self.output, shape);
        self.attention
            .run(layer, &query, &output, None, &Options::default(), 0, 1)
            .expect("a current plan");
    }

    /// Bytes of K and V in one layer.
    fn layer_bytes(&self) -> u64 {
        (self.sequence.bytes() / SHAPE.num_layers) as u64
    }
}

fn read(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention/read");
    let bytes = 4096 * SHAPE.num_kv_heads * SHAPE.head_dim * 2 * 2;
    let data: Vec<u64> = (0..(SHAPE.num_layers * bytes / 8) as u64).collect();
    let mut layer = 0;
    group.throughput(Throughput::Bytes(bytes as u64));
    group.bench_function("f16 bytes", |bencher| {
        bencher.iter(|| {
            layer = (layer + 1) % SHAPE.num_layers;
            let part = &data[layer * bytes / 8..][..bytes / 8];
            black_box(part.iter().fold(0u64, |sum, x| sum.wrapping_add(*x)))
        });
    });
}

fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention/decode");
    group.sample_size(10).warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_secs(1));
    for spec in SPECS {
        let mut setup = Setup::new(spec, 4095, 1);
        let mut layer = 0;
        group.throughput(Throughput::Bytes(setup.layer_bytes()));
        group.bench_function(format!("{} {}", spec.0, spec.1), |bencher| {
            bencher.iter(|| {
                layer = (layer + 1) % SHAPE.num_layers;
                setup.run(layer);
            });
        });
    }
}

fn prefill(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention/prefill");
    group.sample_size(10).warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_secs(2));
    let (tokens, queries) = (2048usize, 256usize);
    for spec in SPECS {
        let mut setup = Setup::new(spec, tokens - queries, queries);
        let pairs: usize = (1..=queries).map(|i| tokens - queries + i).sum();
        let multiply_adds = pairs * SHAPE.num_q_heads * SHAPE.head_dim * 2;
        group.throughput(Throughput::Elements(multiply_adds as u64));
        group.bench_function(format!("{} {}", spec.0, spec.1), |bencher| {
            bencher.iter(|| setup.run(0));
        });
    }
}

criterion_group!(benches, read, decode, prefill);
criterion_main!(benches);
