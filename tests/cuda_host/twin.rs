//! The same engine twice through the C ABI: with a cache in host memory and with one on the device.

use std::ffi::{CStr, CString, c_void};
use std::ptr;

use half::{bf16, f16};
use kvmgr::ffi::attention::*;
use kvmgr::ffi::cache::*;
use kvmgr::ffi::policy::*;
use kvmgr::ffi::sequence::*;
use kvmgr::ffi::types::*;
use kvmgr::ffi::version::*;

use crate::common::Random;
use crate::driver::Buffer;

pub fn message() -> String {
    // SAFETY: the library's buffer ends in NUL.
    unsafe { CStr::from_ptr(kvmgr_last_error_message()) }.to_string_lossy().into_owned()
}

#[track_caller]
pub fn ok(status: kvmgr_status) {
    assert_eq!(status, KVMGR_OK, "{}", message());
}

/// A model and how it is cached.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    pub layers: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub dim: usize,
    pub block: usize,
    pub blocks: usize,
    pub lanes: kvmgr_lane_width,
    pub dtype: kvmgr_dtype,
    pub spec: &'static str,
    /// Softcap and sliding window of odd layers, and sinks in all.
    pub softcap: f32,
    pub window: u32,
    pub has_sinks: bool,
    /// Whether prefixes are shared.
    pub has_prefix: bool,
    /// Of the logits of odd layers; 0 for the usual.
    pub scale: f32,
}

pub const PLAIN: Setup = Setup {
    layers: 2,
    kv_heads: 2,
    group: 4,
    dim: 64,
    block: 16,
    blocks: 400,
    lanes: KVMGR_LANE_SEQUENCE,
    dtype: KVMGR_DTYPE_F16,
    spec: "full",
    softcap: 0.0,
    window: 0,
    has_sinks: false,
    has_prefix: true,
    scale: 0.0,
};

impl Setup {
    pub fn bits(&self, x: f32) -> u16 {
        match self.dtype {
            KVMGR_DTYPE_F16 => f16::from_f32(x).to_bits(),
            _ => bf16::from_f32(x).to_bits(),
        }
    }

    pub fn value(&self, bits: u16) -> f32 {
        match self.dtype {
            KVMGR_DTYPE_F16 => f16::from_bits(bits).to_f32(),
            _ => bf16::from_bits(bits).to_f32(),
        }
    }

    pub fn random(&self, random: &mut Random, n: usize) -> Vec<u16> {
        random.normals(n).into_iter().map(|x| self.bits(x)).collect()
    }

    /// The configuration; `body` gets it while its strings live.
    pub fn config<T>(&self, body: impl FnOnce(kvmgr_cache_config) -> T) -> T {
        let spec = CString::new(self.spec).unwrap();
        // SAFETY: all bytes zero are a valid configuration.
        let mut config: kvmgr_cache_config = unsafe { std::mem::zeroed() };
        config.struct_size = size_of::<kvmgr_cache_config>();
        config.num_layers = self.layers as u32;
        config.num_q_heads = (self.kv_heads * self.group) as u32;
        config.num_kv_heads = self.kv_heads as u32;
        config.head_dim = self.dim as u32;
        config.block_size = self.block as u32;
        config.lane_width = self.lanes;
        config.dtype = self.dtype;
        config.num_blocks = self.blocks as u64;
        config.spec = spec.as_ptr();
        config.flags = if self.has_prefix { KVMGR_CACHE_PREFIX } else { 0 };
        body(config)
    }

    pub fn create(&self, edit: impl FnOnce(&mut kvmgr_cache_config)) -> *mut kvmgr_cache {
        self.config(|mut config| {
            edit(&mut config);
            let mut cache = ptr::null_mut();
            // SAFETY: a valid configuration and a place for a pointer.
            ok(unsafe { kvmgr_cache_create(&raw const config, &raw mut cache) });
            cache
        })
    }

    /// `[tokens, heads, dim]`, contiguous.
    pub fn tensor(
        &self,
        data: *mut c_void,
        tokens: usize,
        heads: usize,
        cuda: bool,
    ) -> kvmgr_tensor {
        kvmgr_tensor {
            data,
            dtype: self.dtype,
            ndim: 3,
            shape: [tokens as i64, heads as i64, self.dim as i64, 0],
            strides: [0; 4],
            device_type: if cuda { KVMGR_DEVICE_CUDA } else { KVMGR_DEVICE_CPU },
            device_id: 0,
        }
    }

