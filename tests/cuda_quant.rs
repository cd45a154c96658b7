//! Decoding over sealed blocks on the emulated device, against attention in f64 over what the quantizers of
//! the CPU decode. What a kernel must not read is NaN. Needs g++ on x86-64; otherwise a SKIP.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(unsafe_code, reason = "calls kernels as a driver does")]

mod common;
#[path = "common/emulator.rs"]
mod emulator;
#[path = "common/work.rs"]
mod work;

use std::ops::Range;

use common::Random;
use emulator::{Grid, Half, Kernels, address, address_mut};
use kvmgr::device::cuda::params::{Decode, Item};
use kvmgr::device::layout::{Codes, Sealed, SideLayout, TOKENS};
use kvmgr::quantizer::{self, Cell, Side};
use work::{GRID, Quad, deal};

const SOURCE: &str = "decode_q.cu";
const LENS: [usize; 8] = [0, 1, 63, 64, 65, 128, 200, 330];

#[derive(Debug, Clone, Copy)]
struct Case {
    format: Sealed,
    /// Bit 0: keys, bit 1: values are rotated.
    rotates: u32,
    dtype: Half,
    dim: usize,
    group: usize,
    queries: usize,
    window: usize,
    softcap: f64,
    /// What queries are multiplied by.
    gain: f32,
}

const PLAIN: Case = Case {
    format: Sealed::both(Codes::Int4),
    rotates: 0,
    dtype: Half::F16,
    dim: 128,
    group: 4,
    queries: 1,
    window: 0,
    softcap: 0.0,
    gain: 1.0,
};

fn spec_of(case: Case, side: usize) -> String {
    let inner = match case.format.codes(side == 0) {
        Codes::Int8 => "int8",
        Codes::Fp8E4m3 => "fp8(e4m3)",
        Codes::Int4 => "int4",
        Codes::Kivi4 => "kivi(bits=4, group=256)",
        Codes::Kivi2 => "kivi(bits=2, group=256)",
    };
    let rotation = if case.rotates >> side & 1 == 1 { "had+" } else { "" };
    format!("{rotation}{inner}")
}

/// The rows of a head: what they mean, sealed blocks K side before V side, and the open block.
struct Head {
    /// `[side][row][dim]`.
    rows: [Vec<f64>; 2],
    sealed: Vec<u8>,
    open: [Vec<u16>; 2],
}

/// Rows at the start of a head of `len` that are evicted.
fn evicted(head: usize, len: usize) -> usize {
    [0, 21, 40][head % 3].min(len.saturating_sub(1))
}

fn head(case: Case, (i, len): (usize, usize), random: &mut Random) -> Head {
    let (dim, full) = (case.dim, len / TOKENS);
    let block = TOKENS * dim;
    let values = [(); 2].map(|()| {
        let bits = random.normals(len * dim).into_iter().map(|x| case.dtype.bits(x));
        bits.collect::<Vec<u16>>()
    });
    let mut rows = values
        .each_ref()
        .map(|side| side.iter().map(|bits| case.dtype.value(*bits)).collect::<Vec<f64>>());
    let mut sealed = Vec::new();
    for i in 0..full {
        for (side, rows) in rows.iter_mut().enumerate() {
            let rows = &mut rows[i * block..(i + 1) * block];
            let kind = [Side::Key, Side::Value][side];
            let quantizer = quantizer::create(&spec_of(case, side), kind).unwrap();
            let mut bytes = vec![0; quantizer.bytes(TOKENS, dim)];
            let mut floats: Vec<f32> = rows.iter().map(|x| *x as f32).collect();
            quantizer.encode(&floats, dim, &mut bytes);
            let cell = Cell { bytes: &bytes, tokens: TOKENS, dim, rows: 0..TOKENS, ahead: &[] };
            quantizer.decode(&cell, &mut floats);
            rows.iter_mut().zip(&floats).for_each(|(x, y)| *x = f64::from(*y));
            let mut on_device = vec![0; bytes.len()];
            SideLayout::new(case.format, dim, side == 0).to_device(&bytes, &mut on_device);
            sealed.extend(on_device);
        }
    }
    let open = values.map(|side| {
        let mut open = side[full * block..].to_vec();
        open.resize(block, 0x7fff);
        if full == 0 {
            open[..evicted(i, len) * dim].fill(0x7fff);
        }
        open
    });
    Head { rows, sealed, open }
}

