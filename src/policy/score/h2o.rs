//! H2O, heavy hitters: tokens that received the most attention so far.
//!
//! ```text
//! score[j] = sum over observed queries t and the group's query heads of P[t, j]
//! keep     = the last `recent` tokens + the heaviest of the others
//! ```
//!
//! With `heavy` the budget is `heavy + recent`; without it `keep` decides and `recent` tokens of it
//! are the window. Budgets are per KV head. Column sums belong to tokens: they follow their token
//! through eviction, and a token that nobody attended yet has none.

use super::{Entry, Score};
use crate::error::Result;
use crate::policy::{Allowance, Event, HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "h2o",
    summary: "keeps heavy hitters of accumulated attention and a recent window",
    paper: "H2O, arXiv 2306.14048",
    params: &[
        Param {
            name: "recent",
            help: "most recent tokens that stay",
            domain: Domain::Int { default: 32, min: 0, max: 1 << 30 },
        },
        Param {
            name: "heavy",
            help: "heavy hitters that stay; 0: what keep leaves",
            domain: Domain::Int { default: 0, min: 0, max: 1 << 30 },
        },
    ],
    needs: Needs::COLUMN_SUM,
    examples: &[
        "h2o(recent=32, heavy=96)",
        "h2o(recent=32) | keep(0.25)",
        "decode: every(16) | h2o(recent=64) | keep_tokens(512)",
    ],
    create: |args| Ok(Box::new(H2o { recent: args.count("recent"), heavy: args.count("heavy") })),
};

#[derive(Debug)]
struct H2o {
    recent: usize,
    heavy: usize,
}

impl Score for H2o {
    fn needs(&self) -> Needs {
        Needs::COLUMN_SUM
    }

    fn events(&self, _allowance: Allowance) -> &'static [Event] {
        &[Event::PrefillEnd, Event::Step]
    }

    fn own_allowance(&self) -> Option<Allowance> {
        (self.heavy > 0).then(|| Allowance::Tokens(self.heavy + self.recent))
    }

    fn keeps_whole(&self) -> usize {
        self.recent
    }

    fn score(&self, layer: &LayerInput<'_>, budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let score = |(head, budget): (&HeadInput<'_>, &usize)| {
            let len = head.positions.len();
            let recent = self.recent.min(*budget);
            let mut scores = head.column_sums.to_vec();
            scores.resize(len, 0.0);
            HeadScores::recent(scores, recent)
        };
        Ok(layer.heads.iter().zip(budgets).map(score).collect())
    }
}
