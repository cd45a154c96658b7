//! LU-KV: what each head gives up, from a curve that was measured offline.
//!
//! ```text
//! t       = round(100 (1 - n / T))                    the wanted part that goes, in percent
//! ideal_h = (1 - curve[t - 1, layer, h]) T
//! n_h     = ideal_h rounded by largest remainders, so that the layer keeps round(sum of ideal)
//! ```
//!
//! The curve belongs to a model and a score. File: `curve` `[99, num_layers, num_kv_heads]`.

use super::{Budget, Entry};
use crate::error::{Result, ensure};
use crate::policy::HeadScores;
use crate::policy::weights::Weights;
use crate::registry::{Domain, Param};
use crate::shape::{LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "lukv",
    summary: "heads keep what a curve from a file says",
    paper: "LU-KV, arXiv 2602.08585",
    params: &[Param {
        name: "file",
        help: "a safetensors file with the curve",
        domain: Domain::File,
    }],
    needs: Needs::NONE,
    examples: &["expected(eps=2e-2) | protect(4, 1) | lukv(file=\"lukv.safetensors\") | keep(0.5)"],
    create: |args| Ok(Box::new(LuKv { file: Weights::required(args, "file")? })),
};

#[derive(Debug)]
struct LuKv {
    file: Weights,
}

impl Budget for LuKv {
    fn spread(&self, layer: usize, scores: &[HeadScores], shares: &[usize]) -> Result<Vec<usize>> {
        let lens: Vec<usize> = scores.iter().map(|head| head.scores.len()).collect();
        let total: usize = lens.iter().sum();
        let allowed: usize = lens.iter().zip(shares).map(|(len, share)| *len.min(share)).sum();
        if allowed == total {
            return Ok(lens);
        }
        let shape = self.file.shape("curve")?;
        ensure!(
            matches!(shape, [99, layers, heads] if layer < *layers && scores.len() == *heads),
            InvalidArgument,
            "lukv: the curve has shape {shape:?}, layer {layer} has {} KV heads",
            scores.len()
        );
        let (layers, heads) = (shape[1], shape[2]);
        let curve = self.file.tensor("curve", &[99, layers, heads])?;
        let percent = (100.0 * (1.0 - allowed as f64 / total as f64)).round() as usize;
        let ratios = &curve[((percent.clamp(1, 99) - 1) * layers + layer) * heads..][..heads];
        let ideal = |(ratio, len): (&f32, &usize)| (1.0 - ratio).clamp(0.0, 1.0) * *len as f32;
        let ideal: Vec<f32> = ratios.iter().zip(&lens).map(ideal).collect();
        let mut kept: Vec<usize> = ideal.iter().map(|ideal| *ideal as usize).collect();
        let wanted = ideal.iter().sum::<f32>().round() as usize;
        let left = wanted.saturating_sub(kept.iter().sum());
        let mut order: Vec<usize> = (0..heads).collect();
        order.sort_by(|a, b| ideal[*b].fract().total_cmp(&ideal[*a].fract()));
        order.iter().take(left).for_each(|head| kept[*head] += 1);
        Ok(kept.iter().zip(&lens).map(|(kept, len)| (*kept).max(1).min(*len)).collect())
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Head
    }
}
