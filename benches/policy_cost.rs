//! What policies cost beside the attention of the same layer: 32 query heads, 8 KV heads, head
//! dimension 128, one layer, f16.
//!
//! * `prompt`: the end of a prompt of 32k tokens (scores, keep sets, compaction) as a part of the
//!   prompt's attention, both on one thread. Attention is run for every 8th piece of 512 tokens and
//!   counts 8 times.
//! * `step`: a decode step (reserve, plan, append, attend, commit) at a steady budget as a multiple of
//!   one of a full cache of the same length, in turn.
//! * `select`: decode attention over 32k tokens under a selection as a part of that over all of them,
//!   in turn.
//!
//! `cargo bench --bench policy_cost [-- prompt|step|select]`; medians, and the least and most of them.

#![expect(unsafe_code, reason = "the clock of the process")]
#![expect(clippy::print_stdout, reason = "a program that prints a table")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmgr::attention::{Attention, Options, write_sequence};
use kvmgr::device::tensor::{Tensor, TensorMut};
use kvmgr::dtype::DType;
use kvmgr::manager::{Manager, ManagerConfig, Session};
use kvmgr::shape::ModelShape;

const SHAPE: ModelShape = ModelShape::new(1, 32, 8, 128);
const PIECE: usize = 512;

fn main() {
    let asked: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let is_test = asked.iter().any(|arg| arg == "--test");
    let wants = |name: &str| is_test || asked.is_empty() || asked.iter().any(|arg| arg == name);
    let size = |full: usize, test: usize| if is_test { test } else { full };
    if wants("prompt") {
        prompt(size(32 << 10, 2 << 10));
    }
    if wants("step") {
        for threads in [1, 2] {
            step(size(4 << 10, 256), size(9, 1), threads);
        }
    }
    if wants("select") {
        for threads in [1, 2] {
            select(size(32 << 10, 4 << 10), size(9, 1), threads);
        }
    }
}

