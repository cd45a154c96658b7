//! What policies choose: budgets, laws of composition, random pipelines.

mod common;

use std::sync::LazyLock;

use common::weights::{self, Shape};

use kvmgr::error::{Kind, Result};
use kvmgr::policy::{
    Event, HeadInput, LayerInput, LayerSource, OutputProjection, Pipeline, STAGES, StageClass,
};
use kvmgr::registry::Domain;
use kvmgr::shape::{KeepSet, Rope, RopeStyle};
use proptest::prelude::*;

/// One layer of random observations; heads may be ragged.
#[derive(Debug, Clone)]
struct Layer {
    group: usize,
    dim: usize,
    num_queries: usize,
    heads: Vec<Head>,
    /// `[HIDDEN, heads * group * dim]`.
    projection: Vec<f32>,
}

/// Elements of a hidden state.
const HIDDEN: usize = 6;

#[derive(Debug, Clone)]
struct Head {
    positions: Vec<i32>,
    keys: Vec<f32>,
    queries: Vec<f32>,
    column_sums: Vec<f32>,
    query_mean: Vec<f32>,
    query_covariance: Vec<f32>,
    gate_scores: Vec<f32>,
    replay_maxima: Vec<f32>,
}

impl Layer {
    /// Heads of the given lengths over one sequence, each without a random part of its tokens.
    fn new(lens: &[usize], num_queries: usize, seed: u64) -> Self {
        let (group, dim) = (2, 8);
        let longest = lens.iter().copied().max().unwrap_or(0);
        let head = |(h, len): (usize, &usize)| {
            let noise = |salt: u64, n: usize| -> Vec<f32> {
                let value = |i: usize| noise(seed ^ (salt << 40) ^ ((h as u64) << 32) ^ i as u64);
                (0..n).map(value).collect()
            };
            // The newest token is always there, the others are the tail or spread out.
            let gap = longest - len;
            let positions = (0..*len).map(|i| (i + if i > 0 { gap } else { 0 }) as i32).collect();
            let positions = if *len == 1 { vec![longest as i32 - 1] } else { positions };
            Head {
                positions,
                keys: noise(1, len * dim),
                queries: noise(2, group * num_queries * dim),
                column_sums: noise(3, *len).iter().map(|x| x.abs()).collect(),
                query_mean: noise(4, group * dim),
                query_covariance: covariance(&noise(5, group * dim), dim),
                gate_scores: noise(6, *len),
                replay_maxima: noise(8, group * len),
            }
        };
        let width = lens.len() * group * dim;
        let projection = (0..HIDDEN * width).map(|i| noise(seed ^ (7 << 40) ^ i as u64)).collect();
        let heads = lens.iter().enumerate().map(head).collect();
        Self { group, dim, num_queries, heads, projection }
    }

    /// `heads` equal heads of `len` tokens, with as many queries as possible up to 64.
    fn even(heads: usize, len: usize, seed: u64) -> Self {
        Self::new(&vec![len; heads], len.min(64), seed)
    }

    fn input(&self) -> LayerInput<'_> {
        LayerInput {
            value_dim: self.dim,
            layer: 0,
            num_layers: 1,
            group: self.group,
            head_dim: self.dim,
            sequence_len: self.sequence_len(),
            heads: self.heads.iter().map(|head| head.input(self.num_queries)).collect(),
            rope: Some(&ROPE),
            output_projection: Some(OutputProjection {
                weights: &self.projection,
                width: self.heads.len() * self.group * self.dim,
            }),
            attention_cosine: Some(0.5),
        }
    }

    fn sequence_len(&self) -> usize {
        let last = self.heads.iter().filter_map(|head| head.positions.last()).max();
        last.map_or(0, |last| *last as usize + 1)
    }
}

