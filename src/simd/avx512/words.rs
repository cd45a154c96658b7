//! Formats whose rows are small integers times a scale, as vectors of pairs of 16-bit integers.
//!
//! ```text
//! columns   16 rows, one in each lane; vector p holds two elements of the block, as ORDER says
//! pair      two rows, one channel in each lane; vector h holds channels 16 h to 16 h + 15
//! ```

use std::arch::x86_64::*;

use crate::simd::avx2::{
    Affine2, Affine4, Codes2, Codes4, Int4, Int8, Iq4Nl, Mxfp4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0,
    Whole, metadata_at,
};
use crate::simd::rows::{BLOCK, E2M1, IQ4_NL, Rows};

use super::turn::{Lanes, turn_8, turn_16};

/// Rows of blocks of 32 integers: element = (integer - OFFSET) * scale + minimum.
pub(super) trait Words: Whole {
    /// What must be taken from the integers of `columns`.
    const OFFSET: i32 = 0;

    /// Words `2 p` and `2 p + 1` are the elements in vector `p` of `columns`.
    const ORDER: [u16; BLOCK];

    /// A block of 16 rows: 16 vectors of two elements for each row.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW, DQ, VL, VBMI; the lanes are rows of this format with the block.
    unsafe fn columns(rows: &Rows<'_>, lanes: Lanes, block: usize) -> [__m512i; 16];

    /// A block of two rows, without offset: for each channel an element of each row.
    ///
    /// # Safety
    /// As for `columns`.
    unsafe fn pair(rows: &Rows<'_>, even: *const u8, odd: *const u8, block: usize) -> [__m512i; 2];

    /// The scales of a block in 16 rows; 1 where `FACTOR` is `One`.
    ///
    /// # Safety
    /// As for `columns`.
    unsafe fn scales_of_16(_: &Rows<'_>, _: Lanes, _block: usize) -> __m512 {
        // SAFETY: values only.
        unsafe { _mm512_set1_ps(1.0) }
    }

    /// The minima of a block in 16 rows, if `HAS_MINIMUM`.
    ///
    /// # Safety
    /// As for `columns`.
    unsafe fn minima_of_16(_: &Rows<'_>, _: Lanes, _block: usize) -> __m512 {
        // SAFETY: values only.
        unsafe { _mm512_setzero_ps() }
    }
}

/// 16 f16 at one distance from the start of each row.
///
/// # Safety
/// The CPU has AVX-512 F; there are two bytes at each place.
#[inline(always)]
pub(super) unsafe fn gather_f16(lanes: Lanes, distance: usize) -> __m512 {
    // SAFETY: by contract.
    unsafe {
        let at = |i: usize| lanes.at(i, distance).cast::<i16>().read_unaligned();
        let low = _mm_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
        let high = _mm_setr_epi16(at(8), at(9), at(10), at(11), at(12), at(13), at(14), at(15));
        _mm512_cvtph_ps(_mm256_set_m128i(high, low))
    }
}

/// 16 integers of 32 bits at one distance from the start of each row.
///
/// # Safety
/// The CPU has AVX-512 F; there are four bytes at each place.
#[inline(always)]
unsafe fn gather_i32(lanes: Lanes, distance: usize) -> __m512i {
    // SAFETY: by contract.
    unsafe { of_each(|i| lanes.at(i, distance).cast::<i32>().read_unaligned()) }
}

/// 16 integers.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn of_each(x: impl Fn(usize) -> i32) -> __m512i {
    // SAFETY: values only.
    unsafe {
        _mm512_setr_epi32(
            x(0),
            x(1),
            x(2),
            x(3),
            x(4),
            x(5),
            x(6),
            x(7),
            x(8),
            x(9),
            x(10),
            x(11),
            x(12),
            x(13),
            x(14),
            x(15),
        )
    }
}

/// The order of elements when each four bytes give some vectors: part `i` of the bytes `4 d` to
/// `4 d + 3` holds the elements of byte `4 d + i % 2` and the byte two further, and bytes hold
/// elements `next` apart.
const fn order_of_bytes(parts: usize, next: usize) -> [u16; BLOCK] {
    let mut order = [0; BLOCK];
    let mut i = 0;
    while i < BLOCK {
        let (pair, word) = (i / 2, i % 2);
        let (d, part) = (pair / parts, pair % parts);
        order[i] = (part / 2 * next + 4 * d + part % 2 + 2 * word) as u16;
        i += 1;
    }
    order
}

/// Nibbles, elements 0 to 15 low and 16 to 31 high.
const NIBBLES: [u16; BLOCK] = order_of_bytes(4, 16);

/// For `vpermb`: word `r` of lane `c` comes from byte `first + c % modulo / divide` of row `r`, whose
/// bytes are `apart`; the byte goes into the low (0) or the high half (1) of the word.
#[derive(Clone, Copy)]
pub(super) struct Places {
    pub(super) apart: usize,
    pub(super) first: usize,
    pub(super) modulo: usize,
    pub(super) divide: usize,
    pub(super) half: usize,
}

impl Places {
    pub(super) const fn table(self) -> [u8; 64] {
        let mut table = [0; 64];
        let mut c = 0;
        while c < 16 {
            let byte = self.first + c % self.modulo / self.divide;
            table[4 * c + self.half] = byte as u8;
            table[4 * c + 2 + self.half] = (byte + self.apart) as u8;
            c += 1;
        }
        table
    }
}

/// For shifts of words: both words of lane `c` by `step * (c / divide % modulo)`, plus `first`.
pub(super) const fn shifts(first: u16, step: u16, divide: u16, modulo: u16) -> [u16; 32] {
    let mut shifts = [0; 32];
    let mut i = 0;
    while i < 32 {
        shifts[i] = first + step * (i as u16 / 2 / divide % modulo);
        i += 1;
    }
    shifts
}

/// 64 bytes of a table.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
pub(super) unsafe fn constant<T, const N: usize>(table: &'static [T; N]) -> __m512i {
    const { assert!(size_of::<T>() * N == 64, "a table of 64 bytes") };
    // SAFETY: 64 bytes.
    unsafe { _mm512_loadu_si512(table.as_ptr().cast()) }
}

/// 16 bytes of each of two rows.
///
/// # Safety
/// The CPU has AVX-512 F; there are 16 bytes.
#[inline(always)]
pub(super) unsafe fn two_rows(even: *const u8, odd: *const u8) -> __m512i {
    // SAFETY: by contract.
    unsafe {
        let (even, odd) = (_mm_loadu_si128(even.cast()), _mm_loadu_si128(odd.cast()));
        _mm512_castsi256_si512(_mm256_set_m128i(odd, even))
    }
}

/// The bytes of nibbles of 16 rows as words whose lowest four bits count, in the order `NIBBLES`.
///
/// # Safety
/// The CPU has AVX-512 F and BW; there are 16 bytes of nibbles at each place.
#[inline(always)]
unsafe fn nibble_columns(lanes: Lanes, distance: usize) -> [__m512i; 16] {
    // SAFETY: by contract.
    unsafe {
        let bytes = turn_16(lanes, distance);
        let mut columns = [bytes[0]; 16];
        for d in 0..4 {
            columns[4 * d] = bytes[d];
            columns[4 * d + 1] = _mm512_srli_epi16::<8>(bytes[d]);
            columns[4 * d + 2] = _mm512_srli_epi16::<4>(bytes[d]);
            columns[4 * d + 3] = _mm512_srli_epi16::<12>(bytes[d]);
        }
        columns
    }
}

/// The bytes of nibbles of two rows, once for low and once for high nibbles.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VBMI; there are 16 bytes of nibbles in both rows.
#[inline(always)]
unsafe fn nibble_pair(even: *const u8, odd: *const u8) -> [__m512i; 2] {
    static PLACES: [u8; 64] =
        Places { apart: 16, first: 0, modulo: 16, divide: 1, half: 0 }.table();
    // SAFETY: by contract.
    unsafe {
        let places = constant(&PLACES);
        let words = _mm512_maskz_permutexvar_epi8(LOW_BYTES, places, two_rows(even, odd));
        [words, _mm512_srli_epi16::<4>(words)]
    }
}

/// The low bytes of words.
const LOW_BYTES: __mmask64 = 0x5555_5555_5555_5555;

/// The `bits` lowest bits of each word.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn lowest<const N: usize>(mut words: [__m512i; N], bits: u32) -> [__m512i; N] {
    for x in &mut words {
        // SAFETY: values only.
        *x = unsafe { _mm512_and_si512(*x, _mm512_set1_epi16((1 << bits) - 1)) };
    }
    words
}

