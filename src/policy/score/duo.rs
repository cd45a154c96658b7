//! DuoAttention: retrieval heads keep everything, the others stream.
//!
//! ```text
//! streaming heads = the int(ratio * heads of the model) heads with the lowest alpha
//! they keep the first `sink` and the last `recent` tokens, at all times
//! ```
//!
//! File: `alpha` `[num_layers, num_kv_heads]`, the learned gates. Streaming heads take constant memory.
//! RazorAttention is the same with `alpha` from a test for induction heads.

use super::{Entry, Score};
use crate::error::{Result, ensure};
use crate::policy::weights::Weights;
use crate::policy::{Allowance, Event, HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::{KeepSet, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "duo",
    summary: "retrieval heads keep everything, the others the sink and the most recent tokens",
    paper: "DuoAttention, arXiv 2410.10819",
    params: &[
        Param {
            name: "file",
            help: "a safetensors file with the gate of each head",
            domain: Domain::File,
        },
        Param {
            name: "sink",
            help: "leading tokens that streaming heads keep",
            domain: Domain::Int { default: 128, min: 0, max: 1 << 20 },
        },
        Param {
            name: "recent",
            help: "newest tokens that streaming heads keep",
            domain: Domain::Int { default: 256, min: 1, max: 1 << 30 },
        },
        Param {
            name: "ratio",
            help: "fraction of the heads of the model that stream",
            domain: Domain::Real { default: 0.5, min: 0.0, max: 1.0 },
        },
    ],
    needs: Needs::NONE,
    examples: &["duo(file=\"duo.safetensors\", sink=128, recent=256, ratio=0.5)"],
    create: |args| {
        let file = Weights::required(args, "file")?;
        let shape = file.shape("alpha")?.to_vec();
        ensure!(
            shape.len() == 2,
            InvalidArgument,
            "duo: alpha has shape {shape:?}, must have a number for each layer and KV head"
        );
        let alpha = file.tensor("alpha", &shape)?;
        let mut order: Vec<usize> = (0..alpha.len()).collect();
        order.sort_by(|a, b| alpha[*a].total_cmp(&alpha[*b]));
        let mut streams = vec![false; alpha.len()];
        let count = (args.real("ratio") * alpha.len() as f64 + 1e-9) as usize;
        order[..count].iter().for_each(|head| streams[*head] = true);
        Ok(Box::new(Duo {
            streams,
            shape: (shape[0], shape[1]),
            sink: args.count("sink"),
            recent: args.count("recent"),
        }))
    },
};

#[derive(Debug)]
struct Duo {
    /// Whether a head streams, by layer and KV head.
    streams: Vec<bool>,
    shape: (usize, usize),
    sink: usize,
    recent: usize,
}

impl Score for Duo {
    fn needs(&self) -> Needs {
        Needs::NONE
    }

    fn events(&self, _allowance: Allowance) -> &'static [Event] {
        &[Event::PrefillEnd, Event::Step]
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

    fn fixed(&self, layer: usize, num_layers: usize, head: usize, len: usize) -> Option<KeepSet> {
        let (layers, heads) = self.shape;
        if num_layers != layers || layer >= layers || head >= heads {
            return None; // `score` says why.
        }
        if !self.streams[layer * heads + head] {
            return Some(KeepSet::all(len));
        }
        let mut kept = KeepSet::default();
        kept.push_range(0..self.sink.min(len));
        kept.push_range(len.saturating_sub(self.recent).max(self.sink.min(len))..len);
        Some(kept)
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        let (layers, heads) = self.shape;
        ensure!(
            layer.num_layers == layers && layer.heads.len() == heads,
            InvalidArgument,
            "duo: alpha is of {layers} layers of {heads} KV heads, the model has {} of {}",
            layer.num_layers,
            layer.heads.len()
        );
        let score = |(h, head): (usize, &HeadInput<'_>)| {
            let len = head.positions.len();
            let mut scores = vec![0.0f32; len];
            let kept = self.fixed(layer.layer, layers, h, len);
            kept.iter().flat_map(KeepSet::iter).for_each(|i| scores[i] = 1.0);
            HeadScores::open(scores)
        };
        Ok(layer.heads.iter().enumerate().map(score).collect())
    }
}
