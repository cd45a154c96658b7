//! Attention over prompts and pieces of prompts, on the CPU against attention in f64. What the kernel
//! must not read is NaN.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(unsafe_code, reason = "calls kernels as a driver does")]

mod common;
#[path = "common/emulator.rs"]
mod emulator;

use common::Random;
use emulator::{Grid, Half, Kernels, address, address_mut};
use kvmgr::device::cuda::params::{Decode, Item};

const SOURCE: &str = "prefill.cu";
const NAN: u16 = 0x7fff;
const KV_HEADS: usize = 2;
const CTAS: usize = 3;

#[derive(Debug, Clone, Copy)]
struct Case {
    half: Half,
    dim: usize,
    group: usize,
    block: usize,
    window: usize,
    softcap: f64,
    has_sinks: bool,
    /// Only these rows of K and V take part.
    rows: (usize, usize),
}

const PLAIN: Case = Case {
    half: Half::Bf16,
    dim: 128,
    group: 4,
    block: 16,
    window: 0,
    softcap: 0.0,
    has_sinks: false,
    rows: (0, usize::MAX),
};

/// First query, queries, KV head, first page, length.
type Head = [usize; 5];

/// A batch: queries are the last tokens of ragged sequences.
struct World {
    case: Case,
    heads: Vec<Head>,
    pages: Vec<u32>,
    q: Vec<u16>,
    pools: [Vec<u16>; 2],
    /// What is in the pools.
    values: [Vec<f64>; 2],
    sinks: Vec<f32>,
    tokens: usize,
    /// Token, head of Q; token, head of O; token of LSE; block, head, row of K and V; none.
    strides: [usize; 10],
}

impl World {
    fn new(case: Case, sequences: &[(usize, usize)], random: &mut Random) -> Self {
        let Case { half, dim, group, block, .. } = case;
        let (mut heads, mut pages, mut tokens) = (Vec::new(), Vec::new(), 0);
        for (len, queries) in sequences.iter().copied() {
            for head in 0..KV_HEADS {
                heads.push([tokens, queries, head, pages.len(), len]);
                pages.resize(pages.len() + len.div_ceil(block), 0);
            }
            tokens += queries;
        }
        let mut free: Vec<u32> = (0..pages.len() as u32 + 2).collect();
        pages.fill_with(|| free.swap_remove(random.below(free.len())));
        let (q_heads, row) = (KV_HEADS * group, dim + 8);
        let [q_token, o_token] = [q_heads * row + 8, q_heads * dim];
        let by_block = KV_HEADS * block * row;
        let strides =
            [q_token, row, o_token, dim, q_heads + 1, by_block, row, KV_HEADS * row, 0, 0];
        let q = random.normals(tokens * q_token);
        let mut world = Self {
            case,
            q: q.into_iter().map(|x| half.bits(x)).collect(),
            pools: [(); 2].map(|()| vec![NAN; (pages.len() + 2) * by_block]),
            values: [Vec::new(), Vec::new()],
            sinks: random.normals(q_heads),
            heads,
            pages,
            tokens,
            strides,
        };
        for head in world.heads.clone() {
            for t in case.rows.0..case.rows.1.min(head[4]) {
                let at = world.row_at(head, t);
                for pool in &mut world.pools {
                    pool[at..at + dim].fill_with(|| half.bits(random.normal()));
                }
            }
        }
        world.values =
            world.pools.each_ref().map(|pool| pool.iter().map(|x| half.value(*x)).collect());
        world
    }

    fn row_at(&self, head: Head, t: usize) -> usize {
        let page = self.pages[head[3] + t / self.case.block] as usize;
        page * self.strides[5] + head[2] * self.strides[6] + t % self.case.block * self.strides[7]
    }

