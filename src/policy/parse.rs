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
        builder.phase(&phase)?;
    }
    builder.finish(text)
}

/// What the stages of all phases have said so far.
#[derive(Default)]
struct Builder {
    prefill: Option<Phase>,
    decode: Option<Phase>,
    position: Option<PositionMode>,
    /// Quantizer specs of keys and values, with the column of each.
    quant: Option<[Option<(String, usize)>; 2]>,
    width: Option<(LaneWidth, String)>,
    /// The stage that evicts single tokens while decoding, if any.
    step_evictor: Option<String>,
}

/// What the stages of one phase have said so far.
#[derive(Default)]
struct Draft<'a> {
    trigger: Option<(Trigger, &'a Stage)>,
    score: Option<(&'a Stage, &'static score::Entry, Args)>,
    budget: Option<(&'a Stage, &'static budget::Entry, Args)>,
    allowance: Option<(Allowance, &'a Stage)>,
}

#[derive(Clone, Copy)]
enum Trigger {
    PrefillEnd,
    Every(usize),
}

impl Builder {
    fn phase(&mut self, phase: &spec::Phase) -> Result<()> {
        let mut draft = Draft::default();
        let all: Vec<&StageInfo> = STAGES.iter().collect();
        let mut last: Option<(StageClass, &str)> = None;
        for stage in &phase.stages {
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
        self.close(phase.when, &draft)
    }

    fn stage<'a>(
        &mut self,
        stage: &'a Stage,
        info: &StageInfo,
        draft: &mut Draft<'a>,
    ) -> Result<()> {
        let args = registry::resolve(info.params, &with_text_args(stage))?;
        match info.class {
            StageClass::Trigger => {
                let trigger = match info.name {
                    "every" => Trigger::Every(args.count("n")),
                    _ => Trigger::PrefillEnd,
                };
                draft.trigger = Some((trigger, stage));
            }
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
                self.position = Some(match args.text("mode") {
                    "keep" => PositionMode::Keep,
                    _ => PositionMode::CacheRelative,
                });
            }
            StageClass::Quant => {
                ensure_first(self.quant.is_none(), stage)?;
                self.quant = Some(quantizers(stage, &args)?);
            }
        }
        Ok(())
    }

    /// Turns a complete draft into phases.
    fn close(&mut self, when: Option<When>, draft: &Draft<'_>) -> Result<()> {
        let Some((stage, entry, args)) = &draft.score else {
            return match draft.names().first() {
                Some(other) => {
                    Err(at(other.column, &format!("{} needs a score such as snapkv", other.name)))
                }
                None => Ok(()),
            };
        };
        let score = (entry.create)(args).map_err(|error| in_column(stage.column, &error))?;
        let allowance = draft.resolve_allowance(stage, score.own_allowance())?;
        if allowance == Allowance::All {
            return match draft.names().first() {
                Some(other) => Err(at(
                    other.column,
                    &format!("{} keeps everything, {} has no effect on it", stage.name, other.name),
                )),
                None => Ok(()),
            };
        }
        self.widen(score.lane_width(), &stage.name);
        let budget = draft.make_budget()?;
        self.widen(budget.lane_width(), draft.budget.as_ref().map_or("uniform", |b| &b.0.name));
        let events = draft.events(when, score.events(allowance))?;
        if events.contains(&Event::Step) && !score.keeps_runs() {
            self.step_evictor = Some(stage.name.clone());
        }
        for event in events {
            let slot = match event {
                Event::PrefillEnd => &mut self.prefill,
                Event::Step => &mut self.decode,
            };
            if let Some(other) = slot {
                let text = format!(
                    "{} and {} both act on {event:?}; write prefill: or decode: before them",
                    other.name, stage.name
                );
                return Err(at(stage.column, &text));
            }
            *slot = Some(draft.make_phase(allowance)?);
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
        let [key, value] = self.quant.unwrap_or_default();
        for (side, asked) in [(Side::Key, &key), (Side::Value, &value)] {
            if let Some((name, column)) = asked {
                check_quantizer(name, side, *column, self.step_evictor.as_deref())?;
            }
        }
        let (width, stage) = self.width.unzip();
        let name = |asked: Option<(String, usize)>| asked.map(|(name, _)| name);
        Ok(Pipeline {
            spec: text.to_string(),
            prefill: self.prefill,
            decode: self.decode,
            position: self.position.unwrap_or_default(),
            quantizers: (name(key), name(value)),
            width: (width.unwrap_or(LaneWidth::Sequence), stage),
        })
    }
}

impl<'a> Draft<'a> {
    /// The stages that mean nothing without a score, in written order.
    fn names(&self) -> Vec<&'a Stage> {
        let trigger = self.trigger.as_ref().map(|(_, stage)| *stage);
        let budget = self.budget.as_ref().map(|(stage, ..)| *stage);
        let keep = self.allowance.as_ref().map(|(_, stage)| *stage);
        [trigger, budget, keep].into_iter().flatten().collect()
    }

    /// How much stays: what the score says or what the spec says, but not both.
    fn resolve_allowance(&self, score: &Stage, own: Option<Allowance>) -> Result<Allowance> {
        match (own, &self.allowance) {
            (None, None) => Err(at(
                score.column,
                &format!(
                    "{} does not say how much stays; add keep(ratio) or keep_tokens(n)",
                    score.name
                ),
            )),
            (Some(Allowance::Tokens(n)), Some((_, keep))) => Err(at(
                keep.column,
                &format!(
                    "{score} keeps {n} tokens already; leave out {} or the number in {}",
                    keep.name, score.name
                ),
            )),
            (Some(own), _) => Ok(own),
            (None, Some((asked, _))) => Ok(*asked),
        }
    }

    /// The moments at which the phase acts; `usual` ones if the spec says nothing.
    fn events(&self, when: Option<When>, usual: &'static [Event]) -> Result<&'static [Event]> {
        const BOTH: &[Event] = &[Event::PrefillEnd, Event::Step];
        let events = match (when, self.trigger) {
            (None, None) => usual,
            (None | Some(When::Prefill), Some((Trigger::PrefillEnd, _)))
            | (Some(When::Prefill), None) => &[Event::PrefillEnd],
            (Some(When::Decode), None | Some((Trigger::Every(_), _))) => &[Event::Step],
            (Some(When::All), None) | (None | Some(When::All), Some((Trigger::Every(_), _))) => {
                BOTH
            }
            (Some(phase), Some((_, stage))) => {
                let text = format!("{} cannot happen in a phase {phase:?}", stage.name);
                return Err(at(stage.column, &text));
            }
        };
        Ok(events)
    }

    fn make_phase(&self, allowance: Allowance) -> Result<Phase> {
        let Some((stage, entry, args)) = &self.score else {
            return Err(Error::new(Kind::Internal, "a phase without a score"));
        };
        let every = match self.trigger {
            Some((Trigger::Every(n), _)) => n,
            _ => 1,
        };
        let score: Box<dyn Score> = (entry.create)(args)?;
        Ok(Phase { name: stage.name.clone(), every, score, budget: self.make_budget()?, allowance })
    }

    fn make_budget(&self) -> Result<Box<dyn Budget>> {
        match &self.budget {
            Some((stage, entry, args)) => {
                (entry.create)(args).map_err(|error| in_column(stage.column, &error))
            }
            None => {
                let stage = spec::parse_stage("uniform")?;
                let entry = registry::find("budget", BUDGETS, &stage)?;
                (entry.create)(&registry::resolve(entry.params, &stage)?)
            }
        }
    }
}

/// The quantizer specs of keys and values, with the columns of their arguments.
fn quantizers(stage: &Stage, args: &Args) -> Result<[Option<(String, usize)>; 2]> {
    let given = |name: &str, position: usize| {
        let is_it = |arg: &&spec::Arg| arg.name.as_deref() == Some(name);
        let arg = stage.args.iter().find(is_it).or(stage.args.get(position));
        let column = arg.map_or(stage.column, |arg| arg.column);
        args.is_given(name).then(|| (args.text(name).to_string(), column))
    };
    let (key, value) = (given("k", 0), given("v", 1));
    if key.is_none() && value.is_none() {
        return Err(at(stage.column, &format!("{} names no quantizer", stage.name)));
    }
    let value = value.or_else(|| key.clone());
    Ok([key, value])
}

/// Checks that a quantizer exists and can follow the policy.
fn check_quantizer(
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
    Err(at(stage.column, &format!("{} is given twice", stage.name)))
}

fn at(column: usize, text: &str) -> Error {
    Error::new(Kind::InvalidArgument, format!("column {column}: {text}"))
}

fn in_column(column: usize, error: &Error) -> Error {
    error.clone().within(format!("column {column}"))
}
