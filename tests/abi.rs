//! The C ABI as a C compiler and a linker see it. Needs gcc, g++ and nm; a missing one is a SKIP.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn has(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIP: {tool} is not installed");
    }
    found
}

fn compile(compiler: &str, standard: &str, source: &Path) {
    let output = Command::new(compiler)
        .arg(format!("-std={standard}"))
        .args(["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror", "-fsyntax-only"])
        .arg(format!("-I{}", root().join("include").display()))
        .arg(source)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{compiler} {standard}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn the_header_compiles_alone_in_every_standard() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    if has("gcc") {
        let source = write("a.c", "#include <kvmgr.h>\nextern int unused;\n");
        for standard in ["c99", "c11", "c17", "c2x"] {
            compile("gcc", standard, &source);
        }
    }
    if has("g++") {
        let source = write("a.cpp", "#include <kvmgr.h>\n");
        for standard in ["c++11", "c++14", "c++17", "c++20"] {
            compile("g++", standard, &source);
        }
        let source = write("b.cpp", "#include <kvmgr.hpp>\n");
        for standard in ["c++17", "c++20"] {
            compile("g++", standard, &source);
        }
    }
}

fn prototypes() -> BTreeSet<String> {
    let header = std::fs::read_to_string(root().join("include/kvmgr.h")).unwrap();
    let mut names = BTreeSet::new();
    let mut in_comment = false;
    for line in header.lines() {
        in_comment |= line.trim_start().starts_with("/*");
        if !in_comment
            && !line.starts_with('#')
            && let Some(at) = line.find("kvmgr_")
        {
            for part in line[at..].split(|c: char| !(c.is_alphanumeric() || c == '_')) {
                if part.starts_with("kvmgr_") && line.contains(&format!("{part}(")) {
                    names.insert(part.to_string());
                }
            }
        }
        in_comment &= !line.contains("*/");
    }
    names
}

/// The library that `make lib` built, with LTO; KVMGR_SHIP names its folder.
fn shipped() -> Option<PathBuf> {
    let folder = std::env::var_os("KVMGR_SHIP").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("SKIP: KVMGR_SHIP is not set; run `make test`");
    }
    folder
}

#[test]
fn exactly_the_prototypes_are_exported() {
    let Some(folder) = shipped() else { return };
    if !has("nm") || !has("readelf") {
        return;
    }
    let library = folder.join("libkvmgr.so");
    let output = Command::new("nm").args(["-D", "--defined-only"]).arg(&library).output().unwrap();
    let exported: BTreeSet<String> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .filter_map(|line| line.split_whitespace().last())
        .map(str::to_string)
        .collect();
    assert!(exported.len() > 40);
    assert_eq!(exported, prototypes());
    let output = Command::new("readelf").arg("-d").arg(&library).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("[libkvmgr.so.0.1]"), "SONAME is missing:\n{text}");
}

#[test]
fn versions_agree() {
    let header = std::fs::read_to_string(root().join("include/kvmgr.h")).unwrap();
    let parts: Vec<&str> = env!("CARGO_PKG_VERSION").split('.').collect();
    for (name, part) in ["MAJOR", "MINOR", "PATCH"].iter().zip(&parts) {
        assert!(header.contains(&format!("#define KVMGR_VERSION_{name} {part}\n")), "{name}");
    }
}

/// The size and every offset of every struct, in Rust and in C.
#[test]
fn layouts_agree() {
    use kvmgr::ffi::attention::kvmgr_attention_options;
    use kvmgr::ffi::cache::{kvmgr_cache_config, kvmgr_cache_stats};
    use kvmgr::ffi::policy::kvmgr_policy_input;
    use kvmgr::ffi::pool::{kvmgr_group, kvmgr_pool_config};
    use kvmgr::ffi::pool_request::{kvmgr_extra_key, kvmgr_pool_admission, kvmgr_pool_request};
    use kvmgr::ffi::pool_sequence::kvmgr_placement;
    use kvmgr::ffi::pool_stats::kvmgr_pool_stats;
    use kvmgr::ffi::schedule::{kvmgr_running, kvmgr_waiting};
    use kvmgr::ffi::sequence::{kvmgr_block_copy, kvmgr_sequence_stats};
    use kvmgr::ffi::store::{kvmgr_store_ops, kvmgr_store_stats};
    use kvmgr::ffi::types::kvmgr_tensor;
    use std::fmt::Write;

    let mut source = String::from("#include <stddef.h>\n#include <kvmgr.h>\n");
    macro_rules! layout {
        ($($name:ident { $($field:ident),* })*) => {$(
            writeln!(source, "_Static_assert(sizeof({0}) == {1}, \"{0}\");",
                stringify!($name), size_of::<$name>()).unwrap();
            $(writeln!(source, "_Static_assert(offsetof({0}, {1}) == {2}, \"{0}.{1}\");",
                stringify!($name), stringify!($field), std::mem::offset_of!($name, $field)).unwrap();)*
        )*};
    }
    layout! {
        kvmgr_tensor { data, dtype, ndim, shape, strides, device_type, device_id }
        kvmgr_group { kind, value }
        kvmgr_pool_config {
            struct_size, num_blocks, block_size, flags, evictor, hash_salt, watermark, scope,
            hash_seed, groups, num_groups, hash
        }
        kvmgr_pool_stats { struct_size, num_blocks, evictions, misses_checkpoint }
        kvmgr_extra_key { start, end, key, key_size, kind, reserved }
        kvmgr_pool_request { tokens, num_tokens, hashes, salt, extra_keys, adapter, ttl, session, priority, reserved }
        kvmgr_pool_admission { sequence, num_cached, num_copied, miss_token, miss, miss_group }
        kvmgr_placement { place, block }
        kvmgr_waiting { cached_blocks, needed_blocks, tenant, reserved, waited }
        kvmgr_running { own_blocks, tokens, priority, reserved, admitted }
        kvmgr_cache_config {
            struct_size, num_layers, head_dim, block_size, lane_width, dtype, num_threads,
            num_blocks, memory_limit, spec, evictor, store, hash_salt, flags, rope_style,
            rope_dims, rope_base, rope_inv_freq, memory, value_dim, rope_first
        }
        kvmgr_cache_stats { struct_size, bytes_used, bytes_peak, num_sequences }
        kvmgr_sequence_stats { struct_size, num_tokens, num_blocks }
        kvmgr_block_copy { source, target }
        kvmgr_attention_options { struct_size, scale, softcap, sliding_window, sinks, alibi_slopes }
        kvmgr_policy_input { struct_size, layer, num_tokens, event, keys, column_sums, positions, query_mean, query_covariance, rope_inv_freq, rope_style, rope_dims, rope_base, reserved, value_dim, rope_first }
        kvmgr_store_ops { struct_size, put, get, contains, remove, destroy }
        kvmgr_store_stats { struct_size, objects, misses }
    }
    if !has("gcc") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layout.c");
    std::fs::write(&path, source).unwrap();
    compile("gcc", "c11", &path);
}
