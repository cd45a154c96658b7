//! Buffers for each thread, so that reading the cache does not allocate once they have grown.

use std::cell::Cell;

thread_local! {
    /// Those that no call uses now.
    static BUFFERS: Cell<Vec<Vec<f32>>> = const { Cell::new(Vec::new()) };
}

/// Bytes of a cache line: vectors that cross one are slower to load.
const LINE: usize = 64;

/// Calls `act` with `len` values of unspecified content, which start at a cache line. Calls may
/// nest.
pub(super) fn with<T>(len: usize, act: impl FnOnce(&mut [f32]) -> T) -> T {
    let mut buffers = BUFFERS.take();
    let mut buffer = buffers.pop().unwrap_or_default();
    BUFFERS.set(buffers);
    if buffer.len() < len + LINE {
        buffer.resize(len + LINE, 0.0);
    }
    let start = buffer.as_ptr().align_offset(LINE).min(LINE);
    let result = act(&mut buffer[start..start + len]);
    let mut buffers = BUFFERS.take();
    buffers.push(buffer);
    BUFFERS.set(buffers);
    result
}
