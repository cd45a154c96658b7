//! KVzip: what the model reads of its prompt when it repeats it.
//!
//! ```text
//! maxima[h, j] = max over replaying tokens t of P[h, t, j], softmax over sinks, replayed and replaying
//! score[j]     = max over the group's heads h of maxima[h, j]
//! plus:          P[h, t, j] / |hidden state of t| and maxima[h, j] * |W_o[h] v[j]|_2
//! ```
//!
//! The engine runs its prompt a second time behind a request to repeat it; nothing of that is kept.
//! Compress once, ask many questions. Sinks are protected, and tokens that no replay covered.
//! Probabilities mean the same in every layer: `kvzip | global | keep(0.3)`.

use super::{Entry, Score};
use crate::error::{Result, bail, ensure};
use crate::policy::{HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "kvzip",
    summary: "keeps what the model reads when it repeats its prompt",
    paper: "KVzip, arXiv 2505.23416",
    params: &[
        Param {
            name: "sink",
            help: "leading tokens that stay",
            domain: Domain::Int { default: 4, min: 0, max: 1 << 20 },
        },
        Param {
            name: "plus",
            help: "yes: by what a token adds to the residual stream, not by probability alone",
            domain: Domain::Choice(&["no", "yes"]),
        },
    ],
    needs: PLUS,
    examples: &["kvzip | global | keep(0.3)", "kvzip(plus=yes) | global | keep(0.3)"],
    create: |args| {
        Ok(Box::new(KvZip { sink: args.count("sink"), plus: args.text("plus") == "yes" }))
    },
};

const PLUS: Needs =
    Needs::REPLAY.union(Needs::REPLAY_HIDDEN).union(Needs::VALUES).union(Needs::OUTPUT_PROJECTION);

#[derive(Debug)]
struct KvZip {
    sink: usize,
    plus: bool,
}

impl Score for KvZip {
    fn needs(&self) -> Needs {
        if self.plus { PLUS } else { Needs::REPLAY }
    }

    fn replay_sinks(&self) -> usize {
        self.sink
    }

    fn keeps_whole(&self) -> usize {
        self.sink
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let heads = layer.heads.iter().enumerate();
        heads.map(|(h, head)| self.score_head(layer, h, head)).collect()
    }
}

impl KvZip {
    fn score_head(
        &self,
        layer: &LayerInput<'_>,
        index: usize,
        head: &HeadInput<'_>,
    ) -> Result<HeadScores> {
        let len = head.positions.len();
        ensure!(
            !head.replay_maxima.is_empty() || len == 0,
            InvalidState,
            "kvzip has seen no replay; read the prompt again before it ends"
        );
        let mut scores = vec![f32::NAN; len];
        for (g, maxima) in head.replay_maxima.chunks_exact(len.max(1)).enumerate() {
            let sizes = self.output_sizes(layer, index * layer.group + g, head)?;
            for (j, (score, most)) in scores.iter_mut().zip(maxima).enumerate() {
                *score = score.max(most * sizes.get(j).copied().unwrap_or(1.0));
            }
        }
        let protected = scores.iter().enumerate().map(|(i, score)| i < self.sink || score.is_nan());
        let protected = protected.collect();
        scores.iter_mut().filter(|score| score.is_nan()).for_each(|score| *score = 0.0);
        Ok(HeadScores { scores, protected })
    }

    /// `|W_o v[j]|_2` of each token for a query head; empty without `plus`.
    fn output_sizes(
        &self,
        layer: &LayerInput<'_>,
        q_head: usize,
        head: &HeadInput<'_>,
    ) -> Result<Vec<f32>> {
        if !self.plus {
            return Ok(Vec::new());
        }
        let Some(projection) = layer.output_projection else {
            bail!(InvalidState, "kvzip needs the output projection of layer {}", layer.layer);
        };
        let (kernels, dim) = (simd::active(), layer.head_dim);
        // |W v|^2 = v' (W' W) v: the matrix is as small as a head.
        let mut gram = vec![0.0f32; dim * dim];
        for column in projection.columns(q_head, dim) {
            for (x, row) in column.iter().zip(gram.chunks_exact_mut(dim)) {
                kernels.axpy_f32(*x, column, row);
            }
        }
        let size = |value: &[f32]| {
            let parts = value.iter().zip(gram.chunks_exact(dim));
            let square: f32 = parts.map(|(x, row)| x * kernels.dot_f32(row, value)).sum();
            square.max(0.0).sqrt()
        };
        Ok(head.values.chunks_exact(dim).map(size).collect())
    }
}
