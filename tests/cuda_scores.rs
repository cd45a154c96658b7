//! Kernels that choose blocks, on the CPU against the obvious way. What a kernel must not read is NaN.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(unsafe_code, reason = "calls kernels as a driver does")]

mod common;
#[path = "common/emulator.rs"]
mod emulator;

use std::cmp::Reverse;
use std::ptr;
use std::sync::OnceLock;

use common::Random;
use emulator::{Grid, Half, Kernels};

const NAN: u16 = 0x7fff;

fn score_kernels() -> Option<Kernels> {
    static KERNELS: OnceLock<Option<Kernels>> = OnceLock::new();
    *KERNELS.get_or_init(|| Kernels::build("score.cu"))
}

/// `KvmQuestBounds` of the kernels; an item is page, head, first row, rows, slot.
#[repr(C)]
struct QuestBounds {
    k: *const u16,
    bounds: *mut u16,
    items: *const [u32; 5],
    /// Block, head, row of K; slot, head of the bounds.
    strides: [i64; 5],
    num_items: u32,
    dim: u32,
}

#[test]
fn bounds_are_the_least_and_the_most_of_each_channel() {
    let Some(kernels) = score_kernels() else { return };
    let mut random = Random(1);
    for case in 0..12 {
        let half = [Half::F16, Half::Bf16][case % 2];
        let (dim, block) = ([64, 80, 128, 256][case % 4], [16, 32, 64][case % 3]);
        let (heads, blocks, slots) = (2, 5, 7);
        let strides = [heads * block * dim, block * dim, dim, heads * 2 * dim + 8, 2 * dim];
        let mut keys = vec![NAN; blocks * strides[0]];
        let mut items = Vec::new();
        for page in 0..blocks {
            for head in 0..heads {
                let first = random.below(block);
                let rows = random.within(1, block - first);
                items.push([page, head, first, rows, (page * 3 + 1) % slots].map(|x| x as u32));
                for row in first..first + rows {
                    let at = page * strides[0] + head * strides[1] + row * strides[2];
                    keys[at..at + dim].fill_with(|| half.bits(random.normal()));
                    // Maxima pass over what is no number.
                    if row > first && random.chance(10) {
                        keys[at + random.below(dim)] = NAN;
                    }
                }
            }
        }
        let mut bounds = vec![NAN; slots * strides[3]];
        let params = QuestBounds {
            k: keys.as_ptr(),
            bounds: bounds.as_mut_ptr(),
            items: items.as_ptr(),
            strides: strides.map(|x| x as i64),
            num_items: items.len() as u32,
            dim: dim as u32,
        };
        let name = format!("kvm_quest_bounds_{}", half.name());
        let grid = Grid { ctas: 1 + case % 2, threads: 256, smem: 0, seed: case as u32 };
        kernels.launch(&name, &params, grid).unwrap();
        let mut expected = vec![NAN; bounds.len()];
        for [page, head, first, rows, slot] in items.iter().map(|x| x.map(|x| x as usize)) {
            for d in 0..dim {
                let key = |row: usize| {
                    let at = page * strides[0] + head * strides[1] + row * strides[2] + d;
                    half.value(keys[at]) as f32
                };
                let values = (first..first + rows).map(key);
                let high = values.clone().fold(f32::NEG_INFINITY, f32::max);
                let low = values.fold(f32::INFINITY, f32::min);
                let at = slot * strides[3] + head * strides[4] + d;
                expected[at] = Half::F16.bits(high);
                expected[at + dim] = Half::F16.bits(low);
            }
        }
        // The two zeros are equal.
        let is_same = |(a, b): (&u16, &u16)| a == b || (a | b) == 1 << 15;
        assert!(bounds.iter().zip(&expected).all(is_same), "{name} {dim} {block}");
    }
}

/// `KvmQuest` of the kernels; an item is token, head, first slot, begin, end, score.
#[repr(C)]
struct Quest {
    q: *const u16,
    bounds: *const u16,
    slots: *const u32,
    scores: *mut f32,
    items: *const [u32; 6],
    /// Token, head of Q; slot, head of the bounds.
    strides: [i64; 4],
    num_items: u32,
    group: u32,
    dim: u32,
}

