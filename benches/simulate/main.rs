//! Which evictor, and how large a pool? Replays requests against many and tells the hit rates.
//!
//! ```text
//! cargo run --release --example simulate -- [options]
//!   --log FILE           a recorded log (kvmgr_pool_take_log)
//!   --conversations FILE lines user,turn,message tokens,answer tokens; tests/golden/w2.csv if neither
//!   --system N           tokens that every conversation starts with (512)
//!   --pools A,B,...      sizes in blocks (8192,16384,32768)
//!   --evictors A;B;...   specs (all)
//!   --plot FILE          an SVG of hit rate over pool size
//! ```

#![expect(clippy::print_stdout, reason = "a program")]

mod run;
mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use kvmgr::error::{Error, Kind, Result};
use kvmgr::evictor::EVICTORS;

use trace::wrong;

struct Options {
    log: Option<PathBuf>,
    conversations: PathBuf,
    system: usize,
    pools: Vec<usize>,
    evictors: Vec<String>,
    plot: Option<PathBuf>,
}

fn main() -> ExitCode {
    match answer() {
        Ok(table) => {
            print!("{table}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("simulate: {error}");
            ExitCode::FAILURE
        }
    }
}

fn answer() -> Result<String> {
    let options = parse(std::env::args().skip(1))?;
    let read = |path: &PathBuf| {
        let failed = |error| Error::new(Kind::Store, format!("{}: {error}", path.display()));
        std::fs::read(path).map_err(failed)
    };
    let trace = match &options.log {
        Some(path) => trace::recorded(&read(path)?)?,
        None => {
            let text = String::from_utf8_lossy(&read(&options.conversations)?).into_owned();
            trace::conversations(&text, options.system, 16)?
        }
    };
    let rates = run::rates(&trace, &options.evictors, &options.pools)?;
    if let Some(path) = &options.plot {
        rates.plot(path)?;
    }
    Ok(rates.table())
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Options> {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/w2.csv");
    let mut options = Options {
        log: None,
        conversations: golden.into(),
        system: 512,
        pools: vec![8192, 16384, 32768],
        evictors: EVICTORS.iter().map(|entry| entry.name.to_string()).collect(),
        plot: None,
    };
    while let Some(name) = args.next() {
        let Some(value) = args.next() else {
            return Err(wrong(format!("{name} has no value")));
        };
        let number = |text: &str| {
            let wrong =
                |_| Error::new(Kind::InvalidArgument, format!("{name}: {text:?} is no number"));
            text.trim().parse::<usize>().map_err(wrong)
        };
        match name.as_str() {
            "--log" => options.log = Some(value.into()),
            "--conversations" => options.conversations = value.into(),
            "--system" => options.system = number(&value)?,
            "--pools" => options.pools = value.split(',').map(number).collect::<Result<_>>()?,
            "--evictors" => options.evictors = value.split(';').map(str::to_string).collect(),
            "--plot" => options.plot = Some(value.into()),
            _ => return Err(wrong(format!("{name} is not an option"))),
        }
    }
    Ok(options)
}
