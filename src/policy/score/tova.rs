//! TOVA: what the last query attends to, over all heads of the layer.
//!
//! ```text
//! score[j] = mean over all query heads h of P[h, T - 1, j]
//! ```
//!
//! All KV heads of a layer share the scores, so they keep the same tokens. The `recent` newest tokens
//! are protected; the authors protect none, and then the newest one may be dropped itself. Where an
//! earlier stage left the heads of a layer with different tokens, each head uses the mean of its own
//! group. The library's own attention knows these probabilities already; else they are computed from
//! the last query and the keys.

use super::{Entry, Score, WindowProbabilities};
use crate::error::{Result, ensure};
use crate::policy::{Allowance, Event, HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::{LaneWidth, Needs};
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "tova",
    summary: "keeps what the last query attends to, the same tokens for all heads of a layer",
    paper: "TOVA, arXiv 2401.06104",
    params: &[Param {
        name: "recent",
        help: "newest tokens that stay",
        domain: Domain::Int { default: 1, min: 0, max: 1 << 20 },
    }],
    needs: Needs::KEYS.union(Needs::QUERY_WINDOW),
    examples: &["tova | keep_tokens(256)", "prefill_end | tova | keep(0.5)"],
    create: |args| Ok(Box::new(Tova { recent: args.count("recent") })),
};

#[derive(Debug)]
struct Tova {
    recent: usize,
}

impl Score for Tova {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn shortcut(&self) -> Option<Needs> {
        Some(Needs::LAST_ROW)
    }

    fn query_window(&self) -> usize {
        1
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Layer
    }

    fn events(&self, _allowance: Allowance) -> &'static [Event] {
        &[Event::PrefillEnd, Event::Step]
    }

    fn keeps_whole(&self) -> usize {
        self.recent
    }

    fn score(&self, layer: &LayerInput<'_>, budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let kernels = simd::active();
        let mut probabilities = WindowProbabilities::new(kernels);
        let observed = layer.offered().contains(Needs::LAST_ROW);
        let mut means = Vec::with_capacity(layer.heads.len());
        for head in &layer.heads {
            means.push(match observed {
                true => head.last_row.to_vec(),
                false => group_sum(layer, head, &mut probabilities)?,
            });
        }
        let is_even = layer.heads.windows(2).all(|pair| pair[0].positions == pair[1].positions);
        if let (true, [first, others @ ..]) = (is_even, means.as_mut_slice()) {
            others.iter().for_each(|other| kernels.axpy_f32(1.0, other, first));
            kernels.scale(first, 1.0 / (layer.group * (others.len() + 1)) as f32);
            others.iter_mut().for_each(|other| other.copy_from_slice(first));
        } else {
            means.iter_mut().for_each(|sums| kernels.scale(sums, 1.0 / layer.group as f32));
        }
        let finish = |(scores, budget): (Vec<f32>, &usize)| {
            HeadScores::recent(scores, self.recent.min(*budget))
        };
        Ok(means.into_iter().zip(budgets).map(finish).collect())
    }
}

/// The probabilities of the last query, summed over the query heads of a group.
fn group_sum(
    layer: &LayerInput<'_>,
    head: &HeadInput<'_>,
    probabilities: &mut WindowProbabilities,
) -> Result<Vec<f32>> {
    let (len, dim) = (head.positions.len(), layer.head_dim);
    let mut sums = vec![0.0f32; len];
    if len == 0 {
        return Ok(sums);
    }
    ensure!(head.num_queries > 0, InvalidState, "tova has observed no query of the last token");
    for queries in head.queries.chunks_exact(head.num_queries * dim) {
        let last = &queries[(head.num_queries - 1) * dim..];
        let row = probabilities.compute(head.keys, last, dim, |_| len);
        sums.iter_mut().zip(row).for_each(|(sum, p)| *sum += p);
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_observed_row_says_the_same_as_keys_and_the_last_query() {
        let (len, dim, group) = (50, 16, 3);
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 20.0;
        let keys: Vec<f32> = (0..len * dim).map(value).collect();
        let queries: Vec<f32> = (0..group * dim).map(|i| value(i + 7)).collect();
        let positions: Vec<i32> = (0..len as i32).collect();
        let mut probabilities = WindowProbabilities::new(simd::active());
        let mut row = vec![0.0; len];
        for query in queries.chunks_exact(dim) {
            let p = probabilities.compute(&keys, query, dim, |_| len);
            row.iter_mut().zip(p).for_each(|(sum, p)| *sum += p);
        }
        let head = HeadInput { positions: &positions, ..HeadInput::default() };
        let computed = HeadInput { keys: &keys, queries: &queries, num_queries: 1, ..head };
        let observed = HeadInput { last_row: &row, ..head };
        let scores = |head| {
            let heads = vec![head];
            let layer =
                LayerInput { group, head_dim: dim, value_dim: dim, heads, ..LayerInput::default() };
            Tova { recent: 1 }.score(&layer, &[10]).unwrap().remove(0)
        };
        let (computed, observed) = (scores(computed), scores(observed));
        assert_eq!(computed.protected, observed.protected);
        for (a, b) in computed.scores.iter().zip(&observed.scores) {
            assert!((a - b).abs() <= 1e-6 * a, "{a} {b}");
        }
    }
}
