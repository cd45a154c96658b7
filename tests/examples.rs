//! The C and C++ examples and the engine, built by `make examples`, do what they say; also under
//! valgrind. KVMGR_EXAMPLES names the folder of the programs; without it the tests print SKIP.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

#[path = "common/mock_driver.rs"]
mod mock_driver;

use std::path::PathBuf;
use std::process::Command;

fn programs() -> Option<PathBuf> {
    let folder = std::env::var_os("KVMGR_EXAMPLES").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("SKIP: KVMGR_EXAMPLES is not set; run `make test`");
    }
    folder
}

fn data(name: &str) -> String {
    format!("{}/tests/data/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}\n{text}\n{errors}");
    text
}

const SMALL: [&str; 7] = [
    "01-hello",
    "02-decode-loop",
    "03-prefix-sharing",
    "04-custom-store",
    "05-cuda-decode",
    "06-custom-policy",
    "07-hybrid-model",
];

#[test]
fn small_examples_succeed() {
    let Some(folder) = programs() else { return };
    for name in SMALL {
        run(&mut Command::new(folder.join(name)));
    }
}

/// On the mock driver, so that it is more than a SKIP on a machine without a GPU.
#[test]
fn the_cuda_example_agrees_with_the_host() {
    let Some(folder) = programs() else { return };
    let Some(driver) = mock_driver::mock_driver() else { return };
    let mut command = Command::new(folder.join("05-cuda-decode"));
    let text = run(command.args(["2", "20", "2"]).env("LD_LIBRARY_PATH", driver));
    assert!(text.contains("tokens/s") && text.contains("O differs by"), "{text}");
}

#[test]
fn small_examples_are_clean_under_valgrind() {
    let Some(folder) = programs() else { return };
    if Command::new("valgrind").arg("--version").output().is_err() {
        eprintln!("SKIP: valgrind is not installed");
        return;
    }
    for name in SMALL {
        run(Command::new("valgrind")
            .args(["--quiet", "--error-exitcode=9", "--leak-check=full"])
            .args(["--errors-for-leak-kinds=definite", "--show-leak-kinds=definite"])
            .arg(folder.join(name)));
    }
}

#[test]
fn the_engine_agrees_with_a_forward_pass_without_cache() {
    let Some(folder) = programs() else { return };
    let text = run(Command::new(folder.join("kvmgr-check")).arg(data("tiny.gguf")));
    assert!(text.contains("0 failures"), "{text}");
}

#[test]
fn the_engine_recalls_what_the_prompt_says() {
    let Some(folder) = programs() else { return };
    let prompt = "And the Lord said unto qz=482; Moses, ?qz=";
    let text = run(Command::new(folder.join("kvmgr-generate"))
        .arg(data("tiny.gguf"))
        .args(["--prompt", prompt, "--n", "4"]));
    assert!(text.contains(&format!("{prompt}482;")), "{text}");
}

/// The main job in small: per-head budgets beat a recency window of the same size, and their
/// bytes are really gone.
#[test]
fn compression_saves_bytes_and_keeps_recall() {
    let Some(folder) = programs() else { return };
    let out = tempfile::tempdir().unwrap();
    let (ada, stream) = ("snapkv(w=32) | adakv(0.2) | keep(0.25)", "stream(sink=4) | keep(0.25)");
    let squeeze = "snapkv(w=32) | squeeze | keep(0.25)";
    run(Command::new(folder.join("kvmgr-compare"))
        .arg(data("tiny.gguf"))
        .args(["--text", &data("heldout.txt"), "--recall", &data("recall.txt")])
        .args(["--windows", "2", "--window", "512", "--scored", "256", "--prompts", "8"])
        .args(["--spec", "full", "--spec", ada, "--spec", stream, "--spec", squeeze])
        .arg("--out")
        .arg(out.path()));
    let table = std::fs::read_to_string(out.path().join("table.md")).unwrap();
    let row = |spec: &str| -> Vec<f64> {
        let spec = format!("`{}`", spec.replace('|', "\\|"));
        let line = table.lines().find(|line| line.contains(&spec)).unwrap();
        let numbers = line.split(&spec).nth(1).unwrap();
        let number = |cell: &str| cell.replace('%', "").trim().parse().ok();
        numbers.split('|').filter_map(number).collect()
    };
    let (full, ada, stream) = (row("full"), row(ada), row(stream));
    assert_eq!(full[6], 100.0, "the full cache recalls everything\n{table}");
    assert!(ada[6] > stream[6] + 20.0, "per-head budgets beat a window\n{table}");
    let csv = std::fs::read_to_string(out.path().join("kv_bytes.csv")).unwrap();
    let first = |spec: &str| -> f64 {
        let start = format!("\"{spec}\",0,");
        let line = csv.lines().find(|line| line.starts_with(&start)).unwrap();
        line[start.len()..].parse().unwrap()
    };
    for spec in ["snapkv(w=32) | adakv(0.2) | keep(0.25)", squeeze] {
        let share = first(spec) / first("full");
        assert!(share < 0.40, "short windows: {share} of the bytes after the prompt of {spec}");
    }
    assert!(out.path().join("kv_bytes.svg").exists());
}

/// Every score, budget and act of the registries is on the plot, and the plot can be made.
#[test]
fn the_pareto_plot_shows_every_policy() {
    let Some(folder) = programs() else { return };
    let program = folder.join("kvmgr-pareto");
    let listed = run(Command::new(&program).arg("--list"));
    use kvmgr::policy::{act::ACTS, budget::BUDGETS, score::SCORES};
    let stages = SCORES.iter().map(|score| (score.name, score.examples));
    let stages = stages.chain(BUDGETS.iter().map(|budget| (budget.name, budget.examples)));
    let stages = stages.chain(ACTS.iter().map(|act| (act.name, act.examples)));
    for (name, examples) in stages {
        // Some need weights of this very model; uniform is what a spec without a budget has.
        let needs_weights = examples.iter().all(|example| example.contains("file="));
        if needs_weights || name == "uniform" {
            continue;
        }
        let stage = |part: &str| part.trim().split('(').next() == Some(name);
        let shown = listed.lines().any(|spec| spec.split('|').any(stage));
        assert!(shown, "{name} is missing in cpp-examples/engine/pareto.cpp");
    }
    let out = tempfile::tempdir().unwrap();
    let text = run(Command::new(&program)
        .arg(data("tiny.gguf"))
        .args(["--text", &data("heldout.txt"), "--recall", &data("recall.txt")])
        .args(["--windows", "1", "--window", "256", "--scored", "64", "--prompts", "2"])
        .args(["--only", "stream(sink=4) | keep(0.25)"])
        .arg("--out")
        .arg(out.path()));
    assert!(text.contains("Pareto front of recall blind"), "{text}");
    let plot = std::fs::read_to_string(out.path().join("pareto.svg")).unwrap();
    let lines = plot.matches("<polyline").count();
    assert_eq!(lines, 3 * 3, "three panels; this policy alone and with two formats:\n{plot}");
}
