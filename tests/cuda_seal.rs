//! Blocks that the device seals are those of the CPU's quantizers, bit for bit.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(unsafe_code, reason = "calls kernels as a driver does")]

mod common;
#[path = "common/emulator.rs"]
mod emulator;

use common::Random;
use emulator::{Grid, Half, Kernels, address_mut};
use kvmgr::device::cuda::params::Seal;
use kvmgr::device::layout::{Codes, Sealed, SideLayout, TOKENS};
use kvmgr::quantizer::{self, Side};

const SIDES: [Side; 2] = [Side::Key, Side::Value];

fn spec_of(codes: Codes) -> &'static str {
    match codes {
        Codes::Int8 => "int8",
        Codes::Fp8E4m3 => "fp8(e4m3)",
        Codes::Int4 => "int4",
        Codes::Kivi4 => "kivi(bits=4, group=256)",
        Codes::Kivi2 => "kivi(bits=2, group=256)",
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
    let quantizer =
        quantizer::create(&format!("{rotation}{}", spec_of(format.codes(side == Side::Key))), side)
            .unwrap();
    let mut host = vec![0; quantizer.bytes(TOKENS, dim)];
    quantizer.encode(rows, dim, &mut host);
    let mut bytes = vec![0; host.len()];
    SideLayout::new(format, dim, side == Side::Key).to_device(&host, &mut bytes);
    bytes
}

/// Memory of blocks that start at pages, as those of a cache do.
struct Pages {
    memory: Vec<u8>,
    pages: [[u32; 2]; Seal::BLOCKS],
}

impl Pages {
    /// Room for blocks of these bytes, open and sealed ones in no order. What nobody writes is 0xee.
    fn new(random: &mut Random, num_blocks: usize, bytes: [usize; 2]) -> Self {
        let sizes = bytes.map(|bytes| bytes.div_ceil(256) + 1);
        let mut order: Vec<usize> = (0..2 * num_blocks).collect();
        (0..order.len()).for_each(|i| order.swap(i, random.below(i + 1)));
        let (mut next, mut pages) = (0, [[0; 2]; Seal::BLOCKS]);
        for place in order {
            pages[place / 2][place % 2] = next as u32;
            next += sizes[place % 2];
        }
        Self { memory: vec![0xee; next * 256], pages }
    }

    fn block(&mut self, block: usize, is_sealed: bool) -> &mut [u8] {
        &mut self.memory[self.pages[block][usize::from(is_sealed)] as usize * 256..]
    }
}

/// Launches the kernel for blocks of `kinds` of rows and compares what it writes.
fn seal(kernels: &Kernels, case: u32, (format, dim, half): (Sealed, usize, Half), kinds: &[usize]) {
    let mut random = Random(u64::from(case));
    let huge = if half == Half::F16 { 1e4 } else { 1e37 };
    let (cells, rotates) = (random.within(1, 3), random.pick(&[0, 0, 1, 2, 3]));
    let bytes = [true, false].map(|is_key| format.bytes(dim, is_key));
    let (row_bytes, sealed_cell) = (TOKENS * dim * 2, bytes[0] + bytes[1]);
    let sizes = [cells * 2 * row_bytes, cells * sealed_cell];
    let mut pages = Pages::new(&mut random, kinds.len(), sizes);
    // The sign of a zero that is a minimum may differ, so there is only one zero.
    let bits = |x: &f32| Some(half.bits(*x)).filter(|bits| *bits != 0x8000).unwrap_or(0);
    let mut values = Vec::new();
    for (block, kind) in kinds.iter().enumerate() {
        let sides = (0..2 * cells).flat_map(|_| rows(&mut random, *kind, dim, huge));
        let open: Vec<u16> = sides.map(|x| bits(&x)).collect();
        for (to, bits) in pages.block(block, false).chunks_exact_mut(2).zip(&open) {
            to.copy_from_slice(&bits.to_le_bytes());
        }
        values.extend(open.iter().map(|bits| half.value(*bits) as f32));
    }
    let params = Seal {
        memory: address_mut(&mut pages.memory),
        open_cell: 2 * row_bytes as i64,
        sealed_cell: sealed_cell as i64,
        sealed_v: bytes[0] as i64,
        rotates,
        num_cells: cells as u32,
        pages: pages.pages,
    };
    let name = format!("kvm_seal_{}_{}_d{dim}", format.name(), half.name());
    let ctas = 2 * cells * kinds.len();
    let grid = Grid { ctas, threads: 128, smem: (64 * 5 + 8) * dim, seed: case };
    kernels.launch(&name, &params, grid).unwrap();
    let sides = (0..kinds.len() * cells).flat_map(|cell| SIDES.map(|side| (cell, side)));
    for ((cell, side), values) in sides.zip(values.chunks_exact(TOKENS * dim)) {
        let (block, kind) = (cell / cells, kinds[cell / cells]);
        let is_rotated = rotates >> (side as u32) & 1 == 1;
        let expected = expected(format, is_rotated, side, values, dim);
        let start = cell % cells * sealed_cell + side as usize * bytes[0];
        let sealed = pages.block(block, true);
        let found = &sealed[start..start + expected.len()];
        let differs = expected.iter().zip(found).filter(|(a, b)| a != b).count();
        assert_eq!(differs, 0, "{name} block {block} kind {kind} {side:?} rotated {is_rotated}");
        let after = &sealed[cells * sealed_cell..][..256];
        assert!(after.iter().all(|byte| *byte == 0xee), "{name} writes too much");
    }
}

#[test]
fn sealed_blocks_are_those_of_the_cpu() {
    let Some(kernels) = Kernels::build("seal.cu") else { return };
    for case in 0..324 {
        let (format, rest) = (Sealed::ALL[case % 6], case / 6);
        let (dim, half) = ([64, 128, 256][rest % 3], [Half::F16, Half::Bf16][rest / 3 % 2]);
        let kinds = [rest % 9, (rest + 4) % 9];
        seal(&kernels, case as u32, (format, dim, half), &kinds[..1 + rest / 6 % 2]);
    }
}

#[test]
fn a_launch_seals_as_many_blocks_as_its_parameters_hold() {
    let Some(kernels) = Kernels::build("seal.cu") else { return };
    let kinds: Vec<usize> = (0..Seal::BLOCKS).map(|block| block % 9).collect();
    seal(&kernels, 7, (Sealed::both(Codes::Int4), 64, Half::F16), &kinds);
}
