//! Policies alone: tell one what was observed, and it answers scores and keep sets.

use std::ffi::c_char;
use std::sync::{Arc, LazyLock};

use super::convert::{self, RopeFields};
use super::guard::{guard, guard_or};
use super::handle::{self, Opaque};
use super::types::{kvmgr_rope_style, kvmgr_status};
use super::version::{Listing, describe};
use crate::error::{Result, bail, ensure};
use crate::policy::{
    Event, HeadInput, LayerInput, LayerSource, OutputProjection, Pipeline, STAGES,
};
use crate::shape::{ModelShape, Needs, Rope, Values, check_range};

/// A token policy parsed from a spec. Immutable. Shared: retain and release, any thread.
#[derive(Debug)]
pub struct kvmgr_policy {
    _opaque: [u8; 0],
}

/// What a kvmgr_policy holds.
#[derive(Debug)]
pub(super) struct PolicyHandle(pub(super) Arc<Pipeline>);

impl Opaque for kvmgr_policy {
    type Inner = PolicyHandle;
    const NAME: &'static str = "kvmgr_policy";
}

/// The policy reads keys.
pub const KVMGR_NEEDS_KEYS: u32 = 1;
/// The policy reads values.
pub const KVMGR_NEEDS_VALUES: u32 = 2;
/// The policy reads the last queries of each head.
pub const KVMGR_NEEDS_QUERY_WINDOW: u32 = 4;
/// The policy reads attention probabilities summed over queries.
pub const KVMGR_NEEDS_COLUMN_SUM: u32 = 8;
/// The policy needs to know how the model rotates keys.
pub const KVMGR_NEEDS_ROPE: u32 = 16;
/// The policy reads mean and covariance of the queries before rotation.
pub const KVMGR_NEEDS_QUERY_STATISTICS: u32 = 32;
/// The policy reads the input of attention in each layer: kvmgr_sequence_observe.
pub const KVMGR_NEEDS_HIDDEN: u32 = 64;
/// The policy reads the output projections: kvmgr_cache_set_weights.
pub const KVMGR_NEEDS_OUTPUT_PROJECTION: u32 = 128;
/// The prompt has to be read a second time: kvmgr_sequence_replay.
pub const KVMGR_NEEDS_REPLAY: u32 = 256;
/// The policy reads hidden states of the tokens that do so: kvmgr_sequence_observe.
pub const KVMGR_NEEDS_REPLAY_HIDDEN: u32 = 512;
/// The policy reads how many queries gave a token less than an even share.
pub const KVMGR_NEEDS_LOW_COUNT: u32 = 1024;
/// The policy reads how much attention changes the residual stream: kvmgr_sequence_observe_residual.
pub const KVMGR_NEEDS_RESIDUAL: u32 = 4096;

const _: () = {
    assert!(KVMGR_NEEDS_KEYS == Needs::KEYS.0 && KVMGR_NEEDS_VALUES == Needs::VALUES.0);
    assert!(KVMGR_NEEDS_QUERY_WINDOW == Needs::QUERY_WINDOW.0);
    assert!(KVMGR_NEEDS_COLUMN_SUM == Needs::COLUMN_SUM.0 && KVMGR_NEEDS_ROPE == Needs::ROPE.0);
    assert!(KVMGR_NEEDS_QUERY_STATISTICS == Needs::QUERY_STATISTICS.0);
    assert!(KVMGR_NEEDS_HIDDEN == Needs::HIDDEN.0 && KVMGR_NEEDS_REPLAY == Needs::REPLAY.0);
    assert!(KVMGR_NEEDS_REPLAY_HIDDEN == Needs::REPLAY_HIDDEN.0);
    assert!(KVMGR_NEEDS_LOW_COUNT == Needs::LOW_COUNT.0);
    assert!(KVMGR_NEEDS_RESIDUAL == Needs::RESIDUAL.0);
    assert!(KVMGR_NEEDS_OUTPUT_PROJECTION == Needs::OUTPUT_PROJECTION.0);
};

/// When a policy acts.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct kvmgr_event(pub u32);
/// The prompt has been read.
pub const KVMGR_EVENT_PREFILL_END: kvmgr_event = kvmgr_event(0);
/// A generated token was committed.
pub const KVMGR_EVENT_STEP: kvmgr_event = kvmgr_event(1);

