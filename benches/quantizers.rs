//! Encode of every registered quantizer, in bytes of the f32 rows; decode, dot and axpy, in bytes of
//! the encoded cells.
//!
//! `dot` and `axpy` serve the query heads of one KV head: 4, or 1 where the name says so. `resident`
//! stays in the caches and shows the arithmetic. `streamed` walks over a buffer larger than any
//! cache, as attention does; a token costs different formats different bytes, so compare its times.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use kvmgr::quantizer::{Cell, QUANTIZERS, Quantizer, Side, create};

const TOKENS: usize = 64;
const DIM: usize = 128;
/// Streamed cells: a million rows of 256 bytes in f16.
const CELLS: usize = 16384;

fn rows() -> Vec<f32> {
    (0..TOKENS * DIM).map(|i| ((i * 7919) % 1009) as f32 / 500.0 - 1.0).collect()
}

fn encoded(quantizer: &dyn Quantizer) -> Vec<u8> {
    let mut bytes = vec![0; quantizer.bytes(TOKENS, DIM)];
    quantizer.encode(&rows(), DIM, &mut bytes);
    bytes
}

fn cell(bytes: &[u8]) -> Cell<'_> {
    Cell { bytes, tokens: TOKENS, dim: DIM, rows: 0..TOKENS }
}

fn specs() -> impl Iterator<Item = &'static &'static str> {
    QUANTIZERS.iter().flat_map(|entry| entry.examples)
}

fn resident(c: &mut Criterion) {
    for spec in specs() {
        let mut group = c.benchmark_group(format!("resident/{spec}"));
        group.warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(400));
        for side in [Side::Key, Side::Value] {
            let quantizer = create(spec, side).expect("an example of the registry");
            let (rows, mut bytes) = (rows(), encoded(&*quantizer));
            let mut values = vec![0.0; TOKENS * DIM];
            group.throughput(Throughput::Bytes(size_of_val(&rows[..]) as u64));
            group.bench_function(format!("encode/{side:?}"), |b| {
                b.iter(|| quantizer.encode(black_box(&rows), DIM, &mut bytes));
            });
            group.throughput(Throughput::Bytes(bytes.len() as u64));
            group.bench_function(format!("decode/{side:?}"), |b| {
                b.iter(|| quantizer.decode(black_box(&cell(&bytes)), &mut values));
            });
            for heads in [1, 4] {
                read(&mut group, &*quantizer, side, heads, &bytes);
            }
        }
        group.finish();
    }
}

fn streamed(c: &mut Criterion) {
    for spec in specs() {
        let mut group = c.benchmark_group(format!("streamed/{spec}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(200));
        group.measurement_time(Duration::from_secs(1));
        for side in [Side::Key, Side::Value] {
            let quantizer = create(spec, side).expect("an example of the registry");
            let bytes = encoded(&*quantizer).repeat(CELLS);
            group.throughput(Throughput::Bytes(bytes.len() as u64));
            for heads in [1, 4] {
                read(&mut group, &*quantizer, side, heads, &bytes);
            }
        }
        group.finish();
    }
}

/// Keys score and values accumulate, over all cells in `bytes`.
fn read(
    group: &mut BenchmarkGroup<'_, WallTime>,
    quantizer: &dyn Quantizer,
    side: Side,
    heads: usize,
    bytes: &[u8],
) {
    let cells = bytes.chunks_exact(quantizer.bytes(TOKENS, DIM));
    let (mut wide, mut narrow) = (rows(), vec![1e-3; heads * TOKENS]);
    let wide = &mut wide[..heads * DIM];
    match side {
        Side::Key => group.bench_function(format!("dot/{heads}"), |b| {
            b.iter(|| {
                let (queries, scores) = (black_box(&*wide), black_box(&mut narrow));
                cells.clone().for_each(|bytes| quantizer.dot(&cell(bytes), queries, scores));
            });
        }),
        Side::Value => group.bench_function(format!("axpy/{heads}"), |b| {
            b.iter(|| {
                let (weights, outputs) = (black_box(&narrow), black_box(&mut *wide));
                cells.clone().for_each(|bytes| quantizer.axpy(&cell(bytes), weights, outputs));
            });
        }),
    };
}

criterion_group!(benches, resident, streamed);
criterion_main!(benches);
