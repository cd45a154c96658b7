//! From text to a checked pipeline.

use std::sync::Arc;

use super::act::{self, ACTS, Act};
use super::budget::{self, BUDGETS, Budget};
use super::custom;
use super::map::{self, MAPS, Map};
use super::quant::{Quant, check_quantizer, check_sides};
use super::score::{self, SCORES, Score};
use super::stages::{STAGES, StageClass, StageInfo};
use super::{Allowance, Event, Phase, Pipeline, PositionMode};
use crate::error::{Error, Kind, Result, ensure};
use crate::quantizer::Side;
use crate::registry::{self, Args};
use crate::selector::{SELECTORS, Selector};
use crate::shape::{LaneWidth, Needs};
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
    prefill: Option<Arc<Phase>>,
    decode: Option<Arc<Phase>>,
    position: Option<PositionMode>,
    quant: Option<Quant>,
    width: Option<(LaneWidth, String)>,
    /// The stage that evicts single tokens while decoding, if any.
    step_evictor: Option<String>,
    /// A stage that demotes, with its column, and the score of a phase that evicts.
    demote: Option<(String, usize)>,
    evictor: Option<String>,
    selector: Option<(&'static str, Arc<dyn Selector>)>,
    /// Its column.
    selector_column: usize,
}

/// A score of the engine's own.
const CUSTOM: StageInfo = StageInfo {
    class: StageClass::Score,
    name: "a score of the engine",
    summary: "",
    paper: "",
    params: &[],
    needs: Needs::NONE,
    examples: &[],
};

