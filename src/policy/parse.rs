//! From text to a checked pipeline.

use super::budget::{self, BUDGETS, Budget};
use super::score::{self, SCORES, Score};
use super::stages::{STAGES, StageClass, StageInfo};
use super::{Allowance, Event, Phase, Pipeline, PositionMode};
use crate::error::{Error, Kind, Result, ensure};
use crate::quantizer::{self, Granularity, Side};
use crate::registry::{self, Args};
use crate::shape::LaneWidth;
use crate::spec::{self, Stage, Value, When};

/// See [`Pipeline::parse`].
pub(super) fn parse(text: &str) -> Result<Pipeline> {
    let mut builder = Builder::default();
    for phase in spec::parse(text)? {
        builder.phase(phase)?;
    }
    builder.finish(text)
}

/// What the stages of all phases have said so far.
#[derive(Default)]
struct Builder {
    prefill: Option<Phase>,
    decode: Option<Phase>,
    position: Option<(PositionMode, usize)>,
    quant: Option<(String, String, usize)>,
    width: Option<(LaneWidth, String)>,
    /// The stage that evicts single tokens at each step, if any.
    step_evictor: Option<String>,
}

/// What the stages of one phase have said so far.
#[derive(Default)]
struct Draft<'a> {
    every: Option<usize>,
    score: Option<(&'a Stage, &'static score::Entry, Args)>,
    budget: Option<(&'a Stage, &'static budget::Entry, Args)>,
    allowance: Option<(Allowance, &'a Stage)>,
}

impl Builder {
    fn phase(&mut self, phase: spec::Phase) -> Result<()> {
        let mut draft = Draft::default();
        let mut last: Option<(StageClass, &str)> = None;
        for stage in &phase.stages {
            let all: Vec<&StageInfo> = STAGES.iter().collect();
            let info = registry::find("stage", &all, stage)?;
            if let Some((class, name)) = last {
                ensure!(
                    class < info.class,
                    InvalidArgument,
                    "column {}: {} ({:?}) cannot follow {name} ({class:?}); the order is trigger, \
                     score, budget, keep, position, quant, one of each",
                    stage.column,
                    stage.name,
                    info.class
                );
            }
            last = Some((info.class, info.name));
            self.stage(stage, info, &mut draft)?;
        }
        self.close(phase.when, draft)
    }

