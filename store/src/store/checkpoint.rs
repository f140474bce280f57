//! The thread that records what blobs have published: in groups, soon after it came, and off the
//! path of those who fetch.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::at;
use crate::OpenError;
use crate::shared::{Shared, lock};

/// The pause after a failure: whatever it is (a full disk, say), it takes a while to pass.
const PAUSE: Duration = Duration::from_secs(1);

/// The thread; it ends with [`Checkpointer::stop`].
#[derive(Debug)]
pub(super) struct Checkpointer {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Checkpointer {
    /// Nothing that was published stays unrecorded for much longer than `latest` and the time
    /// that syncing takes.
    pub(super) fn start(shared: Arc<Shared>, latest: Duration) -> io::Result<Self> {
        let recorded = Arc::clone(&shared);
        let work = move || {
            let mut failing = false;
            while recorded.await_group(latest) {
                match record_changed(&recorded) {
                    Ok(()) => failing = false,
                    Err(error) => {
                        if !std::mem::replace(&mut failing, true) {
                            tracing::error!(%error, "blob state not recorded; tried again");
                        }
                        recorded.pause_recording(PAUSE);
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("weightfs-sync".into()).spawn(work)?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Ends the thread, after the group that it is at.
    pub(super) fn stop(&self) {
        let Some(thread) = lock(&self.thread).take() else { return };
        self.shared.end_groups();
        if thread.join().is_err() {
            tracing::error!("the checkpoint thread panicked");
        }
    }
}

/// Records all blobs that changed. The first failure is returned, after all were tried.
pub(super) fn record_changed(shared: &Arc<Shared>) -> Result<(), OpenError> {
    shared.record_changed(|blob| {
        let recorded = blob.enter().and_then(|_entered| blob.record());
        recorded.map_err(at(blob.segments().dir()))
    })
}
