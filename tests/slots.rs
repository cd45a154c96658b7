//! Slots against an obvious model: a map from slots to tokens, and softmax in f64.

#![expect(unsafe_code, clippy::borrow_as_ptr, reason = "calls the C ABI as C does")]
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::Random;
use kvmgr::ffi::masked::*;
use kvmgr::ffi::policy::*;
use kvmgr::ffi::score::*;
use kvmgr::ffi::slots::*;
use kvmgr::ffi::types::*;
use kvmgr::ffi::version::*;

const Q_HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
const SLOTS: usize = 200;
const HIDDEN: f32 = f32::NEG_INFINITY;

fn message() -> String {
    // SAFETY: the library's buffer ends in NUL.
    unsafe { CStr::from_ptr(kvmgr_last_error_message()) }.to_string_lossy().into_owned()
}

fn tensor(data: &[f32], shape: [usize; 3]) -> kvmgr_tensor {
    assert_eq!(data.len(), shape.iter().product::<usize>());
    // SAFETY: all zeros is a valid tensor.
    let mut tensor: kvmgr_tensor = unsafe { std::mem::zeroed() };
    tensor.data = data.as_ptr().cast_mut().cast();
    tensor.dtype = KVMGR_DTYPE_F32;
    tensor.ndim = 3;
    (0..3).for_each(|i| tensor.shape[i] = shape[i] as i64);
    tensor
}

struct Layer {
    handle: *mut kvmgr_slots,
    /// What each (slot, head) holds: key and value.
    rows: BTreeMap<(u32, usize), [Vec<f32>; 2]>,
    random: Random,
}

impl Layer {
    fn new(spec: &str, num_streams: u32, flags: u32, seed: u64) -> Self {
        Self::sized(spec, SLOTS, num_streams, flags, seed)
    }

    fn sized(spec: &str, num_slots: usize, num_streams: u32, flags: u32, seed: u64) -> Self {
        let spec = CString::new(spec).unwrap();
        let config = kvmgr_slots_config {
            struct_size: size_of::<kvmgr_slots_config>(),
            layer: 1,
            num_layers: 3,
            num_q_heads: Q_HEADS as u32,
            num_kv_heads: KV_HEADS as u32,
            key_dim: DIM as u32,
            value_dim: 0,
            num_slots: num_slots as u32,
            num_streams,
            block_size: 32,
            flags,
            spec: spec.as_ptr(),
        };
        let mut handle = ptr::null_mut();
        // SAFETY: a whole struct and a place.
        let status = unsafe { kvmgr_slots_create(&raw const config, &raw mut handle) };
        assert_eq!(status, KVMGR_OK, "{}", message());
        Self { handle, rows: BTreeMap::new(), random: Random(seed) }
    }

    fn write(&mut self, slots: &[u32], flags: u32) {
        let values = [0, 1].map(|_| self.random.normals(slots.len() * KV_HEADS * DIM));
        for (side, values) in values.iter().enumerate() {
            let view = tensor(values, [slots.len(), KV_HEADS, DIM]);
            // SAFETY: slots and values of the lengths given.
            let status = unsafe {
                kvmgr_slots_write(
                    self.handle,
                    [KVMGR_SIDE_KEY, KVMGR_SIDE_VALUE][side],
                    slots.as_ptr(),
                    slots.len(),
                    &raw const view,
                    flags,
                )
            };
            assert_eq!(status, KVMGR_OK, "{}", message());
        }
        for (i, slot) in slots.iter().enumerate() {
            for head in 0..KV_HEADS {
                let row = |side: usize| values[side][(i * KV_HEADS + head) * DIM..][..DIM].to_vec();
                if flags == 0 || self.rows.contains_key(&(*slot, head)) {
                    self.rows.insert((*slot, head), [row(0), row(1)]);
                }
            }
        }
    }

    fn evict(&mut self, head: usize, slots: &[u32]) {
        // SAFETY: slots of the length given.
        let status =
            unsafe { kvmgr_slots_evict(self.handle, head as u32, slots.as_ptr(), slots.len()) };
        assert_eq!(status, KVMGR_OK, "{}", message());
        slots.iter().for_each(|slot| drop(self.rows.remove(&(*slot, head))));
    }