    fn stage<'a>(
        &mut self,
        stage: &'a Stage,
        info: &StageInfo,
        draft: &mut Draft<'a>,
    ) -> Result<()> {
        let args = registry::resolve(info.params, &with_text_args(stage))?;
        match info.class {
            StageClass::Trigger => draft.every = Some(args.count("n")),
            StageClass::Score => {
                draft.score = Some((stage, registry::find("score", SCORES, stage)?, args));
            }
            StageClass::Budget => {
                draft.budget = Some((stage, registry::find("budget", BUDGETS, stage)?, args));
            }
            StageClass::Keep => {
                let allowance = match info.name {
                    "keep" => Allowance::Ratio(args.real("ratio")),
                    _ => Allowance::Tokens(args.count("n")),
                };
                draft.allowance = Some((allowance, stage));
            }
            StageClass::Position => {
                ensure_first(self.position.is_none(), stage)?;
                let mode = match args.text("mode") {
                    "keep" => PositionMode::Keep,
                    _ => PositionMode::CacheRelative,
                };
                self.position = Some((mode, stage.column));
            }
            StageClass::Quant => {
                ensure_first(self.quant.is_none(), stage)?;
                let key = args.text("k").to_string();
                let value = if args.is_given("v") { args.text("v").into() } else { key.clone() };
                self.quant = Some((key, value, stage.column));
            }
        }
        Ok(())
    }

    fn close(&mut self, when: Option<When>, draft: Draft<'_>) -> Result<()> {
        let Some((stage, entry, args)) = draft.score else {
            let orphan = draft.budget.map(|(stage, ..)| stage);
            let orphan = orphan.or(draft.allowance.map(|(_, stage)| stage));
            if let Some(stage) = orphan {
                return Err(at(stage.column, format!("{} needs a score before it", stage.name)));
            }
            return Ok(());
        };
        let asked = draft.allowance.map_or(Allowance::All, |(allowance, _)| allowance);
        let make = || -> Result<(Box<dyn Score>, Box<dyn Budget>)> {
            let score = (entry.create)(&args).map_err(|error| in_column(stage.column, &error))?;
            let budget = match &draft.budget {
                Some((stage, entry, args)) => {
                    (entry.create)(args).map_err(|error| in_column(stage.column, &error))?
                }
                None => uniform()?,
            };
            Ok((score, budget))
        };
        let (score, budget) = make()?;
        if score.allowance(asked) == Allowance::All {
            ensure!(
                stage.name == "full" && draft.allowance.is_none(),
                InvalidArgument,
                "column {}: {} does not say how much stays; add keep(ratio) or keep_tokens(n)",
                stage.column,
                stage.name
            );
            return Ok(());
        }
        self.widen(score.lane_width(), &stage.name);
        if let Some((stage, ..)) = &draft.budget {
            self.widen(budget.lane_width(), &stage.name);
        }
        let events: &[Event] = match when {
            Some(When::Prefill) => &[Event::PrefillEnd],
            Some(When::Decode) => &[Event::Step],
            Some(When::All) => &[Event::PrefillEnd, Event::Step],
            None => score.events(),
        };
        if events.contains(&Event::Step) && !score.keeps_runs() {
            self.step_evictor = Some(stage.name.clone());
        }
        for event in events {
            let slot = match event {
                Event::PrefillEnd => &mut self.prefill,
                Event::Step => &mut self.decode,
            };
            ensure!(
                slot.is_none(),
                InvalidArgument,
                "column {}: two phases act on {event:?}",
                stage.column
            );
            let (score, budget) = make()?;
            let every = draft.every.unwrap_or(1);
            *slot = Some(Phase { every, score, budget, allowance: asked });
        }
        Ok(())
    }

    /// Remembers the first stage that demands the finest lanes so far.
    fn widen(&mut self, width: LaneWidth, name: &str) {
        let rank = |width: LaneWidth| match width {
            LaneWidth::Sequence => 0,
            LaneWidth::Layer => 1,
            LaneWidth::Head => 2,
        };
        let current = self.width.as_ref().map_or(0, |(width, _)| rank(*width));
        if rank(width) > current {
            self.width = Some((width, name.to_string()));
        }
    }

    fn finish(self, text: &str) -> Result<Pipeline> {
        let (key, value) = match self.quant {
            None => (None, None),
            Some((key, value, column)) => {
                for (side, name) in [(Side::Key, &key), (Side::Value, &value)] {
                    let quantizer = quantizer::create(name, side).map_err(|error| {
                        in_column(column, &error.within(format!("quant {side:?}")))
                    })?;
                    if let Some(stage) = &self.step_evictor
                        && quantizer.granularity() == Granularity::Block
                    {
                        let text = format!(
                            "{name} encodes whole blocks, but {stage} evicts single tokens at each \
                             step; use a token-granular quantizer for {side:?}"
                        );
                        return Err(at(column, text));
                    }
                }
                (Some(key), Some(value))
            }
        };
        let (width, stage) = match self.width {
            Some((width, stage)) => (width, Some(stage)),
            None => (LaneWidth::Sequence, None),
        };
        Ok(Pipeline {
            spec: text.to_string(),
            prefill: self.prefill,
            decode: self.decode,
            position: self.position.map_or(PositionMode::Keep, |(mode, _)| mode),
            quantizers: (key, value),
            width: (width, stage),
        })
    }
}

fn uniform() -> Result<Box<dyn Budget>> {
    let stage = spec::parse_stage("uniform")?;
    let entry = registry::find("budget", BUDGETS, &stage)?;
    (entry.create)(&registry::resolve(entry.params, &stage)?)
}

/// The stage with nested stages as text: quantizer specs are parsed by their own family.
fn with_text_args(stage: &Stage) -> Stage {
    let mut stage = stage.clone();
    for arg in &mut stage.args {
        if let Value::Pipe(pipe) = &arg.value
            && let [inner] = pipe.as_slice()
        {
            arg.value = Value::Text(inner.to_string());
        }
    }
    stage
}

fn ensure_first(is_first: bool, stage: &Stage) -> Result<()> {
    if is_first {
        return Ok(());
    }
    Err(at(stage.column, format!("{} is given twice", stage.name)))
}

fn at(column: usize, text: String) -> Error {
    Error::new(Kind::InvalidArgument, format!("column {column}: {text}"))
}

fn in_column(column: usize, error: &Error) -> Error {
    error.clone().within(format!("column {column}"))
}
