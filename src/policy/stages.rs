//! The stages that are not members of a family, and the list of all stages for people.

use std::sync::LazyLock;

use super::act::ACTS;
use super::budget::BUDGETS;
use super::map::MAPS;
use super::score::SCORES;
use crate::registry::{Domain, Member, Param, StageEntry};
use crate::selector::SELECTORS;
use crate::shape::Needs;

/// The classes of stages, in the order in which a spec must write them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StageClass {
    /// When the pipeline runs.
    Trigger,
    /// How important tokens are.
    Score,
    /// What happens to scores before the budget.
    Map,
    /// How heads share an allowance.
    Budget,
    /// How large the allowance is.
    Keep,
    /// What becomes of the evicted.
    Act,
    /// What an evicted gap does to positions.
    Position,
    /// How survivors are stored.
    Quant,
    /// Which of them a decode step reads.
    Select,
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
    /// What the engine may have to hand over for it, over all parameters.
    pub needs: Needs,
    /// Pipelines with this stage.
    pub examples: &'static [&'static str],
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
    let of = |classes: std::ops::RangeInclusive<StageClass>| {
        PLUMBING.iter().filter(move |stage| classes.contains(&stage.class)).copied()
    };
    let before = of(StageClass::Trigger..=StageClass::Trigger);
    let keep = of(StageClass::Keep..=StageClass::Keep);
    let after = of(StageClass::Position..=StageClass::Quant);
    before
        .chain(members(StageClass::Score, SCORES))
        .chain(members(StageClass::Map, MAPS))
        .chain(members(StageClass::Budget, BUDGETS))
        .chain(keep)
        .chain(members(StageClass::Act, ACTS))
        .chain(after)
        .chain(members(StageClass::Select, SELECTORS))
        .collect()
});

fn members<T: ?Sized>(
    class: StageClass,
    entries: &[&StageEntry<T>],
) -> impl Iterator<Item = StageInfo> {
    entries.iter().map(move |entry| StageInfo {
        class,
        name: entry.name,
        summary: entry.summary,
        paper: entry.paper,
        params: entry.params,
        needs: entry.needs,
        examples: entry.examples,
    })
}

/// Stages with a meaning of their own.
const PLUMBING: &[StageInfo] = &[
    StageInfo {
        class: StageClass::Trigger,
        name: "prefill_end",
        summary: "runs once, when the prompt has been read",
        paper: "",
        params: &[],
        needs: Needs::NONE,
        examples: &["prefill_end | h2o(recent=32) | keep(0.5)"],
    },
    StageInfo {
        class: StageClass::Trigger,
        name: "every",
        summary: "runs every n committed decode steps, and when the prompt has been read unless \
                  the phase is decode",
        paper: "",
        params: &[Param {
            name: "n",
            help: "steps between two runs",
            domain: Domain::Int { default: 1, min: 1, max: 1 << 20 },
        }],
        needs: Needs::NONE,
        examples: &["decode: every(8) | h2o(recent=16) | keep_tokens(64)"],
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
        needs: Needs::NONE,
        examples: &["snapkv | keep(25%)"],
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
        needs: Needs::NONE,
        examples: &["snapkv | keep_tokens(1k)"],
    },
    StageInfo {
        class: StageClass::Keep,
        name: "tau",
        summary: "tokens of at least this score stay, and protected ones",
        paper: "DMS, arXiv 2506.05345",
        params: &[Param {
            name: "score",
            help: "the threshold, in the unit of the score",
            domain: Domain::Real { default: 0.0, min: -1e6, max: 1e6 },
        }],
        needs: Needs::NONE,
        examples: &["h2o | protect(sink=4, recent=64) | tau(0.5)"],
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
        needs: Needs::ROPE,
        examples: &["stream(recent=60) | pos(cache_relative)", "stream(recent=60) | pos(keep)"],
    },
    StageInfo {
        class: StageClass::Quant,
        name: "quant",
        summary: "the formats of sealed blocks",
        paper: "",
        params: &[
            Param {
                name: "k",
                help: "quantizer of keys; if absent they stay in the dtype of the cache",
                domain: Domain::Text { default: "" },
            },
            Param {
                name: "v",
                help: "quantizer of values; if absent that of keys",
                domain: Domain::Text { default: "" },
            },
            Param {
                name: "skip_layers",
                help: "layers at either end of the model that stay exact",
                domain: Domain::Int { default: 0, min: 0, max: 1 << 10 },
            },
            Param {
                name: "first",
                help: "tokens at the start of a sequence that stay exact, as whole blocks",
                domain: Domain::Int { default: 0, min: 0, max: 1 << 20 },
            },
            Param {
                name: "residual",
                help: "latest tokens that are exact; a block is quantized once all of it is older",
                domain: Domain::Int { default: 0, min: 0, max: 1 << 20 },
            },
            Param {
                name: "k_rank",
                help: "dimensions kept of a key, in a subspace of each head; 0 for all",
                domain: Domain::Int { default: 0, min: 0, max: 1 << 10 },
            },
            Param {
                name: "v_rank",
                help: "dimensions kept of a value, in a subspace of each head; 0 for all",
                domain: Domain::Int { default: 0, min: 0, max: 1 << 10 },
            },
            Param {
                name: "basis",
                help: "a safetensors file with the subspaces; without, they are fitted to each prompt",
                domain: Domain::File,
            },
        ],
        needs: Needs::NONE,
        examples: &[
            "quant(q8_0)",
            "quant(k=had+q4_0, v=q4_0)",
            "quant(v=q8_0)",
            "quant(kivi2, first=4, residual=32)",
            "quant(q8_0, k_rank=32, v_rank=32)",
        ],
    },
];