#[test]
fn scores_are_the_largest_bound_of_the_group() {
    let Some(kernels) = score_kernels() else { return };
    let mut random = Random(2);
    for case in 0..12 {
        let half = [Half::F16, Half::Bf16][case % 2];
        let (dim, group) = ([64, 128, 256][case % 3], [1, 4, 5, 8, 9, 16][case % 6]);
        let (heads, lens) = (2, [0usize, 1, 15, 16, 17, 130]);
        let tokens = lens.len() / heads;
        let total: usize = lens.iter().sum();
        let strides = [heads * group * dim + 8, dim, heads * 2 * dim, 2 * dim].map(|x| x as i64);
        let q = random.normals(tokens * strides[0] as usize);
        let mut q: Vec<u16> = q.into_iter().map(|x| half.bits(x)).collect();
        q[3] = NAN; // counts as 0
        let mut slots: Vec<u32> = (0..total as u32 + 4).collect();
        for i in (1..slots.len()).rev() {
            slots.swap(i, random.below(i + 1));
        }
        let mut bounds = vec![NAN; slots.len() * strides[2] as usize];
        let (mut items, mut first) = (Vec::new(), 0);
        for (i, len) in lens.into_iter().enumerate() {
            for slot in &slots[first..first + len] {
                let at = *slot as usize * strides[2] as usize + i % heads * 2 * dim;
                for d in 0..dim {
                    let (a, b) = (random.normal(), random.normal());
                    bounds[at + d] = Half::F16.bits(a.max(b));
                    bounds[at + dim + d] = Half::F16.bits(a.min(b));
                }
            }
            for (begin, end) in [(0, len / 3), (len / 3, len)] {
                let item = [i / heads, i % heads, first, begin, end, first + i];
                items.push(item.map(|x| x as u32));
            }
            first += len;
        }
        let mut scores = vec![f32::NAN; total + lens.len()];
        let params = Quest {
            q: q.as_ptr(),
            bounds: bounds.as_ptr(),
            slots: slots.as_ptr(),
            scores: scores.as_mut_ptr(),
            items: items.as_ptr(),
            strides,
            num_items: items.len() as u32,
            group: group as u32,
            dim: dim as u32,
        };
        let g = [4, 8, 16].into_iter().find(|g| *g >= group).unwrap();
        let name = format!("kvm_quest_score_{}_g{g}", half.name());
        let grid = Grid { ctas: 3, threads: 128, smem: 8 * g * dim, seed: case as u32 };
        kernels.launch(&name, &params, grid).unwrap();
        for [token, head, first, begin, end, score] in items.iter().map(|x| x.map(|x| x as usize)) {
            for block in begin..end {
                let at = slots[first + block] as usize * strides[2] as usize + head * 2 * dim;
                let bound = |g: usize| -> f64 {
                    let query = &q[token * strides[0] as usize + (head * group + g) * dim..][..dim];
                    let channel = |(d, q): (usize, &u16)| {
                        let q = half.value(*q);
                        let q = if q.is_nan() { 0.0 } else { q };
                        let side = |at: usize| q * Half::F16.value(bounds[at]);
                        side(at + d).max(side(at + dim + d))
                    };
                    query.iter().enumerate().map(channel).sum()
                };
                let expected = (0..group).map(bound).fold(f64::NEG_INFINITY, f64::max);
                let found = f64::from(scores[score + block]);
                assert!((found - expected).abs() < 1e-5 * expected.abs(), "{found} {expected}");
            }
        }
        assert_eq!(scores.iter().filter(|x| x.is_nan()).count(), lens.len(), "{name}: too many");
    }
}

/// `KvmTopk` of the kernels; an item is score, begin, end, blocks, k, first page, list.
#[repr(C)]
struct Topk {
    scores: *const f32,
    pages: *const u32,
    blocks: *mut u32,
    list_pages: *mut u32,
    items: *const [u32; 7],
    num_items: u32,
}

/// As the library ranks on the CPU: NaN below everything, zeros equal.
fn ordered(x: f32) -> u32 {
    let bits = (x + 0.0).to_bits();
    if x.is_nan() {
        0
    } else if bits >> 31 == 1 {
        !bits
    } else {
        bits | 1 << 31
    }
}

#[test]
fn lists_are_those_of_a_sort() {
    let Some(kernels) = score_kernels() else { return };
    let mut random = Random(3);
    let odd = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e-40, -1e-40];
    let (mut scores, mut pages, mut items) = (Vec::new(), Vec::new(), Vec::new());
    let (mut expected, mut list) = (Vec::new(), 0);
    for (case, n) in [1usize, 2, 15, 16, 17, 511, 512, 513, 2000].into_iter().enumerate() {
        for k in [1, 2, n / 3, n - 1, n, n + 5].into_iter().filter(|k| *k > 0) {
            let (begin, tail) = (random.below(4), random.below(600 / (case + 1)));
            let num_blocks = begin + n + tail;
            let (first, first_page) = (scores.len(), pages.len());
            let style = random.below(4);
            scores.extend((0..num_blocks).map(|_| match style {
                0 => random.normal(),
                1 => random.below(3) as f32,
                2 => random.pick(&odd),
                _ => 1.0 + random.below(1 << 20) as f32 * 1e-8,
            }));
            pages.extend((0..num_blocks).map(|_| random.next() as u32));
            let end = begin + n;
            let item = [first, begin, end, num_blocks, k, first_page, list];
            items.push(item.map(|x| x as u32));
            let mut best: Vec<usize> = (begin..end).collect();
            best.sort_by_key(|i| (Reverse(ordered(scores[first + i])), *i));
            best.truncate(k);
            best.sort_unstable();
            let all: Vec<usize> = (0..begin).chain(best).chain(end..num_blocks).collect();
            list += all.len();
            expected.extend(all.iter().map(|i| (*i as u32, pages[first_page + i])));
        }
    }
    let mut blocks = vec![u32::MAX; list + 1];
    let mut list_pages = vec![u32::MAX; list + 1];
    let mut params = Topk {
        scores: scores.as_ptr(),
        pages: pages.as_ptr(),
        blocks: blocks.as_mut_ptr(),
        list_pages: list_pages.as_mut_ptr(),
        items: items.as_ptr(),
        num_items: items.len() as u32,
    };
    let grid = Grid { ctas: 3, threads: 512, smem: 1032, seed: 1 };
    kernels.launch("kvm_topk", &params, grid).unwrap();
    let found: Vec<(u32, u32)> = blocks.iter().copied().zip(list_pages.iter().copied()).collect();
    assert!(found[..list] == expected, "lists differ");
    assert_eq!(found[list], (u32::MAX, u32::MAX));
    let before = blocks.clone();
    (params.list_pages, params.pages) = (ptr::null_mut(), ptr::null());
    params.num_items = 20;
    kernels.launch("kvm_topk", &params, grid).unwrap();
    assert!(blocks == before);
}
