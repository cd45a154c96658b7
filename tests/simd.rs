//! Kernels of every level of this CPU against f64 loops.

use half::{bf16, f16};
use kvmgr::simd::{self, Format, Kernels, Rows};

fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut one = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| one()).collect()
}

const LENGTHS: [usize; 12] = [0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 100, 3000];

fn levels() -> impl Iterator<Item = &'static Kernels> {
    simd::available()
}

#[test]
fn the_plain_level_is_always_there_and_last() {
    assert_eq!(levels().last().unwrap().name, "scalar");
    assert_eq!(simd::select("scalar").unwrap().name, "scalar");
    let error = simd::select("sse9").unwrap_err();
    assert!(error.message().contains("sse9") && error.message().contains("scalar"));
    assert!(simd::select("").is_err());
}

/// Raw rows of any width, with gaps between the rows, for 0 to 17 queries.
#[test]
fn raw_rows_of_any_width_stride_and_batch() {
    for kernels in levels() {
        for dim in [1, 5, 8, 20, 33, 40, 64, 71, 128, 300] {
            for (count, n) in [(0, 3), (1, 1), (3, 2), (5, 4), (9, 7), (17, 8), (4, 17), (2, 0)] {
                for format in [Format::F32, Format::F16, Format::Bf16] {
                    check_rows(kernels, format, dim, count, n);
                }
            }
        }
    }
}

fn check_rows(kernels: &Kernels, format: Format, dim: usize, count: usize, n: usize) {
    let values = random(dim as u64, count * dim);
    let (stride, size) = (format.row_bytes(dim, 32) + 6, format.row_bytes(dim, 32));
    // The bytes end with the last row: reading past it would be noticed by a sanitizer.
    let mut bytes = vec![0xff; (count * stride).saturating_sub(6)];
    for (t, row) in values.chunks(dim).enumerate() {
        let out = &mut bytes[t * stride..][..size];
        match format {
            Format::F16 => kernels.encode_f16(row, out),
            Format::Bf16 => kernels.encode_bf16(row, out),
            _ => out.copy_from_slice(&row.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>()),
        }
    }
    let rows = Rows { bytes: &bytes, stride, count, dim, group: 32, ahead: &[] };
    let mut decoded = vec![f32::NAN; count * dim];
    kernels.decode(format, &rows, &mut decoded);
    let rounding = if format == Format::Bf16 { 4e-3 } else { 5e-4 };
    assert!(decoded.iter().zip(&values).all(|(a, b)| (a - b).abs() <= rounding));

    let queries = random(7, n * dim);
    let mut scores = vec![f32::NAN; n * count];
    kernels.dot(format, &rows, &queries, &mut scores);
    let weights = random(8, n * count);
    let mut outputs = vec![2.0; n * dim];
    kernels.axpy(format, &rows, &weights, &mut outputs);
    let at = |t: usize, c: usize| f64::from(decoded[t * dim + c]);
    let name = kernels.name;
    for i in 0..n {
        for t in 0..count {
            let sum: f64 = (0..dim).map(|c| at(t, c) * f64::from(queries[i * dim + c])).sum();
            let score = f64::from(scores[i * count + t]);
            assert!((score - sum).abs() < 1e-5, "{name} {format:?} [{count}, {dim}] {i} {t}");
        }
        for c in 0..dim {
            let sum: f64 = (0..count).map(|t| at(t, c) * f64::from(weights[i * count + t])).sum();
            let output = f64::from(outputs[i * dim + c]);
            assert!(
                (output - sum - 2.0).abs() < 1e-5,
                "{name} {format:?} [{count}, {dim}] {i} {c}"
            );
        }
    }
}

