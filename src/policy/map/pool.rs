//! Pools the scores of neighbours, so that what surrounds an important token stays with it.
//!
//! ```text
//! score'[j] = mean or max of score over j - kernel/2 .. j + kernel/2, protected tokens left out
//! ```
//!
//! The mean is over the neighbours that are there.

use super::{Context, Entry, Map, Scores};
use crate::error::{Result, ensure};
use crate::policy::HeadScores;
use crate::registry::{Domain, Param};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "pool",
    summary: "tokens share the scores of their neighbours",
    paper: "SnapKV, arXiv 2404.14469",
    params: &[
        Param {
            name: "kernel",
            help: "width of the pooling window, odd",
            domain: Domain::Int { default: 5, min: 1, max: 255 },
        },
        Param {
            name: "by",
            help: "how neighbours are pooled",
            domain: Domain::Choice(&["avg", "max"]),
        },
    ],
    needs: Needs::NONE,
    examples: &["h2o | pool(kernel=5) | keep(0.5)", "knorm | pool(7, max) | keep(0.5)"],
    create: |args| {
        let kernel = args.count("kernel");
        ensure!(kernel % 2 == 1, InvalidArgument, "pool: kernel is {kernel}, must be odd");
        Ok(Box::new(Pool { half: kernel / 2, is_max: args.text("by") == "max" }))
    },
};

#[derive(Debug)]
struct Pool {
    half: usize,
    is_max: bool,
}

impl Map for Pool {
    fn map(&self, _context: &Context<'_>, scores: &mut Scores) -> Result<()> {
        for head in &mut scores.heads {
            head.scores = self.pool(head);
        }
        Ok(())
    }
}

impl Pool {
    fn pool(&self, head: &HeadScores) -> Vec<f32> {
        let len = head.scores.len();
        let pooled = |i: usize| {
            let near = i.saturating_sub(self.half)..(i + self.half + 1).min(len);
            let open = near.filter(|j| !head.protected[*j] || *j == i).map(|j| head.scores[j]);
            match self.is_max {
                true => open.fold(f32::NEG_INFINITY, f32::max),
                false => open.clone().sum::<f32>() / open.count() as f32,
            }
        };
        (0..len).map(pooled).collect()
    }
}
