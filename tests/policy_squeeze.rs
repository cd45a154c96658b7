//! SqueezeAttention's budget: against a slow reference, in a cache, and what it refuses.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{Engine, Random, config};
use kvmgr::attention::Options;
use kvmgr::device::tensor::Tensor;
use kvmgr::error::{Kind, Result};
use kvmgr::manager::Session;
use kvmgr::policy::{Event, HeadInput, LayerInput, LayerSource, Pipeline};
use kvmgr::shape::{KeepSet, ModelShape};

const HIDDEN: usize = 12;

/// A model whose tokens are told by their column sums alone.
struct Model {
    cosines: Vec<Option<f64>>,
    /// `[layers][heads]` tokens.
    lens: Vec<Vec<usize>>,
    positions: Vec<i32>,
    sums: Vec<f32>,
}

impl Model {
    fn new(cosines: &[f64], lens: Vec<Vec<usize>>) -> Self {
        let longest = lens.iter().flatten().copied().max().unwrap_or(0);
        Self {
            cosines: cosines.iter().map(|cosine| Some(*cosine)).collect(),
            lens,
            positions: (0..longest as i32).collect(),
            sums: Random(5).normals(longest),
        }
    }

    fn select(&mut self, spec: &str) -> Result<Vec<Vec<KeepSet>>> {
        Pipeline::parse(spec).unwrap().select(Event::Step, self)
    }

    /// What each layer keeps.
    fn kept(&mut self, spec: &str) -> Vec<usize> {
        let sets = self.select(spec).expect(spec);
        sets.iter().map(|heads| heads.iter().map(KeepSet::len).sum()).collect()
    }
}

impl LayerSource for Model {
    fn num_layers(&self) -> usize {
        self.lens.len()
    }