/// What the stages of one phase have said so far.
#[derive(Default)]
struct Draft<'a> {
    trigger: Option<(Trigger, &'a Stage)>,
    score: Option<(&'a Stage, Scorer)>,
    maps: Vec<(&'a Stage, &'static map::Entry, Args)>,
    budget: Option<(&'a Stage, &'static budget::Entry, Args)>,
    allowance: Option<(Allowance, &'a Stage)>,
    act: Option<(&'a Stage, &'static act::Entry, Args)>,
}

/// Where the score of a phase comes from.
enum Scorer {
    Library(&'static score::Entry, Args),
    Engine(Arc<dyn Score>),
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
            let custom = custom::find(&stage.name);
            let info = match custom {
                Some(_) => &CUSTOM,
                None => registry::find("stage", &all, stage)?,
            };
            if let Some((class, name)) = last {
                ensure!(
                    class < info.class || (class == info.class && class == StageClass::Map),
                    InvalidArgument,
                    "column {}: {} ({:?}) cannot follow {name} ({class:?}); the order is trigger, \
                     score, maps, budget, keep, act, position, quant, selector, one of each but maps",
                    stage.column,
                    stage.name,
                    info.class
                );
            }
            last = Some((info.class, info.name));
            self.stage(stage, info, &mut draft)?;
            if let Some(score) = custom {
                draft.score = Some((stage, Scorer::Engine(score)));
            }
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
            StageClass::Score if info.name == CUSTOM.name => {}
            StageClass::Score => {
                let entry = registry::find("score", SCORES, stage)?;
                draft.score = Some((stage, Scorer::Library(entry, args)));
            }
            StageClass::Map => {
                draft.maps.push((stage, registry::find("map", MAPS, stage)?, args));
            }
            StageClass::Budget => {
                draft.budget = Some((stage, registry::find("budget", BUDGETS, stage)?, args));
            }
            StageClass::Keep => {
                let allowance = match info.name {
                    "keep" => Allowance::Ratio(args.real("ratio")),
                    "tau" => Allowance::Threshold(args.real("score") as f32),
                    _ => Allowance::Tokens(args.count("n")),
                };
                draft.allowance = Some((allowance, stage));
            }
            StageClass::Act => {
                draft.act = Some((stage, registry::find("act", ACTS, stage)?, args));
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
                self.quant = Some(Quant::new(stage, &args)?);
                if args.count("skip_layers") > 0 {
                    // A block has one format.
                    self.widen(LaneWidth::Layer, "quant");
                }
            }
            StageClass::Select => {
                ensure_first(self.selector.is_none(), stage)?;
                let entry = registry::find("selector", SELECTORS, stage)?;
                let selector = (entry.create)(&args);
                let selector = selector.map_err(|error| in_column(stage.column, &error))?;
                self.selector = Some((entry.name, selector.into()));
                self.selector_column = stage.column;
            }
        }
        Ok(())
    }

    /// Turns a complete draft into phases.
    fn close(&mut self, when: Option<When>, draft: &Draft<'_>) -> Result<()> {
        let Some((stage, scorer)) = &draft.score else {
            return match draft.names().first() {
                Some(other) => {
                    Err(at(other.column, &format!("{} needs a score such as snapkv", other.name)))
                }
                None => Ok(()),
            };
        };
        let score: Arc<dyn Score> = match scorer {
            Scorer::Library(entry, args) => {
                let score = (entry.create)(args);
                score.map_err(|error| in_column(stage.column, &error))?.into()
            }
            Scorer::Engine(score) => score.clone(),
        };
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
        let phase = draft.make_phase(score, allowance)?;
        draft.check(&phase)?;
        self.widen_for(&phase);
        let score = &phase.score;
        let events = draft.events(when, score.events(allowance))?;
        if events.contains(&Event::Step) && !score.keeps_runs() {
            self.step_evictor = Some(stage.name.clone());
        }
        let demote = draft.act.as_ref().filter(|_| phase.demotes().is_some());
        match demote {
            Some((stage, ..)) => self.demote = Some((stage.name.clone(), stage.column)),
            None => self.evictor = Some(stage.name.clone()),
        }
        let phase = Arc::new(phase);
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
            *slot = Some(phase.clone());
        }
        Ok(())
    }

    /// Remembers the lanes that the stages of a phase demand.
    fn widen_for(&mut self, phase: &Phase) {
        let mut needed = (phase.score.lane_width(), &phase.name);
        for (name, map) in &phase.maps {
            let width = map.lane_width(needed.0);
            if width != needed.0 {
                needed = (width, name);
            }
        }
        self.widen(needed.0, needed.1);
        if !phase.maps.iter().any(|(_, map)| map.decides()) {
            self.widen(phase.budget.lane_width(), &phase.budget_name);
        }
        if let Some((name, _)) = phase.act.as_ref().filter(|_| phase.demotes().is_none()) {
            // One layer is decoded at a time.
            self.widen(LaneWidth::Layer, name);
        }
    }

    /// Remembers the first stage that demands the finest lanes so far.
    fn widen(&mut self, width: LaneWidth, name: &str) {
        let current = self.width.as_ref().map_or(LaneWidth::Sequence, |(width, _)| *width);
        if width > current {
            self.width = Some((width, name.to_string()));
        }
    }

    /// Refuses what cannot go with rows that are kept by format instead of by position.
    fn check_demotion(&self) -> Result<()> {
        let Some((name, column)) = &self.demote else { return Ok(()) };
        if let Some(evictor) = &self.evictor {
            let text = format!("{name} keeps every token, but {evictor} evicts in the other phase");
            return Err(at(*column, &text));
        }
        if self.position == Some(PositionMode::CacheRelative) {
            let text = format!("{name} leaves no gaps that cache_relative could close");
            return Err(at(*column, &text));
        }
        if let Some((selector, _)) = &self.selector {
            let text = format!(
                "{selector} chooses among blocks of neighbouring tokens, which {name} takes apart"
            );
            return Err(at(*column, &text));
        }
        Ok(())
    }

    fn finish(self, text: &str) -> Result<Pipeline> {
        self.check_demotion()?;
        let Quant { sides: [key, value], exact, low_rank } = self.quant.unwrap_or_default();
        for (side, asked) in [(Side::Key, &key), (Side::Value, &value)] {
            if let Some((name, column)) = asked {
                check_quantizer(name, side, *column, self.step_evictor.as_deref())?;
            }
        }
        if let (Some(_), Some(PositionMode::CacheRelative)) = (low_rank.ranks[0], self.position) {
            let text =
                "k_rank keeps keys in a subspace, out of which cache_relative would turn them";
            return Err(at(low_rank.column, text));
        }
        if let (Some((name, _)), Some(PositionMode::CacheRelative)) =
            (&self.selector, self.position)
        {
            let text = format!(
                "{name} compares queries with keys at their positions, which cache_relative moves"
            );
            return Err(at(self.selector_column, &text));
        }
        let (width, stage) = self.width.unzip();
        let name = |asked: Option<(String, usize)>| asked.map(|(name, _)| name);
        Ok(Pipeline {
            spec: text.to_string(),
            prefill: self.prefill,
            decode: self.decode,
            position: self.position.unwrap_or_default(),
            quantizers: (name(key), name(value)),
            exact,
            low_rank,
            width: (width.unwrap_or(LaneWidth::Sequence), stage),
            selector: self.selector.map(|(name, selector)| (name.to_string(), selector)),
        })
    }
}

