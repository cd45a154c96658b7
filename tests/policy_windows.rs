//! Scores of query windows against slow references in f64.

mod common;

use common::Random;
use kvmgr::policy::{Event, HeadInput, LayerInput, Pipeline};

const DIM: usize = 16;
const GROUP: usize = 3;
const LEN: usize = 70;
const WINDOW: usize = 9;

/// One KV head with the queries of its last tokens.
struct Head {
    positions: Vec<i32>,
    keys: Vec<f32>,
    /// `[GROUP, WINDOW, DIM]`.
    queries: Vec<f32>,
}

impl Head {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        Self {
            positions: (0..LEN as i32).collect(),
            keys: random.normals(LEN * DIM),
            queries: random.normals(GROUP * WINDOW * DIM),
        }
    }

    fn scores(&self, spec: &str) -> Vec<f32> {
        let head = HeadInput {
            positions: &self.positions,
            keys: &self.keys,
            queries: &self.queries,
            num_queries: WINDOW,
            ..HeadInput::default()
        };
        let layer = LayerInput {
            layer: 1,
            num_layers: 2,
            group: GROUP,
            head_dim: DIM,
            value_dim: DIM,
            sequence_len: LEN,
            heads: vec![head],
            ..LayerInput::default()
        };
        let pipeline = Pipeline::parse(&format!("{spec} | keep(0.5)")).expect("a spec");
        let scores = pipeline.score(Event::PrefillEnd, &layer).expect("input that fits").remove(0);
        let protected = scores.protected.iter().rev().take_while(|protected| **protected).count();
        assert_eq!(protected, WINDOW, "{spec} protects its window");
        scores.scores[..LEN - WINDOW].to_vec()
    }

    /// Logits of query `t` of query head `g`, for the keys it sees.
    fn logits(&self, g: usize, t: usize) -> Vec<f64> {
        let query = &self.queries[(g * WINDOW + t) * DIM..][..DIM];
        let product = |key: &[f32]| -> f64 {
            key.iter().zip(query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let seen = self.keys.chunks_exact(DIM).take(LEN - WINDOW + t + 1);
        seen.map(|key| product(key) / (DIM as f64).sqrt()).collect()
    }

    /// The sum over heads and queries of `weight(t)` times the softmax of what `change` makes of the
    /// logit of token `j`.
    fn sums(&self, weight: impl Fn(usize) -> f64, change: impl Fn(usize, f64) -> f64) -> Vec<f64> {
        let mut sums = vec![0.0; LEN - WINDOW];
        for g in 0..GROUP {
            for t in 0..WINDOW {
                let weights = self.logits(g, t).into_iter().enumerate();
                let weights: Vec<f64> = weights.map(|(j, x)| change(j, x).exp()).collect();
                let total: f64 = weights.iter().sum();
                for (sum, x) in sums.iter_mut().zip(weights) {
                    *sum += weight(t) * x / total;
                }
            }
        }
        sums
    }
}

fn assert_close(found: &[f32], expected: &[f64], spec: &str) {
    assert_within(2e-5, found, expected, spec);
}

fn assert_within(tolerance: f64, found: &[f32], expected: &[f64], spec: &str) {
    assert_eq!(found.len(), expected.len(), "{spec}");
    for (j, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        assert!(error <= tolerance * expected.abs(), "{spec} token {j}: {found} {expected}");
    }
}

#[test]
fn pyramidinfer_weighs_later_queries_more() {
    let head = Head::new(1);
    let weight = |t: usize| 0.8f64.powi((WINDOW - 1 - t) as i32);
    let total: f64 = (0..WINDOW).map(weight).sum();
    let expected = head.sums(|t| weight(t) / total / GROUP as f64, |_, x| x);
    assert_close(&head.scores("pyramidinfer(w=9, decay=0.8)"), &expected, "pyramidinfer");
    let even = head.sums(|_| 1.0 / (WINDOW * GROUP) as f64, |_, x| x);
    assert_close(&head.scores("pyramidinfer(w=9, decay=1)"), &even, "an even window");
    assert_close(&head.scores("snapkv(w=9, kernel=1)"), &even, "which is that of snapkv");
}

#[test]
fn keyformer_is_a_softmax_of_noisy_logits() {
    let head = Head::new(2);
    let plain = head.scores("keyformer(w=9, noise=0)");
    assert_close(&plain, &head.sums(|_| 1.0, |_, x| x), "no noise");
    let even = head.scores("keyformer(w=9, noise=0, tau=2)");
    assert_close(&even, &head.sums(|_| 1.0, |_, x| x / 2.0), "a temperature");
    let noisy = head.scores("keyformer(w=9, seed=5)");
    assert_ne!(noisy, plain);
    assert_ne!(noisy, head.scores("keyformer(w=9, seed=6)"));
    assert_eq!(noisy, head.scores("keyformer(w=9, seed=5)"));
    let noise: Vec<f64> = (0..LEN).map(|j| gumbel(5, 1, j as u64)).collect();
    // The draws are made in f32.
    assert_within(5e-4, &noisy, &head.sums(|_| 1.0, |j, x| x + noise[j]), "noise");
}

/// The draw for a position of a layer: SplitMix64 and the inverse of the distribution.
fn gumbel(seed: u64, layer: u64, position: u64) -> f64 {
    fn mix(x: u64) -> u64 {
        Random(x).next()
    }
    let place = mix(mix(seed) ^ layer);
    let uniform = ((mix(place ^ position) >> 40) as f64 + 0.5) / f64::from(1u32 << 24);
    -(-uniform.ln()).ln()
}