/// What a policy is told about one layer. Set struct_size to its sizeof. Lists that the policy
/// does not need (kvmgr_policy_needs) may be NULL.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmgr_policy_input {
    /// sizeof(kvmgr_policy_input).
    pub struct_size: usize,
    /// Index of the layer.
    pub layer: u32,
    /// Layers of the model; 0 means layer + 1.
    pub num_layers: u32,
    /// Query heads, a multiple of num_kv_heads.
    pub num_q_heads: u32,
    /// Key/value heads.
    pub num_kv_heads: u32,
    /// Elements of a key and of a query.
    pub head_dim: u32,
    /// Cached tokens T of each KV head, at least 1.
    pub num_tokens: u32,
    /// Queries w of each query head; the last belongs to the last token.
    pub num_queries: u32,
    /// What happened.
    pub event: kvmgr_event,
    /// [num_kv_heads, T, head_dim].
    pub keys: *const f32,
    /// [num_kv_heads, T, value_dim].
    pub values: *const f32,
    /// [num_q_heads, w, head_dim], oldest first.
    pub queries: *const f32,
    /// [num_kv_heads, T]: probability received, summed over queries and the group's heads.
    pub column_sums: *const f32,
    /// [T] original positions, ascending; NULL means 0 to T - 1.
    pub positions: *const i32,
    /// [num_q_heads, head_dim]: mean of the queries before rotation, without the first 4 tokens.
    pub query_mean: *const f32,
    /// [num_q_heads, head_dim, head_dim]: their population covariance.
    pub query_covariance: *const f32,
    /// rope_dims / 2 frequencies in radians for each position, or NULL for powers of rope_base.
    pub rope_inv_freq: *const f32,
    /// How the model rotates queries and keys; needed with KVMGR_NEEDS_ROPE, unless only pos(...)
    /// needs it.
    pub rope_style: kvmgr_rope_style,
    /// Rotated elements of a head, even, at most head_dim - rope_first, which 0 means.
    pub rope_dims: u32,
    /// Base of the frequencies; 0 means 10000.
    pub rope_base: f32,
    /// Elements of a hidden state, at most 65536; needed with KVMGR_NEEDS_HIDDEN and
    /// KVMGR_NEEDS_OUTPUT_PROJECTION, else 0 is fine.
    pub hidden_size: u32,
    /// [T, hidden_size]: the input of attention, after its norm.
    pub hidden: *const f32,
    /// [hidden_size, num_q_heads * value_dim]: row i makes element i of the layer's output.
    pub output_projection: *const f32,
    /// [num_q_heads, T]: the largest probability that each token received from tokens that replay it,
    /// with KVMGR_NEEDS_REPLAY_HIDDEN over the length of their hidden states.
    pub replay_maxima: *const f32,
    /// The KV head that a score of the engine's own is asked about; else 0.
    pub kv_head: u32,
    /// Must be 0.
    pub reserved: u32,
    /// [num_kv_heads, T]: queries since the policy last ran that gave a token less than 1 / T, on the
    /// mean over the group's heads.
    pub low_counts: *const f32,
    /// Elements of a value; 0 means head_dim.
    pub value_dim: u32,
    /// The first rotated element of a head.
    pub rope_first: u32,
}

impl kvmgr_policy_input {
    /// Nothing told.
    pub(super) const EMPTY: Self = Self {
        struct_size: size_of::<Self>(),
        layer: 0,
        num_layers: 0,
        num_q_heads: 0,
        num_kv_heads: 0,
        head_dim: 0,
        num_tokens: 0,
        num_queries: 0,
        event: KVMGR_EVENT_PREFILL_END,
        keys: std::ptr::null(),
        values: std::ptr::null(),
        queries: std::ptr::null(),
        column_sums: std::ptr::null(),
        positions: std::ptr::null(),
        query_mean: std::ptr::null(),
        query_covariance: std::ptr::null(),
        rope_inv_freq: std::ptr::null(),
        rope_style: kvmgr_rope_style(0),
        rope_dims: 0,
        rope_base: 0.0,
        hidden_size: 0,
        hidden: std::ptr::null(),
        output_projection: std::ptr::null(),
        replay_maxima: std::ptr::null(),
        kv_head: 0,
        reserved: 0,
        low_counts: std::ptr::null(),
        value_dim: 0,
        rope_first: 0,
    };
}

static LISTING: LazyLock<Listing> = LazyLock::new(|| {
    Listing::new(STAGES.iter().map(|stage| {
        let summary = format!("{:?}: {}", stage.class, stage.summary);
        (stage.name.to_string(), describe(&summary, stage.params, stage.paper))
    }))
});

