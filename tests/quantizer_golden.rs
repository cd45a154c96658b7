//! Quantizers against vectors that other programs made; `tests/golden/README.md` names them.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::sync::Arc;

use common::{Engine, config};
use kvmgr::dtype::DType;
use kvmgr::quantizer::{Cell, Quantizer, Side, create_on};
use kvmgr::shape::ModelShape;
use kvmgr::simd;
use safetensors::SafeTensors;

static FILE: &[u8] = include_bytes!("golden/quant_subset.safetensors");

struct Golden(SafeTensors<'static>);

impl Golden {
    fn open() -> Self {
        Self(SafeTensors::deserialize(FILE).unwrap())
    }

    fn bytes(&self, name: &str) -> &'static [u8] {
        self.0.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}")).data()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.bytes(name).as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    fn columns(&self, name: &str) -> usize {
        self.0.tensor(name).unwrap().shape()[1]
    }
}

/// The quantizer on every level of this CPU.
fn levels(spec: &str, side: Side) -> Vec<Arc<dyn Quantizer>> {
    simd::available().map(|kernels| create_on(spec, side, kernels).unwrap()).collect()
}

fn round_trip(quantizer: &dyn Quantizer, rows: &[f32], dim: usize) -> (Vec<u8>, Vec<f32>) {
    let tokens = rows.len() / dim;
    let mut bytes = vec![0; quantizer.bytes(tokens, dim)];
    quantizer.encode(rows, dim, &mut bytes);
    let mut values = vec![f32::NAN; rows.len()];
    quantizer
        .decode(&Cell { bytes: &bytes, tokens, dim, rows: 0..tokens, ahead: &[] }, &mut values);
    (bytes, values)
}

#[test]
fn ggml_formats_are_byte_compatible() {
    let golden = Golden::open();
    let formats = [
        ("q8_0", "Q8_0"),
        ("q4_0", "Q4_0"),
        ("bf16", "BF16"),
        ("q4_1", "Q4_1"),
        ("q5_0", "Q5_0"),
        ("q5_1", "Q5_1"),
        ("iq4_nl", "IQ4_NL"),
        ("mxfp4", "MXFP4"),
    ];
    for (spec, name) in formats {
        // The vectors of IQ4_NL have neither outliers nor edge cases.
        let sources: &[_] =
            if spec == "iq4_nl" { &["gauss"] } else { &["gauss", "outlier64", "edge"] };
        for source in sources {
            let rows = golden.floats(&format!("data/{source}"));
            let dim = golden.columns(&format!("data/{source}"));
            for quantizer in levels(spec, Side::Key) {
                let (bytes, values) = round_trip(&*quantizer, &rows, dim);
                let expected = golden.bytes(&format!("ggml/{name}/{source}/bytes"));
                assert!(bytes == expected, "{spec} {source}: {}", difference(&bytes, expected));
                assert!(values == golden.floats(&format!("ggml/{name}/{source}/deq")), "{spec}");
            }
        }
    }
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
}

fn difference(ours: &[u8], theirs: &[u8]) -> String {
    let count = ours.iter().zip(theirs).filter(|(a, b)| a != b).count();
    let first = ours.iter().zip(theirs).position(|(a, b)| a != b);
    format!("{count} of {} bytes differ, the first at {first:?}", theirs.len())
}

/// Products and butterflies round differently, so a code next to a tie may move by one step.
#[test]
fn rotated_formats_agree_up_to_ties() {
    let golden = Golden::open();
    let rows = golden.floats("data/outlier64");
    for (spec, name, step) in [("had+q8_0", "Q8_0", 0.15), ("had+q4_0", "Q4_0", 1.8)] {
        let expected = golden.floats(&format!("ggml_rot/{name}/outlier64/deq"));
        let expected_bytes = golden.bytes(&format!("ggml_rot/{name}/outlier64/bytes"));
        for quantizer in levels(spec, Side::Key) {
            let (bytes, values) = round_trip(&*quantizer, &rows, 64);
            let moved = bytes.iter().zip(expected_bytes).filter(|(a, b)| a != b).count();
            assert!(moved <= bytes.len() / 200, "{spec}: {}", difference(&bytes, expected_bytes));
            let mut exact = 0;
            for (row, expected) in values.chunks(64).zip(expected.chunks(64)) {
                let error = row.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
                assert!(error <= step, "{spec}: off by {error}");
                exact += usize::from(error <= 1e-4);
            }
            assert!(exact >= 100, "{spec}: only {exact} of 128 rows are equal");
        }
    }
}