    pub fn lse(&self, data: *mut c_void, tokens: usize, cuda: bool) -> kvmgr_tensor {
        let heads = self.kv_heads * self.group;
        let shape = [tokens as i64, heads as i64, 0, 0];
        kvmgr_tensor {
            dtype: KVMGR_DTYPE_F32,
            ndim: 2,
            shape,
            ..self.tensor(data, tokens, heads, cuda)
        }
    }
}

/// A cache with its attention.
#[derive(Debug)]
pub struct Engine {
    pub cache: *mut kvmgr_cache,
    pub attention: *mut kvmgr_attention,
}

impl Engine {
    pub fn new(cache: *mut kvmgr_cache) -> Self {
        let mut attention = ptr::null_mut();
        // SAFETY: a live handle and a place for a pointer.
        ok(unsafe { kvmgr_attention_create(cache, &raw mut attention) });
        Self { cache, attention }
    }

    /// A handle that has no memory yet.
    pub fn renew_attention(&mut self) {
        kvmgr_attention_destroy(self.attention);
        // SAFETY: a live handle and a place for a pointer.
        ok(unsafe { kvmgr_attention_create(self.cache, &raw mut self.attention) });
    }

    pub fn plan(&self, sequences: &[*mut kvmgr_sequence], counts: &[u32]) {
        // SAFETY: live handles and lists of this length.
        ok(unsafe {
            kvmgr_attention_plan(self.attention, sequences.as_ptr(), counts.as_ptr(), counts.len())
        });
    }

    pub fn stats(&self) -> kvmgr_cache_stats {
        let struct_size = size_of::<kvmgr_cache_stats>();
        let mut stats = kvmgr_cache_stats { struct_size, ..Default::default() };
        // SAFETY: a live handle and a struct of this size.
        ok(unsafe { kvmgr_cache_get_stats(self.cache, &raw mut stats) });
        stats
    }

    pub fn sequence(&self, policy: *const kvmgr_policy) -> *mut kvmgr_sequence {
        let mut sequence = ptr::null_mut();
        // SAFETY: live handles and a place for a pointer.
        ok(unsafe { kvmgr_cache_sequence_create(self.cache, policy, &raw mut sequence) });
        sequence
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        kvmgr_attention_destroy(self.attention);
        kvmgr_cache_release(self.cache);
    }
}

/// One sequence in both.
#[derive(Debug)]
pub struct Pair {
    pub host: *mut kvmgr_sequence,
    pub device: *mut kvmgr_sequence,
    pub tokens: Vec<i32>,
}

impl Pair {
    pub fn both(&self) -> [*mut kvmgr_sequence; 2] {
        [self.host, self.device]
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.both().into_iter().for_each(|sequence| kvmgr_sequence_destroy(sequence));
    }
}

/// Both engines, fed the same.
#[derive(Debug)]
pub struct Twin {
    pub setup: Setup,
    pub host: Engine,
    pub device: Engine,
    pub random: Random,
    /// The largest errors so far, of O (relative) and of LSE.
    pub worst: [f64; 2],
    /// How much larger errors may be than usual.
    pub slack: f64,
    /// Whether the engine wants to know the LSE of the device.
    pub asks_lse: bool,
}

impl Twin {
    pub fn new(setup: Setup, seed: u64, edit: impl FnOnce(&mut kvmgr_cache_config)) -> Self {
        Self::with(setup, seed, |_| {}, edit)
    }

    /// With changes to the configuration of the cache on the host, and of that on the device.
    pub fn with(
        setup: Setup,
        seed: u64,
        edit_host: impl FnOnce(&mut kvmgr_cache_config),
        edit: impl FnOnce(&mut kvmgr_cache_config),
    ) -> Self {
        let host = Engine::new(setup.create(edit_host));
        let device = Engine::new(setup.create(|config| {
            config.device_type = KVMGR_DEVICE_CUDA;
            edit(config);
        }));
        Self {
            setup,
            host,
            device,
            random: Random(seed),
            worst: [0.0; 2],
            slack: 1.0,
            asks_lse: true,
        }
    }

