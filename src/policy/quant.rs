//! The stage `quant`: the formats of sealed blocks, and what stays exact.

use super::low_rank::LowRanks;
use super::parse::{at, in_column};
use crate::cache::Exact;
use crate::dtype::DType;
use crate::error::Result;
use crate::quantizer::{self, Granularity, Side};
use crate::registry::Args;
use crate::spec::{Arg, Stage};

/// Quantizer specs of keys and values, where given, with the column of each.
pub(super) type Sides = [Option<(String, usize)>; 2];

/// What a spec says about the formats of blocks.
#[derive(Debug, Default)]
pub(super) struct Quant {
    pub(super) sides: Sides,
    pub(super) exact: Exact,
    pub(super) low_rank: LowRanks,
}

impl Quant {
    pub(super) fn new(stage: &Stage, args: &Args) -> Result<Self> {
        let [key, value] = sides(stage, args);
        if key.is_none() && value.is_none() {
            return Err(at(stage.column, &format!("{} names no quantizer", stage.name)));
        }
        let value = value.or_else(|| key.clone());
        let count = |name| args.count(name);
        let exact = Exact {
            skip_layers: count("skip_layers"),
            first: count("first"),
            residual: count("residual"),
        };
        let low_rank = LowRanks::new(stage, args)?;
        let quant = Self { sides: [key, value], exact, low_rank };
        let options = ["skip_layers", "first", "residual"];
        if let Some(name) = options.into_iter().find(|name| count(name) > 0)
            && quant.is_raw()
            && quant.low_rank.ranks == [None, None]
        {
            let text = format!("{name} has no effect, {stage} quantizes nothing");
            return Err(at(column(stage, name), &text));
        }
        Ok(quant)
    }

    /// Whether neither side is quantized.
    fn is_raw(&self) -> bool {
        let raw = [DType::F32, DType::F16, DType::Bf16].map(DType::name);
        self.sides.iter().flatten().all(|(name, _)| raw.contains(&name.as_str()))
    }
}

/// The arguments `k` and `v` of a stage that has them first.
pub(super) fn sides(stage: &Stage, args: &Args) -> Sides {
    let given = |name: &str, position: usize| {
        let arg = named(stage, name).or(stage.args.get(position));
        let column = arg.map_or(stage.column, |arg| arg.column);
        args.is_given(name).then(|| (args.text(name).to_string(), column))
    };
    [given("k", 0), given("v", 1)]
}

fn named<'a>(stage: &'a Stage, name: &str) -> Option<&'a Arg> {
    stage.args.iter().find(|arg| arg.name.as_deref() == Some(name))
}

pub(super) fn column(stage: &Stage, name: &str) -> usize {
    named(stage, name).map_or(stage.column, |arg| arg.column)
}

/// Checks that a quantizer exists and can follow the policy.
pub(super) fn check_quantizer(
    name: &str,
    side: Side,
    column: usize,
    step_evictor: Option<&str>,
) -> Result<()> {
    let quantizer = quantizer::create(name, side)
        .map_err(|error| in_column(column, &error.within(format!("{side:?} quantizer {name}"))))?;
    if let Some(stage) = step_evictor
        && quantizer.granularity() == Granularity::Block
    {
        // Evicting from such a block would encode its survivors again at every step.
        let text = format!(
            "{name} encodes whole blocks, but {stage} evicts single tokens while decoding; use a \
             quantizer of single tokens for {side:?}"
        );
        return Err(at(column, &text));
    }
    Ok(())
}

/// Checks the quantizers of keys and values that a stage with the arguments `k` and `v` names.
pub(super) fn check_sides(stage: &Stage, args: &Args, names: [&str; 2]) -> Result<()> {
    let [key, value] = sides(stage, args);
    let column = |side: &Option<(String, usize)>| side.as_ref().map_or(stage.column, |side| side.1);
    check_quantizer(names[0], Side::Key, column(&key), None)?;
    check_quantizer(names[1], Side::Value, column(&value.or(key)), None)
}