/// The error of O, relative, and the largest of LSE; infinite if the emulator saw something forbidden.
fn error_of(kernels: Kernels, case: Case, seed: u64) -> (f64, f64) {
    let Case { dim, queries, group, format, .. } = case;
    let mut random = Random(seed);
    let places = LENS.into_iter().enumerate();
    let heads: Vec<Head> = places.map(|place| head(case, place, &mut random)).collect();
    let sizes = [true, false].map(|is_key| format.bytes(dim, is_key));
    // A page is a sealed and an open block; a head has one more than it fills.
    let page = sizes[0] + sizes[1];
    let (mut sealed, mut open) = (Vec::new(), [Vec::new(), Vec::new()]);
    let (mut pages, mut items, mut slot) = (Vec::new(), Vec::new(), 0);
    for (i, (head, len)) in heads.iter().zip(LENS).enumerate() {
        let (first_page, full) = (pages.len(), len / TOKENS);
        pages.extend((0..=full).map(|j| (first_page + j) as u32));
        sealed.extend(&head.sealed);
        sealed.resize(pages.len() * page, 0xff);
        for (all, side) in open.iter_mut().zip(&head.open) {
            all.resize((pages.len() - 1) * TOKENS * dim, 0x7fff);
            all.extend(side);
        }
        let num_parts = if len > 2 * TOKENS { 2 } else { 1 };
        items.extend((0..num_parts).map(|part| Item {
            token: (i * queries) as u32,
            num_queries: queries as u32,
            first_page: first_page as u32,
            len: len as u32,
            begin: TOKENS as u32 * part,
            end: if part + 1 == num_parts { len } else { TOKENS } as u32,
            sealed_end: (full * TOKENS) as u32,
            slot,
            part,
            num_parts,
            ticket: i as u32,
            first: evicted(i, len) as u32,
            ..Item::default()
        }));
        slot += num_parts;
    }
    let items = deal(&items);
    let q = random.normals(LENS.len() * queries * group * dim);
    let mut q: Vec<u16> = q.into_iter().map(|x| case.dtype.bits(x * case.gain)).collect();
    let (mut o, mut lse) = (vec![0x7fffu16; q.len()], vec![f32::NAN; q.len() / dim]);
    let columns = if group * queries > 8 { 16 } else { 8 };
    let mut partials = vec![Quad([f32::NAN; 4]); slot as usize * columns * (dim / 4 + 1)];
    let mut tickets = vec![0u32; LENS.len()];
    let (row, token) = (dim as i64, (group * dim) as i64);
    let params = Decode {
        q: address(&q),
        o: address_mut(&mut o),
        lse: address_mut(&mut lse),
        pages: address(&pages),
        items: address(&items),
        partials: address_mut(&mut partials),
        tickets: address_mut(&mut tickets),
        k: address(&open[0]),
        v: address(&open[1]),
        sealed_k: address(&sealed),
        sealed_v: address(&sealed) + sizes[0] as u64,
        q_token: token,
        q_head: row,
        o_token: token,
        o_head: row,
        lse_token: group as i64,
        kv_block: (TOKENS * dim) as i64,
        kv_token: row,
        sealed_block: page as i64,
        scale: 1.0 / (dim as f32).sqrt(),
        softcap: case.softcap as f32,
        window: case.window as u32,
        group: group as u32,
        block_size: TOKENS as u32,
        rotates: case.rotates,
        is_bf16: u32::from(case.dtype == Half::Bf16),
        ..Decode::default()
    };
    let chunk = sizes.map(|bytes| (bytes * format.chunk() / TOKENS).next_multiple_of(512));
    let warps = if dim == 256 { 2 } else { 4 };
    // Q, its columns and the number of the item, where registers are too few.
    let shared_q = if dim * columns == 4096 { 2 * 4096 + 16 * columns + 16 } else { 0 };
    let smem = warps * 2 * (chunk[0] + chunk[1]).max(64 * dim) + shared_q;
    let name = format!("kvm_decode_{}_d{dim}_g{columns}", format.name());
    for seed in 0..2 {
        let grid = Grid { ctas: GRID, threads: 32 * warps, smem, seed };
        kernels.written_before(&mut q);
        open.iter_mut().for_each(|side| kernels.written_before(side));
        if let Err(error) = kernels.launch(&name, &params, grid) {
            eprintln!("{error}");
            return (f64::INFINITY, f64::INFINITY);
        }
    }
    let (mut difference, mut norm, mut worst) = (0.0, 0.0, 0.0f64);
    for (i, row) in
        (0..LENS.len() * queries).flat_map(|i| (0..group).map(move |g| (i, i * group + g)))
    {
        let seen = LENS[i / queries].saturating_sub(queries - 1 - i % queries);
        let query: Vec<f64> = q[row * dim..][..dim].iter().map(|x| case.dtype.value(*x)).collect();
        let rows = evicted(i / queries, LENS[i / queries])..seen;
        let (expected, log) = attend(case, &query, &heads[i / queries].rows, rows);
        let found = f64::from(lse[row]);
        if found.to_bits() != log.to_bits() {
            let error = (found - log).abs();
            worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
        }
        for (x, bits) in expected.iter().zip(&o[row * dim..]) {
            difference += (case.dtype.value(*bits) - x).powi(2);
            norm += x.powi(2);
        }
    }
    let error = (difference / norm).sqrt();
    (if error.is_nan() { f64::INFINITY } else { error }, worst)
}

