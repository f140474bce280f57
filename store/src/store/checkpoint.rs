//! The thread that records, every few seconds, what blobs have published.

use std::io;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::at;
use crate::OpenError;
use crate::shared::{Shared, lock};

/// The thread; it ends with [`Checkpointer::stop`].
#[derive(Debug)]
pub(super) struct Checkpointer {
    thread: Mutex<Option<(SyncSender<()>, JoinHandle<()>)>>,
}

impl Checkpointer {
    pub(super) fn start(shared: Arc<Shared>, interval: Duration) -> io::Result<Self> {
        let (stop, stopped) = sync_channel(1);
        let work = move || {
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                if let Err(error) = record_changed(&shared) {
                    tracing::error!(%error, "blob state not recorded");
                }
            }
        };
        let thread = std::thread::Builder::new().name("weightfs-sync".into()).spawn(work)?;
        Ok(Self { thread: Mutex::new(Some((stop, thread))) })
    }

    /// Ends the thread, after the checkpoint that it is at.
    pub(super) fn stop(&self) {
        let Some((stop, thread)) = lock(&self.thread).take() else { return };
        drop(stop);
        if thread.join().is_err() {
            tracing::error!("the checkpoint thread panicked");
        }
    }
}

/// Records all blobs that changed. The first failure is returned, after all were tried.
pub(super) fn record_changed(shared: &Shared) -> Result<(), OpenError> {
    let mut result = Ok(());
    for blob in shared.take_changed() {
        let recorded = blob.enter().and_then(|_entered| blob.record());
        let failed = recorded.map_err(at(blob.segments().dir()));
        result = result.and(failed);
    }
    result
}