impl Head {
    fn input(&self, num_queries: usize) -> HeadInput<'_> {
        HeadInput {
            positions: &self.positions,
            keys: &self.keys,
            values: &self.keys,
            queries: &self.queries,
            num_queries,
            column_sums: &self.column_sums,
            query_mean: &self.query_mean,
            query_covariance: &self.query_covariance,
            gate_scores: &self.gate_scores,
            replay_maxima: &self.replay_maxima,
            last_row: &[],
            low_counts: &self.column_sums,
        }
    }
}

impl LayerSource for Layer {
    fn num_layers(&self) -> usize {
        1
    }

    fn visit(&mut self, _: usize, f: &mut dyn FnMut(&LayerInput<'_>) -> Result<()>) -> Result<()> {
        f(&self.input())
    }
}

/// The covariance `[group, dim, dim]` of one direction for each query head.
fn covariance(directions: &[f32], dim: usize) -> Vec<f32> {
    let product = |row: &[f32]| -> Vec<f32> {
        row.iter().flat_map(|x| row.iter().map(move |y| x * y)).collect()
    };
    directions.chunks_exact(dim).flat_map(product).collect()
}

/// Weights for layers of 0 to 3 KV heads.
static FILES: LazyLock<Vec<tempfile::NamedTempFile>> = LazyLock::new(|| {
    let shape = |heads| Shape { layers: 1, heads, group: 2, dim: 8, hidden: HIDDEN };
    (0..4).map(|heads| weights::write(shape(heads))).collect()
});

/// The rotation of all layers.
static ROPE: LazyLock<Rope> = LazyLock::new(|| Rope::new(RopeStyle::Half, 8, 1e4));

/// About uniform in -2..2, from a hash.
fn noise(x: u64) -> f32 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 40) as f32 / (1 << 22) as f32 - 2.0
}

fn select(spec: &str, event: Event, layer: &Layer) -> Vec<KeepSet> {
    let pipeline = Pipeline::parse(spec).unwrap_or_else(|error| panic!("{spec}: {error}"));
    pipeline.select(event, &mut layer.clone()).expect(spec).remove(0)
}

fn is_subset(small: &KeepSet, large: &KeepSet) -> bool {
    let large: Vec<usize> = large.iter().collect();
    small.iter().all(|index| large.binary_search(&index).is_ok())
}

#[test]
fn budgets_are_kept_to_the_token() {
    for len in [1, 3, 4, 5, 31, 64, 65, 100, 257] {
        let layer = Layer::even(3, len, len as u64);
        for (spec, whole) in [
            ("snapkv(w=16)", 16),
            ("h2o(recent=10)", 10),
            ("stream(sink=4)", 4),
            ("tova", 1),
            ("finch(w=9)", 9),
            ("nacl(w=9)", 9),
            ("scissorhands(recent=10)", 10),
            ("capkv", 4),
            ("leverage(sketch=4)", 0),
            ("compactor(chunk=16, sketch=4)", 12),
            ("keydiff", 0),
            ("lagkv(lag=8)", 0),
            ("random", 0),
        ] {
            for (keep, n) in [
                ("keep(0.25)", len / 4),
                ("keep(29%)", len * 29 / 100),
                ("keep(0)", 0),
                ("keep_tokens(20)", 20),
                ("keep_tokens(1)", 1),
            ] {
                let expected = if len <= whole { len } else { n.clamp(1, len) };
                let spec = format!("all: {spec} | {keep}");
                for set in select(&spec, Event::Step, &layer) {
                    assert_eq!(set.len(), expected, "{spec} of {len}");
                    assert!(set.end() <= len);
                }
                let spec = spec.replace(" | keep", " | adakv(0.3) | keep");
                let total: usize =
                    select(&spec, Event::Step, &layer).iter().map(KeepSet::len).sum();
                assert_eq!(total, 3 * expected, "{spec} of {len}");
            }
        }
    }
}