#[test]
fn conversions_round_like_the_reference_for_every_kind_of_float() {
    // All sign, exponent and leading mantissa bits, with tails around ties.
    let tails = [0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xffff];
    let values: Vec<f32> = (0..=0xffffu32)
        .step_by(5)
        .flat_map(|upper| tails.map(|tail| f32::from_bits(upper << 16 | tail)))
        .collect();
    let expected_f16: Vec<u8> =
        values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
    let expected_bf16: Vec<u8> =
        values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
    for kernels in levels() {
        let mut out = vec![0; values.len() * 2];
        kernels.encode_f16(&values, &mut out);
        assert!(out == expected_f16, "{} f16", kernels.name);
        kernels.encode_bf16(&values, &mut out);
        assert!(out == expected_bf16, "{} bf16", kernels.name);
    }
}

/// Every f16 bit pattern comes back, NaN as some NaN.
#[test]
fn every_half_decodes() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for kernels in levels() {
        for format in [Format::F16, Format::Bf16] {
            let rows = Rows {
                bytes: &bytes,
                stride: 512,
                count: 256,
                dim: 256,
                group: 32,
                ahead: &bytes[..100],
            };
            let mut out = vec![0.0; 1 << 16];
            kernels.decode(format, &rows, &mut out);
            for (i, x) in out.iter().enumerate() {
                let expected = match format {
                    Format::F16 => f16::from_bits(i as u16).to_f32(),
                    _ => bf16::from_bits(i as u16).to_f32(),
                };
                let same = x.to_bits() == expected.to_bits() || x.is_nan() && expected.is_nan();
                assert!(same, "{} {format:?} {i:#x}: {x}", kernels.name);
            }
        }
    }
}

#[test]
fn vector_sums_scale_and_max() {
    for kernels in levels() {
        for length in LENGTHS {
            let (a, b) = (random(1, length), random(2, length));
            let terms = || a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b));
            let size: f64 = terms().map(f64::abs).sum();
            let error = (f64::from(kernels.dot_f32(&a, &b)) - terms().sum::<f64>()).abs();
            assert!(error <= 1e-6 * size, "{} {length}: {error}", kernels.name);

            let mut y = b.clone();
            kernels.axpy_f32(0.3, &a, &mut y);
            let expected = a.iter().zip(&b).map(|(a, b)| 0.3 * a + b);
            assert!(y.iter().zip(expected).all(|(y, e)| (y - e).abs() < 1e-6));
            kernels.scale(&mut y, 0.0);
            assert!(y.iter().all(|y| *y == 0.0));

            let largest = a.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(kernels.max(&a), largest);
            for i in 0..length.min(40) {
                let mut a = a.clone();
                a[i] = f32::NAN;
                let rest = (0..length).filter(|j| *j != i).map(|j| a[j]);
                assert_eq!(kernels.max(&a), rest.fold(f32::NEG_INFINITY, f32::max));
                a[i] = 5.0;
                assert_eq!(kernels.max(&a), 5.0);
            }
        }
    }
}

#[test]
fn exponentials_are_accurate_and_ordered_at_the_edges() {
    for kernels in levels() {
        let mut scores: Vec<f32> = (0..100_000).map(|i| -(i as f32) * 9e-4).collect();
        let inputs = scores.clone();
        let sum = kernels.exp_sub(&mut scores, 0.0);
        let mut exact = 0.0;
        for (x, y) in inputs.iter().zip(&scores) {
            let e = f64::from(*x).exp();
            exact += e;
            if *x > -87.3 {
                let relative = (f64::from(*y) - e).abs() / e;
                assert!(relative < 3e-7, "{}: exp({x}) is off by {relative}", kernels.name);
            } else {
                assert!(f64::from(*y) <= e * 1.001, "{}: exp({x}) = {y}", kernels.name);
            }
        }
        assert!((f64::from(sum) / exact - 1.0).abs() < 1e-6, "{}", kernels.name);

        for length in LENGTHS {
            let scores = random(4, length);
            let (mut ours, max) = (scores.clone(), kernels.max(&scores));
            let sum = kernels.exp_sub(&mut ours, max);
            let exact: f64 = scores.iter().map(|x| (f64::from(*x) - f64::from(max)).exp()).sum();
            assert!((f64::from(sum) - exact).abs() <= 1e-6 * exact, "{} {length}", kernels.name);
        }
        for at in [0, 8] {
            let mut scores = [0.0f32; 9];
            (scores[at], scores[1], scores[2], scores[3]) =
                (f32::NEG_INFINITY, -1e30, f32::MIN, f32::NEG_INFINITY);
            let sum = kernels.exp_sub(&mut scores, 0.0);
            assert_eq!((scores[at], scores[1], scores[2], scores[3]), (0.0, 0.0, 0.0, 0.0));
            assert_eq!(sum, scores.iter().sum::<f32>());
            scores = [0.0; 9];
            scores[at] = f32::NAN;
            assert!(kernels.exp_sub(&mut scores, 0.0).is_nan() && scores[at].is_nan());
            scores = [f32::NEG_INFINITY; 9];
            assert_eq!(kernels.exp_sub(&mut scores, f32::NEG_INFINITY), 0.0);
            assert_eq!(scores, [0.0; 9]);
        }
    }
}