    fn visit(
        &mut self,
        layer: usize,
        f: &mut dyn FnMut(&LayerInput<'_>) -> Result<()>,
    ) -> Result<()> {
        let head = |len: &usize| HeadInput {
            positions: &self.positions[..*len],
            column_sums: &self.sums[..*len],
            ..HeadInput::default()
        };
        f(&LayerInput {
            layer,
            num_layers: self.lens.len(),
            group: 1,
            head_dim: 1,
            value_dim: 1,
            sequence_len: self.positions.len(),
            heads: self.lens[layer].iter().map(head).collect(),
            attention_cosine: self.cosines[layer],
            ..LayerInput::default()
        })
    }
}

/// Sums of squares around the means of three groups.
fn scatter(cosines: &[f64], groups: &[usize]) -> f64 {
    let mut sum = 0.0;
    for group in 0..3 {
        let members: Vec<f64> = (0..cosines.len())
            .filter(|layer| groups[*layer] == group)
            .map(|layer| cosines[layer])
            .collect();
        let mean = members.iter().sum::<f64>() / members.len().max(1) as f64;
        sum += members.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>();
    }
    sum
}

/// The layers of the highest cosines in every best way to make three groups of all layers.
fn squeezed_in_any_way(cosines: &[f64]) -> Vec<Vec<bool>> {
    let layers = cosines.len();
    let mut ways: Vec<(f64, Vec<bool>)> = Vec::new();
    for code in 0..3usize.pow(layers as u32) {
        let groups: Vec<usize> = (0..layers).map(|i| code / 3usize.pow(i as u32) % 3).collect();
        let distinct = |i: usize| cosines[..i].iter().all(|other| *other != cosines[i]);
        let wanted = (0..layers).filter(|i| distinct(*i)).count().min(3);
        if (0..3).filter(|group| groups.contains(group)).count() != wanted {
            continue;
        }
        let highest = (0..layers).max_by(|a, b| cosines[*a].total_cmp(&cosines[*b])).unwrap();
        let mut squeezed: Vec<bool> = groups.iter().map(|g| *g == groups[highest]).collect();
        if wanted == 1 {
            squeezed.fill(false);
        }
        ways.push((scatter(cosines, &groups), squeezed));
    }
    let best = ways.iter().map(|(scatter, _)| *scatter).fold(f64::INFINITY, f64::min);
    ways.into_iter().filter(|(found, _)| *found <= best + 1e-12).map(|(_, way)| way).collect()
}

/// One token after another goes to the layer whose turn it is.
fn slow_budgets(squeezed: &[bool], lens: &[usize], n: usize, p: f64) -> Vec<usize> {
    let mut given: Vec<usize> = squeezed
        .iter()
        .zip(lens)
        .map(|(squeezed, len)| {
            let own = if *squeezed { ((n as f64 * p + 1e-9).floor() as usize).max(1) } else { n };
            own.min(*len)
        })
        .collect();
    let mut left = n * lens.len() - given.iter().sum::<usize>();
    for turn in [false, true] {
        loop {
            let open = |i: &usize| squeezed[*i] == turn && given[*i] < lens[*i];
            let Some(poorest) = (0..lens.len()).filter(open).min_by_key(|i| given[*i]) else {
                break;
            };
            if left == 0 {
                break;
            }
            given[poorest] += 1;
            left -= 1;
        }
    }
    given
}

#[test]
fn budgets_are_those_of_a_slow_reference() {
    let mut random = Random(17);
    for case in 0..120 {
        let layers = random.within(1, 7);
        // Rounded, so that layers often agree.
        let scale = random.pick(&[2.0, 10.0, 1e4]);
        let cosines: Vec<f64> = (0..layers)
            .map(|_| 1.0 - (f64::from(random.normal()).abs() * scale).round() / scale / 6.0)
            .collect();
        let (len, p) = (random.within(1, 90), random.pick(&[0.0, 0.3, 0.35, 1.0]));
        let n = random.within(1, len);
        let mut model = Model::new(&cosines, vec![vec![len]; layers]);
        let spec = format!("all: h2o(recent=0) | squeeze({p}) | keep_tokens({n})");
        let kept = model.kept(&spec);
        assert_eq!(kept.iter().sum::<usize>(), n * layers, "{spec} {cosines:?}");
        // Even parts may be rounded differently, in favour of anyone.
        let agrees = |squeezed: &Vec<bool>| {
            let expected = slow_budgets(squeezed, &vec![len; layers], n, p);
            kept.iter().zip(expected).all(|(kept, expected)| kept.abs_diff(expected) <= 1)
        };
        let ways = squeezed_in_any_way(&cosines);
        assert!(ways.iter().any(agrees), "case {case}: {spec} {cosines:?} {kept:?} {ways:?}");
    }
}

#[test]
fn layers_that_change_least_give_to_the_others() {
    let kept = |cosines: &[f64], len: usize, spec: &str| {
        let layers = cosines.len();
        Model::new(cosines, vec![vec![len; 2]; layers])
            .kept(&format!("all: h2o(recent=0) | {spec}"))
    };
    let three = [0.2, 0.9, 0.6, 0.91];
    assert_eq!(kept(&three, 1000, "squeeze | keep_tokens(100)"), [330, 70, 330, 70]);
    assert_eq!(kept(&three, 1000, "squeeze(0.3) | keep(0.1)"), [340, 60, 340, 60]);
    assert_eq!(kept(&three, 1000, "squeeze(1) | keep(0.1)"), [200; 4]);
    assert_eq!(kept(&three, 1000, "squeeze(0) | keep(0.1)"), [398, 2, 398, 2]);
    // What the others have no room for stays where it was.
    assert_eq!(kept(&three, 120, "squeeze | keep_tokens(100)"), [240, 160, 240, 160]);
    assert_eq!(kept(&three, 120, "squeeze | keep(1)"), [240; 4]);
    // Two groups, and one that has nobody to give to.
    assert_eq!(kept(&[0.5, 0.4], 1000, "squeeze | keep_tokens(100)"), [70, 330]);
    assert_eq!(kept(&[0.5; 3], 1000, "squeeze | keep_tokens(100)"), [200; 3]);
    assert_eq!(kept(&[0.5], 1000, "squeeze | keep_tokens(100)"), [200]);
    // Of two equally good ways the larger group of high cosines.
    assert_eq!(
        kept(&[0.0, 0.25, 0.5, 0.75], 1000, "squeeze | keep_tokens(100)"),
        [330, 330, 70, 70]
    );
}

#[test]
fn ragged_heads_keep_the_total_and_no_more_than_they_have() {
    let mut random = Random(3);
    for _ in 0..200 {
        let layers = random.within(1, 9);
        let lens: Vec<Vec<usize>> = (0..layers)
            .map(|_| (0..random.within(1, 3)).map(|_| random.within(1, 60)).collect())
            .collect();
        let cosines: Vec<f64> = (0..layers).map(|_| f64::from(random.normal())).collect();
        let n = random.within(1, 50);
        let spec = format!("all: h2o(recent=0) | squeeze | keep_tokens({n})");
        let kept = Model::new(&cosines, lens.clone()).select(&spec).unwrap();
        let (mut total, mut all, mut heads) = (0, 0, 0);
        for (set, len) in kept.iter().flatten().zip(lens.iter().flatten()) {
            assert!((1..=*len).contains(&set.len()), "{spec} {lens:?} {kept:?}");
            total += set.len();
            all += len;
            heads += 1;
        }
        assert_eq!(total, all.min(n * heads), "{spec} {lens:?} {kept:?}");
    }
}

const SMALL: ModelShape = ModelShape::new(4, 4, 2, 32);

/// Reserves, appends and attends `n` tokens.
fn attend(engine: &mut Engine, session: &mut Session, n: usize) {
    session.sequence_mut().reserve(n).unwrap();
    engine.attention.plan(&[(session.sequence(), n)]).unwrap();
    for layer in 0..SMALL.num_layers {
        let keys = engine.random.normals(n * SMALL.num_kv_heads * SMALL.head_dim);
        let values = engine.random.normals(keys.len());
        engine.append(layer, &keys, &values);
        let queries = engine.random.normals(n * SMALL.num_q_heads * SMALL.head_dim);
        engine.run(layer, queries, &Options::default());
    }
}

/// Hands over states of which `part` changes, and adds the cosines of the first `counted` to `sums`.
fn observe(session: &mut Session, random: &mut Random, n: usize, counted: usize, sums: &mut [f64]) {
    for (layer, sum) in sums.iter_mut().enumerate() {
        let size = [3.0, 0.1, 1.0, 0.2][layer];
        let hidden = random.normals(n * HIDDEN);
        let added: Vec<f32> = random.normals(n * HIDDEN).iter().map(|x| x * size).collect();
        for token in 0..counted {
            let row = token * HIDDEN..(token + 1) * HIDDEN;
            let old: Vec<f64> = hidden[row.clone()].iter().map(|x| f64::from(*x)).collect();
            let new: Vec<f64> =
                old.iter().zip(&added[row]).map(|(x, delta)| x + f64::from(*delta)).collect();
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
            *sum += dot(&old, &new) / dot(&old, &old).sqrt() / dot(&new, &new).sqrt();
        }
        let [hidden, added] =
            [&hidden, &added].map(|rows| Tensor::from_slice(rows, [n, 1, HIDDEN]));
        session.observe_residual(layer, &hidden, &added).unwrap();
    }
}

fn means(session: &Session) -> Vec<f64> {
    let seen = session.sequence().observation().unwrap();
    (0..SMALL.num_layers).map(|layer| seen.residual(layer).lock().mean().unwrap()).collect()
}

fn rows(session: &Session) -> Vec<usize> {
    let lane = |layer: usize| session.sequence().locate(layer, 0).0;
    (0..SMALL.num_layers).map(|layer| session.sequence().lanes()[lane(layer)].len()).collect()
}

#[test]
fn a_cache_knows_the_cosines_of_committed_tokens_of_the_prompt() {
    let mut engine = Engine::new(config(SMALL, "h2o(recent=8) | squeeze | keep_tokens(40)"), 5);
    let mut session = engine.session();
    let mut random = Random(2);
    let (mut sums, mut counted) = (vec![0.0; SMALL.num_layers], 0);
    for (n, real) in [(50, 50), (20, 12), (7, 0), (30, 30)] {
        attend(&mut engine, &mut session, n);
        // Once more replaces what was handed over before.
        observe(&mut session, &mut random, n, 0, &mut sums);
        observe(&mut session, &mut random, n, real, &mut sums);
        session.commit(real, None).unwrap();
        counted += real;
    }
    let expected: Vec<f64> = sums.iter().map(|sum| sum / counted as f64).collect();
    for (found, expected) in means(&session).iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-9, "{found} {expected}");
    }
    // A rollback knows nothing new, and a fork all of it.
    attend(&mut engine, &mut session, 3);
    observe(&mut session, &mut random, 3, 0, &mut sums);
    session.sequence_mut().truncate(counted).unwrap();
    let before = means(&session);
    let mut fork = session.fork().unwrap();
    assert_eq!(means(&fork), before);
    for session in [&mut session, &mut fork] {
        session.end_prefill().unwrap();
        assert_eq!(rows(session), [66, 14, 66, 14]);
        for _ in 0..3 {
            // Generated tokens need not be handed over.
            attend(&mut engine, session, 1);
            session.commit(1, None).unwrap();
            assert_eq!(rows(session), [66, 14, 66, 14]);
        }
        attend(&mut engine, session, 1);
        observe(session, &mut random, 1, 0, &mut sums);
        session.commit(1, None).unwrap();
        assert_eq!(means(session), before);
    }
    session.truncate(0).unwrap();
    assert_eq!(session.sequence().observation().unwrap().residual(0).lock().mean(), None);
}

