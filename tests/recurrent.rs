//! States of recurrent layers beside attention: one slot for each sequence, snapshots, prefixes, stores.
//! The "model" folds the tokens into each layer's bytes, so a state says which tokens it has seen.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(unsafe_code, reason = "an engine writes states in place")]

mod common;

use std::sync::Arc;

use common::liar::Liar;
use common::{Engine, Random, config};
use kvmgr::attention::write_sequence;
use kvmgr::cache::{RecurrentConfig, StateStats};
use kvmgr::device::tensor::Tensor;
use kvmgr::error::{Kind, Result};
use kvmgr::manager::{Manager, ManagerConfig, Session};
use kvmgr::shape::ModelShape;
use kvmgr::store::{self, Store};

const SHAPE: ModelShape = ModelShape::new(2, 2, 1, 32);
const BLOCK: usize = 16;
const LAYERS: usize = 3;
const BYTES: usize = 100;

fn hybrid(num_states: usize, max_snapshots: usize) -> ManagerConfig {
    let recurrent = RecurrentConfig { num_layers: LAYERS, bytes: BYTES, num_states, max_snapshots };
    ManagerConfig { recurrent: Some(recurrent), prefix: true, ..config(SHAPE, "full") }
}

#[expect(clippy::mut_from_ref, reason = "the memory is the library's")]
fn state(session: &Session, layer: usize) -> &mut [u8] {
    let (address, bytes) = session.sequence().recurrent_state(layer).unwrap();
    assert_eq!((address.addr().get() % 64, bytes), (0, BYTES));
    // SAFETY: that many bytes, which only this test touches.
    unsafe { std::slice::from_raw_parts_mut(address.as_ptr(), bytes) }
}

/// The state of a layer after `tokens`.
fn after(tokens: &[i32], layer: usize) -> Vec<u8> {
    let mut state = vec![0; BYTES];
    tokens.iter().for_each(|token| fold(&mut state, *token, layer));
    state
}

fn fold(state: &mut [u8], token: i32, layer: usize) {
    for (i, byte) in state.iter_mut().enumerate() {
        *byte = byte.wrapping_mul(31).wrapping_add(token as u8).wrapping_add((i * layer) as u8 + 1);
    }
}

fn advance(session: &Session, tokens: &[i32]) {
    for layer in 0..LAYERS {
        tokens.iter().for_each(|token| fold(state(session, layer), *token, layer));
    }
}

#[track_caller]
fn assert_state(session: &Session, tokens: &[i32]) {
    for layer in 0..LAYERS {
        assert!(*state(session, layer) == after(tokens, layer)[..], "{} tokens", tokens.len());
    }
}

/// Reserves the tokens and runs the model over them.
fn run(engine: &mut Engine, session: &mut Session, tokens: &[i32]) {
    let _ = engine.step(&mut [session], &[tokens.len()]);
    advance(session, tokens);
}

fn feed(engine: &mut Engine, session: &mut Session, tokens: &[i32]) {
    run(engine, session, tokens);
    session.commit(tokens.len(), Some(tokens)).unwrap();
}

fn states(engine: &Engine) -> StateStats {
    engine.manager.cache().check_integrity();
    engine.manager.cache().stats().states
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, kind: Kind, text: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.message().contains(text), "{error}");
}

#[test]
fn a_state_is_zero_at_first_and_of_constant_size() {
    let mut config = hybrid(4, 2);
    (config.block_size, config.num_blocks) = (512, 200);
    let mut engine = Engine::new(config, 1);
    let page =
        RecurrentConfig { num_layers: LAYERS, bytes: BYTES, num_states: 4, max_snapshots: 2 }
            .slot_bytes();
    let mut session = engine.session();
    assert!((0..LAYERS).all(|layer| state(&session, layer).iter().all(|byte| *byte == 0)));
    let address = session.sequence().recurrent_state(1).unwrap();
    let tokens: Vec<i32> = (0..100_000).collect();
    for piece in tokens.chunks(2_000) {
        session.sequence_mut().reserve(piece.len()).unwrap();
        engine.attention.plan(&[(session.sequence(), piece.len())]).unwrap();
        let rows = vec![0.5; piece.len() * SHAPE.head_dim];
        (0..SHAPE.num_layers).for_each(|layer| engine.append(layer, &rows, &rows));
        advance(&session, piece);
        session.commit(piece.len(), None).unwrap();
        let stats = states(&engine);
        assert_eq!((stats.used_states, stats.bytes_used as usize), (1, page));
        assert_eq!(session.sequence().state_bytes(), page);
    }
    assert_eq!(session.sequence().recurrent_state(1).unwrap(), address);
    assert_state(&session, &tokens);
}

