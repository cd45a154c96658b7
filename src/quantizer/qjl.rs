//! QJL: the signs of a random projection, and a norm. For comparison: at equal bits `tq` is better.
//!
//! ```text
//! y_i = (x * signs_i) H for i < ratio        q_i = y_i > 0
//! x = n / ratio * sqrt(pi / 2 / dim) * sum over i of (+-1(q_i) H) * signs_i        n = |x| as f16
//! row = ratio * dim bits, lowest first, 1 for a positive coordinate, then n
//! ```
//!
//! Scores are unbiased estimates of the true ones. Their variance enters the softmax, which is why
//! minimising the error of the row itself does better. The paper draws a gaussian matrix with
//! orthogonal blocks; here each block is a Hadamard matrix H after fixed random signs, which is as
//! orthogonal and needs no memory. The paper codes keys only; values are coded alike.
//! Magnitudes saturate where the norm does, at 65504.

use std::f64::consts::FRAC_PI_2;
use std::sync::Arc;

use super::{Cell, Entry, Granularity, MAX_DIM, Quantizer, check_shape, scratch, unpacked};
use crate::error::{Result, ensure};
use crate::registry::{Domain, Param};
use crate::simd::{BLOCK, Format, Kernels, Rows, sanitize};

pub(super) static ENTRY: Entry = Entry {
    name: "qjl",
    summary: "1 to 4 signs of a random projection for each element; tq is better at equal bits",
    paper: "QJL, arXiv 2406.03482",
    params: &[Param {
        name: "ratio",
        help: "signs for each element",
        domain: Domain::Int { default: 2, min: 1, max: 4 },
    }],
    aliases: &[],
    examples: &["qjl(ratio=2)"],
    create: |args, _, kernels| Ok(Arc::new(Qjl { ratio: args.count("ratio"), kernels })),
};

#[derive(Debug)]
struct Qjl {
    ratio: usize,
    kernels: &'static Kernels,
}

/// Fixed random bits, one for each channel of each projection.
static SIGNS: [u64; 4 * MAX_DIM / 64] = {
    let mut signs = [0; 4 * MAX_DIM / 64];
    let mut i = 0;
    while i < signs.len() {
        // splitmix64
        let z = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        signs[i] = z ^ (z >> 31);
        i += 1;
    }
    signs
};

/// Negates the channels of `row` that projection `i` negates.
fn flip(i: usize, row: &mut [f32]) {
    let words = &SIGNS[i * MAX_DIM / 64..];
    for (channel, x) in row.iter_mut().enumerate() {
        let bit = (words[channel / 64] >> (channel % 64)) as u32 & 1;
        *x = f32::from_bits(x.to_bits() ^ (bit << 31));
    }
}

impl Qjl {
    fn row_bytes(&self, dim: usize) -> usize {
        self.ratio * dim / 8 + 2
    }

    fn encode_row(&self, row: &[f32], out: &mut [u8], buffer: &mut [f32]) {
        let (row_buffer, projected) = buffer.split_at_mut(row.len());
        row_buffer.copy_from_slice(row);
        // Keeps the sums of a rotation finite; the norm is what saturates.
        sanitize(row_buffer, 65504.0);
        let square: f64 = row_buffer.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let (bits, norm) = out.split_at_mut(self.ratio * row.len() / 8);
        let projections = bits.chunks_exact_mut(row.len() / 8).enumerate();
        for (i, bits) in projections {
            projected.copy_from_slice(row_buffer);
            flip(i, projected);
            self.kernels.hadamard(projected, row.len());
            for (byte, values) in bits.iter_mut().zip(projected.as_chunks::<8>().0) {
                let bit = |j: usize| u8::from(values[j] > 0.0) << j;
                *byte = (0..8).fold(0, |byte, j| byte | bit(j));
            }
        }
        self.kernels.encode_f16(&[square.sqrt().min(65504.0) as f32], norm);
    }

    /// `buffer` is as long as a row.
    fn decode_row(&self, bytes: &[u8], out: &mut [f32], buffer: &mut [f32]) {
        let dim = out.len();
        let (bits, norm) = bytes.split_at(self.ratio * dim / 8);
        let mut scale = [0.0];
        let norm = Rows { bytes: norm, stride: 2, count: 1, dim: 1, group: BLOCK };
        self.kernels.decode(Format::F16, &norm, &mut scale);
        let scale = scale[0] * ((FRAC_PI_2 / dim as f64).sqrt() / self.ratio as f64) as f32;
        out.fill(0.0);
        for (i, bits) in bits.chunks_exact(dim / 8).enumerate() {
            for (values, byte) in buffer.as_chunks_mut::<8>().0.iter_mut().zip(bits) {
                for (j, x) in values.iter_mut().enumerate() {
                    *x = if byte >> j & 1 == 1 { scale } else { -scale };
                }
            }
            self.kernels.hadamard(buffer, dim);
            flip(i, buffer);
            out.iter_mut().zip(&*buffer).for_each(|(sum, x)| *sum += x);
        }
    }

    fn row<'a>(&self, cell: &Cell<'a>, t: usize) -> &'a [u8] {
        let stride = self.row_bytes(cell.dim);
        assert_eq!(cell.bytes.len(), cell.tokens * stride, "{}: cell", self.spec());
        &cell.bytes[t * stride..(t + 1) * stride]
    }
}

impl Quantizer for Qjl {
    fn spec(&self) -> String {
        format!("qjl(ratio={})", self.ratio)
    }

    fn granularity(&self) -> Granularity {
        Granularity::Token
    }

    fn check(&self, tokens: usize, dim: usize) -> Result<()> {
        check_shape(&self.spec(), tokens, dim, BLOCK)?;
        ensure!(
            dim.is_power_of_two(),
            InvalidArgument,
            "{}: dim is {dim}, must be a power of two",
            self.spec()
        );
        Ok(())
    }

    fn bytes(&self, tokens: usize, dim: usize) -> usize {
        tokens * self.row_bytes(dim)
    }

    fn encode(&self, rows: &[f32], dim: usize, out: &mut [u8]) {
        assert_eq!(out.len(), self.bytes(rows.len() / dim, dim), "{}: out", self.spec());
        scratch::with(2 * dim, |buffer| {
            let outs = out.chunks_exact_mut(self.row_bytes(dim));
            rows.chunks_exact(dim).zip(outs).for_each(|(row, out)| {
                self.encode_row(row, out, buffer);
            });
        });
    }

    fn decode(&self, cell: &Cell<'_>, out: &mut [f32]) {
        let dim = cell.dim;
        assert_eq!(out.len(), cell.rows.len() * dim, "{}: out", self.spec());
        scratch::with(dim, |buffer| {
            for (t, out) in cell.rows.clone().zip(out.chunks_exact_mut(dim)) {
                self.decode_row(self.row(cell, t), out, buffer);
            }
        });
    }

    fn dot(&self, cell: &Cell<'_>, queries: &[f32], scores: &mut [f32]) {
        let dim = cell.dim;
        unpacked::dot(self.kernels, cell, queries, scores, dim, |rows, out, buffer| {
            for (t, out) in rows.zip(out.chunks_exact_mut(dim)) {
                self.decode_row(self.row(cell, t), out, buffer);
            }
        });
    }

    fn axpy(&self, cell: &Cell<'_>, weights: &[f32], outputs: &mut [f32]) {
        let dim = cell.dim;
        unpacked::axpy(self.kernels, cell, weights, outputs, dim, |rows, out, buffer| {
            for (t, out) in rows.zip(out.chunks_exact_mut(dim)) {
                self.decode_row(self.row(cell, t), out, buffer);
            }
        });
    }
}
