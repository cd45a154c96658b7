//! Policies against vectors that other programs made; `tests/golden/README.md` names them.

use kvmgr::error::Result;
use std::path::PathBuf;

use kvmgr::policy::{
    Event, HeadInput, HeadScores, LayerInput, LayerSource, OutputProjection, Pipeline,
};
use kvmgr::shape::{KeepSet, Rope, RopeStyle};
use safetensors::SafeTensors;

/// Every press of the full set of vectors.
static MANIFEST: &str = include_str!("golden/policy_manifest.txt");
static FILE: &[u8] = include_bytes!("golden/policy_subset.safetensors");

const LAYERS: usize = 2;
const HEADS: usize = 2;
const GROUP: usize = 4;
const DIM: usize = 64;
const LEN: usize = 512;
/// Tokens of the prompt of a decode trace.
const PROMPT: usize = 256;
/// Scores agree up to this relative error.
const TOLERANCE: f64 = 2e-5;

/// Files with vectors: the one of this repository and, if `KVMGR_GOLDEN` names the folder of the full
/// set, that as well.
struct Golden(Vec<(&'static str, SafeTensors<'static>)>);

impl Golden {
    fn open() -> Self {
        let parse = |bytes: &'static [u8]| SafeTensors::deserialize(bytes).expect("a whole file");
        let mut files = vec![("", parse(FILE))];
        if let Some(folder) = std::env::var_os("KVMGR_GOLDEN") {
            for (prefix, file) in
                [("", "press_T512"), ("states/", "states_T512"), ("weights/", "model_weights")]
            {
                let path = PathBuf::from(&folder).join(format!("{file}.safetensors"));
                let bytes = std::fs::read(&path).expect("KVMGR_GOLDEN names the full set");
                files.push((prefix, parse(bytes.leak())));
            }
        }
        Self(files)
    }

    fn tensor(&self, name: &str) -> Option<safetensors::tensor::TensorView<'static>> {
        let find = |(prefix, file): &(&str, SafeTensors<'static>)| {
            file.tensor(name.strip_prefix(prefix)?).ok()
        };
        self.0.iter().find_map(find)
    }

    fn has(&self, name: &str) -> bool {
        self.tensor(name).is_some()
    }

    fn bytes(&self, name: &str) -> &'static [[u8; 4]] {
        let tensor = self.tensor(name).unwrap_or_else(|| panic!("no {name}"));
        tensor.data().as_chunks().0
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.bytes(name).iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    fn indices(&self, name: &str) -> Vec<usize> {
        self.bytes(name).iter().map(|bytes| i32::from_le_bytes(*bytes) as usize).collect()
    }

    /// The scores of a press, which may be stored once for all ratios.
    fn scores(&self, press: &str, layer: usize) -> Vec<f32> {
        let own = format!("{press}/l{layer}.score");
        if self.has(&own) {
            return self.floats(&own);
        }
        let base = press.split('@').next().unwrap_or(press);
        self.floats(&format!("{base}@0.5/l{layer}.score"))
    }

    /// The kept indices of one head of a press.
    fn kept(&self, press: &str, layer: usize, head: usize) -> Vec<usize> {
        let place = format!("{press}/l{layer}");
        if self.has(&format!("{place}.kept")) {
            let kept = self.indices(&format!("{place}.kept"));
            return kept
                .chunks(kept.len() / HEADS)
                .nth(head)
                .expect("one part for each head")
                .to_vec();
        }
        let ends = self.indices(&format!("{place}.kept_cu"));
        self.indices(&format!("{place}.kept_flat"))[ends[head]..ends[head + 1]].to_vec()
    }
}

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
        };
        f(&LayerInput {
            layer,
            num_layers: LAYERS,
            group: GROUP,
            head_dim: DIM,
            sequence_len: LEN,
            heads: (0..HEADS).map(head).collect(),
            rope: Some(&self.rope),
            output_projection: (!self.output_projections[layer].is_empty()).then_some(
                OutputProjection {
                    weights: &self.output_projections[layer],
                    width: HEADS * GROUP * DIM,
                },
            ),
        })
    }
}

