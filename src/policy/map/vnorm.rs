//! Scores times the length of the value: a probability says how often, the value how much.
//!
//! ```text
//! score'[j] = (score[j] + eps) * |v[j]|_2
//! ```

use super::{Context, Entry, Map, Scores};
use crate::error::Result;
use crate::registry::{Domain, Param};
use crate::shape::{LaneWidth, Needs};
use crate::simd;

pub(super) static ENTRY: Entry = Entry {
    name: "vnorm",
    summary: "scores times the length of the value",
    paper: "VATP, arXiv 2406.12335",
    params: &[Param {
        name: "eps",
        help: "added to the score",
        domain: Domain::Real { default: 0.0, min: 0.0, max: 1.0 },
    }],
    needs: Needs::VALUES,
    examples: &["snapkv | vnorm | keep(0.5)", "h2o | vnorm(eps=1e-2) | keep(0.5)"],
    create: |args| Ok(Box::new(VNorm { epsilon: args.real("eps") as f32 })),
};

#[derive(Debug)]
struct VNorm {
    epsilon: f32,
}

impl Map for VNorm {
    fn lane_width(&self, _before: LaneWidth) -> LaneWidth {
        LaneWidth::Head
    }

    fn needs(&self) -> Needs {
        Needs::VALUES
    }

    fn map(&self, context: &Context<'_>, scores: &mut Scores) -> Result<()> {
        let kernels = simd::active();
        for (head, input) in scores.heads.iter_mut().zip(&context.layer.heads) {
            let values = input.values.chunks_exact(context.layer.value_dim);
            for (score, value) in head.scores.iter_mut().zip(values) {
                *score = (*score + self.epsilon) * kernels.dot_f32(value, value).sqrt();
            }
        }
        Ok(())
    }
}
