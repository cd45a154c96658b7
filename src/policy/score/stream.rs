//! StreamingLLM: the first `sink` tokens and the most recent ones.
//!
//! ```text
//! keep = [0, sink) + the last (n - sink) tokens,   n = sink + recent, or what `keep` allows
//! ```
//!
//! Without positions of its own (`pos(keep)`) this is what kvpress does; the paper's method is
//! `stream(...) | pos(cache_relative)`.

use super::{Entry, Score};
use crate::error::Result;
use crate::policy::{Allowance, Event, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::{LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "stream",
    summary: "keeps the sink tokens and the most recent ones",
    paper: "StreamingLLM, arXiv 2309.17453",
    params: &[
        Param {
            name: "sink",
            help: "leading tokens that always stay",
            domain: Domain::Int { default: 4, min: 0, max: 1 << 20 },
        },
        Param {
            name: "recent",
            help: "most recent tokens that stay, the current one included; 0: what keep leaves",
            domain: Domain::Int { default: 0, min: 0, max: 1 << 30 },
        },
    ],
    create: |args| {
        Ok(Box::new(Stream { sink: args.count("sink"), recent: args.count("recent") }))
    },
};

#[derive(Debug)]
struct Stream {
    sink: usize,
    recent: usize,
}

impl Score for Stream {
    fn needs(&self) -> Needs {
        Needs::NONE
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Sequence
    }

    fn events(&self) -> &'static [Event] {
        &[Event::PrefillEnd, Event::Step]
    }

    fn keeps_runs(&self) -> bool {
        true
    }

    fn allowance(&self, asked: Allowance) -> Allowance {
        match (asked, self.recent) {
            (Allowance::All, recent) if recent > 0 => Allowance::Tokens(self.sink + recent),
            _ => asked,
        }
    }

    /// Recency is the score: the sinks are protected, and later tokens score higher.
    fn score(&self, layer: &LayerInput<'_>, budget: &[usize]) -> Result<Vec<HeadScores>> {
        let score = |(head, budget): (&crate::policy::HeadInput<'_>, &usize)| {
            let len = head.positions.len();
            let sink = self.sink.min(*budget);
            HeadScores {
                scores: (0..len).map(|i| i as f32).collect(),
                protected: (0..len).map(|i| i < sink).collect(),
            }
        };
        Ok(layer.heads.iter().zip(budget).map(score).collect())
    }
}
