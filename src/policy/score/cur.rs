//! CUR: tokens whose keys and values are long compared with their neighbours.
//!
//! ```text
//! k[j]     = |key[j]|^2   / sum of |key|^2   over the window of j
//! v[j]     = |value[j]|^2 / sum of |value|^2 over the window of j
//! score[j] = k * v, or the other combinations of `by`, normalised to a sum of 1
//! ```
//!
//! Windows are runs of `window` tokens; the norms approximate leverage scores. Sinks are protected.

use super::{Entry, Score, per_head};
use crate::error::Result;
use crate::policy::{HeadInput, HeadScores, LayerInput};
use crate::registry::{Domain, Param};
use crate::shape::Needs;
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "cur",
    summary: "keeps tokens whose keys and values are long among their neighbours",
    paper: "CurDKV, arXiv 2509.15038",
    params: &[
        Param {
            name: "sink",
            help: "leading tokens that stay",
            domain: Domain::Int { default: 4, min: 0, max: 1 << 20 },
        },
        Param {
            name: "window",
            help: "tokens of a window",
            domain: Domain::Int { default: 16, min: 1, max: 1 << 20 },
        },
        Param {
            name: "by",
            help: "what is compared",
            domain: Domain::Choice(&["product", "key", "value", "average"]),
        },
    ],
    needs: Needs::KEYS.union(Needs::VALUES),
    examples: &["cur | keep(0.5)", "cur(by=value, window=32) | keep(0.25)"],
    create: |args| {
        let combine: fn(f32, f32) -> f32 = match args.text("by") {
            "key" => |key, _| key,
            "value" => |_, value| value,
            "average" => |key, value| (key + value) / 2.0,
            _ => |key, value| key * value,
        };
        Ok(Box::new(Cur { sink: args.count("sink"), window: args.count("window"), combine }))
    },
};

#[derive(Debug)]
struct Cur {
    sink: usize,
    window: usize,
    combine: fn(f32, f32) -> f32,
}

impl Score for Cur {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn score(&self, layer: &LayerInput<'_>, _budgets: &[usize]) -> Result<Vec<HeadScores>> {
        Ok(per_head(layer, |head| self.score_head(head, layer.head_dim, layer.value_dim)))
    }
}

impl Cur {
    fn score_head(&self, head: &HeadInput<'_>, key_dim: usize, value_dim: usize) -> HeadScores {
        let keys = relative_squares(head.keys, key_dim, self.window);
        let values = relative_squares(head.values, value_dim, self.window);
        let pairs = keys.iter().zip(&values);
        let mut scores: Vec<f32> = pairs.map(|(k, v)| (self.combine)(*k, *v)).collect();
        let total: f32 = scores.iter().sum();
        if total > 0.0 {
            scores.iter_mut().for_each(|score| *score /= total);
        }
        HeadScores { protected: (0..scores.len()).map(|i| i < self.sink).collect(), scores }
    }
}

/// The squared norm of each row over the sum of its window; 0 in a window of zeros.
fn relative_squares(rows: &[f32], dim: usize, window: usize) -> Vec<f32> {
    let kernels = simd::active();
    let mut squares: Vec<f32> =
        rows.chunks_exact(dim).map(|row| kernels.dot_f32(row, row)).collect();
    for window in squares.chunks_mut(window) {
        let total: f32 = window.iter().sum();
        if total > 0.0 {
            window.iter_mut().for_each(|square| *square /= total);
        }
    }
    squares
}
