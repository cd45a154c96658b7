//! Values that are the first elements of keys (MLA), and values of another length than keys.

mod common;

use common::{Engine, Random, check, config, relative_error, walk};
use kvmgr::attention::{Options, write_sequence};
use kvmgr::device::tensor::Tensor;
use kvmgr::dtype::DType;
use kvmgr::error::Kind;
use kvmgr::manager::{Manager, ManagerConfig, Session};
use kvmgr::shape::{ModelShape, Rope, RopeStyle, Values};

const LATENT: usize = 64;
const ROTATED: usize = 32;

fn latent(num_layers: usize, num_q_heads: usize) -> ModelShape {
    let shape = ModelShape::new(num_layers, num_q_heads, 1, LATENT + ROTATED);
    ModelShape { values: Values::InKeys(LATENT), ..shape }
}

/// `matrix [rows, columns] . vector`, in f64.
fn product(matrix: &[f32], vector: &[f64]) -> Vec<f64> {
    let row = |row: &[f32]| row.iter().zip(vector).map(|(a, b)| f64::from(*a) * b).sum();
    matrix.chunks_exact(vector.len()).map(row).collect()
}

/// `vector . matrix [rows, columns]`, in f64.
fn product_left(vector: &[f32], matrix: &[f32], columns: usize) -> Vec<f64> {
    let mut out = vec![0.0; columns];
    for (x, row) in vector.iter().zip(matrix.chunks_exact(columns)) {
        out.iter_mut().zip(row).for_each(|(out, w)| *out += f64::from(*x) * f64::from(*w));
    }
    out
}

/// Latent attention from its definition: each head makes its own keys and values of the latents.
#[test]
fn the_absorbed_form_equals_multi_head_attention_over_expanded_latents() {
    const HEADS: usize = 3;
    const PLAIN: usize = 24;
    const VALUE: usize = 20;
    let scale = 1.0 / ((PLAIN + ROTATED) as f32).sqrt();
    let config = ManagerConfig { dtype: DType::F32, ..config(latent(1, HEADS), "full") };
    let mut engine = Engine::new(config, 1);
    let mut session = engine.session();
    let random = &mut Random(5);
    let tokens = 70;
    let keys = random.normals(tokens * (LATENT + ROTATED));
    let up_keys = random.normals(HEADS * PLAIN * LATENT);
    let up_values = random.normals(HEADS * VALUE * LATENT);
    let queries = random.normals(HEADS * (PLAIN + ROTATED));

    session.sequence_mut().reserve(tokens).unwrap();
    engine.attention.plan(&[(session.sequence(), tokens)]).unwrap();
    engine.append(0, &keys, &[]);
    session.commit(tokens - 1, None).unwrap();
    session.sequence_mut().reserve(1).unwrap();
    engine.attention.plan(&[(session.sequence(), 1)]).unwrap();
    engine.append(0, &keys[(tokens - 1) * (LATENT + ROTATED)..], &[]);
    // The query meets the latent through the up-projection of keys.
    let mut absorbed = Vec::new();
    for (head, query) in queries.chunks_exact(PLAIN + ROTATED).enumerate() {
        let up = &up_keys[head * PLAIN * LATENT..][..PLAIN * LATENT];
        absorbed.extend(product_left(&query[..PLAIN], up, LATENT).iter().map(|x| *x as f32));
        absorbed.extend_from_slice(&query[PLAIN..]);
    }
    let step = engine.run(0, absorbed, &Options { scale, ..Options::default() });

    for head in 0..HEADS {
        let query = &queries[head * (PLAIN + ROTATED)..][..PLAIN + ROTATED];
        let up_key = &up_keys[head * PLAIN * LATENT..][..PLAIN * LATENT];
        let up_value = &up_values[head * VALUE * LATENT..][..VALUE * LATENT];
        let (mut sum, mut expected) = (0.0, vec![0.0; VALUE]);
        for row in keys.chunks_exact(LATENT + ROTATED) {
            let latent: Vec<f64> = row[..LATENT].iter().map(|x| f64::from(*x)).collect();
            let rotated = row[LATENT..].iter().map(|x| f64::from(*x));
            let key = product(up_key, &latent).into_iter().chain(rotated);
            let logit: f64 = query.iter().zip(key).map(|(q, k)| f64::from(*q) * k).sum();
            let weight = (logit * f64::from(scale)).exp();
            sum += weight;
            let value = product(up_value, &latent);
            expected.iter_mut().zip(value).for_each(|(out, v)| *out += weight * v);
        }
        expected.iter_mut().for_each(|x| *x /= sum);
        let output = step.output[head * LATENT..][..LATENT].iter().map(|x| f64::from(*x));
        let output: Vec<f32> =
            product(up_value, &output.collect::<Vec<_>>()).iter().map(|x| *x as f32).collect();
        let error = relative_error(&output, &expected);
        assert!(error < 1e-4, "head {head}: {error}");
    }
}

