//! Candidates in turn, medians, tables.

use std::time::Instant;

pub struct Settings {
    pub threads: usize,
    pub rounds: usize,
    /// Only candidates whose name contains this.
    pub only: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self { threads: 2, rounds: 15, only: String::new() }
    }
}

/// Something to measure. One call is `units` repetitions of what the table is about.
pub struct Candidate<'a> {
    pub name: String,
    /// The candidate whose time is divided by ours; empty for none.
    pub against: String,
    /// Bytes or multiply-adds of one repetition.
    pub work: f64,
    pub units: usize,
    pub call: Box<dyn FnMut() + 'a>,
}

/// Runs all candidates in turn; the medians in seconds of one repetition.
pub fn medians(candidates: &mut [Candidate<'_>], rounds: usize) -> Vec<f64> {
    let mut times = vec![Vec::new(); candidates.len()];
    candidates.iter_mut().for_each(|candidate| (candidate.call)());
    for _ in 0..rounds {
        for (candidate, times) in candidates.iter_mut().zip(&mut times) {
            let start = Instant::now();
            (candidate.call)();
            times.push(start.elapsed().as_secs_f64() / candidate.units as f64);
        }
    }
    times.iter_mut().map(|times| median(times)).collect()
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Measures and prints a table; `unit` names a thousand million of `work`.
pub fn table(title: &str, unit: &str, candidates: &mut [Candidate<'_>], rounds: usize) {
    let times = medians(candidates, rounds);
    println!(
        "\n{title}\n\n| what | ms | {unit} | against | ratio |\n| --- | ---: | ---: | --- | ---: |"
    );
    for (candidate, time) in candidates.iter().zip(&times) {
        let against = candidates.iter().position(|other| other.name == candidate.against);
        let ratio = against.map_or(String::new(), |i| format!("{:.2}", times[i] / time));
        println!(
            "| {} | {:.3} | {:.2} | {} | {ratio} |",
            candidate.name,
            time * 1e3,
            candidate.work / time * 1e-9,
            candidate.against,
        );
    }
}
