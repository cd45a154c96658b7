//! The panic guard and the error message of each thread.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::c_char;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::types::{KVMGR_INTERNAL, KVMGR_OK, kvmgr_status, status_of};
use crate::error::{Error, Kind, Result};
use crate::log::{Level, log};

/// Bytes of the message buffer of a thread, its final NUL included.
const CAPACITY: usize = 512;

thread_local! {
    /// Fixed and without a destructor: C may read it after any call, on any path, and unloading the
    /// library needs no thread-exit hook.
    static MESSAGE: RefCell<[u8; CAPACITY]> = const { RefCell::new([0; CAPACITY]) };
}

/// Runs the body of a C function: no panic gets out, errors leave their message behind.
pub(super) fn guard(body: impl FnOnce() -> Result<()>) -> kvmgr_status {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => KVMGR_OK,
        Ok(Err(error)) => fail(&error),
        Err(payload) => fail(&panic_error(payload)),
    }
}

/// Runs the body of a C function that answers a value instead of a status.
pub(super) fn guard_or<T>(fallback: T, body: impl FnOnce() -> Result<T>) -> T {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => value,
        Ok(Err(error)) => {
            fail(&error);
            fallback
        }
        Err(payload) => {
            fail(&panic_error(payload));
            fallback
        }
    }
}

/// The message of the last failure on this thread.
pub(super) fn last_message() -> *const c_char {
    MESSAGE.with(|message| message.as_ptr().cast_const().cast())
}

fn fail(error: &Error) -> kvmgr_status {
    let status = status_of(error.kind());
    // Running out of blocks is everyday life of a scheduler, and most machines have no GPU.
    let level = match error.kind() {
        Kind::OutOfBlocks | Kind::NotFound | Kind::NoDevice => Level::Debug,
        _ => Level::Error,
    };
    log(level, format_args!("{}", error.message()));
    MESSAGE.with(|message| store(&mut message.borrow_mut(), error.message()));
    status
}

/// Copies as much of `text` as fits, cut at a character, without inner NULs.
fn store(buffer: &mut [u8; CAPACITY], text: &str) {
    let mut end = text.len().min(CAPACITY - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    for (target, byte) in buffer.iter_mut().zip(text[..end].bytes()) {
        *target = if byte == 0 { b'?' } else { byte };
    }
    buffer[end] = 0;
}

fn panic_error(payload: Box<dyn Any + Send>) -> Error {
    debug_assert_eq!(KVMGR_INTERNAL, status_of(Kind::Internal));
    let text = if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_string()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        // The destructor of an unknown payload may panic in turn; it is leaked instead.
        std::mem::forget(payload);
        return Error::new(Kind::Internal, "panic of unknown type");
    };
    Error::new(Kind::Internal, format!("internal error: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn message() -> String {
        // SAFETY: the buffer always ends in NUL and lives as long as the thread.
        unsafe { CStr::from_ptr(last_message()) }.to_str().unwrap().to_string()
    }

    #[test]
    fn errors_and_panics_become_statuses_with_messages() {
        let error = || Err(Error::new(Kind::OutOfBlocks, "need 3 blocks"));
        assert_eq!(guard(error), status_of(Kind::OutOfBlocks));
        assert_eq!(message(), "need 3 blocks");
        assert_eq!(guard(|| panic!("lost {}", 7)), KVMGR_INTERNAL);
        assert_eq!(message(), "internal error: lost 7");
        assert_eq!(guard(|| std::panic::panic_any(5)), KVMGR_INTERNAL);
        assert_eq!(guard_or(9, || panic!("x")), 9);
        assert_eq!(guard(|| Ok(())), KVMGR_OK);
    }

    #[test]
    fn long_messages_are_cut_at_a_character() {
        let text = "\u{1F600}".repeat(200);
        assert_ne!(guard(|| Err(Error::new(Kind::Internal, text.clone()))), KVMGR_OK);
        assert!(message().len() < CAPACITY && text.starts_with(&message()));
    }
}
