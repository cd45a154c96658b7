//! Quantizers against vectors that other programs made; `tests/golden/README.md` names them.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::sync::Arc;

use kvmgr::quantizer::{Cell, Quantizer, Side, create_on};
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
    quantizer.decode(&Cell { bytes: &bytes, tokens, dim, rows: 0..tokens }, &mut values);
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
