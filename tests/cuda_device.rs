//! Looking for a CUDA driver: without one, and with stand-ins that answer as real ones do. Each
//! stand-in is a small shared library named libcuda.so; a child process of this test finds it
//! through LD_LIBRARY_PATH. Needs gcc; without it the stand-ins are a SKIP.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(unsafe_code, reason = "calls the C ABI as C does")]

use std::ffi::CStr;
use std::path::Path;
use std::process::Command;
use std::ptr;

use kvmgr::ffi::attention::*;
use kvmgr::ffi::cache::*;
use kvmgr::ffi::device::kvmgr_device_count;
use kvmgr::ffi::types::*;
use kvmgr::ffi::version::*;

fn message() -> String {
    // SAFETY: the library's buffer ends in NUL.
    unsafe { CStr::from_ptr(kvmgr_last_error_message()) }.to_string_lossy().into_owned()
}

/// What a child process saw: the device count with its reason, and the answer to a CUDA tensor.
#[test]
#[ignore = "run by the other tests, with a stand-in in LD_LIBRARY_PATH"]
fn child() {
    let count = kvmgr_device_count(KVMGR_DEVICE_CUDA);
    let reason = if count == 0 { message() } else { String::new() };
    println!("\ncount={count};{reason}");
    let status = append_cuda_tensor();
    println!("\ntensor={status};{}", message());
}

/// Hands a tensor in device memory to a cache in host memory.
fn append_cuda_tensor() -> kvmgr_status {
    // SAFETY: all bytes zero are a valid configuration; handles and places are valid.
    unsafe {
        let mut config: kvmgr_cache_config = std::mem::zeroed();
        config.struct_size = size_of::<kvmgr_cache_config>();
        (config.num_layers, config.num_q_heads, config.num_kv_heads) = (1, 1, 1);
        (config.head_dim, config.num_blocks) = (64, 4);
        let mut cache = ptr::null_mut();
        assert_eq!(kvmgr_cache_create(&raw const config, &raw mut cache), KVMGR_OK);
        let mut attention = ptr::null_mut();
        assert_eq!(kvmgr_attention_create(cache, &raw mut attention), KVMGR_OK);
        let tensor = kvmgr_tensor {
            data: ptr::without_provenance_mut(4096),
            dtype: KVMGR_DTYPE_F16,
            ndim: 3,
            shape: [1, 1, 64, 0],
            strides: [0; 4],
            device_type: KVMGR_DEVICE_CUDA,
            device_id: 0,
        };
        let status =
            kvmgr_attention_append(attention, 0, &raw const tensor, &raw const tensor, 0, 1);
        kvmgr_attention_destroy(attention);
        kvmgr_cache_release(cache);
        status
    }
}

/// Runs `child` with a libcuda.so made of `source`, or none, and answers its two lines.
fn run_child(source: Option<&str>) -> Option<[String; 2]> {
    let folder = tempfile::tempdir().unwrap();
    let c = folder.path().join("libcuda.c");
    if let Some(source) = source {
        std::fs::write(&c, source).unwrap();
        build(&c, &folder.path().join("libcuda.so"))?;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "child", "--nocapture", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let line = |start: &str| {
        text.lines().find_map(|line| line.strip_prefix(start)).unwrap_or_default().to_string()
    };
    Some([line("count="), line("tensor=")])
}

fn build(source: &Path, library: &Path) -> Option<()> {
    let Ok(status) =
        Command::new("gcc").args(["-shared", "-fPIC", "-o"]).args([library, source]).status()
    else {
        eprintln!("SKIP: gcc is not installed");
        return None;
    };
    assert!(status.success());
    Some(())
}

fn stand_in(init: u32, version: i32, count: i32) -> String {
    format!(
        "int cuInit(unsigned flags) {{ return flags ? 1 : {init}; }}\n\
         int cuDriverGetVersion(int *out) {{ *out = {version}; return 0; }}\n\
         int cuDeviceGetCount(int *out) {{ *out = {count}; return 0; }}\n"
    )
}

#[test]
fn a_machine_without_a_driver_says_so() {
    let [count, tensor] = run_child(None).unwrap();
    if !count.starts_with("0;") {
        eprintln!("SKIP: this machine has a GPU");
        return;
    }
    assert!(count.len() > 2, "a reason is missing");
    assert!(tensor.starts_with(&format!("{KVMGR_NO_DEVICE};key.device_type: ")), "{tensor}");
    assert!(tensor.contains(&count[2..]), "{tensor}");
}

#[test]
fn every_failure_of_a_driver_is_a_reason_and_never_a_panic() {
    let lacking = "int cuInit(unsigned flags) { return (int)flags; }\n".to_string();
    let cases = [
        (stand_in(100, 13_000, 0), "cuInit of the CUDA driver answered 100: no CUDA device"),
        (stand_in(803, 13_000, 0), "different versions"),
        (stand_in(999, 13_000, 0), "cuInit of the CUDA driver answered 999"),
        (stand_in(0, 11_040, 1), "speaks version 11040, must be 12000"),
        (stand_in(0, 13_000, 0), "sees 0 devices"),
        (lacking, "lacks functions"),
    ];
    for (source, reason) in cases {
        let Some([count, tensor]) = run_child(Some(&source)) else { return };
        assert!(count.starts_with("0;") && count.contains(reason), "{reason}: {count}");
        assert!(tensor.starts_with(&format!("{KVMGR_NO_DEVICE};")), "{reason}: {tensor}");
    }
}

#[test]
fn devices_are_counted_and_their_memory_is_refused_with_unsupported() {
    let Some([count, tensor]) = run_child(Some(&stand_in(0, 12_000, 3))) else { return };
    assert_eq!(count, "3;");
    assert!(tensor.starts_with(&format!("{KVMGR_UNSUPPORTED};key.device_type is CUDA")));
}

#[test]
fn the_cpu_is_one_device_and_wild_types_are_none() {
    assert_eq!(kvmgr_device_count(KVMGR_DEVICE_CPU), 1);
    assert_eq!(kvmgr_device_count(kvmgr_device_type(77)), 0);
    assert!(message().contains("device_type is 77"), "{}", message());
}