/// Rows in pieces, with rows that see nothing, NaN, and values that no single maximum fits.
#[test]
fn a_running_softmax_equals_one_over_everything() {
    // Some levels take several rows at once, if none of them is like the first five.
    const ROWS: usize = 14;
    for kernels in levels() {
        for n in [1, 15, 16, 33, 2000] {
            let mut logits: Vec<Vec<f32>> = (0..ROWS as u64).map(|i| random(i, 3 * n)).collect();
            logits[1].iter_mut().enumerate().for_each(|(i, x)| *x += i as f32);
            logits[2][..n].fill(f32::NEG_INFINITY);
            logits[3].fill(f32::NEG_INFINITY);
            logits[4][n] = f32::NAN;
            logits[9][..n].iter_mut().for_each(|x| *x -= 100.0);
            let (mut max, mut sum) = (vec![f32::NEG_INFINITY; ROWS], vec![0.0f32; ROWS]);
            let mut weights = vec![Vec::new(); ROWS];
            for piece in 0..3 {
                let mut scores: Vec<f32> =
                    logits.iter().flat_map(|row| row[piece * n..][..n].to_vec()).collect();
                let mut factor = vec![f32::NAN; ROWS];
                let mut softmax =
                    simd::Softmax { max: &mut max, sum: &mut sum, factor: &mut factor };
                kernels.weigh(&mut scores, &mut softmax);
                for (row, scores) in scores.chunks(n).enumerate() {
                    weights[row].iter_mut().for_each(|w| *w *= factor[row]);
                    weights[row].extend_from_slice(scores);
                }
            }
            for (row, logits) in logits.iter().enumerate() {
                let name = kernels.name;
                if row == 3 {
                    assert_eq!((max[row], sum[row]), (f32::NEG_INFINITY, 0.0), "{name}");
                    assert!(weights[row].iter().all(|w| *w == 0.0), "{name}");
                    continue;
                }
                assert_eq!(sum[row].is_nan(), row == 4, "{name}");
                if row == 4 {
                    continue;
                }
                let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                assert_eq!(max[row], most, "{name}");
                let exact = |x: &f32| (f64::from(*x) - f64::from(most)).exp();
                let total: f64 = logits.iter().map(exact).sum();
                assert!((f64::from(sum[row]) - total).abs() <= 1e-5 * total, "{name} {n}");
                for (w, x) in weights[row].iter().zip(logits) {
                    assert!((f64::from(*w) - exact(x)).abs() <= 1e-5, "{name} {n}");
                }
            }
        }
        // Nothing but NaN is not nothing.
        let (mut max, mut sum, mut factor) = ([f32::NEG_INFINITY], [0.0], [0.0]);
        let mut softmax = simd::Softmax { max: &mut max, sum: &mut sum, factor: &mut factor };
        kernels.weigh(&mut [f32::NAN; 3], &mut softmax);
        assert!(sum[0].is_nan(), "{}", kernels.name);
    }
}