/// Stages that a spec can name.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_policy_stage_count() -> usize {
    guard_or(0, || Ok(LISTING.len()))
}

/// The name of stage index, in the order in which a spec writes them; NULL past the end. Static.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_policy_stage_name(index: usize) -> *const c_char {
    guard_or(std::ptr::null(), || Ok(LISTING.name(index)))
}

/// A line about stage index: class, purpose, parameters, paper; NULL past the end. Static.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_policy_stage_help(index: usize) -> *const c_char {
    guard_or(std::ptr::null(), || Ok(LISTING.help(index)))
}

/// Parses a policy, such as "snapkv(w=64) | adakv(0.2) | keep(0.25)". Errors name the column.
///
/// @param spec a NUL-terminated string
/// @param out_policy receives a handle with one reference; NULL on failure
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_policy_create(
    spec: *const c_char,
    out_policy: *mut *mut kvmgr_policy,
) -> kvmgr_status {
    guard(|| {
        // SAFETY: the caller passes a place for a pointer.
        let out = unsafe { convert::handle_output(out_policy, "out_policy") }?;
        // SAFETY: the caller passes NULL or a NUL-terminated string.
        let spec = unsafe { convert::required_text(spec, "spec") }?;
        let policy = Pipeline::parse(spec).map_err(|error| error.within("spec"))?;
        *out = handle::create(PolicyHandle(Arc::new(policy)))?;
        Ok(())
    })
}

/// Adds a reference; answers the same handle, or NULL if it is not a live policy.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_policy_retain(policy: *mut kvmgr_policy) -> *mut kvmgr_policy {
    guard_or(std::ptr::null_mut(), || handle::retain(policy))
}

/// Drops a reference. NULL is fine. Sequences keep their policy alive.
#[unsafe(no_mangle)]
pub extern "C" fn kvmgr_policy_release(policy: *mut kvmgr_policy) {
    guard(|| handle::release(policy));
}

/// What the engine has to hand over: KVMGR_NEEDS_ bits, and how many queries of each head.
/// kvmgr_attention_run observes queries and probabilities by itself; the rotation is told in
/// kvmgr_cache_config, hidden states by kvmgr_sequence_observe and kvmgr_sequence_observe_residual,
/// projections by kvmgr_cache_set_weights.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_policy_needs(
    policy: *const kvmgr_policy,
    out_needs: *mut u32,
    out_query_window: *mut u32,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle and places for numbers.
    guard(|| unsafe {
        handle::with(policy, |policy| {
            let needs = convert::output(out_needs, "out_needs")?;
            let window = convert::output(out_query_window, "out_query_window")?;
            *needs = policy.0.needs().0;
            *window = policy.0.query_window() as u32;
            Ok(())
        })
    })
}

/// Scores the tokens of a layer: higher stays.
///
/// @param out_scores [num_kv_heads, T]
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_policy_score(
    policy: *const kvmgr_policy,
    input: *const kvmgr_policy_input,
    out_scores: *mut f32,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle, an input and room for the scores.
    guard(|| unsafe {
        handle::with(policy, |policy| {
            let input = Input::new(input, &policy.0)?;
            let out = convert::slice_mut(out_scores, input.heads * input.tokens, "out_scores")?;
            let scores = policy.0.score(input.event, &input.layer())?;
            for (out, head) in out.chunks_exact_mut(input.tokens).zip(&scores) {
                out.copy_from_slice(&head.scores);
            }
            Ok(())
        })
    })
}

/// Chooses the tokens of a layer that stay. A policy that needs KVMGR_NEEDS_RESIDUAL compares all layers
/// and is KVMGR_UNSUPPORTED here.
///
/// @param out_kept [num_kv_heads, T]: for each KV head its kept indices, ascending, in front
/// @param out_counts [num_kv_heads]: how many each KV head keeps
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmgr_policy_select(
    policy: *const kvmgr_policy,
    input: *const kvmgr_policy_input,
    out_kept: *mut u32,
    out_counts: *mut u32,
) -> kvmgr_status {
    // SAFETY: the caller passes a handle, an input and room for the results.
    guard(|| unsafe {
        handle::with(policy, |policy| {
            let input = Input::new(input, &policy.0)?;
            ensure!(
                !policy.0.needs().contains(Needs::RESIDUAL),
                Unsupported,
                "the policy {} compares all layers, here is only one",
                policy.0.spec()
            );
            let kept = convert::slice_mut(out_kept, input.heads * input.tokens, "out_kept")?;
            let counts = convert::slice_mut(out_counts, input.heads, "out_counts")?;
            let sets = policy.0.select(input.event, &mut OneLayer(input.layer()))?;
            for ((set, kept), count) in
                sets[0].iter().zip(kept.chunks_exact_mut(input.tokens)).zip(counts)
            {
                *count = set.len() as u32;
                kept.iter_mut().zip(set.iter()).for_each(|(out, index)| *out = index as u32);
            }
            Ok(())
        })
    })
}

