//! AdaKV: heads compete for the allowance of their layer.
//!
//! ```text
//! each head keeps its best int(floor * n) tokens, at least one (the safeguard);
//! the rest of the H * n tokens are the best of all heads together
//! ```
//!
//! This is the safeguard of kvpress; the authors' code blends budgets instead. Needs ragged lanes.

use super::{Budget, Entry};
use crate::policy::HeadScores;
use crate::policy::select::ranked;
use crate::registry::{Domain, Param};
use crate::shape::LaneWidth;

pub(super) static ENTRY: Entry = Entry {
    name: "adakv",
    summary: "heads of a layer compete for its allowance",
    paper: "Ada-KV, arXiv 2407.11550",
    params: &[Param {
        name: "floor",
        help: "fraction of the uniform budget that every head keeps",
        domain: Domain::Real { default: 0.2, min: 0.0, max: 1.0 },
    }],
    create: |args| Ok(Box::new(AdaKv { floor: args.real("floor") })),
};

#[derive(Debug)]
struct AdaKv {
    floor: f64,
}

impl Budget for AdaKv {
    fn spread(&self, scores: &[HeadScores], alone: &[usize]) -> Vec<usize> {
        let mut budget = Vec::with_capacity(scores.len());
        let mut rest: Vec<(f32, usize, usize)> = Vec::new();
        for (h, (head, alone)) in scores.iter().zip(alone).enumerate() {
            let safe = ((*alone as f64 * self.floor) as usize).clamp((*alone).min(1), *alone);
            let protected = head.protected.iter().filter(|protected| **protected).count();
            let safe = safe.max(protected.min(*alone));
            budget.push(safe);
            let order = ranked(head);
            // A head never receives more than the others leave; protected tokens rank first.
            rest.extend(order[safe..].iter().map(|i| (key(head.scores[*i]), h, *i)));
        }
        let total: usize = alone.iter().sum();
        let left = total - budget.iter().sum::<usize>();
        // Higher scores first; ties go to the lower head, then the lower position.
        rest.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        rest.iter().take(left).for_each(|(_, h, _)| budget[*h] += 1);
        budget
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Head
    }
}

/// NaN ranks below everything.
fn key(score: f32) -> f32 {
    if score.is_nan() { f32::NEG_INFINITY } else { score }
}