    /// Attends with random queries under `mask` and compares with the model.
    fn check(&mut self, stream: u32, mask: &[f32], span: usize, tolerance: f64) {
        let n = mask.len() / span;
        let query = self.random.normals(n * Q_HEADS * DIM);
        let output = vec![f32::NAN; n * Q_HEADS * DIM];
        let shape = [n, Q_HEADS, DIM];
        let views = [tensor(&query, shape), tensor(mask, [n, 1, span]), tensor(&output, shape)];
        let [q, m, o] = [0, 1, 2].map(|i| &raw const views[i]);
        for worker in 0..3 {
            // SAFETY: the tensors above.
            let status =
                unsafe { kvmgr_slots_attend(self.handle, stream, q, m, o, ptr::null(), worker, 3) };
            assert_eq!(status, KVMGR_OK, "{}", message());
        }
        for i in 0..n {
            for h in 0..Q_HEADS {
                let q = &query[(i * Q_HEADS + h) * DIM..][..DIM];
                let expected = self.reference(stream, h / 2, q, &mask[i * span..][..span]);
                let found = &output[(i * Q_HEADS + h) * DIM..][..DIM];
                for (x, y) in found.iter().zip(expected) {
                    assert!((f64::from(*x) - y).abs() < tolerance, "query {i} head {h}: {x} {y}");
                }
            }
        }
    }

    fn reference(&self, stream: u32, head: usize, q: &[f32], mask: &[f32]) -> Vec<f64> {
        let mut out = vec![0.0; DIM];
        let mut sum = 0.0;
        for ((slot, row_head), [key, value]) in &self.rows {
            let slot = (*slot as usize).wrapping_sub(stream as usize * SLOTS);
            if *row_head != head || slot >= mask.len() || mask[slot] == HIDDEN {
                continue;
            }
            let dot: f64 = q.iter().zip(key).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            let p = (dot / (DIM as f64).sqrt() + f64::from(mask[slot])).exp();
            sum += p;
            out.iter_mut().zip(value).for_each(|(out, v)| *out += p * f64::from(*v));
        }
        out.iter_mut().for_each(|x| *x = if sum > 0.0 { *x / sum } else { 0.0 });
        out
    }

    fn stats(&self) -> kvmgr_slots_stats {
        // SAFETY: all zeros is a valid struct, and its size is set.
        unsafe {
            let mut stats: kvmgr_slots_stats = std::mem::zeroed();
            stats.struct_size = size_of::<kvmgr_slots_stats>();
            assert_eq!(kvmgr_slots_get_stats(self.handle, &raw mut stats), KVMGR_OK);
            stats
        }
    }

    fn states(&self, slots: &[u32]) -> Vec<u8> {
        let mut values = vec![0.0; slots.len() * KV_HEADS * DIM];
        let mut states = vec![9; slots.len() * KV_HEADS];
        let (out, states_out) = (values.as_mut_ptr(), states.as_mut_ptr());
        // SAFETY: buffers of the documented sizes.
        let status = unsafe {
            let (slots, n) = (slots.as_ptr(), slots.len());
            kvmgr_slots_read(self.handle, KVMGR_SIDE_KEY, slots, n, out, states_out)
        };
        assert_eq!(status, KVMGR_OK, "{}", message());
        states
    }

    fn settle(&self, slots: &[u32]) -> kvmgr_status {
        // SAFETY: slots of the length given.
        unsafe { kvmgr_slots_settle(self.handle, slots.as_ptr(), slots.len()) }
    }

    fn observe(&mut self, slots: &[u32], mask: &[f32], span: usize) {
        let status = self.try_observe(slots, mask, span);
        assert_eq!(status, KVMGR_OK, "{}", message());
    }

