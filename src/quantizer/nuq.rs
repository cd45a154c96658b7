//! KVQuant's non-uniform levels with a few values kept in half precision.
//!
//! ```text
//! x = half * level[q] + middle        middle, half: of the range of a vector without its outliers
//! ```
//!
//! Keys are coded for each channel, values for each token, in groups of `group` tokens; `grouped.rs`
//! has the layout. The 2^bits levels fit the normalised values of a group best in the least squares
//! (k-means), so nothing has to be calibrated. The paper instead calibrates levels and thresholds
//! offline and stores keys before RoPE; here keys are what the engine appends.

use std::sync::Arc;

use super::Entry;
use super::grouped::{BITS, GROUP, Grouped, Levels, outliers};
use crate::registry::Param;

pub(super) static ENTRY: Entry = Entry {
    name: "nuq",
    summary: "2 to 4 bits on levels fitted to each group, 1 % outliers in f16",
    paper: "KVQuant, arXiv 2401.18079",
    params: &[BITS, GROUP, OUTLIERS],
    aliases: &[("nuq2", "nuq(bits=2)"), ("nuq3", "nuq(bits=3)"), ("nuq4", "nuq(bits=4)")],
    examples: &["nuq(bits=2)", "nuq(bits=3)", "nuq(bits=4)"],
    create: |args, side, kernels| {
        let levels = Levels::Fitted;
        Ok(Arc::new(Grouped::new("nuq", ENTRY.params, args, side, levels, kernels)?))
    },
};

const OUTLIERS: Param = outliers(0.01);