/// What each word finds in a table by its five lowest bits.
///
/// # Safety
/// The CPU has AVX-512 F and BW.
#[inline(always)]
pub(super) unsafe fn look_up<const N: usize>(
    mut words: [__m512i; N],
    table: &'static [i16; 32],
) -> [__m512i; N] {
    for x in &mut words {
        // SAFETY: values only.
        *x = unsafe { _mm512_permutexvar_epi16(*x, constant(table)) };
    }
    words
}

/// Takes an offset away.
///
/// # Safety
/// The CPU has AVX-512 F and BW.
#[inline(always)]
unsafe fn minus(mut words: [__m512i; 2], offset: i16) -> [__m512i; 2] {
    for x in &mut words {
        // SAFETY: values only.
        *x = unsafe { _mm512_sub_epi16(*x, _mm512_set1_epi16(offset)) };
    }
    words
}

/// Blocks that start with an f16 scale, and perhaps an f16 minimum after it.
macro_rules! scaled {
    ($bytes:literal) => {
        #[inline(always)]
        unsafe fn scales_of_16(_: &Rows<'_>, lanes: Lanes, block: usize) -> __m512 {
            // SAFETY: a block lanes with its f16 scale.
            unsafe { gather_f16(lanes, block * $bytes) }
        }
    };
    ($bytes:literal, with minimum) => {
        scaled!($bytes);

        #[inline(always)]
        unsafe fn minima_of_16(_: &Rows<'_>, lanes: Lanes, block: usize) -> __m512 {
            // SAFETY: the minimum follows the scale.
            unsafe { gather_f16(lanes, block * $bytes + 2) }
        }
    };
}

