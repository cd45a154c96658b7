//! The stages that are not members of a family, and the list of all stages for people.

use std::sync::LazyLock;

use super::budget::BUDGETS;
use super::score::SCORES;
use crate::registry::{Domain, Member, Param};

/// The classes of stages, in the order in which a spec must write them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StageClass {
    /// When the pipeline runs.
    Trigger,
    /// How important tokens are.
    Score,
    /// How heads share an allowance.
    Budget,
    /// How large the allowance is.
    Keep,
    /// What an evicted gap does to positions.
    Position,
    /// How survivors are stored.
    Quant,
}

/// One stage, as documentation shows it.
#[derive(Debug, Clone, Copy)]
pub struct StageInfo {
    /// Where it may stand.
    pub class: StageClass,
    /// Name in specs.
    pub name: &'static str,
    /// One line for the documentation.
    pub summary: &'static str,
    /// Where it is from; empty for plumbing.
    pub paper: &'static str,
    /// Parameters in positional order.
    pub params: &'static [Param],
}

impl Member for StageInfo {
    fn name(&self) -> &'static str {
        self.name
    }

    fn params(&self) -> &'static [Param] {
        self.params
    }
}

/// Every stage, in the order in which a spec writes them.
pub static STAGES: LazyLock<Vec<StageInfo>> = LazyLock::new(|| {
    let scores = SCORES.iter().map(|entry| StageInfo {
        class: StageClass::Score,
        name: entry.name,
        summary: entry.summary,
        paper: entry.paper,
        params: entry.params,
    });
    let budgets = BUDGETS.iter().map(|entry| StageInfo {
        class: StageClass::Budget,
        name: entry.name,
        summary: entry.summary,
        paper: entry.paper,
        params: entry.params,
    });
    let before = PLUMBING.iter().filter(|stage| stage.class < StageClass::Score).copied();
    let after = PLUMBING.iter().filter(|stage| stage.class > StageClass::Budget).copied();
    before.chain(scores).chain(budgets).chain(after).collect()
});

/// Stages with a meaning of their own.
const PLUMBING: &[StageInfo] = &[
    StageInfo {
        class: StageClass::Trigger,
        name: "every",
        summary: "decode phases run every n committed steps instead of each",
        paper: "",
        params: &[Param {
            name: "n",
            help: "steps between two runs",
            domain: Domain::Int { default: 1, min: 1, max: 1 << 20 },
        }],
    },
    StageInfo {
        class: StageClass::Keep,
        name: "keep",
        summary: "the fraction of all tokens ever seen that stays, protected ones included",
        paper: "",
        params: &[Param {
            name: "ratio",
            help: "0 to 1; of a head, on average over the heads of a layer",
            domain: Domain::Real { default: 1.0, min: 0.0, max: 1.0 },
        }],
    },
    StageInfo {
        class: StageClass::Keep,
        name: "keep_tokens",
        summary: "the number of tokens that stay, protected ones included",
        paper: "",
        params: &[Param {
            name: "n",
            help: "tokens of a head, on average over the heads of a layer",
            domain: Domain::Int { default: 1024, min: 1, max: 1 << 30 },
        }],
    },
    StageInfo {
        class: StageClass::Position,
        name: "pos",
        summary: "keep: tokens keep their rotation; cache_relative: they move up to close gaps",
        paper: "StreamingLLM, arXiv 2309.17453",
        params: &[Param {
            name: "mode",
            help: "keep or cache_relative",
            domain: Domain::Choice(&["keep", "cache_relative"]),
        }],
    },
    StageInfo {
        class: StageClass::Quant,
        name: "quant",
        summary: "the formats of sealed blocks",
        paper: "",
        params: &[
            Param { name: "k", help: "quantizer of keys", domain: Domain::Text { default: "f16" } },
            Param {
                name: "v",
                help: "quantizer of values; that of keys if absent",
                domain: Domain::Text { default: "" },
            },
        ],
    },
];
