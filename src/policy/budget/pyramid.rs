//! PyramidKV: lower layers keep more than upper ones, the same for all heads of a layer.
//!
//! ```text
//! n = what `keep` allows, T = tokens of the head, L = layers
//! min = n / beta, max = 2 n - min;   if max >= T - w: max = T - w, min = 2 n - max
//! budget of layer l = round(max - l (max - min) / (L - 1));   n unless T >= max >= min >= w
//! ```
//!
//! This is the rule of kvpress: `w` is the observation window of the score, which counts towards the
//! budget. The authors add the window on top. The mean over the layers is `n`.

use super::{Budget, Entry, LayerShare};
use crate::registry::{Domain, Param};
use crate::shape::{LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "pyramid",
    summary: "lower layers keep more than upper ones",
    paper: "PyramidKV, arXiv 2406.02069",
    params: &[
        Param {
            name: "w",
            help: "fewest tokens of a layer: the observation window",
            domain: Domain::Int { default: 64, min: 0, max: 1 << 20 },
        },
        Param {
            name: "beta",
            help: "how steep: a layer keeps at least n / beta",
            domain: Domain::Real { default: 20.0, min: 1.0, max: 1e6 },
        },
    ],
    needs: Needs::NONE,
    examples: &[
        "snapkv | pyramid | keep(0.25)",
        "snapkv(w=16) | pyramid(16, 10) | keep_tokens(64)",
    ],
    create: |args| Ok(Box::new(Pyramid { window: args.real("w"), beta: args.real("beta") })),
};

#[derive(Debug)]
struct Pyramid {
    window: f64,
    beta: f64,
}

impl Budget for Pyramid {
    fn layer_share(&self, at: &LayerShare) -> usize {
        let (n, len) = (at.share as f64, at.len as f64);
        let (mut min, mut max) = (n / self.beta, 2.0 * n - n / self.beta);
        if max >= len - self.window {
            max = len - self.window;
            min = 2.0 * n - max;
        }
        if at.num_layers < 2 || !(len >= max && max >= min && min >= self.window) {
            return at.share;
        }
        let step = (max - min) / (at.num_layers - 1) as f64;
        (max - at.layer as f64 * step).round().max(1.0) as usize
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Layer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(len: usize, share: usize, num_layers: usize) -> Vec<usize> {
        let pyramid = Pyramid { window: 64.0, beta: 20.0 };
        let at = |layer| LayerShare { layer, num_layers, len, share };
        (0..num_layers).map(|layer| pyramid.layer_share(&at(layer))).collect()
    }

    #[test]
    fn the_mean_over_the_layers_is_the_share() {
        assert_eq!(shares(512, 256, 2), [448, 64]);
        for (len, share, layers) in [(8192, 2000, 32), (4096, 2048, 8), (8192, 1300, 5)] {
            let found = shares(len, share, layers);
            assert!(found.is_sorted_by(|a, b| a > b), "{found:?}");
            let total: usize = found.iter().sum();
            assert!(total.abs_diff(layers * share) <= layers, "{found:?}");
        }
    }

    #[test]
    fn what_is_too_small_for_a_pyramid_stays_uniform() {
        assert_eq!(shares(512, 128, 2), [128, 128]);
        assert_eq!(shares(512, 256, 1), [256]);
        assert_eq!(shares(30, 30, 4), [30; 4]);
        assert_eq!(shares(0, 1, 4), [1; 4]);
    }
}