fn noise(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// A cache with one sequence under a policy, and what it takes to run it.
struct Engine {
    manager: Arc<Manager>,
    session: Session,
    attention: Attention,
    threads: usize,
    /// Queries, keys and values of a piece.
    rows: [Vec<f32>; 3],
    output: Vec<f32>,
}

impl Engine {
    fn new(spec: &str, threads: usize, tokens: usize) -> Self {
        let block_size = 32;
        let manager = Manager::new(ManagerConfig {
            shape: SHAPE,
            block_size,
            lane_width: None,
            dtype: DType::F16,
            num_threads: threads,
            num_blocks: 2 * SHAPE.num_kv_heads * (tokens / block_size + 64),
            // As much for all lane widths: the cache takes huge pages or does not by it.
            memory_limit: 8 * tokens * SHAPE.num_kv_heads * SHAPE.head_dim * 4,
            spec: spec.to_string(),
            evictor: "lru".to_string(),
            salt: 0,
            prefix: false,
            rope: None,
            store: None,
            device: None,
            recurrent: None,
        });
        let manager = manager.expect("a valid configuration");
        let session = Session::new(&manager, None).expect("a policy of this cache");
        let attention = Attention::new(manager.cache().clone()).expect("a cache with memory");
        let ModelShape { num_q_heads, num_kv_heads, head_dim, .. } = SHAPE;
        let rows = [num_q_heads, num_kv_heads, num_kv_heads].map(|n| noise(PIECE * n * head_dim));
        let output = vec![0.0; PIECE * num_q_heads * head_dim];
        Self { manager, session, attention, threads, rows, output }
    }

    /// Commits `n` tokens without attention.
    fn fill(&mut self, n: usize) {
        for _ in 0..n / PIECE.min(n) {
            self.reserve(PIECE.min(n));
            self.commit(PIECE.min(n));
        }
    }

    fn reserve(&mut self, n: usize) {
        self.session.sequence_mut().reserve(n).expect("room");
        let shape = [n, SHAPE.num_kv_heads, SHAPE.head_dim];
        let len = shape.iter().product();
        let [_, key, value] = &self.rows;
        let (key, value) = (Tensor::from_slice(&key[..len], shape), &value[..len]);
        let value = Tensor::from_slice(value, shape);
        write_sequence(self.session.sequence(), 0, &key, Some(&value)).expect("reserved rows");
    }

    fn commit(&mut self, n: usize) {
        self.session.commit(n, None).expect("written tokens");
    }

    fn plan(&mut self, n: usize) {
        self.attention.plan(&[(self.session.sequence(), n)]).expect("a sequence of this cache");
    }

    fn attend(&mut self) {
        let n = self.attention.num_tokens();
        let shape = [n, SHAPE.num_q_heads, SHAPE.head_dim];
        let len = shape.iter().product();
        let query = Tensor::from_slice(&self.rows[0][..len], shape);
        let output = TensorMut::from_slice(&mut self.output[..len], shape);
        let run = |worker: usize, workers: usize| {
            self.attention.run(0, &query, &output, None, &Options::default(), worker, workers)
        };
        let done = match self.threads {
            1 => run(0, 1),
            _ => self.manager.run_workers(run),
        };
        done.expect("a current plan");
    }

    fn step(&mut self) {
        self.reserve(1);
        self.plan(1);
        self.attend();
        self.commit(1);
    }
}

/// What `f` takes: processor time of this process if it runs on one thread, which other work on the
/// machine does not lengthen much, else the time that passes.
fn time(threads: usize, f: impl FnOnce()) -> Duration {
    let start = (processor_time(), Instant::now());
    f();
    if threads == 1 { processor_time() - start.0 } else { start.1.elapsed() }
}

fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a clock that exists and a place for its time.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The median of some numbers, the least and the most.
fn middle(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [values[values.len() / 2], values[0], values[values.len() - 1]]
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn prompt(tokens: usize) {
    println!("\n| prompt of {tokens} tokens | attention ms | policy ms | % |");
    println!("| --- | ---: | ---: | ---: |");
    for spec in ["snapkv | keep(0.25)", "keydiff | keep(0.25)"] {
        let mut engine = Engine::new(spec, 1, tokens);
        let mut attention = Duration::ZERO;
        for piece in 0..tokens / PIECE {
            engine.reserve(PIECE);
            if piece % 8 == 7 || tokens / PIECE < 8 {
                engine.plan(PIECE);
                attention += time(1, || engine.attend());
            }
            engine.commit(PIECE);
        }
        let attention = ms(attention) * if tokens / PIECE < 8 { 1.0 } else { 8.0 };
        let runs = (0..3).map(|_| {
            let mut fork = engine.session.fork().expect("nothing is reserved");
            ms(time(1, || fork.end_prefill().expect("an observed prompt")))
        });
        let [policy, ..] = middle(runs.collect());
        let percent = 100.0 * policy / attention;
        println!(
            "| `{}` | {attention:.0} | {policy:.0} | {percent:.2} |",
            spec.replace('|', "\\|")
        );
    }
}

fn step(budget: usize, rounds: usize, threads: usize) {
    const STEPS: usize = 64;
    println!("\n| decode step at {budget} tokens, {threads} threads | ms | of a full cache |");
    println!("| --- | ---: | ---: |");
    let policies = [
        format!("decode: h2o(recent=64) | keep_tokens({budget})"),
        format!("decode: tova | keep_tokens({budget})"),
        format!("decode: every(16) | h2o(recent=64) | keep_tokens({budget})"),
        format!("decode: every(16) | tova | keep_tokens({budget})"),
    ];
    for spec in policies {
        let mut engines =
            ["full", &spec].map(|spec| Engine::new(spec, threads, budget + 2 * STEPS));
        for engine in &mut engines {
            engine.fill(budget);
            engine.session.end_prefill().expect("an observed prompt");
        }
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..=rounds {
            let mut took = [0.0; 2];
            for (engine, took) in engines.iter_mut().zip(&mut took) {
                *took = ms(time(threads, || (0..STEPS).for_each(|_| engine.step()))) / STEPS as f64;
            }
            engines[0].session.sequence_mut().truncate(budget).expect("committed tokens");
            if round > 0 {
                times.iter_mut().zip(took).for_each(|(times, took)| times.push(took));
            }
        }
        let ratios = times[0].iter().zip(&times[1]).map(|(full, policy)| policy / full);
        let [ratio, least, most] = middle(ratios.collect());
        let [[full, ..], [policy, ..]] = times.map(middle);
        let name = spec.replace('|', "\\|");
        println!("| `full` | {full:.3} | |");
        println!("| `{name}` | {policy:.3} | {ratio:.3} ({least:.3} to {most:.3}) |");
    }
}

fn select(tokens: usize, rounds: usize, threads: usize) {
    const RUNS: usize = 8;
    println!("\n| decode attention over {tokens} tokens, {threads} threads | ms | times as fast |");
    println!("| --- | ---: | ---: |");
    let mut full = Engine::new("full", threads, tokens);
    full.fill(tokens);
    for spec in [
        "quest(tokens=2k, dense=0)",
        "shadowkv(tokens=2k)",
        "doublesparsity(tokens=2k, dense=0)",
        "pqcache(tokens=2k)",
    ] {
        let mut engine = Engine::new(spec, threads, tokens);
        engine.fill(tokens);
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..=rounds {
            for (engine, times) in [&mut full, &mut engine].into_iter().zip(&mut times) {
                engine.reserve(1);
                engine.plan(1);
                let took =
                    ms(time(threads, || (0..RUNS).for_each(|_| engine.attend()))) / RUNS as f64;
                engine.commit(0);
                if round > 0 {
                    times.push(took);
                }
            }
        }
        let ratios = times[0].iter().zip(&times[1]).map(|(full, selected)| full / selected);
        let [ratio, least, most] = middle(ratios.collect());
        let [[full, ..], [selected, ..]] = times.map(middle);
        println!("| `full` | {full:.3} | |");
        println!("| `{spec}` | {selected:.3} | {ratio:.2} ({least:.2} to {most:.2}) |");
    }
}
