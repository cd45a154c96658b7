//! Selected attention: explicit block lists against the reference.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{Engine, Random, config, relative_error};
use kvmgr::attention::{Options, reference};
use kvmgr::manager::Session;
use kvmgr::shape::{LaneWidth, ModelShape};

/// Random ascending lists, for each sequence and KV head, in the form of `select`.
fn lists(
    engine: &Engine,
    sessions: &[Session],
    layer: usize,
    random: &mut Random,
) -> Vec<Vec<u32>> {
    let mut lists = Vec::new();
    for session in sessions {
        for head in 0..engine.shape().num_kv_heads {
            let (lane, _) = session.sequence().locate(layer, head);
            let blocks = session.sequence().lanes()[lane].spans.len() as u32;
            let percent = random.pick(&[0, 10, 50, 100]);
            lists.push((0..blocks).filter(|_| random.chance(percent)).collect());
        }
    }
    lists
}

fn csr(lists: &[Vec<u32>]) -> (Vec<u32>, Vec<u32>) {
    let mut starts = vec![0];
    for list in lists {
        starts.push(starts.last().unwrap() + list.len() as u32);
    }
    (starts, lists.concat())
}

#[test]
fn selected_blocks_agree_with_the_reference() {
    for seed in 0..6 {
        let mut random = Random(seed);
        let shape = ModelShape::new(2, 4, 2, 32);
        let mut config =
            config(shape, random.pick(&["full", "quant(q8_0)", "quant(k=kivi2, v=q8_0)"]));
        config.lane_width = Some(random.pick(&[LaneWidth::Sequence, LaneWidth::Head]));
        config.block_size = 32;
        let mut engine = Engine::new(config, seed);
        engine.num_workers = random.within(1, 4);
        let mut sessions: Vec<_> = (0..2).map(|_| engine.session()).collect();
        for (session, n) in sessions.iter_mut().zip([2100, 200]) {
            let _ = engine.step(&mut [session], &[n]);
            session.commit(n, None).unwrap();
        }
        for n in [1, 2, 17] {
            let mut refs: Vec<_> = sessions.iter_mut().collect();
            let _ = engine.step(&mut refs, &[n, n]);
            let window = random.pick(&[0, 500]);
            let options = Options { sliding_window: window, ..Options::default() };
            for layer in 0..2 {
                let lists = lists(&engine, &sessions, layer, &mut random);
                let (starts, blocks) = csr(&lists);
                engine.attention.select(layer, &starts, &blocks).unwrap();
                let query = random.normals(2 * n * 4 * 32);
                let step = engine.run(layer, query, &options);
                for row in 0..2 * n * 4 {
                    let (token, head) = (row / 4, row % 4);
                    let (sequence, i) = (token / n, token % n);
                    let expected = reference::attend_selected(
                        sessions[sequence].sequence(),
                        layer,
                        head,
                        &step.query[row * 32..][..32],
                        (i, n),
                        &options,
                        Some(&lists[sequence * 2 + head / 2]),
                    );
                    let error = relative_error(&step.output[row * 32..][..32], &expected.output);
                    assert!(
                        error < common::tolerance(&engine),
                        "seed {seed} layer {layer} row {row}: {error}"
                    );
                    assert!((f64::from(step.lse[row]) - expected.lse).abs() < 1e-3);
                }
            }
            sessions.iter_mut().for_each(|session| session.commit(n, None).unwrap());
        }
    }
}

#[test]
fn a_new_plan_or_a_bad_list_brings_all_blocks_back() {
    let shape = ModelShape::new(1, 1, 1, 32);
    let mut engine = Engine::new(config(shape, "full"), 5);
    let mut session = engine.session();
    let full = engine.step(&mut [&mut session], &[100]);
    let query = full[0].query.clone();
    let same = |engine: &Engine| {
        engine.run(0, query.clone(), &Options::default()).output == full[0].output
    };
    let mut selected = |starts: &[u32], blocks: &[u32]| {
        engine.attention.select(0, &[0, 0], &[]).unwrap();
        // All 100 tokens are planned: every block holds one of them.
        assert!(same(&engine));
        engine.attention.select(0, starts, blocks).unwrap_err().message().to_string()
    };
    assert!(selected(&[0], &[]).contains("starts has 1 values, must have 1 + 1"));
    assert!(selected(&[1, 1], &[0]).contains("starts[0] is 1, must be 0"));
    assert!(selected(&[0, 2], &[0]).contains("starts[1] is 2, must be the number of blocks, 1"));
    assert!(selected(&[0, 1], &[7]).contains("blocks[0] is 7, the lane has 7 blocks"));
    assert!(selected(&[0, 2], &[3, 3]).contains("blocks[1] is 3 after 3"));
    assert!(engine.attention.select(1, &[0, 0], &[]).unwrap_err().message().contains("layer is 1"));
    session.commit(100, None).unwrap();
    let error = engine.attention.select(0, &[0, 0], &[]).unwrap_err();
    assert!(error.message().contains("has changed since"));
    let one = engine.step(&mut [&mut session], &[1]);
    engine.attention.select(0, &[0, 1], &[2]).unwrap();
    let few = engine.run(0, one[0].query.clone(), &Options::default());
    assert_ne!(few.output, one[0].output);
    let bad: [(&[u32], &[u32]); 4] =
        [(&[0], &[]), (&[1, 1], &[2]), (&[0, 2], &[2]), (&[0, 1], &[9])];
    for (starts, blocks) in bad {
        assert!(engine.attention.select(0, starts, blocks).is_err());
        let again = engine.run(0, one[0].query.clone(), &Options::default());
        assert_eq!(again.output, one[0].output, "{starts:?} {blocks:?}");
        engine.attention.select(0, &[0, 1], &[2]).unwrap();
    }
    engine.attention.plan(&[(session.sequence(), 1)]).unwrap();
    let again = engine.run(0, one[0].query.clone(), &Options::default());
    assert_eq!(again.output, one[0].output);
}

#[test]
fn without_a_plan_there_is_nothing_to_choose_from() {
    let shape = ModelShape::new(2, 4, 2, 32);
    let mut engine = Engine::new(config(shape, "full"), 1);
    for _ in 0..2 {
        assert!(engine.attention.select(1, &[0, 0], &[]).is_err());
        engine.attention.select(1, &[0], &[]).unwrap();
        assert!(engine.run(1, Vec::new(), &Options::default()).output.is_empty());
        engine.attention.plan(&[]).unwrap();
    }
}
