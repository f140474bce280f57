//! The sha256 of a whole blob, off the read path: it follows the complete prefix while that is
//! still in the page cache, and judges the blob when it becomes complete.
//!
//! Where a blob has chunk digests, they compare what is here from before instead, and never hash
//! the whole.
//!
//! Hashing has threads of its own, few for the whole store: on a machine with few cores it must
//! not take time from readers. While anything is being fetched they run only where a core would be
//! idle; when it is, they catch up, at a low priority. Blobs take turns.
//!
//! Invariants: at most one thread hashes a blob; it sees each chunk once, in order, and only
//! published ones. When one that it has seen is fetched again, it begins anew: see [`crate::trust`].

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use sha2::{Digest as _, Sha256};

use crate::chunk::ChunkNo;
use crate::digests::Origin;
use crate::shared::lock;
use crate::state::Verdict;
use crate::trust::{Era, Settled};
use crate::{Blob, Digest};

/// Chunks that must be ready before a thread is woken for them, so that it isn't for every one.
const BATCH: u32 = 8;

/// Chunks of one blob that are hashed before the next blob has its turn.
const TURN: u32 = 256;

/// Cores for each thread that hashes. One hashes 1.6 GB/s, as much as four cores download.
const CORES_PER_THREAD: usize = 4;

/// The nice value of these threads while nothing is fetched: others get nine times as much of a
/// busy core.
const NICE: i32 = 10;

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
    /// See [`Follow`].
    waits_for_whole: AtomicBool,
    /// The first chunk that is not hashed yet.
    next: AtomicU32,
    running: AtomicBool,
    pass: Mutex<Pass>,
}

/// The hash of what comes before `next`.
#[derive(Debug, Default)]
struct Pass {
    hasher: Sha256,
    /// The digests of its chunks, 32 bytes for each, while they are in memory anyway; only where
    /// they are kept (`KeepDigests`). So there is one for each chunk, or none.
    chunks: Vec<u8>,
    era: Era,
}

impl RunningHash {
    pub(crate) fn new(follow: Follow) -> Self {
        Self {
            waits_for_whole: AtomicBool::new(follow == Follow::Whole),
            next: AtomicU32::new(0),
            running: AtomicBool::new(false),
            pass: Mutex::default(),
        }
    }

    /// Whether a chunk was hashed already.
    pub(crate) fn is_past(&self, chunk: ChunkNo) -> bool {
        chunk.0 < self.next.load(Ordering::Acquire)
    }

    /// Begins anew if something that was hashed has been fetched again.
    fn keep_up(&self, pass: &mut Pass, era: Era) {
        if pass.era != era {
            *pass = Pass { era, ..Pass::default() };
            self.waits_for_whole.store(true, Ordering::Release);
            self.next.store(0, Ordering::Release);
        }
    }

    /// The first chunk that is not hashed yet.
    pub(crate) fn position(&self) -> ChunkNo {
        ChunkNo(self.next.load(Ordering::Acquire))
    }

    /// To be called after chunks were published: goes on hashing if there is enough to do.
    pub(crate) fn poke(&self, blob: &Arc<Blob>) {
        if !self.has_work(blob, BATCH) {
            return;
        }
        // Swaps here and in `run`: either this sees that the thread has stopped, or the thread's
        // swap reads what this one wrote and so sees the chunk that was published before.
        if !self.running.swap(true, Ordering::AcqRel) {
            Hashers::add(blob.hashers(), Arc::clone(blob));
        }
    }

    fn has_work(&self, blob: &Blob, batch: u32) -> bool {
        if blob.has_digests() {
            return blob.has_unchecked();
        }
        if blob.verdict().is_some() {
            return false;
        }
        let next = self.next.load(Ordering::Acquire);
        match (blob.presence().is_complete(), self.waits_for_whole.load(Ordering::Acquire)) {
            (true, _) => true,
            (false, true) => false,
            (false, false) => {
                blob.presence().has_all(&(ChunkNo(next)..ChunkNo(next.saturating_add(batch))))
            }
        }
    }
}

/// How a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// There is more to do.
    Over,
    /// Something is missing.
    CaughtUp,
    /// There will never be more to do.
    Done,
}

/// The threads that hash the blobs of a store.
#[derive(Debug)]
pub(crate) struct Hashers {
    most: usize,
    state: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    blobs: VecDeque<Arc<Blob>>,
    threads: usize,
}

impl Hashers {
    pub(crate) fn new() -> Arc<Self> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let most = (cores / CORES_PER_THREAD).max(1);
        Arc::new(Self { most, state: Mutex::default() })
    }

    fn add(self: &Arc<Self>, blob: Arc<Blob>) {
        let mut state = lock(&self.state);
        state.blobs.push_back(blob);
        if state.threads >= self.most {
            return;
        }
        state.threads += 1;
        let worker = Worker { hashers: Arc::clone(self), place: Place::Taken };
        drop(state);
        let spawned =
            thread::Builder::new().name("weightfs-hash".into()).spawn(move || worker.run());
        if let Err(error) = spawned {
            // The worker was dropped. The blob waits for the next one.
            tracing::error!(%error, "no thread to hash with");
        }
    }
}

/// A thread's place among the hashers; given back when it is dropped, by a panic, too.
#[derive(Debug)]
struct Worker {
    hashers: Arc<Hashers>,
    place: Place,
}

#[derive(Debug, PartialEq, Eq)]
enum Place {
    Taken,
    GivenBack,
}

impl Worker {
    /// The next blob. If there is none, the place is given back under the same lock, so that a
    /// blob that is added later finds it free.
    fn next(&mut self) -> Option<Arc<Blob>> {
        let mut state = lock(&self.hashers.state);
        let blob = state.blobs.pop_front();
        if blob.is_none() {
            state.threads -= 1;
            self.place = Place::GivenBack;
        }
        blob
    }

