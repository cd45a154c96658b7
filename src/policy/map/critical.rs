//! CriticalKV: half of the budget by the score, the other half by what a token does to the output.
//!
//! ```text
//! alpha[j]  = mean over the group's heads h of |W_o[h] v[j]|_1
//! stage 1   = the best int(first * n) tokens by the score: they stay
//! score'[j] = (score[j] + eps) * alpha[j] ranks the others
//! ```
//!
//! `n` is what the head keeps by the budget that follows, computed from the scores as they were;
//! that is CriticalAdaKV under `adakv`. The score should be a probability.

use super::{Context, Decision, Entry, Map, Scores};
use crate::error::{Result, bail};
use crate::policy::select::ranks;
use crate::policy::{HeadInput, LayerInput, OutputProjection};
use crate::registry::{Domain, Param};
use crate::shape::{LaneWidth, Needs};
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "critical",
    summary: "ranks the second half by the size of the token's output as well",
    paper: "CriticalKV, arXiv 2502.03805",
    params: &[
        Param {
            name: "first",
            help: "fraction of the budget that goes by the score alone",
            domain: Domain::Real { default: 0.5, min: 0.0, max: 1.0 },
        },
        Param {
            name: "eps",
            help: "added to the score",
            domain: Domain::Real { default: 1e-4, min: 0.0, max: 1.0 },
        },
    ],
    needs: Needs::VALUES.union(Needs::OUTPUT_PROJECTION),
    examples: &[
        "snapkv | critical(first=0.5) | keep(0.5)",
        "expected(vnorm=0) | critical | adakv(0.2) | keep(0.5)",
    ],
    create: |args| {
        Ok(Box::new(Critical { first: args.real("first"), epsilon: args.real("eps") as f32 }))
    },
};

#[derive(Debug)]
struct Critical {
    first: f64,
    epsilon: f32,
}

impl Map for Critical {
    fn lane_width(&self, _before: LaneWidth) -> LaneWidth {
        LaneWidth::Head
    }

    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn reads_budget(&self) -> bool {
        true
    }

    fn map(&self, context: &Context<'_>, scores: &mut Scores) -> Result<()> {
        let layer = context.layer;
        let Some(projection) = layer.output_projection else {
            bail!(InvalidState, "critical needs the output projection of layer {}", layer.layer);
        };
        let budgets = context.budget.spread(layer.layer, &scores.heads, context.shares)?;
        for (h, (head, budget)) in scores.heads.iter_mut().zip(&budgets).enumerate() {
            let safe = context.budget.safeguard(head, context.shares[h]);
            let first = ((*budget as f64 * self.first + 1e-9) as usize).max(safe).min(*budget);
            let mut best = ranks(head);
            best.sort_unstable_by(|a, b| b.cmp(a));
            for rank in &best[..first] {
                head.protected[rank.index()] = true;
            }
            let sizes = output_sizes(layer, h, &layer.heads[h], &projection);
            for (score, size) in head.scores.iter_mut().zip(sizes) {
                *score = (*score + self.epsilon) * size;
            }
        }
        scores.decision = Decision::Budgets(budgets);
        Ok(())
    }
}

/// `mean over the group's heads g of |W_o[g] v[j]|_1` for each token `j`.
fn output_sizes(
    layer: &LayerInput<'_>,
    head: usize,
    input: &HeadInput<'_>,
    projection: &OutputProjection<'_>,
) -> Vec<f32> {
    let kernels = simd::active();
    let dim = layer.value_dim;
    let mut sizes = vec![0.0f32; input.positions.len()];
    for g in 0..layer.group {
        for column in projection.columns(head * layer.group + g, dim) {
            for (size, value) in sizes.iter_mut().zip(input.values.chunks_exact(dim)) {
                *size += kernels.dot_f32(column, value).abs();
            }
        }
    }
    sizes.iter_mut().for_each(|size| *size /= layer.group as f32);
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_sizes_agree_with_f64() {
        let (group, dim, hidden, len) = (3, 5, 7, 11);
        let noise = |n: usize, seed: usize| -> Vec<f32> {
            (0..n).map(|i| (((i + seed) * 37 % 101) as f32 - 50.0) / 20.0).collect()
        };
        let (positions, values) = ((0..len as i32).collect::<Vec<_>>(), noise(len * dim, 1));
        let width = 2 * group * dim;
        let weights = noise(hidden * width, 2);
        let input = HeadInput { positions: &positions, values: &values, ..HeadInput::default() };
        let layer = LayerInput { group, value_dim: dim, ..LayerInput::default() };
        let projection = OutputProjection { weights: &weights, width };
        for head in 0..2 {
            let found = output_sizes(&layer, head, &input, &projection);
            for (j, found) in found.iter().enumerate() {
                let mut sum = 0.0f64;
                for g in 0..group {
                    for o in 0..hidden {
                        let at = |c: usize| {
                            f64::from(weights[o * width + (head * group + g) * dim + c])
                                * f64::from(values[j * dim + c])
                        };
                        sum += (0..dim).map(at).sum::<f64>().abs();
                    }
                }
                assert!((f64::from(*found) - sum / group as f64).abs() < 1e-4, "{head} {j}");
            }
        }
    }
}