#[test]
fn the_rotation_is_the_sylvester_matrix() {
    let matrix = Golden::open().floats("hadamard/64");
    for kernels in simd::available() {
        let mut identity = vec![0.0; 64 * 64];
        identity.iter_mut().step_by(65).for_each(|x| *x = 1.0);
        kernels.hadamard(&mut identity, 64);
        assert_eq!(identity, matrix, "{}", kernels.name);
    }
}

/// The vectors use the levels of the normal distribution, we those of the sphere, so that codes near
/// a middle move; the error must not be larger.
#[test]
fn tq_agrees_up_to_ties() {
    let golden = Golden::open();
    for (source, bits) in [("gauss", 2), ("gauss", 3), ("gauss", 4), ("outlier64", 3)] {
        let rows = golden.floats(&format!("data/{source}"));
        let dim = golden.columns(&format!("data/{source}"));
        let expected = golden.floats(&format!("turboquant/mse{bits}_nc/{source}/deq"));
        for quantizer in levels(&format!("tq{bits}"), Side::Key) {
            let (_, values) = round_trip(&*quantizer, &rows, dim);
            let apart = distance(&values, &expected);
            let (ours, theirs) = (distance(&rows, &values), distance(&rows, &expected));
            assert!(apart <= 0.6 * theirs, "tq{bits} {source}: {apart} apart of {theirs}");
            assert!(ours <= theirs * 1.002, "tq{bits} {source}: error {ours} above {theirs}");
        }
    }
}

/// The vectors keep scale and minimum in f32, we in f16: codes next to a tie move by one.
#[test]
fn kivi_codes_agree_up_to_ties() {
    let golden = Golden::open();
    for bits in [2, 4] {
        for (group, tag) in [(32, "g32_r128"), (64, "g64_r64"), (128, "g128_r128")] {
            let name = format!("kivi/k{bits}_{tag}/model_k");
            let spec = format!("kivi(bits={bits}, group={group})");
            check_kivi(&golden, &spec, Side::Key, "model_k", &name, |t, c| t / group * 64 + c);
        }
        let spec = format!("kivi(bits={bits})");
        let name = format!("kivi/v{bits}_g32_r128/model_v");
        check_kivi(&golden, &spec, Side::Value, "model_v", &name, |t, c| t * 2 + c / 32);
        let name = format!("kivi/v{bits}_g32_r32/gauss");
        check_kivi(&golden, &spec, Side::Value, "gauss", &name, |t, c| t * 4 + c / 32);
    }
}

fn check_kivi(
    golden: &Golden,
    spec: &str,
    side: Side,
    source: &str,
    name: &str,
    group_of: impl Fn(usize, usize) -> usize,
) {
    let dim = golden.columns(&format!("data/{source}"));
    let codes = golden.bytes(&format!("{name}/codes"));
    let (scale, min) =
        (golden.floats(&format!("{name}/scale")), golden.floats(&format!("{name}/min")));
    let rows = &golden.floats(&format!("data/{source}"))[..codes.len()];
    for quantizer in levels(spec, side) {
        let (_, values) = round_trip(&*quantizer, rows, dim);
        let mut moved = 0;
        for (i, (value, code)) in values.iter().zip(codes).enumerate() {
            let group = group_of(i / dim, i % dim);
            // In units of steps; f16 shifts the minimum by up to 2^-11 of itself.
            let ours = (value - min[group]) / scale[group];
            let shift = (min[group] / scale[group]).abs() / 2048.0 + 0.01;
            let off = (ours - f32::from(*code)).abs();
            assert!(off <= 1.0 + shift, "{name} {i}: {ours} instead of {code}");
            if off > shift {
                moved += 1;
                let exact = (rows[i] - min[group]) / scale[group];
                let to_tie = (exact - exact.floor() - 0.5).abs();
                assert!(to_tie <= shift, "{name} {i}: {exact} became {ours}");
            }
        }
        assert!(moved <= codes.len() / 300, "{name}: {moved} of {} codes moved", codes.len());
    }
}

