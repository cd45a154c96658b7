//! Kernels that choose blocks and observe queries, on the CPU against the obvious way. What a kernel must not read is NaN.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(unsafe_code, reason = "calls kernels as a driver does")]

mod common;
#[path = "common/emulator.rs"]
mod emulator;

use std::cmp::Reverse;
use std::ptr;
use std::sync::OnceLock;

use common::Random;
use emulator::{Grid, Half, Kernels, address, address_mut};
use kvmgr::device::cuda::params::{Seen, SeenItem};

const NAN: u16 = 0x7fff;

fn score_kernels() -> Option<Kernels> {
    static KERNELS: OnceLock<Option<Kernels>> = OnceLock::new();
    *KERNELS.get_or_init(|| Kernels::build("score.cu"))
}

/// `KvmQuestBounds` of the kernels; a block is page and slot.
#[repr(C)]
struct QuestBounds {
    k: *const u16,
    bounds: *mut u16,
    cell: i64,
    num_blocks: u32,
    num_cells: u32,
    block_size: u32,
    dim: u32,
    blocks: [[u32; 2]; 500],
}

#[test]
fn bounds_are_the_least_and_the_most_of_each_channel() {
    let Some(kernels) = score_kernels() else { return };
    let mut random = Random(1);
    for case in 0..12 {
        let half = [Half::F16, Half::Bf16][case % 2];
        let (dim, block) = ([64, 80, 128, 256][case % 4], [16, 32, 64][case % 3]);
        let (cells, blocks, slots) = (2usize, 5usize, 7);
        // Keys, and as much behind them that is not read, to the start of a page.
        let cell = block * dim + 8;
        let stride = (cells * cell).next_multiple_of(128);
        let mut keys = vec![NAN; blocks * stride];
        let mut params = QuestBounds {
            k: keys.as_ptr(),
            bounds: ptr::null_mut(),
            cell: cell as i64,
            num_blocks: blocks as u32,
            num_cells: cells as u32,
            block_size: block as u32,
            dim: dim as u32,
            blocks: [[u32::MAX; 2]; 500],
        };
        for page in 0..blocks {
            params.blocks[page] = [page * stride / 128, (page * 3 + 1) % slots].map(|x| x as u32);
            for row in 0..cells * block {
                let at = page * stride + row / block * cell + row % block * dim;
                keys[at..at + dim].fill_with(|| half.bits(random.normal()));
                // Maxima pass over what is no number.
                if row % block > 0 && random.chance(10) {
                    keys[at + random.below(dim)] = NAN;
                }
                if random.chance(10) {
                    let huge = random.pick(&[1e6, -1e6, f32::INFINITY, f32::NEG_INFINITY]);
                    keys[at + random.below(dim)] = half.bits(huge);
                }
            }
        }
        let mut bounds = vec![NAN; slots * cells * 2 * dim];
        params.bounds = bounds.as_mut_ptr();
        let name = format!("kvm_quest_bounds_{}", half.name());
        let grid = Grid { ctas: 1 + case % 2, threads: 256, smem: 0, seed: case as u32 };
        kernels.launch(&name, &params, grid).unwrap();
        let mut expected = vec![NAN; bounds.len()];
        for (page, i) in (0..blocks).flat_map(|page| (0..cells).map(move |i| (page, i))) {
            let slot = params.blocks[page][1] as usize;
            for d in 0..dim {
                let key =
                    |row: usize| half.value(keys[page * stride + i * cell + row * dim + d]) as f32;
                let values = (0..block).map(key);
                let high = values.clone().fold(f32::NEG_INFINITY, f32::max);
                let low = values.fold(f32::INFINITY, f32::min);
                let at = (slot * cells + i) * 2 * dim + d;
                // Infinity times 0 would be no number.
                expected[at] = Half::F16.bits(high.clamp(-65504.0, 65504.0));
                expected[at + dim] = Half::F16.bits(low.clamp(-65504.0, 65504.0));
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
        items.push([0; 6]); // nothing to do
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
    items.insert(7, [0; 7]); // no list
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

/// Queries of some heads over paged keys of ragged lengths.
struct World {
    half: Half,
    dim: usize,
    group: usize,
    block: usize,
    window: usize,
    softcap: f64,
    q: Vec<u16>,
    keys: Vec<u16>,
    pages: Vec<u32>,
    lse: Vec<f32>,
    /// First query, queries, head, first page, length.
    heads: Vec<[usize; 5]>,
    strides: [i64; 6],
}

const KV_HEADS: usize = 2;

impl World {
    fn new(random: &mut Random, case: usize) -> Self {
        let half = [Half::F16, Half::Bf16][case % 2];
        let (dim, group) = ([64, 128, 256][case % 3], [1, 4, 5, 7, 8][case % 5]);
        let block = [16, 32, 64][case / 2 % 3];
        let (mut heads, mut pages, mut token) = (Vec::new(), Vec::new(), 0);
        for (len, queries) in [(1, 1), (15, 3), (16, 8), (17, 17), (200, 9), (135, 40)] {
            for head in 0..KV_HEADS {
                heads.push([token, queries, head, pages.len(), len + head]);
                pages.resize(pages.len() + (len + head).div_ceil(block), 0);
            }
            token += queries;
        }
        let mut free: Vec<u32> = (0..pages.len() as u32 + 2).collect();
        pages.fill_with(|| free.swap_remove(random.below(free.len())));
        let q_heads = KV_HEADS * group;
        let row = dim + 8;
        let strides =
            [q_heads * row, row, q_heads + 1, KV_HEADS * block * row, row, KV_HEADS * row];
        let mut q = random.normals(token * strides[0]);
        q.iter_mut().for_each(|x| *x *= 1.5);
        let mut world = Self {
            half,
            dim,
            group,
            block,
            window: [0, 0, 10][case % 3],
            softcap: [0.0, 2.0][case / 3 % 2],
            q: q.into_iter().map(|x| half.bits(x)).collect(),
            keys: vec![NAN; (pages.len() + 2) * strides[3]],
            pages,
            lse: vec![f32::NAN; token * strides[2]],
            heads,
            strides: strides.map(|x| x as i64),
        };
        for head in world.heads.clone() {
            for t in Self::first(head)..head[4] {
                let at = world.key_at(head, t);
                world.keys[at..at + dim].fill_with(|| half.bits(random.normal()));
            }
            for (query, g) in (0..head[1]).flat_map(|query| (0..group).map(move |g| (query, g))) {
                let sum: f64 = world.logits(head, query, g).iter().map(|x| x.exp()).sum();
                let at = (head[0] + query) * strides[2] + head[2] * group + g;
                world.lse[at] = sum.ln() as f32;
            }
        }
        world
    }

    /// Rows of a head that are evicted from its first block.
    fn first(head: [usize; 5]) -> usize {
        if head[4] > 100 { 5 } else { 0 }
    }

    fn key_at(&self, head: [usize; 5], t: usize) -> usize {
        let page = self.pages[head[3] + t / self.block] as usize;
        let [_, _, _, block, by_head, row] = self.strides.map(|x| x as usize);
        page * block + head[2] * by_head + t % self.block * row
    }

    /// Logits of all rows of a head, -inf where the query sees none.
    fn logits(&self, head: [usize; 5], query: usize, g: usize) -> Vec<f64> {
        let at = (head[0] + query) * self.strides[0] as usize
            + (head[2] * self.group + g) * self.strides[1] as usize;
        let end = (head[4] + query + 1).saturating_sub(head[1]);
        let begin = if self.window > 0 { end.saturating_sub(self.window) } else { 0 };
        let logit = |t: usize| {
            if t < begin.max(Self::first(head)) || t >= end {
                return f64::NEG_INFINITY;
            }
            let key = &self.keys[self.key_at(head, t)..][..self.dim];
            let products = self.q[at..at + self.dim].iter().zip(key);
            let dot: f64 = products.map(|(a, b)| self.half.value(*a) * self.half.value(*b)).sum();
            let x = dot / (self.dim as f64).sqrt();
            if self.softcap > 0.0 { self.softcap * (x / self.softcap).tanh() } else { x }
        };
        (0..head[4]).map(logit).collect()
    }

    /// What all queries of a query head give each row.
    fn received(&self, head: [usize; 5], g: usize) -> Vec<f64> {
        let mut sums = vec![0.0; head[4]];
        for query in 0..head[1] {
            let lse =
                self.lse[(head[0] + query) * self.strides[2] as usize + head[2] * self.group + g];
            let logits = self.logits(head, query, g);
            sums.iter_mut().zip(logits).for_each(|(sum, x)| *sum += (x - f64::from(lse)).exp());
        }
        sums
    }

    /// Runs `kvm_<name>` over `rows` of each head, in two parts, into sums `sum_head` apart.
    fn run(&self, kernels: Kernels, name: &str, sum_head: usize, sums: &mut [f32], seed: u32) {
        let mut items = Vec::new();
        for (i, [token, queries, head, first_page, len]) in self.heads.iter().copied().enumerate() {
            let cut = len / 2 / 16 * 16;
            let [token, queries, head, first_page] =
                [token, queries, head, first_page].map(|x| x as u32);
            for (begin, end) in [(0, cut), (cut, len), (cut, cut)] {
                items.push(SeenItem {
                    // Of layer 0; the launch is that of layer 2.
                    sums: address_mut(&mut sums[i * self.group * sum_head..]).wrapping_sub(4 * 14),
                    token,
                    num_queries: queries,
                    kv_head: head,
                    first_page,
                    len: len as u32,
                    begin: begin as u32,
                    end: end as u32,
                    first: Self::first([0, 0, 0, 0, len]) as u32,
                    sum_head: sum_head as u32,
                    sum_layer: 7,
                });
            }
        }
        let [q_token, q_head, lse_token, kv_block, kv_head, kv_token] = self.strides;
        let params = Seen {
            q: address(&self.q),
            lse: address(&self.lse),
            pages: address(&self.pages),
            k: address(&self.keys),
            items: address(&items),
            q_token,
            q_head,
            lse_token,
            kv_block,
            kv_head,
            kv_token,
            scale: 1.0 / (self.dim as f32).sqrt(),
            softcap: self.softcap as f32,
            window: self.window as u32,
            num_items: items.len() as u32,
            group: self.group as u32,
            block_size: self.block as u32,
            layer: 2,
        };
        let name = format!("kvm_{name}_{}_d{}", self.half.name(), self.dim);
        let smem = if self.dim == 256 { 384 } else { 512 } * self.dim + 1536;
        kernels.launch(&name, &params, Grid { ctas: 5, threads: 128, smem, seed }).unwrap();
    }
}

#[test]
fn what_rows_receive_is_exp_of_logit_less_lse() {
    let Some(kernels) = Kernels::build("obs.cu") else { return };
    let mut random = Random(4);
    for case in 0..6 {
        let world = World::new(&mut random, case);
        let sum_head = 202;
        let len = world.heads.len() * world.group * sum_head;
        let mut window = vec![f32::NAN; len];
        world.run(kernels, "window", sum_head, &mut window, case as u32);
        let mut received = vec![0.0f32; len];
        for seed in 0..2 {
            world.run(kernels, "received", sum_head, &mut received, seed);
        }
        for (i, head) in world.heads.iter().enumerate() {
            let first = i * world.group * sum_head;
            let mut total = vec![0.0; head[4]];
            for g in 0..world.group {
                let expected = world.received(*head, g);
                let evicted = World::first(*head);
                let sums = &window[first + g * sum_head..];
                assert!(sums[..evicted].iter().all(|x| x.is_nan()), "{case}: evicted rows");
                for (t, expected) in expected.iter().enumerate().skip(evicted) {
                    let found = f64::from(sums[t]);
                    let error = (found - expected).abs();
                    assert!(
                        error < 1e-4 * expected.max(1e-3),
                        "{case} {i} {t}: {found} {expected}"
                    );
                    total[t] += 2.0 * expected;
                }
                let after = window[first + g * sum_head + head[4]];
                assert!(after.is_nan(), "{case}: writes behind the last row");
            }
            for (t, expected) in total.iter().enumerate() {
                let found = f64::from(received[first + t]);
                let error = (found - expected).abs();
                assert!(error < 1e-4 * expected.max(1e-3), "{case} {i} {t}: {found} {expected}");
            }
            assert_eq!(received[first + head[4]], 0.0);
        }
    }
}

/// `KvmWindowPool` of the kernels; an item is sum, from head to head, queries, old, begin, end, score.
#[repr(C)]
struct WindowPool {
    sums: *const f32,
    scores: *mut f32,
    items: *const [u32; 7],
    num_items: u32,
    group: u32,
    kernel: u32,
    max_pool: u32,
    max_agg: u32,
}

#[test]
fn pooled_scores_are_those_of_snapkv() {
    let Some(kernels) = Kernels::build("obs.cu") else { return };
    let mut random = Random(5);
    for case in 0..8 {
        let (max_pool, max_agg) = (case % 2 == 1, case / 2 % 2 == 1);
        let (group, kernel, queries) = (random.within(1, 8), [1, 5, 7, 255][case / 2], 1 + case);
        let (sum_head, lens) = (400, [1usize, 2, 15, 16, 17, 300]);
        let sums: Vec<f32> =
            random.normals(lens.len() * group * sum_head).iter().map(|x| x.abs()).collect();
        let mut scores = vec![f32::NAN; lens.len() * sum_head];
        let mut items = Vec::new();
        for (i, old) in lens.iter().copied().enumerate() {
            for (begin, end) in [(0, old / 3), (old / 3, old)] {
                let item = [i * group * sum_head, sum_head, queries, old, begin, end, i * sum_head];
                items.push(item.map(|x| x as u32));
            }
        }
        let params = WindowPool {
            sums: sums.as_ptr(),
            scores: scores.as_mut_ptr(),
            items: items.as_ptr(),
            num_items: items.len() as u32,
            group: group as u32,
            kernel: kernel as u32,
            max_pool: max_pool.into(),
            max_agg: max_agg.into(),
        };
        let grid = Grid { ctas: 3, threads: 256, smem: 0, seed: case as u32 };
        kernels.launch("kvm_window_pool", &params, grid).unwrap();
        for (i, old) in lens.iter().copied().enumerate() {
            for row in 0..old {
                let near = row.saturating_sub(kernel / 2)..(row + kernel / 2 + 1).min(old);
                let pooled = (0..group).map(|g| {
                    let sums = &sums[(i * group + g) * sum_head..];
                    let means = near.clone().map(|j| f64::from(sums[j]) / queries as f64);
                    match max_pool {
                        true => means.fold(f64::NEG_INFINITY, f64::max),
                        false => means.sum::<f64>() / kernel as f64,
                    }
                });
                let expected = match max_agg {
                    true => pooled.fold(f64::NEG_INFINITY, f64::max),
                    false => pooled.sum::<f64>() / group as f64,
                };
                let found = f64::from(scores[i * sum_head + row]);
                assert!((found - expected).abs() < 1e-5 * expected, "{case}: {found} {expected}");
            }
            assert!(scores[i * sum_head + old].is_nan());
        }
    }
}
