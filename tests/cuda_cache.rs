//! Kernels that move rows and blocks, rotate rows and merge partial results, on the CPU against the
//! obvious way. What a kernel must neither read nor write is NaN.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(unsafe_code, reason = "calls kernels as a driver does")]

mod common;
#[path = "common/emulator.rs"]
mod emulator;

use std::ptr;

use common::Random;
use emulator::{Element, Grid, Half, Kernels, address, address_mut};
use kvmgr::device::cuda::params::{Append, NoteQueries};
use kvmgr::simd;

const NAN: u16 = 0x7fff;

fn grid(ctas: usize, seed: u32) -> Grid {
    Grid { ctas, threads: 256, smem: 0, seed }
}

/// Strides of `[outer, inner, dim]` that leave gaps and keep rows aligned to 16 bytes.
fn strides(random: &mut Random, outer: usize, inner: usize, dim: usize) -> ([i64; 2], usize) {
    let row = dim + 8 * random.below(3);
    let (by_outer, by_inner) = match random.chance(50) {
        true => (inner * row + 8 * random.below(3), row),
        false => (row, outer * row + 8 * random.below(3)),
    };
    ([by_outer as i64, by_inner as i64], outer * by_outer + inner * by_inner + dim)
}

#[test]
fn appended_rows_are_where_the_list_says() {
    let Some(kernels) = Kernels::build("append.cu") else { return };
    let mut random = Random(1);
    let sizes = [0, 1, 15, 16, 17, 40];
    for (case, num_tokens) in (0..).zip(sizes.into_iter().cycle().take(24)) {
        let from = [Element::F16, Element::Bf16, Element::F32][case % 3];
        let to = random.pick(&[Half::F16, Half::Bf16]);
        let (heads, block) = (random.within(1, 3), random.pick(&[16, 32, 64]));
        let dim = random.pick(&[8, 64, 80, 128]);
        let by_head = random.chance(50);
        let num_places = num_tokens * if by_head { heads } else { 1 };
        // Each place is another row of one of the blocks; some rows are not stored.
        let num_blocks = num_places.div_ceil(block) + 2;
        let mut rows: Vec<usize> = (0..num_blocks * block).collect();
        let places: Vec<[u32; 2]> = (0..num_places)
            .map(|_| {
                let row = rows.swap_remove(random.below(rows.len()));
                let page = if random.chance(10) { u32::MAX } else { (row / block) as u32 };
                [page, (row % block) as u32]
            })
            .collect();
        let sides = [(); 2].map(|()| {
            let (strides, len) = strides(&mut random, num_tokens, heads, dim);
            let values: Vec<f32> =
                random.normals(len).iter().map(|x| x * random.pick(&[1e-6, 1.0, 3e4])).collect();
            (strides, from.store(&values))
        });
        let to_strides = [heads * block * (dim + 8), dim + 8, heads * (dim + 8)];
        let mut pools = [(); 2].map(|()| vec![NAN; num_blocks * to_strides[0]]);
        let mut expected = pools.clone();
        for (t, h) in (0..num_tokens).flat_map(|t| (0..heads).map(move |h| (t, h))) {
            let [page, row] = places[if by_head { t * heads + h } else { t }];
            for (pool, (strides, bytes)) in expected.iter_mut().zip(&sides) {
                let at = t * strides[0] as usize + h * strides[1] as usize;
                for d in (0..dim).filter(|_| page != u32::MAX) {
                    let to_at = page as usize * to_strides[0]
                        + h * to_strides[1]
                        + row as usize * to_strides[2];
                    pool[to_at + d] = match (from, to) {
                        (Element::F16, Half::F16) | (Element::Bf16, Half::Bf16) => {
                            u16::from_le_bytes([bytes[(at + d) * 2], bytes[(at + d) * 2 + 1]])
                        }
                        _ => to.bits(from.value(bytes, at + d) as f32),
                    };
                }
            }
        }
        let [k, v] = &mut pools;
        let [place_token, place_head] = if by_head { [heads as i64, 1] } else { [1, 0] };
        let [kv_block, kv_head, kv_token] = to_strides.map(|x| x as i64);
        let params = Append {
            k: address(&sides[0].1),
            v: address(&sides[1].1),
            to_k: address_mut(k),
            to_v: address_mut(v),
            places: address(&places),
            k_token: sides[0].0[0],
            k_head: sides[0].0[1],
            v_token: sides[1].0[0],
            v_head: sides[1].0[1],
            kv_block,
            kv_head,
            kv_token,
            place_token,
            place_head,
            num_tokens: num_tokens as u32,
            num_kv_heads: heads as u32,
            dim: dim as u32,
        };
        let name = format!("kvm_append_{}_{}", from.name(), to.name());
        kernels.launch(&name, &params, grid(random.within(1, 4), case as u32)).unwrap();
        assert!(pools == expected, "{name} {num_tokens} {heads} {dim}");
    }
}

