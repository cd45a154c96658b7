//! The shipped CUDA kernels on the CPU: builds one source of `kernels/` with the emulator of
//! `tests/cuda` and launches what is in it by name.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses a part")]

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::process::Command;
use std::{fs, mem};

use half::{bf16, f16};

/// Name, parameters and their bytes, CTAs, threads, bytes of shared memory, seed.
type Launch =
    unsafe extern "C" fn(*const c_char, *const c_void, usize, u32, u32, u32, u32) -> *const c_char;

/// Where the kernel before the next launch writes, and bytes.
type WrittenBefore = unsafe extern "C" fn(*mut c_void, usize);

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    pub ctas: usize,
    pub threads: usize,
    /// Bytes of dynamic shared memory.
    pub smem: usize,
    /// Of the order of threads and CTAs.
    pub seed: u32,
}

/// The kernels of one source.
#[derive(Debug, Clone, Copy)]
pub struct Kernels {
    launch: Launch,
    written_before: WrittenBefore,
}

impl Kernels {
    /// Builds `kernels/<source>`; `None`, with a SKIP, on a machine that cannot.
    pub fn build(source: &str) -> Option<Self> {
        Self::build_edited(source, |text| text)
    }

    /// The same after `edit` has changed the source and each header of `kernels/` but the PTX.
    pub fn build_edited(source: &str, edit: impl Fn(String) -> String) -> Option<Self> {
        if !cfg!(target_arch = "x86_64") {
            eprintln!("SKIP: the emulator wants x86-64");
            return None;
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(root.join("kernels")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let is_header = name.ends_with(".cuh") && name != "kvm_intrin.cuh";
            if name == source || is_header {
                let text = fs::read_to_string(root.join("kernels").join(&name)).unwrap();
                fs::write(folder.path().join(name), edit(text)).unwrap();
            }
        }
        let library = folder.path().join("libkernels.so");
        let output = Command::new("g++")
            .args(["-std=c++17", "-O2", "-mf16c", "-fPIC", "-shared", "-fno-gnu-unique"])
            .args(["-Wno-unknown-pragmas", &format!("-DKVM_SOURCE={source}")])
            .arg("-I")
            .arg(folder.path())
            .args(["-I", root.join("kernels").to_str().unwrap()])
            .args(["-I", root.join("tests/cuda").to_str().unwrap(), "-o"])
            .args([&library, &root.join("tests/cuda/harness.cpp")])
            .output();
        let Ok(output) = output else {
            eprintln!("SKIP: g++ is not installed");
            return None;
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let name = CString::new(library.to_str().unwrap()).unwrap();
        // SAFETY: a library that was just built; it stays loaded for the life of the process.
        unsafe {
            let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            assert!(!handle.is_null());
            let symbol = |name: &CStr| {
                let symbol = libc::dlsym(handle, name.as_ptr());
                assert!(!symbol.is_null());
                symbol
            };
            Some(Self {
                launch: mem::transmute::<*mut c_void, Launch>(symbol(c"emu_launch")),
                written_before: mem::transmute::<*mut c_void, WrittenBefore>(symbol(
                    c"emu_written_before",
                )),
            })
        }
    }

    /// Builds a source in which `from`, which is there, reads `to`. Of the lines that start with the macro
    /// `only.0`, which make kernels, just those with `only.1` stay: they are quicker to build.
    pub fn build_mutated(
        source: &str,
        (from, to): (&str, &str),
        only: (&str, &str),
    ) -> Option<Self> {
        let is_there = Cell::new(false);
        let kernels = Self::build_edited(source, |text| {
            is_there.set(is_there.get() || text.contains(from));
            let stays = |line: &&str| !line.starts_with(only.0) || line.contains(only.1);
            text.replace(from, to).lines().filter(stays).collect::<Vec<_>>().join("\n")
        })?;
        assert!(is_there.get(), "{from} is not in the kernels");
        Some(kernels)
    }

    /// Says that the kernel before the next launch writes what is in `list`, which is NaN until the kernel
    /// waits for it. `list` must live until then.
    pub fn written_before<T>(&self, list: &mut [T]) {
        // SAFETY: memory that may be written; the harness has it as it was after the launch.
        unsafe { (self.written_before)(list.as_mut_ptr().cast(), size_of_val(list)) };
    }

    /// Runs a kernel; answers what the emulator saw that is forbidden. Every address in `params`,
    /// the struct of the kernel, must be live and as large as the kernel is told. Launches of one
    /// build must not overlap in time within a thread; threads do not share anything.
    pub fn launch<P>(&self, name: &str, params: &P, grid: Grid) -> Result<(), String> {
        let c_name = CString::new(name).unwrap();
        let (ctas, threads, smem) = (grid.ctas as u32, grid.threads as u32, grid.smem as u32);
        let (bytes, params) = (size_of::<P>(), (&raw const *params).cast());
        // SAFETY: the caller vouches for the addresses; the harness checks the size of the struct.
        let error = unsafe {
            (self.launch)(c_name.as_ptr(), params, bytes, ctas, threads, smem, grid.seed)
        };
        if error.is_null() {
            return Ok(());
        }
        // SAFETY: a string literal of the harness.
        Err(format!("{name}: {}", unsafe { CStr::from_ptr(error) }.to_string_lossy()))
    }
}

/// Where a slice is, as kernels are told.
pub fn address<T>(list: &[T]) -> u64 {
    list.as_ptr().expose_provenance() as u64
}

/// Where a slice is that kernels write.
pub fn address_mut<T>(list: &mut [T]) -> u64 {
    list.as_mut_ptr().expose_provenance() as u64
}

/// A 16-bit type of the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    F16,
    Bf16,
}

impl Half {
    /// As kernels are named.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// The nearest number of the type.
    pub fn bits(self, x: f32) -> u16 {
        match self {
            Self::F16 => f16::from_f32(x).to_bits(),
            Self::Bf16 => bf16::from_f32(x).to_bits(),
        }
    }

    pub fn value(self, bits: u16) -> f64 {
        match self {
            Self::F16 => f16::from_bits(bits).to_f64(),
            Self::Bf16 => bf16::from_bits(bits).to_f64(),
        }
    }

    /// The relative error of attention that rounding to the type explains.
    pub fn limit(self) -> f64 {
        match self {
            Self::F16 => 1e-3,
            Self::Bf16 => 4e-3,
        }
    }
}

/// A type of elements, numbered as the kernels number it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    F16,
    Bf16,
    F32,
}

impl Element {
    /// As kernels are named.
    pub fn name(self) -> &'static str {
        ["f16", "bf16", "f32"][self as usize]
    }

    /// The bytes of `values`, rounded to the type.
    pub fn store(self, values: &[f32]) -> Vec<u8> {
        let half =
            |half: Half| values.iter().flat_map(move |x| half.bits(*x).to_le_bytes()).collect();
        match self {
            Self::F16 => half(Half::F16),
            Self::Bf16 => half(Half::Bf16),
            Self::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }

    /// Element `i` of what was stored.
    pub fn value(self, bytes: &[u8], i: usize) -> f64 {
        let half = |half: Half| half.value(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]));
        match self {
            Self::F16 => half(Half::F16),
            Self::Bf16 => half(Half::Bf16),
            Self::F32 => f32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap()).into(),
        }
    }
}
