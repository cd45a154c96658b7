//! KVzap: a small model reads the hidden state and predicts the log of a token's KVzip+ score.
//!
//! ```text
//! linear:  score[h, j] = W[h] x[j] + b[h]
//! mlp:     score[h, j] = W2[h] gelu(W0 x[j] + b0) + b2[h]          gelu by the error function
//! ```
//!
//! File, as published: `layers.L.weight` `[num_kv_heads, hidden]` and `layers.L.bias`, or
//! `layers.L.0.weight` `[inner, hidden]`, `layers.L.0.bias`, `layers.L.2.weight` `[num_kv_heads, inner]`
//! and `layers.L.2.bias`. Meant for a threshold: `kvzap(...) | protect(4, 128) | tau(-4)`. Tokens whose
//! hidden state nobody handed over, those of a shared prefix, stay.

use super::{Entry, Score};
use crate::error::{Result, ensure};
use crate::policy::weights::Weights;
use crate::policy::{Allowance, Event, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "kvzap",
    summary: "keeps what a small model of hidden states predicts to matter",
    paper: "KVzap, arXiv 2601.07891",
    params: &[Param {
        name: "file",
        help: "a safetensors file with the models of all layers",
        domain: Domain::File,
    }],
    needs: Needs::HIDDEN,
    examples: &[
        "kvzap(file=\"kvzap.safetensors\") | protect(4, 128) | tau(-4)",
        "kvzap(file=\"kvzap.safetensors\") | global | keep(0.5)",
    ],
    create: |args| Ok(Box::new(KvZap { file: Weights::required(args, "file")? })),
};

#[derive(Debug)]
struct KvZap {
    file: Weights,
}

impl Score for KvZap {
    fn needs(&self) -> Needs {
        Needs::HIDDEN
    }

    fn events(&self, _allowance: Allowance) -> &'static [Event] {
        &[Event::PrefillEnd, Event::Step]
    }

    fn gate(
        &self,
        layer: usize,
        num_heads: usize,
        hidden: &[f32],
        width: usize,
    ) -> Result<Vec<f32>> {
        let name = |part: &str| format!("layers.{layer}.{part}");
        if !self.file.has(&name("0.weight")) {
            return self.linear((&name("weight"), &name("bias")), num_heads, hidden, width);
        }
        let shape = self.file.shape(&name("0.weight"))?;
        ensure!(
            shape.len() == 2,
            InvalidArgument,
            "kvzap: {} has shape {shape:?}, must have two dimensions",
            name("0.weight")
        );
        let inner = shape[0];
        let weights = (&*name("0.weight"), &*name("0.bias"));
        // [inner, n] to [n, inner].
        let columns = self.linear(weights, inner, hidden, width)?;
        let tokens = hidden.len() / width;
        let mut rows = vec![0.0f32; columns.len()];
        for (i, column) in columns.chunks_exact(tokens).enumerate() {
            column.iter().enumerate().for_each(|(t, x)| rows[t * inner + i] = gelu(*x));
        }
        self.linear((&name("2.weight"), &name("2.bias")), num_heads, &rows, inner)
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        Ok(layer.heads.iter().map(|head| of_gate(head.gate_scores)).collect())
    }
}

impl KvZap {
    /// `W x + b` for the rows `x` `[n, width]`: `[outputs, n]`.
    fn linear(
        &self,
        (weight, bias): (&str, &str),
        outputs: usize,
        rows: &[f32],
        width: usize,
    ) -> Result<Vec<f32>> {
        let weight = self.file.tensor(weight, &[outputs, width])?;
        let bias = self.file.tensor(bias, &[outputs])?;
        Ok(affine(weight, bias, rows, width))
    }
}

/// `W x + b` for the rows `x` `[n, width]`: `[outputs, n]`; no bias if it is empty.
pub(super) fn affine(weight: &[f32], bias: &[f32], rows: &[f32], width: usize) -> Vec<f32> {
    let kernels = simd::active();
    let mut out = Vec::with_capacity(weight.len() / width * (rows.len() / width));
    for (i, weight) in weight.chunks_exact(width).enumerate() {
        let bias = bias.get(i).copied().unwrap_or(0.0);
        out.extend(rows.chunks_exact(width).map(|row| kernels.dot_f32(weight, row) + bias));
    }
    out
}

/// The scores of a gate; tokens without one are protected.
pub(super) fn of_gate(scores: &[f32]) -> HeadScores {
    HeadScores {
        scores: scores.iter().map(|score| if score.is_nan() { 0.0 } else { *score }).collect(),
        protected: scores.iter().map(|score| score.is_nan()).collect(),
    }
}

/// `x` times the normal distribution up to `x`.
fn gelu(x: f32) -> f32 {
    let tail = 0.5 * erfc(f64::from(x.abs()) / std::f64::consts::SQRT_2);
    (f64::from(x) * if x > 0.0 { 1.0 - tail } else { tail }) as f32
}

/// The complementary error function of `x >= 0`, to 1.2e-7 of itself: a Chebyshev fit.
fn erfc(x: f64) -> f64 {
    const FIT: [f64; 10] = [
        -1.26551223,
        1.00002368,
        0.37409196,
        0.09678418,
        -0.18628806,
        0.27886807,
        -1.13520398,
        1.48851587,
        -0.82215223,
        0.17087277,
    ];
    let t = 1.0 / (1.0 + 0.5 * x);
    let exponent = FIT.iter().rev().fold(0.0, |sum, factor| sum * t + factor);
    t * (exponent - x * x).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gelu_agrees_with_an_integral() {
        for x in [-6.0f64, -2.5, -1.0, -0.1, 0.0, 0.3, 1.0, 3.0, 8.0] {
            let step = 1e-4;
            let density = |i: i32| (-0.5 * (f64::from(i) * step).powi(2)).exp();
            let area: f64 = (0..(x.abs() / step).round() as i32)
                .map(|i| (density(i) + density(i + 1)) / 2.0)
                .sum();
            let below = 0.5 + x.signum() * area * step / std::f64::consts::TAU.sqrt();
            assert!(
                (f64::from(gelu(x as f32)) - x * below).abs() < 1e-6,
                "{x}: {}",
                gelu(x as f32)
            );
        }
    }
}
