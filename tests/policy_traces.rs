//! Policies that act at each step against traces of other programs.

mod common;

use common::golden::{DIM, GROUP, Golden, HEADS, LAYERS, LEN, PROMPT, TOLERANCE};
use kvmgr::error::Result;
use kvmgr::policy::{Event, HeadInput, LayerInput, LayerSource, Pipeline};
use kvmgr::shape::{Rope, RopeStyle};

/// One KV head that decodes tokens `PROMPT..LEN`, with attention computed in f64.
struct Decoder<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    /// `[GROUP, LEN, DIM]`.
    queries: &'a [f32],
    kept: Vec<i32>,
    column_sums: Vec<f64>,
    /// Queries that gave each token less than an even share since the last eviction.
    low_counts: Vec<f32>,
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
        let mut sums = vec![0.0; self.kept.len()];
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
            for (i, (x, p)) in logits.iter().zip(&self.kept).enumerate() {
                let probability = (x - max).exp() / sum;
                self.column_sums[i] += probability;
                sums[i] += probability;
                let value = row(self.values, *p as usize);
                output.iter_mut().zip(value).for_each(|(o, v)| *o += probability * f64::from(v));
            }
            out.extend(output);
        }
        let even = 1.0 / self.kept.len() as f64;
        for (count, sum) in self.low_counts.iter_mut().zip(sums) {
            *count += if sum / (GROUP as f64) < even { 1.0 } else { 0.0 };
        }
        out
    }

    fn push(&mut self, position: usize) {
        self.kept.push(position as i32);
        self.column_sums.push(0.0);
        self.low_counts.push(0.0);
    }

    fn select(&mut self, pipeline: &Pipeline, event: Event) {
        let set = pipeline.select(event, self).expect("input that fits").remove(0).remove(0);
        self.kept = set.iter().map(|i| self.kept[i]).collect();
        self.column_sums = set.iter().map(|i| self.column_sums[i]).collect();
        self.low_counts = vec![0.0; self.kept.len()];
    }
}

