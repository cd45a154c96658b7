//! Policies against vectors that other programs made; `tests/golden/README.md` names them.

mod common;

use common::golden::{DIM, GROUP, Golden, HEADS, LAYERS, LEN, TOLERANCE};
use kvmgr::error::Result;
use kvmgr::policy::{
    Event, HeadInput, HeadScores, Kept, LayerInput, LayerSource, OutputProjection, Pipeline,
};
use kvmgr::shape::{KeepSet, Needs, Rope, RopeStyle};

/// Every press of the full set of vectors.
static MANIFEST: &str = include_str!("golden/policy_manifest.txt");

/// The model states after the whole prompt.
struct Prompt {
    positions: Vec<i32>,
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    queries: Vec<Vec<f32>>,
    column_sums: Vec<Vec<f32>>,
    query_mean: Vec<Vec<f32>>,
    query_covariance: Vec<Vec<f32>>,
    /// What the gate of a pipeline made of the hidden states, if it has one.
    gate_scores: Vec<Vec<f32>>,
    /// In the full set only.
    output_projections: Vec<Vec<f32>>,
    rope: Rope,
}

impl Prompt {
    fn new(golden: &Golden) -> Self {
        let each = |name: &str| {
            (0..LAYERS).map(|l| golden.floats(&format!("states/l{l}.{name}"))).collect()
        };
        Self {
            positions: (0..LEN as i32).collect(),
            keys: each("k"),
            values: each("v"),
            queries: each("q"),
            column_sums: each("column_sums"),
            query_mean: each("query_mean"),
            query_covariance: each("query_covariance"),
            gate_scores: vec![Vec::new(); LAYERS],
            output_projections: (0..LAYERS)
                .map(|layer| format!("weights/l{layer}.o_proj"))
                .map(|name| if golden.has(&name) { golden.floats(&name) } else { Vec::new() })
                .collect(),
            rope: Rope::new(RopeStyle::Half, DIM, 1e4),
        }
    }
}

impl LayerSource for Prompt {
    fn num_layers(&self) -> usize {
        LAYERS
    }

    fn visit(
        &mut self,
        layer: usize,
        f: &mut dyn FnMut(&LayerInput<'_>) -> Result<()>,
    ) -> Result<()> {
        let rows = |list: &'static str, h: usize, width: usize| match list {
            "keys" => &self.keys[layer][h * LEN * width..][..LEN * width],
            "values" => &self.values[layer][h * LEN * width..][..LEN * width],
            "queries" => &self.queries[layer][h * GROUP * LEN * width..][..GROUP * LEN * width],
            "query_mean" => &self.query_mean[layer][h * GROUP * width..][..GROUP * width],
            "query_covariance" => {
                &self.query_covariance[layer][h * GROUP * width..][..GROUP * width]
            }
            "gate_scores" => {
                let scores = &self.gate_scores[layer];
                &scores[scores.len() / HEADS * h..][..scores.len() / HEADS]
            }
            _ => &self.column_sums[layer][h * LEN..][..LEN],
        };
        let head = |h: usize| HeadInput {
            positions: &self.positions,
            keys: rows("keys", h, DIM),
            values: rows("values", h, DIM),
            queries: rows("queries", h, DIM),
            num_queries: LEN,
            column_sums: rows("column_sums", h, 1),
            query_mean: rows("query_mean", h, DIM),
            query_covariance: rows("query_covariance", h, DIM * DIM),
            gate_scores: rows("gate_scores", h, 1),
            replay_maxima: &[],
            last_row: &[],
            low_counts: &[],
        };
        f(&LayerInput {
            layer,
            num_layers: LAYERS,
            group: GROUP,
            head_dim: DIM,
            value_dim: DIM,
            sequence_len: LEN,
            heads: (0..HEADS).map(head).collect(),
            rope: Some(&self.rope),
            output_projection: (!self.output_projections[layer].is_empty()).then_some(
                OutputProjection {
                    weights: &self.output_projections[layer],
                    width: HEADS * GROUP * DIM,
                },
            ),
            attention_cosine: None,
        })
    }
}

fn indices(set: &KeepSet) -> Vec<usize> {
    set.iter().collect()
}

