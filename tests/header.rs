//! include/kvmgr.h is what cbindgen makes of src/ffi. `BLESS=1 cargo test --test header` rewrites
//! it after a change of the ABI.

use std::path::Path;

#[test]
fn the_committed_header_is_fresh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let files = [
        "types",
        "version",
        "device",
        "store",
        "quantizer",
        "policy",
        "score",
        "pool",
        "pool_stats",
        "pool_request",
        "pool_sequence",
        "pool_tables",
        "pool_index",
        "schedule",
        "cache",
        "sequence",
        "recurrent",
        "attention",
        "masked",
        "slots",
    ];
    let mut builder = cbindgen::Builder::new().with_config(config);
    // The order of the files is the order of the header: plain types first, parts before wholes.
    for file in files {
        builder = builder.with_src(root.join(format!("src/ffi/{file}.rs")));
    }
    let mut fresh = Vec::new();
    builder.generate().unwrap().write(&mut fresh);
    let fresh = String::from_utf8(fresh).unwrap();
    let path = root.join("include/kvmgr.h");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &fresh).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == fresh,
        "include/kvmgr.h is stale; run BLESS=1 cargo test --test header and review the change"
    );
}