/// `KvmCopyBlocks` of the kernels.
#[repr(C)]
struct CopyBlocks {
    copies: *const [u64; 2],
    bytes: u64,
    num_copies: u32,
}

#[test]
fn copied_blocks_are_the_same_and_nothing_else_changes() {
    let Some(kernels) = Kernels::build("blocks.cu") else { return };
    let mut random = Random(2);
    for (seed, words) in (0..).zip([1usize, 15, 255, 256, 1023, 1024, 1025, 2500]) {
        let num_copies = [0, 1, 5][seed as usize % 3];
        let from: Vec<u128> = (0..num_copies * words).map(|_| random.next().into()).collect();
        let mut to = vec![u128::MAX; num_copies * (words + 1)];
        let at =
            |i: usize| [from[i * words..].as_ptr() as u64, to[i * (words + 1)..].as_ptr() as u64];
        let copies: Vec<[u64; 2]> = (0..num_copies).rev().map(at).collect();
        let bytes = words as u64 * 16;
        let params = CopyBlocks { copies: copies.as_ptr(), bytes, num_copies: num_copies as u32 };
        kernels.launch("kvm_copy_blocks", &params, grid(3, seed)).unwrap();
        // The kernel wrote through the addresses in the list.
        let to = std::hint::black_box(&mut to);
        for (from, to) in from.chunks(words).zip(to.chunks(words + 1)) {
            assert!(from == &to[..words] && to[words] == u128::MAX, "{words}");
        }
    }
}

/// `KvmMoveRows` of the kernels.
#[repr(C)]
struct MoveRows {
    pools: [*mut u16; 2],
    moves: *const [u32; 5],
    strides: [i64; 3],
    num_moves: u32,
    num_heads: u32,
    dim: u32,
}