/// What this library does about a press of the reference.
enum Claim {
    /// This pipeline keeps the same tokens, `KEEP` being the fraction that stays, and has the same
    /// scores for tokens that it does not protect.
    Same(&'static str),
    /// The same tokens; the scores have another scale.
    SameTokens(&'static str),
    /// As `Same`, but the inputs are megabytes that are not in this repository: compared when
    /// `KVMGR_GOLDEN` names the full set.
    Large(&'static str),
    /// As `SameTokens`, with inputs as for `Large`.
    LargeTokens(&'static str),
    /// `tests/policy_replay.rs` compares it, with inputs as for `Large`.
    Replayed,
    /// Nothing yet: what it would take.
    Open(&'static str),
}

/// The press without `@RATIO`, and the claim.
const CLAIMS: &[(&str, Claim)] = {
    use Claim::{Large, LargeTokens, Open, Replayed, Same, SameTokens};
    &[
        ("streaming_llm", SameTokens("stream(4) | keep(KEEP)")),
        ("snapkv", Same("snapkv | keep(KEEP)")),
        ("snapkv_w32_k7", Same("snapkv(w=32, kernel=7) | keep_tokens(256)")),
        ("adakv_snapkv", Same("snapkv(64, 5) | adakv(0.2) | keep(KEEP)")),
        ("keyrerotation_snapkv", Same("snapkv(64, 5) | keep(KEEP) | pos(cache_relative)")),
        ("pyramidkv", Same("snapkv | pyramid(w=64, beta=20) | keep(KEEP)")),
        ("knorm", Same("knorm | keep(KEEP)")),
        ("keydiff", Same("keydiff | keep(KEEP)")),
        ("tova", Same("tova | keep(KEEP)")),
        ("observed_attention", Same("observed | keep(KEEP)")),
        // Scores are ranks, which rounding may swap; `lagkv_cross` compares what they rank.
        ("lagkv", SameTokens("lagkv | keep(KEEP)")),
        ("lagkv_cross", Same("lagkv(lag=64, cross=yes) | keep(KEEP)")),
        ("cur", Same("cur | keep(KEEP)")),
        ("finch", Same("finch(w=48) | keep(KEEP) | pos(cache_relative)")),
        // Every layer is lazy at threshold 0: sinks and a recent window of n_recent - n_last.
        ("simlayerkv", SameTokens("simlayer(threshold=0, sink=4, recent=128)")),
        ("expected_attention", Same("expected | keep(KEEP)")),
        ("expected_attention_nocov", Same("expected(cov=0) | keep(KEEP)")),
        ("expected_attention_eps1e-2", Same("expected(eps=1e-2) | keep(KEEP)")),
        ("adakv_expected_attention_e2", Same("expected(eps=1e-2) | adakv(0.2) | keep(KEEP)")),
        ("critical_expected_attention", Large("expected(vnorm=0) | critical | keep(KEEP)")),
        ("cap", Same("capkv | keep(KEEP)")),
        ("lukv", Same("expected(eps=2e-2) | protect(4, 1) | lukv(file=FILE) | keep(KEEP)")),
        ("critical_snapkv", Large("snapkv | critical | keep(KEEP)")),
        ("critical_adakv_snapkv", LargeTokens("snapkv | critical | adakv(0.2) | keep(KEEP)")),
        ("leverage", Same("leverage(file=FILE) | keep(KEEP)")),
        ("compactor", Same("compactor(file=FILE) | keep(KEEP)")),
        ("noncausal_attn", Same("noncausal | keep(KEEP)")),
        ("qfilter", Same("qfilter(file=FILE) | keep(KEEP)")),
        ("duo_attention", SameTokens("duo(file=FILE, sink=16, recent=64, ratio=0.5)")),
        // The scores of these are those before the map, which others compare.
        ("chunkkv_snapkv", SameTokens("snapkv | chunk(20) | keep(KEEP)")),
        ("entropy_chunkkv_snapkv", SameTokens("snapkv | entropy_chunk | keep(KEEP)")),
        ("chunk_knorm", SameTokens("knorm | quota(200) | keep(KEEP)")),
        ("block_keydiff", SameTokens("keydiff | blockwise(128) | keep(KEEP)")),
        // The threshold of the reference is the score of a token; a bit lower it is decisive.
        ("dms_kvzap_linear", Large("kvzap(file=FILE) | protect(0, 128) | tau(0.083353)")),
        ("dms_kvzap_mlp", Large("kvzap(file=FILE) | protect(0, 128) | tau(0.036767)")),
        ("fastkvzip", Large("fastkvzip(file=FILE) | global | keep(KEEP)")),
        ("kvzip", Replayed),
        ("kvzip_plus", Replayed),
        ("merging_snapkv", SameTokens("snapkv | keep(KEEP) | merge")),
        ("cam_knorm", SameTokens("knorm | agree | keep_tokens(256) | cam(m=32, candidates=64)")),
        ("think", Open("channels of keys are not stored one by one: zeros would free nothing")),
    ]
};

/// Runs `spec` on the prompt and compares its keep sets, and its scores of unprotected tokens.
fn check_press(golden: &Golden, press: &str, spec: &str, has_scores: bool) {
    let file = weights(golden, press);
    let path = file.path().to_str().expect("a path in UTF-8");
    let pipeline = Pipeline::parse(&spec.replace("FILE", &format!("\"{path}\""))).expect(spec);
    let mut prompt = Prompt::new(golden);
    if pipeline.needs().contains(Needs::HIDDEN) {
        for (layer, scores) in prompt.gate_scores.iter_mut().enumerate() {
            let hidden = golden.floats(&format!("states/l{layer}.hidden"));
            *scores = pipeline.gate(layer, HEADS, &hidden, hidden.len() / LEN).expect(spec);
        }
    }
    let kept = pipeline.select(Event::PrefillEnd, &mut prompt).expect(spec);
    let margin = format!("{press}/min_margin");
    let decisive = !golden.has(&margin) || golden.floats(&margin)[0] > 1e-6;
    for (layer, heads) in kept.iter().enumerate() {
        for (head, set) in heads.iter().enumerate() {
            let expected = golden.kept(press, layer, head);
            assert_eq!(set.len(), expected.len(), "{press} layer {layer} head {head}");
            if decisive {
                assert_eq!(indices(set), expected, "{press} layer {layer} head {head}");
            }
        }
        if !has_scores {
            continue;
        }
        let expected = golden.scores(press, layer);
        let mut check = |input: &LayerInput<'_>| {
            let scores = pipeline.score(Event::PrefillEnd, input)?;
            for (found, expected) in scores.iter().zip(expected.chunks_exact(LEN)) {
                check_scores(found, expected, press);
            }
            Ok(())
        };
        prompt.visit(layer, &mut check).expect(spec);
    }
}

/// Name here, name of the reference and shape of the weights of a gate.
fn gates(press: &str) -> Vec<(&'static str, &'static str, Vec<usize>)> {
    let hidden = 512;
    match press {
        "dms_kvzap_linear" => {
            vec![("weight", "weight", vec![HEADS, hidden]), ("bias", "bias", vec![HEADS])]
        }
        "dms_kvzap_mlp" => vec![
            ("0.weight", "0_weight", vec![32, hidden]),
            ("0.bias", "0_bias", vec![32]),
            ("2.weight", "2_weight", vec![HEADS, 32]),
            ("2.bias", "2_bias", vec![HEADS]),
        ],
        "fastkvzip" => vec![
            ("q_proj.weight", "q_proj_weight", vec![HEADS * GROUP * 16, hidden]),
            ("q_proj.bias", "q_proj_bias", vec![HEADS * GROUP * 16]),
            ("k_proj.weight", "k_proj_weight", vec![HEADS * 16, hidden]),
            ("q_norm.weight", "q_norm_weight", vec![16]),
            ("k_norm.weight", "k_norm_weight", vec![16]),
            ("k_base", "k_base", vec![HEADS, 1, 16, 16]),
            ("b", "b", vec![HEADS, 1, GROUP]),
        ],
        _ => Vec::new(),
    }
}

/// The weights of a press in a file, under the names that this library reads.
fn weights(golden: &Golden, press: &str) -> tempfile::NamedTempFile {
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut copy = |from: String, to: String, shape: Vec<usize>| {
        let data = golden.floats(&from).iter().flat_map(|x| x.to_le_bytes()).collect();
        tensors.push((to, shape, data));
    };
    for layer in 0..LAYERS {
        let sketch = (format!("leverage@0.5/l{layer}.sketch"), format!("layers.{layer}.sketch"));
        let base = press.split('@').next().unwrap_or(press);
        match base {
            "leverage" | "compactor" => copy(sketch.0, sketch.1, vec![HEADS, DIM, 48]),
            "qfilter" => copy(
                format!("qfilter@0.5/l{layer}.filter"),
                format!("layers.{layer}.filter"),
                vec![HEADS, DIM],
            ),
            _ => {}
        }
        for (name, reference, shape) in gates(base) {
            let from = format!("{press}/l{layer}.{reference}");
            if golden.has(&from) {
                copy(from, format!("layers.{layer}.{name}"), shape);
            }
        }
    }
    let mut table = |name: &str, shape: Vec<usize>, values: Vec<f32>| {
        let data = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        tensors.push((name.to_string(), shape, data));
    };
    // The tables that the manifest of the reference states.
    if press.starts_with("lukv") {
        let weights = [0.6, 1.2, 0.9, 1.3f32];
        let ratio = |i: usize| ((i / 4 + 1) as f32 / 100.0 * weights[i % 4]).clamp(0.0, 0.99);
        table("curve", vec![99, LAYERS, HEADS], (0..99 * 4).map(ratio).collect());
    }
    if press == "duo_attention" {
        table("alpha", vec![LAYERS, HEADS], vec![0.0, 1.0, 1.0, 0.0]);
    }
    let views: Vec<_> = tensors
        .iter()
        .map(|tensor| {
            let (name, shape, data) = tensor;
            let view =
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data);
            (name.clone(), view.expect("a tensor of its shape"))
        })
        .collect();
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    safetensors::serialize_to_file(views, None, file.path()).expect("weights can be written");
    file
}

/// Compares the scores of tokens that are not protected: relative to themselves, or to the mean
/// size of a score where signs cancel.
fn check_scores(found: &HeadScores, expected: &[f32], press: &str) {
    // Leverage inverts a matrix; the reference does so in f32.
    let is_inverse = press.starts_with("leverage") || press.starts_with("compactor");
    let tolerance = if is_inverse { 5e-5 } else { TOLERANCE };
    let open = || (0..LEN).filter(|i| !found.protected[*i]);
    assert!(open().count() > 0, "{press}: everything is protected");
    let mean = open().map(|i| expected[i].abs()).sum::<f32>() / open().count() as f32;
    let has_signs = open().any(|i| expected[i] < 0.0) && open().any(|i| expected[i] > 0.0);
    for i in open() {
        let size = if has_signs { expected[i].abs().max(mean) } else { expected[i].abs() };
        let error = f64::from((found.scores[i] - expected[i]).abs());
        let limit = tolerance * f64::from(size);
        assert!(
            error <= limit,
            "{press}: token {i} is {}, must be {}",
            found.scores[i],
            expected[i]
        );
    }
}

#[test]
fn exactly_the_window_of_snapkv_is_protected() {
    let golden = Golden::open();
    let specs = [
        ("snapkv | keep(0.5)", 64),
        ("snapkv(64, 5) | adakv(0.2) | keep(0.5)", 64),
        ("snapkv(w=32, kernel=7) | keep_tokens(256)", 32),
    ];
    for (spec, window) in specs {
        let pipeline = Pipeline::parse(spec).expect(spec);
        let mut prompt = Prompt::new(&golden);
        for layer in 0..prompt.num_layers() {
            let mut check = |input: &LayerInput<'_>| {
                for found in pipeline.score(Event::PrefillEnd, input)? {
                    let is_right = |(i, p): (usize, &bool)| *p == (i + window >= LEN);
                    assert!(found.protected.iter().enumerate().all(is_right), "{spec}");
                }
                Ok(())
            };
            prompt.visit(layer, &mut check).expect(spec);
        }
    }
}

#[test]
fn every_press_of_the_manifest_is_claimed_and_agrees() {
    let golden = Golden::open();
    let mut open = 0;
    for press in MANIFEST.lines() {
        let (name, removed) = press.split_once('@').unwrap_or((press, "0"));
        let claim = CLAIMS.iter().find(|(claimed, _)| *claimed == name);
        let (_, claim) = claim.unwrap_or_else(|| panic!("nobody claims {press}"));
        let keep = (1.0 - removed.parse::<f64>().expect("a ratio")).to_string();
        let is_there =
            ["kept", "kept_flat"].iter().any(|list| golden.has(&format!("{press}/l0.{list}")));
        match claim {
            Claim::Same(spec) => check_press(&golden, press, &spec.replace("KEEP", &keep), true),
            Claim::SameTokens(spec) => {
                check_press(&golden, press, &spec.replace("KEEP", &keep), false);
            }
            Claim::Large(spec) if is_there => {
                check_press(&golden, press, &spec.replace("KEEP", &keep), true);
            }
            Claim::LargeTokens(spec) if is_there => {
                check_press(&golden, press, &spec.replace("KEEP", &keep), false);
            }
            Claim::Large(_) | Claim::LargeTokens(_) | Claim::Replayed => {}
            Claim::Open(reason) => {
                assert!(!reason.is_empty());
                open += 1;
            }
        }
    }
    for (claimed, _) in CLAIMS {
        let is_there = |press: &str| press.split('@').next() == Some(claimed);
        assert!(MANIFEST.lines().any(is_there), "the manifest has no {claimed}");
    }
    assert!(open < MANIFEST.lines().count());
}

#[test]
fn d2o_merges_values_as_its_reference_does() {
    let golden = Golden::open();
    if !golden.has("d2o_like/l0.h0.v") {
        return; // Only in the full set.
    }
    check_values(&golden, "h2o(recent=64, heavy=192) | d2o", |layer, kept| {
        let mut values = Vec::new();
        for (head, kept) in kept.iter().enumerate() {
            let place = format!("d2o_like/l{layer}.h{head}");
            assert_eq!(indices(&kept.set), golden.indices(&format!("{place}.kept")));
            values.extend(golden.floats(&format!("{place}.v")));
        }
        values
    });
}

/// Values of survivors after an act, against `expected` `[HEADS, kept, DIM]` of each layer.
fn check_values(golden: &Golden, spec: &str, expected: impl Fn(usize, &[Kept]) -> Vec<f32>) {
    let pipeline = Pipeline::parse(spec).expect(spec);
    let mut prompt = Prompt::new(golden);
    for layer in 0..LAYERS {
        let kept = pipeline.select_layer(Event::PrefillEnd, &mut prompt, layer).expect(spec);
        let expected = expected(layer, &kept);
        let found: Vec<f32> = kept.iter().flat_map(|kept| kept.values.clone()).collect();
        assert_eq!(found.len(), expected.len(), "{spec}");
        let size = expected.iter().map(|x| x.abs()).fold(0.0, f32::max);
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() <= 1e-5 * size, "{spec}: {found} and {expected}");
        }
    }
}

