//! PyramidInfer: what the last queries attend to, later ones counting more.
//!
//! ```text
//! score[j] = mean over the group's heads of sum over the last w queries t of
//!            decay^(w - 1 - t) P[h, t, j] / sum over t of decay^(w - 1 - t),        j < T - w
//! ```
//!
//! The window is protected and counts towards the budget. The authors keep less in upper layers, which
//! `pyramid` says; they drop tokens of a layer before the next one is computed, so that all later layers
//! lack them, which an engine would have to do.

use super::{Entry, QueryWindow, Score};
use crate::error::Result;
use crate::policy::{HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "pyramidinfer",
    summary: "keeps what the last w queries attend to, later queries counting more",
    paper: "PyramidInfer, arXiv 2405.12532",
    params: &[
        Param {
            name: "w",
            help: "queries of the window",
            domain: Domain::Int { default: 64, min: 1, max: 4096 },
        },
        Param {
            name: "decay",
            help: "weight of a query for that of the next one",
            domain: Domain::Real { default: 0.95, min: 1e-3, max: 1.0 },
        },
    ],
    needs: Needs::KEYS.union(Needs::QUERY_WINDOW),
    examples: &["pyramidinfer(w=32) | pyramid(w=32) | keep(0.5)", "pyramidinfer | keep(0.25)"],
    create: |args| {
        Ok(Box::new(PyramidInfer { window: args.count("w"), decay: args.real("decay") }))
    },
};

#[derive(Debug)]
struct PyramidInfer {
    window: usize,
    decay: f64,
}

impl Score for PyramidInfer {
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
        QueryWindow::score_heads("pyramidinfer", self.window, layer, |window, probabilities| {
            let weight = |t: usize| self.decay.powi((window.queries - 1 - t) as i32);
            let total: f64 = (0..window.queries).map(weight).sum::<f64>() * layer.group as f64;
            window.weighted_sums(probabilities, |t| (weight(t) / total) as f32)
        })
    }
}
