//! What attention hands to policies, against probabilities of the reference.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::sync::Arc;

use common::{Engine, Random, config, relative_error};
use kvmgr::attention::{Attention, Options, reference};
use kvmgr::cache::Cache;
use kvmgr::device::tensor::{Tensor, TensorMut};
use kvmgr::manager::Manager;
use kvmgr::sequence::{Observation, Sequence, SequenceConfig};
use kvmgr::shape::{KeepSet, LaneWidth, ModelShape, Needs, Rope, RopeStyle};

const WINDOW: usize = 5;

/// A sequence with an observation, and what it should have seen.
struct Watched {
    sequence: Sequence,
    attention: Attention,
    random: Random,
    shape: ModelShape,
    /// For each head, sums over the rows of its lane.
    sums: Vec<Vec<f64>>,
    /// For each head, the position and the group of each query so far.
    queries: Vec<Vec<(usize, Vec<f32>)>>,
    /// For each head, what the last query gave the rows of its lane.
    last: Vec<Vec<f64>>,
    /// Whether steps note what they should have made the sequence see.
    is_checked: bool,
}

impl Watched {
    fn new(cache: &Arc<Cache>, needs: Needs, seed: u64) -> Self {
        let shape = cache.config().shape;
        let observation = Some(Arc::new(Observation::new(&shape, needs, WINDOW)));
        let heads = shape.num_layers * shape.num_kv_heads;
        Self {
            sequence: Sequence::new(cache.clone(), SequenceConfig::default(), observation).unwrap(),
            attention: Attention::new(cache.clone()).unwrap(),
            random: Random(seed),
            shape,
            sums: vec![Vec::new(); heads],
            queries: vec![Vec::new(); heads],
            last: vec![Vec::new(); heads],
            is_checked: true,
        }
    }

    /// Appends and attends with `workers` threads, and notes what must have been observed.
    fn step(&mut self, n: usize, options: &Options<'_>, workers: usize) {
        self.draft(n, n, options, workers);
    }

    /// The same, but only the first `accepted` of the tokens are committed.
    fn draft(&mut self, n: usize, accepted: usize, options: &Options<'_>, workers: usize) {
        let ModelShape { num_layers, num_q_heads, num_kv_heads, head_dim, .. } = self.shape;
        self.sequence.reserve(n).unwrap();
        self.attention.plan(&[(&self.sequence, n)]).unwrap();
        for layer in 0..num_layers {
            let rows = self.random.normals(n * num_kv_heads * head_dim);
            let rows = Tensor::from_slice(&rows, [n, num_kv_heads, head_dim]);
            self.attention.append(layer, &rows, Some(&rows), 0, 1).unwrap();
            let query = self.random.normals(n * num_q_heads * head_dim);
            let mut output = vec![0.0; query.len()];
            let dims = [n, num_q_heads, head_dim];
            let (tensor, out) =
                (Tensor::from_slice(&query, dims), TensorMut::from_slice(&mut output, dims));
            std::thread::scope(|scope| {
                for worker in 0..workers {
                    let (attention, tensor, out) = (&self.attention, &tensor, &out);
                    scope.spawn(move || {
                        attention.run(layer, tensor, out, None, options, worker, workers).unwrap();
                    });
                }
            });
            if self.is_checked {
                self.expect(layer, (n, accepted), &query, options);
            }
        }
        self.sequence.commit(accepted, None).unwrap();
        for (head, planes) in self.sums.iter_mut().zip(&mut self.last).enumerate() {
            let (layer, head) = (head / num_kv_heads, head % num_kv_heads);
            let len = self.sequence.lanes()[self.sequence.locate(layer, head).0].len();
            planes.0.truncate(len);
            planes.1.truncate(len);
        }
    }

