//! Time of a policy for one layer: 8 KV heads, group 4, head dimension 128.
//!
//! `score` is the score alone, `select` the whole way to keep sets. Every example of every score and
//! budget runs, so a new stage has its row without being named here.

#[path = "../tests/common/weights.rs"]
#[expect(unreachable_pub, reason = "shared with the tests")]
mod weights;

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvmgr::error::Result;
use kvmgr::policy::{
    Event, HeadInput, LayerInput, LayerSource, OutputProjection, Pipeline, STAGES, StageClass,
    StageInfo,
};
use kvmgr::shape::{Rope, RopeStyle};

const HEADS: usize = 8;
const GROUP: usize = 4;
const DIM: usize = 128;
const WINDOW: usize = 64;
const HIDDEN: usize = 256;

/// One layer of random observations, the same for each head.
struct Layer {
    positions: Vec<i32>,
    rows: Vec<f32>,
    queries: Vec<f32>,
    column_sums: Vec<f32>,
    query_covariance: Vec<f32>,
    rope: Rope,
}

impl Layer {
    fn new(len: usize) -> Self {
        let mut state = 1u64;
        let mut noise = |n: usize| -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            };
            (0..n).map(|_| next()).collect()
        };
        Self {
            positions: (0..len as i32).collect(),
            rows: noise(HEADS * len * DIM),
            queries: noise(HEADS * GROUP * WINDOW * DIM),
            column_sums: noise(HEADS * len),
            query_covariance: noise(GROUP * DIM * DIM),
            rope: Rope::new(RopeStyle::Half, DIM, 1e4),
        }
    }

    fn input(&self) -> LayerInput<'_> {
        let len = self.positions.len();
        let head = |h: usize| HeadInput {
            positions: &self.positions,
            keys: &self.rows[h * len * DIM..][..len * DIM],
            values: &self.rows[h * len * DIM..][..len * DIM],
            queries: &self.queries[h * GROUP * WINDOW * DIM..][..GROUP * WINDOW * DIM],
            num_queries: WINDOW,
            column_sums: &self.column_sums[h * len..][..len],
            query_mean: &self.rows[..GROUP * DIM],
            query_covariance: &self.query_covariance,
            gate_scores: &self.column_sums[h * len..][..len],
            replay_maxima: &self.rows[..GROUP * len],
            last_row: &[],
            low_counts: &self.column_sums[h * len..][..len],
        };
        LayerInput {
            layer: 0,
            num_layers: 1,
            group: GROUP,
            head_dim: DIM,
            value_dim: DIM,
            sequence_len: len,
            heads: (0..HEADS).map(head).collect(),
            rope: Some(&self.rope),
            output_projection: Some(OutputProjection {
                weights: &self.rows[..HIDDEN * HEADS * GROUP * DIM],
                width: HEADS * GROUP * DIM,
            }),
            attention_cosine: Some(0.5),
        }
    }
}

impl LayerSource for &Layer {
    fn num_layers(&self) -> usize {
        1
    }

    fn visit(&mut self, _: usize, f: &mut dyn FnMut(&LayerInput<'_>) -> Result<()>) -> Result<()> {
        f(&self.input())
    }
}

fn policies(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("policy");
    group.sample_size(10).warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_secs(1));
    let is_family = |stage: &&StageInfo| {
        matches!(
            stage.class,
            StageClass::Score | StageClass::Map | StageClass::Budget | StageClass::Act
        )
    };
    let file = weights::write(weights::Shape {
        layers: 1,
        heads: HEADS,
        group: GROUP,
        dim: DIM,
        hidden: HIDDEN,
    });
    for len in [2048, 8192] {
        let layer = Layer::new(len);
        group.throughput(Throughput::Elements((HEADS * len) as u64));
        for spec in STAGES.iter().filter(is_family).flat_map(|stage| stage.examples) {
            let pipeline = Pipeline::parse(&weights::with_file(spec, file.path()));
            let pipeline = pipeline.expect("examples parse");
            let events = [Event::PrefillEnd, Event::Step];
            let Some(event) = events.into_iter().find(|event| pipeline.acts_on(*event)) else {
                continue;
            };
            group.bench_function(format!("score/{len}/{spec}"), |bencher| {
                bencher.iter(|| black_box(pipeline.score(event, &layer.input()).expect("fits")));
            });
            group.bench_function(format!("select/{len}/{spec}"), |bencher| {
                bencher.iter(|| black_box(pipeline.select(event, &mut &layer).expect("fits")));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, policies);
criterion_main!(benches);