/// Blocks of nibbles at a distance from the start of the block.
macro_rules! nibbles {
    ($bytes:literal, $at:literal, $offset:literal) => {
        const OFFSET: i32 = $offset;
        const ORDER: [u16; BLOCK] = NIBBLES;

        #[inline(always)]
        unsafe fn columns(_: &Rows<'_>, lanes: Lanes, block: usize) -> [__m512i; 16] {
            // SAFETY: the nibbles of the block.
            unsafe { lowest(nibble_columns(lanes, block * $bytes + $at), 4) }
        }

        #[inline(always)]
        unsafe fn pair(
            _: &Rows<'_>,
            even: *const u8,
            odd: *const u8,
            block: usize,
        ) -> [__m512i; 2] {
            let at = block * $bytes + $at;
            // SAFETY: as above.
            unsafe {
                let words = lowest(nibble_pair(even.add(at), odd.add(at)), 4);
                if $offset == 0 { words } else { minus(words, $offset) }
            }
        }
    };
}

impl Words for Q4_0 {
    nibbles!(18, 2, 8);
    scaled!(18);
}

impl Words for Q4_1 {
    nibbles!(20, 4, 0);
    scaled!(20, with minimum);
}

impl Words for Codes4 {
    nibbles!(16, 0, 0);
}

impl Words for Int4 {
    nibbles!(16, 0, 0);

    #[inline(always)]
    unsafe fn scales_of_16(rows: &Rows<'_>, lanes: Lanes, _: usize) -> __m512 {
        // SAFETY: scale and minimum follow the codes.
        unsafe { _mm512_castsi512_ps(gather_i32(lanes, rows.dim / 2)) }
    }

    #[inline(always)]
    unsafe fn minima_of_16(rows: &Rows<'_>, lanes: Lanes, _: usize) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_castsi512_ps(gather_i32(lanes, rows.dim / 2 + 4)) }
    }
}

