//! One log hook for the process. Silent unless the engine sets it: a library does not print.

use std::fmt::Arguments;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::RwLock;

/// How important a message is; smaller is more important.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something failed.
    Error = 1,
    /// Something works, but not as one would expect.
    Warn = 2,
    /// Rare events of interest.
    Info = 3,
    /// For developers.
    Debug = 4,
}

/// Receives messages on the thread that caused them.
pub type Hook = Box<dyn Fn(Level, &str) + Send + Sync>;

static HOOK: RwLock<Option<Hook>> = RwLock::new(None);
static MAX_LEVEL: AtomicU32 = AtomicU32::new(0);

/// Sets the hook and the least important level that reaches it. `None` is silence. The previous
/// hook is dropped before this returns, and is not running any more.
pub fn set_hook(hook: Option<Hook>, max_level: u32) {
    let max_level = if hook.is_some() { max_level } else { 0 };
    MAX_LEVEL.store(max_level, Ordering::Relaxed);
    *HOOK.write() = hook;
}

/// Sends a message to the hook, if it wants messages of this level.
pub fn log(level: Level, message: Arguments<'_>) {
    if level as u32 > MAX_LEVEL.load(Ordering::Relaxed) {
        return;
    }
    if let Some(hook) = &*HOOK.read() {
        hook(level, &message.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn only_important_enough_messages_arrive() {
        let seen = Arc::new(parking_lot::Mutex::new(Vec::new()));
        let sink = seen.clone();
        let hook = move |level, text: &str| {
            if text.starts_with("test:") {
                sink.lock().push((level, text.to_string()));
            }
        };
        set_hook(Some(Box::new(hook)), Level::Warn as u32);
        log(Level::Error, format_args!("test: a{}", 1));
        log(Level::Info, format_args!("test: b"));
        set_hook(None, 4);
        log(Level::Error, format_args!("test: c"));
        assert_eq!(*seen.lock(), [(Level::Error, "test: a1".to_string())]);
    }
}
