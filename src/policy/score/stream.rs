//! StreamingLLM: the first `sink` tokens and the most recent ones.
//!
//! ```text
//! keep = [0, sink) + the last (n - sink) tokens,   n = sink + recent, or what `keep` allows
//! ```
//!
//! Without positions of its own (`pos(keep)`) this is what kvpress does; the paper's method is
//! `stream(...) | pos(cache_relative)`. If `n` is at most `sink`, the first `n` tokens stay. A
//! number of tokens is kept up at each step; a ratio is applied once, when the prompt ends.

use super::{Entry, Score};
use crate::error::Result;
use crate::policy::{Allowance, Event, HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::{KeepSet, LaneWidth, Needs};

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
    needs: Needs::NONE,
    examples: &[
        "stream(sink=4, recent=124)",
        "stream(sink=4, recent=124) | pos(cache_relative)",
        "stream | keep(0.5)",
        "stream | keep_tokens(256) | quant(k=kivi2)",
    ],
    create: |args| Ok(Box::new(Stream { sink: args.count("sink"), recent: args.count("recent") })),
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

    fn events(&self, allowance: Allowance) -> &'static [Event] {
        match allowance {
            Allowance::Ratio(_) => &[Event::PrefillEnd],
            _ => &[Event::PrefillEnd, Event::Step],
        }
    }

    fn keeps_runs(&self) -> bool {
        true
    }

    fn own_allowance(&self) -> Option<Allowance> {
        (self.recent > 0).then(|| Allowance::Tokens(self.sink + self.recent))
    }

    fn keeps_whole(&self) -> usize {
        self.sink
    }

    fn top(&self, len: usize, n: usize) -> Option<KeepSet> {
        let n = n.min(len);
        let sink = self.sink.min(n);
        let mut kept = KeepSet::default();
        kept.push_range(0..sink);
        kept.push_range(len - (n - sink)..len);
        Some(kept)
    }

    /// Recency is the score: the sinks are protected, and later tokens score higher.
    fn score(&self, layer: &LayerInput<'_>, budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let score = |(head, budget): (&HeadInput<'_>, &usize)| {
            let len = head.positions.len();
            let sink = self.sink.min(*budget);
            HeadScores {
                scores: (0..len).map(|i| i as f32).collect(),
                protected: (0..len).map(|i| i < sink).collect(),
            }
        };
        Ok(layer.heads.iter().zip(budgets).map(score).collect())
    }
}
