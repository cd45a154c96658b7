//! Gives the shared library its SONAME, and lists the CUDA kernels it embeds. Before 1.0 the minor
//! version is part of the ABI.

use std::path::{Path, PathBuf};

fn main() {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let major = variable("CARGO_PKG_VERSION_MAJOR");
    let minor = variable("CARGO_PKG_VERSION_MINOR");
    let soname = if major == "0" { format!("{major}.{minor}") } else { major };
    if variable("CARGO_CFG_TARGET_OS") == "linux" {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libkvmgr.so.{soname}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    let (root, out) = (variable("CARGO_MANIFEST_DIR"), variable("OUT_DIR"));
    list_kernels(Path::new(&root), Path::new(&out));
}

/// Writes `kernels.rs`, which embeds every `kernels/gen/*.ptx.gz`. They are committed: a build needs
/// no CUDA.
fn list_kernels(root: &Path, out: &Path) {
    let folder = root.join("kernels/gen");
    println!("cargo:rerun-if-changed={}", folder.display());
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .map(|entries| entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
        .unwrap_or_default();
    files.retain(|path| path.to_string_lossy().ends_with(".ptx.gz"));
    files.sort();
    let list: String =
        files.iter().map(|path| format!("    include_bytes!({path:?}),\n")).collect();
    let text = format!("/// PTX, gzipped.\npub(super) static FILES: &[&[u8]] = &[\n{list}];\n");
    if let Err(error) = std::fs::write(out.join("kernels.rs"), text) {
        println!("cargo:warning=kernels.rs: {error}");
    }
}