/// Most elements of a hidden state.
const MAX_HIDDEN: usize = 1 << 16;

/// A checked input.
struct Input<'a> {
    raw: kvmgr_policy_input,
    event: Event,
    heads: usize,
    tokens: usize,
    keys: &'a [f32],
    values: &'a [f32],
    queries: &'a [f32],
    column_sums: &'a [f32],
    query_mean: &'a [f32],
    query_covariance: &'a [f32],
    /// `[num_kv_heads, T]`.
    gate_scores: Vec<f32>,
    output_projection: &'a [f32],
    replay_maxima: &'a [f32],
    low_counts: &'a [f32],
    rope: Option<Rope>,
    positions: Vec<i32>,
    value_dim: usize,
}

impl<'a> Input<'a> {
    /// # Safety
    /// `input` is NULL or starts with its size; its lists are NULL or as long as it says.
    unsafe fn new(input: *const kvmgr_policy_input, policy: &Pipeline) -> Result<Self> {
        let needs = policy.needs();
        // SAFETY: the caller promises it.
        let raw = unsafe { convert::config(input, "kvmgr_policy_input") }?;
        let shape = ModelShape::new(
            raw.num_layers.max(raw.layer.saturating_add(1)) as usize,
            raw.num_q_heads as usize,
            raw.num_kv_heads as usize,
            raw.head_dim as usize,
        );
        let shape = match raw.value_dim {
            0 => shape,
            dim => ModelShape { values: Values::Own(dim as usize), ..shape },
        };
        shape.validate()?;
        let (heads, tokens, dim) = (shape.num_kv_heads, raw.num_tokens as usize, shape.head_dim);
        let value_dim = shape.value_dim();
        let queries = raw.num_queries as usize;
        check_range("num_tokens", tokens, i32::MAX as usize)?; // Positions are 32 bits.
        ensure!(
            queries <= tokens,
            InvalidArgument,
            "num_queries is {queries}, must be at most num_tokens {tokens}"
        );
        let event = match raw.event {
            KVMGR_EVENT_PREFILL_END => Event::PrefillEnd,
            KVMGR_EVENT_STEP => Event::Step,
            kvmgr_event(value) => bail!(InvalidArgument, "event is {value}, not a kvmgr_event"),
        };
        let list = |data: *const f32, len: usize, need: Needs, name: &str| {
            if !needs.contains(need) {
                return Ok(&[][..]);
            }
            // SAFETY: the caller promises it.
            unsafe { convert::slice(data, len, name) }
        };
        let rows = heads * tokens;
        let hidden_size = raw.hidden_size as usize;
        let reads_hidden = needs.0 & Needs::HIDDEN.union(Needs::OUTPUT_PROJECTION).0 != 0;
        ensure!(
            !reads_hidden || (1..=MAX_HIDDEN).contains(&hidden_size),
            InvalidArgument,
            "hidden_size is {hidden_size}, must be in 1..={MAX_HIDDEN}"
        );
        let hidden = list(raw.hidden, tokens * hidden_size, Needs::HIDDEN, "hidden")?;
        let width = shape.num_q_heads * value_dim;
        // SAFETY: the caller promises it.
        let positions = unsafe { convert::optional_slice(raw.positions, tokens, "positions") }?;
        let positions = positions.map_or_else(|| (0..tokens as i32).collect(), <[i32]>::to_vec);
        let first = positions[0];
        ensure!(first >= 0, InvalidArgument, "positions[0] is {first}, must not be negative");
        Ok(Self {
            event,
            value_dim,
            heads,
            tokens,
            keys: list(raw.keys, rows * dim, Needs::KEYS, "keys")?,
            values: list(raw.values, rows * value_dim, Needs::VALUES, "values")?,
            queries: list(
                raw.queries,
                shape.num_q_heads * queries * dim,
                Needs::QUERY_WINDOW,
                "queries",
            )?,
            column_sums: list(raw.column_sums, rows, Needs::COLUMN_SUM, "column_sums")?,
            query_mean: list(
                raw.query_mean,
                shape.num_q_heads * dim,
                Needs::QUERY_STATISTICS,
                "query_mean",
            )?,
            query_covariance: list(
                raw.query_covariance,
                shape.num_q_heads * dim * dim,
                Needs::QUERY_STATISTICS,
                "query_covariance",
            )?,
            gate_scores: match hidden.is_empty() {
                true => Vec::new(),
                false => policy.gate(raw.layer as usize, heads, hidden, hidden_size)?,
            },
            low_counts: list(raw.low_counts, rows, Needs::LOW_COUNT, "low_counts")?,
            replay_maxima: list(
                raw.replay_maxima,
                shape.num_q_heads * tokens,
                Needs::REPLAY,
                "replay_maxima",
            )?,
            output_projection: list(
                raw.output_projection,
                hidden_size * width,
                Needs::OUTPUT_PROJECTION,
                "output_projection",
            )?,
            // SAFETY: the caller promises the frequencies.
            rope: unsafe { rope(&raw, policy.rotation_is_read()) }?,
            positions,
            raw,
        })
    }

