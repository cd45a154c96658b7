//! The shipped CUDA kernels on the CPU, against attention in f64. `tests/cuda/emu.hpp` runs the
//! unmodified source; what a kernel must not read is NaN. Needs g++ on x86-64; otherwise a SKIP.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(unsafe_code, reason = "calls kernels as a driver does")]

mod common;
#[path = "common/emulator.rs"]
mod emulator;
#[path = "common/work.rs"]
mod work;

use common::Random;
use emulator::{Grid, Half, Kernels, address, address_mut};
use kvmgr::device::cuda::params::{Decode, Item};
use work::{GRID, Quad, deal};

const SOURCE: &str = "decode_f16.cu";

#[derive(Debug, Clone, Copy)]
struct Case {
    dtype: Half,
    dim: usize,
    /// Queries of a sequence.
    queries: usize,
    group: usize,
    block: usize,
    window: usize,
    softcap: f64,
    has_sinks: bool,
    is_wide: bool,
}

const KV_HEADS: usize = 2;

/// Rows at the start of a head of `len` that are evicted.
fn evicted(head: usize, len: usize) -> usize {
    if head % 2 == 1 { (head * 5 % 14).min(len.saturating_sub(1)) } else { 0 }
}

/// Runs ragged heads twice through the kernel (tickets must be 0 again) and answers the relative
/// error of O and the largest of LSE; infinite if the emulator saw something forbidden.
fn error_of(kernels: Kernels, case: Case, seed: u64) -> (f64, f64) {
    let Case { dim, queries, group, block, .. } = case;
    let mut random = Random(seed);
    let lens = [0, 1, 15, 16, 17, block + 1, 100, 3 * block];
    let tokens = lens.len() / KV_HEADS * queries;
    let num_blocks = lens.iter().map(|len| len.div_ceil(block)).sum::<usize>() + 3;
    let mut order: Vec<usize> = (0..num_blocks).collect();
    for i in (1..num_blocks).rev() {
        order.swap(i, random.below(i + 1));
    }
    let row =
        |page: usize, head: usize, t: usize| ((page * KV_HEADS + head) * block + t % block) * dim;
    let mut pool = [(); 2].map(|()| vec![0x7fffu16; num_blocks * KV_HEADS * block * dim]);
    let (mut pages, mut items, mut first_pages) = (Vec::new(), Vec::new(), Vec::new());
    let fresh = |head: usize, len: usize| len.saturating_sub(queries).max(evicted(head, len));
    let mut slot = 0;
    for (i, &len) in lens.iter().enumerate() {
        let first_page = pages.len();
        first_pages.push(first_page);
        pages.extend((0..len.div_ceil(block)).map(|j| order[first_page + j] as u32));
        let num_parts = if len > 32 { 3 } else { 1 };
        items.extend((0..num_parts).map(|part| Item {
            token: (i / KV_HEADS * queries) as u32,
            num_queries: queries as u32,
            kv_head: (i % KV_HEADS) as u32,
            first_page: first_page as u32,
            len: len as u32,
            begin: 16 * part,
            end: if part + 1 == num_parts { len as u32 } else { 16 * (part + 1) },
            slot,
            part,
            num_parts,
            ticket: i as u32,
            first: evicted(i, len) as u32,
            fresh: fresh(i, len) as u32,
            ..Item::default()
        }));
        slot += num_parts;
        for t in evicted(i, len)..len {
            let at = row(pages[first_page + t / block] as usize, i % KV_HEADS, t);
            for side in &mut pool {
                let values = random.normals(dim);
                side[at..at + dim]
                    .iter_mut()
                    .zip(values)
                    .for_each(|(x, v)| *x = case.dtype.bits(v));
            }
        }
    }
    let items = deal(&items);
    let heads = KV_HEADS * group;
    let mut q: Vec<u16> =
        random.normals(tokens * heads * dim).into_iter().map(|x| case.dtype.bits(x)).collect();
    let sinks = random.normals(heads);
    let (mut o, mut lse) = (vec![0x7fffu16; q.len()], vec![f32::NAN; tokens * heads]);
    let columns = if group * queries > 8 { 16 } else { 8 };
    let mut partials = vec![Quad([f32::NAN; 4]); slot as usize * columns * (dim / 4 + 1)];
    let mut tickets = vec![0u32; lens.len()];
    let [bd, hd] = [block * dim, heads * dim].map(|x| x as i64);
    let d = dim as i64;
    let params = Decode {
        q: address(&q),
        o: address_mut(&mut o),
        lse: address_mut(&mut lse),
        sinks: if case.has_sinks { address(&sinks) } else { 0 },
        pages: address(&pages),
        items: address(&items),
        partials: address_mut(&mut partials),
        tickets: address_mut(&mut tickets),
        k: address(&pool[0]),
        v: address(&pool[1]),
        q_token: hd,
        q_head: d,
        o_token: hd,
        o_head: d,
        lse_token: heads as i64,
        kv_block: KV_HEADS as i64 * bd,
        kv_head: bd,
        kv_token: d,
        scale: 1.0 / (dim as f32).sqrt(),
        softcap: case.softcap as f32,
        window: case.window as u32,
        group: group as u32,
        block_size: block as u32,
        ..Decode::default()
    };
    let warps = if dim == 256 { 2 } else { 4 } * if case.is_wide { 2 } else { 1 };
    let shared_q = if dim * columns >= 4096 { 2 * dim * columns } else { 0 };
    let smem = warps * (2 * 64 * dim + columns * 68 * 4) + shared_q;
    let wide = if case.is_wide { "_wide" } else { "" };
    let name = format!("kvm_decode_{}_d{dim}_g{columns}{wide}", case.dtype.name());
    for seed in 0..2 {
        let grid = Grid { ctas: GRID, threads: warps * 32, smem, seed };
        kernels.written_before(&mut q);
        for (i, &len) in lens.iter().enumerate() {
            for t in fresh(i, len)..len {
                let at = row(pages[first_pages[i] + t / block] as usize, i % KV_HEADS, t);
                pool.iter_mut().for_each(|side| kernels.written_before(&mut side[at..at + dim]));
            }
        }
        if let Err(error) = kernels.launch(&name, &params, grid) {
            eprintln!("{error}");
            return (f64::INFINITY, f64::INFINITY);
        }
    }
    assert!(tickets.iter().all(|ticket| *ticket == 0), "tickets are not reset");

    let (mut difference, mut norm, mut worst) = (0.0, 0.0, 0.0f64);
    for (i, &len) in lens.iter().enumerate() {
        let first_page = items
            .iter()
            .find(|item| item.ticket == i as u32 && item.num_queries > 0)
            .unwrap()
            .first_page;
        for column in 0..queries * group {
            let (query, g) = (column / group, column % group);
            let out_row = (i / KV_HEADS * queries + query) * heads + i % KV_HEADS * group + g;
            let len = len.saturating_sub(queries - 1 - query);
            let query = &q[out_row * dim..][..dim];
            let window = if case.window > 0 { len.saturating_sub(case.window) } else { 0 };
            let visible = window.max(evicted(i, lens[i])).min(len)..len;
            let at =
                |t: usize| row(pages[first_page as usize + t / block] as usize, i % KV_HEADS, t);
            let logits: Vec<f64> = visible
                .clone()
                .map(|t| {
                    let key = &pool[0][at(t)..][..dim];
                    let dot: f64 = query
                        .iter()
                        .zip(key)
                        .map(|(a, b)| case.dtype.value(*a) * case.dtype.value(*b))
                        .sum();
                    let x = dot / (dim as f64).sqrt();
                    if case.softcap > 0.0 { case.softcap * (x / case.softcap).tanh() } else { x }
                })
                .collect();
            let sink =
                if case.has_sinks { f64::from(sinks[i % KV_HEADS * group + g]).exp() } else { 0.0 };
            let sum = logits.iter().map(|x| x.exp()).sum::<f64>() + sink;
            let expected_lse = sum.ln();
            let found = f64::from(lse[out_row]);
            if expected_lse.is_finite() || found.to_bits() != expected_lse.to_bits() {
                let error = (found - expected_lse).abs();
                worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
            }
            for d in 0..dim {
                let expected: f64 = visible
                    .clone()
                    .zip(&logits)
                    .map(|(t, x)| x.exp() / sum * case.dtype.value(pool[1][at(t) + d]))
                    .sum();
                let found = case.dtype.value(o[out_row * dim + d]);
                difference += (found - expected).powi(2);
                norm += expected.powi(2);
            }
        }
    }
    let error = (difference / norm).sqrt();
    (if error.is_nan() { f64::INFINITY } else { error }, worst)
}