    fn expect(
        &mut self,
        layer: usize,
        (n, accepted): (usize, usize),
        query: &[f32],
        options: &Options<'_>,
    ) {
        let ModelShape { num_q_heads, num_kv_heads, head_dim, .. } = self.shape;
        let (group, committed) = (self.shape.group(), self.sequence.num_tokens());
        let needs = self.sequence.observation().unwrap().needs();
        let needs_sums = needs.contains(Needs::COLUMN_SUM);
        for i in 0..accepted {
            for q_head in 0..num_q_heads {
                let row = &query[(i * num_q_heads + q_head) * head_dim..][..head_dim];
                let head = layer * num_kv_heads + q_head / group;
                if needs_sums {
                    let seen =
                        reference::attend(&self.sequence, layer, q_head, row, (i, n), options);
                    let sums = &mut self.sums[head];
                    sums.resize(seen.probabilities.len(), 0.0);
                    sums.iter_mut().zip(&seen.probabilities).for_each(|(sum, p)| *sum += p);
                    let last = &mut self.last[head];
                    if q_head % group == 0 {
                        last.clear();
                    }
                    last.resize(seen.probabilities.len(), 0.0);
                    last.iter_mut().zip(&seen.probabilities).for_each(|(sum, p)| *sum += p);
                }
                if q_head % group == 0 {
                    self.queries[head].push((committed + i, Vec::new()));
                }
                self.queries[head].last_mut().unwrap().1.extend_from_slice(row);
            }
        }
    }

    fn check_sums(&self) {
        for (head, expected) in self.sums.iter().enumerate() {
            let observation = self.sequence.observation().unwrap();
            let heads = self.shape.num_kv_heads;
            let seen = observation.head(head / heads, head % heads).lock();
            assert_eq!(seen.received.sums.len(), expected.len());
            for (row, (sum, expected)) in seen.received.sums.iter().zip(expected).enumerate() {
                let error = (f64::from(*sum) - expected).abs();
                assert!(error < 1e-4 * (1.0 + expected), "row {row}: {sum} {expected}");
            }
        }
    }

    fn check_last(&self) {
        for (head, expected) in self.last.iter().enumerate() {
            let observation = self.sequence.observation().unwrap();
            let heads = self.shape.num_kv_heads;
            let seen = observation.head(head / heads, head % heads).lock();
            let found = seen.received.last();
            assert_eq!(found.len(), expected.len());
            for (row, (p, expected)) in found.iter().zip(expected).enumerate() {
                assert!((f64::from(*p) - expected).abs() < 1e-4, "row {row}: {p} {expected}");
            }
        }
    }

    fn check_queries(&self) {
        let (group, dim) = (self.shape.group(), self.shape.head_dim);
        for (head, all) in self.queries.iter().enumerate() {
            let observation = self.sequence.observation().unwrap();
            let heads = self.shape.num_kv_heads;
            let seen = observation.head(head / heads, head % heads).lock();
            let expected = &all[all.len().saturating_sub(WINDOW)..];
            assert_eq!(seen.num_queries(), expected.len());
            let mut found = Vec::new();
            seen.queries_by_head(group, dim, &mut found);
            let by_head: Vec<f32> = (0..group)
                .flat_map(|g| expected.iter().flat_map(move |(_, q)| &q[g * dim..(g + 1) * dim]))
                .copied()
                .collect();
            assert_eq!(found, by_head);
        }
    }
}

fn cache(spec: &str, lane_width: LaneWidth) -> Arc<Cache> {
    let shape = ModelShape::new(2, 6, 2, 32);
    let mut config = config(shape, spec);
    config.lane_width = Some(lane_width);
    Manager::new(config).unwrap().cache().clone()
}

#[test]
fn column_sums_and_windows_are_those_of_the_reference() {
    let both = Needs::QUERY_WINDOW.union(Needs::COLUMN_SUM);
    for (seed, spec) in ["full", "quant(k=had+q4_0, v=q8_0)"].into_iter().enumerate() {
        let mut watched = Watched::new(&cache(spec, LaneWidth::Head), both, seed as u64);
        for (n, workers) in [(3, 1), (1, 2), (70, 3), (1, 5), (17, 4), (2, 1)] {
            // A sink takes a part of the probability; a window leaves rows without any.
            let sinks = watched.random.normals(6);
            let options = Options {
                sinks: watched.random.chance(50).then_some(&sinks),
                sliding_window: watched.random.pick(&[0, 9, 50]),
                ..Options::default()
            };
            watched.step(n, &options, workers);
            watched.check_sums();
            watched.check_queries();
        }
    }
}

