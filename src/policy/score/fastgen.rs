//! FastGen: each head keeps the cheapest pattern that recovers most of its attention.
//!
//! ```text
//! patterns, from cheap to dear:  sinks;  sinks + recent;  sinks + recent + heavy hitters;  everything
//! head     = the first whose tokens received at least `mass` of all attention so far
//! ```
//!
//! Heavy hitters are the `heavy` tokens outside of the others that received the most. The authors also
//! have a pattern of punctuation, which needs token ids.

use super::{Entry, Score};
use crate::error::Result;
use crate::policy::{Allowance, HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "fastgen",
    summary: "each head keeps the cheapest pattern that recovers its attention",
    paper: "FastGen, arXiv 2310.01801",
    params: &[
        Param {
            name: "mass",
            help: "fraction of the attention so far that a pattern has to recover",
            domain: Domain::Real { default: 0.95, min: 0.0, max: 1.0 },
        },
        Param {
            name: "sink",
            help: "leading tokens, in every pattern",
            domain: Domain::Int { default: 4, min: 1, max: 1 << 20 },
        },
        Param {
            name: "recent",
            help: "fraction of the tokens that the recent window holds",
            domain: Domain::Real { default: 0.3, min: 0.0, max: 1.0 },
        },
        Param {
            name: "heavy",
            help: "fraction of the tokens that are heavy hitters",
            domain: Domain::Real { default: 0.3, min: 0.0, max: 1.0 },
        },
    ],
    needs: Needs::COLUMN_SUM,
    examples: &["fastgen(mass=0.9)"],
    create: |args| {
        Ok(Box::new(FastGen {
            mass: args.real("mass"),
            sink: args.count("sink"),
            recent: args.real("recent"),
            heavy: args.real("heavy"),
        }))
    },
};

#[derive(Debug)]
struct FastGen {
    mass: f64,
    sink: usize,
    recent: f64,
    heavy: f64,
}

impl Score for FastGen {
    fn needs(&self) -> Needs {
        Needs::COLUMN_SUM
    }

    fn own_allowance(&self) -> Option<Allowance> {
        Some(Allowance::Threshold(0.5))
    }

    fn keeps_whole(&self) -> usize {
        self.sink
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let score = |head: &HeadInput<'_>| {
            let stays = self.pattern(head);
            let scores = stays.iter().map(|stays| if *stays { 1.0 } else { 0.0 });
            HeadScores { scores: scores.collect(), protected: vec![false; stays.len()] }
        };
        Ok(layer.heads.iter().map(score).collect())
    }
}

impl FastGen {
    /// Which tokens the cheapest pattern keeps.
    fn pattern(&self, head: &HeadInput<'_>) -> Vec<bool> {
        let len = head.positions.len();
        let received = |i: usize| f64::from(head.column_sums.get(i).copied().unwrap_or(0.0));
        let total: f64 = (0..len).map(received).sum();
        let is_enough = |stays: &[bool]| {
            let part: f64 = (0..len).filter(|i| stays[*i]).map(received).sum();
            part >= self.mass * total
        };
        let mut stays: Vec<bool> = (0..len).map(|i| i < self.sink).collect();
        if is_enough(&stays) {
            return stays;
        }
        let recent = (self.recent * len as f64) as usize;
        stays[len - recent.min(len)..].fill(true);
        if is_enough(&stays) {
            return stays;
        }
        let mut others: Vec<usize> = (0..len).filter(|i| !stays[*i]).collect();
        others.sort_by(|a, b| received(*b).total_cmp(&received(*a)));
        others.truncate((self.heavy * len as f64) as usize);
        others.into_iter().for_each(|i| stays[i] = true);
        if is_enough(&stays) { stays } else { vec![true; len] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_take_the_cheapest_pattern_that_is_enough() {
        let fastgen = FastGen { mass: 0.9, sink: 1, recent: 0.2, heavy: 0.2 };
        let positions: Vec<i32> = (0..10).collect();
        let kept = |sums: &[f32]| -> Vec<usize> {
            let head =
                HeadInput { positions: &positions, column_sums: sums, ..HeadInput::default() };
            let stays = fastgen.pattern(&head);
            (0..10).filter(|i| stays[*i]).collect()
        };
        assert_eq!(kept(&[95.0, 1.0, 1.0, 1.0, 1.0, 1.0]), [0]);
        assert_eq!(kept(&[50.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 20.0, 30.0]), [0, 8, 9]);
        assert_eq!(kept(&[50.0, 1.0, 9.0, 0.0, 0.0, 20.0, 0.0, 0.0, 0.0, 20.0]), [0, 2, 5, 8, 9]);
        assert_eq!(kept(&[1.0; 10]), (0..10).collect::<Vec<_>>());
        assert_eq!(kept(&[]), [0]);
    }
}
