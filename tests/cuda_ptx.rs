//! The committed PTX is what the kernels' sources give, and no kernel spills registers on any
//! architecture. Needs python3 and the wheels of kernels/requirements.txt; otherwise a SKIP.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::Path;
use std::process::Command;

fn generate(option: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/generate.py");
    let Ok(output) = Command::new("python3").arg(script).arg(option).output() else {
        eprintln!("SKIP: python3 is not installed");
        return;
    };
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8(text).unwrap();
    if text.starts_with("SKIP") {
        eprint!("{text}");
        return;
    }
    assert!(output.status.success(), "{text}");
}

#[test]
fn committed_ptx_is_what_the_sources_give() {
    generate("--check");
}

#[test]
fn no_kernel_spills_registers() {
    generate("--spills");
}
