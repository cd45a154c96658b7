//! Finch: what the question attends to, each query weighted by how much it could see.
//!
//! ```text
//! score[j] = mean over the group's heads and the last w queries t of P[t, j] * position[t]
//! ```
//!
//! SnapKV without pooling, for a window that is the question behind a document. The weight makes up
//! for rows that share their probability among more tokens. The window is protected. The authors close
//! the gaps of positions: `finch(...) | keep(...) | pos(cache_relative)`.

use super::{Entry, QueryWindow, Score};
use crate::error::Result;
use crate::policy::{HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "finch",
    summary: "keeps what the question at the end of the prompt attends to",
    paper: "Finch, TACL 2024, arXiv 2408.00167",
    params: &[
        Param {
            name: "w",
            help: "queries of the question",
            domain: Domain::Int { default: 64, min: 1, max: 4096 },
        },
        Param {
            name: "normalize",
            help: "whether queries are weighted by what they could see",
            domain: Domain::Choice(&["yes", "no"]),
        },
    ],
    needs: Needs::KEYS.union(Needs::QUERY_WINDOW),
    examples: &["finch(w=32) | keep(0.25) | pos(cache_relative)", "finch | keep(0.5)"],
    create: |args| {
        let normalize = args.text("normalize") == "yes";
        Ok(Box::new(Finch { window: args.count("w"), normalize }))
    },
};

#[derive(Debug)]
struct Finch {
    window: usize,
    normalize: bool,
}

impl Score for Finch {
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
        QueryWindow::score_heads("finch", self.window, layer, |window, probabilities| {
            window.weighted_sums(probabilities, |t| {
                let seen = if self.normalize { window.position(t).max(0) as f32 } else { 1.0 };
                seen / (layer.group * window.queries) as f32
            })
        })
    }
}
