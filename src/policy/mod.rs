//! Token policies: which tokens of a sequence stay. Lossy, unlike an evictor.
//!
//! A policy is a pipeline of small stages, written in one line of text:
//!
//! ```text
//! trigger? score map* budget? keep? act? position? quant? selector?
//! every(16) | snapkv(w=64) | adakv(0.2) | keep(0.25) | pos(keep) | quant(k=had+q4_0, v=q4_0)
//! ```
//!
//! * a *score* says how important each token is (higher stays) and which tokens are protected;
//! * *maps* change scores, in written order;
//! * a *budget* spreads the allowance of a layer over its KV heads;
//! * *keep* says how large the allowance is;
//! * an *act* lets survivors take over values of the evicted;
//! * a *selector* evicts nothing: it says which blocks a decode step reads;
//! * what is absent takes its default. A spec without a score keeps everything.
//!
//! Phases (`prefill: ... ; decode: ...`) give the two moments different pipelines. Without a phase a
//! trigger decides: `prefill_end` means once, `every(n)` means when the prompt ends and every `n`
//! steps from then on. Without either a score acts at the moments it was made for: SnapKV when the
//! prompt ends, H2O after each step too.
//!
//! To add a stage: one file with an `ENTRY` and one word in the list of its family.

pub mod act;
pub mod budget;
pub mod custom;
mod low_rank;
pub mod map;
mod parse;
mod quant;
pub mod score;
mod select;
mod stages;
pub mod weights;

use std::fmt::Debug;
use std::sync::Arc;

use crate::cache::Exact;
use crate::error::Result;
use crate::selector::Selector;
use crate::shape::{KeepSet, LaneWidth, Needs, Rope};
use crate::spec;
pub use low_rank::LowRanks;

pub use stages::{STAGES, StageClass, StageInfo};

/// The moment at which a policy may act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The prompt has been read.
    PrefillEnd,
    /// A generated token was committed.
    Step,
}

/// What a score sees of one KV head with `T` cached tokens.
#[derive(Debug, Clone, Copy, Default)]
pub struct HeadInput<'a> {
    /// Original positions of the cached tokens, ascending, `[T]`.
    pub positions: &'a [i32],
    /// Keys `[T, head_dim]`; empty unless needed.
    pub keys: &'a [f32],
    /// Values `[T, value_dim]`; empty unless needed.
    pub values: &'a [f32],
    /// The last queries of each query head of the group, oldest first,
    /// `[group, num_queries, head_dim]`, after RoPE. They belong to the last `num_queries` positions
    /// of the sequence, the last of which is that of the last cached token.
    pub queries: &'a [f32],
    /// Queries of each query head.
    pub num_queries: usize,
    /// Attention probability that each token received so far, summed over all observed queries and
    /// over the query heads of the group, `[T]`. Missing ones at the end count as 0.
    pub column_sums: &'a [f32],
    /// Mean of the queries of each query head before RoPE, `[group, head_dim]`; empty unless needed
    /// and seen.
    pub query_mean: &'a [f32],
    /// Their population covariance, `[group, head_dim, head_dim]`; empty unless needed and seen.
    pub query_covariance: &'a [f32],
    /// Attention probability that the last query gave each token, summed over the query heads of the
    /// group, `[T]`. Empty unless the engine's attention knows it.
    pub last_row: &'a [f32],
    /// What the policy's gate made of the hidden state of each token, `[T]`; empty unless needed.
    pub gate_scores: &'a [f32],
    /// Queries that gave each token less than an even share since the policy last ran, `[T]`. Missing
    /// ones at the end count as 0.
    pub low_counts: &'a [f32],
    /// The largest probability that each token received when the prompt was replayed, for each query
    /// head, `[group, T]`; NaN for tokens that were not replayed. Empty unless needed and seen.
    pub replay_maxima: &'a [f32],
}

/// The output projection of a layer: what attention heads write into the residual stream.
#[derive(Debug, Clone, Copy)]
pub struct OutputProjection<'a> {
    /// `[hidden, num_q_heads * value_dim]`: one row for each element of the output.
    pub weights: &'a [f32],
    /// Elements of a row.
    pub width: usize,
}

impl<'a> OutputProjection<'a> {
    /// For each element of the output, the weights of a query head, `[dim]` with the elements of a value.
    pub fn columns(&self, q_head: usize, dim: usize) -> impl Iterator<Item = &'a [f32]> {
        self.weights.chunks_exact(self.width).map(move |row| &row[q_head * dim..][..dim])
    }
}

