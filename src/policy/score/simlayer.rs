//! SimLayerKV: layers that only look at sinks and recent tokens keep nothing else.
//!
//! ```text
//! mass  = mean over query heads and the last `last` queries of the probability on the first `sink` and
//!         the newest `recent` tokens
//! layer keeps sink + (recent - last) tokens if mass > threshold, else everything
//! ```
//!
//! The authors suggest thresholds of 0.65 to 0.9 by model; a layer of streaming heads decides as one.

use super::{Entry, Score, WindowProbabilities};
use crate::error::{Result, ensure};
use crate::policy::{Allowance, HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::{LaneWidth, Needs};
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "simlayer",
    summary: "layers that look at sinks and recent tokens alone stream, the others keep everything",
    paper: "SimLayerKV, arXiv 2410.13846",
    params: &[
        Param {
            name: "threshold",
            help: "probability on sinks and recent tokens above which a layer streams",
            domain: Domain::Real { default: 0.9, min: 0.0, max: 1.0 },
        },
        Param {
            name: "sink",
            help: "leading tokens that stay",
            domain: Domain::Int { default: 4, min: 0, max: 1 << 20 },
        },
        Param {
            name: "recent",
            help: "newest tokens that stay, more than last",
            domain: Domain::Int { default: 1024, min: 2, max: 1 << 30 },
        },
        Param {
            name: "last",
            help: "queries that are asked",
            domain: Domain::Int { default: 1, min: 1, max: 4096 },
        },
    ],
    needs: Needs::KEYS.union(Needs::QUERY_WINDOW),
    examples: &["simlayer(threshold=0.7, sink=4, recent=64)"],
    create: |args| {
        let (recent, last) = (args.count("recent"), args.count("last"));
        ensure!(
            last < recent,
            InvalidArgument,
            "simlayer: last is {last}, must be below recent {recent}"
        );
        let threshold = args.real("threshold") as f32;
        Ok(Box::new(SimLayer { threshold, sink: args.count("sink"), recent, last }))
    },
};

#[derive(Debug)]
struct SimLayer {
    threshold: f32,
    sink: usize,
    recent: usize,
    last: usize,
}

impl Score for SimLayer {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn query_window(&self) -> usize {
        self.last
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Layer
    }

    fn keeps_runs(&self) -> bool {
        true
    }

    fn own_allowance(&self) -> Option<Allowance> {
        Some(Allowance::Threshold(0.5))
    }

    fn keeps_whole(&self) -> usize {
        self.sink.saturating_add(self.recent)
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let mut probabilities = WindowProbabilities::new(simd::active());
        let (mut mass, mut rows) = (0.0f32, 0usize);
        for head in layer.heads.iter().filter(|head| !head.positions.is_empty()) {
            ensure!(head.num_queries > 0, InvalidState, "simlayer has observed no queries");
            let (len, n) = (head.positions.len(), head.num_queries.min(self.last));
            for queries in head.queries.chunks_exact(head.num_queries * layer.head_dim) {
                let last = &queries[(head.num_queries - n) * layer.head_dim..];
                let visible = |t: usize| len + t + 1 - n.min(len + t);
                for row in
                    probabilities.compute(head.keys, last, layer.head_dim, visible).chunks(len)
                {
                    let near = |(i, p): (usize, &f32)| if self.is_near(i, len) { *p } else { 0.0 };
                    mass += row.iter().enumerate().map(near).sum::<f32>();
                    rows += 1;
                }
            }
        }
        let streams = mass / rows.max(1) as f32 > self.threshold;
        let score = |head: &HeadInput<'_>| {
            let len = head.positions.len();
            let stays =
                |i: usize| !streams || i < self.sink || i + (self.recent - self.last) >= len;
            HeadScores::open((0..len).map(|i| if stays(i) { 1.0 } else { 0.0 }).collect())
        };
        Ok(layer.heads.iter().map(score).collect())
    }
}

impl SimLayer {
    fn is_near(&self, i: usize, len: usize) -> bool {
        i < self.sink || i + self.recent >= len
    }
}