#[test]
fn laws_of_composition() {
    for (len, seed) in [(40, 1), (100, 2), (200, 3)] {
        let layer = Layer::even(4, len, seed);
        for score in [
            "snapkv(w=16)",
            "h2o(recent=10)",
            "stream",
            "tova",
            "keydiff",
            "expected(eps=0.01)",
            "knorm",
            "lagkv(lag=16)",
            "cur",
            "observed",
            "finch(w=16)",
            "capkv",
            "leverage(sketch=4)",
            "noncausal(chunk=32)",
            "compactor(chunk=32, sketch=4, blend=0.4)",
            "cake(w=16)",
            "pyramidinfer(w=16)",
            "keyformer(w=16, seed=3)",
            "random(seed=3)",
        ] {
            let run = |rest: &str| select(&format!("{score} | {rest}"), Event::PrefillEnd, &layer);
            assert_eq!(run("keep(1.0)"), vec![KeepSet::all(len); 4], "{score}: keep all");
            assert_eq!(run("keep(0.5)"), run("uniform | keep(0.5)"), "{score}: default budget");
            let ratio = |budget: &str, keep: f64| run(&format!("{budget} | keep({keep})"));
            for keep in [0.05, 0.1, 0.3, 0.5, 0.9] {
                assert_eq!(ratio("adakv(1)", keep), ratio("uniform", keep), "{score}: floor 1");
                for budget in ["uniform", "adakv(1)"] {
                    let (small, large) = (ratio(budget, keep), ratio(budget, keep + 0.1));
                    assert!(
                        small.iter().zip(&large).all(|(a, b)| is_subset(a, b)),
                        "{score} {budget} {keep}: nested"
                    );
                }
            }
        }
    }
}

#[test]
fn demotion_chooses_what_eviction_would() {
    let layer = Layer::even(3, 120, 8);
    for score in
        ["snapkv(w=16)", "h2o(recent=10)", "keydiff", "knorm | adakv(0.2)", "knorm | global"]
    {
        for keep in ["keep(1.0)", "keep(0.3)", "keep_tokens(20)"] {
            let spec = format!("prefill: {score} | {keep}");
            let evicting = select(&spec, Event::PrefillEnd, &layer);
            for format in ["", "(q4_0)", "(k=had+q4_0, v=kivi2)"] {
                let spec = format!("{spec} | demote{format} | quant(q8_0)");
                assert_eq!(select(&spec, Event::PrefillEnd, &layer), evicting, "{spec}");
            }
        }
    }
}

#[test]
fn laws_of_maps() {
    for (heads, len, seed) in [(1, 40, 1), (4, 100, 2), (3, 201, 3)] {
        let layer = Layer::even(heads, len, seed);
        for score in ["knorm", "keydiff", "observed", "random", "cur", "kvzip(sink=0, plus=yes)"] {
            for keep in ["keep(0.1)", "keep(0.5)", "keep_tokens(7)"] {
                let run = |maps: &str| {
                    select(&format!("{score} | {maps}{keep}"), Event::PrefillEnd, &layer)
                };
                let plain = run("");
                for same in [
                    "protect(0, 0) | ",
                    "critical(first=1) | ",
                    "quota(999) | ",
                    "blockwise(999) | ",
                ] {
                    assert_eq!(run(same), plain, "{score} {same} {keep}");
                }
                let total = |sets: &[KeepSet]| sets.iter().map(KeepSet::len).sum::<usize>();
                for budgeted in
                    ["critical | ", "quota(16) | ", "blockwise(16) | ", "entropy_chunk | "]
                {
                    assert_eq!(total(&run(budgeted)), total(&plain), "{score} {budgeted} {keep}");
                }
                assert!(total(&run("chunk(9) | ")) <= total(&plain), "{score} {keep}");
                assert_eq!(run("global | "), run("adakv(floor=0) | "), "{score} {keep}");
                assert_eq!(run("compose | "), plain, "{score} {keep}");
                let chunked = run("chunk(1) | ");
                assert!(chunked.windows(2).all(|pair| pair[0] == pair[1]));
                if heads == 1 {
                    assert_eq!(chunked, plain, "{score} {keep}");
                }
            }
        }
    }
}