#[test]
fn merged_values_agree_with_the_reference() {
    let golden = Golden::open();
    let name = |layer: usize| format!("merging_snapkv@0.5/l{layer}.merged_values_sorted");
    if golden.has(&name(0)) {
        check_values(&golden, "snapkv | keep(0.5) | merge", |layer, _| golden.floats(&name(layer)));
    }
    // The reference draws what is merged with these probabilities; here they are weights.
    let spec = "knorm | agree | keep_tokens(256) | cam(m=32, candidates=64)";
    check_values(&golden, spec, |layer, kept| {
        let values = golden.floats(&format!("states/l{layer}.v"));
        let parts = golden.floats(&format!("cam_knorm/l{layer}.merge_prob"));
        let scores = golden.scores("knorm@0.5", layer);
        let mean = |i: usize| scores[i] + scores[LEN + i];
        let survivors = indices(&kept[0].set);
        let mut gone: Vec<usize> = (0..LEN).filter(|i| !survivors.contains(i)).collect();
        gone.sort_by(|a, b| mean(*b).total_cmp(&mean(*a)).then(b.cmp(a)));
        gone.truncate(64);
        gone.sort_unstable();
        let mut out = Vec::new();
        for head in 0..HEADS {
            let row = |i: usize| &values[(head * LEN + i) * DIM..][..DIM];
            let first = out.len();
            survivors.iter().for_each(|i| out.extend_from_slice(row(*i)));
            for (i, part) in gone.iter().zip(&parts[head * 64..]) {
                let start = survivors.partition_point(|survivor| survivor < i);
                let window = start..(start + 32).min(survivors.len());
                for at in window.clone() {
                    let target = &mut out[first + at * DIM..][..DIM];
                    let weight = part / window.len() as f32;
                    target.iter_mut().zip(row(*i)).for_each(|(x, v)| *x += weight * v);
                }
            }
        }
        out
    });
}

#[test]
fn heavy_hitters_of_a_prompt_are_the_top_column_sums() {
    let golden = Golden::open();
    let pipeline = Pipeline::parse("h2o(recent=64, heavy=192)").unwrap();
    let kept = pipeline.select(Event::PrefillEnd, &mut Prompt::new(&golden)).unwrap();
    for (layer, heads) in kept.iter().enumerate() {
        for (head, set) in heads.iter().enumerate() {
            let expected = golden.indices(&format!("h2o_prefill/l{layer}.h{head}.kept"));
            assert_eq!(indices(set), expected, "layer {layer} head {head}");
        }
    }
}