/// Nibbles that choose from a table.
macro_rules! table_of_levels {
    ($bytes:literal, $at:literal, $levels:expr) => {
        const ORDER: [u16; BLOCK] = NIBBLES;

        #[inline(always)]
        unsafe fn columns(_: &Rows<'_>, lanes: Lanes, block: usize) -> [__m512i; 16] {
            // SAFETY: the nibbles of the block.
            unsafe { look_up(nibble_columns(lanes, block * $bytes + $at), $levels) }
        }

        #[inline(always)]
        unsafe fn pair(
            _: &Rows<'_>,
            even: *const u8,
            odd: *const u8,
            block: usize,
        ) -> [__m512i; 2] {
            let at = block * $bytes + $at;
            // SAFETY: as above.
            unsafe { look_up(nibble_pair(even.add(at), odd.add(at)), $levels) }
        }
    };
}

/// A table twice, so that the fifth bit does not count.
const fn twice(levels: &[i8; 16]) -> [i16; 32] {
    let mut table = [0; 32];
    let mut i = 0;
    while i < 32 {
        table[i] = levels[i % 16] as i16;
        i += 1;
    }
    table
}

static IQ4_NL_TWICE: [i16; 32] = twice(&IQ4_NL);
static E2M1_TWICE: [i16; 32] = twice(&E2M1);

impl Words for Iq4Nl {
    table_of_levels!(18, 2, &IQ4_NL_TWICE);
    scaled!(18);
}

impl Words for Mxfp4 {
    table_of_levels!(17, 1, &E2M1_TWICE);

    #[inline(always)]
    unsafe fn scales_of_16(_: &Rows<'_>, lanes: Lanes, block: usize) -> __m512 {
        // SAFETY: a block lanes with its exponent.
        unsafe {
            let e = of_each(|i| i32::from(*lanes.at(i, block * 17)));
            // See `e8m0_half`.
            let normal = _mm512_slli_epi32::<23>(_mm512_sub_epi32(e, _mm512_set1_epi32(1)));
            let tiny = _mm512_sllv_epi32(_mm512_set1_epi32(0x20_0000), e);
            let is_tiny = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
            _mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, is_tiny, tiny))
        }
    }
}

/// Blocks of bytes with a sign.
macro_rules! bytes {
    ($bytes:literal, $at:literal) => {
        const ORDER: [u16; BLOCK] = order_of_bytes(2, 0);

        #[inline(always)]
        unsafe fn columns(_: &Rows<'_>, lanes: Lanes, block: usize) -> [__m512i; 16] {
            // SAFETY: 32 codes of the block.
            unsafe {
                let mut columns = [_mm512_setzero_si512(); 16];
                for half in 0..2 {
                    let bytes = turn_16(lanes, block * $bytes + $at + half * 16);
                    for d in 0..4 {
                        let at = 8 * half + 2 * d;
                        let low = _mm512_slli_epi16::<8>(bytes[d]);
                        columns[at] = _mm512_srai_epi16::<8>(low);
                        columns[at + 1] = _mm512_srai_epi16::<8>(bytes[d]);
                    }
                }
                columns
            }
        }

        #[inline(always)]
        unsafe fn pair(
            _: &Rows<'_>,
            even: *const u8,
            odd: *const u8,
            block: usize,
        ) -> [__m512i; 2] {
            const PLACES: Places = Places { apart: 32, first: 0, modulo: 16, divide: 1, half: 1 };
            static TABLES: [[u8; 64]; 2] = [PLACES.table(), Places { first: 16, ..PLACES }.table()];
            let at = block * $bytes + $at;
            // SAFETY: as above.
            unsafe {
                let even = _mm256_loadu_si256(even.add(at).cast());
                let odd = _mm256_loadu_si256(odd.add(at).cast());
                let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(even), odd);
                let first = _mm512_permutexvar_epi8(constant(&TABLES[0]), both);
                let second = _mm512_permutexvar_epi8(constant(&TABLES[1]), both);
                // What is in the low bytes is shifted out.
                [_mm512_srai_epi16::<8>(first), _mm512_srai_epi16::<8>(second)]
            }
        }
    };
}