/// Policies, formats, forks, truncation: everything goes the way that other rows go.
#[test]
fn pipelines_over_latents_agree_with_the_reference() {
    let specs = [
        "full",
        "quant(q8_0)",
        "quant(k=had+q4_0)",
        "quant(kivi4)",
        "quant(tq4)",
        "stream(sink=2, recent=60) | pos(cache_relative)",
        "snapkv(w=8) | keep(0.5)",
        "snapkv(w=8) | vnorm | adakv(0.2) | keep(0.5) | quant(q8_0)",
        "keydiff | keep(0.5) | quant(kivi2)",
        "h2o(recent=16) | keep_tokens(64)",
        "lagkv(lag=16) | keep(0.5)",
        "cur | keep(0.5)",
        "expected(future=16) | keep(0.5)",
        "capkv(future=16) | keep(0.5)",
        "snapkv(w=8) | keep(0.25) | demote(kivi2) | quant(q8_0)",
    ];
    for (i, spec) in specs.iter().enumerate() {
        let mut config = config(latent(2, 6), spec);
        config.rope = Some(Rope { first: LATENT, ..Rope::new(RopeStyle::Half, ROTATED, 1e4) });
        config.block_size = 32;
        let mut engine = Engine::new(config, i as u64);
        let mut session = engine.session();
        walk(&mut engine, &mut session, &[150, 1, 1, 40], [1, 1]);
    }
}

/// Rows longer than the kernels for short ones take, and more query heads than are taken at once.
#[test]
fn latents_as_long_as_those_of_deepseek_agree_with_the_reference() {
    let shape = ModelShape { values: Values::InKeys(512), ..ModelShape::new(1, 20, 1, 576) };
    for (i, spec) in ["full", "quant(q8_0)", "quant(had+q4_0)", "quant(kivi4)", "quant(tq4)"]
        .into_iter()
        .enumerate()
    {
        let mut config = config(shape, spec);
        config.block_size = 32;
        let mut engine = Engine::new(config, i as u64);
        let mut session = engine.session();
        for n in [70, 1, 3] {
            let steps = engine.step(&mut [&mut session], &[n]);
            check(&engine, &[&mut session], &[n], &steps, &Options::default());
            session.commit(n, None).unwrap();
        }
    }
}

#[test]
fn latents_take_the_bytes_of_keys_alone() {
    for (spec, row) in [("full", 2 * 96), ("quant(q8_0)", 3 * 34), ("quant(k=q4_0)", 3 * 18)] {
        let config = config(latent(2, 4), spec);
        let manager = Manager::new(config).unwrap();
        let cache = manager.cache();
        let bytes = cache.formats()[cache.sealed_format()].block_bytes;
        let block_size = cache.config().block_size;
        assert_eq!(bytes, (2 * block_size * row).next_multiple_of(64), "{spec}");
    }
}

