//! Builds `tests/cuda/mock_driver.cpp`, a libcuda.so whose device is the CPU.

#![allow(unreachable_pub, reason = "a module of several tests")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The folder of the mock driver, for LD_LIBRARY_PATH, built once; `None`, with a SKIP, on a machine
/// that cannot.
pub fn mock_driver() -> Option<&'static Path> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOLDER.get_or_init(build).as_deref()
}

fn build() -> Option<PathBuf> {
    if !cfg!(target_arch = "x86_64") {
        eprintln!("SKIP: the emulator wants x86-64");
        return None;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // In the folder of the build, one for each test, so that nothing is left behind elsewhere.
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join(concat!("mock_driver_", env!("CARGO_CRATE_NAME")));
    std::fs::create_dir_all(&folder).unwrap();
    let output = Command::new("g++")
        .args(["-std=c++17", "-O2", "-mf16c", "-Wno-unknown-pragmas", "-fPIC", "-shared"])
        .arg("-I")
        .arg(root.join("kernels"))
        .arg("-I")
        .arg(root.join("tests/cuda"))
        .arg("-o")
        .args([folder.join("libcuda.so"), root.join("tests/cuda/mock_driver.cpp")])
        .output();
    let Ok(output) = output else {
        eprintln!("SKIP: g++ is not installed");
        return None;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(folder)
}
