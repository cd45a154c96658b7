//! Finch: what the question attends to, each query weighted by how much it could see.
//!
//! ```text
//! score[j] = mean over the group's heads and the last w queries t of P[t, j] * position[t]
//! ```
//!
//! SnapKV without pooling, for a window that is the question behind a document. The weight makes up
//! for rows that share their probability among more tokens. The window is protected. The authors close
//! the gaps of positions: `finch(...) | keep(...) | pos(cache_relative)`.

use super::{Entry, Score, WindowProbabilities};
use crate::error::{Result, ensure};
use crate::policy::{Allowance, Event, HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::{LaneWidth, Needs};
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "finch",
    summary: "keeps what the question at the end of the prompt attends to",
    paper: "Finch, TACL 2024, arXiv 2408.00167",
    params: &[
        Param {
            name: "w",
            help: "queries of the question",
            domain: Domain::Int { default: 64, min: 1, max: 4096 },
        },
        Param {
            name: "normalize",
            help: "whether queries are weighted by what they could see",
            domain: Domain::Choice(&["yes", "no"]),
        },
    ],
    needs: Needs::KEYS.union(Needs::QUERY_WINDOW),
    examples: &["finch(w=32) | keep(0.25) | pos(cache_relative)", "finch | keep(0.5)"],
    create: |args| {
        let normalize = args.text("normalize") == "yes";
        Ok(Box::new(Finch { window: args.count("w"), normalize }))
    },
};

#[derive(Debug)]
struct Finch {
    window: usize,
    normalize: bool,
}

impl Score for Finch {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn query_window(&self) -> usize {
        self.window
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Head
    }

    fn events(&self, _allowance: Allowance) -> &'static [Event] {
        &[Event::PrefillEnd]
    }

    fn keeps_whole(&self) -> usize {
        self.window
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let mut probabilities = WindowProbabilities::new(simd::active());
        layer.heads.iter().map(|head| self.score_head(layer, head, &mut probabilities)).collect()
    }
}

impl Finch {
    fn score_head(
        &self,
        layer: &LayerInput<'_>,
        head: &HeadInput<'_>,
        probabilities: &mut WindowProbabilities,
    ) -> Result<HeadScores> {
        let (positions, len, dim) = (head.positions, head.positions.len(), layer.head_dim);
        if len <= self.window {
            return Ok(HeadScores { scores: vec![0.0; len], protected: vec![true; len] });
        }
        let window = head.num_queries.min(self.window);
        ensure!(window > 0, InvalidState, "finch has observed no queries of the last tokens");
        let position = |t: usize| i64::from(positions[len - 1]) - (window - 1 - t) as i64;
        let up_to = |last: i64| positions.partition_point(|p| i64::from(*p) <= last);
        let old = up_to(position(0) - 1);
        let mut scores = vec![0.0f32; len];
        for queries in head.queries.chunks_exact(head.num_queries * dim) {
            let queries = &queries[(head.num_queries - window) * dim..];
            let rows = probabilities.compute(head.keys, queries, dim, |t| up_to(position(t)));
            for (t, row) in rows.chunks_exact(len).enumerate() {
                let seen = if self.normalize { position(t).max(0) as f32 } else { 1.0 };
                let weight = seen / (layer.group * window) as f32;
                scores[..old].iter_mut().zip(row).for_each(|(sum, p)| *sum += weight * p);
            }
        }
        Ok(HeadScores { scores, protected: (0..len).map(|i| i >= old).collect() })
    }
}