#[test]
fn moved_rows_follow_the_list() {
    let Some(kernels) = Kernels::build("blocks.cu") else { return };
    let mut random = Random(3);
    for (seed, num_moves) in (0..).zip([0usize, 1, 15, 16, 17, 90]) {
        let (heads, block, dim) = (3, random.pick(&[16, 32, 64]), random.pick(&[8, 64, 128, 256]));
        let num_heads = random.within(1, heads);
        let num_blocks = 2 * num_moves.div_ceil(block);
        let stride = [heads * block * dim, block * dim, dim];
        let mut pools = [(); 2].map(|()| {
            let side = (0..num_blocks * stride[0]).map(|_| random.next() as u16);
            side.collect::<Vec<_>>()
        });
        // The first half of the blocks is read, the other half written.
        let half = num_blocks / 2 * block;
        let mut rows: Vec<usize> = (half..2 * half).collect();
        let moves: Vec<[u32; 5]> = (0..num_moves)
            .map(|_| {
                let (from, to) = (random.below(half), rows.swap_remove(random.below(rows.len())));
                let head = random.below(heads - num_heads + 1);
                [from / block, from % block, to / block, to % block, head].map(|x| x as u32)
            })
            .collect();
        let mut expected = pools.clone();
        for pool in &mut expected {
            for [from, from_row, to, to_row, head] in moves.iter().map(|m| m.map(|x| x as usize)) {
                for h in head..head + num_heads {
                    let at = |page: usize, row: usize| {
                        page * stride[0] + h * stride[1] + row * stride[2]
                    };
                    let from = at(from, from_row);
                    pool.copy_within(from..from + dim, at(to, to_row));
                }
            }
        }
        let [k, v] = &mut pools;
        let params = MoveRows {
            pools: [k.as_mut_ptr(), v.as_mut_ptr()],
            moves: moves.as_ptr(),
            strides: stride.map(|x| x as i64),
            num_moves: num_moves as u32,
            num_heads: num_heads as u32,
            dim: dim as u32,
        };
        kernels.launch("kvm_move_rows", &params, grid(2, seed)).unwrap();
        assert!(pools == expected, "{num_moves}");
    }
}

/// `KvmMergePart` of the kernels.
#[repr(C)]
struct Part {
    o: *const u8,
    lse: *const f32,
    o_strides: [i64; 2],
    lse_strides: [i64; 2],
    element: u32,
    reserved: u32,
}

/// `KvmMerge` of the kernels.
#[repr(C)]
struct Merge {
    parts: *const Part,
    o: *mut u8,
    lse: *mut f32,
    o_strides: [i64; 2],
    lse_strides: [i64; 2],
    num_parts: u32,
    num_tokens: u32,
    num_heads: u32,
    dim: u32,
    element: u32,
}

#[test]
fn merged_parts_are_attention_over_all_rows() {
    let Some(kernels) = Kernels::build("merge.cu") else { return };
    let mut random = Random(4);
    for case in 0..24 {
        let num_parts = [0, 1, 2, 3, 8][case % 5];
        let (tokens, heads) = ([0, 1, 5, 17][case % 4], random.within(1, 4));
        let dim = random.pick(&[8, 64, 80, 128, 256]);
        let elements = [Element::F16, Element::Bf16, Element::F32];
        let element = elements[case % 3];
        let inputs: Vec<_> = (0..num_parts)
            .map(|_| {
                let (o_strides, len) = strides(&mut random, tokens, heads, dim);
                let (lse_strides, lse_len) = strides(&mut random, tokens, heads, 1);
                let spread = random.pick(&[1.0, 30.0, 1e4]);
                let lse = random.normals(lse_len).into_iter().map(|x| x * spread);
                let is_empty = random.chance(20);
                let lse: Vec<f32> = lse
                    .map(|x| if is_empty || random.chance(30) { f32::NEG_INFINITY } else { x })
                    .collect();
                let mut o = random.normals(len);
                for (t, h) in (0..tokens).flat_map(|t| (0..heads).map(move |h| (t, h))) {
                    if lse[at(lse_strides, t, h)] == f32::NEG_INFINITY {
                        o[at(o_strides, t, h)..][..dim].fill(f32::NAN);
                    }
                }
                let element = random.pick(&elements);
                (element, element.store(&o), o_strides, lse, lse_strides)
            })
            .collect();
        let part =
            |(element, o, o_strides, lse, lse_strides): &(Element, Vec<u8>, _, Vec<f32>, _)| {
                let element = *element as u32;
                let (o_strides, lse_strides) = (*o_strides, *lse_strides);
                Part {
                    o: o.as_ptr(),
                    lse: lse.as_ptr(),
                    o_strides,
                    lse_strides,
                    element,
                    reserved: 0,
                }
            };
        let parts: Vec<Part> = inputs.iter().map(part).collect();
        let (o_strides, len) = strides(&mut random, tokens, heads, dim);
        let mut o = element.store(&vec![f32::NAN; len]);
        let mut lse = vec![f32::NAN; tokens * heads];
        let has_lse = random.chance(70);
        let params = Merge {
            parts: parts.as_ptr(),
            o: o.as_mut_ptr(),
            lse: if has_lse { lse.as_mut_ptr() } else { ptr::null_mut() },
            o_strides,
            lse_strides: [heads as i64, 1],
            num_parts: num_parts as u32,
            num_tokens: tokens as u32,
            num_heads: heads as u32,
            dim: dim as u32,
            element: element as u32,
        };
        kernels.launch("kvm_merge_parts", &params, grid(2, case as u32)).unwrap();
        for (t, h) in (0..tokens).flat_map(|t| (0..heads).map(move |h| (t, h))) {
            let lses = inputs.iter().map(|part| f64::from(part.3[at(part.4, t, h)]));
            let max = lses.clone().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = lses
                .map(|lse| if lse == f64::NEG_INFINITY { 0.0 } else { (lse - max).exp() })
                .collect();
            let sum: f64 = weights.iter().sum();
            if has_lse {
                let (expected, found) = (max + sum.ln(), f64::from(lse[t * heads + h]));
                let is_same = if sum == 0.0 {
                    found == max
                } else {
                    (found - expected).abs() <= 2e-6 * expected.abs().max(1.0)
                };
                assert!(is_same, "{found} {expected}");
            }
            for d in 0..dim {
                let used = inputs.iter().zip(&weights).filter(|(_, weight)| **weight > 0.0);
                let expected = used
                    .map(|(part, weight)| {
                        weight / sum * part.0.value(&part.1, at(part.2, t, h) + d)
                    })
                    .sum::<f64>();
                let found = element.value(&o, at(o_strides, t, h) + d);
                let limit = [6e-4, 4e-3, 1e-5][element as usize];
                assert!(
                    (found - expected).abs() < limit * expected.abs().max(1.0),
                    "{found} {expected}"
                );
            }
        }
    }
}