    /// Tiles of the queries of each head, dealt out to the CTAs.
    fn items(&self) -> Vec<Item> {
        let tile = if self.case.dim == 256 { 64 } else { 128 } / self.case.group;
        let mut items = Vec::new();
        for [token, queries, kv_head, first_page, len] in self.heads.iter().copied() {
            for first in (0..queries).step_by(tile) {
                let count = tile.min(queries - first);
                let (begin, end) = (self.case.rows.0.min(len), self.case.rows.1.min(len));
                let seen = (len + first + count).saturating_sub(queries);
                let item = [token + first, count, kv_head, first_page, seen, begin, end];
                let [token, num_queries, kv_head, first_page, len, begin, end] =
                    item.map(|x| x as u32);
                let next = (items.len() + CTAS) as u32;
                items.push(Item {
                    token,
                    num_queries,
                    kv_head,
                    first_page,
                    len,
                    begin,
                    end,
                    num_parts: 1,
                    next,
                    ..Item::default()
                });
            }
        }
        items.resize(items.len().max(CTAS), Item::default());
        let count = items.len();
        items[count - CTAS..].iter_mut().for_each(|item| item.next = 0);
        items
    }

    fn run(&self, kernels: Kernels, seed: u32) -> Result<(Vec<u16>, Vec<f32>), String> {
        let Case { half, dim, group, block, window, softcap, has_sinks, .. } = self.case;
        // A kernel with a mistake may write some tokens too far.
        let tokens = self.tokens + 128;
        let mut o = vec![NAN; tokens * self.strides[2]];
        let mut lse = vec![f32::NAN; tokens * self.strides[4]];
        let items = self.items();
        let [q_token, q_head, o_token, o_head, lse_token, kv_block, kv_head, kv_token, _, _] =
            self.strides.map(|x| x as i64);
        let params = Decode {
            q: address(&self.q),
            o: address_mut(&mut o),
            lse: address_mut(&mut lse),
            sinks: if has_sinks { address(&self.sinks) } else { 0 },
            pages: address(&self.pages),
            items: address(&items),
            k: address(&self.pools[0]),
            v: address(&self.pools[1]),
            q_token,
            q_head,
            o_token,
            o_head,
            lse_token,
            kv_block,
            kv_head,
            kv_token,
            scale: 1.0 / (dim as f32).sqrt(),
            softcap: softcap as f32,
            window: window as u32,
            group: group as u32,
            block_size: block as u32,
            ..Decode::default()
        };
        let name = format!("kvm_prefill_{}_d{dim}", half.name());
        let smem = if dim == 256 { 256 } else { 512 } * dim + 64;
        kernels.launch(&name, &params, Grid { ctas: CTAS, threads: 128, smem, seed })?;
        Ok((o, lse))
    }

    /// Output and LSE of one query head.
    fn attend(&self, head: Head, query: usize, g: usize) -> (Vec<f64>, f64) {
        let Case { half, dim, group, window, softcap, has_sinks, rows, .. } = self.case;
        let q_head = head[2] * group + g;
        let at = (head[0] + query) * self.strides[0] + q_head * self.strides[1];
        let q: Vec<f64> = self.q[at..at + dim].iter().map(|x| half.value(*x)).collect();
        let len = (head[4] + query + 1).saturating_sub(head[1]);
        let first = if window > 0 { len.saturating_sub(window) } else { 0 };
        let seen = first.max(rows.0)..len.min(rows.1);
        let logits: Vec<f64> = seen
            .clone()
            .map(|t| {
                let key = &self.values[0][self.row_at(head, t)..][..dim];
                let dot: f64 = q.iter().zip(key).map(|(a, b)| a * b).sum();
                let x = dot / (dim as f64).sqrt();
                if softcap > 0.0 { softcap * (x / softcap).tanh() } else { x }
            })
            .collect();
        let sink = if has_sinks { f64::from(self.sinks[q_head]).exp() } else { 0.0 };
        let sum = logits.iter().map(|x| x.exp()).sum::<f64>() + sink;
        let mut out = vec![0.0; dim];
        for (t, x) in seen.zip(&logits) {
            let row = self.row_at(head, t);
            let (weight, value) = (x.exp() / sum, &self.values[1][row..row + dim]);
            out.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
        }
        (out, sum.ln())
    }