    fn run(mut self) {
        let mut pace = Pace::new();
        loop {
            let Some(blob) = self.next() else { return };
            if take_turn(&blob, &mut pace) {
                lock(&self.hashers.state).blobs.push_back(blob);
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.place == Place::Taken {
            lock(&self.hashers.state).threads -= 1;
        }
    }
}

/// Hashes what is published in sequence, a turn's worth. Whether there is more to do.
fn take_turn(blob: &Arc<Blob>, pace: &mut Pace) -> bool {
    let hash = blob.hash();
    let turn = hash_ready(blob, pace);
    if turn == Turn::Over {
        return true;
    }
    hash.running.swap(false, Ordering::AcqRel);
    let more = turn == Turn::CaughtUp && hash.has_work(blob, BATCH);
    more && !hash.running.swap(true, Ordering::AcqRel)
}

/// Compares chunks that are here with their digests, a turn's worth.
fn compare_ready(blob: &Arc<Blob>, pace: &mut Pace) -> Turn {
    let unchecked = blob.unchecked();
    for chunk in unchecked.iter().take(usize::try_from(TURN).unwrap_or(usize::MAX)) {
        pace.follow(blob.scheduler().is_busy());
        if let Err(error) = blob.check_marked(*chunk) {
            tracing::error!(blob = %blob.id().digest, %error, "chunks can't be compared");
            return Turn::Done;
        }
    }
    if blob.has_unchecked() { Turn::Over } else { Turn::CaughtUp }
}

fn hash_ready(blob: &Arc<Blob>, pace: &mut Pace) -> Turn {
    if blob.has_digests() {
        return compare_ready(blob, pace);
    }
    let hash = blob.hash();
    let mut pass = lock(&hash.pass);
    let total = blob.table().all().end.0;
    for _ in 0..TURN {
        pace.follow(blob.scheduler().is_busy());
        hash.keep_up(&mut pass, blob.era());
        let next = hash.next.load(Ordering::Acquire);
        if next >= total {
            let Pass { hasher, chunks, era } = std::mem::take(&mut *pass);
            let actual = Digest::from_raw(hasher.finalize().into());
            return match judge(blob, actual, &chunks, era) {
                Settled::Now | Settled::Before => Turn::Done,
                Settled::Outdated => Turn::Over,
            };
        }
        // Nobody waits for the judgement of a store that is closed.
        if blob.enter().is_err() {
            return Turn::Done;
        }
        match blob.chunk_bytes(ChunkNo(next)) {
            Ok(Some(bytes)) => {
                pass.hasher.update(&*bytes);
                if blob.keeps_digests() {
                    pass.chunks.extend_from_slice(Digest::of(&bytes).as_raw());
                }
            }
            Ok(None) => return Turn::CaughtUp,
            Err(error) => {
                // Not judged: the blob stays transport-trusted until it is opened again.
                tracing::error!(blob = %blob.id().digest, %error, "blob can't be hashed");
                return Turn::Done;
            }
        }
        hash.next.store(next + 1, Ordering::Release);
    }
    Turn::Over
}

/// From now on the calling thread takes only what nobody else wants of a processor.
pub fn give_way() {
    Pace::new().follow(true);
}

/// How the calling thread gives way to others.
#[derive(Debug)]
struct Pace {
    /// Whether it takes only what nobody else wants.
    idle_only: bool,
}

impl Pace {
    fn new() -> Self {
        // SAFETY: setpriority takes numbers only. With 0 it is about the calling thread (Linux,
        // setpriority(2), "C library/kernel differences").
        #[expect(unsafe_code, reason = "no safe wrapper for setpriority(2)")]
        let _ = unsafe { nix::libc::setpriority(nix::libc::PRIO_PROCESS, 0, NICE) };
        Self { idle_only: false }
    }

    /// While others are `busy`, only idle cores are used: a nice value alone would not do. It
    /// shares a core out in slices of milliseconds, for which whoever wakes up has to wait, and
    /// downloads wake up for every few KiB. SCHED_IDLE yields at once (sched(7)).
    fn follow(&mut self, busy: bool) {
        if busy == self.idle_only {
            return;
        }
        self.idle_only = busy;
        let policy = if busy { nix::libc::SCHED_IDLE } else { nix::libc::SCHED_OTHER };
        let none = nix::libc::sched_param { sched_priority: 0 };
        // SAFETY: the structure outlives the call; 0 is the calling thread.
        #[expect(unsafe_code, reason = "no safe wrapper for sched_setscheduler(2)")]
        // Only root may come back from SCHED_IDLE at this nice value: without it, hashing stays
        // idle for the thread's life.
        let _ = unsafe { nix::libc::sched_setscheduler(0, policy, &raw const none) };
    }
}

/// Judges the whole. What the chunks of the right bytes hash to is kept, if it is known, whatever has
/// become of them meanwhile: what is fetched again is compared with it.
pub(crate) fn judge(blob: &Arc<Blob>, actual: Digest, chunks: &[u8], era: Era) -> Settled {
    if actual != blob.id().digest {
        return blob.judge(Verdict::Poisoned { actual }, era);
    }
    if !chunks.is_empty()
        && let Err(error) = blob.adopt(chunks, Origin::Whole)
    {
        tracing::warn!(blob = %blob.id().digest, %error, "chunk digests are not kept");
    }
    let settled = blob.judge(Verdict::Verified, era);
    if settled == Settled::Now {
        blob.all_are_checked();
    }
    settled
}
