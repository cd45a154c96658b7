//! Conformance of every registered quantizer, on both sides and on every SIMD level: a new entry of
//! the registry is tested without a word here, except its error bound in `error_bound`.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::ops::Range;
use std::sync::Arc;

use kvmgr::quantizer::{
    Cell, Granularity, MAX_DIM, MAX_TOKENS, QUANTIZERS, Quantizer, Side, create, create_on,
};
use kvmgr::simd::{self, IntegerQueries};

const TOKENS: [usize; 6] = [0, 1, 2, 31, 32, 33];
const DIMS: [usize; 8] = [1, 20, 32, 64, 80, 96, 128, 256];

/// Every example of every entry, on both sides, as one quantizer for each level.
fn for_each(mut test: impl FnMut(&str, Side, &[Arc<dyn Quantizer>])) {
    for spec in QUANTIZERS.iter().flat_map(|entry| entry.examples) {
        for side in [Side::Key, Side::Value] {
            let levels: Vec<_> =
                simd::available().map(|kernels| create_on(spec, side, kernels).unwrap()).collect();
            test(spec, side, &levels);
        }
    }
}

/// Shapes that the quantizer accepts.
fn shapes(quantizer: &dyn Quantizer) -> Vec<(usize, usize)> {
    let all = TOKENS.iter().flat_map(|tokens| DIMS.iter().map(move |dim| (*tokens, *dim)));
    let shapes: Vec<_> =
        all.filter(|(tokens, dim)| quantizer.check(*tokens, *dim).is_ok()).collect();
    assert!(shapes.len() >= 18, "{} accepts only {shapes:?}", quantizer.spec());
    shapes
}

/// Ranges of rows: all, one, an inner part across a group border.
fn ranges(tokens: usize) -> Vec<Range<usize>> {
    let mut ranges = vec![0..tokens, 0..tokens.min(1), tokens..tokens];
    if tokens > 2 {
        ranges.extend([tokens - 1..tokens, 1..tokens - 1, tokens / 2..tokens]);
    }
    ranges
}

struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    fn gaussian(&mut self, count: usize) -> Vec<f32> {
        let mut one = || {
            let (u, v) = (self.uniform(), self.uniform());
            ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
        };
        (0..count).map(|_| one()).collect()
    }
}

fn encode(quantizer: &dyn Quantizer, rows: &[f32], dim: usize) -> Vec<u8> {
    // A wrong fill shows bytes that were not written.
    let mut bytes = vec![0xa5; quantizer.bytes(rows.len() / dim, dim)];
    quantizer.encode(rows, dim, &mut bytes);
    bytes
}

fn decode(quantizer: &dyn Quantizer, bytes: &[u8], tokens: usize, dim: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; tokens * dim];
    quantizer.decode(&Cell { bytes, tokens, dim, rows: 0..tokens, ahead: &[] }, &mut out);
    out
}

