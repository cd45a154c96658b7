//! A buffer for each thread, so that reading the cache does not allocate once it has grown.

use std::cell::Cell;

thread_local! {
    static BUFFER: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Calls `act` with `len` values of unspecified content. Calls may nest; an inner one allocates.
pub(super) fn with<T>(len: usize, act: impl FnOnce(&mut [f32]) -> T) -> T {
    let mut buffer = BUFFER.take();
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    let result = act(&mut buffer[..len]);
    BUFFER.set(buffer);
    result
}
