//! SqueezeAttention: layers whose attention changes the residual stream least keep less.
//!
//! ```text
//! c_l    = mean over the tokens of the prompt of cos(x, x + attention_l(x)), x the residual stream
//! groups = the 3 runs of the sorted c with the least sum of squares around their means
//! share of layer l = p n_l               in the group of the highest cosines
//!                  = n_l + freed / k     in the k others
//! ```
//!
//! That is k-means in one dimension, solved exactly: the authors' start is random. Of equally good
//! groups the one with the most layers of high cosine counts. Layers of the same cosine are in the same
//! group; if all are, none is squeezed. What a layer cannot use goes to the others, and to the squeezed
//! ones last. Later runs of the policy use the cosines of the prompt too. Tokens of a shared prefix, which
//! are not computed, have none.

use super::{Budget, Entry, Model, pour};
use crate::error::{Result, bail};
use crate::policy::LayerInput;
use crate::registry::{Domain, Param};
use crate::shape::{LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "squeeze",
    summary: "layers whose attention changes the residual stream least keep less",
    paper: "SqueezeAttention, arXiv 2404.04793",
    params: &[Param {
        name: "p",
        help: "what stays of the allowance of these layers",
        domain: Domain::Real { default: 0.35, min: 0.0, max: 1.0 },
    }],
    needs: Needs::RESIDUAL,
    examples: &[
        "snapkv(w=32) | squeeze | keep(0.25)",
        "h2o(recent=16) | squeeze(0.3) | keep_tokens(64)",
    ],
    create: |args| Ok(Box::new(Squeeze { part: args.real("p") })),
};

#[derive(Debug)]
struct Squeeze {
    part: f64,
}

impl Budget for Squeeze {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn preference(&self, layer: &LayerInput<'_>) -> Result<Option<f64>> {
        let LayerInput { layer, attention_cosine, .. } = *layer;
        if attention_cosine.is_none() {
            bail!(InvalidState, "squeeze: layer {layer} has seen no residual stream of the prompt");
        }
        Ok(attention_cosine)
    }

    fn divide(&self, model: &Model<'_>, cosines: &[f64]) -> Vec<usize> {
        let is_squeezed = least_changed(cosines);
        let (mut rooms, mut left) = (model.rooms(), 0);
        let mut given = Vec::with_capacity(rooms.len());
        for ((heads, room), squeeze) in model.layers().zip(&mut rooms).zip(&is_squeezed) {
            // Every head has one token already.
            let (least, share) = (heads.len(), model.shares[heads].iter().sum::<usize>());
            let wanted = match squeeze {
                true => (share as f64 * self.part + 1e-9) as usize,
                false => share,
            };
            let fits = wanted.saturating_sub(least).min(*room);
            left += share.saturating_sub(least + fits);
            *room -= fits;
            given.push(fits);
        }
        for squeezed in [false, true] {
            let open = rooms.iter().zip(&is_squeezed);
            let open = open.map(|(room, is)| if *is == squeezed { *room } else { 0 });
            let more = pour(left, &vec![1.0; rooms.len()], &open.collect::<Vec<_>>());
            left -= more.iter().sum::<usize>();
            given.iter_mut().zip(&mut rooms).zip(more).for_each(|((given, room), more)| {
                *given += more;
                *room -= more;
            });
        }
        model.to_heads(&given)
    }

    fn is_global(&self) -> bool {
        true
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Layer
    }
}

/// Whether each layer is in the group of the highest cosines.
fn least_changed(cosines: &[f64]) -> Vec<bool> {
    let mut sorted = cosines.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    match last_group(&sorted) {
        Some(start) => cosines.iter().map(|cosine| *cosine >= sorted[start]).collect(),
        None => vec![false; cosines.len()],
    }
}

/// Where the last of 3 groups of ascending numbers starts, or of 2 if there are only two numbers; `None`
/// if there are fewer.
fn last_group(sorted: &[f64]) -> Option<usize> {
    // Equal numbers are not told apart.
    let cuts: Vec<usize> = (1..sorted.len()).filter(|i| sorted[i - 1] < sorted[*i]).collect();
    if cuts.len() < 2 {
        return cuts.first().copied();
    }
    // Around the mean, where differences of sums lose least.
    let mean = sorted.iter().sum::<f64>() / sorted.len() as f64;
    let mut sums = vec![(0.0, 0.0)];
    for x in sorted.iter().map(|x| x - mean) {
        let (sum, squares) = sums[sums.len() - 1];
        sums.push((sum + x, squares + x * x));
    }
    let spread = |start: usize, end: usize| {
        let (sum, squares) = (sums[end].0 - sums[start].0, sums[end].1 - sums[start].1);
        squares - sum * sum / (end - start) as f64
    };
    let mut best = (f64::INFINITY, cuts[1]);
    for (n, last) in cuts.iter().enumerate().skip(1) {
        for first in &cuts[..n] {
            let found = spread(0, *first) + spread(*first, *last) + spread(*last, sorted.len());
            if found < best.0 {
                best = (found, *last);
            }
        }
    }
    Some(best.1)
}