#[test]
fn only_committed_tokens_count_and_the_last_of_them_is_known() {
    let needs = Needs::COLUMN_SUM.union(Needs::LAST_ROW).union(Needs::QUERY_WINDOW);
    for spec in ["full", "quant(k=had+q4_0, v=q8_0)"] {
        let mut watched = Watched::new(&cache(spec, LaneWidth::Head), needs, 11);
        // A piece of a prompt with more tokens than drafts have, and drafts of all kinds.
        for (n, accepted) in [(70, 70), (1, 1), (6, 2), (1, 0), (5, 5), (33, 17), (4, 0), (1, 1)] {
            let options = Options { sliding_window: 40, softcap: 20.0, ..Options::default() };
            watched.draft(n, accepted, &options, 2);
            watched.check_sums();
            watched.check_last();
            watched.check_queries();
        }
    }
}

#[test]
fn layers_that_share_a_cached_layer_all_count() {
    let mut watched = Watched::new(&cache("full", LaneWidth::Layer), Needs::COLUMN_SUM, 3);
    watched.step(40, &Options::default(), 1);
    let before: Vec<f64> = watched.sums[0].clone();
    watched.sequence.reserve(1).unwrap();
    let ModelShape { num_q_heads, num_kv_heads, head_dim, .. } = watched.shape;
    let rows = vec![0.5; num_q_heads * head_dim];
    for layer in 0..2 {
        watched.attention.plan(&[(&watched.sequence, 1)]).unwrap();
        let shape = [1, num_kv_heads, head_dim];
        let row = Tensor::from_slice(&rows[..num_kv_heads * head_dim], shape);
        watched.attention.append(layer, &row, Some(&row), 0, 1).unwrap();
        for _ in 0..3 {
            let query = Tensor::from_slice(&rows, [1, num_q_heads, head_dim]);
            let mut output = vec![0.0; rows.len()];
            let output = TensorMut::from_slice(&mut output, [1, num_q_heads, head_dim]);
            watched.attention.run(layer, &query, &output, None, &Options::default(), 0, 1).unwrap();
        }
    }
    watched.sequence.commit(1, None).unwrap();
    let seen = watched.sequence.observation().unwrap().head(0, 0).lock();
    let added: f64 = seen.received.sums.iter().map(|sum| f64::from(*sum)).sum::<f64>();
    let added = added - before.iter().sum::<f64>();
    assert!((added - 3.0 * watched.shape.group() as f64).abs() < 1e-3, "{added}");
}

#[test]
fn sums_follow_their_rows_through_compaction() {
    let mut watched = Watched::new(&cache("full", LaneWidth::Head), Needs::COLUMN_SUM, 5);
    for round in 0..4 {
        watched.step(25, &Options::default(), 2);
        for head in 0..watched.sums.len() {
            let len = watched.sums[head].len();
            let random = &mut watched.random;
            let kept: Vec<usize> = (0..len).filter(|i| i + 1 == len || random.chance(50)).collect();
            watched.sums[head] = kept.iter().map(|i| watched.sums[head][*i]).collect();
            let keep = KeepSet::from_indices(kept);
            watched.sequence.compact(head, &keep).unwrap();
        }
        watched.check_sums();
        watched.step(1, &Options::default(), 1 + round);
        watched.check_sums();
    }
}

#[test]
fn windows_of_long_contexts_come_from_one_worker_only() {
    let mut watched = Watched::new(&cache("full", LaneWidth::Layer), Needs::QUERY_WINDOW, 5);
    watched.step(3000, &Options::default(), 2);
    for workers in [1, 3, 4] {
        watched.step(1, &Options::default(), workers);
        watched.check_queries();
        let observation = watched.sequence.observation().unwrap();
        assert!(observation.head(0, 0).lock().received.sums.is_empty(), "nobody asked");
    }
}

