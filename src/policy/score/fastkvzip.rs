//! FastKVzip: a small gate that was trained to answer what KVzip would.
//!
//! ```text
//! q[h, g] = rmsnorm(W_q x + b_q)    k[h] = rmsnorm(W_k x)           of `inner` elements each
//! l[g]    = q[g] . k / sqrt(inner) + b[h, g]      l_s[g] = q[g] . base[h, s] / sqrt(inner)
//! score   = mean over g of 1 / (1 + sum over s of exp(l_s[g] - l[g]))
//! ```
//!
//! File: `layers.L.q_proj.{weight,bias}`, `k_proj.weight`, `q_norm.weight`, `k_norm.weight`,
//! `k_base` `[num_kv_heads, 1, bases, inner]` and `b` `[num_kv_heads, 1, groups]`. Made for `global`. Sinks
//! and the newest `recent` of all tokens are protected, and tokens of a shared prefix.

use super::kvzap::{affine, of_gate};
use super::{Entry, Score};
use crate::error::{Result, ensure};
use crate::policy::weights::Weights;
use crate::policy::{HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "fastkvzip",
    summary: "keeps what a trained gate says a replay of the prompt would read",
    paper: "Fast KVzip, arXiv 2601.17668",
    params: &[
        Param {
            name: "file",
            help: "a safetensors file with the gates of all layers",
            domain: Domain::File,
        },
        Param {
            name: "sink",
            help: "leading tokens that stay",
            domain: Domain::Int { default: 4, min: 0, max: 1 << 20 },
        },
        Param {
            name: "recent",
            help: "fraction of all tokens, the newest, that stays, at least one; 4096 from 32000 on",
            domain: Domain::Real { default: 0.02, min: 0.0, max: 1.0 },
        },
    ],
    needs: Needs::HIDDEN,
    examples: &["fastkvzip(file=\"fastkvzip.safetensors\") | global | keep(0.5)"],
    create: |args| {
        Ok(Box::new(FastKvZip {
            file: Weights::required(args, "file")?,
            sink: args.count("sink"),
            recent: args.real("recent"),
        }))
    },
};

#[derive(Debug)]
struct FastKvZip {
    file: Weights,
    sink: usize,
    recent: f64,
}

impl Score for FastKvZip {
    fn needs(&self) -> Needs {
        Needs::HIDDEN
    }

    fn gate(
        &self,
        layer: usize,
        num_heads: usize,
        hidden: &[f32],
        width: usize,
    ) -> Result<Vec<f32>> {
        let name = |part: &str| format!("layers.{layer}.{part}");
        let base_shape = self.file.shape(&name("k_base"))?;
        let bias_shape = self.file.shape(&name("b"))?;
        ensure!(
            base_shape.len() == 4 && bias_shape.len() == 3,
            InvalidArgument,
            "fastkvzip: k_base has shape {base_shape:?}, b has {bias_shape:?}"
        );
        let (bases, inner, groups) = (base_shape[2], base_shape[3], bias_shape[2]);
        let rows = num_heads * groups * inner;
        let queries = affine(
            self.file.tensor(&name("q_proj.weight"), &[rows, width])?,
            self.file.tensor(&name("q_proj.bias"), &[rows])?,
            hidden,
            width,
        );
        let keys = self.file.tensor(&name("k_proj.weight"), &[num_heads * inner, width])?;
        let keys = affine(keys, &[], hidden, width);
        let gate = Gate {
            tokens: hidden.len() / width,
            inner,
            q_norm: self.file.tensor(&name("q_norm.weight"), &[inner])?,
            k_norm: self.file.tensor(&name("k_norm.weight"), &[inner])?,
        };
        let base = self.file.tensor(&name("k_base"), &[num_heads, 1, bases, inner])?;
        let bias = self.file.tensor(&name("b"), &[num_heads, 1, groups])?;
        let mut scores = Vec::with_capacity(num_heads * gate.tokens);
        for h in 0..num_heads {
            let base = &base[h * bases * inner..][..bases * inner];
            for token in 0..gate.tokens {
                let key = gate.normed(&keys, h, token, gate.k_norm);
                let opened = |g: usize| {
                    let query = gate.normed(&queries, h * groups + g, token, gate.q_norm);
                    gate.open(&query, &key, base, bias[h * groups + g])
                };
                scores.push((0..groups).map(opened).sum::<f32>() / groups as f32);
            }
        }
        Ok(scores)
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        Ok(layer.heads.iter().map(|head| self.score_head(head, layer.sequence_len)).collect())
    }
}

impl FastKvZip {
    fn score_head(&self, head: &HeadInput<'_>, seen: usize) -> HeadScores {
        let mut scores = of_gate(head.gate_scores);
        let len = scores.scores.len();
        let recent = match seen {
            0..32_000 => ((seen as f64 * self.recent) as usize).max(1),
            _ => 4096,
        };
        scores.protected[..self.sink.min(len)].fill(true);
        scores.protected[len - recent.min(len)..].fill(true);
        scores
    }
}

/// The shape of a gate and its norms.
struct Gate<'a> {
    tokens: usize,
    inner: usize,
    q_norm: &'a [f32],
    k_norm: &'a [f32],
}

impl Gate<'_> {
    /// Part `part` of a token of `[parts * inner, tokens]`, with a root mean square of 1, times `norm`.
    fn normed(&self, columns: &[f32], part: usize, token: usize, norm: &[f32]) -> Vec<f32> {
        let at = |c: usize| columns[(part * self.inner + c) * self.tokens + token];
        let squares: f32 = (0..self.inner).map(|c| at(c) * at(c)).sum();
        let scale = 1.0 / (squares / self.inner as f32 + 1e-6).sqrt();
        (0..self.inner).map(|c| at(c) * scale * norm[c]).collect()
    }

    /// How far the gate opens for a key, against the base keys `[bases, inner]`.
    fn open(&self, query: &[f32], key: &[f32], base: &[f32], bias: f32) -> f32 {
        let kernels = simd::active();
        let scale = 1.0 / (self.inner as f32).sqrt();
        let logit = kernels.dot_f32(query, key) * scale + bias;
        let others = base.chunks_exact(self.inner);
        let sum: f32 =
            others.map(|base| (kernels.dot_f32(query, base) * scale - logit).exp()).sum();
        1.0 / (1.0 + sum)
    }
}