const PLAIN: Case = Case {
    dtype: Half::Bf16,
    dim: 128,
    queries: 1,
    group: 4,
    block: 16,
    window: 0,
    softcap: 0.0,
    has_sinks: false,
    is_wide: false,
};

#[test]
fn decoding_matches_attention_in_f64() {
    let Some(kernels) = Kernels::build(SOURCE) else { return };
    let mut cases = Vec::new();
    for (i, group) in (1..=16).enumerate() {
        let (dim, block) = ([64, 128, 256][i % 3], [16, 32, 64][i / 3 % 3]);
        cases.push(Case {
            dtype: if i % 2 == 0 { Half::Bf16 } else { Half::F16 },
            dim,
            group,
            block,
            is_wide: i % 4 == 1,
            ..PLAIN
        });
    }
    cases.push(Case { window: 20, ..PLAIN });
    cases.push(Case { queries: 2, ..PLAIN });
    cases.push(Case { queries: 5, group: 3, window: 18, dim: 64, ..PLAIN });
    cases.push(Case { softcap: 2.0, dtype: Half::F16, dim: 64, ..PLAIN });
    cases.push(Case { has_sinks: true, window: 7, dim: 256, ..PLAIN });
    for (i, case) in cases.into_iter().enumerate() {
        let (error, lse) = error_of(kernels, case, i as u64 + 1);
        let limit = case.dtype.limit();
        assert!(error < limit && lse < 1e-3, "{case:?}: O {error:e}, LSE {lse:e}");
    }
}

/// Each mistake must show in one of a few runs with other orders of the threads. A missing
/// `kvm_syncwarp` would not: the emulated ldmatrix makes the lanes of a warp meet anyway.
#[test]
fn the_emulator_notices_missing_barriers_and_waits() {
    let mutations = [
        ("kvm_cp_wait<1>()", "kvm_cp_wait<2>()"),
        ("if (!is_early) kvm_wait_for_previous();", ""),
        ("if (is_early) kvm_wait_for_previous();", ""),
        ("ring.begun(p, it) <= it.fresh", "ring.begun(p, it) <= it.fresh + 1"),
        ("        kvm_sync();\n        for (u32 i", "        for (u32 i"),
        ("kvm_sync(); // the place is free", "// the place is free"),
        ("kvm_sync();\n        if (*done", "if (*done"),
    ];
    for (from, to) in mutations {
        let only = ("KVM_DECODES(", "bf16, true, 128");
        let Some(kernels) = Kernels::build_mutated(SOURCE, (from, to), only) else { return };
        let is_seen = (1..=6).any(|seed| {
            let (error, lse) = error_of(kernels, PLAIN, seed);
            error > 4e-3 || lse > 1e-3
        });
        assert!(is_seen, "without {from} nothing went wrong");
    }
}