#[test]
fn a_threshold_keeps_what_reaches_it_and_what_is_protected() {
    let layer = Layer::even(2, 60, 4);
    let kept = select("all: h2o(recent=0) | protect(2, 3) | tau(1.5)", Event::Step, &layer);
    for (set, head) in kept.iter().zip(&layer.heads) {
        let stays = |i: &usize| *i < 2 || *i >= 57 || head.column_sums[*i] >= 1.5;
        assert_eq!(*set, KeepSet::from_indices((0..60).filter(stays)));
    }
    // Something always stays.
    let kept = select("all: h2o(recent=0) | tau(1000)", Event::Step, &layer);
    assert!(kept.iter().all(|set| set.len() == 1));
}

#[test]
fn adakv_follows_the_scores_of_the_layer() {
    let layer = Layer::even(4, 120, 9);
    let spec = "h2o(recent=0) | adakv(floor=0) | keep(0.25)";
    let kept = select(spec, Event::Step, &layer);
    let mut all: Vec<f32> = layer.heads.iter().flat_map(|head| head.column_sums.clone()).collect();
    all.sort_by(|a, b| b.total_cmp(a));
    for (head, set) in layer.heads.iter().zip(&kept) {
        assert!(!set.is_empty());
        let worst = set.iter().map(|i| head.column_sums[i]).fold(f32::INFINITY, f32::min);
        assert!(
            worst >= all[119],
            "one token of each head may be below the threshold {}",
            all[119]
        );
    }
}

#[test]
fn running_again_on_the_result_changes_nothing() {
    for spec in ["h2o(recent=8) | adakv(0.2) | keep_tokens(40)", "h2o(8, 32)", "stream(4, 36)"] {
        let mut layer = Layer::even(3, 150, 5);
        let first = select(spec, Event::Step, &layer);
        for (head, set) in layer.heads.iter_mut().zip(&first) {
            head.positions = set.iter().map(|i| head.positions[i]).collect();
            head.keys = set.iter().flat_map(|i| head.keys[i * 8..][..8].to_vec()).collect();
            head.column_sums = set.iter().map(|i| head.column_sums[i]).collect();
        }
        let again = select(spec, Event::Step, &layer);
        let lens: Vec<_> = again.iter().map(KeepSet::len).collect();
        assert_eq!(lens, first.iter().map(KeepSet::len).collect::<Vec<_>>(), "{spec}");
        assert_eq!(lens.iter().sum::<usize>(), 3 * 40, "{spec}");
    }
}

#[test]
fn snapkv_keeps_its_window_and_aggregates_as_it_says() {
    let layer = Layer::even(2, 100, 11);
    for spec in ["snapkv(w=8)", "snapkv(w=8, pool=max)", "snapkv(w=8, kernel=1, agg=max)"] {
        for set in select(&format!("{spec} | keep_tokens(20)"), Event::PrefillEnd, &layer) {
            assert!((92..100).all(|i| set.iter().any(|kept| kept == i)), "{spec}: {set:?}");
        }
        // With less room than the window, its latest part stays.
        for set in select(&format!("{spec} | keep_tokens(5)"), Event::PrefillEnd, &layer) {
            assert_eq!(set, KeepSet::from_indices(95..100), "{spec}");
        }
    }
    let score = |spec: &str| {
        let pipeline = Pipeline::parse(&format!("{spec} | keep(0.5)")).unwrap();
        pipeline.score(Event::PrefillEnd, &layer.input()).unwrap().remove(0).scores
    };
    let (raw, avg) = (score("snapkv(8, 1)"), score("snapkv(8, 3)"));
    // Average pooling divides by the kernel also at the edges.
    assert!((avg[0] - (raw[0] + raw[1]) / 3.0).abs() < 1e-7);
    assert!((avg[50] - (raw[49] + raw[50] + raw[51]) / 3.0).abs() < 1e-7);
    assert!((avg[91] - (raw[90] + raw[91]) / 3.0).abs() < 1e-7);
    let max = score("snapkv(8, 1, agg=max)");
    assert!(max.iter().zip(&raw).all(|(max, mean)| *max <= 2.0 * mean + 1e-7 && max >= mean));
    let pooled = score("snapkv(8, 5, pool=max)");
    assert!((0..92).all(|i| pooled[i] >= raw[i]));
}