impl LayerSource for Decoder<'_> {
    fn num_layers(&self) -> usize {
        1
    }

    fn visit(&mut self, _: usize, f: &mut dyn FnMut(&LayerInput<'_>) -> Result<()>) -> Result<()> {
        let column_sums: Vec<f32> = self.column_sums.iter().map(|sum| *sum as f32).collect();
        let head = HeadInput {
            positions: &self.kept,
            column_sums: &column_sums,
            low_counts: &self.low_counts,
            ..HeadInput::default()
        };
        f(&LayerInput {
            num_layers: 1,
            group: GROUP,
            head_dim: DIM,
            value_dim: DIM,
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
                low_counts: Vec::new(),
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

fn assert_close(found: impl Iterator<Item = f32>, expected: &[f32], tolerance: f64, name: &str) {
    for (i, (found, expected)) in found.zip(expected).enumerate() {
        let error = f64::from((found - expected).abs());
        let limit = tolerance * f64::from(expected.abs());
        assert!(error <= limit, "{name}: element {i} is {found}, must be {expected}");
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

#[test]
fn scissorhands_follows_the_reference_in_bulk() {
    let golden = Golden::open();
    let pipeline = Pipeline::parse("every(32) | scissorhands | keep_tokens(128)").unwrap();
    for_each_decoder(&golden, |layer, head, mut decoder| {
        let name = format!("scissorhands/l{layer}.h{head}");
        for position in 0..PROMPT {
            decoder.push(position);
            decoder.attend(position);
            if position + 64 < PROMPT {
                // Only the last 64 queries of the prompt count.
                decoder.low_counts.fill(0.0);
            }
        }
        decoder.select(&pipeline, Event::PrefillEnd);
        check_kept(&golden, &format!("{name}.kept_prefill"), &decoder);
        for step in 0..LEN - PROMPT {
            decoder.push(PROMPT + step);
            decoder.attend(PROMPT + step);
            let len = decoder.kept.len();
            if pipeline.is_due(Event::Step, step + 1, len, PROMPT + step + 1) {
                assert_eq!(len, 160);
                decoder.select(&pipeline, Event::Step);
                check_kept(&golden, &format!("{name}.kept_c{}", (step + 1) / 32), &decoder);
            }
        }
        assert!(golden.has(&format!("{name}.kept_c8")));
    });
}

/// All heads of a layer that decode together.
struct LayerDecoder<'a> {
    heads: Vec<Decoder<'a>>,
    position: usize,
}

impl LayerSource for LayerDecoder<'_> {
    fn num_layers(&self) -> usize {
        1
    }

    fn visit(&mut self, _: usize, f: &mut dyn FnMut(&LayerInput<'_>) -> Result<()>) -> Result<()> {
        let row = |rows: &[f32], i: usize| rows[i * DIM..][..DIM].to_vec();
        let keys = |head: &Decoder<'_>| -> Vec<f32> {
            head.kept.iter().flat_map(|p| row(head.keys, *p as usize)).collect()
        };
        let queries = |head: &Decoder<'_>| -> Vec<f32> {
            (0..GROUP).flat_map(|g| row(head.queries, g * LEN + self.position)).collect()
        };
        let keys: Vec<_> = self.heads.iter().map(keys).collect();
        let queries: Vec<_> = self.heads.iter().map(queries).collect();
        let input = |h: usize| HeadInput {
            positions: &self.heads[h].kept,
            keys: &keys[h],
            queries: &queries[h],
            num_queries: 1,
            ..HeadInput::default()
        };
        let heads = (0..self.heads.len()).map(input).collect();
        f(&LayerInput {
            num_layers: 1,
            group: GROUP,
            head_dim: DIM,
            value_dim: DIM,
            sequence_len: self.position + 1,
            heads,
            ..LayerInput::default()
        })
    }
}

#[test]
fn tova_follows_the_reference_step_by_step() {
    let golden = Golden::open();
    let pipeline = Pipeline::parse("tova(recent=0) | keep_tokens(128)").unwrap();
    for layer in 0..LAYERS {
        let load = |name: &str| golden.floats(&format!("states/l{layer}.{name}"));
        let (keys, values, queries) = (load("k"), load("v"), load("q"));
        let decoder = |head: usize| Decoder {
            keys: &keys[head * LEN * DIM..][..LEN * DIM],
            values: &values[head * LEN * DIM..][..LEN * DIM],
            queries: &queries[head * GROUP * LEN * DIM..][..GROUP * LEN * DIM],
            kept: (0..PROMPT as i32).collect(),
            column_sums: vec![0.0; PROMPT],
            low_counts: vec![0.0; PROMPT],
            cache_relative: None,
        };
        let mut decoders =
            LayerDecoder { heads: (0..HEADS).map(decoder).collect(), position: PROMPT - 1 };
        let name = format!("tova_c128/l{layer}");
        let select = |decoders: &mut LayerDecoder<'_>, event, kept: String| {
            let sets = pipeline.select(event, decoders).unwrap().remove(0);
            for (head, set) in decoders.heads.iter_mut().zip(sets) {
                head.kept = set.iter().map(|i| head.kept[i]).collect();
                check_kept(&golden, &kept, head);
            }
        };
        select(&mut decoders, Event::PrefillEnd, format!("{name}.kept_prefill"));
        for step in 0..LEN - PROMPT {
            decoders.position = PROMPT + step;
            for head in 0..HEADS {
                let decoder = &mut decoders.heads[head];
                decoder.push(PROMPT + step);
                decoder.column_sums.resize(decoder.kept.len(), 0.0);
                decoder.low_counts.resize(decoder.kept.len(), 0.0);
                let out = decoder.attend(PROMPT + step);
                check_output(&golden, &name, head, step, &out, 1e-5);
            }
            select(&mut decoders, Event::Step, format!("{name}.kept_{step}"));
        }
        assert!(golden.has(&format!("{name}.kept_255")));
    }
}