    fn layer(&self) -> LayerInput<'_> {
        let group = self.raw.num_q_heads as usize / self.heads;
        fn part_of(list: &[f32], heads: usize, h: usize) -> &[f32] {
            &list[list.len() / heads * h..][..list.len() / heads]
        }
        let part = |list, h| part_of(list, self.heads, h);
        LayerInput {
            layer: self.raw.layer as usize,
            num_layers: self.raw.num_layers.max(self.raw.layer + 1) as usize,
            group,
            head_dim: self.raw.head_dim as usize,
            value_dim: self.value_dim,
            sequence_len: self.positions.last().map_or(0, |last| *last as usize + 1),
            heads: (0..self.heads)
                .map(|h| HeadInput {
                    positions: &self.positions,
                    keys: part(self.keys, h),
                    values: part(self.values, h),
                    queries: part(self.queries, h),
                    num_queries: if self.queries.is_empty() {
                        0
                    } else {
                        self.raw.num_queries as usize
                    },
                    column_sums: part(self.column_sums, h),
                    last_row: &[],
                    query_mean: part(self.query_mean, h),
                    query_covariance: part(self.query_covariance, h),
                    gate_scores: part(&self.gate_scores, h),
                    replay_maxima: part(self.replay_maxima, h),
                    low_counts: part(self.low_counts, h),
                })
                .collect(),
            rope: self.rope.as_ref(),
            output_projection: (!self.output_projection.is_empty()).then_some(OutputProjection {
                weights: self.output_projection,
                width: self.raw.num_q_heads as usize * self.value_dim,
            }),
            attention_cosine: None,
        }
    }
}

/// The rotation, if the policy needs it.
///
/// # Safety
/// `rope_inv_freq` is NULL or has half as many elements as are rotated.
unsafe fn rope(raw: &kvmgr_policy_input, is_read: bool) -> Result<Option<Rope>> {
    ensure!(raw.reserved == 0, InvalidArgument, "reserved is {}, must be 0", raw.reserved);
    if !is_read {
        return Ok(None); // Closing gaps of positions is the engine's part.
    }
    let fields = RopeFields {
        style: raw.rope_style,
        first: raw.rope_first,
        dims: raw.rope_dims,
        base: raw.rope_base,
        inv_freq: raw.rope_inv_freq,
        head_dim: raw.head_dim,
    };
    // SAFETY: the caller promises it.
    let rope = unsafe { convert::rope(&fields) }?;
    let Some(rope) = rope else {
        bail!(InvalidArgument, "rope_style is KVMGR_ROPE_NONE, but the policy needs the rotation");
    };
    ensure!(
        rope.first + 2 * rope.inv_freq.len() <= raw.head_dim as usize,
        InvalidArgument,
        "rope_dims is {} and rope_first {}, must be at most head_dim {} together",
        raw.rope_dims,
        raw.rope_first,
        raw.head_dim
    );
    Ok(Some(rope))
}

/// A source of a single layer.
struct OneLayer<'a>(LayerInput<'a>);

impl LayerSource for OneLayer<'_> {
    fn num_layers(&self) -> usize {
        1
    }

    fn visit(
        &mut self,
        _layer: usize,
        f: &mut dyn FnMut(&LayerInput<'_>) -> Result<()>,
    ) -> Result<()> {
        f(&self.0)
    }
}
