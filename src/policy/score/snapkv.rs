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

use super::{Entry, QueryWindow, Score, WindowProbabilities};
use crate::error::{Result, ensure};
use crate::policy::{HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;

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

    fn keeps_whole(&self) -> usize {
        self.window
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        QueryWindow::score_heads("snapkv", self.window, layer, |window, probabilities| {
            self.score_head(layer.group, window, probabilities)
        })
    }
}

impl SnapKv {
    fn score_head(
        &self,
        group: usize,
        window: &QueryWindow<'_>,
        probabilities: &mut WindowProbabilities,
    ) -> Vec<f32> {
        let (len, old) = (window.len(), window.old);
        let mut scores = vec![0.0f32; len];
        let (mut mean, mut pooled) = (vec![0.0f32; old], vec![0.0f32; old]);
        window.for_each_query_head(probabilities, |g, rows| {
            mean.fill(0.0);
            for row in rows.chunks_exact(len) {
                mean.iter_mut().zip(row).for_each(|(sum, p)| *sum += p);
            }
            mean.iter_mut().for_each(|sum| *sum /= window.queries as f32);
            self.pool(&mean, &mut pooled);
            for (score, value) in scores.iter_mut().zip(&pooled) {
                *score = if self.max_agg && g > 0 { score.max(*value) } else { *score + value };
            }
        });
        if !self.max_agg {
            scores.iter_mut().for_each(|score| *score /= group as f32);
        }
        scores
    }

    fn pool(&self, values: &[f32], out: &mut [f32]) {
        if !self.max_pool {
            return average_pool(values, self.kernel, out);
        }
        let half = self.kernel / 2;
        for (i, out) in out.iter_mut().enumerate() {
            let near = &values[i.saturating_sub(half)..(i + half + 1).min(values.len())];
            *out = near.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        }
    }
}

/// Mean over `kernel` neighbours, of which those beyond the ends count as 0.
pub(super) fn average_pool(values: &[f32], kernel: usize, out: &mut [f32]) {
    let half = kernel / 2;
    for (i, out) in out.iter_mut().enumerate().take(values.len()) {
        let near = &values[i.saturating_sub(half)..(i + half + 1).min(values.len())];
        *out = near.iter().sum::<f32>() / kernel as f32;
    }
}