/// What a score sees of one layer.
#[derive(Debug, Clone, Default)]
pub struct LayerInput<'a> {
    /// Index of the layer.
    pub layer: usize,
    /// Layers of the model.
    pub num_layers: usize,
    /// Query heads of a KV head.
    pub group: usize,
    /// Elements of a key and of a query.
    pub head_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
    /// Tokens ever committed, evicted ones included.
    pub sequence_len: usize,
    /// One input for each KV head; lengths may differ.
    pub heads: Vec<HeadInput<'a>>,
    /// How the model rotates keys, if known.
    pub rope: Option<&'a Rope>,
    /// The output projection, if known.
    pub output_projection: Option<OutputProjection<'a>>,
    /// Mean cosine between the residual stream before and after attention, over the tokens of the prompt;
    /// `None` unless needed and seen.
    pub attention_cosine: Option<f64>,
}

impl LayerInput<'_> {
    /// What there is besides what policies need.
    fn offered(&self) -> Needs {
        let is_known = |head: &HeadInput<'_>| head.last_row.len() == head.positions.len();
        match self.heads.iter().all(is_known) {
            true => Needs::LAST_ROW,
            false => Needs::NONE,
        }
    }
}

/// Hands out the layers of a sequence one at a time, so that only one is decoded at any moment.
pub trait LayerSource {
    /// Layers of the model.
    fn num_layers(&self) -> usize;
    /// Calls `f` with the input of `layer`.
    fn visit(
        &mut self,
        layer: usize,
        f: &mut dyn FnMut(&LayerInput<'_>) -> Result<()>,
    ) -> Result<()>;
}

/// Scores and protection of one KV head.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeadScores {
    /// Importance of each token; higher stays. NaN ranks below everything.
    pub scores: Vec<f32>,
    /// Tokens that stay whatever their score. A mask, not a huge score: later stages compute with
    /// scores.
    pub protected: Vec<bool>,
}

/// Which position an evicted gap leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PositionMode {
    /// Tokens keep their original rotation.
    #[default]
    Keep,
    /// Attention sees tokens at their index inside the cache, as StreamingLLM does.
    CacheRelative,
}

/// The allowance of a pipeline for one lane of `len` tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Allowance {
    /// Everything stays.
    All,
    /// A fraction of the tokens ever seen stays.
    Ratio(f64),
    /// At most so many tokens stay.
    Tokens(usize),
    /// Tokens of at least this score stay, and protected ones.
    Threshold(f32),
}

impl Allowance {
    /// Tokens that may stay of `len` present ones, after `seen` tokens in all; possibly more than
    /// are present. At least 1.
    pub fn share(self, len: usize, seen: usize) -> usize {
        let tokens = match self {
            Self::All | Self::Threshold(_) => len,
            // A ratio such as 0.29 times 100 must not come out as 28.999...
            Self::Ratio(ratio) => (seen as f64 * ratio + 1e-9) as usize,
            Self::Tokens(tokens) => tokens,
        };
        tokens.max(1)
    }
}

/// A parsed policy. Immutable, shared by any number of sequences.
#[derive(Debug)]
pub struct Pipeline {
    spec: String,
    prefill: Option<Arc<Phase>>,
    decode: Option<Arc<Phase>>,
    position: PositionMode,
    quantizers: (Option<String>, Option<String>),
    exact: Exact,
    low_rank: LowRanks,
    width: (LaneWidth, Option<String>),
    /// What decode steps read, with its name in the spec.
    selector: Option<(String, Arc<dyn Selector>)>,
}

/// The stages that act at one moment.
#[derive(Debug)]
struct Phase {
    /// Name of the score.
    name: String,
    /// Steps between two runs; no matter when the prompt ends.
    every: usize,
    score: Arc<dyn score::Score>,
    /// The maps with their names, in written order.
    maps: Vec<(String, Box<dyn map::Map>)>,
    budget: Box<dyn budget::Budget>,
    budget_name: String,
    allowance: Allowance,
    /// The act with its name.
    act: Option<(String, Box<dyn act::Act>)>,
}

/// What one head keeps.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    /// Which tokens.
    pub set: KeepSet,
    /// Their values, `[set, value_dim]`, if an act changed them; else empty.
    pub values: Vec<f32>,
}

impl Pipeline {
    /// Parses and checks a spec. Errors name the column.
    pub fn parse(spec: &str) -> Result<Self> {
        parse::parse(spec)
    }

    /// The text it was made from.
    pub fn spec(&self) -> &str {
        &self.spec
    }