    /// A sequence for a prompt, and how many of its tokens the prefix index had.
    pub fn start(&self, prompt: &[i32]) -> (Pair, usize) {
        self.start_with(ptr::null(), prompt)
    }

    /// The same with a policy of its own.
    pub fn start_with(&self, policy: *const kvmgr_policy, prompt: &[i32]) -> (Pair, usize) {
        let (host, device) = (self.host.sequence(policy), self.device.sequence(policy));
        let mut pair = Pair { host, device, tokens: Vec::new() };
        self.match_prefix(&mut pair, prompt);
        let matched = pair.tokens.len();
        (pair, matched)
    }

    /// Gives an empty sequence what the prefix index has of a prompt.
    pub fn match_prefix(&self, pair: &mut Pair, prompt: &[i32]) {
        let matched = pair.both().map(|sequence| {
            let mut matched = 0;
            // SAFETY: a live handle, a list of this length, a place for a number.
            ok(unsafe {
                kvmgr_sequence_match_prefix(
                    sequence,
                    prompt.as_ptr(),
                    prompt.len(),
                    &raw mut matched,
                )
            });
            matched
        });
        assert_eq!(matched[0], matched[1], "the same prefixes are found");
        pair.tokens.extend_from_slice(&prompt[..matched[0]]);
    }

    pub fn fork(&self, parent: &Pair) -> Pair {
        let [host, device] = parent.both().map(|sequence| {
            let mut child = ptr::null_mut();
            // SAFETY: a live handle and a place for a pointer.
            ok(unsafe { kvmgr_sequence_fork(sequence, &raw mut child) });
            child
        });
        Pair { host, device, tokens: parent.tokens.clone() }
    }

    pub fn truncate(&self, pair: &mut Pair, n: usize) {
        pair.both().into_iter().for_each(|sequence| ok(kvmgr_sequence_truncate(sequence, n)));
        pair.tokens.truncate(n);
    }

    /// Says that the prompt has been read.
    pub fn end_prefill(&self, pair: &Pair) {
        pair.both().into_iter().for_each(|sequence| ok(kvmgr_sequence_end_prefill(sequence)));
    }

    /// The positions that every head keeps, which are the same in both.
    pub fn positions(&self, pair: &Pair) -> Vec<Vec<i32>> {
        let Setup { layers, kv_heads, .. } = self.setup;
        let of_head = |i: usize| {
            let (layer, head) = (i / kv_heads, i % kv_heads);
            let [host, device] = pair.both().map(|sequence| {
                let (mut list, mut num) = (vec![0; pair.tokens.len()], 0);
                let (out, room) = (list.as_mut_ptr(), list.len());
                // SAFETY: a live handle, room for the list, a place for a number.
                ok(unsafe {
                    let (layer, head) = (layer as u32, head as u32);
                    kvmgr_sequence_positions(sequence, layer, head, out, room, &raw mut num)
                });
                list.truncate(num);
                list
            });
            assert_eq!(host, device, "layer {layer}, head {head}");
            host
        };
        (0..layers * kv_heads).map(of_head).collect()
    }

    /// Feeds tokens to each sequence, compares what attention answers, and commits the first few of
    /// them: `(tokens, how many to commit)`.
    pub fn step(&mut self, pairs: &mut [&mut Pair], feeds: &[(Vec<i32>, usize)]) {
        let counts: Vec<u32> = feeds.iter().map(|(ids, _)| ids.len() as u32).collect();
        for (pair, n) in pairs.iter().zip(&counts) {
            for sequence in pair.both() {
                ok(kvmgr_sequence_reserve(sequence, *n as usize));
            }
        }
        let list = |device: bool| -> Vec<_> {
            pairs.iter().map(|pair| if device { pair.device } else { pair.host }).collect()
        };
        self.host.plan(&list(false), &counts);
        self.device.plan(&list(true), &counts);
        let total = counts.iter().sum::<u32>() as usize;
        for layer in 0..self.setup.layers {
            self.layer(layer, total);
        }
        for (pair, (ids, keep)) in pairs.iter_mut().zip(feeds) {
            self.commit(pair, &ids[..*keep]);
        }
    }

    /// Gives a sequence tokens without attending.
    pub fn feed(&mut self, pair: &mut Pair, ids: &[i32]) {
        self.append(pair, ids.len());
        self.commit(pair, ids);
    }

