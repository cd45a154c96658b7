//! One error type for the whole library: a kind, which is the C status, and a message that names
//! the argument, the value and the limit.

use std::fmt;

/// What went wrong, in the granularity a caller can act on. Maps one to one to a `kvmgr_status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// An argument is outside its documented range.
    InvalidArgument,
    /// A handle is NULL, of another type, or already released.
    InvalidHandle,
    /// The call is valid, but not in the current state of the object.
    InvalidState,
    /// An exclusive handle is in use by another thread.
    Busy,
    /// The named thing does not exist.
    NotFound,
    /// No free block is left. A normal answer: preempt a sequence and retry.
    OutOfBlocks,
    /// The memory limit is reached or the system refused memory.
    OutOfMemory,
    /// This build, device or pipeline cannot do what was asked.
    Unsupported,
    /// No device of the wanted kind is usable on this machine.
    NoDevice,
    /// A device (CUDA) reported an error.
    Device,
    /// A store failed to put, get or remove.
    Store,
    /// Bytes read back are not the bytes that were written.
    Corrupt,
    /// A bug in the library.
    Internal,
}

/// An error: its [`Kind`] and a message for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    kind: Kind,
    message: String,
}

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind` with a message that names argument, value and limit.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The kind of the error.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The text of the error.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The same error with `context: ` before its message.
    #[must_use]
    pub fn within(self, context: impl fmt::Display) -> Self {
        Self { kind: self.kind, message: format!("{context}: {}", self.message) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.message)
    }
}

impl std::error::Error for Error {}

/// Returns early with an [`Error`]: `bail!(OutOfBlocks, "need {n} blocks, {free} are free")`.
macro_rules! bail {
    ($kind:ident, $($format:tt)*) => {
        return Err($crate::error::Error::new($crate::error::Kind::$kind, format!($($format)*)))
    };
}

/// Returns early with an [`Error`] unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $kind:ident, $($format:tt)*) => {
        if !($condition) {
            $crate::error::bail!($kind, $($format)*);
        }
    };
}

pub(crate) use {bail, ensure};