/// Attention to the rows `seen`: the output and the logarithm of the sum.
fn attend(
    case: Case,
    query: &[f64],
    rows: &[Vec<f64>; 2],
    Range { start, end: seen }: Range<usize>,
) -> (Vec<f64>, f64) {
    let window = if case.window > 0 { seen.saturating_sub(case.window) } else { 0 };
    let first = start.max(window).min(seen);
    let row = |side: usize, t: usize| &rows[side][t * case.dim..][..case.dim];
    let logit = |t: usize| {
        let dot: f64 = query.iter().zip(row(0, t)).map(|(a, b)| a * b).sum();
        let x = dot / (case.dim as f64).sqrt();
        if case.softcap > 0.0 { case.softcap * (x / case.softcap).tanh() } else { x }
    };
    let logits: Vec<f64> = (first..seen).map(logit).collect();
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - top).exp()).sum();
    let mut out = vec![0.0; case.dim];
    for (t, x) in (first..seen).zip(&logits) {
        let weight = (x - top).exp() / sum;
        out.iter_mut().zip(row(1, t)).for_each(|(out, v)| *out += weight * v);
    }
    (out, if logits.is_empty() { f64::NEG_INFINITY } else { top + sum.ln() })
}

#[test]
fn sealed_rows_are_attended_to_as_in_f64() {
    let Some(kernels) = Kernels::build(SOURCE) else { return };
    let mut seed = 0;
    for format in Sealed::ALL {
        let plain = Case { format, ..PLAIN };
        for case in [
            plain,
            Case { dtype: Half::Bf16, dim: 64, group: 8, rotates: 1, ..plain },
            Case { group: 5, queries: 3, window: 90, rotates: 3, ..plain },
            Case { dim: 64, group: 16, softcap: 2.0, rotates: 2, ..plain },
            Case { dim: 256, group: 8, rotates: 3, window: 90, ..plain },
            Case { dim: 256, group: 1, dtype: Half::Bf16, softcap: 2.0, ..plain },
            // Q in shared memory.
            Case { dim: 256, group: 16, ..plain },
            Case {
                dim: 256,
                group: 5,
                queries: 3,
                dtype: Half::Bf16,
                rotates: 3,
                window: 90,
                ..plain
            },
            // Weights of one row, and nearly equal ones: then outputs are what is left of sums that cancel.
            Case { gain: 30.0, window: 70, ..plain },
            Case { gain: 0.01, ..plain },
            Case { dim: 256, group: 9, gain: 20.0, window: 70, ..plain },
            Case { dim: 256, group: 12, gain: 0.01, ..plain },
        ] {
            seed += 1;
            let (error, lse) = error_of(kernels, case, seed);
            // The logarithm of a sum carries the errors of logits, which grow with them. Those of kivi are
            // larger: queries times the scales of channels are rounded to f16, and weights show it too. At a
            // gain of 20 that is 7e-4 on average and up to 2e-3, whatever head_dim is; at 1 it is 2e-4. The cases of
            // 64 and 128 channels stay below the limit all the same.
            let gain = f64::from(case.gain.max(1.0));
            let is_kivi = matches!(format.codes(true), Codes::Kivi4 | Codes::Kivi2);
            let is_wide = is_kivi && case.dim == 256;
            let most = case.dtype.limit() * if is_wide { (gain / 10.0).max(1.0) } else { 1.0 };
            assert!(error < most, "{case:?}: O {error:e}");
            assert!(lse < 1e-3 * gain, "{case:?}: LSE {lse:e}");
        }
    }
}

/// Each mistake must show in one of a few runs with other orders of the threads. A `kvm_syncwarp` missing
/// alone would not: matrix products make the lanes of a warp meet anyway.
#[test]
fn missing_waits_and_barriers_are_noticed() {
    let mutations = [
        (
            "        kvm_cp_wait<1>();\n        kvm_syncwarp(); // the copies",
            "        // the copies",
        ),
        ("    kvm_wait_for_previous();\n", ""),
        ("kvm_sync(); // places of chunks become", "// places of chunks become"),
        ("        kvm_sync(); // nobody reads tiles", "        // nobody reads tiles"),
    ];
    for (from, to) in mutations {
        let only = ("KVM_DECODE_QUANTS(", "int8, KvmInt8, KvmInt8, 64");
        let Some(kernels) = Kernels::build_mutated(SOURCE, (from, to), only) else { return };
        let case = Case { format: Sealed::both(Codes::Int8), dim: 64, ..PLAIN };
        let is_seen = (1..=6).any(|seed| {
            let (error, lse) = error_of(kernels, case, seed);
            error > 1e-3 || lse > 1e-3
        });
        assert!(is_seen, "without {from} nothing went wrong");
    }
}