#[test]
fn what_does_not_fit_latents_is_refused() {
    let refused = |shape: ModelShape, spec: &str, part: &str| {
        let error = Manager::new(config(shape, spec)).unwrap_err().to_string();
        assert!(error.contains(part), "{spec}: {error}");
    };
    let shape = latent(1, 2);
    refused(ModelShape { values: Values::InKeys(97), ..shape }, "full", "value_dim is 97");
    refused(ModelShape { values: Values::Own(0), ..shape }, "full", "value_dim is 0");
    refused(shape, "quant(k=q8_0, v=q4_0)", "they cannot be q4_0");
    refused(shape, "snapkv(w=8) | keep(0.5) | merge", "merge changes values");
    let rope = Some(Rope { first: 80, ..Rope::new(RopeStyle::Half, ROTATED, 1e4) });
    let error = Manager::new(ManagerConfig { rope, ..config(shape, "full") }).unwrap_err();
    assert!(error.to_string().contains("rope_first is 80, must be at most 64"), "{error}");

    for (shape, has_value) in [(shape, true), (ModelShape::new(1, 2, 1, 96), false)] {
        let manager = Manager::new(config(shape, "full")).unwrap();
        let mut session = Session::new(&manager, None).unwrap();
        session.sequence_mut().reserve(1).unwrap();
        let rows = vec![0.0; 96];
        let rows = Tensor::from_slice(&rows, [1, 1, 96]);
        let value = has_value.then_some(&rows);
        let error = write_sequence(session.sequence(), 0, &rows, value).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert_eq!(session.sequence().shared().written(0), 0);
    }
}

/// The same from C: keys alone are appended, outputs are as long as values.
#[test]
#[expect(unsafe_code, reason = "the C functions")]
fn latents_through_the_c_interface() {
    use std::ptr;

    use kvmgr::ffi::attention::*;
    use kvmgr::ffi::cache::*;
    use kvmgr::ffi::sequence::*;
    use kvmgr::ffi::types::*;
    let tensor = |data: &mut [f32], heads: i64, dim: i64| kvmgr_tensor {
        data: data.as_mut_ptr().cast(),
        dtype: KVMGR_DTYPE_F32,
        ndim: 3,
        shape: [1, heads, dim, 0],
        strides: [0; 4],
        device_type: kvmgr_device_type(0),
        device_id: 0,
    };
    let (mut cache, mut attention, mut sequence) =
        (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
    // SAFETY: a zeroed struct with its size, live handles, tensors that outlive the calls.
    unsafe {
        let mut config: kvmgr_cache_config = std::mem::zeroed();
        config.struct_size = size_of::<kvmgr_cache_config>();
        (config.num_layers, config.num_q_heads, config.num_kv_heads) = (1, 2, 1);
        (config.head_dim, config.value_dim, config.num_blocks) = (96, 64, 8);
        (config.flags, config.dtype) = (KVMGR_CACHE_VALUES_IN_KEYS, KVMGR_DTYPE_F32);
        assert_eq!(kvmgr_cache_create(&raw const config, &raw mut cache), KVMGR_OK);
        assert_eq!(kvmgr_attention_create(cache, &raw mut attention), KVMGR_OK);
        assert_eq!(kvmgr_cache_sequence_create(cache, ptr::null(), &raw mut sequence), KVMGR_OK);
        assert_eq!(kvmgr_sequence_reserve(sequence, 1), KVMGR_OK);
        let one = 1;
        assert_eq!(
            kvmgr_attention_plan(attention, &raw const sequence, &raw const one, 1),
            KVMGR_OK
        );
        let mut rows: Vec<f32> = (0..96).map(|i| i as f32).collect();
        let key = tensor(&mut rows, 1, 96);
        let append = |value: *const kvmgr_tensor| {
            kvmgr_attention_append(attention, 0, &raw const key, value, 0, 1)
        };
        assert_eq!(append(&raw const key), KVMGR_INVALID_ARGUMENT);
        assert_eq!(append(ptr::null()), KVMGR_OK);
        let (mut query, mut out) = ([0.01; 192], [0.0; 128]);
        let (query, output) = (tensor(&mut query, 2, 96), tensor(&mut out, 2, 64));
        let run = |output: *const kvmgr_tensor| {
            let (query, none) = (&raw const query, ptr::null());
            kvmgr_attention_run(attention, 0, query, output, none, ptr::null(), 0, 1)
        };
        assert_eq!(run(&raw const query), KVMGR_INVALID_ARGUMENT);
        assert_eq!(run(&raw const output), KVMGR_OK);
        // A single row is its own mean.
        for values in out.chunks_exact(64) {
            assert_eq!(values, &rows[..64]);
        }
        kvmgr_sequence_destroy(sequence);
        kvmgr_attention_destroy(attention);
        kvmgr_cache_release(cache);
    }
}
