//! Attention against vectors that other programs made; `tests/golden/README.md` names them.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::sync::Arc;

use common::{config, relative_error};
use kvmgr::attention::{Attention, Options};
use kvmgr::device::tensor::{Tensor, TensorMut};
use kvmgr::dtype::DType;
use kvmgr::manager::Manager;
use kvmgr::sequence::{Observation, Sequence, SequenceConfig};
use kvmgr::shape::{KeepSet, LaneWidth, ModelShape, Needs};
use safetensors::SafeTensors;

static STATES: &[u8] = include_bytes!("golden/policy_subset.safetensors");
static EXPECTED: &[u8] = include_bytes!("golden/attention_subset.safetensors");

const SHAPE: ModelShape = ModelShape::new(2, 8, 2, 64);
const LEN: usize = 512;
const TOLERANCE: f64 = 1e-5;

fn words(file: &'static [u8], name: &str) -> Vec<[u8; 4]> {
    let file = SafeTensors::deserialize(file).unwrap();
    let tensor = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    tensor.data().as_chunks().0.to_vec()
}

fn floats(file: &'static [u8], name: &str) -> Vec<f32> {
    words(file, name).into_iter().map(f32::from_le_bytes).collect()
}

fn indices(file: &'static [u8], name: &str) -> Vec<usize> {
    words(file, name).into_iter().map(|bytes| i32::from_le_bytes(bytes) as usize).collect()
}

/// `[heads, tokens, dim]` to `[tokens, heads, dim]`.
fn tokens_first(rows: &[f32], heads: usize, tokens: usize) -> Vec<f32> {
    let dim = SHAPE.head_dim;
    (0..tokens)
        .flat_map(|t| (0..heads).flat_map(move |h| &rows[(h * tokens + t) * dim..][..dim]))
        .copied()
        .collect()
}

/// The model in the middle of its life: outputs of each layer, `[tokens, heads, dim]`.
struct Model {
    sequence: Sequence,
    attention: Attention,
}

impl Model {
    fn new() -> Self {
        let mut config = config(SHAPE, "full");
        config.dtype = DType::F32;
        config.lane_width = Some(LaneWidth::Head);
        let cache = Manager::new(config).unwrap().cache().clone();
        let observation = Some(Arc::new(Observation::new(&SHAPE, Needs::COLUMN_SUM, 0)));
        let sequence =
            Sequence::new(cache.clone(), SequenceConfig::default(), observation).unwrap();
        Self { sequence, attention: Attention::new(cache).unwrap() }
    }

    /// Feeds `n` tokens, whose states are called `states/LAYER.{prefix}{q,k,v}`.
    fn step(&mut self, n: usize, prefix: &str) -> Vec<Vec<f32>> {
        self.sequence.reserve(n).unwrap();
        self.attention.plan(&[(&self.sequence, n)]).unwrap();
        let outputs = (0..SHAPE.num_layers).map(|layer| {
            let state = |name: &str, heads: usize| {
                let rows = floats(STATES, &format!("states/l{layer}.{prefix}{name}"));
                tokens_first(&rows, heads, n)
            };
            let (heads, kv_heads, dim) = (SHAPE.num_q_heads, SHAPE.num_kv_heads, SHAPE.head_dim);
            let (key, value, query) =
                (state("k", kv_heads), state("v", kv_heads), state("q", heads));
            let key = Tensor::from_slice(&key, [n, kv_heads, dim]);
            let value = Tensor::from_slice(&value, [n, kv_heads, dim]);
            self.attention.append(layer, &key, Some(&value), 0, 1).unwrap();
            let mut output = vec![f32::NAN; query.len()];
            let query = Tensor::from_slice(&query, [n, heads, dim]);
            let out = TensorMut::from_slice(&mut output, [n, heads, dim]);
            self.attention.run(layer, &query, &out, None, &Options::default(), 0, 1).unwrap();
            output
        });
        let outputs = outputs.collect();
        self.sequence.commit(n, None).unwrap();
        outputs
    }
}

