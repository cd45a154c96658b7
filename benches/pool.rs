//! The pool, and append with sealing: the costs of bookkeeping and of encoding a token.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use kvmgr::attention::write_sequence;
use kvmgr::cache::{Cache, CacheConfig, MemoryFormats};
use kvmgr::device::tensor::Tensor;
use kvmgr::dtype::DType;
use kvmgr::sequence::{Sequence, SequenceConfig};
use kvmgr::shape::ModelShape;

fn cache(shape: ModelShape, formats: Option<(&str, &str)>, prefix: bool) -> Arc<Cache> {
    let memory = formats.map(|(key, value)| MemoryFormats::new(DType::F16, key, value));
    let block_size = if formats.is_some() { 32 } else { 16 };
    let config = CacheConfig { memory, prefix, ..CacheConfig::new(shape, block_size, 20_000) };
    Cache::new(config).expect("a valid configuration")
}

fn sequence(cache: &Arc<Cache>) -> Sequence {
    Sequence::new(cache.clone(), SequenceConfig::default(), None).expect("no states are needed")
}

fn extend(sequence: &mut Sequence, tokens: &[i32]) {
    sequence.reserve(tokens.len()).expect("enough blocks");
    sequence.commit(tokens.len(), Some(tokens)).expect("reserved");
}

/// One sequence of a pool: decode, fork, prefix match.
fn pool(criterion: &mut Criterion) {
    let shape = ModelShape::new(1, 1, 1, 1);
    let pool = cache(shape, None, true);
    let prompt: Vec<i32> = (0..2049).collect();
    let mut parent = sequence(&pool);
    extend(&mut parent, &prompt);

    let mut group = criterion.benchmark_group("pool");
    group.throughput(Throughput::Elements(1024));
    group.bench_function("decode 1024 tokens", |bencher| {
        bencher.iter_batched_ref(
            || sequence(&pool),
            |sequence| (0..1024).for_each(|token| extend(sequence, &[token + 1_000_000])),
            BatchSize::PerIteration,
        );
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("fork 2049 tokens", |bencher| {
        bencher.iter(|| black_box(parent.fork().expect("nothing reserved")));
    });
    group.bench_function("match 128 blocks", |bencher| {
        bencher.iter_batched_ref(
            || sequence(&pool),
            |sequence| assert_eq!(sequence.match_prefix(&prompt).expect("empty"), 2048),
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

/// Append, commit and seal 32 tokens of 8 KV heads of 128 elements.
fn append_and_seal(criterion: &mut Criterion) {
    let shape = ModelShape::new(1, 8, 8, 128);
    let rows: Vec<f32> = (0..32 * 8 * 128).map(|i| (i as f32 * 0.37).sin()).collect();
    let tensor = Tensor::from_slice(&rows, [32, 8, 128]);
    let mut group = criterion.benchmark_group("append and seal");
    group.throughput(Throughput::Bytes(2 * 2 * rows.len() as u64));
    for (key, value) in [("f16", "f16"), ("q8_0", "q8_0"), ("had+q4_0", "q4_0"), ("kivi2", "kivi2")]
    {
        let cache = cache(shape, Some((key, value)), false);
        group.bench_function(format!("{key} / {value}"), |bencher| {
            bencher.iter_batched_ref(
                || sequence(&cache),
                |sequence| {
                    sequence.reserve(32).expect("enough blocks");
                    write_sequence(sequence, 0, &tensor, Some(&tensor)).expect("reserved");
                    sequence.commit(32, None).expect("written");
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, pool, append_and_seal);
criterion_main!(benches);