    fn try_observe(&mut self, slots: &[u32], mask: &[f32], span: usize) -> kvmgr_status {
        let query = self.random.normals(slots.len() * Q_HEADS * DIM);
        let query = tensor(&query, [slots.len(), Q_HEADS, DIM]);
        let mask = tensor(mask, [slots.len(), 1, span]);
        // SAFETY: the tensors above and slots of the length given.
        unsafe {
            let (q, m) = (&raw const query, &raw const mask);
            kvmgr_slots_observe(self.handle, 0, q, m, slots.as_ptr(), slots.len())
        }
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        kvmgr_slots_destroy(self.handle);
    }
}

/// Writes in any order, over and over, with evictions: attention is that of what is there.
#[test]
fn random_writes_and_evictions_agree_with_a_map() {
    for (spec, tolerance) in
        [("full", 2e-3), ("quant(k=q8_0, v=q8_0)", 3e-2), ("quant(k=kivi4)", 0.5)]
    {
        let mut layer = Layer::new(spec, 2, 0, 7);
        for round in 0..60 {
            let stream = layer.random.below(2) as u32;
            let base = stream * SLOTS as u32;
            let start = layer.random.below(SLOTS - 40);
            let slots: Vec<u32> = (start..start + layer.random.within(1, 40))
                .map(|slot| base + slot as u32)
                .collect();
            let flags = if round % 7 == 6 { KVMGR_SLOTS_SAME_TOKENS } else { 0 };
            layer.write(&slots, flags);
            if round % 3 == 2 {
                let head = layer.random.below(KV_HEADS);
                let gone: Vec<u32> = slots.iter().copied().filter(|slot| slot % 3 != 0).collect();
                layer.evict(head, &gone);
            }
            let span = layer.random.within(1, SLOTS);
            // From one query up to more than are decoded at once; mostly hidden, partly biased.
            let n = layer.random.pick(&[1, 3, 40]);
            let mask: Vec<f32> = (0..n * span)
                .map(
                    |_| if layer.random.chance(40) { HIDDEN } else { -layer.random.normal().abs() },
                )
                .collect();
            layer.check(stream, &mask, span, tolerance);
        }
        assert!(layer.stats().rows_live > 0 && layer.stats().bytes_used > 0);
        assert_eq!(layer.stats().rows_live, layer.rows.len() as u64);
        assert_eq!(kvmgr_slots_copy(layer.handle), KVMGR_OK);
    }
}

fn kvmgr_slots_copy(handle: *mut kvmgr_slots) -> kvmgr_status {
    // SAFETY: a live handle.
    unsafe {
        assert_eq!(kvmgr_slots_copy_stream(handle, 0, 2), KVMGR_INVALID_ARGUMENT);
        assert!(message().contains("target is 2"), "{}", message());
        kvmgr_slots_copy_stream(handle, 0, 1)
    }
}

#[test]
fn a_copied_stream_attends_like_its_source_and_memory_follows_what_is_there() {
    let mut layer = Layer::new("quant(k=q8_0, v=q8_0)", 2, 0, 3);
    let slots: Vec<u32> = (0..SLOTS as u32).collect();
    layer.write(&slots, 0);
    let gone: Vec<u32> = slots.iter().copied().filter(|slot| slot % 4 != 0).collect();
    let full = layer.stats().bytes_used;
    (0..KV_HEADS).for_each(|head| layer.evict(head, &gone));
    assert!(layer.stats().bytes_used * 2 < full, "three quarters are gone");
    assert_eq!(layer.states(&[0, 1]), [KVMGR_SLOT_LIVE, 1, KVMGR_SLOT_EVICTED, 2]);
    assert_eq!(kvmgr_slots_copy(layer.handle), KVMGR_OK);
    assert_eq!(layer.states(&[200, 201, 0]), [1, 1, 2, 2, 1, 1]);
    let copies: Vec<_> =
        layer.rows.iter().map(|((slot, head), row)| ((slot + 200, *head), row.clone())).collect();
    layer.rows.extend(copies);
    layer.check(1, &[0.0; SLOTS], SLOTS, 3e-2);
    // SAFETY: a live handle.
    unsafe {
        assert_eq!(kvmgr_slots_clear(layer.handle, 0), KVMGR_OK);
        assert_eq!(kvmgr_slots_clear(layer.handle, 1), KVMGR_OK);
    }
    assert_eq!((layer.stats().bytes_used, layer.stats().rows_live), (0, 0));
    assert_eq!(layer.states(&[0]), [KVMGR_SLOT_ABSENT, 0]);
}