#[test]
fn the_accounting_is_what_is_held() {
    let engine = Engine::new(hybrid(40, 4), 2);
    let before = states(&engine);
    assert_eq!((before.num_states, before.free_states, before.bytes_committed), (40, 40, 0));
    let mut sessions: Vec<Session> = (0..20).map(|_| engine.session()).collect();
    sessions.iter_mut().for_each(|session| session.sequence_mut().snapshot(0).unwrap());
    let full = states(&engine);
    assert_eq!((full.used_states, full.free_states), (40, 0));
    assert_eq!((full.bytes_used, full.bytes_committed), (40 * 4096, 40 * 4096));
    refused(Session::new(&engine.manager, None), Kind::OutOfBlocks, "none of 40 is free");
    refused(sessions[3].fork(), Kind::OutOfBlocks, "need 1 state");
    refused(sessions[3].sequence_mut().snapshot(1), Kind::InvalidArgument, "in 0..=0");
    let live = |engine: &Engine| {
        engine.manager.cache().counters.num_sequences.load(std::sync::atomic::Ordering::Relaxed)
    };
    assert_eq!(
        (states(&engine), live(&engine)),
        (full, 20),
        "what is refused leaves nothing behind"
    );
    drop(sessions);
    let after = states(&engine);
    assert_eq!((after.used_states, after.free_states, live(&engine)), (0, 40, 0));
    assert!(after.bytes_committed <= 8 * 4096, "most pages went back: {after:?}");
    assert_eq!(after.bytes_peak, 40 * 4096);
    engine.manager.cache().reset_peak();
    assert_eq!(states(&engine).bytes_peak, 0);
    let session = engine.session();
    assert!((0..LAYERS).all(|layer| state(&session, layer).iter().all(|byte| *byte == 0)));
}

#[test]
fn a_fork_goes_its_own_way() {
    let mut engine = Engine::new(hybrid(8, 4), 3);
    let tokens: Vec<i32> = (0..10).collect();
    let mut parent = engine.session();
    feed(&mut engine, &mut parent, &tokens[..6]);
    parent.sequence_mut().snapshot(6).unwrap();
    feed(&mut engine, &mut parent, &tokens[6..]);
    let mut child = parent.fork().unwrap();
    assert_eq!(states(&engine).used_states, 3, "two states and a shared snapshot");
    assert_ne!(parent.sequence().recurrent_state(0), child.sequence().recurrent_state(0));
    feed(&mut engine, &mut child, &[77, 78]);
    assert_state(&parent, &tokens);
    child.sequence_mut().truncate(6).unwrap();
    assert_state(&child, &tokens[..6]);
    // The child's snapshot gives way to another one; the parent's stays as it was.
    child.sequence_mut().snapshot(6).unwrap();
    feed(&mut engine, &mut child, &[5]);
    child.sequence_mut().snapshot(7).unwrap();
    parent.sequence_mut().truncate(6).unwrap();
    assert_state(&parent, &tokens[..6]);
    drop(parent);
    assert_eq!(child.sequence().snapshots(), [6, 7]);
    assert_eq!(states(&engine).used_states, 3);
    drop(child);
    assert_eq!(states(&engine).used_states, 0);
}

#[test]
fn truncation_goes_back_to_snapshots_only() {
    let mut engine = Engine::new(hybrid(8, 3), 4);
    let tokens: Vec<i32> = (0..20).collect();
    let mut session = engine.session();
    for (from, to) in [(0, 3), (3, 5), (5, 7), (7, 9), (9, 12)] {
        feed(&mut engine, &mut session, &tokens[from..to]);
        session.sequence_mut().snapshot(to).unwrap();
    }
    assert_eq!(session.sequence().snapshots(), [7, 9, 12], "the oldest are dropped");
    for n in [1, 3, 8, 11] {
        refused(session.sequence_mut().truncate(n), Kind::InvalidState, "after 7, 9, 12");
        assert_eq!(session.sequence().num_tokens(), 12);
        assert_state(&session, &tokens[..12]);
    }
    session.sequence_mut().truncate(9).unwrap();
    assert_state(&session, &tokens[..9]);
    assert_eq!(session.sequence().snapshots(), [7, 9]);
    feed(&mut engine, &mut session, &tokens[9..11]);
    assert_state(&session, &tokens[..11]);
    // The same length once more: the newer state counts.
    state(&session, 0)[0] ^= 1;
    let odd = state(&session, 0).to_vec();
    session.sequence_mut().snapshot(11).unwrap();
    state(&session, 0).fill(9);
    session.sequence_mut().restore(11).unwrap();
    assert_eq!(*state(&session, 0), odd[..]);
    refused(session.sequence_mut().restore(10), Kind::InvalidArgument, "in 11..=11");
    session.sequence_mut().truncate(0).unwrap();
    assert_state(&session, &[]);
    assert_eq!((session.sequence().snapshots().len(), states(&engine).used_states), (0, 1));
}

