//! NACL: what a few proxy queries attend to, and some of the rest by lot.
//!
//! ```text
//! s[j]  = sum over the last w queries and the group's heads of P[t, j]
//! keep  = the window, the best of the others up to (1 - random) of the budget, and for the rest of the
//!         budget a sample without replacement, in proportion to exp(s / temp)
//! ```
//!
//! The lot is drawn by counter: it depends on the seed and the place of a token alone.

use super::noise::{gumbel, mix};
use super::{Entry, QueryWindow, Score};
use crate::error::Result;
use crate::policy::select::ranks;
use crate::policy::{HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "nacl",
    summary: "keeps what proxy queries attend to and some others by lot",
    paper: "NACL, arXiv 2408.03675",
    params: &[
        Param {
            name: "w",
            help: "proxy queries, the last ones",
            domain: Domain::Int { default: 64, min: 1, max: 4096 },
        },
        Param {
            name: "random",
            help: "fraction of the budget that is drawn",
            domain: Domain::Real { default: 0.3, min: 0.0, max: 1.0 },
        },
        Param {
            name: "temp",
            help: "temperature of the lot",
            domain: Domain::Real { default: 1.0, min: 1e-3, max: 1e3 },
        },
        Param {
            name: "seed",
            help: "what the lot depends on besides the place",
            domain: Domain::Int { default: 0, min: 0, max: 1 << 48 },
        },
    ],
    needs: Needs::KEYS.union(Needs::QUERY_WINDOW),
    examples: &["nacl(w=32, random=0.3) | keep(0.5)"],
    create: |args| {
        Ok(Box::new(Nacl {
            window: args.count("w"),
            random: args.real("random"),
            temperature: args.real("temp") as f32,
            seed: args.int("seed") as u64,
        }))
    },
};

#[derive(Debug)]
struct Nacl {
    window: usize,
    random: f64,
    temperature: f32,
    seed: u64,
}

impl Score for Nacl {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn query_window(&self) -> usize {
        self.window
    }

    fn keeps_whole(&self) -> usize {
        self.window
    }

    fn score(&self, layer: &LayerInput<'_>, budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let mut heads =
            QueryWindow::score_heads("nacl", self.window, layer, |window, probabilities| {
                window.weighted_sums(probabilities, |_| 1.0)
            })?;
        for (h, (head, budget)) in heads.iter_mut().zip(budgets).enumerate() {
            let place = mix(mix(mix(self.seed) ^ layer.layer as u64) ^ h as u64);
            self.draw(head, *budget, place, layer.heads[h].positions);
        }
        Ok(heads)
    }
}

impl Nacl {
    /// Moves the tokens that win the lot above all others that are not sure to stay.
    fn draw(&self, head: &mut HeadScores, budget: usize, place: u64, positions: &[i32]) {
        let protected = head.protected.iter().filter(|protected| **protected).count();
        let drawn = ((budget as f64 * self.random) as usize).min(budget.saturating_sub(protected));
        let mut order = ranks(head);
        order.sort_unstable_by(|a, b| b.cmp(a));
        let (sure, others) = order.split_at((budget - drawn).min(order.len()));
        // A sample without replacement: the largest of log weights plus Gumbel noise.
        let mut lots: Vec<(f32, usize)> = others
            .iter()
            .map(|rank| {
                let i = rank.index();
                (head.scores[i] / self.temperature + gumbel(place ^ positions[i] as u64), i)
            })
            .collect();
        lots.sort_by(|a, b| b.0.total_cmp(&a.0));
        let top = sure.iter().map(|rank| head.scores[rank.index()]).fold(0.0f32, f32::max) + 1.0;
        for rank in sure {
            head.scores[rank.index()] += top;
        }
        for (_, i) in lots.into_iter().take(drawn) {
            head.scores[i] += top;
        }
    }
}