#[test]
fn a_short_observation_window_is_used_and_an_empty_one_is_an_error() {
    let kept = select("snapkv(w=64) | keep(0.5)", Event::PrefillEnd, &Layer::new(&[100], 3, 1));
    assert!((97..100).all(|i| kept[0].iter().any(|index| index == i)));
    let pipeline = Pipeline::parse("snapkv(w=64) | keep(0.5)").unwrap();
    let error = pipeline.select(Event::PrefillEnd, &mut Layer::new(&[100], 0, 1)).unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidState);
    assert!(error.message().contains("snapkv"), "{error}");
}

#[test]
fn queries_do_not_see_later_tokens_after_evictions_inside_the_window() {
    let pipeline = Pipeline::parse("snapkv(w=4, kernel=1) | keep(0.5)").unwrap();
    let score = |positions: Vec<i32>| {
        let mut layer = Layer::new(&[94], 4, 3);
        layer.heads[0].positions = positions;
        pipeline.score(Event::PrefillEnd, &layer.input()).unwrap().remove(0)
    };
    // An eviction before the window is no difference, one inside makes the window shorter.
    let whole = score((0..94).collect());
    assert_eq!(whole, score((0..90).chain(96..100).collect()));
    let gapped = score((0..90).chain([94, 95, 98, 99]).collect());
    assert_eq!(gapped.protected.iter().filter(|protected| **protected).count(), 2);
    // The first query, of position 96, sees none of the window; the third, of 98, one token of it.
    assert_ne!(gapped.scores[..90], whole.scores[..90]);
}

#[test]
fn lengths_that_do_not_fit_are_errors() {
    let pipeline = Pipeline::parse("snapkv(w=4) | keep(0.5)").unwrap();
    let message = |change: fn(&mut Layer)| {
        let mut layer = Layer::new(&[20, 20], 4, 1);
        change(&mut layer);
        let error = pipeline.select(Event::PrefillEnd, &mut layer).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        error.message().to_string()
    };
    let keys = message(|layer| _ = layer.heads[1].keys.pop());
    assert_eq!(keys, "layer 0, KV head 1: keys has 159 elements, must have 160");
    let queries = message(|layer| _ = layer.heads[0].queries.pop());
    assert_eq!(queries, "layer 0, KV head 0: queries has 63 elements, must have 64");
    assert!(message(|layer| layer.heads[0].positions[3] = 2).contains("positions must ascend"));
    let sums = message(|layer| layer.heads[0].column_sums.push(0.0));
    assert!(sums.contains("column_sums has 21 elements, must have at most 20"));
    assert!(message(|layer| layer.dim = 0).contains("head_dim is 0"));
    assert!(message(|layer| layer.group = 0).contains("group is 0"));
}

#[test]
fn tokens_that_nobody_attended_yet_count_as_zero() {
    let mut layer = Layer::even(1, 30, 4);
    layer.heads[0].column_sums.truncate(25);
    let kept = select("h2o(recent=2) | keep_tokens(10)", Event::Step, &layer);
    assert_eq!(kept[0].iter().filter(|i| (25..28).contains(i)).count(), 0);
    assert_eq!(kept[0].len(), 10);
}

/// A random value of a parameter, in or slightly out of its range.
fn value(domain: Domain, pick: u64) -> String {
    match domain {
        Domain::Int { min, max, .. } => match pick % 32 {
            0 => min - 1,
            1 => max,
            _ => min + (pick / 32 % 70) as i64,
        }
        .to_string(),
        Domain::Real { min, max, .. } => {
            (min + (max - min) * (pick % 101) as f64 / 100.0).to_string()
        }
        Domain::Choice(words) => words[pick as usize % words.len()].to_string(),
        Domain::File => String::new(),
        Domain::Text { .. } => ["q8_0", "had+q4_0", "f16", "kivi2"][pick as usize % 4].to_string(),
    }
}