#[test]
fn drafts_are_undone_from_a_snapshot_before_them() {
    let mut engine = Engine::new(hybrid(4, 1), 5);
    let mut session = engine.session();
    let mut text: Vec<i32> = vec![1, 2, 3];
    feed(&mut engine, &mut session, &text);
    for step in 0..20 {
        let (drafts, good) = ([step, step + 1, step + 2, step + 3], step as usize % 5);
        session.sequence_mut().snapshot(text.len()).unwrap();
        run(&mut engine, &mut session, &drafts);
        if good < 4 {
            session.commit(0, None).unwrap();
            assert_state(&session, &text);
        }
        if good == 4 {
            session.commit(4, Some(&drafts)).unwrap();
        } else if good > 0 {
            feed(&mut engine, &mut session, &drafts[..good]);
        }
        text.extend(&drafts[..good]);
        assert_state(&session, &text);
        assert_eq!(session.sequence().num_tokens(), text.len());
        assert_eq!(states(&engine).used_states, 2);
    }
}

#[test]
fn a_snapshot_after_each_draft_needs_no_second_run() {
    let mut engine = Engine::new(hybrid(6, 5), 6);
    let mut session = engine.session();
    let mut text: Vec<i32> = vec![1, 2, 3];
    feed(&mut engine, &mut session, &text);
    for step in 0..20 {
        let (drafts, good) = ([step, step + 1, step + 2, step + 3], step as usize % 5);
        let _ = engine.step(&mut [&mut session], &[4]);
        session.sequence_mut().snapshot(text.len()).unwrap();
        for (i, draft) in drafts.iter().enumerate() {
            advance(&session, &[*draft]);
            session.sequence_mut().snapshot(text.len() + i + 1).unwrap();
        }
        session.commit(good, Some(&drafts[..good])).unwrap();
        text.extend(&drafts[..good]);
        assert_state(&session, &text);
        assert_eq!(session.sequence().snapshots().last(), Some(&text.len()));
    }
    assert_eq!((states(&engine).used_states, states(&engine).free_states), (6, 0));
    refused(Session::new(&engine.manager, None), Kind::OutOfBlocks, "need 1 state");
    // Who takes snapshots of drafts relies on them: one that is missing is an error.
    let len = text.len();
    let _ = engine.step(&mut [&mut session], &[7]);
    (2..=7).for_each(|i| session.sequence_mut().snapshot(len + i).unwrap());
    refused(session.commit(2, Some(&[0, 1])), Kind::InvalidState, "no snapshot");
    refused(session.sequence_mut().truncate(len), Kind::InvalidState, "no snapshot");
    assert_eq!(session.sequence().num_reserved(), 7);
    session.commit(3, Some(&[0, 1, 2])).unwrap();
}

#[test]
fn an_engine_may_put_the_state_right_by_itself() {
    let mut engine = Engine::new(hybrid(1, 1), 7);
    let mut session = engine.session();
    run(&mut engine, &mut session, &[1, 2, 3, 4]);
    for layer in 0..LAYERS {
        state(&session, layer).copy_from_slice(&after(&[1, 2], layer));
    }
    session.commit(2, Some(&[1, 2])).unwrap();
    assert_state(&session, &[1, 2]);
    // A reservation that was never run costs nothing.
    session.sequence_mut().reserve(3).unwrap();
    session.sequence_mut().truncate(2).unwrap();
    assert_state(&session, &[1, 2]);
}