fn check(found: &[f32], expected: &[f32], what: &str) {
    for (head, (found, expected)) in
        found.chunks_exact(SHAPE.head_dim).zip(expected.chunks_exact(SHAPE.head_dim)).enumerate()
    {
        let expected: Vec<f64> = expected.iter().map(|x| f64::from(*x)).collect();
        let error = relative_error(found, &expected);
        assert!(error < TOLERANCE, "{what}, head {head}: {error}");
    }
}

#[test]
fn prompt_and_next_token_agree_with_transformers() {
    let mut model = Model::new();
    let outputs = model.step(LEN, "");
    let tokens = indices(EXPECTED, "tokens");
    for (layer, output) in outputs.iter().enumerate() {
        let expected = floats(EXPECTED, &format!("l{layer}.attn_out"));
        let expected = tokens_first(&expected, SHAPE.num_q_heads, tokens.len());
        let wide = SHAPE.num_q_heads * SHAPE.head_dim;
        for (i, token) in tokens.iter().enumerate() {
            let found = &output[token * wide..][..wide];
            check(found, &expected[i * wide..][..wide], &format!("layer {layer} token {token}"));
        }
        let sums = floats(STATES, &format!("states/l{layer}.column_sums"));
        for (head, expected) in sums.chunks_exact(LEN).enumerate() {
            let seen = model.sequence.observation().unwrap().head(layer, head).lock();
            let expected: Vec<f64> = expected.iter().map(|x| f64::from(*x)).collect();
            let error = relative_error(&seen.received.sums, &expected);
            assert!(error < TOLERANCE, "column sums of layer {layer} head {head}: {error}");
        }
    }
    for (layer, output) in model.step(1, "dec_").iter().enumerate() {
        let expected = floats(EXPECTED, &format!("l{layer}.dec_attn_full"));
        check(output, &expected, &format!("next token, layer {layer}"));
    }
}

/// The presses with an expected output of the next token.
fn presses() -> Vec<String> {
    let file = SafeTensors::deserialize(STATES).unwrap();
    let press = |name: &&str| name.strip_suffix("/l0.dec_attn").map(str::to_string);
    let mut presses: Vec<String> = file.names().iter().filter_map(press).collect();
    presses.sort_unstable();
    presses
}

/// What a press kept of one head, ascending.
fn kept(press: &str, layer: usize, head: usize) -> Vec<usize> {
    let name = |field: &str| format!("{press}/l{layer}.{field}");
    let is_ragged = SafeTensors::deserialize(STATES).unwrap().tensor(&name("kept_cu")).is_ok();
    let mut kept = if is_ragged {
        let ends = indices(STATES, &name("kept_cu"));
        indices(STATES, &name("kept_flat"))[ends[head]..ends[head + 1]].to_vec()
    } else {
        let kept = indices(STATES, &name("kept"));
        kept.chunks_exact(kept.len() / SHAPE.num_kv_heads).nth(head).unwrap().to_vec()
    };
    kept.sort_unstable();
    kept
}

#[test]
fn attention_over_what_a_press_kept_agrees_with_the_reference_program() {
    let mut prompt = Model::new();
    let _ = prompt.step(LEN, "");
    let presses = presses();
    assert!(presses.len() > 25, "{presses:?}");
    for press in presses {
        let mut model = Model {
            sequence: prompt.sequence.fork().unwrap(),
            attention: Attention::new(prompt.sequence.cache().clone()).unwrap(),
        };
        for layer in 0..SHAPE.num_layers {
            for head in 0..SHAPE.num_kv_heads {
                let lane = layer * SHAPE.num_kv_heads + head;
                let keep = KeepSet::from_indices(kept(&press, layer, head));
                model.sequence.compact(lane, &keep).unwrap();
            }
        }
        for (layer, output) in model.step(1, "dec_").iter().enumerate() {
            let expected = floats(STATES, &format!("{press}/l{layer}.dec_attn"));
            check(output, &expected, &format!("{press}, layer {layer}"));
        }
    }
}
