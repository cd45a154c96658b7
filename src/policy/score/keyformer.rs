//! Keyformer: what the last queries would attend to if noise evened the odds.
//!
//! ```text
//! score[j] = sum over the last w queries t and the group's heads h of
//!            softmax over j of (logit[h, t, j] + zeta[j]) / tau,                        j < T - w
//! zeta[j]  = a draw from the Gumbel distribution, by seed, layer and position alone
//! ```
//!
//! The window is protected and counts towards the budget. From probabilities `P` the softmax is
//! `P^(1/tau) e^(zeta/tau)`, divided by its sum. The authors add up all queries so far and raise tau
//! from 1 to 2 while they generate; a pipeline has one window and one tau for each of its moments.

use super::noise::{gumbel, mix};
use super::{Entry, QueryWindow, Score};
use crate::error::Result;
use crate::policy::{HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "keyformer",
    summary: "keeps what the last w queries attend to under Gumbel noise",
    paper: "Keyformer, arXiv 2403.09054",
    params: &[
        Param {
            name: "w",
            help: "queries that are added up",
            domain: Domain::Int { default: 64, min: 1, max: 4096 },
        },
        Param {
            name: "tau",
            help: "temperature: above 1 evens, below 1 sharpens",
            domain: Domain::Real { default: 1.0, min: 0.05, max: 100.0 },
        },
        Param {
            name: "noise",
            help: "how much of the noise is added",
            domain: Domain::Real { default: 1.0, min: 0.0, max: 100.0 },
        },
        Param {
            name: "seed",
            help: "what the noise depends on besides the place",
            domain: Domain::Int { default: 0, min: 0, max: 1 << 48 },
        },
    ],
    needs: Needs::KEYS.union(Needs::QUERY_WINDOW),
    examples: &["keyformer(w=32) | keep(0.5)", "keyformer(w=16, tau=2, seed=7) | keep(0.25)"],
    create: |args| {
        Ok(Box::new(Keyformer {
            window: args.count("w"),
            tau: args.real("tau") as f32,
            noise: args.real("noise") as f32,
            seed: args.int("seed") as u64,
        }))
    },
};

#[derive(Debug)]
struct Keyformer {
    window: usize,
    tau: f32,
    noise: f32,
    seed: u64,
}

impl Score for Keyformer {
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
        let place = mix(mix(self.seed) ^ layer.layer as u64);
        QueryWindow::score_heads("keyformer", self.window, layer, |window, probabilities| {
            let mut scores = vec![0.0f32; window.len()];
            let mut noisy = vec![0.0f32; window.len()];
            let factors: Vec<f32> = window
                .positions()
                .iter()
                .map(|position| (self.noise * gumbel(place ^ *position as u64) / self.tau).exp())
                .collect();
            window.for_each_query_head(probabilities, |_, rows| {
                for row in rows.chunks_exact(window.len()) {
                    for ((x, p), factor) in noisy.iter_mut().zip(row).zip(&factors) {
                        *x = p.powf(1.0 / self.tau) * factor;
                    }
                    let sum: f32 = noisy.iter().sum();
                    let old = scores[..window.old].iter_mut().zip(&noisy);
                    old.for_each(|(score, x)| *score += x / sum);
                }
            });
            scores
        })
    }
}
