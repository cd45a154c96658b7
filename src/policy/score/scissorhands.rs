//! Scissorhands: tokens that queries keep ignoring go.
//!
//! ```text
//! low[j]   = of the queries since the last run, those with  mean over the group of P[t, j] < 1 / tokens
//! score[j] = - low[j],   later tokens first if equal
//! keep     = the last `recent` tokens + the best of the others
//! ```
//!
//! Of a prompt the last `hist` queries of each piece count. Made for runs in bulk: `every(32) |
//! scissorhands | keep_tokens(128)` holds between 128 and 160 tokens. Counts start anew with each run.

use super::{Entry, Score};
use crate::error::Result;
use crate::policy::{Allowance, Event, HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "scissorhands",
    summary: "drops tokens that queries keep ignoring",
    paper: "Scissorhands, arXiv 2305.17118",
    params: &[
        Param {
            name: "recent",
            help: "most recent tokens that stay",
            domain: Domain::Int { default: 32, min: 0, max: 1 << 30 },
        },
        Param {
            name: "hist",
            help: "last queries of each piece of a prompt that count",
            domain: Domain::Int { default: 64, min: 1, max: 1 << 20 },
        },
    ],
    needs: Needs::LOW_COUNT,
    examples: &["every(32) | scissorhands(recent=32, hist=64) | keep_tokens(128)"],
    create: |args| {
        Ok(Box::new(Scissorhands { recent: args.count("recent"), history: args.count("hist") }))
    },
};

#[derive(Debug)]
struct Scissorhands {
    recent: usize,
    history: usize,
}

impl Score for Scissorhands {
    fn needs(&self) -> Needs {
        Needs::LOW_COUNT
    }

    fn history(&self) -> usize {
        self.history
    }

    fn events(&self, _allowance: Allowance) -> &'static [Event] {
        &[Event::PrefillEnd, Event::Step]
    }

    fn keeps_whole(&self) -> usize {
        self.recent
    }

    fn score(&self, layer: &LayerInput<'_>, budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let score = |(head, budget): (&HeadInput<'_>, &usize)| {
            let len = head.positions.len();
            let recent = self.recent.min(*budget);
            let low = |i: usize| head.low_counts.get(i).copied().unwrap_or(0.0);
            // Counts are whole numbers: a part of one breaks ties.
            let later = |i: usize| i as f32 / (len as f32 + 1.0);
            HeadScores::recent((0..len).map(|i| later(i) - low(i)).collect(), recent)
        };
        Ok(layer.heads.iter().zip(budgets).map(score).collect())
    }
}
