//! SnapKV: what the last queries of the prompt attend to.
//!
//! ```text
//! P[h, t, j]  = softmax over j of q[h, t] . k[j] / sqrt(d), causal, for the last w queries t
//! m[h, j]     = mean over t of P[h, t, j],          j < T - w
//! score[j]    = mean (or max) over the group's heads h of pool(m[h], kernel)[j]
//! ```
//!
//! The window itself is protected and counts towards the budget. Its columns are part of the
//! softmax. `avg` pooling divides by the kernel also at the edges. A prompt of at most `w` tokens
//! stays whole. If fewer queries were observed (the rest of the prompt came from a shared prefix),
//! the window is as short as they are. Computed in f32 on the SIMD kernels of the library.

use super::{Entry, Score, WindowProbabilities};
use crate::error::{Result, ensure};
use crate::policy::{Allowance, Event, HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::{LaneWidth, Needs};
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "snapkv",
    summary: "keeps what the last w queries of the prompt attend to",
    paper: "SnapKV, arXiv 2404.14469",
    params: &[
        Param {
            name: "w",
            help: "queries of the observation window",
            domain: Domain::Int { default: 64, min: 1, max: 4096 },
        },
        Param {
            name: "kernel",
            help: "width of the pooling window, odd",
            domain: Domain::Int { default: 5, min: 1, max: 255 },
        },
        Param {
            name: "pool",
            help: "how neighbours are pooled",
            domain: Domain::Choice(&["avg", "max"]),
        },
        Param {
            name: "agg",
            help: "how the query heads of a group are combined",
            domain: Domain::Choice(&["mean", "max"]),
        },
    ],
    needs: Needs::KEYS.union(Needs::QUERY_WINDOW),
    examples: &[
        "snapkv | keep(0.25)",
        "snapkv(w=32, kernel=7, pool=max, agg=max) | keep_tokens(128)",
        "every(16) | snapkv(w=16) | keep(0.5)",
    ],
    create: |args| {
        let kernel = args.count("kernel");
        ensure!(kernel % 2 == 1, InvalidArgument, "snapkv: kernel is {kernel}, must be odd");
        Ok(Box::new(SnapKv {
            window: args.count("w"),
            kernel,
            max_pool: args.text("pool") == "max",
            max_agg: args.text("agg") == "max",
        }))
    },
};

#[derive(Debug)]
struct SnapKv {
    window: usize,
    kernel: usize,
    max_pool: bool,
    max_agg: bool,
}

impl Score for SnapKv {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn query_window(&self) -> usize {
        self.window
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Head
    }

    fn events(&self, _allowance: Allowance) -> &'static [Event] {
        &[Event::PrefillEnd]
    }

    fn keeps_whole(&self) -> usize {
        self.window
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let mut probabilities = WindowProbabilities::new(simd::active());
        layer.heads.iter().map(|head| self.score_head(layer, head, &mut probabilities)).collect()
    }
}

impl SnapKv {
    fn score_head(
        &self,
        layer: &LayerInput<'_>,
        head: &HeadInput<'_>,
        probabilities: &mut WindowProbabilities,
    ) -> Result<HeadScores> {
        let (positions, len) = (head.positions, head.positions.len());
        if len <= self.window {
            return Ok(HeadScores { scores: vec![0.0; len], protected: vec![true; len] });
        }
        let window = head.num_queries.min(self.window);
        ensure!(window > 0, InvalidState, "snapkv has observed no queries of the last tokens");
        // Tokens of the window may have been evicted, so what a query sees goes by position.
        let up_to = |back: usize| {
            let last = i64::from(positions[len - 1]) - back as i64;
            positions.partition_point(|position| i64::from(*position) <= last)
        };
        let old = up_to(window);
        let dim = layer.head_dim;
        let mut scores = vec![0.0f32; len];
        let (mut mean, mut pooled) = (vec![0.0f32; old], vec![0.0f32; old]);
        for (g, queries) in head.queries.chunks_exact(head.num_queries * dim).enumerate() {
            let queries = &queries[(head.num_queries - window) * dim..];
            let rows = probabilities.compute(head.keys, queries, dim, |t| up_to(window - 1 - t));
            mean.fill(0.0);
            for row in rows.chunks_exact(len) {
                mean.iter_mut().zip(row).for_each(|(sum, p)| *sum += p);
            }
            mean.iter_mut().for_each(|sum| *sum /= window as f32);
            self.pool(&mean, &mut pooled);
            for (score, value) in scores.iter_mut().zip(&pooled) {
                *score = if self.max_agg && g > 0 { score.max(*value) } else { *score + value };
            }
        }
        if !self.max_agg {
            scores.iter_mut().for_each(|score| *score /= layer.group as f32);
        }
        Ok(HeadScores { scores, protected: (0..len).map(|i| i >= old).collect() })
    }

    fn pool(&self, values: &[f32], out: &mut [f32]) {
        let half = self.kernel / 2;
        for (i, out) in out.iter_mut().enumerate() {
            let near = &values[i.saturating_sub(half)..(i + half + 1).min(values.len())];
            *out = if self.max_pool {
                near.iter().copied().fold(f32::NEG_INFINITY, f32::max)
            } else {
                near.iter().sum::<f32>() / self.kernel as f32
            };
        }
    }
}