fn options(meeting: *const kvmgr_meeting) -> kvmgr_mask_options {
    // SAFETY: all zeros is a valid struct.
    let zeros = unsafe { std::mem::zeroed() };
    kvmgr_mask_options { struct_size: size_of::<kvmgr_mask_options>(), meeting, ..zeros }
}

/// Pointers that go to other threads.
#[derive(Clone, Copy)]
struct Shared(*const kvmgr_slots, [*const kvmgr_tensor; 5], *const kvmgr_mask_options);

// SAFETY: what they point to outlives the threads, and workers write different rows.
unsafe impl Send for Shared {}

impl Shared {
    /// One worker's part of queries over many rows: by slot, or in memory of the engine.
    fn attend(self, worker: u32, num_workers: u32) {
        let Self(slots, [q, k, v, m, o], options) = self;
        // SAFETY: the tensors of the test below.
        let status = unsafe {
            if slots.is_null() {
                kvmgr_attend_dense(q, k, v, m, o, options, worker, num_workers)
            } else {
                kvmgr_slots_attend(slots, 0, q, m, o, options, worker, num_workers)
            }
        };
        assert_eq!(status, KVMGR_OK, "{}", message());
    }
}

/// With a meeting the rows of a head are shared as well, and by how many does not change a bit.
#[test]
fn workers_that_meet_share_rows() {
    const ROWS: usize = 5000;
    let mut layer = Layer::sized("quant(k=f32, v=f32)", ROWS, 1, 0, 17);
    layer.write(&(0..ROWS as u32).collect::<Vec<_>>(), 0);
    let [key, value] = [0, 1].map(|side| -> Vec<f32> {
        layer.rows.values().flat_map(|row| row[side].clone()).collect()
    });
    let mut meeting = ptr::null_mut();
    // SAFETY: a place for the handle.
    assert_eq!(unsafe { kvmgr_meeting_create(&raw mut meeting) }, KVMGR_OK);
    let [with, without] = [options(meeting), options(ptr::null())];
    for n in [1, 3, 40] {
        let query = layer.random.normals(n * Q_HEADS * DIM);
        let mask = causal(ROWS - n - 7, n, ROWS);
        let (shape, rows) = ([n, Q_HEADS, DIM], [ROWS, KV_HEADS, DIM]);
        let [q, m] = [tensor(&query, shape), tensor(&mask, [n, 1, ROWS])];
        let [k, v] = [tensor(&key, rows), tensor(&value, rows)];
        for slots in [layer.handle.cast_const(), ptr::null()] {
            let run = |num_workers, options: &kvmgr_mask_options| {
                let output = vec![f32::NAN; query.len()];
                let o = tensor(&output, shape);
                let tensors =
                    [&raw const q, &raw const k, &raw const v, &raw const m, &raw const o];
                let shared = Shared(slots, tensors, &raw const *options);
                std::thread::scope(|scope| {
                    for worker in 0..num_workers {
                        scope.spawn(move || shared.attend(worker, num_workers));
                    }
                });
                output
            };
            let expected = run(1, &without);
            let first = run(1, &with);
            assert!(first.iter().zip(&expected).all(|(x, y)| (x - y).abs() < 1e-4));
            for num_workers in [2, 3, 5, 9] {
                assert!(run(num_workers, &with) == first, "{n} queries, {num_workers} workers");
                assert!(run(num_workers, &without) == expected);
            }
        }
    }
    kvmgr_meeting_destroy(meeting);
    let query = vec![0.0; Q_HEADS * DIM];
    let q = tensor(&query, [1, Q_HEADS, DIM]);
    // SAFETY: tensors, and a handle that has been released.
    let status =
        unsafe { kvmgr_slots_attend(layer.handle, 0, &q, ptr::null(), &q, &raw const with, 0, 1) };
    assert_eq!(status, KVMGR_INVALID_HANDLE);
    assert!(message().contains("kvmgr_meeting"), "{}", message());
}

