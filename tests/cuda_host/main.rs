//! A cache on a CUDA device does what a cache in host memory does: the same calls on both, and the
//! same answers. Runs on a real device where there is one, else on a mock driver whose kernels are
//! emulated (`tests/cuda`); without g++ that is a SKIP.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(unsafe_code, reason = "calls the C ABI and the driver as C does")]
#![expect(unreachable_pub, missing_docs, reason = "modules of a test")]

#[path = "../common/mod.rs"]
mod common;
mod driver;
mod twin;

use kvmgr::ffi::types::*;

use common::Random;
use driver::{Context, on_device};
use twin::{PLAIN, Pair, Setup, Twin};

/// A random life of a few sequences: shared prompts, pieces, drafts, forks, truncation, ends.
fn live(setup: Setup, seed: u64, steps: usize) {
    let mut twin = Twin::new(setup, seed, |_| {});
    let mut plays = Random(seed);
    let mut pairs: Vec<Pair> = Vec::new();
    // Few ids, so that prompts share their starts.
    let prompts: Vec<Vec<i32>> = (0..2)
        .map(|_| (0..plays.within(setup.block, 5 * setup.block)).map(|i| i as i32 % 3).collect())
        .collect();
    for _ in 0..steps {
        match plays.below(8) {
            0 | 1 if pairs.len() < 4 => {
                let prompt = &prompts[plays.below(2)];
                let (mut pair, matched) = twin.start(prompt);
                let rest = prompt[matched..].to_vec();
                let n = rest.len();
                twin.step(&mut [&mut pair], &[(rest, n)]);
                pairs.push(pair);
            }
            2 if !pairs.is_empty() && pairs.len() < 5 => {
                let parent = plays.below(pairs.len());
                pairs.push(twin.fork(&pairs[parent]));
            }
            3 if !pairs.is_empty() => {
                let i = plays.below(pairs.len());
                let n = plays.within(1, pairs[i].tokens.len());
                twin.truncate(&mut pairs[i], n);
            }
            4 if pairs.len() > 2 => drop(pairs.swap_remove(plays.below(pairs.len()))),
            _ if !pairs.is_empty() => {
                let feed = |_: &Pair| {
                    let n = if plays.chance(70) { 1 } else { plays.within(2, 5) };
                    let ids = (0..n).map(|_| plays.below(3) as i32).collect();
                    (ids, plays.within(1, n))
                };
                let feeds: Vec<_> = pairs.iter().map(feed).collect();
                let mut batch: Vec<&mut Pair> = pairs.iter_mut().collect();
                twin.step(&mut batch, &feeds);
            }
            _ => {}
        }
    }
    println!("{setup:?}: errors {:?}", twin.worst);
}

#[test]
fn sequences_live_alike() {
    on_device("sequences_live_alike", || {
        let _context = Context::new();
        live(PLAIN, 1, 30);
    });
}
