//! A buffer for each thread, so that reading the cache does not allocate once it has grown.

use std::cell::Cell;

thread_local! {
    static BUFFER: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Bytes of a cache line: vectors that cross one are slower to load.
const LINE: usize = 64;

/// Calls `act` with `len` values of unspecified content, which start at a cache line. Calls may
/// nest; an inner one allocates.
pub(super) fn with<T>(len: usize, act: impl FnOnce(&mut [f32]) -> T) -> T {
    let mut buffer = BUFFER.take();
    if buffer.len() < len + LINE {
        buffer.resize(len + LINE, 0.0);
    }
    let start = buffer.as_ptr().align_offset(LINE).min(LINE);
    let result = act(&mut buffer[start..start + len]);
    BUFFER.set(buffer);
    result
}
