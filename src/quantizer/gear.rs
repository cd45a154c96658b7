//! GEAR: KIVI's codes, a few outliers in half precision, and a low-rank matrix for what remains.
//!
//! ```text
//! x = s * q + m + (A B)[t, c]        A [tokens, rank], B [rank, dim] in f16
//! ```
//!
//! Keys are coded for each channel, values for each token, in groups of `group` tokens; `grouped.rs`
//! has the layout. A B is close to the best approximation of its rank to the error of the codes. It
//! takes 16 * rank * (tokens + dim) bits for each group, much for short groups. The paper stores one
//! matrix for all tokens of a prompt.

use std::sync::Arc;

use super::Entry;
use super::grouped::{BITS, GROUP, Grouped, Levels, outliers};
use crate::registry::{Domain, Param};

pub(super) static ENTRY: Entry = Entry {
    name: "gear",
    summary: "2 to 4 bits, 2 % outliers in f16 and a low-rank matrix for the error",
    paper: "GEAR, arXiv 2403.05527",
    params: &[BITS, GROUP, OUTLIERS, RANK],
    aliases: &[("gear2", "gear(bits=2)"), ("gear4", "gear(bits=4)")],
    examples: &["gear(bits=2)", "gear(bits=4)"],
    create: |args, side, kernels| {
        let levels = Levels::Even;
        Ok(Arc::new(Grouped::new("gear", ENTRY.params, args, side, levels, kernels)?))
    },
};

const OUTLIERS: Param = outliers(0.02);

const RANK: Param = Param {
    name: "rank",
    help: "rank of the matrix that approximates the error of a group; 0 for none",
    domain: Domain::Int { default: 2, min: 0, max: 16 },
};
