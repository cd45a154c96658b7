//! Prefixes that leave the cache, come back from a store, and give the same answers.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::sync::Arc;

use common::liar::Liar;
use common::{Engine, config};
use kvmgr::attention::Options;
use kvmgr::shape::{KeepSet, ModelShape};
use kvmgr::store::{self, Store};

const SHAPE: ModelShape = ModelShape::new(2, 4, 2, 32);

fn engine(store: Arc<dyn Store>) -> Engine {
    let mut config = config(SHAPE, "quant(k=had+q4_0, v=q8_0)");
    (config.prefix, config.store, config.num_blocks) = (true, Some(store), 12);
    Engine::new(config, 3)
}

/// Computes a prompt of 97 tokens, forgets it, fills the cache with another, and matches the first
/// again. Answers the tokens matched and whether attention gave the same numbers.
fn offload_and_fetch(engine: &mut Engine) -> (usize, bool) {
    let tokens: Vec<i32> = (0..97).collect();
    let query = engine.random.normals(4 * 32);
    let mut first = engine.session();
    let _ = engine.step(&mut [&mut first], &[96]);
    first.commit(96, Some(&tokens[..96])).unwrap();
    engine.attention.plan(&[(first.sequence(), 1)]).unwrap();
    let before = engine.run(1, query.clone(), &Options::default()).output;
    drop(first);

    let mut other = engine.session();
    let _ = engine.step(&mut [&mut other], &[190]);
    other.commit(190, None).unwrap();
    drop(other);
    assert!(engine.manager.stats().store_puts >= 6, "the prompt was offloaded");

    let mut again = engine.session();
    let matched = again.match_prefix(&tokens).unwrap();
    if matched == 0 {
        return (0, false);
    }
    engine.attention.plan(&[(again.sequence(), 1)]).unwrap();
    let after = engine.run(1, query, &Options::default()).output;
    engine.manager.cache().check_integrity();
    (matched, before == after)
}

#[test]
fn a_prefix_survives_in_the_store() {
    let mut engine = engine(store::create("host").unwrap());
    assert_eq!(offload_and_fetch(&mut engine), (96, true));
    assert_eq!(engine.manager.stats().store_hits, 6);
}

#[test]
fn a_store_that_lies_costs_a_miss_not_an_answer() {
    let mut engine = engine(Liar::new());
    assert_eq!(offload_and_fetch(&mut engine).0, 0);
    let stats = engine.manager.stats();
    assert_eq!((stats.store_hits, stats.store_failures), (0, 1));
    engine.manager.cache().check_integrity();
}

#[test]
fn tenants_with_other_salts_find_nothing() {
    let store = store::create("host").unwrap();
    let mut first = engine(store.clone());
    assert_eq!(offload_and_fetch(&mut first).0, 96);
    let mut config = config(SHAPE, "quant(k=had+q4_0, v=q8_0)");
    (config.prefix, config.store, config.salt) = (true, Some(store), 7);
    let stranger = Engine::new(config, 4);
    let tokens: Vec<i32> = (0..97).collect();
    assert_eq!(stranger.session().match_prefix(&tokens).unwrap(), 0);
}

/// A sequence without tokens starts anew, whatever was left of its first prompt.
#[test]
fn the_next_prompt_of_a_sequence_is_shared() {
    let mut engine = engine(store::create("host").unwrap());
    let tokens: Vec<i32> = (0..33).collect();
    let mut session = engine.session();
    let _ = engine.step(&mut [&mut session], &[32]);
    session.commit(32, None).unwrap();
    session.sequence_mut().compact(0, &KeepSet::from_indices(0..20)).unwrap();
    session.truncate(0).unwrap();
    let _ = engine.step(&mut [&mut session], &[32]);
    session.commit(32, Some(&tokens[..32])).unwrap();
    assert_eq!(engine.session().match_prefix(&tokens).unwrap(), 32);
    // It lets go of the prefix when its own rows do: all other blocks can be had.
    session.sequence_mut().compact(0, &KeepSet::from_indices(0..16)).unwrap();
    engine.session().sequence_mut().reserve(11 * 16).unwrap();
}