fn indices(set: &KeepSet) -> Vec<usize> {
    set.iter().collect()
}

fn assert_close(found: impl Iterator<Item = f32>, expected: &[f32], tolerance: f64, name: &str) {
    for (i, (found, expected)) in found.zip(expected).enumerate() {
        let error = f64::from((found - expected).abs());
        let limit = tolerance * f64::from(expected.abs());
        assert!(error <= limit, "{name}: element {i} is {found}, must be {expected}");
    }
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
    /// Nothing yet: what it would take.
    Open(&'static str),
}

/// The press without `@RATIO`, and the claim.
const CLAIMS: &[(&str, Claim)] = {
    use Claim::{Large, Open, Same, SameTokens};
    const HIDDEN: &str = "hidden states and weights from a file";
    const REPLAY: &str = "queries of a second pass, and an allowance over all layers";
    const TABLE: &str = "a table of heads from a file";
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
        ("simlayerkv", SameTokens("stream(sink=4, recent=127)")),
        ("expected_attention", Same("expected | keep(KEEP)")),
        ("expected_attention_nocov", Same("expected(cov=0) | keep(KEEP)")),
        ("expected_attention_eps1e-2", Same("expected(eps=1e-2) | keep(KEEP)")),
        ("adakv_expected_attention_e2", Same("expected(eps=1e-2) | adakv(0.2) | keep(KEEP)")),
        ("critical_expected_attention", Large("expected(vnorm=0) | critical | keep(KEEP)")),
        ("cap", Same("capkv | keep(KEEP)")),
        ("lukv", Open(TABLE)),
        ("critical_snapkv", Large("snapkv | critical | keep(KEEP)")),
        ("critical_adakv_snapkv", Large("snapkv | critical | adakv(0.2) | keep(KEEP)")),
        ("leverage", Same("leverage(file=FILE) | keep(KEEP)")),
        ("compactor", Same("compactor(file=FILE) | keep(KEEP)")),
        ("noncausal_attn", Same("noncausal | keep(KEEP)")),
        ("qfilter", Open(TABLE)),
        ("duo_attention", Open(TABLE)),
        // The scores of these are those before the map, which others compare.
        ("chunkkv_snapkv", SameTokens("snapkv | chunk(20) | keep(KEEP)")),
        ("entropy_chunkkv_snapkv", SameTokens("snapkv | entropy_chunk | keep(KEEP)")),
        ("chunk_knorm", SameTokens("knorm | quota(200) | keep(KEEP)")),
        ("block_keydiff", SameTokens("keydiff | blockwise(128) | keep(KEEP)")),
        ("dms_kvzap_linear", Open(HIDDEN)),
        ("dms_kvzap_mlp", Open(HIDDEN)),
        ("fastkvzip", Open(HIDDEN)),
        ("kvzip", Open(REPLAY)),
        ("kvzip_plus", Open(REPLAY)),
        ("merging_snapkv", Open("evicted values merged into survivors")),
        ("cam_knorm", Open("evicted values merged into survivors")),
        ("think", Open("pruning of key channels")),
    ]
};