/// A random pipe: of each class a random stage or none, with random arguments.
/// `file` has weights for every stage.
fn pipe(picks: &[u64], file: &str) -> String {
    let mut picks = picks.iter().copied().cycle();
    let mut pick = move || picks.next().unwrap_or(0);
    let mut stages = Vec::new();
    for class in [
        StageClass::Trigger,
        StageClass::Score,
        StageClass::Map,
        StageClass::Map,
        StageClass::Budget,
        StageClass::Keep,
        StageClass::Act,
        StageClass::Position,
        StageClass::Quant,
        StageClass::Select,
    ] {
        let members: Vec<_> = STAGES.iter().filter(|stage| stage.class == class).collect();
        let wanted = matches!(class, StageClass::Score | StageClass::Keep);
        let odds = if wanted { 10 } else { 3 };
        if pick() % 12 >= odds {
            continue;
        }
        let stage = members[pick() as usize % members.len()];
        let mut args = Vec::new();
        let draws = matches!(stage.name, "leverage" | "compactor");
        for param in stage.params {
            if matches!(param.domain, Domain::File) {
                if !draws {
                    args.push(format!("{}=\"{file}\"", param.name));
                }
            } else if pick() % 3 > 0 {
                args.push(format!("{}={}", param.name, value(param.domain, pick())));
            }
        }
        stages.push(format!("{}({})", stage.name, args.join(", ")));
    }
    if stages.is_empty() { "full".into() } else { stages.join(" | ") }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(6000) })]

    #[test]
    fn random_pipelines_never_panic_and_keep_within_budget(
        picks in proptest::collection::vec(any::<u64>(), 24),
        when in 0..4usize,
        lens in proptest::collection::vec(0..130usize, 0..4),
        num_queries in 0..40usize,
        poison in 0..8usize,
        seed in any::<u64>(),
    ) {
        let spec = format!("{}{}", ["", "prefill: ", "decode: ", "all: "][when], pipe(&picks, FILES[lens.len()].path().to_str().unwrap()));
        let pipeline = match Pipeline::parse(&spec) {
            Ok(pipeline) => pipeline,
            Err(error) => {
                prop_assert!(error.message().starts_with("column "), "{}: {}", spec, error);
                return Ok(());
            }
        };
        let mut layer = Layer::new(&lens, num_queries, seed);
        let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX];
        for head in &mut layer.heads {
            if let (Some(bad), Some(key)) = (bad.get(poison), head.keys.first_mut()) {
                *key = *bad;
                head.column_sums[0] = *bad;
            }
        }
        for event in [Event::PrefillEnd, Event::Step] {
            let kept = match pipeline.select(event, &mut layer) {
                Ok(mut kept) => kept.remove(0),
                Err(error) => {
                    prop_assert_eq!(error.kind(), Kind::InvalidState, "{}: {}", spec, error);
                    prop_assert_eq!(num_queries, 0);
                    continue;
                }
            };
            prop_assert_eq!(kept.len(), lens.len());
            for (set, len) in kept.iter().zip(&lens) {
                prop_assert!(set.end() <= *len && (set.is_empty() == (*len == 0)), "{}", spec);
                if !pipeline.acts_on(event) {
                    prop_assert_eq!(set.len(), *len);
                }
            }
            let longest = lens.iter().copied().max().unwrap_or(0);
            if !pipeline.is_due(event, 0, longest, layer.sequence_len()) {
                prop_assert!(kept.iter().zip(&lens).all(|(set, len)| set.len() == *len), "{}", spec);
            }
            let scores = pipeline.score(event, &layer.input()).unwrap();
            for (head, len) in scores.iter().zip(&lens) {
                prop_assert_eq!((head.scores.len(), head.protected.len()), (*len, *len));
            }
        }
    }
}