impl Words for Q8_0 {
    bytes!(34, 2);
    scaled!(34);
}

impl Words for Int8 {
    bytes!(32, 0);

    #[inline(always)]
    unsafe fn scales_of_16(rows: &Rows<'_>, lanes: Lanes, _: usize) -> __m512 {
        // SAFETY: the scale follows the codes.
        unsafe { _mm512_castsi512_ps(gather_i32(lanes, rows.dim)) }
    }
}

/// For `vpmultishiftqb` over fifth bits: bit `b` of a word of 32 bits to bit 4 of a byte. Two rows in
/// 64 bits; words `w` of the rows are `elements[w]`.
const fn fifth_of(elements: [u16; 2]) -> i64 {
    let mut shifts = 0;
    let mut i = 0;
    while i < 4 {
        let from = (i / 2 * 32 + elements[i % 2] as usize + 60) % 64;
        shifts |= (from as i64) << (16 * i);
        i += 1;
    }
    shifts
}

/// The fifth bits of `columns`, for each vector.
static FIFTH_OF_COLUMNS: [i64; 16] = {
    let mut shifts = [0; 16];
    let mut p = 0;
    while p < 16 {
        shifts[p] = fifth_of([NIBBLES[2 * p], NIBBLES[2 * p + 1]]);
        p += 1;
    }
    shifts
};

/// The fifth bits of `pair`, for each half: even row in the low, odd row in the high 32 bits.
static FIFTH_OF_PAIR: [[i64; 8]; 2] = {
    let mut shifts = [[0; 8]; 2];
    let mut i = 0;
    while i < 64 {
        // Word `i % 2` of channel `i / 2`.
        let (c, row) = (i / 2, i % 2);
        let from = (row * 32 + c + 60) % 64;
        shifts[c / 16][c % 16 / 2] |= (from as i64) << (c % 2 * 32 + row * 16);
        i += 1;
    }
    shifts
};

/// Nibbles with fifth bits before them.
macro_rules! five_bits {
    ($bytes:literal, $at:literal, $offset:literal) => {
        const OFFSET: i32 = $offset;
        const ORDER: [u16; BLOCK] = NIBBLES;

        #[inline(always)]
        unsafe fn columns(_: &Rows<'_>, lanes: Lanes, block: usize) -> [__m512i; 16] {
            let at = block * $bytes + $at;
            // SAFETY: fifth bits and nibbles of the block.
            unsafe {
                let fifth = gather_i32(lanes, at);
                let mut columns = lowest(nibble_columns(lanes, at + 4), 4);
                for (x, shifts) in columns.iter_mut().zip(FIFTH_OF_COLUMNS) {
                    *x = with_fifth(*x, _mm512_set1_epi64(shifts), fifth);
                }
                columns
            }
        }

        #[inline(always)]
        unsafe fn pair(
            _: &Rows<'_>,
            even: *const u8,
            odd: *const u8,
            block: usize,
        ) -> [__m512i; 2] {
            let at = block * $bytes + $at;
            // SAFETY: as above.
            unsafe {
                let (even, odd) = (even.add(at), odd.add(at));
                let low = even.cast::<u32>().read_unaligned();
                let high = odd.cast::<u32>().read_unaligned();
                let fifth = _mm512_set1_epi64(i64::from(low) | i64::from(high) << 32);
                let mut words = lowest(nibble_pair(even.add(4), odd.add(4)), 4);
                for (x, shifts) in words.iter_mut().zip(&FIFTH_OF_PAIR) {
                    *x = with_fifth(*x, constant(shifts), fifth);
                }
                if $offset == 0 { words } else { minus(words, $offset) }
            }
        }
    };
}

/// Adds bit 4 of each word from the places that `shifts` name.
///
/// # Safety
/// The CPU has AVX-512 F and VBMI.
#[inline(always)]
unsafe fn with_fifth(words: __m512i, shifts: __m512i, fifth: __m512i) -> __m512i {
    // SAFETY: values only.
    unsafe {
        let bits = _mm512_multishift_epi64_epi8(shifts, fifth);
        _mm512_or_si512(words, _mm512_and_si512(bits, _mm512_set1_epi16(16)))
    }
}