/// A hidden row that is infinite or NaN stays hidden.
#[test]
fn a_wild_row_does_not_reach_those_who_do_not_see_it() {
    let mut layer = Layer::new("full", 1, 0, 5);
    layer.write(&(0..40).collect::<Vec<_>>(), 0);
    let wild = vec![f32::NAN; KV_HEADS * DIM];
    let view = tensor(&wild, [1, KV_HEADS, DIM]);
    for side in [KVMGR_SIDE_KEY, KVMGR_SIDE_VALUE] {
        // SAFETY: one slot and one row.
        let status = unsafe { kvmgr_slots_write(layer.handle, side, &7, 1, &raw const view, 0) };
        assert_eq!(status, KVMGR_OK);
    }
    let mut mask = vec![0.0; 40];
    mask[7] = HIDDEN;
    layer.check(0, &mask, 40, 2e-3);
}

fn causal(first: usize, n: usize, span: usize) -> Vec<f32> {
    let see =
        move |i: usize| (0..span).map(move |slot| if slot <= first + i { 0.0 } else { HIDDEN });
    (0..n).flat_map(see).collect()
}

#[test]
fn a_policy_acts_when_the_prompt_ends_and_frees_what_it_evicts() {
    for (spec, pieces) in [
        ("snapkv(w=8) | keep(0.25)", false),
        ("snapkv(w=8) | adakv(0.2) | keep(0.25)", false),
        ("stream(sink=4) | keep(0.25)", true),
    ] {
        let flags = if pieces { KVMGR_SLOTS_PIECES } else { 0 };
        let mut layer = Layer::new(spec, 1, flags, 11);
        let first: Vec<u32> = (0..60).collect();
        layer.write(&first, 0);
        layer.observe(&first, &causal(0, 60, SLOTS), SLOTS);
        let second: Vec<u32> = (60..120).collect();
        layer.write(&second, 0);
        layer.observe(&second, &causal(60, 60, SLOTS), SLOTS);
        let expected = if pieces { 2 * (15 + 60) } else { 2 * 120 };
        assert_eq!(layer.stats().rows_live, expected, "{spec}");
        layer.write(&[120], 0);
        layer.observe(&[120], &causal(120, 1, SLOTS), SLOTS);
        assert_eq!(layer.stats().rows_live, 2 * (30 + 1), "{spec}");
        let all: Vec<u32> = (0..=120).collect();
        let states = layer.states(&all);
        assert_eq!(states.iter().filter(|state| **state == KVMGR_SLOT_EVICTED).count(), 180);
        for slot in all {
            for head in 0..KV_HEADS {
                if states[slot as usize * KV_HEADS + head] != KVMGR_SLOT_LIVE {
                    layer.rows.remove(&(slot, head));
                }
            }
        }
        layer.check(0, &causal(120, 1, SLOTS), SLOTS, 2e-3);
    }
}

/// Before a prompt is saved the policy runs on it, once.
#[test]
fn a_policy_that_waits_for_the_end_of_a_prompt_can_be_settled() {
    let mut layer = Layer::new("snapkv(w=8) | keep(0.25)", 1, 0, 19);
    let prompt: Vec<u32> = (0..100).collect();
    layer.write(&prompt, 0);
    layer.observe(&prompt, &causal(0, 100, SLOTS), SLOTS);
    assert_eq!(layer.settle(&[150]), KVMGR_OK);
    assert_eq!(layer.stats().rows_live, 2 * 100, "not a slot of the prompt");
    assert_eq!(layer.settle(&[SLOTS as u32]), KVMGR_INVALID_ARGUMENT);
    for _ in 0..2 {
        assert_eq!(layer.settle(&[40]), KVMGR_OK);
        assert_eq!(layer.stats().rows_live, 2 * 25);
    }
    layer.write(&[100], 0);
    layer.observe(&[100], &causal(100, 1, SLOTS), SLOTS);
    assert_eq!(layer.stats().rows_live, 2 * 26, "the answer does not run it again");
}

