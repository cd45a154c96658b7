//! The shape of the sources: layers, sizes, where `unsafe` may be.

use std::fs;
use std::path::{Path, PathBuf};

/// Modules from the lowest layer up; a module uses only modules of lower rows and itself.
const LAYERS: &[&[&str]] = &[
    &["error"],
    &["dtype", "log", "order", "shape", "sync"],
    &["spec"],
    &["registry"],
    &["simd", "device"],
    &["quantizer", "block", "evictor", "selector"],
    &["cache"],
    &["sequence"],
    &["attention", "policy", "store"],
    &["tier", "slots"],
    &["manager"],
    &["ffi"],
];

fn sources() -> Vec<PathBuf> {
    fn walk(folder: &Path, out: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).expect("src is readable") {
            let path = entry.expect("src is readable").path();
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                out.push(path);
            }
        }
    }
    let mut out = Vec::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut out);
    assert!(out.len() > 30, "sources were found");
    out
}

/// The name of the top-level module of a file.
fn module(path: &Path) -> String {
    let inside = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let first = inside.expect("a source").components().next().expect("a name");
    first.as_os_str().to_string_lossy().trim_end_matches(".rs").to_string()
}

fn rank(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

#[test]
fn modules_use_only_lower_layers() {
    for path in sources() {
        let own = module(&path);
        if own == "lib" {
            continue;
        }
        let own_rank = rank(&own).unwrap_or_else(|| panic!("{own} is in no layer"));
        let text = fs::read_to_string(&path).expect("a source");
        // The block pool takes an evictor; its own tests may look sideways.
        let code = text.split("#[cfg(test)]").next().unwrap_or("");
        for used in code.split("crate::").skip(1) {
            let used: String =
                used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let Some(used_rank) = rank(&used) else { continue };
            let is_seam = own == "block" && used == "evictor";
            assert!(
                used == own || used_rank < own_rank || is_seam,
                "{}: {own} uses {used}",
                path.display()
            );
        }
    }
}

#[test]
fn files_are_short_and_finished() {
    for path in sources() {
        let text = fs::read_to_string(&path).expect("a source");
        let lines = text.lines().count();
        assert!(lines <= 600, "{} has {lines} lines", path.display());
        for word in ["TODO", "FIXME", "XXX", "todo!(", "unimplemented!("] {
            assert!(!text.contains(word), "{} contains {word}", path.display());
        }
    }
}

#[test]
fn unsafe_code_stays_in_its_places() {
    for path in sources() {
        let text = fs::read_to_string(&path).expect("a source");
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        let has_unsafe =
            code.clone().any(|line| line.contains("unsafe {") || line.contains("unsafe fn"));
        let may = ["ffi", "simd", "device"].contains(&module(&path).as_str())
            || path.ends_with("cache/view.rs");
        assert!(may || !has_unsafe, "{} has unsafe code", path.display());
    }
}