fn length(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn bytes_and_decoded_values_agree_between_levels() {
    let mut random = Random(1);
    for_each(|spec, side, levels| {
        for (tokens, dim) in shapes(&*levels[0]) {
            let mut rows = random.gaussian(tokens * dim);
            // Magnitudes over the whole range of f16, and exact ties.
            for (i, x) in rows.iter_mut().enumerate() {
                match i % 7 {
                    0 => *x *= 1e-6,
                    1 => *x *= 1e3,
                    2 => *x = (*x * 4.0).round() / 2.0,
                    _ => {}
                }
            }
            let bytes = encode(&*levels[0], &rows, dim);
            let values = decode(&*levels[0], &bytes, tokens, dim);
            for level in &levels[1..] {
                assert_eq!(
                    bytes,
                    encode(&**level, &rows, dim),
                    "{spec} {side:?} [{tokens}, {dim}]"
                );
                let other = decode(&**level, &bytes, tokens, dim);
                assert_eq!(bits(&values), bits(&other), "{spec} {side:?} [{tokens}, {dim}]");
            }
        }
    });
}

#[test]
fn parts_of_a_cell_decode_like_the_whole() {
    let mut random = Random(2);
    for_each(|spec, side, levels| {
        for (tokens, dim) in shapes(&*levels[0]) {
            let rows = random.gaussian(tokens * dim);
            for quantizer in levels {
                let bytes = encode(&**quantizer, &rows, dim);
                let whole = decode(&**quantizer, &bytes, tokens, dim);
                for range in ranges(tokens) {
                    let mut out = vec![f32::NAN; range.len() * dim];
                    let cell = Cell { bytes: &bytes, tokens, dim, rows: range.clone(), ahead: &[] };
                    quantizer.decode(&cell, &mut out);
                    let expected = &whole[range.start * dim..range.end * dim];
                    assert_eq!(bits(expected), bits(&out), "{spec} {side:?} {range:?} of {tokens}");
                }
            }
        }
    });
}

/// `dot` and `axpy` against f64 sums over the decoded rows, for 1 to 38 queries and parts of cells.
#[test]
fn dot_and_axpy_are_sums_over_the_decoded_rows() {
    let mut random = Random(3);
    for_each(|spec, side, levels| {
        for (tokens, dim) in shapes(&*levels[0]) {
            // Constant offsets make KIVI's minimum large against its range.
            let mut rows = random.gaussian(tokens * dim);
            rows.iter_mut().enumerate().for_each(|(i, x)| *x += (i % dim % 5) as f32 * 3.0);
            for quantizer in levels {
                let bytes = encode(&**quantizer, &rows, dim);
                for (i, range) in ranges(tokens).into_iter().enumerate() {
                    let few = 1 + (tokens + dim + i) % 9;
                    // Products of matrices take 16 and more.
                    let is_few = (tokens + dim / 32 + i).is_multiple_of(2);
                    let n = if is_few { few } else { 14 + few + i % 4 * 5 };
                    let cell = Cell {
                        bytes: &bytes,
                        tokens,
                        dim,
                        rows: range,
                        ahead: &bytes[..bytes.len().min(i % 3)],
                    };
                    check_dot(&**quantizer, &cell, n, &mut random, &format!("{spec} {side:?}"));
                    check_axpy(&**quantizer, &cell, n, &mut random, &format!("{spec} {side:?}"));
                }
            }
        }
    });
}

fn check_dot(
    quantizer: &dyn Quantizer,
    cell: &Cell<'_>,
    n: usize,
    random: &mut Random,
    name: &str,
) {
    let (count, dim) = (cell.rows.len(), cell.dim);
    let mut values = vec![f32::NAN; count * dim];
    quantizer.decode(cell, &mut values);
    let queries = random.gaussian(n * dim);
    let mut prepared = queries.clone();
    quantizer.prepare_queries(dim, &mut prepared);
    let mut scores = vec![f32::NAN; n * count];
    quantizer.dot(cell, &prepared, &mut scores);
    let mut integers = IntegerQueries::default();
    quantizer.encode_queries(dim, &prepared, &mut integers);
    let mut again = vec![f32::NAN; n * count];
    quantizer.dot_prepared(cell, (&prepared, &integers), &mut again);
    for i in 0..n {
        for t in 0..count {
            let terms =
                (0..dim).map(|c| f64::from(queries[i * dim + c]) * f64::from(values[t * dim + c]));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
            let shape = (cell.tokens, dim, n);
            // Integer loops round to the largest element of a query.
            let row = &values[t * dim..(t + 1) * dim];
            let norm = row.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
            let scale = largest(&prepared[i * dim..(i + 1) * dim]) * (dim as f64).sqrt() * norm;
            for found in [&scores, &again] {
                let error = (f64::from(found[i * count + t]) - sum).abs();
                assert!(
                    error <= 2e-6 * size + 1e-6 + rounding(quantizer) * scale,
                    "{name} {shape:?}: score {i}, {t} is off by {error}"
                );
            }
        }
    }
}

fn check_axpy(
    quantizer: &dyn Quantizer,
    cell: &Cell<'_>,
    n: usize,
    random: &mut Random,
    name: &str,
) {
    let (count, dim) = (cell.rows.len(), cell.dim);
    let mut values = vec![f32::NAN; count * dim];
    quantizer.decode(cell, &mut values);
    let weights = random.gaussian(n * count);
    // Accumulators live in the rotated space until they are finished; 1 tests that they are added to.
    let mut start = vec![1.0; n * dim];
    let mut outputs = start.clone();
    quantizer.axpy(cell, &weights, &mut outputs);
    quantizer.finish_outputs(dim, &mut outputs);
    quantizer.finish_outputs(dim, &mut start);
    for i in 0..n {
        let weights_of = &weights[i * count..(i + 1) * count];
        let size = weights_of.iter().map(|w| f64::from(w.abs())).sum::<f64>() * largest(&values);
        // A rotation may gather a whole row in one element.
        let rotates = quantizer.spec().starts_with("had+") || quantizer.spec().starts_with("tq");
        let spread = if rotates { (dim as f64).sqrt() } else { 1.0 };
        let scale = largest(weights_of) * count as f64 * largest(&values) * spread;
        for c in 0..dim {
            let terms = (0..count)
                .map(|t| f64::from(weights[i * count + t]) * f64::from(values[t * dim + c]));
            let sum = terms.sum::<f64>() + f64::from(start[i * dim + c]);
            let error = (f64::from(outputs[i * dim + c]) - sum).abs();
            let shape = (cell.tokens, dim, n);
            let limit = 2e-6 * size + 1e-5 + rounding(quantizer) * scale;
            assert!(
                error <= limit,
                "{name} {shape:?}: output {i}, {c} is off by {error} > {limit}"
            );
        }
    }
}

/// What 16-bit queries, weights and levels may cost, relative to the largest of them.
fn rounding(quantizer: &dyn Quantizer) -> f64 {
    match quantizer.spec().trim_start_matches("had+") {
        "f32" | "f16" | "bf16" => 0.0,
        spec if spec.starts_with("tq") => 2e-4,
        // Codes above a minimum span twice the magnitude of the values.
        _ => 4e-5,
    }
}

fn largest(values: &[f32]) -> f64 {
    f64::from(values.iter().fold(0.0f32, |most, x| most.max(x.abs())))
}

/// Queries and weights of any magnitude keep their precision, and NaN reaches every sum of its query
/// and no other, also among many.
#[test]
fn queries_and_weights_may_be_tiny_huge_zero_or_nan() {
    let mut random = Random(5);
    let (tokens, dim) = (40, 64);
    for_each(|spec, side, levels| {
        let rows = random.gaussian(tokens * dim);
        let (queries, weights) = (random.gaussian(dim), random.gaussian(tokens));
        for quantizer in levels {
            let bytes = encode(&**quantizer, &rows, dim);
            let cell = Cell { bytes: &bytes, tokens, dim, rows: 0..tokens, ahead: &[] };
            let run = |factor: f32, n: usize| {
                // Among `n` only the middle one is multiplied.
                let times = |values: &[f32]| {
                    let factor = |i| if i == n / 2 { factor } else { 1.0 };
                    let row = |i| values.iter().map(move |x| x * factor(i));
                    (0..n).flat_map(row).collect::<Vec<_>>()
                };
                let (mut queries, mut scores) = (times(&queries), vec![f32::NAN; n * tokens]);
                quantizer.prepare_queries(dim, &mut queries);
                let mut integers = IntegerQueries::default();
                quantizer.encode_queries(dim, &queries, &mut integers);
                quantizer.dot_prepared(&cell, (&queries, &integers), &mut scores);
                let mut outputs = vec![0.0; n * dim];
                quantizer.axpy(&cell, &times(&weights), &mut outputs);
                let row =
                    |i| [&scores[i * tokens..][..tokens], &outputs[i * dim..][..dim]].concat();
                (row(n / 2), (n > 1).then(|| [row(0), row(n - 1)]))
            };
            let plain = run(1.0, 1).0;
            let size = largest(&plain);
            let check = |values: &[f32], factor: f32| {
                for (x, expected) in values.iter().zip(&plain) {
                    let error = f64::from(*x) - f64::from(*expected) * f64::from(factor);
                    let limit = 2e-3 * size * f64::from(factor);
                    assert!(error.abs() <= limit, "{spec} {side:?} {factor}: {error}");
                }
            };
            for n in [1, 19] {
                for factor in [0.0, 1e-36, 1e-25, 1e25, 3e30, f32::NAN] {
                    let (values, others) = run(factor, n);
                    if factor.is_nan() {
                        let all_nan = values.iter().all(|x| x.is_nan());
                        assert!(all_nan, "{spec} {side:?}: NaN got lost");
                    } else {
                        check(&values, factor);
                    }
                    others.iter().flatten().for_each(|values| check(values, 1.0));
                }
            }
        }
    });
}

#[test]
fn token_granularity_means_concatenated_rows() {
    let mut random = Random(4);
    for_each(|spec, side, levels| {
        let quantizer = &*levels[0];
        if quantizer.granularity() == Granularity::Block {
            return;
        }
        for (tokens, dim) in shapes(quantizer) {
            let rows = random.gaussian(tokens * dim);
            let single: Vec<u8> =
                rows.chunks(dim).flat_map(|row| encode(quantizer, row, dim)).collect();
            assert_eq!(single, encode(quantizer, &rows, dim), "{spec} {side:?} [{tokens}, {dim}]");
        }
    });
}

/// Relative L2 error on gaussian rows that the format may have at most, a little above theory: ggml's
/// as measured with gguf-py (q8_0 .0054, q4_0 .087), KIVI's as the expected range of a group of
/// gaussians (4.1, 4.7 and 5.3 for 32, 64 and 128) over its steps and the root of 12.
fn error_bound(spec: &str) -> f64 {
    match spec {
        "f32" => 0.0,
        "f16" => 2.5e-4,
        "had+f16" => 2.6e-4,
        "bf16" => 2e-3,
        "q8_0" | "had+q8_0" => 0.0058,
        "q4_0" | "had+q4_0" => 0.09,
        "q5_1" => 0.041,
        "q5_0" => 0.046,
        "q4_1" => 0.085,
        "iq4_nl" => 0.085,
        "mxfp4" => 0.125,
        "nvfp4" => 0.105,
        "fp8(e4m3)" => 0.029,
        "fp8(e5m2)" => 0.056,
        "int8" => 0.0075,
        "int4" | "had+int4" => 0.12,
        // The roots of the distortions of the levels: 0.1160, 0.0340, 0.0093.
        "tq(bits=2)" => 0.35,
        "tq(bits=3)" => 0.19,
        "tq(bits=4)" => 0.1,
        "kivi(bits=4)" => 0.083,
        "kivi(bits=4, group=64)" => 0.095,
        "kivi(bits=2)" | "had+kivi(bits=2)" => 0.41,
        "kivi(bits=2, group=128)" => 0.53,
        "nuq(bits=2)" => 0.34,
        "nuq(bits=3)" => 0.18,
        "nuq(bits=4)" => 0.1,
        "gear(bits=2)" => 0.4,
        "gear(bits=4)" => 0.08,
        // The root of (pi / 2 - 1) / 2.
        "qjl(ratio=2)" => 0.56,
        other => panic!("no error bound is stated for {other:?}"),
    }
}

#[test]
fn errors_on_gaussian_rows_are_as_published() {
    let rows = Random(5).gaussian(256 * 128);
    for_each(|spec, side, levels| {
        let bytes = encode(&*levels[0], &rows, 128);
        let values = decode(&*levels[0], &bytes, 256, 128);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let error: f64 = rows.iter().zip(&values).map(|(a, b)| square(a - b)).sum();
        let size: f64 = rows.iter().map(|x| square(*x)).sum();
        let relative = (error / size).sqrt();
        let bound = error_bound(spec);
        assert!(relative <= bound, "{spec} {side:?}: {relative} > {bound}");
        // A format much better than its bits would mean that the bound is stale.
        assert!(relative >= bound * 0.6, "{spec} {side:?}: {relative} is far below {bound}");
    });
}

/// Zeros, denormals, constants and single spikes come back within the resolution of their row.
#[test]
fn extreme_but_finite_rows_stay_finite_and_close() {
    let dim = 64;
    let rows: Vec<(&str, Vec<f32>)> = vec![
        ("zero", vec![0.0; dim]),
        ("negative zero", vec![-0.0; dim]),
        ("constant", vec![-3.7; dim]),
        ("denormal", vec![f32::from_bits(3); dim]),
        ("tiny", (0..dim).map(|i| i as f32 * 1e-39).collect()),
        ("small", (0..dim).map(|i| i as f32 * 1e-7).collect()),
        ("spike", (0..dim).map(|i| if i == 5 { 60000.0 } else { 0.5 }).collect()),
        ("large", (0..dim).map(|i| (i as f32 - 32.0) * 200.0).collect()),
    ];
    for_each(|spec, side, levels| {
        for quantizer in levels {
            for (name, row) in &rows {
                let three = [row.as_slice(), row, row].concat();
                let bytes = encode(&**quantizer, &three, dim);
                let values = decode(&**quantizer, &bytes, 3, dim);
                let most = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                // A step of 2-bit codes over a range of twice the magnitude; below 127 times the
                // smallest f16, scales vanish. A rotation gathers the errors of a row.
                let spread =
                    if spec.starts_with("had") || spec == "qjl(ratio=2)" { 4.0 } else { 1.0 };
                if spec.starts_with("tq") {
                    // Rows far from a gaussian keep their length, not their direction.
                    let (before, after) = (length(row), length(&values[..dim]));
                    assert!((before - after).abs() <= 0.01 * before + 1e-5, "{spec} {name}");
                    continue;
                }
                if spec == "nvfp4" && *name == "spike" {
                    assert_eq!(values[5], 2688.0, "saturates");
                    continue;
                }
                let limit = most * spread * 2.0 / 3.0 + 4e-6;
                for (x, y) in three.iter().zip(&values) {
                    assert!((x - y).abs() <= limit, "{spec} {side:?} {name}: {x} became {y}");
                }
            }
        }
    });
}

/// Channels that are constant over the tokens of a cell: formats with a scale for each channel keep
/// them, to the rounding of f16.
#[test]
fn constant_channels() {
    let (tokens, dim) = (33, 64);
    let channels = Random(7).gaussian(dim);
    let rows: Vec<f32> = channels.iter().cycle().take(tokens * dim).copied().collect();
    for_each(|spec, side, levels| {
        let by_channel = ["kivi", "nuq", "gear"].iter().any(|name| spec.starts_with(name));
        let bound = match side {
            Side::Key if by_channel => 4e-4,
            // One row of each format, not the average of many.
            _ => error_bound(spec) * 1.5,
        };
        for quantizer in levels {
            let bytes = encode(&**quantizer, &rows, dim);
            let values = decode(&**quantizer, &bytes, tokens, dim);
            let error: Vec<f32> = rows.iter().zip(&values).map(|(a, b)| a - b).collect();
            let relative = length(&error) / length(&rows);
            assert!(relative <= bound, "{spec} {side:?}: {relative}");
        }
    });
}

/// What cannot be held is replaced, and never spreads to neighbours outside of its group.
#[test]
fn values_that_are_not_finite() {
    let (tokens, dim) = (40, 64);
    for_each(|spec, side, levels| {
        let raw = ["f32", "f16", "bf16"].contains(&spec);
        let mut rows = Random(6).gaussian(tokens * dim);
        (rows[3], rows[70], rows[140]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        (rows[dim * 39], rows[dim * 39 + 1]) = (f32::MAX, f32::MIN);
        for quantizer in levels {
            let bytes = encode(&**quantizer, &rows, dim);
            assert_eq!(bytes, encode(&*levels[0], &rows, dim), "{spec} {side:?}");
            let values = decode(&**quantizer, &bytes, tokens, dim);
            if raw {
                assert!(values[3].is_nan());
                assert_eq!((values[70], values[140]), (f32::INFINITY, f32::NEG_INFINITY));
                continue;
            }
            if spec == "had+f16" {
                assert!(values[..39 * dim].iter().all(|x| x.is_finite()), "{spec}");
                continue;
            }
            assert!(values.iter().all(|x| x.is_finite()), "{spec} {side:?}");
            // Rows 0 to 2 hold gaussian values, so their replacements are not large; channels 0 and
            // 1 may share a group with the extremes of the last row.
            let near = (0..3 * dim).filter(|i| i % dim > 1);
            assert!(near.map(|i| values[i]).all(|x| x.abs() < 8.0), "{spec} {side:?}");
            let coarse = ["bits=2", "tq", "qjl"].iter().any(|name| spec.contains(name));
            let step = if coarse { 2.0 } else { 0.5 };
            assert!(values[3].abs() <= step, "{spec} {side:?}: NaN became {}", values[3]);
            if !["had", "tq", "qjl"].iter().any(|name| spec.starts_with(name)) {
                assert!(values[70] > 1.0 && values[140] < -1.0, "{spec} {side:?}");
                if spec == "nvfp4" {
                    assert_eq!((values[dim * 39], values[dim * 39 + 1]), (2688.0, -2688.0));
                    continue;
                }
                assert!(values[dim * 39] > 4e4 && values[dim * 39 + 1] < -4e4, "{spec} {side:?}");
            }
        }
        let all_bad = vec![f32::NAN; 2 * dim];
        let values = decode(&*levels[0], &encode(&*levels[0], &all_bad, dim), 2, dim);
        assert!(values.iter().all(|x| if raw { x.is_nan() } else { *x == 0.0 }), "{spec} {side:?}");
    });
}

#[test]
fn sizes_are_the_formats_bits() {
    let cases = [
        ("f32", 32.0, 32.0),
        ("f16", 16.0, 16.0),
        ("bf16", 16.0, 16.0),
        ("q8_0", 8.5, 8.5),
        ("q4_0", 4.5, 4.5),
        ("q5_1", 6.0, 6.0),
        ("q5_0", 5.5, 5.5),
        ("q4_1", 5.0, 5.0),
        ("iq4_nl", 4.5, 4.5),
        ("mxfp4", 4.25, 4.25),
        ("nvfp4", 4.5, 4.5),
        ("fp8_e4m3", 8.25, 8.25),
        ("fp8_e5m2", 8.25, 8.25),
        ("int8", 8.25, 8.25),
        ("int4", 4.5, 4.5),
        ("tq2", 2.125, 2.125),
        ("tq3", 3.125, 3.125),
        ("tq4", 4.125, 4.125),
        // Codes, range of a vector in 32 bits, 1 or 2 % of 32 bits, levels, matrix.
        ("nuq3", 3.0 + 0.5 + 0.3203125 + 0.015625, 3.0 + 0.25 + 0.3203125 + 0.015625),
        ("gear4", 4.0 + 0.5 + 0.640625 + 0.75, 4.0 + 0.25 + 0.640625 + 0.75),
        ("qjl(ratio=2)", 2.125, 2.125),
        ("kivi2", 3.0, 3.0),
        ("kivi4", 5.0, 5.0),
        ("kivi(bits=2, group=128)", 2.25, 2.25),
        ("had+kivi(bits=4, group=64)", 4.5, 4.5),
    ];
    for (spec, key, value) in cases {
        let bits = |side| create(spec, side).unwrap().bits_per_element(128, 128);
        assert_eq!((bits(Side::Key), bits(Side::Value)), (key, value), "{spec}");
    }
    // Short groups keep whole metadata.
    let keys = create("kivi2", Side::Key).unwrap();
    assert_eq!(keys.bytes(33, 64), 2 * 64 * 4 + 33 * 16);
    assert_eq!(create("kivi(bits=4, group=64)", Side::Value).unwrap().bytes(1, 96), 48 + 2 * 4);
}

#[test]
fn specs_make_the_same_quantizer_again() {
    for_each(|spec, side, levels| {
        assert_eq!(levels[0].spec(), *spec);
        assert_eq!(create(&levels[0].spec(), side).unwrap().spec(), *spec);
    });
    let spec = |text| create(text, Side::Key).unwrap().spec();
    assert_eq!(spec("kivi4"), "kivi(bits=4)");
    assert_eq!(spec(" had+kivi2 "), "had+kivi(bits=2)");
    assert_eq!(spec("kivi(4, 32)"), "kivi(bits=4)");
    assert_eq!(spec("fp8"), "fp8(e4m3)");
    assert_eq!(spec("gear(3, 32, 1%, 1)"), "gear(bits=3, group=32, outliers=0.01, rank=1)");
    assert_eq!(spec("nuq4"), "nuq(bits=4)");
}

#[test]
fn bad_specs_and_shapes_are_refused_with_the_limit() {
    let cases = [
        ("q5", "column 1: unknown quantizer \"q5\""),
        ("had+q5", "column 5: unknown quantizer \"q5\""),
        ("had+", "column 5: had+ is a prefix"),
        ("had+had+q4_0", "column 5: had+ is given twice"),
        ("q4_0(3)", "column 6"),
        ("had+tq3", "tq(bits=3): it rotates by itself"),
        ("tq(bits=5)", "bits is 5, must be a whole number in 2..=4"),
        ("fp8(e3m4)", "type is \"e3m4\", must be one of"),
        ("gear(outliers=0.5)", "outliers is 0.5, must be in 0..=0.1"),
        ("nuq(rank=2)", "no parameter \"rank\""),
        ("kivi(bits=3)", "bits is 3"),
        ("kivi(bits=8)", "bits is 8, must be a whole number in 2..=4"),
        ("kivi(group=48)", "group is 48"),
        ("had+kivi(group=7)", "column 10: group is 7"),
        ("kivi2(4)", "takes no arguments"),
    ];
    for (spec, text) in cases {
        let error = create(spec, Side::Key).unwrap_err();
        assert!(error.message().contains(text), "{spec}: {}", error.message());
    }
    for_each(|spec, _, levels| {
        for (tokens, dim) in [(1, 0), (1, MAX_DIM + 32), (MAX_TOKENS + 1, 64)] {
            let error = levels[0].check(tokens, dim).unwrap_err();
            assert!(
                error.message().contains(spec.trim_start_matches("had+")),
                "{}",
                error.message()
            );
        }
    });
    let error = create("q4_0", Side::Key).unwrap().check(16, 80).unwrap_err();
    assert_eq!(error.message(), "q4_0: dim is 80, must be a multiple of 32");
    assert!(create("had+f16", Side::Key).unwrap().check(16, 33).is_err());
    let error = create("qjl", Side::Key).unwrap().check(16, 96).unwrap_err();
    assert_eq!(error.message(), "qjl(ratio=2): dim is 96, must be a power of two");
    let error = create("gear4", Side::Key).unwrap().check(256, 2048).unwrap_err();
    assert!(error.message().contains("131072 elements, must be at most 65536"));
}