    /// What the engine has to hand over.
    pub fn needs(&self) -> Needs {
        self.needs_with(Needs::NONE)
    }

    /// What an engine has to hand over that can hand over `offered` too, which may spare it more.
    pub fn needs_with(&self, offered: Needs) -> Needs {
        let position = match self.position {
            PositionMode::Keep => Needs::NONE,
            PositionMode::CacheRelative => Needs::ROPE,
        };
        let selector = self.selector().map_or(Needs::NONE, |selector| selector.needs());
        self.phases()
            .fold(position.union(selector), |needs, phase| needs.union(phase.needs(offered)))
    }

    /// The first stage that needs any of `bits`, to name it when an engine lacks them.
    pub fn needed_by(&self, bits: Needs) -> Option<&str> {
        let wants = |needs: Needs| needs.0 & bits.0 != 0;
        let position = self.position == PositionMode::CacheRelative && wants(Needs::ROPE);
        let stage = self.phases().find_map(|phase| phase.needed_by(wants));
        let selector = self.selector.as_ref().filter(|(_, selector)| wants(selector.needs()));
        let selector = selector.map(|(name, _)| name.as_str());
        stage.or(selector).or(position.then_some("pos"))
    }

    /// The column at which a stage of the spec starts; 1 if it has none of this name.
    pub fn column_of(&self, stage: &str) -> usize {
        let phases = spec::parse(&self.spec).unwrap_or_default();
        let mut stages = phases.iter().flat_map(|phase| &phase.stages);
        stages.find(|other| other.name == stage).map_or(1, |stage| stage.column)
    }

    /// Whether scores or maps read the rotation; closing gaps of positions does not count.
    pub fn rotation_is_read(&self) -> bool {
        self.phases().any(|phase| phase.needs(Needs::NONE).contains(Needs::ROPE))
    }

    /// Queries of each head that have to be remembered.
    pub fn query_window(&self) -> usize {
        self.phases().map(|phase| phase.query_window()).max().unwrap_or(0)
    }

    /// The coarsest lanes that can express the keep sets, and the stage that demands it.
    pub fn lane_width(&self) -> (LaneWidth, Option<&str>) {
        (self.width.0, self.width.1.as_deref())
    }

    /// Queries that stay remembered from step to step once the prompt has ended. As many as in the
    /// prompt, unless that is all of them.
    pub fn step_query_window(&self) -> usize {
        match self.query_window() {
            window if window < score::ALL_QUERIES => window,
            _ => self.decode.as_ref().map_or(0, |phase| phase.query_window()),
        }
    }

    /// The latest queries of a prompt that count.
    pub fn history(&self) -> usize {
        self.phases().map(|phase| phase.score.history()).max().unwrap_or(0)
    }

    /// Leading tokens that take part in every replay.
    pub fn replay_sinks(&self) -> usize {
        self.phases().map(|phase| phase.score.replay_sinks()).max().unwrap_or(0)
    }

    /// Quantizer specs of keys and values, where the spec names them.
    pub fn quantizers(&self) -> (Option<&str>, Option<&str>) {
        (self.quantizers.0.as_deref(), self.quantizers.1.as_deref())
    }

    /// What the quantizers leave as it is.
    pub fn exact(&self) -> Exact {
        self.exact
    }

    /// Which sides of blocks are kept as coordinates in a subspace.
    pub fn low_rank(&self) -> &LowRanks {
        &self.low_rank
    }

    /// What chooses the blocks that decode steps read, if not all of them.
    pub fn selector(&self) -> Option<&Arc<dyn Selector>> {
        self.selector.as_ref().map(|(_, selector)| selector)
    }

    /// The name of the stage that does so.
    pub fn selector_name(&self) -> Option<&str> {
        self.selector.as_ref().map(|(name, _)| name.as_str())
    }

    /// How evicted gaps are treated.
    pub fn position_mode(&self) -> PositionMode {
        self.position
    }

    /// Whether anything happens at `event` at all.
    pub fn acts_on(&self, event: Event) -> bool {
        self.phase(event).is_some()
    }

    /// Whether `event` should run the pipeline now: `steps` decode steps are committed, this one
    /// included, and the longest lane holds `len` of the `seen` tokens.
    pub fn is_due(&self, event: Event, steps: usize, len: usize, seen: usize) -> bool {
        self.phase(event).is_some_and(|phase| {
            let due = event == Event::PrefillEnd || steps.is_multiple_of(phase.every);
            let has_excess = match phase.allowance {
                Allowance::Threshold(_) => true,
                allowance => allowance.share(len, seen) < len,
            };
            due && len > phase.score.keeps_whole() && has_excess
        })
    }

