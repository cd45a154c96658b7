//! Gives the shared library its SONAME, and lists the CUDA kernels it embeds. Before 1.0 the minor
//! version is part of the ABI.

#[path = "src/device/cuda/ptx.rs"]
#[expect(dead_code, reason = "the library uses all of it")]
mod ptx;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let major = variable("CARGO_PKG_VERSION_MAJOR");
    let minor = variable("CARGO_PKG_VERSION_MINOR");
    let soname = if major == "0" { format!("{major}.{minor}") } else { major };
    if variable("CARGO_CFG_TARGET_OS") == "linux" {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libkvmgr.so.{soname}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/device/cuda/ptx.rs");
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
    let files: Vec<(PathBuf, String)> = files
        .into_iter()
        .map(|path| {
            let text = unpack(&path);
            (path, text)
        })
        .collect();
    let list: String = files
        .iter()
        .map(|(path, text)| format!("    (&{:?}, include_bytes!({path:?})),\n", names(text)))
        .collect();
    let cubins = make_cubins(&files, out);
    let text = format!(
        "/// Names of kernels, and the gzipped PTX that has them.\n\
         pub(super) static FILES: &[(&[&str], &[u8])] = &[\n{list}];\n\
         /// Architecture and cubin.\npub(super) static CUBINS: &[(u32, &[u8])] = &[\n{cubins}];\n"
    );
    if let Err(error) = std::fs::write(out.join("kernels.rs"), text) {
        println!("cargo:warning=kernels.rs: {error}");
    }
}

/// The kernels of a text.
fn names(text: &str) -> Vec<&str> {
    text.split(ptx::ENTRY).skip(1).map(ptx::name_of).collect()
}

fn unpack(path: &Path) -> String {
    let packed = std::fs::read(path).expect("a file that was listed");
    let mut text = String::new();
    flate2::read::GzDecoder::new(&packed[..]).read_to_string(&mut text).expect("gzipped PTX");
    text
}

/// If KVMGR_NVCC names an nvcc, assembles the PTX for the architectures of data centres, so that the
/// driver has nothing to compile. What the build can do does not depend on it.
fn make_cubins(files: &[(PathBuf, String)], out: &Path) -> String {
    println!("cargo:rerun-if-env-changed=KVMGR_NVCC");
    let Some(nvcc) = std::env::var_os("KVMGR_NVCC").filter(|nvcc| !nvcc.is_empty()) else {
        return String::new();
    };
    let mut list = String::new();
    for (file, text) in files {
        for sm in [80, 90] {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let path = out.join(name.replace(".ptx.gz", &format!(".sm_{sm}.ptx")));
            let cubin = path.with_extension("cubin");
            std::fs::write(&path, ptx::for_device(text.clone(), sm)).expect("OUT_DIR");
            let status = Command::new(&nvcc)
                .args(["-cubin", &format!("-arch=sm_{sm}"), "-o"])
                .args([&cubin, &path])
                .status();
            assert!(
                status.as_ref().is_ok_and(|status| status.success()),
                "KVMGR_NVCC is {}: {status:?}",
                nvcc.display()
            );
            list += &format!("    ({sm}, include_bytes!({cubin:?})),\n");
        }
    }
    list
}
