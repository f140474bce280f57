//! Ctrl-C in programs that must clean up: noted at once, acted on between two steps, so that guards
//! end what they started.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{SignalKind, signal};

use crate::remote::{block_on, spawn};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT and SIGTERM are noted instead of ending the process.
pub fn watch() {
    for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
        let mut signals = block_on(async { signal(kind) }).expect("signals can be watched");
        spawn(async move {
            while signals.recv().await.is_some() {
                INTERRUPTED.store(true, Ordering::Relaxed);
            }
        });
    }
}

/// Ends the work, unwinding through its guards, if the process was interrupted.
///
/// # Panics
/// When it was: that is how the work ends.
pub fn check() {
    assert!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
}