#[test]
fn a_prefix_is_as_long_as_its_last_state() {
    let mut engine = Engine::new(hybrid(8, 4), 8);
    let prompt: Vec<i32> = (0..100).collect();
    let mut first = engine.session();
    feed(&mut engine, &mut first, &prompt[..64]);
    let mut none = engine.session();
    assert_eq!(none.match_prefix(&prompt).unwrap(), 0, "blocks without a state");
    assert_state(&none, &[]);
    first.sequence_mut().snapshot(64).unwrap();
    // In one piece over a boundary, with the snapshot before the commit.
    let _ = engine.step(&mut [&mut first], &[36]);
    advance(&first, &prompt[64..96]);
    first.sequence_mut().snapshot(96).unwrap();
    advance(&first, &prompt[96..]);
    first.commit(36, Some(&prompt[64..])).unwrap();
    assert_state(&first, &prompt);
    assert_eq!(none.match_prefix(&prompt).unwrap(), 96);
    assert_state(&none, &prompt[..96]);
    feed(&mut engine, &mut none, &prompt[96..]);
    assert_state(&none, &prompt);

    // Shorter by what the two share; what is not at the end of a block is of no use.
    let mut other: Vec<i32> = prompt[..90].to_vec();
    other.extend(200..300);
    let mut second = engine.session();
    assert_eq!(second.match_prefix(&other).unwrap(), 64);
    assert_state(&second, &prompt[..64]);
    assert_eq!(engine.session().match_prefix(&prompt[..64]).unwrap(), 0);
    // Without snapshots of its own a sequence goes back to what the prefix keeps.
    feed(&mut engine, &mut second, &other[64..80]);
    assert!(second.sequence().snapshots().is_empty());
    refused(second.sequence_mut().truncate(48), Kind::InvalidState, "no snapshot");
    second.sequence_mut().truncate(64).unwrap();
    assert_state(&second, &prompt[..64]);

    drop((first, second, none));
    let stats = states(&engine);
    assert_eq!((stats.used_states, stats.idle_states, stats.bytes_idle), (0, 2, 2 * 4096));
}

#[test]
fn a_prefix_keeps_its_state_while_there_is_room() {
    let mut engine = Engine::new(hybrid(3, 1), 16);
    let tokens: Vec<i32> = (0..40).collect();
    let mut session = engine.session();
    for piece in tokens[..17].chunks(16) {
        feed(&mut engine, &mut session, piece);
        let len = session.sequence().num_tokens();
        session.sequence_mut().snapshot(len).unwrap();
    }
    assert_eq!((states(&engine).used_states, states(&engine).idle_states), (2, 1));
    let mut other = engine.session();
    assert_eq!(other.match_prefix(&tokens).unwrap(), 0, "its own state took the slot");
    drop(other);
    session.sequence_mut().truncate(17).unwrap();
    assert_state(&session, &tokens[..17]);
    // With one more there is room for all.
    let mut engine = Engine::new(hybrid(4, 1), 16);
    let mut session = engine.session();
    for piece in tokens[..17].chunks(16) {
        feed(&mut engine, &mut session, piece);
        let len = session.sequence().num_tokens();
        session.sequence_mut().snapshot(len).unwrap();
    }
    assert_eq!(engine.session().match_prefix(&tokens).unwrap(), 16);
}

/// Feeds rows without an attention, which is for one thread.
fn feed_alone(session: &mut Session, tokens: &[i32]) -> Result<()> {
    let rows = vec![0.5; tokens.len() * SHAPE.head_dim];
    let rows = Tensor::from_slice(&rows, [tokens.len(), 1, SHAPE.head_dim]);
    session.sequence_mut().reserve(tokens.len())?;
    (0..SHAPE.num_layers)
        .for_each(|layer| write_sequence(session.sequence(), layer, &rows, Some(&rows)).unwrap());
    advance(session, tokens);
    session.commit(tokens.len(), Some(tokens))
}

/// One life of a sequence among those of other threads; an error is that blocks or states ran out.
fn live(manager: &Arc<Manager>, random: &mut Random) -> Result<bool> {
    let mut session = Session::new(manager, None)?;
    let start = 1000 * random.below(3) as i32;
    let tokens: Vec<i32> = (start..start + 50).collect();
    let matched = session.match_prefix(&tokens)?;
    assert_state(&session, &tokens[..matched]);
    let mut len = matched;
    while len < tokens.len() {
        let n = (tokens.len() - len).min(BLOCK);
        feed_alone(&mut session, &tokens[len..len + n])?;
        len += n;
        session.sequence_mut().snapshot(len)?;
    }
    let child = session.fork()?;
    drop(session);
    assert_state(&child, &tokens);
    Ok(matched > 0)
}