    /// Reserves and appends `n` tokens.
    pub fn append(&mut self, pair: &Pair, n: usize) {
        for sequence in pair.both() {
            ok(kvmgr_sequence_reserve(sequence, n));
        }
        self.host.plan(&[pair.host], &[n as u32]);
        self.device.plan(&[pair.device], &[n as u32]);
        let setup = self.setup;
        for layer in 0..setup.layers as u32 {
            let rows = |random: &mut Random| setup.random(random, n * setup.kv_heads * setup.dim);
            let mut kv = [rows(&mut self.random), rows(&mut self.random)];
            let copies = [Buffer::of(&kv[0]), Buffer::of(&kv[1])];
            let host =
                [0, 1].map(|i| setup.tensor(kv[i].as_mut_ptr().cast(), n, setup.kv_heads, false));
            let device = [0, 1].map(|i| setup.tensor(copies[i].pointer(), n, setup.kv_heads, true));
            for (engine, [key, value]) in [(&self.host, &host), (&self.device, &device)] {
                let (key, value) = (ptr::from_ref(key), ptr::from_ref(value));
                // SAFETY: live handles and tensors that fit the plan.
                ok(unsafe { kvmgr_attention_append(engine.attention, layer, key, value, 0, 1) });
            }
            // The device has read the rows before they go.
            copies[0].read::<u16>();
        }
    }

    pub fn commit(&self, pair: &mut Pair, ids: &[i32]) {
        for sequence in pair.both() {
            // SAFETY: a live handle and a list of this length.
            ok(unsafe { kvmgr_sequence_commit(sequence, ids.as_ptr(), ids.len()) });
        }
        pair.tokens.extend_from_slice(ids);
    }

    /// Appends to and runs a layer in both and notes the difference.
    pub fn layer(&mut self, layer: usize, total: usize) {
        let setup = self.setup;
        let heads = setup.kv_heads * setup.group;
        let rows =
            |random: &mut Random, heads: usize| setup.random(random, total * heads * setup.dim);
        let mut kv = [(); 2].map(|()| rows(&mut self.random, setup.kv_heads));
        let mut query = rows(&mut self.random, heads);
        let mut sinks = self.random.normals(heads);
        let (mut output, mut lse) = (vec![f32::NAN; query.len()], vec![f32::NAN; total * heads]);
        let [key, value] =
            [0, 1].map(|i| setup.tensor(kv[i].as_mut_ptr().cast(), total, setup.kv_heads, false));
        let q = setup.tensor(query.as_mut_ptr().cast(), total, heads, false);
        let o = kvmgr_tensor {
            dtype: KVMGR_DTYPE_F32,
            ..setup.tensor(output.as_mut_ptr().cast(), total, heads, false)
        };
        let l = setup.lse(lse.as_mut_ptr().cast(), total, false);
        run(
            &self.host,
            layer,
            [&key, &value, &q, &o, &l],
            &self.options(layer, sinks.as_mut_ptr()),
        );

        let device = [&kv[0], &kv[1], &query].map(|data| Buffer::of(data));
        let (o, l) = (Buffer::new(query.len() * 2), Buffer::new(lse.len() * 4));
        let sinks = Buffer::of(&sinks);
        let [key, value] =
            [0, 1].map(|i| setup.tensor(device[i].pointer(), total, setup.kv_heads, true));
        let q = setup.tensor(device[2].pointer(), total, heads, true);
        let (out, l2) =
            (setup.tensor(o.pointer(), total, heads, true), setup.lse(l.pointer(), total, true));
        let options = self.options(layer, sinks.pointer().cast());
        let l2 = if self.asks_lse { l2 } else { kvmgr_tensor { data: ptr::null_mut(), ..l2 } };
        run(&self.device, layer, [&key, &value, &q, &out, &l2], &options);
        let found: Vec<f32> = o.read::<u16>().into_iter().map(|x| setup.value(x)).collect();
        let found_lse = if self.asks_lse { l.read::<f32>() } else { lse.clone() };
        self.compare(&found, &output, &found_lse, &lse);
    }

