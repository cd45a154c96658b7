//! The simulator: a recorded log and the pool that recorded it agree to the token; table and plot.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;
#[path = "../benches/simulate/run.rs"]
mod run;
#[path = "../benches/simulate/trace.rs"]
mod trace;

use common::Random;
use kvmgr::block::manager::{BlockConfig, BlockManager, Keep};
use kvmgr::block::{Request, TablesConfig, prefix};
use kvmgr::evictor::EVICTORS;

const BLOCKS: usize = 48;

/// A log of users that come back with longer prompts, and what was found meanwhile.
fn record(evictor: &str) -> (Vec<u8>, run::Hits) {
    let mut manager = BlockManager::new(BlockConfig {
        num_blocks: BLOCKS,
        evictor: evictor.to_string(),
        tables: TablesConfig::new(4),
        root: prefix::root(4, 0, b"recorded"),
        partial: false,
        recycled: false,
    })
    .unwrap();
    manager.start_log().unwrap();
    let mut random = Random(3);
    let mut histories: Vec<Vec<i32>> = (0..12).map(|user| vec![7, 7, 7, 7, user]).collect();
    for _ in 0..600 {
        let history = random.below(12);
        let history = &mut histories[history];
        if history.len() > 60 {
            history.truncate(5);
        }
        history.extend((0..random.within(1, 9)).map(|_| random.below(100) as i32));
        let root = manager.root(b"", "");
        let admission = manager.admit(&Request::new(history, root), Keep::default()).unwrap();
        let rest = (history.len() - admission.num_cached) as u32;
        manager.commit(&[admission.id], &[rest], &[]).unwrap();
        for _ in 0..random.below(6) {
            let token = random.below(100) as i32;
            manager.reserve(&[admission.id], &[1]).unwrap();
            manager.commit(&[admission.id], &[1], &[token]).unwrap();
            history.push(token);
        }
        manager.release(&[admission.id]).unwrap();
    }
    let stats = manager.stats();
    assert!(stats.evictions > 100);
    let hits = run::Hits { asked: stats.prefix_query_tokens, found: stats.prefix_hit_tokens };
    (manager.take_log(), hits)
}

#[test]
fn a_recorded_log_simulates_to_what_its_pool_found() {
    for entry in EVICTORS {
        let (log, hits) = record(entry.name);
        let trace = trace::recorded(&log).unwrap();
        assert_eq!(trace.block_size, 4);
        assert_eq!(run::simulate(&trace, entry.name, BLOCKS).unwrap(), hits, "{}", entry.name);
        let larger = run::simulate(&trace, entry.name, 10 * BLOCKS).unwrap();
        assert!(larger.found > hits.found && larger.asked == hits.asked, "{}", entry.name);
    }
}

/// W2: not below the best peer at any size, with the default evictor.
#[test]
fn the_default_evictor_hits_as_often_as_the_best_peer() {
    let text = include_str!("golden/w2.csv");
    let trace = trace::conversations(text, 512, 16).unwrap();
    for (blocks, best) in [(8192, 84.6), (16384, 88.6), (32768, 92.9)] {
        let rate = run::simulate(&trace, "lru", blocks).unwrap().rate();
        assert!((rate * 10.0).round() / 10.0 >= best, "{rate} at {blocks} blocks");
    }
}

#[test]
fn rates_are_a_table_and_a_plot() {
    let (log, _) = record("lru");
    let trace = trace::recorded(&log).unwrap();
    let evictors: Vec<String> = EVICTORS.iter().map(|entry| entry.name.to_string()).collect();
    let rates = run::rates(&trace, &evictors, &[24, 48, 96]).unwrap();
    let table = rates.table();
    assert_eq!(table.lines().count(), 2 + EVICTORS.len());
    assert!(table.starts_with("| evictor, hit % at blocks | 24 | 48 | 96 |\n"), "{table}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rates.svg");
    rates.plot(&path).unwrap();
    let plot = std::fs::read_to_string(&path).unwrap();
    assert!(plot.starts_with("<svg") && plot.trim_end().ends_with("</svg>"));
    assert!(EVICTORS.iter().all(|entry| plot.contains(entry.name)));
    assert!(plot.matches("<polyline").count() >= EVICTORS.len());
    let missing = rates.plot(&folder.path().join("none/rates.svg")).unwrap_err();
    assert!(missing.to_string().contains("none/rates.svg"), "{missing}");
    for pools in [&[][..], &[0, 4], &[8, 4]] {
        assert!(run::rates(&trace, &evictors, pools).is_err());
    }
    assert!(trace::conversations("1,2,3", 0, 16).is_err());
    assert!(trace::recorded(b"no log").is_err());
}