#[test]
fn sums_of_long_contexts_cover_all_rows() {
    let mut watched = Watched::new(&cache("full", LaneWidth::Layer), Needs::COLUMN_SUM, 5);
    // The reference would take minutes for the prompt: take what was seen of it as given.
    watched.is_checked = false;
    watched.step(3000, &Options::default(), 2);
    watched.is_checked = true;
    let heads = watched.shape.num_kv_heads;
    for (head, sums) in watched.sums.iter_mut().enumerate() {
        let observation = watched.sequence.observation().unwrap();
        let seen = observation.head(head / heads, head % heads).lock();
        *sums = seen.received.sums.iter().map(|sum| f64::from(*sum)).collect();
        // Each query of each of the 3 heads of the group hands out a probability of 1.
        let total: f64 = sums.iter().sum();
        assert!((total / 9000.0 - 1.0).abs() < 1e-4, "{total}");
    }
    for workers in [1, 3] {
        watched.step(1, &Options::default(), workers);
        watched.check_sums();
    }
}

/// What the policy is told about the queries of a head, against their mean and covariance in f64.
#[test]
fn statistics_are_of_all_queries_before_rotation() {
    let shape = ModelShape::new(2, 4, 2, 16);
    let mut engine = Engine::new(config(shape, "expected | keep(0.5)"), 77);
    let mut session = engine.session();
    let counts = [3, 2, 40, 1, 17];
    let mut rows: Vec<Vec<Vec<f32>>> = vec![Vec::new(); shape.num_layers * shape.num_q_heads];
    let rope = Rope::new(RopeStyle::Half, shape.head_dim, 10_000.0);
    let mut position = 0;
    for n in counts {
        let steps = engine.step(&mut [&mut session], &[n]);
        session.commit(n, None).unwrap();
        for (layer, step) in steps.iter().enumerate() {
            for (i, query) in step.query.chunks_exact(shape.head_dim).enumerate() {
                let (token, head) = (position + i / shape.num_q_heads, i % shape.num_q_heads);
                if token >= 4 {
                    let mut query = query.to_vec();
                    rope.rotate(&mut query, -(token as i32));
                    rows[layer * shape.num_q_heads + head].push(query);
                }
            }
        }
        position += n;
    }
    let child = session.fork().unwrap();
    for (i, rows) in rows.iter().enumerate() {
        let (layer, head) = (i / shape.num_q_heads, i % shape.num_q_heads);
        let (kv_head, g) = (head / shape.group(), head % shape.group());
        let n = rows.len() as f64;
        let mean: Vec<f64> = (0..shape.head_dim)
            .map(|c| rows.iter().map(|row| f64::from(row[c])).sum::<f64>() / n)
            .collect();
        let covariance = (0..shape.head_dim * shape.head_dim).map(|i| {
            let (a, b) = (i / shape.head_dim, i % shape.head_dim);
            let product =
                |row: &Vec<f32>| (f64::from(row[a]) - mean[a]) * (f64::from(row[b]) - mean[b]);
            rows.iter().map(product).sum::<f64>() / n
        });
        let covariance: Vec<f64> = covariance.collect();
        for session in [&session, &child] {
            let seen = session.sequence().observation().unwrap().head(layer, kv_head).lock();
            let found = &seen.statistics[g];
            assert_eq!(found.count(), rows.len());
            assert!(relative_error(found.mean(), &mean) < 1e-5, "mean of head {i}");
            let found: Vec<f32> = found.covariance().collect();
            assert!(relative_error(&found, &covariance) < 1e-5, "covariance of head {i}");
        }
    }
    session.end_prefill().unwrap();
    assert!(session.sequence().lanes().iter().all(|lane| lane.len() == 63 / 2));
}
