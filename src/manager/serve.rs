//! What a policy asks for, and what this library and its engine can serve.

use std::sync::Arc;

use crate::cache::Cache;
use crate::error::{Result, bail, ensure};
use crate::policy::{Event, Pipeline, PositionMode};
use crate::sequence::Observation;
use crate::shape::{LaneWidth, Needs};

/// What attention of this library tells policies that have a use for it, though none insists. On a device it
/// tells nothing.
pub(super) fn offered(cache: &Cache) -> Needs {
    if cache.gpu().is_some() { Needs::NONE } else { Needs::LAST_ROW }
}

/// What a cache on a device serves.
fn served_on_device(cache: &Cache) -> Needs {
    let served = Needs::KEYS.union(Needs::VALUES).union(Needs::ROPE);
    let served = served.union(Needs::OUTPUT_PROJECTION).union(Needs::QUERY_WINDOW);
    // The kernel that adds up what rows receive reads open blocks.
    match cache.sealed_layout() {
        None => served.union(Needs::COLUMN_SUM),
        Some(_) => served,
    }
}

/// Refuses a policy that a cache on a device cannot serve, naming the stage.
fn check_on_device(cache: &Cache, policy: &Pipeline) -> Result<()> {
    if cache.gpu().is_none() {
        return Ok(());
    }
    let needs = policy.needs();
    let served = served_on_device(cache);
    let missing = needs.without(served);
    let needing = policy.needed_by(missing).filter(|_| missing != Needs::NONE);
    let does = |stage: &str, what: &str| (stage.to_string(), what.to_string());
    let is_relative = policy.position_mode() == PositionMode::CacheRelative;
    let selector = policy.selector_name().zip(unserved_selector(cache, policy));
    let (stage, what) = match (selector, needing) {
        (Some((stage, what)), _) => does(stage, what),
        (_, Some(stage)) => {
            does(stage, &format!("needs {}", needs.missing_from(served).join(", ")))
        }
        _ if is_relative => does("pos", "moves tokens"),
        _ => match (policy.changing_stage(), policy.demoted().next()) {
            (Some(stage), _) => does(stage, "changes values"),
            (_, Some((stage, _))) => does(stage, "demotes tokens"),
            _ => return Ok(()),
        },
    };
    bail!(
        Unsupported,
        "column {}: {stage} {what}, which a cache on a CUDA device cannot serve yet",
        policy.column_of(&stage)
    )
}

/// What a selector does that a device cannot: there all blocks that can be chosen have as many rows of one
/// format, so that the host knows how long lists are.
fn unserved_selector(cache: &Cache, policy: &Pipeline) -> Option<&'static str> {
    let evicts = [Event::PrefillEnd, Event::Step].into_iter().any(|event| policy.acts_on(event));
    match policy.selector_name() {
        Some("quest") if evicts => Some("selects blocks of a policy that evicts"),
        Some("quest") if cache.sealed_layout().is_some() && cache.config().exact().first > 0 => {
            Some("selects blocks of two formats (first)")
        }
        Some("quest") | None => None,
        Some(_) => Some("selects blocks"),
    }
}

/// Refuses a policy that the cache or the engine cannot serve, naming the stage and what is missing.
/// The engine has `told` these things.
pub(super) fn check_policy(cache: &Cache, policy: &Pipeline, told: Needs) -> Result<()> {
    // Attention of this library observes queries and probabilities; hidden states are handed over
    // with each step.
    let mut caps = told.union(Needs::KEYS).union(Needs::VALUES).union(Needs::HIDDEN);
    caps = caps.union(Needs::REPLAY).union(Needs::REPLAY_HIDDEN).union(Needs::LOW_COUNT);
    caps = caps.union(Needs::QUERY_WINDOW).union(Needs::COLUMN_SUM).union(Needs::RESIDUAL);
    if cache.config().rope.is_some() {
        // Statistics are of queries that are turned back.
        caps = caps.union(Needs::ROPE).union(Needs::QUERY_STATISTICS);
    }
    let needs = policy.needs();
    let missing = needs.without(caps);
    if missing != Needs::NONE {
        let remedy = match missing.contains(Needs::OUTPUT_PROJECTION) {
            true => "hand over the weights of every layer first",
            false => "set rope_style in the cache configuration",
        };
        let stage = policy.needed_by(missing).unwrap_or(policy.spec());
        bail!(
            Unsupported,
            "column {}: {stage} needs {} from the engine: {remedy}",
            policy.column_of(stage),
            needs.missing_from(caps).join(", ")
        );
    }
    check_on_device(cache, policy)?;
    if let Some(stage) = policy.changing_stage() {
        ensure!(
            cache.config().shape.stores_values(),
            Unsupported,
            "column {}: {stage} changes values, which here are a part of the keys",
            policy.column_of(stage)
        );
    }
    for (stage, [key, value]) in policy.demoted() {
        demoted_format(cache, key, value).map_err(|error| {
            error.within(format!("column {}: {stage}", policy.column_of(stage)))
        })?;
    }
    let rank = |width: LaneWidth| width.num_lanes(&cache.config().shape);
    let (needed, stage) = policy.lane_width();
    let found = cache.config().lane_width;
    if rank(found) < rank(needed) {
        let stage = stage.unwrap_or("the spec");
        bail!(
            Unsupported,
            "column {}: {stage} needs lanes of width {needed:?}, the cache has {found:?}",
            policy.column_of(stage)
        );
    }
    Ok(())
}

/// Where attention notes what the policy of a sequence asks for; `None` if it asks for nothing.
pub(super) fn observation_for(cache: &Cache, policy: &Pipeline) -> Option<Arc<Observation>> {
    let attention = Needs::QUERY_WINDOW.union(Needs::COLUMN_SUM).union(Needs::QUERY_STATISTICS);
    let attention = attention.union(Needs::HIDDEN).union(Needs::REPLAY);
    let attention = attention.union(Needs::LOW_COUNT).union(Needs::LAST_ROW);
    let attention = attention.union(Needs::RESIDUAL);
    let needs = policy.needs_with(offered(cache));
    (needs.0 & attention.0 != 0 || policy.selector().is_some()).then(|| {
        let shape = &cache.config().shape;
        let observation = Observation::new(shape, needs, policy.query_window());
        let observation = observation.with_history(policy.history());
        let observation = match (cache.gpu(), &cache.config().memory) {
            (Some(gpu), Some(memory)) => observation.on_device(gpu, shape, memory.open),
            _ => observation,
        };
        Arc::new(observation.with_selector(policy.selector().cloned()))
    })
}

/// The format of rows that are demoted to these quantizers.
pub(super) fn demoted_format(cache: &Cache, key: &str, value: &str) -> Result<usize> {
    match cache.find_format(key, value)? {
        Some(format) => Ok(format),
        None => bail!(
            Unsupported,
            "the cache has no blocks of {key} and {value}; its own spec has to demote to them"
        ),
    }
}