    /// The scores of a layer, for the phase of `event`.
    pub fn score(&self, event: Event, layer: &LayerInput<'_>) -> Result<Vec<HeadScores>> {
        match self.phase(event) {
            Some(phase) => Ok(phase.score(layer)?.heads),
            None => Ok(layer.heads.iter().map(HeadScores::equal).collect()),
        }
    }

    /// What stays: a set for each layer and KV head.
    pub fn select(&self, event: Event, source: &mut dyn LayerSource) -> Result<Vec<Vec<KeepSet>>> {
        if let Some(phase) = self.phase(event) {
            return phase.select(source);
        }
        let mut kept = Vec::with_capacity(source.num_layers());
        for layer in 0..source.num_layers() {
            source.visit(layer, &mut |input| {
                let all = |head: &HeadInput<'_>| KeepSet::all(head.positions.len());
                kept.push(input.heads.iter().map(all).collect());
                Ok(())
            })?;
        }
        Ok(kept)
    }

    /// Whether `event` changes values of survivors; then [`Self::select_layer`] tells them.
    pub fn changes_values(&self, event: Event) -> bool {
        self.phase(event).is_some_and(|phase| phase.act.is_some() && phase.demotes().is_none())
    }

    /// The quantizers of keys and values in which `event` leaves what [`Self::select`] does not choose,
    /// if it evicts nothing.
    pub fn demotes(&self, event: Event) -> Option<[&str; 2]> {
        self.phase(event).and_then(Phase::demotes)
    }

    /// The name of a stage that gives survivors other values, if there is one.
    pub fn changing_stage(&self) -> Option<&str> {
        let mut acts = self.phases().filter_map(|phase| phase.act.as_ref());
        acts.find(|(_, act)| act.demotes().is_none()).map(|(name, _)| name.as_str())
    }

    /// The quantizers of keys and values of all events that demote, with the name of the stage.
    pub fn demoted(&self) -> impl Iterator<Item = (&str, [&str; 2])> {
        self.phases().filter_map(|phase| {
            let name = phase.act.as_ref().map(|(name, _)| name.as_str())?;
            Some((name, phase.demotes()?))
        })
    }

    /// What stays of one layer, with the values that an act changed. Not for budgets over all layers.
    pub fn select_layer(
        &self,
        event: Event,
        source: &mut dyn LayerSource,
        layer: usize,
    ) -> Result<Vec<Kept>> {
        let mut kept = Vec::new();
        source.visit(layer, &mut |input| {
            kept = match self.phase(event) {
                Some(phase) => phase.select_values(input)?,
                None => Vec::new(),
            };
            Ok(())
        })?;
        Ok(kept)
    }

    /// What the gate of the policy makes of hidden states `[n, width]` of a layer: a score for each
    /// KV head and token, `[num_heads, n]`.
    pub fn gate(
        &self,
        layer: usize,
        num_heads: usize,
        hidden: &[f32],
        width: usize,
    ) -> Result<Vec<f32>> {
        let gate = self.phases().find(|phase| phase.score.needs().contains(Needs::HIDDEN));
        match gate {
            Some(phase) => phase.score.gate(layer, num_heads, hidden, width),
            None => Ok(vec![0.0; num_heads * hidden.len() / width.max(1)]),
        }
    }

    fn phase(&self, event: Event) -> Option<&Phase> {
        match event {
            Event::PrefillEnd => self.prefill.as_deref(),
            Event::Step => self.decode.as_deref(),
        }
    }

    fn phases(&self) -> impl Iterator<Item = &Phase> {
        [&self.prefill, &self.decode].into_iter().flatten().map(Arc::as_ref)
    }
}

impl HeadScores {
    /// The same score for every token of a head, nothing protected.
    pub fn equal(head: &HeadInput<'_>) -> Self {
        let len = head.positions.len();
        Self { scores: vec![0.0; len], protected: vec![false; len] }
    }

    /// These scores, the last `recent` tokens protected.
    pub fn recent(scores: Vec<f32>, recent: usize) -> Self {
        let mut protected = vec![false; scores.len()];
        let first = scores.len().saturating_sub(recent);
        protected[first..].fill(true);
        Self { scores, protected }
    }

    /// These scores, nothing protected.
    pub fn open(scores: Vec<f32>) -> Self {
        Self { protected: vec![false; scores.len()], scores }
    }
}