/// Where row `(t, h)` starts.
fn at(strides: [i64; 2], t: usize, h: usize) -> usize {
    t * strides[0] as usize + h * strides[1] as usize
}

/// `KvmHadamard` of the kernels.
#[repr(C)]
struct Hadamard {
    from: *const u8,
    to: *mut u8,
    from_strides: [i64; 2],
    to_strides: [i64; 2],
    num_tokens: u32,
    num_heads: u32,
    sanitize: u32,
}

#[test]
fn queries_are_noted_in_the_ring_of_their_sequence() {
    let Some(kernels) = Kernels::build("note.cu") else { return };
    let mut random = Random(6);
    for case in 0..12 {
        let (tokens, heads) = ([0, 1, 2, 17][case % 4], random.within(1, 5));
        let (dim, layers) = (random.pick(&[8, 64, 80, 256]), random.within(1, 3));
        let capacities = [8, 24];
        let row = heads * dim;
        // A head of 8 bytes is four elements.
        let layer_len = |capacity: usize| capacity * (4 + row);
        let mut rings = capacities.map(|capacity| vec![NAN; layers * layer_len(capacity)]);
        let mut expected = rings.clone();
        let ([q_token, q_head], len) = strides(&mut random, tokens, heads, dim);
        let q: Vec<u16> = (0..len).map(|_| random.below(1 << 16) as u16).collect();
        let layer = random.below(layers);
        let first = random.below(1000);
        let mut notes: Vec<u32> = Vec::new();
        for token in 0..tokens {
            // The last of each ring's capacity at most, some tokens of neither.
            let which = [token % 2, 2][usize::from(token + 8 < tokens || random.chance(20))];
            let (ring, capacity) = match which {
                2 => (0, 0),
                _ => (address_mut(&mut rings[which]), capacities[which]),
            };
            let position = first + token;
            notes.extend([ring as u32, (ring >> 32) as u32, position as u32, capacity as u32]);
            if which == 2 {
                continue;
            }
            let layer = &mut expected[which][layer * layer_len(capacity)..][..layer_len(capacity)];
            let (head, queries) = layer.split_at_mut(capacity * 4);
            let place = position % capacity;
            let words = [position as u32, 0.75f32.to_bits()];
            let halves = words.map(|word| [word as u16, (word >> 16) as u16]).concat();
            head[place * 4..][..4].copy_from_slice(&halves);
            for h in 0..heads {
                let from = token * q_token as usize + h * q_head as usize;
                queries[place * row + h * dim..][..dim].copy_from_slice(&q[from..][..dim]);
            }
        }
        let params = NoteQueries {
            q: address(&q),
            notes: address(&notes),
            q_token,
            q_head,
            num_tokens: tokens as u32,
            num_heads: heads as u32,
            dim: dim as u32,
            layer: layer as u32,
            factor: 0.75,
        };
        kernels.launch("kvm_note_queries", &params, grid(1 + case % 2, case as u32)).unwrap();
        assert!(rings == expected, "{tokens} tokens of {heads} heads of {dim}");
    }
}

