//! 16 rows side by side: what stands one after the other in a row comes into one lane.

use std::arch::x86_64::*;

/// 16 rows at equal distances.
#[derive(Clone, Copy)]
pub(super) struct Lanes {
    pub(super) start: *const u8,
    pub(super) stride: usize,
}

impl Lanes {
    /// The same rows, in a way that hides from the compiler that they are: otherwise it computes all
    /// 16 addresses before a loop over blocks and then loads each of them from the stack.
    #[inline(always)]
    pub(super) fn hidden(mut self) -> Self {
        // SAFETY: no instruction at all.
        unsafe {
            std::arch::asm!("/* {} */", inout(reg) self.stride,
                options(nomem, nostack, preserves_flags));
        }
        self
    }

    /// Where row `i` is, `distance` bytes from its start.
    #[inline(always)]
    pub(super) fn at(self, i: usize, distance: usize) -> *const u8 {
        self.start.wrapping_add(distance).wrapping_add(i * self.stride)
    }
}

/// Vector `d` of the result holds, for each row, the `d`-th four of its 16 bytes.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
pub(super) unsafe fn turn(rows: [__m128i; 16]) -> [__m512i; 4] {
    // SAFETY: by contract.
    unsafe {
        let mut every_fourth = [_mm512_setzero_si512(); 4];
        for (k, x) in every_fourth.iter_mut().enumerate() {
            *x = _mm512_castsi128_si512(rows[k]);
            *x = _mm512_inserti32x4::<1>(*x, rows[k + 4]);
            *x = _mm512_inserti32x4::<2>(*x, rows[k + 8]);
            *x = _mm512_inserti32x4::<3>(*x, rows[k + 12]);
        }
        turn_quarters(every_fourth)
    }
}

/// In each quarter, four by four elements of 32 bits: vector `i` of the result holds the `i`-th of
/// each vector.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
pub(super) unsafe fn turn_quarters([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: by contract.
    unsafe {
        let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        let (ef, gh) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab, cd),
            _mm512_unpackhi_epi64(ab, cd),
            _mm512_unpacklo_epi64(ef, gh),
            _mm512_unpackhi_epi64(ef, gh),
        ]
    }
}

/// As [`turn`], for 16 bytes at one distance from the start of each row.
///
/// # Safety
/// The CPU has AVX-512 F; there are 16 bytes at each place.
#[inline(always)]
pub(super) unsafe fn turn_16(lanes: Lanes, distance: usize) -> [__m512i; 4] {
    // SAFETY: by contract.
    unsafe {
        let mut rows = [_mm_setzero_si128(); 16];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = _mm_loadu_si128(lanes.at(i, distance).cast());
        }
        turn(rows)
    }
}

/// As [`turn`], for 12 bytes.
///
/// # Safety
/// The CPU has AVX-512 F and VL; there are 12 bytes at each place.
#[inline(always)]
pub(super) unsafe fn turn_12(lanes: Lanes, distance: usize) -> [__m512i; 3] {
    // SAFETY: by contract; no more than three times four bytes are read.
    unsafe {
        let mut rows = [_mm_setzero_si128(); 16];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = _mm_maskz_loadu_epi32(0b111, lanes.at(i, distance).cast());
        }
        let [a, b, c, _] = turn(rows);
        [a, b, c]
    }
}

/// As [`turn`], for 8 bytes.
///
/// # Safety
/// The CPU has AVX-512 F; there are 8 bytes at each place.
#[inline(always)]
pub(super) unsafe fn turn_8(lanes: Lanes, distance: usize) -> [__m512i; 2] {
    // SAFETY: by contract.
    unsafe {
        let mut eights = [_mm512_setzero_si512(); 2];
        for (i, x) in eights.iter_mut().enumerate() {
            let mut twos = [_mm_setzero_si128(); 4];
            for (j, two) in twos.iter_mut().enumerate() {
                let first = 8 * i + 2 * j;
                let low = lanes.at(first, distance).cast::<i64>().read_unaligned();
                let high = lanes.at(first + 1, distance).cast::<i64>().read_unaligned();
                *two = _mm_set_epi64x(high, low);
            }
            let low = _mm256_set_m128i(twos[1], twos[0]);
            let high = _mm256_set_m128i(twos[3], twos[2]);
            *x = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
        }
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        let [a, b] = eights;
        [_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b)]
    }
}