/// Rows of codes and f32 metadata, as the vectors keep them apart.
#[test]
fn formats_with_a_scale_for_a_row_have_the_codes_of_the_vectors() {
    let golden = Golden::open();
    let cases = [
        ("fp8(e4m3)", "fp8/e4m3fn/per_token/gauss", "gauss"),
        ("fp8(e4m3)", "fp8/e4m3fn/per_token/edge", "edge"),
        ("fp8(e5m2)", "fp8/e5m2/per_token/gauss", "gauss"),
        ("fp8(e5m2)", "fp8/e5m2/per_token/edge", "edge"),
        ("int8", "int/sym8_per_token/gauss", "gauss"),
    ];
    for (spec, name, source) in cases {
        let rows = golden.floats(&format!("data/{source}"));
        let field = if spec == "int8" { "q" } else { "bytes" };
        let expected = golden.bytes(&format!("{name}/{field}")).chunks(128);
        let scales = golden.floats(&format!("{name}/scale"));
        for quantizer in levels(spec, Side::Key) {
            let (bytes, _) = round_trip(&*quantizer, &rows, 128);
            let pairs = bytes.chunks(132).zip(expected.clone()).zip(&scales);
            for (i, ((row, codes), scale)) in pairs.enumerate() {
                let is_zero = rows[i * 128..(i + 1) * 128].iter().all(|x| *x == 0.0);
                assert!(row[..128] == *codes, "{spec} {source} row {i}");
                let ours = f32::from_le_bytes([row[128], row[129], row[130], row[131]]);
                assert!(is_zero || (ours - scale).abs() <= scale * 1e-6, "{spec} {source} {i}");
            }
        }
    }
}

#[test]
fn int4_and_nvfp4_decode_to_the_numbers_of_the_vectors() {
    let golden = Golden::open();
    let rows = golden.floats("data/gauss");
    let codes = golden.bytes("int/asym4_per_token/gauss/q");
    let (scales, minima) = (
        golden.floats("int/asym4_per_token/gauss/scale"),
        golden.floats("int/asym4_per_token/gauss/min"),
    );
    for quantizer in levels("int4", Side::Key) {
        let (_, values) = round_trip(&*quantizer, &rows, 128);
        for (i, (value, code)) in values.iter().zip(codes).enumerate() {
            let expected = scales[i / 128] * f32::from(*code) + minima[i / 128];
            assert!((value - expected).abs() <= 1e-5, "int4 {i}: {value}, not {expected}");
        }
    }
    const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let codes = golden.bytes("nvfp4/noglobal/gauss/codes");
    let scales = golden.bytes("nvfp4/noglobal/gauss/scales_e4m3");
    for quantizer in levels("nvfp4", Side::Key) {
        let (_, values) = round_trip(&*quantizer, &rows, 128);
        for (i, (value, code)) in values.iter().zip(codes).enumerate() {
            let scale = f32::from(half::f16::from_bits(u16::from(scales[i / 16]) << 7)) * 256.0;
            let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
            let expected = sign * scale * E2M1[usize::from(code & 7)];
            assert_eq!(*value, expected, "nvfp4 {i}");
        }
    }
}

/// The vectors of `nuq` calibrate one set of levels and thresholds on all 300 keys, those of `gear`
/// have one matrix of rank 4 for all tokens: our groups must not be worse than that.
#[test]
fn nuq_and_gear_are_as_good_as_the_vectors() {
    let golden = Golden::open();
    let cases = [
        ("nuq(bits=2)", "model_k_pre", 0.2245),
        ("nuq(bits=3)", "model_k_pre", 0.1131),
        ("nuq(bits=4)", "model_k_pre", 0.0566),
        ("gear(bits=2, rank=4)", "outlier", 0.1567),
        ("gear(bits=4, rank=4)", "outlier", 0.0309),
        ("gear(bits=2, rank=0)", "outlier", 0.1672 * 1.03),
        ("gear(bits=4, rank=0)", "outlier", 0.0330 * 1.03),
    ];
    for (spec, source, expected) in cases {
        let rows = golden.floats(&format!("data/{source}"));
        let dim = golden.columns(&format!("data/{source}"));
        for quantizer in levels(spec, Side::Key) {
            assert_eq!(quantizer.spec(), spec);
            let (_, values) = round_trip(&*quantizer, &rows, dim);
            let error = distance(&rows, &values) / distance(&rows, &vec![0.0; rows.len()]);
            assert!(error <= expected, "{spec} {source}: {error} above {expected}");
            assert!(error >= 0.5 * expected, "{spec} {source}: {error}, far below {expected}");
        }
    }
}