/// Runs `spec` on the prompt and compares its keep sets, and its scores of unprotected tokens.
fn check_press(golden: &Golden, press: &str, spec: &str, has_scores: bool) {
    let file = weights(golden, press);
    let path = file.path().to_str().expect("a path in UTF-8");
    let pipeline = Pipeline::parse(&spec.replace("FILE", &format!("\"{path}\""))).expect(spec);
    let mut prompt = Prompt::new(golden);
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

/// The weights of a press in a file, under the names that this library reads.
fn weights(golden: &Golden, press: &str) -> tempfile::NamedTempFile {
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut copy = |from: String, to: String, shape: Vec<usize>| {
        let data = golden.floats(&from).iter().flat_map(|x| x.to_le_bytes()).collect();
        tensors.push((to, shape, data));
    };
    for layer in 0..LAYERS {
        let sketch = (format!("leverage@0.5/l{layer}.sketch"), format!("layers.{layer}.sketch"));
        match press.split('@').next() {
            Some("leverage" | "compactor") => copy(sketch.0, sketch.1, vec![HEADS, DIM, 48]),
            _ => {}
        }
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
        match claim {
            Claim::Same(spec) => check_press(&golden, press, &spec.replace("KEEP", &keep), true),
            Claim::SameTokens(spec) => {
                check_press(&golden, press, &spec.replace("KEEP", &keep), false);
            }
            Claim::Large(spec)
                if golden.has(&format!("{press}/l0.kept_flat"))
                    || golden.has(&format!("{press}/l0.kept")) =>
            {
                check_press(&golden, press, &spec.replace("KEEP", &keep), true);
            }
            Claim::Large(spec) => _ = spec,
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

/// One KV head that decodes tokens `PROMPT..LEN`, with attention computed in f64.
struct Decoder<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    /// `[GROUP, LEN, DIM]`.
    queries: &'a [f32],
    kept: Vec<i32>,
    column_sums: Vec<f64>,
    /// Attention sees tokens at their index among the kept ones.
    cache_relative: Option<Rope>,
}

impl Decoder<'_> {
    /// Attention of the query at `position` over what is kept; adds to the column sums.
    fn attend(&mut self, position: usize) -> Vec<f64> {
        let row = |list: &[f32], i: usize| list[i * DIM..][..DIM].to_vec();
        let turned = |mut row: Vec<f32>, delta: usize| {
            if let Some(rope) = &self.cache_relative {
                rope.rotate(&mut row, -(delta as i32));
            }
            row
        };
        let mut out = Vec::new();
        for g in 0..GROUP {
            let query = row(self.queries, g * LEN + position);
            let query = turned(query, position + 1 - self.kept.len());
            let logit = |(i, p): (usize, &i32)| {
                let key = turned(row(self.keys, *p as usize), *p as usize - i);
                let products = key.iter().zip(&query).map(|(a, b)| f64::from(*a) * f64::from(*b));
                products.sum::<f64>() / (DIM as f64).sqrt()
            };
            let logits: Vec<f64> = self.kept.iter().enumerate().map(logit).collect();
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
            let mut output = vec![0.0; DIM];
            for ((x, p), total) in logits.iter().zip(&self.kept).zip(&mut self.column_sums) {
                let probability = (x - max).exp() / sum;
                *total += probability;
                let value = row(self.values, *p as usize);
                output.iter_mut().zip(value).for_each(|(o, v)| *o += probability * f64::from(v));
            }
            out.extend(output);
        }
        out
    }

    fn push(&mut self, position: usize) {
        self.kept.push(position as i32);
        self.column_sums.push(0.0);
    }

    fn select(&mut self, pipeline: &Pipeline, event: Event) {
        let set = pipeline.select(event, self).expect("input that fits").remove(0).remove(0);
        self.kept = set.iter().map(|i| self.kept[i]).collect();
        self.column_sums = set.iter().map(|i| self.column_sums[i]).collect();
    }
}

impl LayerSource for Decoder<'_> {
    fn num_layers(&self) -> usize {
        1
    }

    fn visit(&mut self, _: usize, f: &mut dyn FnMut(&LayerInput<'_>) -> Result<()>) -> Result<()> {
        let column_sums: Vec<f32> = self.column_sums.iter().map(|sum| *sum as f32).collect();
        let head =
            HeadInput { positions: &self.kept, column_sums: &column_sums, ..HeadInput::default() };
        f(&LayerInput {
            num_layers: 1,
            group: GROUP,
            head_dim: DIM,
            sequence_len: self.kept.last().map_or(0, |last| *last as usize + 1),
            heads: vec![head],
            ..LayerInput::default()
        })
    }
}

/// Calls `run(layer, head, decoder)` for every head, with nothing decoded yet.
fn for_each_decoder(golden: &Golden, mut run: impl FnMut(usize, usize, Decoder<'_>)) {
    for layer in 0..LAYERS {
        let load = |name: &str| golden.floats(&format!("states/l{layer}.{name}"));
        let (keys, values, queries) = (load("k"), load("v"), load("q"));
        for head in 0..HEADS {
            let decoder = Decoder {
                keys: &keys[head * LEN * DIM..][..LEN * DIM],
                values: &values[head * LEN * DIM..][..LEN * DIM],
                queries: &queries[head * GROUP * LEN * DIM..][..GROUP * LEN * DIM],
                kept: Vec::new(),
                column_sums: Vec::new(),
                cache_relative: None,
            };
            run(layer, head, decoder);
        }
    }
}

/// Compares the output of a step with the trace, for the steps that the trace has.
fn check_output(golden: &Golden, name: &str, head: usize, step: usize, out: &[f64], limit: f64) {
    let Some(row) = [0, 1, 16, 64, 128, 255].iter().position(|s| *s == step) else { return };
    let expected = golden.floats(&format!("{name}.attn_out"));
    let expected = &expected[(row * HEADS + head) * GROUP * DIM..][..GROUP * DIM];
    for (found, expected) in out.iter().zip(expected) {
        let error = (found - f64::from(*expected)).abs();
        assert!(error < limit, "{name} head {head} step {step}: {found}, must be {expected}");
    }
}

#[test]
fn h2o_follows_the_reference_step_by_step() {
    let golden = Golden::open();
    for (trace, spec) in [
        ("h2o_hh96_r32", "h2o(recent=32, heavy=96)"),
        ("h2o_hh32_r96", "h2o(recent=96) | keep_tokens(128)"),
    ] {
        let pipeline = Pipeline::parse(spec).unwrap();
        for_each_decoder(&golden, |layer, head, mut decoder| {
            let name = format!("{trace}/l{layer}.h{head}");
            for position in 0..PROMPT {
                decoder.push(position);
                decoder.attend(position);
            }
            decoder.select(&pipeline, Event::PrefillEnd);
            check_kept(&golden, &format!("{name}.kept_prefill"), &decoder);
            for step in 0..LEN - PROMPT {
                decoder.push(PROMPT + step);
                let out = decoder.attend(PROMPT + step);
                check_output(&golden, &format!("{trace}/l{layer}"), head, step, &out, 1e-5);
                assert!(pipeline.is_due(Event::Step, step + 1, 129, PROMPT + step + 1));
                decoder.select(&pipeline, Event::Step);
                assert_eq!(decoder.kept.len(), 128);
                check_kept(&golden, &format!("{name}.kept_{step}"), &decoder);
            }
            let scores = decoder.column_sums.iter().map(|sum| *sum as f32);
            assert_close(scores, &golden.floats(&format!("{name}.final_score")), TOLERANCE, &name);
        });
    }
}

/// Compares what is kept with the trace, if the trace has this step.
fn check_kept(golden: &Golden, name: &str, decoder: &Decoder<'_>) {
    if golden.has(name) {
        let kept: Vec<usize> = decoder.kept.iter().map(|position| *position as usize).collect();
        assert_eq!(kept, golden.indices(name), "{name}");
    }
}

#[test]
fn streaming_follows_the_reference_in_both_position_modes() {
    let golden = Golden::open();
    // The states hold keys after RoPE with angles in f32; turning them back costs some accuracy.
    let modes = [("orig", "", None, 1e-5), ("cache", " | pos(cache_relative)", Some(()), 1e-4)];
    for (mode, suffix, relative, limit) in modes {
        let pipeline = Pipeline::parse(&format!("stream(sink=4, recent=124){suffix}")).unwrap();
        let trace = format!("streaming_s4_r124_{mode}_pos");
        for_each_decoder(&golden, |layer, head, mut decoder| {
            decoder.cache_relative = relative.map(|()| Rope::new(RopeStyle::Half, DIM, 1e4));
            (0..PROMPT).for_each(|position| decoder.push(position));
            decoder.select(&pipeline, Event::PrefillEnd);
            for step in 0..LEN - PROMPT {
                // The reference makes room before the token attends.
                decoder.push(PROMPT + step);
                decoder.select(&pipeline, Event::Step);
                assert_eq!(decoder.kept.len(), 128);
                let out = decoder.attend(PROMPT + step);
                check_output(&golden, &format!("{trace}/l{layer}"), head, step, &out, limit);
            }
        });
    }
}