    /// Appends `[key, value, query]` to the host's layer 0 and answers O and LSE.
    pub fn run_host(&self, data: &mut [Vec<u16>; 3], total: usize) -> (Vec<f32>, Vec<f32>) {
        let setup = self.setup;
        let heads = setup.kv_heads * setup.group;
        let mut output = vec![f32::NAN; total * heads * setup.dim];
        let mut lse = vec![f32::NAN; total * heads];
        let [key, value, query] = [(0, setup.kv_heads), (1, setup.kv_heads), (2, heads)]
            .map(|(i, heads)| setup.tensor(data[i].as_mut_ptr().cast(), total, heads, false));
        let o = kvmgr_tensor {
            dtype: KVMGR_DTYPE_F32,
            ..setup.tensor(output.as_mut_ptr().cast(), total, heads, false)
        };
        let l = setup.lse(lse.as_mut_ptr().cast(), total, false);
        run(&self.host, 0, [&key, &value, &query, &o, &l], &self.options(0, ptr::null_mut()));
        (output, lse)
    }

    /// Plans a decode step on the device.
    pub fn try_plan(&self, pairs: &[Pair]) -> kvmgr_status {
        let (list, counts): (Vec<_>, Vec<u32>) = pairs.iter().map(|pair| (pair.device, 1)).unzip();
        let attention = self.device.attention;
        // SAFETY: live handles and lists of this length.
        unsafe { kvmgr_attention_plan(attention, list.as_ptr(), counts.as_ptr(), counts.len()) }
    }

    pub fn options(&self, layer: usize, sinks: *mut f32) -> kvmgr_attention_options {
        // SAFETY: all bytes zero are valid options.
        let mut options: kvmgr_attention_options = unsafe { std::mem::zeroed() };
        options.struct_size = size_of::<kvmgr_attention_options>();
        if layer % 2 == 1 {
            (options.softcap, options.sliding_window) = (self.setup.softcap, self.setup.window);
            options.scale = self.setup.scale;
        }
        if self.setup.has_sinks {
            options.sinks = sinks;
        }
        options
    }

    /// Both caches hold as many blocks, of as many bytes.
    #[track_caller]
    pub fn compare_sizes(&self) {
        let [host, device] = [&self.host, &self.device].map(Engine::stats);
        let sizes = |stats: &kvmgr_cache_stats| {
            [stats.used_blocks, stats.idle_blocks, stats.bytes_used, stats.bytes_idle]
        };
        assert_eq!(sizes(&device), sizes(&host), "{}", self.setup.spec);
    }

    pub fn compare(&mut self, found: &[f32], output: &[f32], found_lse: &[f32], lse: &[f32]) {
        let norm = |list: &mut dyn Iterator<Item = f64>| list.map(|x| x * x).sum::<f64>().sqrt();
        let pairs = found.iter().zip(output);
        let difference = norm(&mut pairs.map(|(a, b)| f64::from(*a) - f64::from(*b)));
        let error = difference / norm(&mut output.iter().map(|x| f64::from(*x)));
        let pairs = found_lse.iter().zip(lse);
        let lse = pairs.map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
        // With few bits both round the queries, in ways of their own.
        let is_raw = !self.setup.spec.contains("quant");
        let limit = if is_raw && self.setup.dtype == KVMGR_DTYPE_F16 { 1e-3 } else { 4e-3 };
        assert!(
            error < limit * self.slack,
            "O differs by {error:e} from the host's, LSE by {lse:e}"
        );
        let limit = if is_raw { 2e-3 } else { 1e-2 };
        assert!(lse < limit * self.slack, "LSE differs by {lse:e} from the host's");
        self.worst = [self.worst[0].max(error), self.worst[1].max(lse)];
    }
}

/// Appends and runs one layer: key, value, query, output, LSE.
pub fn run(
    engine: &Engine,
    layer: usize,
    [key, value, query, output, lse]: [&kvmgr_tensor; 5],
    options: &kvmgr_attention_options,
) {
    let layer = layer as u32;
    let lse = if lse.data.is_null() { ptr::null() } else { ptr::from_ref(lse) };
    // SAFETY: live handles and tensors that fit the plan.
    unsafe {
        ok(kvmgr_attention_append(engine.attention, layer, key, value, 0, 1));
        ok(kvmgr_attention_run(engine.attention, layer, query, output, lse, options, 0, 1));
    }
}
