//! Shared by the integration tests: a seeded generator and small models.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses a part")]

pub mod golden;
pub mod liar;
pub mod weights;

use std::sync::Arc;

use kvmgr::attention::{Attention, Options, reference};
use kvmgr::device::tensor::{Tensor, TensorMut};
use kvmgr::dtype::DType;
use kvmgr::manager::{Manager, ManagerConfig, Session};
use kvmgr::shape::{ModelShape, Rope, RopeStyle};

/// SplitMix64: the same numbers on every machine.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// In `low..=high`.
    pub fn within(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    pub fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    /// About normal, mean 0 and variance 1.
    pub fn normal(&mut self) -> f32 {
        let uniform = |random: &mut Self| (random.next() >> 11) as f64 / (1u64 << 53) as f64;
        (0..12).map(|_| uniform(self)).sum::<f64>() as f32 - 6.0
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

/// A configuration with small defaults.
pub fn config(shape: ModelShape, spec: &str) -> ManagerConfig {
    ManagerConfig {
        shape,
        block_size: 16,
        lane_width: None,
        dtype: DType::F16,
        num_threads: 2,
        num_blocks: 4096,
        memory_limit: 0,
        spec: spec.to_string(),
        evictor: "lru".to_string(),
        salt: 0,
        prefix: false,
        rope: Some(Rope::new(RopeStyle::Half, shape.head_dim, 10_000.0)),
        store: None,
        device: None,
        recurrent: None,
    }
}

/// A cache, its attention, and what a fake engine needs.
pub struct Engine {
    pub manager: Arc<Manager>,
    pub attention: Attention,
    pub random: Random,
    pub num_workers: usize,
}

/// What one layer of one step produced.
pub struct Step {
    pub query: Vec<f32>,
    pub output: Vec<f32>,
    pub lse: Vec<f32>,
}

impl Engine {
    pub fn new(config: ManagerConfig, seed: u64) -> Self {
        let manager = Manager::new(config).unwrap();
        let attention = Attention::new(manager.cache().clone()).unwrap();
        Self { manager, attention, random: Random(seed), num_workers: 1 }
    }

    pub fn shape(&self) -> ModelShape {
        self.manager.cache().config().shape
    }

    pub fn session(&self) -> Session {
        Session::new(&self.manager, None).unwrap()
    }

    /// Reserves `counts[i]` tokens, appends random keys and values, attends; answers each layer.
    pub fn step(&mut self, sessions: &mut [&mut Session], counts: &[usize]) -> Vec<Step> {
        for (session, n) in sessions.iter_mut().zip(counts) {
            session.sequence_mut().reserve(*n).unwrap();
        }
        self.attend(sessions, counts, true)
    }

    /// Attends with random queries for the last tokens; appends them first if `append`.
    pub fn attend(
        &mut self,
        sessions: &[&mut Session],
        counts: &[usize],
        append: bool,
    ) -> Vec<Step> {
        let shape = self.shape();
        let batch: Vec<_> =
            sessions.iter().zip(counts).map(|(session, n)| (session.sequence(), *n)).collect();
        self.attention.plan(&batch).unwrap();
        let total: usize = counts.iter().sum();
        assert_eq!(self.attention.num_tokens(), total);
        (0..shape.num_layers)
            .map(|layer| {
                if append {
                    let rows = total * shape.num_kv_heads;
                    let key = self.random.normals(rows * shape.head_dim);
                    let value = self.random.normals(rows * shape.value_dim());
                    self.append(layer, &key, &value);
                }
                let query = self.random.normals(total * shape.num_q_heads * shape.head_dim);
                self.run(layer, query, &Options::default())
            })
            .collect()
    }

    /// Values that are in keys are left out.
    pub fn append(&self, layer: usize, key: &[f32], value: &[f32]) {
        let shape = self.shape();
        let dims = |dim| [self.attention.num_tokens(), shape.num_kv_heads, dim];
        let key = Tensor::from_slice(key, dims(shape.head_dim));
        let value =
            shape.stores_values().then(|| Tensor::from_slice(value, dims(shape.value_dim())));
        for worker in 0..self.num_workers {
            self.attention.append(layer, &key, value.as_ref(), worker, self.num_workers).unwrap();
        }
    }

    pub fn run(&self, layer: usize, query: Vec<f32>, options: &Options<'_>) -> Step {
        let shape = self.shape();
        let total = self.attention.num_tokens();
        let dims = |dim| [total, shape.num_q_heads, dim];
        // NaN shows rows that no worker has written.
        let mut output = vec![f32::NAN; total * shape.num_q_heads * shape.value_dim()];
        let mut lse = vec![f32::NAN; total * shape.num_q_heads];
        {
            let query = Tensor::from_slice(&query, dims(shape.head_dim));
            let output = TensorMut::from_slice(&mut output, dims(shape.value_dim()));
            let lse = TensorMut::from_slice(&mut lse, [total, shape.num_q_heads, 1]);
            for worker in 0..self.num_workers {
                let lse = Some(&lse);
                self.attention
                    .run(layer, &query, &output, lse, options, worker, self.num_workers)
                    .unwrap();
            }
        }
        Step { query, output, lse }
    }
}

/// The relative error that outputs may have. Rows of integers meet queries and weights of 16 bits.
pub fn tolerance(engine: &Engine) -> f64 {
    if engine.manager.cache().formats().len() > 1 { 5e-4 } else { 1e-4 }
}

/// `||a - b|| / ||b||`.
pub fn relative_error(a: &[f32], b: &[f64]) -> f64 {
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    let norm: f64 = b.iter().map(|b| b * b).sum();
    difference.sqrt() / norm.sqrt().max(1e-9)
}

/// Compares every query of a step with the reference.
pub fn check(
    engine: &Engine,
    sessions: &[&mut Session],
    counts: &[usize],
    steps: &[Step],
    options: &Options<'_>,
) {
    let tolerance = tolerance(engine);
    let shape = engine.shape();
    for (layer, step) in steps.iter().enumerate() {
        let mut token = 0;
        for (session, n) in sessions.iter().zip(counts) {
            for i in 0..*n {
                for head in 0..shape.num_q_heads {
                    let row = (token + i) * shape.num_q_heads + head;
                    let query = &step.query[row * shape.head_dim..][..shape.head_dim];
                    let expected =
                        reference::attend(session.sequence(), layer, head, query, (i, *n), options);
                    let output = &step.output[row * shape.value_dim()..][..shape.value_dim()];
                    let error = relative_error(output, &expected.output);
                    assert!(error < tolerance, "layer {layer} token {i}/{n} head {head}: {error}");
                    let lse = f64::from(step.lse[row]);
                    assert!(
                        lse == expected.lse || (lse - expected.lse).abs() < tolerance * 10.0,
                        "layer {layer} token {i}/{n} head {head}: lse {lse} {}",
                        expected.lse
                    );
                }
            }
            token += n;
        }
    }
}

/// Prompts and steps of a session, each compared with the reference; then it goes on without its last two
/// tokens beside a fork, with so many tokens each.
pub fn walk(engine: &mut Engine, session: &mut Session, counts: &[usize], last: [usize; 2]) {
    for n in counts.iter().copied() {
        let steps = engine.step(&mut [session], &[n]);
        check(engine, &[session], &[n], &steps, &Options::default());
        session.commit(n, None).unwrap();
        session.end_prefill().unwrap();
    }
    let mut fork = session.fork().unwrap();
    let tokens = session.sequence().num_tokens();
    session.sequence_mut().truncate(tokens - 2).unwrap();
    let steps = engine.step(&mut [session, &mut fork], &last);
    check(engine, &[session, &mut fork], &last, &steps, &Options::default());
    engine.manager.cache().check_integrity();
}
