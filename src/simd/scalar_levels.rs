//! Rows of the formats with levels of their own, with fifth bits or with metadata for a row.

use half::f16;

use super::rows::{BLOCK, E2M1, IQ4_NL, Rows, e4m3, e8m0_half, tq_levels};
use super::scalar::{Row, f16_at, unpack};

pub(super) struct Q4_1;
pub(super) struct Q5_0;
pub(super) struct Q5_1;
pub(super) struct Iq4Nl;
pub(super) struct Mxfp4;
pub(super) struct Nvfp4;
pub(super) struct Int8;
pub(super) struct Int4;
pub(super) struct Tq<const BITS: usize>;
pub(super) struct E4m3;
pub(super) struct E5m2;

impl Row for Q4_1 {
    fn block(_: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        let bytes = &row[at / BLOCK * 20..][..20];
        let (d, m) = (f16_at(bytes, 0), f16_at(bytes, 2));
        unpack::<4>(&bytes[4..], out);
        out.iter_mut().for_each(|x| *x = d * *x + m);
    }
}

impl Row for Q5_0 {
    fn block(_: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        let bytes = &row[at / BLOCK * 22..][..22];
        let d = f16_at(bytes, 0);
        unpack5(&bytes[2..6], &bytes[6..], out);
        out.iter_mut().for_each(|x| *x = d * *x - 16.0 * d);
    }
}

impl Row for Q5_1 {
    fn block(_: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        let bytes = &row[at / BLOCK * 24..][..24];
        let (d, m) = (f16_at(bytes, 0), f16_at(bytes, 2));
        unpack5(&bytes[4..8], &bytes[8..], out);
        out.iter_mut().for_each(|x| *x = d * *x + m);
    }
}

impl Row for Iq4Nl {
    fn block(_: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        let bytes = &row[at / BLOCK * 18..][..18];
        let d = f16_at(bytes, 0);
        unpack::<4>(&bytes[2..], out);
        out.iter_mut().for_each(|x| *x = d * f32::from(IQ4_NL[*x as usize]));
    }
}

impl Row for Mxfp4 {
    fn block(_: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        let bytes = &row[at / BLOCK * 17..][..17];
        let d = e8m0_half(bytes[0]);
        unpack::<4>(&bytes[1..], out);
        out.iter_mut().for_each(|x| *x = d * f32::from(E2M1[*x as usize]));
    }
}

impl Row for Nvfp4 {
    fn block(_: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        let bytes = &row[at / 64 * 36..][..36];
        for (i, out) in out.chunks_mut(16).enumerate() {
            let part = at % 64 / 16 + i;
            let d = 0.5 * e4m3(bytes[part]);
            for (j, x) in out.iter_mut().enumerate() {
                let code = bytes[4 + part * 8 + j % 8] >> (j / 8 * 4) & 15;
                *x = d * f32::from(E2M1[usize::from(code)]);
            }
        }
    }
}

impl Row for Int8 {
    fn block(rows: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        let scale = f32_at(row, rows.dim);
        for (x, q) in out.iter_mut().zip(&row[at..]) {
            *x = scale * f32::from(q.cast_signed());
        }
    }
}

impl Row for Int4 {
    fn block(rows: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        let (s, m) = (f32_at(row, rows.dim / 2), f32_at(row, rows.dim / 2 + 4));
        unpack::<4>(&row[at / 2..], out);
        out.iter_mut().for_each(|x| *x = s * *x + m);
    }
}

/// The bits of an f16 that is 2^-8 of the number, because its exponent is biased by 8 more.
impl Row for E4m3 {
    fn block(rows: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        let scale = f32_at(row, rows.dim) * 256.0;
        for (x, q) in out.iter_mut().zip(&row[at..]) {
            let bits = u16::from(q & 0x80) << 8 | u16::from(q & 0x7f) << 7;
            *x = scale * f16::from_bits(bits).to_f32();
        }
    }
}

/// The upper half of an f16.
impl Row for E5m2 {
    fn block(rows: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        let scale = f32_at(row, rows.dim);
        for (x, q) in out.iter_mut().zip(&row[at..]) {
            *x = scale * f16::from_bits(u16::from(*q) << 8).to_f32();
        }
    }
}

impl<const BITS: usize> Row for Tq<BITS> {
    fn block(rows: &Rows<'_>, row: &[u8], at: usize, out: &mut [f32]) {
        let norm = f16_at(row, rows.dim * BITS / 8);
        let levels = &tq_levels(rows.dim)[BITS - 2];
        for (out, bytes) in out.chunks_mut(8).zip(row[at * BITS / 8..].chunks_exact(BITS)) {
            let stream = bytes.iter().rev().fold(0, |bits, byte| bits << 8 | u32::from(*byte));
            for (i, x) in out.iter_mut().enumerate() {
                *x = norm * levels[(stream >> (i * BITS)) as usize % (1 << BITS)];
            }
        }
    }
}

/// The 32 codes of 5 bits: nibbles, and fifth bits from the lowest on.
fn unpack5(fifth: &[u8], nibbles: &[u8], out: &mut [f32]) {
    unpack::<4>(nibbles, out);
    for (j, x) in out.iter_mut().enumerate() {
        *x += f32::from((fifth[j / 8] >> (j % 8) & 1) << 4);
    }
}

fn f32_at(bytes: &[u8], at: usize) -> f32 {
    f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