    /// Relative error of O and the largest of LSE; infinite if the emulator saw something forbidden.
    fn error(&self, kernels: Kernels, seed: u32) -> (f64, f64) {
        let (o, lse) = match self.run(kernels, seed) {
            Ok(found) => found,
            Err(error) => {
                eprintln!("{error}");
                return (f64::INFINITY, f64::INFINITY);
            }
        };
        let (mut difference, mut norm, mut worst) = (0.0, 0.0, 0.0f64);
        let Case { half, dim, group, .. } = self.case;
        for head in &self.heads {
            for (query, g) in (0..head[1]).flat_map(|query| (0..group).map(move |g| (query, g))) {
                let (expected, expected_lse) = self.attend(*head, query, g);
                let (token, q_head) = (head[0] + query, head[2] * group + g);
                let row = &o[token * self.strides[2] + q_head * self.strides[3]..][..dim];
                for (found, expected) in row.iter().zip(&expected) {
                    difference += (half.value(*found) - expected).powi(2);
                    norm += expected.powi(2);
                }
                let found = f64::from(lse[token * self.strides[4] + q_head]);
                if found.to_bits() != expected_lse.to_bits() {
                    let error = (found - expected_lse).abs();
                    worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
                }
            }
        }
        let error = (difference / norm).sqrt();
        (if error.is_nan() { f64::INFINITY } else { error }, worst)
    }
}

#[test]
fn prompts_match_attention_in_f64() {
    let Some(kernels) = Kernels::build(SOURCE) else { return };
    let mut random = Random(1);
    let mut cases = Vec::new();
    for (i, group) in [1, 2, 3, 4, 5, 7, 8, 16].into_iter().enumerate() {
        let (dim, block) = ([64, 128, 256][i % 3], [16, 32, 64][i / 2 % 3]);
        let half = [Half::F16, Half::Bf16][i % 2];
        cases.push(Case { half, dim, group, block, ..PLAIN });
    }
    cases.push(Case { window: 20, ..PLAIN });
    cases.push(Case { window: 70, group: 1, dim: 64, has_sinks: true, ..PLAIN });
    cases.push(Case { softcap: 2.0, half: Half::F16, ..PLAIN });
    cases.push(Case { has_sinks: true, dim: 256, block: 64, ..PLAIN });
    cases.push(Case { rows: (32, 90), block: 32, ..PLAIN });
    for (i, case) in cases.into_iter().enumerate() {
        // Whole prompts, then pieces of prompts behind what is cached.
        let mut sequences = vec![(0, 1), (1, 1), (15, 15), (16, 16), (17, 17), (130, 5), (200, 40)];
        if case.group <= 2 {
            sequences.push((150, 150));
        }
        let world = World::new(case, &sequences, &mut random);
        let (error, lse) = world.error(kernels, i as u32);
        assert!(error < case.half.limit() && lse < 1e-3, "{case:?}: O {error:e}, LSE {lse:e}");
    }
}

/// Each mistake must show in one of a few runs with other orders of the threads.
#[test]
fn the_emulator_notices_missing_barriers_and_waits() {
    let mutations = [
        ("kvm_cp_wait<0>();\n        kvm_sync(); // K has landed", "kvm_sync(); // K has landed"),
        ("kvm_cp_wait<0>();\n        kvm_sync(); // V has landed", "kvm_sync(); // V has landed"),
        ("kvm_sync(); // K has landed", "// K has landed"),
        ("kvm_sync(); // V has landed", "// V has landed"),
        ("kvm_sync(); // Q has landed", "// Q has landed"),
        ("kvm_sync(); // nobody needs", "// nobody needs"),
    ];
    let world = World::new(PLAIN, &[(0, 32), (100, 40)], &mut Random(2));
    for (from, to) in mutations {
        let only = ("KVM_PREFILL(", "kvm_prefill_bf16_d128");
        let Some(kernels) = Kernels::build_mutated(SOURCE, (from, to), only) else { return };
        let is_seen = (1..=6).any(|seed| {
            let (error, lse) = world.error(kernels, seed);
            error > PLAIN.half.limit() || lse > 1e-3
        });
        assert!(is_seen, "without {from} nothing went wrong");
    }
}
