//! Random: the baseline that every other score has to beat.
//!
//! ```text
//! score[j] = hash(seed, layer, KV head, position) as a number in [0, 1)
//! ```
//!
//! The hash is a counter-based generator, so that neither batching nor earlier evictions change what
//! a token draws.

use super::noise::mix;
use super::{Entry, Score};
use crate::error::Result;
use crate::policy::{HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "random",
    summary: "keeps tokens at random, as a baseline",
    paper: "baseline of kvpress",
    params: &[Param {
        name: "seed",
        help: "what the draws depend on besides the place of the token",
        domain: Domain::Int { default: 0, min: 0, max: 1 << 48 },
    }],
    needs: Needs::NONE,
    examples: &["random(seed=1) | keep(0.5)"],
    create: |args| Ok(Box::new(Random { seed: args.int("seed") as u64 })),
};

#[derive(Debug)]
struct Random {
    seed: u64,
}

impl Score for Random {
    fn needs(&self) -> Needs {
        Needs::NONE
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let score = |(h, head): (usize, &HeadInput<'_>)| {
            let place = mix(mix(mix(self.seed) ^ layer.layer as u64) ^ h as u64);
            let draw = |position: &i32| {
                (mix(place ^ u64::from(*position as u32)) >> 40) as f32 / (1u32 << 24) as f32
            };
            HeadScores::open(head.positions.iter().map(draw).collect())
        };
        Ok(layer.heads.iter().enumerate().map(score).collect())
    }
}