/// What `had+` does on the CPU before it encodes a row.
fn sanitize(row: &mut [f32]) {
    const LIMIT: f32 = f32::MAX / 4096.0;
    if !row.iter().all(|x| x.abs() <= LIMIT) {
        simd::sanitize(row, LIMIT);
    }
}

#[test]
fn rotated_rows_are_those_of_the_cpu() {
    let Some(kernels) = Kernels::build("hadamard.cu") else { return };
    let scalar = simd::available().find(|kernels| kernels.name == "scalar").unwrap();
    let mut random = Random(5);
    for case in 0..18 {
        let element = [Element::F16, Element::Bf16, Element::F32][case % 3];
        let dim = [64, 128, 256][case / 3 % 3];
        let (tokens, heads) = ([1, 5, 17, 0][case % 4], random.within(1, 5));
        let (is_sane, is_in_place) = (case < 9, random.chance(50));
        let (from_strides, len) = strides(&mut random, tokens, heads, dim);
        let mut values = random.normals(len);
        for _ in 0..if is_sane { 0 } else { 4 * tokens } {
            let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38, -3e38, 1e-30];
            values[random.below(len)] = random.pick(&odd);
        }
        let mut from = element.store(&values);
        let (to_strides, to_len) = if is_in_place {
            (from_strides, len)
        } else {
            strides(&mut random, tokens, heads, dim)
        };
        let mut expected = from.clone();
        let mut to = element.store(&vec![f32::NAN; to_len]);
        if !is_in_place {
            expected.clone_from(&to);
        }
        for (t, h) in (0..tokens).flat_map(|t| (0..heads).map(move |h| (t, h))) {
            let row = (0..dim).map(|d| element.value(&from, at(from_strides, t, h) + d) as f32);
            let mut row: Vec<f32> = row.collect();
            if !is_sane {
                sanitize(&mut row);
            }
            scalar.hadamard(&mut row, dim);
            let bytes = element.store(&row);
            let width = bytes.len() / dim;
            expected[at(to_strides, t, h) * width..][..dim * width].copy_from_slice(&bytes);
        }
        let target = if is_in_place { from.as_mut_ptr() } else { to.as_mut_ptr() };
        let params = Hadamard {
            from: if is_in_place { target } else { from.as_ptr() },
            to: target,
            from_strides,
            to_strides,
            num_tokens: tokens as u32,
            num_heads: heads as u32,
            sanitize: u32::from(!is_sane),
        };
        let name = format!("kvm_hadamard_{}_d{dim}", element.name());
        kernels.launch(&name, &params, grid(2, case as u32)).unwrap();
        assert!(expected == *if is_in_place { &from } else { &to }, "{name} {is_sane}");
    }
}
