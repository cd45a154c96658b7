//! CAKE's score: what the last queries attend to, steadily or now and then.
//!
//! ```text
//! mean[j], var[j] = over the last w queries t of A[t, j], the mean over the group's heads of P[h, t, j]
//! score           = average over `kernel` neighbours of mean + gamma var,                 j < T - w
//! ```
//!
//! The window is protected and counts towards the budget. The budget of the same name divides the
//! allowance of the model among layers.

use super::snapkv::average_pool;
use super::{Entry, QueryWindow, Score};
use crate::error::{Result, ensure};
use crate::policy::{HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "cake",
    summary: "keeps what the last w queries attend to on average or with changes",
    paper: "CAKE, arXiv 2503.12491",
    params: &[
        Param {
            name: "w",
            help: "queries of the observation window",
            domain: Domain::Int { default: 32, min: 1, max: 4096 },
        },
        Param {
            name: "gamma",
            help: "weight of the variance",
            domain: Domain::Real { default: 200.0, min: 0.0, max: 1e6 },
        },
        Param {
            name: "kernel",
            help: "width of the pooling window, odd",
            domain: Domain::Int { default: 5, min: 1, max: 255 },
        },
    ],
    needs: Needs::KEYS.union(Needs::QUERY_WINDOW),
    examples: &["cake | preferences | keep(0.25)", "cake(w=16, gamma=50, kernel=7) | keep(0.5)"],
    create: |args| {
        let kernel = args.count("kernel");
        ensure!(kernel % 2 == 1, InvalidArgument, "cake: kernel is {kernel}, must be odd");
        Ok(Box::new(Cake { window: args.count("w"), gamma: args.real("gamma") as f32, kernel }))
    },
};

#[derive(Debug)]
struct Cake {
    window: usize,
    gamma: f32,
    kernel: usize,
}

impl Score for Cake {
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
        QueryWindow::score_heads("cake", self.window, layer, |window, probabilities| {
            let (mean, variance) = window.moments(probabilities);
            let sums = mean.iter().zip(&variance).map(|(mean, var)| mean + self.gamma * var);
            let mut scores = vec![0.0f32; window.len()];
            average_pool(&sums.collect::<Vec<_>>(), self.kernel, &mut scores);
            scores
        })
    }
}
