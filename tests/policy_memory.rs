//! Policies that act while decoding hold a sequence at its budget for ever.

mod common;

use common::{Engine, config};
use kvmgr::attention::Options;
use kvmgr::shape::ModelShape;

const SHAPE: ModelShape = ModelShape::new(1, 2, 1, 8);
const STEPS: usize = 100_000;

/// Rows that are made once: the policies see different ones at each step all the same.
const POOL: usize = 997;

#[test]
fn memory_is_flat_over_100k_generated_tokens() {
    for (spec, most) in [
        ("stream(sink=4, recent=60)", 64),
        ("stream(sink=4, recent=60) | pos(cache_relative)", 64),
        ("h2o(recent=16, heavy=48)", 64),
        ("tova | keep_tokens(64)", 64),
        ("every(32) | keydiff | keep_tokens(64)", 64 + 31),
        ("every(16) | knorm | protect(4, 16) | keep_tokens(64)", 64 + 15),
        ("decode: every(16) | h2o(recent=32) | keep_tokens(64) | cam(m=8)", 64 + 15),
    ] {
        let mut engine = Engine::new(config(SHAPE, spec), 5);
        let block_size = engine.manager.cache().config().block_size;
        let pool = engine.random.normals((POOL + 1) * 16);
        let mut session = engine.session();
        let mut peak = 0;
        for step in 0..=STEPS {
            let n = if step == 0 { 80 } else { 1 };
            session.sequence_mut().reserve(n).unwrap();
            engine.attention.plan(&[(session.sequence(), n)]).unwrap();
            let at = step % POOL * 16;
            let rows: Vec<f32> = pool.iter().skip(at).cycle().take(n * 16).copied().collect();
            engine.append(0, &rows[..n * 8], &rows[n * 8..]);
            engine.run(0, rows, &Options::default());
            session.commit(n, None).unwrap();
            if step == 0 {
                session.end_prefill().unwrap();
            }
            let len = session.sequence().lanes()[0].len();
            if step > 32 {
                assert!((1..=most).contains(&len), "{spec}: {len} rows after {step} steps");
            }
            if step == 200 {
                engine.manager.cache().reset_peak();
            }
            if step == 10_000 {
                peak = engine.manager.stats().cache.bytes_peak;
            }
        }
        // What ten thousand steps have taken at most is what a hundred thousand take.
        let stats = engine.manager.stats().cache;
        assert_eq!(stats.bytes_peak, peak, "{spec}");
        // Keys and values of 8 elements in f16; a gather holds old and new blocks at once.
        let block = (block_size * 2 * 8 * 2) as u64;
        let blocks = most.div_ceil(block_size) as u64 + 4;
        assert!(peak <= 2 * blocks * block, "{spec}: {peak} bytes");
        assert_eq!(session.sequence().num_tokens(), 80 + STEPS);
    }
}