/// Scores of `qjl` correlate with the true ones as those of the vectors do (0.87 for gaussian rows
/// at two signs an element), and more signs make them better.
#[test]
fn qjl_scores_are_unbiased_estimates() {
    let rows = Golden::open().floats("data/gauss");
    let (queries, dim) = (&rows[..8 * 128], 128);
    let mut last = 0.0;
    for ratio in 1..=4 {
        for quantizer in levels(&format!("qjl(ratio={ratio})"), Side::Key) {
            let (_, values) = round_trip(&*quantizer, &rows, dim);
            let mut pairs = Vec::new();
            for query in queries.chunks(dim) {
                for (row, value) in rows.chunks(dim).zip(values.chunks(dim)).skip(8) {
                    let dot = |a: &[f32]| a.iter().zip(query).map(|(a, b)| a * b).sum::<f32>();
                    pairs.push((f64::from(dot(row)), f64::from(dot(value))));
                }
            }
            let sum = |f: fn(f64, f64) -> f64| pairs.iter().map(|(a, b)| f(*a, *b)).sum::<f64>();
            let (xx, xy, yy) = (sum(|a, _| a * a), sum(|a, b| a * b), sum(|_, b| b * b));
            let (correlation, slope) = (xy / (xx * yy).sqrt(), xy / xx);
            assert!((slope - 1.0).abs() < 0.1, "ratio {ratio}: slope {slope}");
            assert!(correlation >= last, "ratio {ratio}: {correlation} after {last}");
            assert!(ratio != 2 || (0.82..0.92).contains(&correlation), "{correlation}");
            last = correlation - 1e-9;
        }
    }
}

/// The vectors have KIVI's residual of 128: of 300 values exactly the last 128 are exact, here those of
/// whole blocks more. Codes next to a tie move by one, because scale and minimum are f16 here.
#[test]
fn kivi_with_its_residual_window_has_the_rows_of_the_vectors() {
    let golden = Golden::open();
    for bits in [2, 4] {
        let shape = ModelShape::new(1, 1, 1, 64);
        let mut config = config(shape, &format!("quant(kivi{bits}, residual=128)"));
        (config.block_size, config.dtype) = (32, DType::F32);
        let mut engine = Engine::new(config, 1);
        let mut session = engine.session();
        // The last 44 rows of the vectors are not in this repository; they stay in the window.
        let data = ["model_k", "model_v"].map(|name| {
            let rows = golden.floats(&format!("data/{name}"));
            rows.iter().copied().cycle().take(300 * 64).collect::<Vec<f32>>()
        });
        session.sequence_mut().reserve(300).unwrap();
        engine.attention.plan(&[(session.sequence(), 300)]).unwrap();
        engine.append(0, &data[0], &data[1]);
        session.commit(300, None).unwrap();
        for (side, data) in [Side::Key, Side::Value].into_iter().zip(&data) {
            let mut found = Vec::new();
            session.sequence().decode(0, 0, side, &mut found);
            // The last block whose tokens are all among the first 172.
            assert!(found[160 * 64..] == data[160 * 64..]);
            let (name, group) = match side {
                Side::Key => (format!("kivi/k{bits}_g32_r128/model_k"), 32 * 64),
                Side::Value => (format!("kivi/v{bits}_g32_r128/model_v"), 32),
            };
            let [scale, min] =
                ["scale", "min"].map(|part| golden.floats(&format!("{name}/{part}")));
            let codes = golden.bytes(&format!("{name}/codes"));
            let mut moved = 0;
            for (i, (value, code)) in found.iter().zip(codes).enumerate().take(160 * 64) {
                let group = if side == Side::Key { i / group * 64 + i % 64 } else { i / group };
                let ours = (value - min[group]) / scale[group];
                let shift = (min[group] / scale[group]).abs() / 2048.0 + 0.01;
                let off = (ours - f32::from(*code)).abs();
                assert!(off <= 1.0 + shift, "{name} {i}: {ours} instead of {}", *code);
                moved += usize::from(off > shift);
            }
            assert!(moved <= 160 * 64 / 300, "{name}: {moved} codes moved");
        }
    }
}
