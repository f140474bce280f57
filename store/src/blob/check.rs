//! Comparing chunks with their digests, where a blob has them.
//!
//! What is fetched is compared before it is published. What is here from before is *unchecked*:
//! an earlier run recorded it and is in doubt, or had nothing to compare it with. It is not
//! published; it is compared when somebody wants it, or by the hashing threads, whoever is first,
//! and fetched again if it is wrong. Digests that come while a blob is open find chunks that are
//! published: these are served as before until they were compared.
//!
//! Invariants: a chunk that is published while there are digests was compared with them. Whoever
//! publishes holds the lock of the digests for reading, so that whoever sets them sees either the
//! chunk or knows that it will be compared.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::thread;
use std::time::Duration;

use super::Blob;
use super::evict::Withdrawn;
use crate::Digest;
use crate::chunk::{ChunkNo, Unfit, VerifiedChunk};
use crate::digests::{ChunkDigests, Origin};
use crate::fetch::Priority;
use crate::presence::{Bits, ones};
use crate::state::Verdict;

/// How often a wrong chunk that somebody reads at this moment is tried to be taken away, and the
/// pause between. Replies take less; what is handed to the kernel or filled takes longer.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(10);

/// What was found of the chunks.
#[derive(Debug)]
pub(super) struct Checks {
    digests: RwLock<Option<ChunkDigests>>,
    /// 0 without digests, else their origin: see [`Checks::origin`].
    origin: AtomicU8,
    unchecked: Bits,
    left: AtomicU32,
    rejected: AtomicU64,
}

/// The digests of a blob, which don't change while this is there.
#[derive(Debug)]
pub(crate) struct Promises<'a>(RwLockReadGuard<'a, Option<ChunkDigests>>);

impl Promises<'_> {
    pub(crate) fn digests(&self) -> Option<&ChunkDigests> {
        self.0.as_ref()
    }
}

/// What came of comparing a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compared {
    /// It is what it should be.
    Fits,
    /// It was not, and is gone: it will be fetched again.
    Wrong,
    /// It is not here, or there is nothing to compare it with.
    Nothing,
}

/// What a wrong chunk hashes to, if it could be read.
fn actual(unfit: &Unfit) -> Option<Digest> {
    match unfit {
        Unfit::Wrong { actual, .. } => Some(*actual),
        Unfit::NotWhole | Unfit::Cache(_) => None,
    }
}

fn tag(digests: Option<&ChunkDigests>) -> u8 {
    match digests {
        None => 0,
        Some(digests) => match digests.origin() {
            Origin::Index => 1,
            Origin::Whole => 2,
        },
    }
}

impl Checks {
    pub(super) fn new(digests: Option<ChunkDigests>, chunks: u32) -> Self {
        Self {
            origin: AtomicU8::new(tag(digests.as_ref())),
            digests: RwLock::new(digests),
            unchecked: Bits::new(chunks),
            left: AtomicU32::new(0),
            rejected: AtomicU64::new(0),
        }
    }

    /// Where the digests come from, if there are any. Takes no lock.
    pub(super) fn origin(&self) -> Option<Origin> {
        match self.origin.load(Ordering::Acquire) {
            1 => Some(Origin::Index),
            2 => Some(Origin::Whole),
            _ => None,
        }
    }

