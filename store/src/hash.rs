//! The sha256 of a whole blob, off the read path: it follows the complete prefix while that is
//! still in the page cache, and judges the blob when it becomes complete.
//!
//! Invariant: at most one thread hashes a blob; it sees each chunk once, in order, and only
//! published ones.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use sha2::{Digest as _, Sha256};

use crate::chunk::ChunkNo;
use crate::shared::lock;
use crate::state::Verdict;
use crate::{Blob, Digest};

/// Chunks that must be ready before a thread is woken for them, so that it isn't for every one.
const BATCH: u32 = 8;

/// When the hash of a blob runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Follow {
    /// With the prefix: what arrives is hashed while it is in memory.
    Prefix,
    /// When the blob is complete: its first bytes are from an earlier run, and reading them
    /// before it is known whether the rest ever comes would be for nothing.
    Whole,
}

/// A hash in progress.
#[derive(Debug)]
pub(crate) struct RunningHash {
    follow: Follow,
    /// The first chunk that is not hashed yet.
    next: AtomicU32,
    running: AtomicBool,
    hasher: Mutex<Sha256>,
}

impl RunningHash {
    pub(crate) fn new(follow: Follow) -> Self {
        Self {
            follow,
            next: AtomicU32::new(0),
            running: AtomicBool::new(false),
            hasher: Mutex::default(),
        }
    }

    /// To be called after chunks were published: goes on hashing if there is enough to do.
    pub(crate) fn poke(&self, blob: &Arc<Blob>) {
        if blob.verdict().is_some() || !self.has_work(blob, BATCH) {
            return;
        }
        // Swaps here and in `run`: either this sees that the thread has stopped, or the thread's
        // swap reads what this one wrote and so sees the chunk that was published before.
        if !self.running.swap(true, Ordering::AcqRel) {
            let blob = Arc::clone(blob);
            blob.clone().runtime().spawn_blocking(move || run(&blob));
        }
    }

    fn has_work(&self, blob: &Blob, batch: u32) -> bool {
        let next = self.next.load(Ordering::Acquire);
        match (blob.presence().is_complete(), self.follow) {
            (true, _) => true,
            (false, Follow::Whole) => false,
            (false, Follow::Prefix) => {
                blob.presence().has_all(&(ChunkNo(next)..ChunkNo(next.saturating_add(batch))))
            }
        }
    }
}

/// Hashes until there is nothing left to do.
fn run(blob: &Arc<Blob>) {
    let hash = blob.hash();
    loop {
        let ended = hash_ready(blob);
        hash.running.swap(false, Ordering::AcqRel);
        let more = !ended && hash.has_work(blob, BATCH);
        if !more || hash.running.swap(true, Ordering::AcqRel) {
            return;
        }
    }
}

/// Hashes what is published in sequence. Whether there will never be more to do.
fn hash_ready(blob: &Arc<Blob>) -> bool {
    let hash = blob.hash();
    let mut hasher = lock(&hash.hasher);
    let total = blob.table().all().end.0;
    loop {
        let next = hash.next.load(Ordering::Acquire);
        if next >= total {
            judge(blob, Digest::from_raw(std::mem::take(&mut *hasher).finalize().into()));
            return true;
        }
        if !blob.presence().has(ChunkNo(next)) {
            return false;
        }
        match blob.chunk_bytes(ChunkNo(next)) {
            Ok(bytes) => hasher.update(&*bytes),
            Err(error) => {
                // Not judged: the blob stays transport-trusted until it is opened again.
                tracing::error!(blob = %blob.id().digest, %error, "blob can't be hashed");
                return true;
            }
        }
        hash.next.store(next + 1, Ordering::Release);
    }
}

fn judge(blob: &Arc<Blob>, actual: Digest) {
    let promised = blob.id().digest;
    if actual == promised {
        blob.settle(Verdict::Verified);
    } else if blob.settle(Verdict::Poisoned { actual }) {
        tracing::error!(
            blob = %promised,
            %actual,
            sources = ?blob.source_names(),
            "blob is poisoned: what its sources gave does not hash to its digest; nothing of it is served any more",
        );
    }
}