/// Whether the engine's score fails.
static FAILS: AtomicBool = AtomicBool::new(false);
/// Queries that it was shown.
static QUERIES: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" fn score(
    _: *mut c_void,
    input: *const kvmgr_policy_input,
    scores: *mut f32,
    _: *mut u8,
) -> kvmgr_status {
    if FAILS.load(Ordering::Relaxed) {
        return KVMGR_INVALID_STATE;
    }
    // SAFETY: the library passes what it documents.
    unsafe {
        let input = &*input;
        QUERIES.store(input.num_queries as usize, Ordering::Relaxed);
        for i in 0..input.num_tokens as usize {
            *scores.add(i) = *input.positions.add(i) as f32;
        }
    }
    KVMGR_OK
}

/// A policy that fails runs the next time.
#[test]
fn a_policy_that_fails_can_run_again() {
    let ops = kvmgr_score_ops {
        struct_size: size_of::<kvmgr_score_ops>(),
        needs: KVMGR_NEEDS_KEYS | KVMGR_NEEDS_QUERY_WINDOW,
        query_window: 4,
        flags: 0,
        reserved: 0,
        score: Some(score),
        destroy: None,
    };
    // SAFETY: a string and a struct.
    let status = unsafe {
        kvmgr_policy_register_score(c"fails_at_times".as_ptr(), ptr::null_mut(), &raw const ops)
    };
    assert_eq!(status, KVMGR_OK, "{}", message());
    for settles in [false, true] {
        let mut layer = Layer::new("fails_at_times | keep(0.25)", 1, 0, 27);
        let prompt: Vec<u32> = (0..80).collect();
        layer.write(&prompt, 0);
        layer.observe(&prompt, &causal(0, 80, SLOTS), SLOTS);
        let drafts: Vec<u32> = (80..84).collect();
        layer.write(&drafts, 0);
        layer.observe(&drafts, &causal(80, 4, SLOTS), SLOTS);
        // Of the drafts the last is taken back.
        layer.write(&[83], 0);
        for fails in [true, true, false] {
            FAILS.store(fails, Ordering::Relaxed);
            let expected = if fails { KVMGR_INVALID_STATE } else { KVMGR_OK };
            let status = match settles {
                true => layer.settle(&[40]),
                false => layer.try_observe(&[83], &causal(83, 1, SLOTS), SLOTS),
            };
            assert_eq!(status, expected, "{}", message());
            let live = layer.stats().rows_live;
            assert_eq!(live < 2 * 84, !fails, "{live}");
        }
        let seen = QUERIES.load(Ordering::Relaxed);
        assert_eq!(seen, if settles { 4 } else { 3 }, "a query is taken back once");
    }
}

/// Drafts are no prompt: they end the one before them, and are not compressed themselves.
#[test]
fn a_policy_takes_drafts_for_an_answer() {
    for rejected in [0, 2] {
        let mut layer = Layer::new("snapkv(w=8) | keep(0.25)", 1, 0, 23);
        let prompt: Vec<u32> = (0..80).collect();
        layer.write(&prompt, 0);
        layer.observe(&prompt, &causal(0, 80, SLOTS), SLOTS);
        // A token and four drafts, of which the last ones may be taken back and written over.
        for (round, first) in (80..).step_by(5 - rejected).take(4).enumerate() {
            let slots: Vec<u32> = (first..first + 5).collect();
            layer.write(&slots, 0);
            layer.observe(&slots, &causal(first as usize, 5, SLOTS), SLOTS);
            let kept = match (round, rejected) {
                (0, _) => 80,
                // What follows a prompt at once may be the rest of it, if nothing is taken back.
                (_, 0) => 85 / 4 + 5 * (round - 1),
                (_, _) => 83 / 4 + 3 * (round - 1),
            };
            let live = layer.stats().rows_live as usize;
            assert!(live / 2 == kept + 5 || live / 2 == kept + 6, "{live} in round {round}");
        }
    }
}

