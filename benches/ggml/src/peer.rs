//! ggml's side: its flash attention over a cache as llama.cpp lays it out, one graph a layer, on a
//! thread pool that lives as long as the bench.

use std::ptr::null_mut;

use llama_cpp_sys_2 as sys;

use crate::data::{Input, shape};

pub const F16: sys::ggml_type = sys::GGML_TYPE_F16;
pub const Q8_0: sys::ggml_type = sys::GGML_TYPE_Q8_0;
pub const Q4_0: sys::ggml_type = sys::GGML_TYPE_Q4_0;

/// ggml pads the rows of a mask to this.
const MASK_PAD: usize = 64;

/// Fills its conversion tables.
pub fn init() {
    // SAFETY: no preconditions.
    unsafe { sys::ggml_cpu_init() };
}

pub struct Threads(*mut sys::ggml_threadpool, i32);

impl Threads {
    pub fn new(count: usize) -> Self {
        let count = count as i32;
        // SAFETY: plain parameters.
        unsafe {
            let mut params = sys::ggml_threadpool_params_default(count);
            // Its threads would go on spinning for most of a tenth of a second after each graph and
            // take a core from the other side.
            params.poll = 0;
            Self(sys::ggml_threadpool_new(&raw mut params), count)
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // SAFETY: ours, and no graph is running.
        unsafe { sys::ggml_threadpool_free(self.0) };
    }
}

pub struct Peer<'a> {
    pub num_layers: usize,
    threads: &'a Threads,
    context: *mut sys::ggml_context,
    layers: Vec<(*mut sys::ggml_cgraph, *mut sys::ggml_tensor)>,
    work: Vec<u8>,
    elements: usize,
}

impl<'a> Peer<'a> {
    pub fn new(
        dtype: sys::ggml_type,
        input: &Input,
        num_layers: usize,
        threads: &'a Threads,
    ) -> Self {
        let shape = shape(1);
        let (heads, dim) = (shape.num_kv_heads as i64, shape.head_dim as i64);
        let (tokens, queries) = (input.tokens as i64, input.queries as i64);
        // SAFETY: the calls follow the rules of ggml.h: tensors of one context that is large enough.
        unsafe {
            let row = sys::ggml_row_size(dtype, dim * heads);
            let each = 2 * row * input.tokens + 8 * input.query.len() + (1 << 20);
            let mask_bytes = 2 * input.tokens * input.queries.next_multiple_of(MASK_PAD);
            let mem_size = num_layers * each + mask_bytes + (1 << 20);
            let params =
                sys::ggml_init_params { mem_size, mem_buffer: null_mut(), no_alloc: false };
            let context = sys::ggml_init(params);
            assert!(!context.is_null(), "no memory");
            let mask = causal_mask(context, input);
            let mut layers = Vec::new();
            for _ in 0..num_layers {
                let side = |data: &[f32]| {
                    let all = sys::ggml_new_tensor_2d(context, dtype, dim * heads, tokens);
                    let target = sys::ggml_get_data(all);
                    quantize(dtype, data, dim * heads, target);
                    let head = sys::ggml_row_size(dtype, dim);
                    sys::ggml_view_3d(context, all, dim, tokens, heads, row, head, 0)
                };
                let (k, v) = (side(&input.keys), side(&input.values));
                let f32_type = sys::GGML_TYPE_F32;
                let q_heads = shape.num_q_heads as i64;
                let q = sys::ggml_new_tensor_3d(context, f32_type, dim, q_heads, queries);
                let target = sys::ggml_get_data(q).cast::<f32>();
                target.copy_from_nonoverlapping(input.query.as_ptr(), input.query.len());
                let q = sys::ggml_permute(context, q, 0, 2, 1, 3);
                let scale = 1.0 / (dim as f32).sqrt();
                let out = sys::ggml_flash_attn_ext(context, q, k, v, mask, scale, 0.0, 0.0);
                let graph = sys::ggml_new_graph_custom(context, 16, false);
                sys::ggml_build_forward_expand(graph, out);
                layers.push((graph, out));
            }
            Self {
                num_layers,
                threads,
                context,
                layers,
                work: Vec::new(),
                elements: input.query.len(),
            }
        }
    }

    pub fn run(&mut self, layer: usize) {
        let (graph, _) = self.layers[layer];
        // SAFETY: a graph of this context, with a work buffer as large as its plan asks for.
        unsafe {
            let mut plan = sys::ggml_graph_plan(graph, self.threads.1, self.threads.0);
            if self.work.len() < plan.work_size {
                self.work.resize(plan.work_size, 0);
            }
            plan.work_data = self.work.as_mut_ptr();
            let status = sys::ggml_graph_compute(graph, &raw mut plan);
            assert_eq!(status, sys::GGML_STATUS_SUCCESS);
        }
    }

    /// The output of a layer, `[queries, num_q_heads, head_dim]`.
    pub fn output(&self, layer: usize) -> &[f32] {
        // SAFETY: a contiguous f32 tensor of as many elements as the query.
        unsafe {
            let data = sys::ggml_get_data(self.layers[layer].1).cast::<f32>();
            std::slice::from_raw_parts(data, self.elements)
        }
    }
}

impl Drop for Peer<'_> {
    fn drop(&mut self) {
        // SAFETY: ours, and no graph is running.
        unsafe { sys::ggml_free(self.context) };
    }
}

/// Encodes rows of `wide` values with ggml's own code.
///
/// # Safety
/// `target` holds as many encoded rows.
unsafe fn quantize(dtype: sys::ggml_type, rows: &[f32], wide: i64, target: *mut std::ffi::c_void) {
    let count = rows.len() as i64 / wide;
    // SAFETY: by contract.
    unsafe {
        sys::ggml_quantize_chunk(dtype, rows.as_ptr(), target, 0, count, wide, std::ptr::null());
    }
}

/// What llama.cpp hands over: 0 where a query sees a key, else negative infinity.
///
/// # Safety
/// The context has room for it.
unsafe fn causal_mask(context: *mut sys::ggml_context, input: &Input) -> *mut sys::ggml_tensor {
    let (tokens, padded) = (input.tokens, input.queries.next_multiple_of(MASK_PAD));
    // SAFETY: the tensor holds `[padded, tokens]` f16.
    unsafe {
        let mask =
            sys::ggml_new_tensor_2d(context, sys::GGML_TYPE_F16, tokens as i64, padded as i64);
        let data = sys::ggml_get_data(mask).cast::<u16>();
        let data = std::slice::from_raw_parts_mut(data, tokens * padded);
        const NEGATIVE_INFINITY: u16 = 0xFC00;
        for (query, row) in data.chunks_exact_mut(tokens).enumerate() {
            let visible = (tokens - input.queries + query + 1).min(tokens);
            row[..visible].fill(0);
            row[visible..].fill(NEGATIVE_INFINITY);
        }
        mask
    }
}

/// The conversion that ggml's CPU backend uses for rows it writes to a cache.
pub fn encoder(dtype: sys::ggml_type) -> impl Fn(&[f32], &mut [u8]) {
    // SAFETY: a static table.
    let convert = unsafe { (*sys::ggml_get_type_traits_cpu(dtype)).from_float };
    let convert = convert.expect("a type with a conversion");
    move |rows, out| {
        // SAFETY: `out` is as long as these encoded values.
        unsafe {
            assert_eq!(sys::ggml_row_size(dtype, rows.len() as i64), out.len());
            convert(rows.as_ptr(), out.as_mut_ptr().cast(), rows.len() as i64);
        }
    }
}