impl<'a> Draft<'a> {
    /// The stages that mean nothing without a score, in written order.
    fn names(&self) -> Vec<&'a Stage> {
        let trigger = self.trigger.as_ref().map(|(_, stage)| *stage);
        let maps = self.maps.iter().map(|(stage, ..)| *stage);
        let budget = self.budget.as_ref().map(|(stage, ..)| *stage);
        let keep = self.allowance.as_ref().map(|(_, stage)| *stage);
        let act = self.act.as_ref().map(|(stage, ..)| *stage);
        trigger.into_iter().chain(maps).chain(budget).chain(keep).chain(act).collect()
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

    fn make_phase(&self, score: Arc<dyn Score>, allowance: Allowance) -> Result<Phase> {
        let name = self.score.as_ref().map_or_else(String::new, |(stage, ..)| stage.name.clone());
        let every = match self.trigger {
            Some((Trigger::Every(n), _)) => n,
            _ => 1,
        };
        let mut maps: Vec<(String, Box<dyn Map>)> = Vec::new();
        for (stage, entry, args) in &self.maps {
            let map = (entry.create)(args).map_err(|error| in_column(stage.column, &error))?;
            maps.push((stage.name.clone(), map));
        }
        let act: Option<(String, Box<dyn Act>)> = match &self.act {
            Some((stage, entry, args)) => {
                let act = (entry.create)(args).map_err(|error| in_column(stage.column, &error))?;
                if let Some(names) = act.demotes() {
                    check_sides(stage, args, names)?;
                }
                Some((stage.name.clone(), act))
            }
            None => None,
        };
        let budget = self.make_budget()?;
        let budget_name = self.budget.as_ref().map_or("uniform", |(stage, ..)| &stage.name);
        let budget_name = budget_name.to_string();
        Ok(Phase { name, every, score, maps, budget, budget_name, allowance, act })
    }

    /// Refuses maps that do not go with the stages around them.
    fn check(&self, phase: &Phase) -> Result<()> {
        for (i, (stage, (name, map))) in
            self.maps.iter().map(|map| map.0).zip(&phase.maps).enumerate()
        {
            let budget = self.budget.as_ref().map(|(stage, ..)| *stage);
            if map.splits() && phase.score.query_window() > 0 {
                let text = format!(
                    "{name} scores parts by themselves, but {} reads the last queries, which see all",
                    phase.name
                );
                return Err(at(stage.column, &text));
            }
            let after = self.maps.get(i + 1).map(|(stage, ..)| *stage).or(budget);
            if let (Some(after), true) = (after, map.decides()) {
                let text =
                    format!("{name} decides what stays, {} has no effect after it", after.name);
                return Err(at(after.column, &text));
            }
            if let (Some(budget), true) = (budget, map.reads_budget() && phase.budget.is_global()) {
                let text =
                    format!("{name} needs the budget of its layer, which {} is not", budget.name);
                return Err(at(budget.column, &text));
            }
            if map.decides() && phase.has_threshold() {
                let text = format!("{name} spends an allowance of tokens, {} has none", phase.name);
                return Err(at(stage.column, &text));
            }
        }
        if let (Some((act, ..)), Some((budget, ..)), true, None) =
            (&self.act, &self.budget, phase.budget.is_global(), phase.demotes())
        {
            let text = format!(
                "{} needs the values of a layer when it is scored, {} decides after the last",
                act.name, budget.name
            );
            return Err(at(act.column, &text));
        }
        match (&self.budget, phase.has_threshold()) {
            (Some((stage, ..)), true) => {
                let text = format!("a threshold leaves {} nothing to spread", stage.name);
                Err(at(stage.column, &text))
            }
            _ => Ok(()),
        }
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

pub(super) fn at(column: usize, text: &str) -> Error {
    Error::new(Kind::InvalidArgument, format!("column {column}: {text}"))
}

pub(super) fn in_column(column: usize, error: &Error) -> Error {
    error.clone().within(format!("column {column}"))
}
