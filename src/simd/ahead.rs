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
