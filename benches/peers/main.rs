//! Workloads W1 to W5 on the block manager and on kvbm-logical, alternating in one process.
//!
//! `cargo run --release --manifest-path benches/peers/Cargo.toml [rounds] [alone]` prints one row for
//! each cost: the minimum of the rounds for both sides, which a shared machine disturbs least, and
//! the ratio of the minima; with `alone` the peer does not run. W2 reads the trace
//! `tests/golden/w2.csv`. Tokens are tok(space, pos) = splitmix64(space * gamma + pos) % 32000.

mod kvbm;
mod ours;

use std::collections::BTreeMap;
use std::time::Instant;

pub const BLOCK: usize = 16;

/// Nanoseconds per operation by row.
pub type Costs = BTreeMap<&'static str, f64>;

pub fn splitmix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

pub fn tok(space: u64, pos: u64) -> i32 {
    (splitmix(space.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(pos)) % 32_000) as i32
}

pub fn tokens(space: u64, range: std::ops::Range<u64>) -> Vec<i32> {
    range.map(|pos| tok(space, pos)).collect()
}

pub struct Stream(pub u64);

impl Stream {
    pub fn below(&mut self, n: usize) -> usize {
        let value = splitmix(self.0);
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        (value % n as u64) as usize
    }

    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i + 1));
        }
    }
}

/// Nanoseconds that `body` takes for each of `n` operations.
pub fn time<R>(n: usize, body: impl FnOnce() -> R) -> (f64, R) {
    let start = Instant::now();
    let result = body();
    (start.elapsed().as_nanos() as f64 / n as f64, result)
}

/// W2: user, tokens of the message, tokens of the answer, in order.
pub fn trace() -> Vec<(u64, usize, usize)> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/w2.csv");
    let text = std::fs::read_to_string(path).expect("the trace is in the repository");
    let number = |text: Option<&str>| text.and_then(|text| text.trim().parse().ok());
    let row = |line: &str| {
        let mut fields = line.split(',');
        let mut next = || -> Option<u64> { number(fields.next()) };
        let user = next()?;
        let _turn = next()?;
        Some((user, next()? as usize, next()? as usize))
    };
    text.lines().filter_map(row).collect()
}

/// Both sides in turn, so that what slows the machine down slows both.
fn compare(rounds: usize, ours: &dyn Fn() -> Costs, theirs: Option<&dyn Fn() -> Costs>) {
    let mut sides = [Costs::new(), Costs::new()];
    for _ in 0..rounds {
        for (side, body) in sides.iter_mut().zip([Some(ours), theirs]) {
            for (row, cost) in body.map_or(Costs::new(), |body| body()) {
                let least = side.entry(row).or_insert(cost);
                *least = least.min(cost);
            }
        }
    }
    let [ours, theirs] = sides;
    for (row, ours) in ours {
        match theirs.get(row) {
            Some(theirs) => {
                println!("| {row} | {ours:.1} | {theirs:.1} | {:.1} |", theirs / ours);
            }
            None => println!("| {row} | {ours:.1} | | |"),
        }
    }
}

/// Memory that was mapped once stays mapped, as in a server that has run for a while: otherwise the
/// rows of both sides measure the page faults of the system.
fn keep_memory() {
    // SAFETY: settings of the allocator, before the first thread.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

fn main() {
    keep_memory();
    let mut args = std::env::args().skip(1);
    let rounds = args.next().and_then(|text| text.parse().ok()).unwrap_or(5);
    let is_alone = args.next().is_some_and(|text| text == "alone");
    let pair = |ours: &dyn Fn() -> Costs, theirs: &dyn Fn() -> Costs| {
        compare(rounds, ours, (!is_alone).then_some(theirs));
    };
    println!("| row, ns | kvmgr | kvbm-logical 1.6.1 | ratio |\n|---|---|---|---|");
    pair(&ours::w1, &kvbm::w1);
    pair(&ours::w3, &kvbm::w3);
    pair(&ours::w4, &kvbm::w4);
    pair(&ours::churn, &kvbm::churn);
    println!("| W5, 10k blocks | | | |");
    pair(&|| ours::w5(10_000), &|| kvbm::w5(10_000));
    println!("| W5, 1M blocks | | | |");
    pair(&|| ours::w5(1_000_000), &|| kvbm::w5(1_000_000));
    println!("\nmetadata: {:.1} bytes a block at 1M blocks", ours::metadata(1_000_000));
    println!("\n| evictor | hit % at 8k | 16k | 32k |\n|---|---|---|---|");
    for evictor in ["lru", "fifo", "lfu", "slru", "s3_fifo", "priority", "cost"] {
        let rate = |blocks| 100.0 * ours::w2(evictor, blocks);
        println!("| {evictor} | {:.1} | {:.1} | {:.1} |", rate(8192), rate(16384), rate(32768));
    }
    println!("\n| at 1M blocks, million/s | 1 thread | 2 threads | gain | its median |");
    println!("|---|---|---|---|---|");
    for (row, (one, two, median)) in
        ["lookups, shared", "loads of lines at random"].into_iter().zip(ours::two_threads())
    {
        println!("| {row} | {one:.1} | {two:.1} | {:.2} | {median:.2} |", two / one);
    }
}