#[test]
fn threads_share_states_of_prefixes() {
    let mut config = hybrid(12, 2);
    (config.num_blocks, config.store) = (14, Some(store::create("host").unwrap()));
    let engine = Engine::new(config, 17);
    let matches: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|seed| {
                let manager = engine.manager.clone();
                scope.spawn(move || {
                    let mut random = Random(seed);
                    (0..500).filter(|_| live(&manager, &mut random) == Ok(true)).count()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert!(matches > 100, "{matches} matches");
    assert_eq!(states(&engine).used_states, 0);
}

#[test]
fn states_of_prefixes_give_way_and_go_with_their_entries() {
    let mut config = hybrid(4, 1);
    config.num_blocks = 12;
    let mut engine = Engine::new(config, 9);
    let prompts: Vec<Vec<i32>> = (0..3).map(|i| (i * 100..i * 100 + 49).collect()).collect();
    for prompt in &prompts {
        let mut session = engine.session();
        feed(&mut engine, &mut session, &prompt[..48]);
        session.sequence_mut().snapshot(48).unwrap();
    }
    assert_eq!(states(&engine).idle_states, 3);
    // The one that was found last stays; sequences take the slots of the others.
    assert_eq!(engine.session().match_prefix(&prompts[0]).unwrap(), 48);
    let sessions: Vec<Session> = (0..3).map(|_| engine.session()).collect();
    assert_eq!((states(&engine).idle_states, states(&engine).used_states), (1, 3));
    drop(sessions);
    let matched: Vec<usize> =
        prompts.iter().map(|prompt| engine.session().match_prefix(prompt).unwrap()).collect();
    assert_eq!(matched, [48, 0, 0]);
    // Blocks are needed: entries go, and the state with its own.
    engine.manager.cache().reset_peak();
    let mut large = engine.session();
    let _ = engine.step(&mut [&mut large], &[12 * BLOCK]);
    let stats = states(&engine);
    assert_eq!((stats.idle_states, stats.used_states, stats.bytes_idle), (0, 1, 0));
    assert_eq!(stats.bytes_peak, stats.bytes_used, "what goes with its entry is not used again");
    assert_eq!(engine.manager.cache().stats().prefix_entries, 0);
}

/// Fills the cache so that what is idle goes to the store.
fn displace(engine: &mut Engine, blocks: usize) {
    let mut session = engine.session();
    let _ = engine.step(&mut [&mut session], &[blocks * BLOCK]);
}

#[test]
fn a_store_keeps_states_of_prefixes() {
    let store = store::create("host").unwrap();
    let mut config = hybrid(4, 1);
    (config.num_blocks, config.store) = (8, Some(store.clone()));
    let mut engine = Engine::new(config, 10);
    let prompt: Vec<i32> = (0..100).collect();
    let mut first = engine.session();
    feed(&mut engine, &mut first, &prompt[..32]);
    first.sequence_mut().snapshot(32).unwrap();
    feed(&mut engine, &mut first, &prompt[32..96]);
    drop(first);
    displace(&mut engine, 8);
    assert_eq!((states(&engine).idle_states, engine.manager.stats().store_puts), (0, 6));
    assert_eq!(store.stats().objects, 7, "six entries and a state");
    let mut again = engine.session();
    assert_eq!(again.match_prefix(&prompt).unwrap(), 32);
    assert_state(&again, &prompt[..32]);
    assert_eq!(engine.manager.stats().store_hits, 2, "no block behind the last state is fetched");
    drop(again);
    assert_eq!(states(&engine).idle_states, 1);
    // The state alone gives way, and comes back to the entry that stayed.
    drop((0..4).map(|_| engine.session()).collect::<Vec<_>>());
    assert_eq!(states(&engine).idle_states, 0);
    let mut again = engine.session();
    assert_eq!(again.match_prefix(&prompt).unwrap(), 32);
    assert_state(&again, &prompt[..32]);
    assert_eq!(engine.manager.stats().store_hits, 2);
    let hits = &engine.manager.cache().counters.prefix_hit_tokens;
    assert_eq!(hits.load(std::sync::atomic::Ordering::Relaxed), 64);
    // Another number of bytes is another model.
    let mut stranger = hybrid(4, 1);
    stranger.recurrent.as_mut().unwrap().bytes = BYTES - 1;
    stranger.store = Some(store);
    let stranger = Engine::new(stranger, 11);
    assert_eq!(stranger.session().match_prefix(&prompt).unwrap(), 0);
}

#[test]
fn a_preempted_sequence_takes_its_state_along() {
    let liar = Liar::new();
    let mut config = hybrid(2, 1);
    // Blocks are smaller than a state, so that only the state is a lie.
    config.lane_width = Some(kvmgr::shape::LaneWidth::Layer);
    let mut engine = Engine::new(config, 12);
    let tokens: Vec<i32> = (0..40).collect();
    let mut session = engine.session();
    feed(&mut engine, &mut session, &tokens);
    session.sequence_mut().snapshot(40).unwrap();
    session.preempt(liar.clone()).unwrap();
    assert_eq!((states(&engine).used_states, session.sequence().state_bytes()), (0, 0));
    refused(session.sequence().recurrent_state(0), Kind::InvalidState, "preempted");
    refused(session.sequence_mut().snapshot(40), Kind::InvalidState, "preempted");
    liar.limit.store(4000, std::sync::atomic::Ordering::Relaxed);
    refused(session.resume(), Kind::Corrupt, "checksum");
    assert_eq!((states(&engine).used_states, engine.manager.cache().stats().used_blocks), (0, 0));
    liar.limit.store(usize::MAX, std::sync::atomic::Ordering::Relaxed);
    let others = [engine.session(), engine.session()];
    refused(session.resume(), Kind::OutOfBlocks, "need 1 state");
    drop(others);
    session.resume().unwrap();
    assert_state(&session, &tokens);
    assert!(session.sequence().snapshots().is_empty());
    assert_eq!(liar.stats().objects, 0);
    feed(&mut engine, &mut session, &[1]);
    session.preempt(liar.clone()).unwrap();
    drop(session);
    assert_eq!((states(&engine).used_states, liar.stats().objects), (0, 0));
}

#[test]
fn a_replay_needs_a_way_back() {
    let mut config = hybrid(4, 1);
    config.spec = "kvzip | global | keep(50%)".to_string();
    let mut engine = Engine::new(config, 13);
    let tokens: Vec<i32> = (0..40).collect();
    let mut session = engine.session();
    feed(&mut engine, &mut session, &tokens);
    refused(session.replay(0..40), Kind::InvalidState, "replay changes the state");
    session.sequence_mut().snapshot(40).unwrap();
    session.replay(0..40).unwrap();
    run(&mut engine, &mut session, &tokens);
    session.commit(0, None).unwrap();
    assert_state(&session, &tokens);
    session.end_prefill().unwrap();
    assert!(session.sequence().num_evicted() > 0, "budgets are those of attention layers");
    assert_state(&session, &tokens);
}

#[test]
fn configurations_are_checked() {
    type Set = fn(&mut RecurrentConfig, usize);
    let limits: [(&str, Set, usize); 4] = [
        ("recurrent_layers", |config, value| config.num_layers = value, 4097),
        ("recurrent_bytes", |config, value| config.bytes = value, 1 << 32),
        ("num_states", |config, value| config.num_states = value, (1 << 20) + 1),
        ("recurrent_snapshots", |config, value| config.max_snapshots = value, 1025),
    ];
    for (name, set, above) in limits {
        for value in [0, above] {
            let mut config = hybrid(4, 1);
            set(config.recurrent.as_mut().unwrap(), value);
            refused(Manager::new(config), Kind::InvalidArgument, name);
        }
    }
    let mut config = hybrid(4, 1);
    config.recurrent.as_mut().unwrap().bytes = (1 << 31) - 1;
    refused(Manager::new(config), Kind::InvalidArgument, "less than 4 GiB");

    let plain = Engine::new(config_without(), 14);
    let mut session = plain.session();
    refused(session.sequence().recurrent_state(0), Kind::Unsupported, "no recurrent layers");
    refused(session.sequence_mut().snapshot(0), Kind::Unsupported, "no recurrent layers");
    refused(session.sequence_mut().restore(0), Kind::Unsupported, "no recurrent layers");
    assert_eq!(states(&plain), StateStats::default());
    let hybrid = Engine::new(hybrid(1, 1), 15);
    refused(
        hybrid.session().sequence().recurrent_state(LAYERS),
        Kind::InvalidArgument,
        "layer is 3, the model has 3 recurrent layers",
    );
}

fn config_without() -> ManagerConfig {
    ManagerConfig { recurrent: None, ..hybrid(1, 1) }
}
