//! Selectors: indexes against slow references, laws of all of them, and attention that reads by one.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::golden::{DIM, GROUP, Golden, HEADS, LAYERS, LEN};
use common::{Engine, Random, config, relative_error, tolerance};
use kvmgr::attention::{Options, reference};
use kvmgr::manager::Session;
use kvmgr::policy::Pipeline;
use kvmgr::quantizer::Side;
use kvmgr::selector::{NewBlocks, SELECTORS, Selector};
use kvmgr::shape::{LaneWidth, ModelShape};

/// The selector of a spec.
fn selector(spec: &str) -> std::sync::Arc<dyn Selector> {
    Pipeline::parse(spec).unwrap().selector().unwrap().clone()
}

/// Every example of every selector.
fn examples() -> impl Iterator<Item = &'static str> {
    SELECTORS.iter().flat_map(|entry| entry.examples).copied()
}

/// Scores of blocks of `rows` keys for the queries of a group.
fn scores(spec: &str, dim: usize, keys: &[f32], rows: &[u32], queries: &[f32]) -> Vec<f32> {
    let received: Vec<f32> = (0..keys.len() / dim).map(|i| (i * 7 % 5) as f32).collect();
    let mut index = selector(spec).index(dim);
    index.extend(&NewBlocks { keys, rows, received: &received });
    let mut scores = vec![f32::NAN; rows.len()];
    index.score(queries, &mut scores);
    scores
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// `scores` against a formula in f64 for each block: its keys, and the queries.
fn assert_scores(found: &[f32], expected: &[f64], spec: &str) {
    for (block, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        assert!(error < 2e-3 * (1.0 + expected.abs()), "{spec} block {block}: {found} {expected}");
    }
}

#[test]
fn quest_bounds_every_key_from_above_and_is_the_formula() {
    let mut random = Random(1);
    let (dim, rows) = (24, [16u32, 16, 5, 16, 1]);
    let keys = random.normals(54 * dim);
    let queries = random.normals(3 * dim);
    let found = scores("quest", dim, &keys, &rows, &queries);
    let mut start = 0;
    let mut expected = Vec::new();
    for count in rows {
        let block = &keys[start * dim..][..count as usize * dim];
        start += count as usize;
        let bound = |query: &[f32]| -> f64 {
            let channel = |c: usize| {
                let products = block.chunks_exact(dim).map(|key| f64::from(key[c] * query[c]));
                products.fold(f64::NEG_INFINITY, f64::max)
            };
            (0..dim).map(channel).sum()
        };
        let bounds = queries.chunks_exact(dim).map(bound);
        expected.push(bounds.fold(f64::NEG_INFINITY, f64::max));
        for key in block.chunks_exact(dim) {
            let best = queries.chunks_exact(dim).map(|query| dot(query, key));
            let best = best.fold(f64::NEG_INFINITY, f64::max);
            assert!(best <= expected[expected.len() - 1] + 1e-6);
        }
    }
    assert_scores(&found, &expected, "quest");
}

#[test]
fn quest_agrees_with_the_golden_pages() {
    let golden = Golden::open();
    for layer in 0..LAYERS {
        let load = |name: &str| golden.floats(&format!("states/l{layer}.{name}"));
        let (keys, queries) = (load("k"), load("q"));
        let bounds = golden.floats(&format!("quest_p16/l{layer}.ub"));
        let pages = LEN / 16;
        for head in 0..HEADS {
            let keys = &keys[head * LEN * DIM..][..LEN * DIM];
            let query = |g: usize| &queries[((head * GROUP + g) * LEN + LEN - 1) * DIM..][..DIM];
            let queries: Vec<f32> = (0..GROUP).flat_map(query).copied().collect();
            let found = scores("quest", DIM, keys, &vec![16; pages], &queries);
            let expected: Vec<f64> = (0..pages)
                .map(|page| {
                    let of = |g: usize| f64::from(bounds[(head * GROUP + g) * pages + page]);
                    (0..GROUP).map(of).fold(f64::NEG_INFINITY, f64::max)
                })
                .collect();
            assert_scores(&found, &expected, "golden quest");
            for n in [4, 8, 16] {
                let mut order: Vec<usize> = (0..pages).collect();
                order.sort_by(|a, b| found[*b].total_cmp(&found[*a]));
                let mut chosen = order[..n].to_vec();
                chosen.sort_unstable();
                let mut expected = golden.indices(&format!("quest_p16/l{layer}.sel_kvmax_{n}"))
                    [head * n..][..n]
                    .to_vec();
                expected.sort_unstable();
                assert_eq!(chosen, expected, "layer {layer} head {head}, {n} pages");
            }
        }
    }
}

#[test]
fn shadowkv_is_its_formula_and_outliers_come_first() {
    let mut random = Random(2);
    let (dim, rows) = (16, [16u32, 16, 16, 7]);
    let keys = random.normals(55 * dim);
    let queries = random.normals(2 * dim);
    let mut landmarks: Vec<(usize, Vec<f32>, f64)> = Vec::new();
    let mut start = 0;
    for (block, count) in rows.iter().enumerate() {
        let keys = &keys[start * dim..][..*count as usize * dim];
        start += *count as usize;
        for run in keys.chunks(4 * dim) {
            let n = run.len() / dim;
            let mean: Vec<f32> =
                (0..dim).map(|c| run.iter().skip(c).step_by(dim).sum::<f32>() / n as f32).collect();
            let cosine = |key: &[f32]| dot(key, &mean) / (dot(key, key) * dot(&mean, &mean)).sqrt();
            let least = run.chunks_exact(dim).map(cosine).fold(f64::INFINITY, f64::min);
            landmarks.push((block, mean, least));
        }
    }
    let mut expected = vec![f64::NEG_INFINITY; rows.len()];
    for query in queries.chunks_exact(dim) {
        let logit = |mean: &[f32]| (dot(query, mean) / (dim as f64).sqrt()).exp();
        let sum: f64 = landmarks.iter().map(|(_, mean, _)| logit(mean)).sum();
        for (block, mean, _) in &landmarks {
            expected[*block] = expected[*block].max(logit(mean) / sum);
        }
    }
    let found = scores("shadowkv(chunk=4, outliers=0)", dim, &keys, &rows, &queries);
    assert_scores(&found, &expected, "shadowkv");
    let worst = landmarks.iter().min_by(|a, b| a.2.total_cmp(&b.2)).unwrap().0;
    let found = scores("shadowkv(chunk=4, outliers=1)", dim, &keys, &rows, &queries);
    let infinite = |i: &usize| found[*i] == f32::INFINITY;
    assert_eq!((0..rows.len()).filter(infinite).collect::<Vec<_>>(), [worst]);
}

#[test]
fn infllm_asks_the_tokens_that_received_most() {
    let mut random = Random(3);
    let (dim, rows) = (8, [10u32, 10, 4]);
    let keys = random.normals(24 * dim);
    let queries = random.normals(2 * dim);
    let found = scores("infllm(tops=2)", dim, &keys, &rows, &queries);
    // What `scores` says that tokens received is 0, 2, 4, 1, 3, 0, 2, ...
    let tops = [[2, 7], [12, 17], [22, 21]];
    let received = |i: usize| i * 7 % 5;
    for (block, tops) in tops.iter().enumerate() {
        let all = block * 10..(block * 10 + 10).min(24);
        let least = tops.iter().map(|i| received(*i)).min().unwrap();
        let better = all.filter(|i| received(*i) > least && !tops.contains(i));
        assert_eq!(better.count(), 0, "the test names the best of block {block}");
    }
    let expected: Vec<f64> = tops
        .iter()
        .map(|tops| {
            let key = |i: &usize| &keys[i * dim..][..dim];
            let sum: f64 = tops
                .iter()
                .flat_map(|i| queries.chunks_exact(dim).map(move |query| dot(query, key(i))))
                .sum();
            sum / 4.0
        })
        .collect();
    assert_scores(&found, &expected, "infllm");
}

#[test]
fn doublesparsity_compares_the_strongest_channels() {
    let mut random = Random(4);
    let (dim, rows) = (16, [8u32, 8, 8]);
    let mut keys = random.normals(24 * dim);
    for key in keys.chunks_exact_mut(dim) {
        key[3] *= 9.0;
        key[12] *= 7.0;
    }
    let queries = random.normals(2 * dim);
    let found = scores("doublesparsity(part=8)", dim, &keys, &rows, &queries);
    let expected: Vec<f64> = keys
        .chunks_exact(8 * dim)
        .map(|block| {
            let label =
                |key: &[f32], query: &[f32]| dot(&[key[3], key[12]], &[query[3], query[12]]);
            let all = block
                .chunks_exact(dim)
                .flat_map(|key| queries.chunks_exact(dim).map(move |query| label(key, query)));
            all.fold(f64::NEG_INFINITY, f64::max)
        })
        .collect();
    assert_scores(&found, &expected, "doublesparsity");
}

#[test]
fn pqcache_is_exact_while_there_are_as_many_centroids_as_keys() {
    let mut random = Random(5);
    let (dim, rows) = (12, [4u32; 8]);
    // 32 tokens and 64 centroids: each subvector is its own centroid.
    let keys = random.normals(32 * dim);
    let queries = random.normals(3 * dim);
    let found = scores("pqcache(parts=2, bits=6)", dim, &keys, &rows, &queries);
    let mut expected = [0.0; 8];
    for query in queries.chunks_exact(dim) {
        let logit = |key: &[f32]| (dot(query, key) / (dim as f64).sqrt()).exp();
        let logits: Vec<f64> = keys.chunks_exact(dim).map(logit).collect();
        let sum: f64 = logits.iter().sum();
        for (block, logits) in expected.iter_mut().zip(logits.chunks_exact(4)) {
            *block += logits.iter().sum::<f64>() / sum;
        }
    }
    assert_scores(&found, &expected, "pqcache");
    // Fewer centroids are an approximation, but a close one where keys come in clusters.
    let clustered: Vec<f32> = (0..64)
        .flat_map(|i| keys[i % 4 * dim..][..dim].to_vec())
        .map(|x| x + 0.01 * random.normal())
        .collect();
    let rows = [8u32; 8];
    let coarse = scores("pqcache(parts=2, bits=4)", dim, &clustered, &rows, &queries);
    let total: f32 = coarse.iter().sum();
    assert!((total - 3.0).abs() < 1e-3, "each query hands out 1: {total}");
    assert!(coarse.iter().all(|mass| (mass - 3.0 / 8.0).abs() < 0.02), "{coarse:?}");
}

#[test]
fn indexes_forget_fork_and_go_on() {
    let mut random = Random(6);
    let dim = 16;
    for spec in examples() {
        let keys = random.normals(160 * dim);
        let queries = random.normals(4 * dim);
        let blocks = |range: std::ops::Range<usize>| NewBlocks {
            keys: &keys[range.start * 16 * dim..range.end * 16 * dim],
            rows: &[16; 10][range],
            received: &[],
        };
        let selector = selector(spec);
        let mut whole = selector.index(dim);
        whole.extend(&blocks(0..6));
        let bytes = whole.bytes();
        whole.extend(&blocks(6..10));
        assert!(whole.bytes() > bytes, "{spec}");
        let ask = |index: &mut dyn kvmgr::selector::Index, n: usize| {
            let mut scores = vec![0.0; n];
            index.score(&queries, &mut scores);
            scores
        };
        let all = ask(&mut *whole, 10);
        assert!(all.iter().all(|score| !score.is_nan()), "{spec}");
        let mut fork = whole.fork();
        fork.truncate(6);
        assert_eq!(fork.bytes(), bytes, "{spec}");
        let mut part = selector.index(dim);
        part.extend(&blocks(0..6));
        assert_eq!(ask(&mut *fork, 6), ask(&mut *part, 6), "{spec}");
        fork.extend(&blocks(6..10));
        assert_eq!(ask(&mut *fork, 10), all, "{spec}");
        assert_eq!(ask(&mut *whole, 10), all, "{spec}: the fork is one of its own");
    }
}

const SHAPE: ModelShape = ModelShape::new(2, 4, 2, 32);

/// A prompt in pieces and its end.
fn prompt(engine: &mut Engine, counts: &[usize]) -> Session {
    let mut session = engine.session();
    for n in counts {
        let _ = engine.step(&mut [&mut session], &[*n]);
        session.commit(*n, None).unwrap();
    }
    session.end_prefill().unwrap();
    session
}

/// What a head must read: the best blocks by an index made from nothing, and what is always read.
fn expected_list(
    session: &Session,
    spec: &str,
    layer: usize,
    head: usize,
    query: &[f32],
) -> Vec<u32> {
    let sequence = session.sequence();
    let selector = selector(spec);
    let reach = selector.reach();
    let (lane, _) = sequence.locate(layer, head);
    let lane = &sequence.lanes()[lane];
    let last = lane.len() - 1;
    let mut starts = vec![0usize];
    for span in &lane.spans {
        starts.push(starts[starts.len() - 1] + span.count as usize);
    }
    // The span of the step itself is open.
    let sealed = lane.spans.iter().take_while(|span| span.sealed).count().min(lane.spans.len() - 1);
    let is_fixed = |i: usize| {
        i >= sealed || starts[i] < reach.sink || starts[i + 1] > last.saturating_sub(reach.recent)
    };
    let mut keys = Vec::new();
    sequence.decode(layer, head, Side::Key, &mut keys);
    let dim = SHAPE.head_dim;
    let seen = sequence.observation().unwrap().head(layer, head).lock();
    let mut index = selector.index(dim);
    let rows: Vec<u32> = lane.spans[..sealed].iter().map(|span| span.count).collect();
    let received = seen.received.sums.get(..starts[sealed]).unwrap_or(&[]);
    index.extend(&NewBlocks { keys: &keys[..starts[sealed] * dim], rows: &rows, received });
    let mut scores = vec![0.0; sealed];
    index.score(query, &mut scores);
    let mut order: Vec<usize> = (0..sealed).filter(|i| !is_fixed(*i)).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    order.truncate((reach.tokens / 16).max(1));
    order.extend((0..lane.spans.len()).filter(|i| is_fixed(*i)));
    order.sort_unstable();
    order.into_iter().map(|i| i as u32).collect()
}

#[test]
fn a_decode_step_reads_what_the_selector_chooses() {
    let specs = [
        "quest(tokens=64, dense=1)",
        "shadowkv(tokens=48, dense=0, outliers=2)",
        "quant(k=had+q4_0, v=q8_0) | quest(tokens=33, sink=20, recent=40, dense=0)",
        "snapkv(w=8) | adakv | keep(0.6) | quest(tokens=64, dense=0)",
    ];
    for (seed, spec) in specs.into_iter().enumerate() {
        let mut config = config(SHAPE, spec);
        config.lane_width = Some(LaneWidth::Head);
        let mut engine = Engine::new(config, seed as u64);
        let mut session = prompt(&mut engine, &[300, 70]);
        let stage = spec.rsplit(" | ").next().unwrap();
        let mut parts = 0;
        for step in 0..40 {
            engine.num_workers = 1 + step % 3;
            let layers = engine.step(&mut [&mut session], &[1]);
            for (layer, found) in layers.iter().enumerate() {
                for q_head in 0..4 {
                    let head = q_head / 2;
                    let queries = &found.query[head * 2 * 32..][..2 * 32];
                    let dense = layer < selector(stage).reach().dense;
                    let list = expected_list(&session, stage, layer, head, queries);
                    let all = session.sequence().lanes()[session.sequence().locate(layer, head).0]
                        .spans
                        .len();
                    parts += usize::from(!dense && list.len() < all);
                    let expected = reference::attend_selected(
                        session.sequence(),
                        layer,
                        q_head,
                        &found.query[q_head * 32..][..32],
                        (0, 1),
                        &Options::default(),
                        (!dense).then_some(&list[..]),
                    );
                    let error =
                        relative_error(&found.output[q_head * 32..][..32], &expected.output);
                    assert!(
                        error < tolerance(&engine),
                        "{spec} step {step} layer {layer}: {error}"
                    );
                }
            }
            session.commit(1, None).unwrap();
        }
        assert!(parts > 40, "{spec}: too few lists were short");
    }
}

#[test]
fn a_budget_of_everything_is_full_attention_and_many_queries_read_all() {
    for spec in examples().filter(|spec| !spec.contains('|')) {
        let wide = spec.split('(').next().unwrap().to_string() + "(tokens=1m, dense=0)";
        for (spec, counts) in [(wide.as_str(), [1usize, 1]), (spec, [2, 30])] {
            let mut engine = Engine::new(config(SHAPE, spec), 9);
            let mut session = prompt(&mut engine, &[200]);
            for n in counts {
                let layers = engine.step(&mut [&mut session], &[n]);
                for (layer, found) in layers.iter().enumerate() {
                    for row in 0..n * 4 {
                        let expected = reference::attend(
                            session.sequence(),
                            layer,
                            row % 4,
                            &found.query[row * 32..][..32],
                            (row / 4, n),
                            &Options::default(),
                        );
                        let error =
                            relative_error(&found.output[row * 32..][..32], &expected.output);
                        assert!(error < 1e-4, "{spec} layer {layer} row {row}: {error}");
                    }
                }
                session.commit(n, None).unwrap();
            }
        }
    }
}

#[test]
fn selection_survives_rollback_fork_and_preemption() {
    let spec = "quest(tokens=32, dense=0)";
    let mut engine = Engine::new(config(SHAPE, spec), 13);
    let mut session = prompt(&mut engine, &[150]);
    let mut check = |session: &mut Session| {
        let found = engine.step(&mut [session], &[1]);
        for (layer, found) in found.iter().enumerate() {
            for q_head in 0..4 {
                let queries = &found.query[q_head / 2 * 2 * 32..][..2 * 32];
                let list = expected_list(session, spec, layer, q_head / 2, queries);
                let expected = reference::attend_selected(
                    session.sequence(),
                    layer,
                    q_head,
                    &found.query[q_head * 32..][..32],
                    (0, 1),
                    &Options::default(),
                    Some(&list),
                );
                let error = relative_error(&found.output[q_head * 32..][..32], &expected.output);
                assert!(error < 1e-4, "layer {layer}: {error}");
            }
        }
        session.commit(1, None).unwrap();
    };
    for _ in 0..20 {
        check(&mut session);
    }
    session.sequence_mut().truncate(101).unwrap();
    for _ in 0..30 {
        check(&mut session);
    }
    let mut child = session.fork().unwrap();
    child.sequence_mut().truncate(96).unwrap();
    for _ in 0..20 {
        check(&mut child);
        check(&mut session);
    }
    // Bounds of both sides in f16, for each of the sealed blocks of all heads.
    let known = session.sequence().observation().unwrap().selector_bytes();
    let sealed = session.sequence().lanes()[0].spans.iter().filter(|span| span.sealed).count();
    // The last of them may have been sealed since.
    let bytes = |blocks: usize| blocks * 4 * 2 * 32 * 2;
    assert!(known == bytes(sealed) || known == bytes(sealed - 1), "{known} of {sealed} blocks");
    let store = kvmgr::store::create("host").unwrap();
    child.preempt(store).unwrap();
    child.resume().unwrap();
    check(&mut child);
}
