//! Blocks that the device seals are those of the CPU's quantizers, bit for bit.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(unsafe_code, reason = "calls kernels as a driver does")]

mod common;
#[path = "common/emulator.rs"]
mod emulator;

use common::Random;
use emulator::{Grid, Half, Kernels, address, address_mut};
use kvmgr::device::cuda::params::Seal;
use kvmgr::device::layout::{Sealed, TOKENS};
use kvmgr::quantizer::{self, Side};

const SIDES: [Side; 2] = [Side::Key, Side::Value];

fn spec_of(format: Sealed) -> &'static str {
    match format {
        Sealed::Int8 => "int8",
        Sealed::Fp8E4m3 => "fp8(e4m3)",
        Sealed::Int4 => "int4",
        Sealed::Kivi4 => "kivi(bits=4, group=128)",
        Sealed::Kivi2 => "kivi(bits=2, group=128)",
    }
}

/// Rows `[tokens, dim]` of one kind; `huge` times a few is still finite.
fn rows(random: &mut Random, kind: usize, dim: usize, huge: f32) -> Vec<f32> {
    let mut rows = random.normals(TOKENS * dim);
    match kind {
        0 => {}
        // Channels, and tokens, of very different size.
        1 => {
            for (i, x) in rows.iter_mut().enumerate() {
                *x *= [1e-3, 1.0, 100.0][i % dim % 3] * [1.0, 1e-2][i / dim % 2];
            }
        }
        2 => rows.fill(0.0),
        3 => rows.fill(-1.5),
        // Numbers that are denormal in f16, and in what is scaled.
        4 => rows.iter_mut().for_each(|x| *x *= 1e-7),
        5 => rows.iter_mut().for_each(|x| *x *= 1e-40),
        6 => rows.iter_mut().for_each(|x| *x *= huge),
        // Halfway between codes.
        7 => rows.iter_mut().for_each(|x| *x = (*x * 8.0).round() * 0.5),
        _ => {
            for _ in 0..40 {
                let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38, 6e4];
                rows[random.below(TOKENS * dim)] = random.pick(&odd);
            }
            rows[..dim].fill(f32::NAN);
            rows[dim..2 * dim].fill(f32::INFINITY);
        }
    }
    rows
}

/// A side of a cell as the device has it, from rows of the 16-bit type.
fn expected(format: Sealed, rotates: bool, side: Side, rows: &[f32], dim: usize) -> Vec<u8> {
    let rotation = if rotates { "had+" } else { "" };
    let quantizer = quantizer::create(&format!("{rotation}{}", spec_of(format)), side).unwrap();
    let mut host = vec![0; quantizer.bytes(TOKENS, dim)];
    quantizer.encode(rows, dim, &mut host);
    let mut bytes = vec![0; host.len()];
    format.to_device(dim, side == Side::Key, &host, &mut bytes);
    bytes
}

#[test]
fn sealed_blocks_are_those_of_the_cpu() {
    let Some(kernels) = Kernels::build("seal.cu") else { return };
    let mut random = Random(1);
    for (case, kind) in (0..9).cycle().take(180).enumerate() {
        let format = Sealed::ALL[case % 5];
        let (dim, half) = ([64, 128][case / 5 % 2], [Half::F16, Half::Bf16][case / 10 % 2]);
        let huge = if half == Half::F16 { 1e4 } else { 1e37 };
        let (cells, rotates) = (random.within(1, 3), random.pick(&[0, 0, 1, 2, 3]));
        let blocks: Vec<Vec<f32>> =
            (0..2 * cells).map(|_| rows(&mut random, kind, dim, huge)).collect();
        // The sign of a zero that is a minimum may differ, so there is only one zero.
        let bits = |x: &f32| Some(half.bits(*x)).filter(|bits| *bits != 0x8000).unwrap_or(0);
        let open: Vec<u16> = blocks.iter().flatten().map(bits).collect();
        let bytes = [true, false].map(|is_key| format.bytes(dim, is_key));
        let mut sealed = vec![0xee; cells * (bytes[0] + bytes[1]) + 16];
        let params = Seal {
            open: address(&open),
            sealed: address_mut(&mut sealed),
            open_cell: 2 * (TOKENS * dim) as i64,
            sealed_cell: (bytes[0] + bytes[1]) as i64,
            sealed_v: bytes[0] as i64,
            rotates,
        };
        let name = format!("kvm_seal_{}_{}_d{dim}", format.name(), half.name());
        let smem = 64 * 5 * dim + 1024;
        let grid = Grid { ctas: 2 * cells, threads: 128, smem, seed: case as u32 };
        kernels.launch(&name, &params, grid).unwrap();
        let mut at = 0;
        for (i, side) in (0..cells).flat_map(|cell| SIDES.map(|side| (cell, side))).enumerate() {
            let values = open[i * TOKENS * dim..][..TOKENS * dim].iter();
            let values: Vec<f32> = values.map(|bits| half.value(*bits) as f32).collect();
            let is_rotated = rotates >> (i % 2) & 1 == 1;
            let expected = expected(format, is_rotated, side.1, &values, dim);
            let found = &sealed[at..at + expected.len()];
            at += expected.len();
            let differs = expected.iter().zip(found).filter(|(a, b)| a != b).count();
            assert_eq!(differs, 0, "{name} kind {kind} {side:?} rotated {is_rotated}");
        }
        assert!(sealed[at..].iter().all(|byte| *byte == 0xee), "{name} writes too much");
    }
}
