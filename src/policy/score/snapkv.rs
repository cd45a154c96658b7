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
//! stays whole.

use super::{Entry, Score, window_probabilities};
use crate::error::{Result, ensure};
use crate::policy::{Event, HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::{LaneWidth, Needs};

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
        Needs::KEYS.union(Needs::QUERY_WINDOW)
    }

    fn query_window(&self) -> usize {
        self.window
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Head
    }

    fn events(&self) -> &'static [Event] {
        &[Event::PrefillEnd]
    }

    fn score(&self, layer: &LayerInput<'_>, _budget: &[usize]) -> Result<Vec<HeadScores>> {
        Ok(layer.heads.iter().map(|head| self.score_head(layer, head)).collect())
    }
}

impl SnapKv {
    fn score_head(&self, layer: &LayerInput<'_>, head: &HeadInput<'_>) -> HeadScores {
        let len = head.positions.len();
        let window = head.num_queries.min(self.window);
        if len <= window {
            return HeadScores { scores: vec![0.0; len], protected: vec![true; len] };
        }
        let old = len - window;
        let mut scores = vec![0.0f32; len];
        let mut mean = vec![0.0f32; old];
        let mut pooled = vec![0.0f32; old];
        for g in 0..layer.group {
            mean.fill(0.0);
            let queries = &head.queries[g * head.num_queries * layer.head_dim..]
                [..head.num_queries * layer.head_dim];
            let queries = &queries[(head.num_queries - window) * layer.head_dim..];
            window_probabilities(head.keys, queries, layer.head_dim, |_, row| {
                mean.iter_mut().zip(row).for_each(|(sum, p)| *sum += p / window as f32);
            });
            self.pool(&mean, &mut pooled);
            for (score, value) in scores.iter_mut().zip(&pooled) {
                *score = if self.max_agg && g > 0 { score.max(*value) } else { *score + value };
            }
        }
        if !self.max_agg {
            scores.iter_mut().for_each(|score| *score /= layer.group as f32);
        }
        HeadScores { scores, protected: (0..len).map(|i| i >= old).collect() }
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
