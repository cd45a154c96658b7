//! TurboQuant for the mean square error: a norm, a rotation and Lloyd-Max levels.
//!
//! ```text
//! y = x H        u = y / |y| * sqrt(dim)        q = level nearest to u
//! n = |y| / |levels[q]| as f16                  x = n * levels[q] H
//! row = a stream of dim codes of `bits` bits, lowest bits first, then n
//! ```
//!
//! H is the rotation of `had+`, after which the coordinates of a row are close to a known
//! distribution, whose best levels need no data: those of the exact marginal on the sphere for dim 64
//! and 128, of the normal distribution otherwise. Dividing by the norm of the chosen levels keeps the
//! length of the row (norm correction). The second stage of the paper (QJL on the residual) is left
//! out: it makes attention worse. Rotated magnitudes saturate at 32768.

use super::token::TokenQuantizer;
use super::{Entry, had};
use crate::registry::{Domain, Param};
use crate::simd::Format;

pub(super) static ENTRY: Entry = Entry {
    name: NAME,
    summary: "2, 3 or 4 bits and an f16 norm: rotated rows on Lloyd-Max levels",
    paper: "TurboQuant, arXiv 2504.19874",
    params: &[Param {
        name: "bits",
        help: "bits of a code: 2, 3 or 4",
        domain: Domain::Int { default: 4, min: 2, max: 4 },
    }],
    aliases: &[("tq2", "tq(bits=2)"), ("tq3", "tq(bits=3)"), ("tq4", "tq(bits=4)")],
    examples: &["tq(bits=2)", "tq(bits=3)", "tq(bits=4)"],
    create: |args, _, kernels| {
        let (spec, format) = match args.count("bits") {
            2 => ("tq(bits=2)", Format::Tq2),
            3 => ("tq(bits=3)", Format::Tq3),
            _ => ("tq(bits=4)", Format::Tq4),
        };
        let codes = TokenQuantizer::coded(spec, format, kernels)?;
        Ok(had::rotated(spec.into(), codes, kernels))
    },
};

pub(super) const NAME: &str = "tq";