impl Words for Q5_0 {
    five_bits!(22, 2, 16);
    scaled!(22);
}

impl Words for Q5_1 {
    five_bits!(24, 4, 0);
    scaled!(24, with minimum);
}

impl Words for Codes2 {
    /// Elements 8 apart share a byte.
    const ORDER: [u16; BLOCK] = order_of_bytes(8, 8);

    #[inline(always)]
    unsafe fn columns(_: &Rows<'_>, lanes: Lanes, block: usize) -> [__m512i; 16] {
        // SAFETY: a block is 8 bytes.
        unsafe {
            let bytes = turn_8(lanes, block * 8);
            let mut columns = [bytes[0]; 16];
            for d in 0..2 {
                let x = bytes[d];
                columns[8 * d] = x;
                columns[8 * d + 1] = _mm512_srli_epi16::<8>(x);
                columns[8 * d + 2] = _mm512_srli_epi16::<2>(x);
                columns[8 * d + 3] = _mm512_srli_epi16::<10>(x);
                columns[8 * d + 4] = _mm512_srli_epi16::<4>(x);
                columns[8 * d + 5] = _mm512_srli_epi16::<12>(x);
                columns[8 * d + 6] = _mm512_srli_epi16::<6>(x);
                columns[8 * d + 7] = _mm512_srli_epi16::<14>(x);
            }
            lowest(columns, 2)
        }
    }

    #[inline(always)]
    unsafe fn pair(_: &Rows<'_>, even: *const u8, odd: *const u8, block: usize) -> [__m512i; 2] {
        static PLACES: [u8; 64] =
            Places { apart: 8, first: 0, modulo: 8, divide: 1, half: 0 }.table();
        static SHIFTS: [[u16; 32]; 2] = [shifts(0, 2, 8, 2), shifts(4, 2, 8, 2)];
        // SAFETY: as above.
        unsafe {
            let even = even.add(block * 8).cast::<i64>().read_unaligned();
            let odd = odd.add(block * 8).cast::<i64>().read_unaligned();
            let both = _mm512_castsi128_si512(_mm_set_epi64x(odd, even));
            let words = _mm512_maskz_permutexvar_epi8(LOW_BYTES, constant(&PLACES), both);
            let first = _mm512_srlv_epi16(words, constant(&SHIFTS[0]));
            lowest([first, _mm512_srlv_epi16(words, constant(&SHIFTS[1]))], 2)
        }
    }
}

/// Codes, then a scale and a minimum for each group of channels.
macro_rules! affine {
    ($name:ident, $codes:ident, $bits:literal) => {
        impl Words for $name {
            const ORDER: [u16; BLOCK] = <$codes as Words>::ORDER;

            #[inline(always)]
            unsafe fn columns(rows: &Rows<'_>, lanes: Lanes, block: usize) -> [__m512i; 16] {
                // SAFETY: by contract.
                unsafe { $codes::columns(rows, lanes, block) }
            }

            #[inline(always)]
            unsafe fn pair(
                rows: &Rows<'_>,
                even: *const u8,
                odd: *const u8,
                block: usize,
            ) -> [__m512i; 2] {
                // SAFETY: by contract.
                unsafe { <$codes as Words>::pair(rows, even, odd, block) }
            }

            #[inline(always)]
            unsafe fn scales_of_16(rows: &Rows<'_>, lanes: Lanes, block: usize) -> __m512 {
                // SAFETY: metadata of all groups follow the codes.
                unsafe { gather_f16(lanes, metadata_at(rows, block, $bits)) }
            }

            #[inline(always)]
            unsafe fn minima_of_16(rows: &Rows<'_>, lanes: Lanes, block: usize) -> __m512 {
                // SAFETY: as above.
                unsafe { gather_f16(lanes, metadata_at(rows, block, $bits) + 2) }
            }
        }
    };
}

affine!(Affine4, Codes4, 4);
affine!(Affine2, Codes2, 2);