    pub(super) fn promises(&self) -> Promises<'_> {
        Promises(self.digests.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// A chunk that is here is to be compared.
    pub(super) fn mark(&self, chunk: ChunkNo) {
        if self.unchecked.set(chunk.0) {
            self.left.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// It was compared, or is gone; whether it was marked.
    pub(super) fn clear(&self, chunk: ChunkNo) -> bool {
        let was_marked = self.unchecked.clear(chunk.0);
        if was_marked {
            self.left.fetch_sub(1, Ordering::AcqRel);
        }
        was_marked
    }

    pub(super) fn has(&self, chunk: ChunkNo) -> bool {
        self.has_some() && self.unchecked.get(chunk.0)
    }

    fn has_some(&self) -> bool {
        self.left.load(Ordering::Acquire) > 0
    }

    /// Whether all that is here was compared.
    pub(super) fn are_done(&self) -> bool {
        self.origin().is_some() && !self.has_some()
    }

    pub(super) fn snapshot(&self) -> Vec<u64> {
        self.unchecked.snapshot()
    }

    /// Chunks that were not what they should be.
    pub(super) fn rejected(&self) -> u64 {
        self.rejected.load(Ordering::Relaxed)
    }
}

impl Blob {
    /// Whether its chunks are compared with digests of theirs.
    pub fn has_digests(&self) -> bool {
        self.checks.origin().is_some()
    }

    /// Whether something that is here was not compared yet.
    pub(crate) fn has_unchecked(&self) -> bool {
        self.checks.has_some()
    }

    /// Chunks that are here and were not compared yet.
    pub(crate) fn unchecked(&self) -> Vec<ChunkNo> {
        if !self.has_unchecked() {
            return vec![];
        }
        ones(self.checks.snapshot().into_iter()).map(ChunkNo).collect()
    }

    /// What its chunks should be, until that is dropped.
    pub(crate) fn promises(&self) -> Promises<'_> {
        self.checks.promises()
    }

    /// Whether a chunk is in the cache file, to be compared before it is published.
    pub(crate) fn is_kept(&self, chunk: ChunkNo) -> bool {
        self.checks.has(chunk) && !self.presence.has(chunk)
    }

    /// Whether a chunk is published or kept.
    pub(crate) fn is_here(&self, chunk: ChunkNo) -> bool {
        // In this order: a chunk is published before it is no longer kept.
        self.checks.has(chunk) || self.presence.has(chunk)
    }

    /// Bytes of chunks that are kept.
    pub(super) fn kept_bytes(&self) -> u64 {
        let kept = self.unchecked().into_iter().filter(|chunk| !self.presence.has(*chunk));
        kept.map(|chunk| self.table.len_of(chunk)).sum()
    }

    /// A source gave a chunk that is not what it should be. Counted, and said once, here.
    pub(crate) fn rejected(&self, chunk: ChunkNo, actual: Digest, source: &str) {
        self.checks.rejected.fetch_add(1, Ordering::Relaxed);
        self.counters().wrong_chunks.increment();
        let start = self.table.bytes_of(chunk).map_or(0, |(_, bytes)| bytes.start);
        let blob = self.id.digest;
        tracing::warn!(%blob, chunk = chunk.0, start, %actual, source, "wrong chunk refused");
    }

    /// Takes over what chunks should be. What is published and was not hashed as a whole is
    /// compared from now on. Digests that were made here are kept. Blocking I/O.
    pub(crate) fn adopt(self: &Arc<Self>, digests: &[u8], origin: Origin) -> io::Result<()> {
        let entered = self.enter()?;
        let checks = &self.checks;
        let mut known = checks.digests.write().unwrap_or_else(PoisonError::into_inner);
        match &*known {
            Some(old) if old.are(digests) => return Ok(()),
            Some(old) if old.origin() == Origin::Whole => {
                let blob = self.id.digest;
                tracing::warn!(%blob, "an index contradicts what was hashed here: it is ignored");
                return Ok(());
            }
            _ => {}
        }
        let is_verified = self.judgement.is_verified();
        let (disk, dir) = (self.segments.disk(), self.segments.dir());
        let new = ChunkDigests::write(disk, dir, &self.table, digests, origin)?;
        if !is_verified {
            ones(self.presence.snapshot().into_iter()).map(ChunkNo).for_each(|at| checks.mark(at));
        }
        checks.origin.store(tag(Some(&new)), Ordering::Release);
        *known = Some(new);
        // Before what may enter again: a store that closes would wait in between.
        drop((known, entered));
        self.hash.poke(self);
        self.checked();
        Ok(())
    }

    /// What is here was hashed as a whole: nothing is left to be compared.
    pub(crate) fn all_are_checked(self: &Arc<Self>) {
        for chunk in self.unchecked() {
            self.checks.clear(chunk);
        }
        self.checked();
    }

    /// Compares a chunk that is marked as unchecked; publishes it if it fits. Blocking I/O.
    pub(crate) fn check_marked(self: &Arc<Self>, chunk: ChunkNo) -> io::Result<Compared> {
        if !self.checks.has(chunk) {
            return Ok(Compared::Nothing);
        }
        self.compare(chunk)
    }

    /// Compares a chunk that is here, whether it was compared before or not. Blocking I/O.
    pub(crate) fn compare(self: &Arc<Self>, chunk: ChunkNo) -> io::Result<Compared> {
        let extents = self.table.extents_of(&(chunk..chunk.next()));
        let Some(hold) = self.try_hold(&extents) else { return Ok(Compared::Nothing) };
        let is_published = self.presence.has(chunk);
        if !self.has_digests() || !is_published && !self.checks.has(chunk) {
            return Ok(Compared::Nothing);
        }
        let entered = self.enter()?;
        let promises = self.promises();
        let compared = match self.compare_file(chunk, &promises) {
            Ok(verified) => {
                if !is_published {
                    self.fetcher.publish(self, &verified, Priority::Background, &entered);
                }
                self.checks.clear(chunk);
                // Before what may enter again.
                drop((promises, entered, hold));
                Compared::Fits
            }
            Err(unfit) => {
                drop((promises, entered, hold));
                match is_published {
                    true => self.reject_published(chunk, &unfit)?,
                    false => self.reject_kept(chunk, &unfit)?,
                }
            }
        };
        self.checked();
        Ok(compared)
    }

    fn compare_file(
        &self,
        chunk: ChunkNo,
        promises: &Promises<'_>,
    ) -> Result<VerifiedChunk, Unfit> {
        let (_, covers) = self.table.bytes_of(chunk).ok_or(Unfit::NotWhole)?;
        let hash = || self.file_bytes(chunk).map(|bytes| Digest::of(&bytes));
        VerifiedChunk::check(&self.table, chunk, &covers, promises.digests(), hash)
    }

    /// The bytes of a chunk that are in its file.
    fn file_bytes(&self, chunk: ChunkNo) -> io::Result<Vec<u8>> {
        let outside = || io::Error::other("no such chunk");
        let (segment, _) = self.table.bytes_of(chunk).ok_or_else(outside)?;
        let within = self.table.within_segment(&(chunk..chunk.next())).ok_or_else(outside)?;
        let len = usize::try_from(within.end - within.start).map_err(io::Error::other)?;
        let mut bytes = vec![0; len];
        self.segments.open(segment)?.read_exact_at(&mut bytes, within.start)?;
        Ok(bytes)
    }

    /// A chunk that nobody was served is gone, unless somebody else has found so: then it may have
    /// been fetched meanwhile.
    fn reject_kept(self: &Arc<Self>, chunk: ChunkNo, unfit: &Unfit) -> io::Result<Compared> {
        if !self.checks.clear(chunk) {
            return Ok(Compared::Nothing);
        }
        self.found_wrong(chunk, unfit);
        // Until this is done the record claims it, but it is one that is in doubt.
        let entered = self.enter()?;
        self.record_absence(&[chunk], &entered)?;
        Ok(Compared::Wrong)
    }

    /// Takes a published chunk away. While somebody has it in use for longer, it can't be taken
    /// from him, but nothing more of the blob is served.
    fn reject_published(self: &Arc<Self>, chunk: ChunkNo, unfit: &Unfit) -> io::Result<Compared> {
        for _ in 0..TRIES {
            let still_wrong = || self.compare_file(chunk, &self.promises()).is_err();
            match self.withdraw_if(chunk, still_wrong)? {
                Withdrawn::Gone => {
                    self.found_wrong(chunk, unfit);
                    return Ok(Compared::Wrong);
                }
                Withdrawn::Stays => return Ok(Compared::Nothing),
                Withdrawn::InUse => thread::sleep(PAUSE),
            }
        }
        self.found_wrong(chunk, unfit);
        // Of the chunk, not of the whole: that was not hashed.
        let actual = actual(unfit).unwrap_or(Digest::from_raw([0; 32]));
        self.judge(Verdict::Poisoned { actual }, self.era());
        self.checks.clear(chunk);
        Ok(Compared::Wrong)
    }

    /// Counted, and said once, here.
    fn found_wrong(&self, chunk: ChunkNo, unfit: &Unfit) {
        self.checks.rejected.fetch_add(1, Ordering::Relaxed);
        let (blob, actual) = (self.id.digest, actual(unfit));
        tracing::warn!(%blob, chunk = chunk.0, ?actual, "wrong chunk in the cache refused");
    }

    /// To be called when a chunk was compared: says so when it was the last one.
    fn checked(self: &Arc<Self>) {
        if !self.checks.are_done() {
            return;
        }
        if self.checks.origin() == Some(Origin::Whole) && self.verdict().is_none() {
            // Each chunk is what the whole was made of.
            self.judge(Verdict::Verified, self.era());
        }
        self.judged.notify_waiters();
        let before = self.epoch.swap(self.shared.epochs.now, Ordering::AcqRel);
        if before != self.shared.epochs.now
            && let Ok(entered) = self.enter()
        {
            // A new record: what is here is no longer in doubt.
            self.shared.changed(self, 0, &entered);
        }
    }
}
