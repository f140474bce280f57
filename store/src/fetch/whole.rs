//! Blobs of hosts that ignore ranges: one pass over the whole blob, in order, into the cache.
//! Requests wait until it comes by; their readers are woken chunk by chunk, as ever.
//!
//! Invariant: one pass for each blob at a time. It ends with the blob's last user, and when its
//! source has given nothing for the deadline.

use std::sync::{Arc, Mutex, Weak};

use tokio::sync::watch;
use tokio::time::timeout_at;

use super::queue::Request;
use super::{Attempts, Failure, Outcome, Patience, transfer};
use crate::Blob;
use crate::chunk::ChunkNo;
use crate::shared::lock;
use crate::source::{Source, in_order};

/// Chunks that are written before the requests that wait look again.
const STEP_CHUNKS: u32 = 16;

/// The pass of a blob.
#[derive(Debug, Default)]
pub(super) struct Pass(Mutex<Option<watch::Receiver<State>>>);

#[derive(Debug, Clone)]
enum State {
    Running,
    Ended(Outcome),
}

impl Pass {
    /// The pass that is under way, or a new one.
    fn join(&self, blob: &Arc<Blob>, source: &Arc<dyn Source>) -> watch::Receiver<State> {
        let (progress, receiver) = watch::channel(State::Running);
        {
            let mut pass = lock(&self.0);
            let running = |pass: &watch::Receiver<State>| {
                pass.has_changed().is_ok() && matches!(*pass.borrow(), State::Running)
            };
            if let Some(pass) = pass.as_ref().filter(|pass| running(pass)) {
                return pass.clone();
            }
            *pass = Some(receiver.clone());
        }
        tracing::info!(
            blob = %blob.id().digest, source = source.name(),
            "the host ignores ranges: the whole blob is fetched in order"
        );
        let source = in_order(Arc::clone(source), blob.layout().size());
        blob.runtime().spawn(run(Arc::downgrade(blob), source, progress));
        receiver
    }
}

/// Waits until the pass has brought a chunk or has ended, while the request's patience lasts.
pub(super) async fn follow(
    blob: &Arc<Blob>,
    source: &Arc<dyn Source>,
    chunk: ChunkNo,
    patience: &Patience,
) -> Outcome {
    let mut pass = blob.fetcher().pass().join(blob, source);
    while !blob.presence().has(chunk) {
        if let State::Ended(outcome) = pass.borrow_and_update().clone() {
            return outcome;
        }
        match timeout_at(patience.until(), pass.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(Failure::abandoned()),
            Err(_) => return Err(Failure::Expired { cause: patience.cause() }),
        }
    }
    Ok(())
}

/// Fetches all that is absent, from the first byte to the last.
async fn run(blob: Weak<Blob>, source: Arc<dyn Source>, progress: watch::Sender<State>) {
    let mut from = ChunkNo(0);
    let outcome = loop {
        let Some(blob) = blob.upgrade() else { break Ok(()) };
        let all = from..blob.table().all().end;
        let Some(first) = blob.presence().first_absent(&all) else { break Ok(()) };
        let Some((segment, _)) = blob.table().bytes_of(first) else { break Ok(()) };
        let end = blob.table().of_segment(segment).end;
        from = ChunkNo(end.0.min(first.0.saturating_add(STEP_CHUNKS)));
        let request = Request::alone(first..from, super::patience(&blob));
        let sources = vec![Arc::clone(&source)];
        let (mut bytes, mut attempts) = (0, Attempts::default());
        let done = transfer::fill(&blob, &request, sources, &mut bytes, &mut attempts).await;
        if done.is_err() {
            break done;
        }
        progress.send_replace(State::Running);
    };
    progress.send_replace(State::Ended(outcome));
}
