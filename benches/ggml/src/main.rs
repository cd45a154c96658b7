//! Attention and encoding beside the CPU backend of ggml, in one process.
//!
//! ```text
//! cargo run --release -- [--threads N] [--rounds N] [decode] [prefill] [encode] [cascade]
//! ```
//!
//! Every candidate of a group runs once a round, in turn, and its median over all rounds counts; so
//! what slows the machine for a while slows all of them. K and V are larger than the last level
//! cache. Outputs of both sides are compared before anything is measured.

mod data;
mod decode;
mod encode;
mod measure;
mod memory;
mod ours;
mod peer;
mod prefill;
mod team;

use measure::Settings;

fn main() {
    let mut settings = Settings::default();
    let mut groups = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|text| text.parse().ok()).expect("a number");
        match arg.as_str() {
            "--threads" => settings.threads = number(),
            "--rounds" => settings.rounds = number(),
            "--only" => settings.only = args.next().expect("a part of a name"),
            "decode" | "prefill" | "encode" | "cascade" => groups.push(arg),
            _ => panic!("unknown argument {arg:?}; see the head of main.rs"),
        }
    }
    let wants = |group: &str| groups.is_empty() || groups.iter().any(|other| other == group);
    peer::init();
    println!("{} threads, medians of {} rounds", settings.threads, settings.rounds);
    if wants("decode") {
        decode::run(8192, &settings);
        decode::run(32768, &settings);
    }
    if wants("prefill") {
        prefill::run(4096, 512, &settings);
    }
    if wants("encode") {
        encode::run(&settings);
    }
}