#[test]
fn hadamard_is_its_own_inverse_and_equal_on_all_levels() {
    for size in [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024] {
        let values = random(size as u64, 3 * size);
        let mut reference: Option<Vec<u32>> = None;
        for kernels in levels() {
            let mut rotated = values.clone();
            kernels.hadamard(&mut rotated, size);
            let bits: Vec<u32> = rotated.iter().map(|x| x.to_bits()).collect();
            assert_eq!(*reference.get_or_insert_with(|| bits.clone()), bits, "{size}");
            for (i, row) in values.chunks(size).enumerate() {
                for (j, y) in rotated[i * size..][..size].iter().enumerate() {
                    let sign = |k: usize| if (k & j).count_ones() % 2 == 1 { -1.0 } else { 1.0 };
                    let sum: f64 =
                        row.iter().enumerate().map(|(k, x)| sign(k) * f64::from(*x)).sum();
                    assert!((f64::from(*y) - sum / (size as f64).sqrt()).abs() < 1e-5, "{size}");
                }
            }
            kernels.hadamard(&mut rotated, size);
            assert!(values.iter().zip(&rotated).all(|(a, b)| (a - b).abs() < 1e-6), "{size}");
        }
    }
}

/// Blocks of many kinds: bytes of every level equal those of the plain one.
#[test]
fn ggml_blocks_are_equal_on_all_levels() {
    let scalar = simd::select("scalar").unwrap();
    let mut values = random(11, 32 * 2000);
    for (i, block) in values.chunks_mut(32).enumerate() {
        let factor = 2f32.powi(i as i32 % 250 - 140);
        block.iter_mut().for_each(|x| *x *= factor);
        match i % 9 {
            // Exact ties of both formats.
            0 => block.iter_mut().enumerate().for_each(|(j, x)| *x = (j as f32 - 8.0) / 2.0 * 8.0),
            1 => (block[9], block[30]) = (-block[3], block[3]),
            2 => block[i % 32] = f32::NAN,
            3 => (block[i % 32], block[7]) = (f32::INFINITY, f32::NEG_INFINITY),
            4 => block.fill([0.0, -0.0, 1.0, -1.0, f32::NAN, f32::MAX][i % 6]),
            5 => block[i % 32] = [8_319_009.0, 524_033.0, -1e30, f32::MIN][i % 4],
            _ => {}
        }
    }
    let encode = |kernels: &Kernels| {
        let (mut q8, mut q4) = (vec![0; 2000 * 34], vec![0; 2000 * 18]);
        kernels.encode_q8_0(&values, &mut q8);
        kernels.encode_q4_0(&values, &mut q4);
        (q8, q4)
    };
    let (q8, q4) = encode(scalar);
    for kernels in levels() {
        let (ours8, ours4) = encode(kernels);
        for i in 0..2000 {
            let block = &values[i * 32..][..32];
            assert_eq!(ours8[i * 34..][..34], q8[i * 34..][..34], "{} {block:?}", kernels.name);
            assert_eq!(ours4[i * 18..][..18], q4[i * 18..][..18], "{} {block:?}", kernels.name);
        }
    }
}

#[test]
fn rows_outside_of_the_bytes_are_refused() {
    for kernels in levels() {
        let refused = |format, stride, count, dim, group| {
            let bytes = [0; 64];
            let rows = Rows { bytes: &bytes, stride, count, dim, group, ahead: &bytes };
            let mut out = vec![0.0; count * dim];
            let run = std::panic::AssertUnwindSafe(|| kernels.decode(format, &rows, &mut out));
            std::panic::catch_unwind(run).is_err()
        };
        assert!(!refused(Format::F16, 32, 2, 16, 32));
        assert!(refused(Format::F16, 34, 2, 16, 32));
        assert!(refused(Format::F16, 32, 3, 16, 32));
        assert!(refused(Format::F16, usize::MAX, 3, 16, 32));
        assert!(refused(Format::Q8_0, 34, 1, 16, 32));
        assert!(refused(Format::Q8_0, 34, 2, 32, 32));
        assert!(refused(Format::Affine2, 12, 1, 32, 48));
        assert!(refused(Format::F32, 0, 1, 0, 32));
    }
}
