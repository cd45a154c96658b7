//! Asking memory for what is needed soon, so that the misses of a batch overlap.

#![expect(unsafe_code, reason = "prefetch instructions")]

/// Asks for the cache line of `list[index]`; nothing happens where there is no such element, or no
/// such instruction.
#[inline(always)]
pub fn prefetch<T>(list: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(item) = list.get(index) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch has no effect on values and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(item).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (list, index);
}

/// Bytes that memory moves at once.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Bytes that will be wanted next, asked for in equal parts: so many at once that memory is never
/// idle, and not so many that the CPU waits for room to ask.
#[cfg(target_arch = "x86_64")]
pub(super) struct Ahead {
    at: *const u8,
    rest: usize,
    step: usize,
}

#[cfg(target_arch = "x86_64")]
impl Ahead {
    #[inline(always)]
    pub(super) fn new(bytes: &[u8], parts: usize) -> Self {
        Self {
            at: bytes.as_ptr(),
            rest: bytes.len(),
            step: bytes.len().div_ceil(LINE).div_ceil(parts) * LINE,
        }
    }

    /// Asks memory for one part more.
    #[inline(always)]
    pub(super) fn fetch(&mut self) {
        let some = self.step.min(self.rest);
        for at in (0..some).step_by(LINE) {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            // SAFETY: a prefetch has no effect on values and never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.at.wrapping_add(at).cast()) };
        }
        self.at = self.at.wrapping_add(some);
        self.rest -= some;
    }
}
