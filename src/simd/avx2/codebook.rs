//! TurboQuant rows as integers: streams of codes, looked up in tables of 16-bit levels.
//!
//! ```text
//! bytes of the stream --shuffle--> code k in lane k --multiply, shift--> bare code --shuffle--> level
//! ```

use std::arch::x86_64::*;

use super::format::broadcast_f16;
use super::levels::Tq;
use super::whole::{Factor, Whole, gather_f16};
use crate::simd::rows::{Rows, tq_levels};

/// Levels are integers times the reciprocal of this: 13 bits with their sign.
pub(in crate::simd) const UNIT: f32 = 2997.0;

/// For codes of one width: which bytes hold each of 16 codes, and the factor that moves a code to the
/// top of its lane.
struct Layout {
    bytes: [i8; 32],
    factors: [i16; 16],
}

const fn layout(bits: usize) -> Layout {
    let mut layout = Layout { bytes: [-1; 32], factors: [0; 16] };
    let mut code = 0;
    while code < 16 {
        let byte = code * bits / 8;
        layout.bytes[2 * code] = byte as i8;
        // Only three bits straddle bytes.
        if bits == 3 {
            layout.bytes[2 * code + 1] = byte as i8 + 1;
        }
        layout.factors[code] = 1 << (16 - bits - code * bits % 8);
        code += 1;
    }
    layout
}

static LAYOUTS: [Layout; 3] = [layout(2), layout(3), layout(4)];

impl<const BITS: usize> Whole for Tq<BITS> {
    const FACTOR: Factor = Factor::Row;
    const LARGEST: i32 = 8191;

    #[inline(always)]
    unsafe fn half(rows: &Rows<'_>, row: *const u8, block: usize, half: usize) -> __m256i {
        // SAFETY: 16 codes are `2 * BITS` bytes; with three bits two more are read, which the norm
        // behind the codes has.
        unsafe {
            let at = row.add((block * 2 + half) * 2 * BITS);
            let stream = match BITS {
                2 => _mm256_set1_epi32(at.cast::<i32>().read_unaligned()),
                _ => _mm256_set1_epi64x(at.cast::<i64>().read_unaligned()),
            };
            let layout = &LAYOUTS[BITS - 2];
            let bytes = _mm256_loadu_si256(layout.bytes.as_ptr().cast());
            let factors = _mm256_loadu_si256(layout.factors.as_ptr().cast());
            let top = _mm256_mullo_epi16(_mm256_shuffle_epi8(stream, bytes), factors);
            match BITS {
                2 => look_up(rows, 0, _mm256_srli_epi16::<14>(top)),
                3 => look_up(rows, 1, _mm256_srli_epi16::<13>(top)),
                _ => {
                    // 16 levels do not fit into a table of 16 bytes, but the upper half does, and
                    // the lower half is its mirror image.
                    let codes = _mm256_srli_epi16::<12>(top);
                    let is_low = _mm256_cmpgt_epi16(_mm256_set1_epi16(8), codes);
                    let codes = _mm256_xor_si256(codes, is_low);
                    let codes = _mm256_and_si256(codes, _mm256_set1_epi16(7));
                    let level = _mm256_xor_si256(look_up(rows, 2, codes), is_low);
                    _mm256_sub_epi16(level, is_low)
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn scales(rows: &Rows<'_>, starts: &[*const u8; 8], _: usize) -> __m256 {
        // SAFETY: the norm follows the codes.
        unsafe {
            let norms = gather_f16(starts, rows.dim * BITS / 8);
            _mm256_mul_ps(norms, _mm256_set1_ps(1.0 / UNIT))
        }
    }

    #[inline(always)]
    unsafe fn scale(rows: &Rows<'_>, row: *const u8, _: usize) -> __m256 {
        // SAFETY: as above.
        unsafe {
            let norm = broadcast_f16(row.add(rows.dim * BITS / 8));
            _mm256_mul_ps(norm, _mm256_set1_ps(1.0 / UNIT))
        }
    }
}

/// Levels of codes below 8; of 4-bit tables, the upper half.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn look_up(rows: &Rows<'_>, width: usize, codes: __m256i) -> __m256i {
    // SAFETY: a table has eight levels.
    unsafe {
        let table = integers(rows.dim, width);
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
        // Code c is at bytes 2 c and 2 c + 1.
        let at = _mm256_mullo_epi16(codes, _mm256_set1_epi16(0x0202));
        _mm256_shuffle_epi8(table, _mm256_add_epi16(at, _mm256_set1_epi16(0x0100)))
    }
}

/// Eight levels as integers.
#[inline(always)]
fn integers(dim: usize, width: usize) -> &'static [i16; 8] {
    static TABLES: [[[i16; 8]; 3]; 3] = [tables(64), tables(128), tables(1)];
    let table = match dim {
        64 => 0,
        128 => 1,
        _ => 2,
    };
    &TABLES[table][width]
}

const fn tables(dim: usize) -> [[i16; 8]; 3] {
    let levels = tq_levels(dim);
    let mut tables = [[0; 8]; 3];
    let mut i = 0;
    while i < 8 {
        tables[0][i] = round(levels[0][i]);
        tables[1][i] = round(levels[1][i]);
        tables[2][i] = round(levels[2][8 + i]);
        i += 1;
    }
    tables
}

const fn round(level: f32) -> i16 {
    let half = if level < 0.0 { -0.5 } else { 0.5 };
    (level * UNIT + half) as i16
}
