//! Compactor: leverage of keys and attention inside chunks, blended.
//!
//! ```text
//! score[j] = blend * leverage[j] + noncausal[j],   both standardized over the layer's heads
//! ```
//!
//! The first and the last tokens are protected and take no part. `blend` is the part that goes unless
//! a number is given: the fewer tokens stay, the more leverage counts.

use super::leverage::{FILE, SEED, SKETCH, Sketch};
use super::noncausal::{self, CHUNK};
use super::{ALL_QUERIES, Entry, Score};
use crate::error::Result;
use crate::policy::{HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "compactor",
    summary: "keeps keys that are read inside their chunk or that others cannot stand in for",
    paper: "Compactor, arXiv 2507.08143",
    params: &[
        CHUNK,
        SKETCH,
        Param {
            name: "blend",
            help: "weight of leverage; -1: the fraction that goes",
            domain: Domain::Real { default: -1.0, min: -1.0, max: 100.0 },
        },
        Param {
            name: "sink",
            help: "leading tokens that stay",
            domain: Domain::Int { default: 8, min: 0, max: 1 << 20 },
        },
        Param {
            name: "recent",
            help: "newest tokens that stay",
            domain: Domain::Int { default: 4, min: 0, max: 1 << 20 },
        },
        SEED,
        FILE,
    ],
    needs: Needs::KEYS.union(Needs::VALUES).union(Needs::QUERY_WINDOW).union(Needs::ROPE),
    examples: &[
        "compactor | keep(0.5)",
        "compactor(chunk=64, blend=0.35) | adakv(0.2) | keep(0.5)",
    ],
    create: |args| {
        let blend = args.real("blend") as f32;
        Ok(Box::new(Compactor {
            sketch: Sketch::new(args)?,
            chunk: args.count("chunk"),
            blend: (blend >= 0.0).then_some(blend),
            sink: args.count("sink"),
            recent: args.count("recent"),
        }))
    },
};

#[derive(Debug)]
struct Compactor {
    sketch: Sketch,
    chunk: usize,
    blend: Option<f32>,
    sink: usize,
    recent: usize,
}

impl Score for Compactor {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn query_window(&self) -> usize {
        ALL_QUERIES
    }

    fn keeps_whole(&self) -> usize {
        self.sink.saturating_add(self.recent)
    }

    fn score(&self, layer: &LayerInput<'_>, budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let inner = |head: &HeadInput<'_>| {
            let len = head.positions.len();
            let start = self.sink.min(len);
            start..len - self.recent.min(len - start)
        };
        let leverage = self.sketch.score(layer, inner)?;
        let read = noncausal::score("compactor", self.chunk, layer, inner)?;
        let mut heads = Vec::with_capacity(layer.heads.len());
        for (h, head) in layer.heads.iter().enumerate() {
            let (len, range) = (head.positions.len(), inner(head));
            let gone = 1.0 - budgets[h] as f32 / len.max(1) as f32;
            let weight = self.blend.unwrap_or(gone);
            let mut scores = vec![0.0f32; len];
            let both = leverage[h].iter().zip(&read[h]);
            for (score, (leverage, read)) in scores[range.clone()].iter_mut().zip(both) {
                *score = weight * leverage + read;
            }
            let protected = (0..len).map(|i| !range.contains(&i)).collect();
            heads.push(HeadScores { scores, protected });
        }
        Ok(heads)
    }
}