/// A sequence without tokens starts anew: the next prompt is a prompt, whose residual streams count.
#[test]
fn the_next_prompt_of_a_sequence_is_a_prompt() {
    let mut engine = Engine::new(config(SMALL, "snapkv(w=8) | squeeze | keep(0.5)"), 5);
    let mut session = engine.session();
    let mut random = Random(2);
    let mut kept = Vec::new();
    for _ in 0..2 {
        let mut sums = vec![0.0; SMALL.num_layers];
        attend(&mut engine, &mut session, 80);
        observe(&mut session, &mut random, 80, 80, &mut sums);
        session.commit(80, None).unwrap();
        session.end_prefill().unwrap();
        for (found, sum) in means(&session).iter().zip(&sums) {
            assert!((found - sum / 80.0).abs() < 1e-9);
        }
        kept.push(rows(&session));
        attend(&mut engine, &mut session, 1);
        session.commit(1, None).unwrap();
        session.truncate(0).unwrap();
    }
    assert_eq!(kept[0], kept[1]);
    assert!(kept[0].iter().sum::<usize>() <= 4 * 40, "{kept:?}");
}

#[test]
fn missing_states_and_wrong_shapes_are_refused() {
    let mut engine = Engine::new(config(SMALL, "snapkv(w=8) | squeeze | keep(0.25)"), 5);
    let mut session = engine.session();
    let error = session.end_prefill();
    assert!(error.is_ok(), "an empty prompt has nothing to lose");
    let mut session = engine.session();
    attend(&mut engine, &mut session, 20);
    let message = |error: kvmgr::error::Error, kind: Kind| {
        assert_eq!(error.kind(), kind, "{error}");
        error.message().to_string()
    };
    let missing = session.commit(20, None).unwrap_err();
    assert!(
        message(missing, Kind::InvalidState).starts_with("layer 0 has residual streams of 0 of 20")
    );
    let states = vec![1.0; 20 * HIDDEN];
    let tensor = |rows: usize, width: usize| Tensor::from_slice(&states, [rows, 1, width]);
    for (layer, hidden, added, expected) in [
        (4, [20, 12], [20, 12], "layer is 4, the model has 4"),
        (0, [19, 12], [19, 12], "hidden has the shape [19, 12], must have a row for each of 20"),
        (0, [20, 12], [19, 12], "added has the shape [19, 12], must have a row for each of 20"),
        (0, [20, 12], [20, 11], "added has the shape [20, 11], must have that of hidden, [20, 12]"),
        (0, [20, 0], [20, 0], "hidden has the shape [20, 0]"),
    ] {
        let [hidden, added] = [hidden, added].map(|[rows, width]| tensor(rows, width));
        let error = session.observe_residual(layer, &hidden, &added).unwrap_err();
        let found = message(error, Kind::InvalidArgument);
        assert!(found.starts_with(expected), "{found}");
    }
    for layer in 0..3 {
        session.observe_residual(layer, &tensor(20, 12), &tensor(20, 12)).unwrap();
    }
    let missing = session.commit(20, None).unwrap_err();
    assert!(
        message(missing, Kind::InvalidState).starts_with("layer 3 has residual streams of 0 of")
    );
    // None of them needs no states; more reserved tokens need theirs.
    session.observe_residual(3, &tensor(20, 12), &tensor(20, 12)).unwrap();
    session.commit(20, None).unwrap();
    session.end_prefill().unwrap();

    let mut model = Model::new(&[0.1, 0.2, 0.3], vec![vec![9]; 3]);
    model.cosines[1] = None;
    let error = model.select("all: h2o(recent=0) | squeeze | keep(0.5)").unwrap_err();
    let found = message(error, Kind::InvalidState);
    assert_eq!(found, "squeeze: layer 1 has seen no residual stream of the prompt");
    // Who cannot hand them over is told which stage needs them.
    let error = kvmgr::slots::parse_spec("snapkv | squeeze | keep(0.5)").unwrap_err();
    let found = message(error, Kind::Unsupported);
    assert!(found.contains("column 10: \"squeeze\" needs RESIDUAL"), "{found}");
    // A policy that compares nothing does not look.
    let mut engine = Engine::new(config(SMALL, "h2o(recent=8) | keep(0.5)"), 5);
    let mut session = engine.session();
    attend(&mut engine, &mut session, 20);
    session.observe_residual(0, &tensor(20, 12), &tensor(20, 12)).unwrap();
    session.commit(20, None).unwrap();
}
