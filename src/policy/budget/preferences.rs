//! CAKE's budget: layers whose attention is spread out and changes get more.
//!
//! ```text
//! A[t, j]     = mean over the query heads of the layer of P[h, t, j], for the last w queries t
//! H           = - sum over j of m[j] ln m[j]  with m[j] = mean over t of A[t, j]
//! V           = sum over j of the variance over t of A[t, j]
//! preference  = H^(1/tau1) V^(1/tau2)
//! layer share = allowance of the model * preference / sum of preferences
//! ```
//!
//! `j` runs over the tokens before the window. What a layer cannot use goes to the others. The authors
//! shrink earlier layers as they meet later ones, so that no more than the final budget is ever held;
//! here all layers are scored first. Heads that hold different tokens count by themselves.

use super::{Budget, Entry};
use crate::error::Result;
use crate::policy::LayerInput;
use crate::policy::score::QueryWindow;
use crate::registry::{Domain, Param};
use crate::shape::{LaneWidth, Needs};

pub(super) static ENTRY: Entry = Entry {
    name: "preferences",
    summary: "layers whose attention is spread out and changes get more of the allowance",
    paper: "CAKE, arXiv 2503.12491",
    params: &[
        Param {
            name: "w",
            help: "queries of the observation window",
            domain: Domain::Int { default: 32, min: 1, max: 4096 },
        },
        Param {
            name: "tau1",
            help: "temperature of the entropy",
            domain: Domain::Real { default: 1.0, min: 1e-2, max: 1e2 },
        },
        Param {
            name: "tau2",
            help: "temperature of the variance",
            domain: Domain::Real { default: 1.0, min: 1e-2, max: 1e2 },
        },
    ],
    needs: Needs::KEYS.union(Needs::QUERY_WINDOW),
    examples: &["snapkv(w=32) | preferences(w=32) | keep(0.25)"],
    create: |args| {
        let [tau1, tau2] = ["tau1", "tau2"].map(|name| args.real(name));
        Ok(Box::new(Preferences { window: args.count("w"), tau1, tau2 }))
    },
};

#[derive(Debug)]
struct Preferences {
    window: usize,
    tau1: f64,
    tau2: f64,
}

impl Budget for Preferences {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn query_window(&self) -> usize {
        self.window
    }

    fn preference(&self, layer: &LayerInput<'_>) -> Result<Option<f64>> {
        let mut heads = Vec::new();
        QueryWindow::score_heads("preferences", self.window, layer, |window, probabilities| {
            let (mean, variance) = window.moments(probabilities);
            let entropy = mean.iter().filter(|p| **p > 0.0);
            let entropy: f64 = entropy.map(|p| -f64::from(*p) * f64::from(*p).ln()).sum();
            let variance: f64 = variance.iter().map(|x| f64::from(*x)).sum();
            heads.push(entropy.powf(1.0 / self.tau1) * variance.powf(1.0 / self.tau2));
            vec![0.0; window.len()]
        })?;
        Ok(Some(heads.iter().sum::<f64>() / heads.len().max(1) as f64))
    }

    fn is_global(&self) -> bool {
        true
    }

    fn lane_width(&self) -> LaneWidth {
        LaneWidth::Layer
    }
}

#[cfg(test)]
mod tests {
    use super::super::Model;
    use super::*;

    #[test]
    fn layers_get_what_they_prefer_and_leave_what_they_cannot_use() {
        let budget = Preferences { window: 1, tau1: 1.0, tau2: 1.0 };
        let divide = |preferences: &[f64], len: usize, share: usize| {
            let heads = 2 * preferences.len();
            let counts = &vec![2; preferences.len()];
            let (lens, shares) = (&vec![len; heads], &vec![share; heads]);
            budget.divide(&Model { counts, lens, shares }, preferences)
        };
        assert_eq!(divide(&[1.0, 1.0], 100, 11), [11; 4]);
        assert_eq!(divide(&[3.0, 1.0], 100, 11), [16, 16, 6, 6]);
        assert_eq!(divide(&[3.0, 1.0], 14, 11), [14, 14, 8, 8], "the first layer is full");
        assert_eq!(divide(&[0.0, 1.0, 0.0], 100, 11), [1, 1, 31, 31, 1, 1]);
        assert_eq!(divide(&[0.0, 0.0], 100, 11), [11; 4], "nobody prefers anything");
        assert_eq!(divide(&[f64::NAN, 1.0], 100, 11), [11; 4]);
        assert_eq!(divide(&[1.0, 2.0], 100, 1), [1; 4]);
        let model = Model { counts: &[3], lens: &[0, 2, 9], shares: &[1, 2, 9] };
        let uneven = budget.divide(&model, &[1.0]);
        assert_eq!(uneven, [1, 2, 9], "what one head lacks the others have");
        for (preferences, share) in [([0.3, 0.1, 0.9], 17), ([5.0, 1e-9, 2.0], 40)] {
            let total: usize = divide(&preferences, 60, share).iter().sum();
            assert_eq!(total, 6 * share);
        }
    }
}
