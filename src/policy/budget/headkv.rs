//! HeadKV: a pool that all heads chip in to goes to heads by their scores from a file.
//!
//! ```text
//! pool    = int(n / beta)                     taken from every head of the model
//! n_h     = n - pool + round(w[layer, h] * pool * heads of the model),   w summing to 1
//! ```
//!
//! Scores measure how much a head retrieves or reasons. File: `scores` `[num_layers, num_kv_heads]`,
//! none negative; they are scaled to a sum of 1.

use super::{Budget, Entry};
use crate::error::{Result, ensure};
use crate::policy::HeadScores;
use crate::policy::weights::Weights;
use crate::registry::{Domain, Param};
use crate::shape::{LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "headkv",
    summary: "heads keep more the higher their score from a file",
    paper: "HeadKV, arXiv 2410.19258",
    params: &[
        Param {
            name: "file",
            help: "a safetensors file with the scores of heads",
            domain: Domain::File,
        },
        Param {
            name: "beta",
            help: "n / beta tokens of every head are given out by score",
            domain: Domain::Real { default: 1.2, min: 1.0, max: 1e6 },
        },
    ],
    needs: Needs::NONE,
    examples: &["snapkv | headkv(file=\"headkv.safetensors\", beta=1.2) | keep(0.25)"],
    create: |args| {
        Ok(Box::new(HeadKv { file: Weights::required(args, "file")?, beta: args.real("beta") }))
    },
};

#[derive(Debug)]
struct HeadKv {
    file: Weights,
    beta: f64,
}

impl Budget for HeadKv {
    fn spread(&self, layer: usize, scores: &[HeadScores], shares: &[usize]) -> Result<Vec<usize>> {
        if scores.iter().zip(shares).all(|(head, share)| head.scores.len() <= *share) {
            return Ok(scores.iter().map(|head| head.scores.len()).collect());
        }
        let shape = self.file.shape("scores")?;
        ensure!(
            matches!(shape, [layers, heads] if layer < *layers && scores.len() == *heads),
            InvalidArgument,
            "headkv: scores have shape {shape:?}, layer {layer} has {} KV heads",
            scores.len()
        );
        let heads = shape[1];
        let all = self.file.tensor("scores", &[shape[0], heads])?;
        let total: f64 = all.iter().map(|score| f64::from(score.max(0.0))).sum();
        let budget = |(h, (head, share)): (usize, (&HeadScores, &usize))| {
            let pool = (*share as f64 / self.beta) as usize;
            let weight = f64::from(all[layer * heads + h].max(0.0)) / total.max(f64::MIN_POSITIVE);
            let extra = (weight * (pool * all.len()) as f64).round() as usize;
            (share - pool + extra).max(1).min(head.scores.len())
        };
        Ok(scores.iter().zip(shares).enumerate().map(budget).collect())
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Head
    }
}