#[test]
fn dense_memory_is_attended_as_slots_are() {
    let mut layer = Layer::new("quant(k=f32, v=f32)", 1, 0, 13);
    layer.write(&(0..SLOTS as u32).collect::<Vec<_>>(), 0);
    for n in [1, 50] {
        let gather = |side: usize| -> Vec<f32> {
            layer.rows.values().flat_map(|row| row[side].clone()).collect()
        };
        let (key, value) = (gather(0), gather(1));
        let query = layer.random.normals(n * Q_HEADS * DIM);
        let mask = causal(SLOTS - n, n, SLOTS);
        let outputs = [vec![0.0; query.len()], vec![1.0; query.len()]];
        let (shape, rows) = ([n, Q_HEADS, DIM], [SLOTS, KV_HEADS, DIM]);
        let [q, m] = [tensor(&query, shape), tensor(&mask, [n, 1, SLOTS])];
        let [k, v] = [tensor(&key, rows), tensor(&value, rows)];
        let [a, b] = [tensor(&outputs[0], shape), tensor(&outputs[1], shape)];
        let none = ptr::null();
        // SAFETY: the tensors above.
        unsafe {
            let status = kvmgr_slots_attend(layer.handle, 0, &q, &m, &a, none, 0, 1);
            assert_eq!(status, KVMGR_OK, "{}", message());
            let status = kvmgr_attend_dense(&q, &k, &v, &m, &b, none, 0, 1);
            assert_eq!(status, KVMGR_OK, "{}", message());
            assert_eq!(kvmgr_attend_dense(&q, &k, &v, &m, &b, none, 1, 1), KVMGR_INVALID_ARGUMENT);
            assert!(message().contains("worker is 1"), "{}", message());
        }
        let pairs = outputs[0].iter().zip(&outputs[1]);
        assert!(pairs.into_iter().all(|(x, y)| (x - y).abs() < 1e-4));
    }
}

#[test]
fn bad_calls_are_named_and_change_nothing() {
    for (spec, word) in [
        ("h2o | keep(0.5)", "COLUMN_SUM"),
        ("stream | keep(0.5) | pos(cache_relative)", "ROPE"),
        ("nonsense", "nonsense"),
    ] {
        let spec = CString::new(spec).unwrap();
        // SAFETY: a string.
        assert_ne!(unsafe { kvmgr_slots_check_spec(spec.as_ptr()) }, KVMGR_OK);
        assert!(message().contains(word), "{}", message());
    }
    let mut layer = Layer::new("full", 1, 0, 1);
    layer.write(&[0, 1], 0);
    let rows = vec![0.0; 2 * KV_HEADS * DIM];
    let good = tensor(&rows, [2, KV_HEADS, DIM]);
    let bad = tensor(&rows, [KV_HEADS, 2 * DIM, 1]);
    let side = KVMGR_SIDE_KEY;
    // SAFETY: two slots and tensors of two rows.
    unsafe {
        let write = |slots: &[u32; 2], view: &kvmgr_tensor, side, flags| {
            kvmgr_slots_write(layer.handle, side, slots.as_ptr(), 2, &raw const *view, flags)
        };
        assert_eq!(write(&[0, SLOTS as u32], &good, side, 0), KVMGR_INVALID_ARGUMENT);
        assert!(message().contains("slots[1] is 200"), "{}", message());
        assert_eq!(write(&[0, 1], &bad, side, 0), KVMGR_INVALID_ARGUMENT);
        assert!(message().contains("values has the shape"), "{}", message());
        assert_eq!(write(&[0, 1], &good, kvmgr_side(7), 0), KVMGR_INVALID_ARGUMENT);
        assert_eq!(write(&[0, 1], &good, side, 6), KVMGR_INVALID_ARGUMENT);
        assert_eq!(kvmgr_slots_evict(layer.handle, 9, &0, 1), KVMGR_INVALID_ARGUMENT);
        assert_eq!(kvmgr_slots_clear(layer.handle, 1), KVMGR_INVALID_ARGUMENT);
        assert_eq!(kvmgr_slots_clear(ptr::null_mut(), 0), KVMGR_INVALID_HANDLE);
    }
    layer.check(0, &[0.0; 2], 2, 2e-3);
}
