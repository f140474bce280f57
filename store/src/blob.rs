//! One blob: its segments, what of them is published, and reads.
//!
//! Invariants: a slice covers only published bytes, holds their extents, and so they never change
//! while it is there. A read that finds everything takes no lock that a fetch can hold. A poisoned
//! blob serves nothing more.

mod check;
mod complete;
mod evict;
mod judge;
mod kernel;
mod map;
mod miss;
mod open;
mod recorder;
mod share;
mod slice;

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;

use self::check::Checks;
pub(crate) use self::check::Compared;
pub(crate) use self::evict::Candidate;
pub use self::judge::Trust;
use self::kernel::HandedOut;
pub use self::kernel::SegmentHold;
pub use self::map::{ChunkState, InFlight, MapCell};
pub use self::miss::Miss;
use self::recorder::Recorder;
pub(crate) use self::slice::Hold;
pub use self::slice::Slice;
use self::slice::SliceBytes;
use crate::budget::Budget;
use crate::chunk::{ChunkNo, ChunkTable, Place, VerifiedChunk, each};
use crate::counters::{BySource, Counters};
use crate::digests::Origin;
use crate::extents::Extents;
use crate::fetch::{Fetcher, Priority, Scheduler};
use crate::hash::{Hashers, RunningHash};
use crate::interest::Interest;
use crate::loose::LooseChunks;
use crate::presence::{Bits, Presence};
use crate::rank::Ranks;
use crate::read_ahead::{Advice, ReadAhead};
use crate::segment::{Segments, View};
use crate::shared::{Entered, Shared, lock};
use crate::source::SourceKind;
use crate::store::{Background, FetchOptions, KeepDigests, touch};
use crate::trust::Judgement;
use crate::{BlobId, Layout, ReadError, Source};

/// Sources that a blob can have at the most: the registry under a few names, and peers.
const MAX_SOURCES: usize = 64;

/// Numbers of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobStats {
    /// Bytes of the blob.
    pub size: u64,
    /// Bytes of it that are in the cache.
    pub cached: u64,
    /// Bytes fetched from sources since it was opened.
    pub fetched: u64,
    /// Chunks that were not what their digest promises since it was opened, in the cache file or
    /// from a source. None of them was served, unless it was published before there were digests.
    pub rejected: u64,
    /// What is known of its bytes.
    pub trust: Trust,
}

/// An open blob.
pub struct Blob {
    id: BlobId,
    shared: Arc<Shared>,
    table: ChunkTable,
    segments: Segments,
    presence: Presence,
    extents: Extents,
    handed_out: HandedOut,
    ranks: Ranks,
    judgement: Judgement,
    checks: Checks,
    /// Tells of a judgement, and when all that is here was compared with its digests.
    judged: Notify,
    /// The epoch of its records.
    epoch: AtomicU64,
    hash: RunningHash,
    /// Segments that were written to since they were last synced.
    unsynced: Bits,
    recorder: Recorder,
    sources: RwLock<Sources>,
    fetcher: Fetcher,
    readers: Mutex<Readers>,
    /// Tells of each chunk that is published.
    arrived: Notify,
    /// See [`Blob::sweep`].
    swept: AtomicBool,
    /// Whether what nobody has asked for is to be fetched, too, because little is missing.
    rounding_off: AtomicBool,
    fetched: BySource,
}

#[derive(Debug, Default)]
struct Sources {
    in_order: Vec<Arc<dyn Source>>,
    /// The host of the first.
    host: Arc<str>,
}

/// What is known of those who read.
#[derive(Debug)]
struct Readers {
    ahead: ReadAhead,
    interest: Interest,
}

/// What a read gives reason to do.
#[derive(Debug)]
struct Notice {
    segment: usize,
    advice: Advice,
    /// Whether all of the segment is wanted from now on.
    whole: bool,
}

/// What a read finds.
#[derive(Debug)]
pub enum Read {
    /// All is here.
    Ready(Slice),
    /// Something must be fetched.
    Missing(Miss),
}

impl Blob {
    /// Its name in the store.
    pub fn id(&self) -> BlobId {
        self.id
    }

    /// Its cuts.
    pub fn layout(&self) -> &Layout {
        self.table.layout()
    }

    /// Adds a place to fetch from, after those it has; one of the same name is replaced.
    pub fn add_source(&self, source: Arc<dyn Source>) {
        let mut sources = self.sources.write().unwrap_or_else(PoisonError::into_inner);
        let known = &mut sources.in_order;
        if let Some(known) = known.iter_mut().find(|known| known.name() == source.name()) {
            *known = source;
        } else if known.len() < MAX_SOURCES {
            known.push(source);
        } else {
            tracing::warn!(blob = %self.id.digest, source = source.name(), "too many sources");
        }
        let host = sources.in_order.first().map_or("", |first| first.host());
        sources.host = host.into();
    }

    /// Its bytes are shown to readers from now on. Where the options say so, all of it is fetched
    /// in the background.
    pub fn shown(self: &Arc<Self>) {
        if self.shared.fetch.background == Background::Everything && !self.presence.is_complete() {
            self.fetcher.plan(self, Priority::Background, self.table.all());
        }
    }

    /// A reader of `range`, which lies inside one segment, is expected: it is fetched when there
    /// is room, before anything in the background. Does not wait.
    pub fn expect(self: &Arc<Self>, range: &Range<u64>) {
        if self.shared.fetch.prefetch {
            self.ask(range);
        }
    }

    /// As [`Blob::expect`], also where nothing is to be fetched unasked: somebody has asked for it.
    pub fn ask(self: &Arc<Self>, range: &Range<u64>) {
        if let Some(place) = self.table.locate(range)
            && !self.presence.has_all(&place.chunks)
        {
            self.fetcher.plan(self, Priority::Profile, place.chunks);
        }
    }

    /// Bytes `range` of the blob, all inside one segment. Never waits, neither for the network
    /// nor for a lock that a fetch can hold. An empty range is ready. Starts read-ahead (it may
    /// spawn on the tokio runtime that the store was opened in).
    ///
    /// # Errors
    /// When the blob is poisoned, the range is not inside one segment, or its file can't be read.
    pub fn read(self: &Arc<Self>, range: Range<u64>) -> Result<Read, ReadError> {
        self.check_trust()?;
        if range.start == range.end && range.end <= self.layout().size() {
            let hold = self.try_hold(&(0..0)).ok_or_else(|| self.too_late())?;
            return Ok(Read::Ready(Slice { hold, bytes: SliceBytes::Empty }));
        }
        let place = self.table.locate(&range).ok_or(ReadError::OutOfRange {
            digest: self.id.digest,
            start: range.start,
            end: range.end,
        })?;
        // First the hold, then the look: what is seen to be here stays.
        let hold = self.try_hold(&place.extents);
        for extent in place.extents.clone() {
            self.ranks.read(extent, &self.shared.clock);
        }
        let may_serve = self.may_serve();
        let hold = match hold {
            Some(hold) if may_serve && self.presence.has_all(&place.chunks) => {
                self.note_hit(&range, &place);
                return self.slice(&range, &place, hold).map(Read::Ready);
            }
            hold => hold,
        };
        if may_serve
            && let Some(loose) = self.loose_chunks(&place)
            && let Some(hold) = hold
        {
            return self.assembled(&range, &place, hold, &loose).map(Read::Ready);
        }
        let notice = self.notice(&mut lock(&self.readers), &range, &place, true);
        let until = Instant::now() + self.shared.fetch.deadline;
        Ok(Read::Missing(Miss { blob: Arc::clone(self), range, place, hold, notice, until }))
    }

    /// Whether a read of `range` would find all it needs. Not so for a range that is not
    /// inside one segment.
    pub fn is_cached(&self, range: Range<u64>) -> bool {
        let here = |place: Place| self.presence.has_all(&place.chunks);
        range.is_empty() || self.may_serve() && self.table.locate(&range).is_some_and(here)
    }

    /// Bytes of the chunks that `range` touches and that are not published. 0 for a range that is
    /// not inside one segment.
    pub fn missing(&self, range: &Range<u64>) -> u64 {
        let Some(place) = self.table.locate(range) else { return 0 };
        let absent = each(&place.chunks).filter(|chunk| !self.presence.has(*chunk));
        let bytes = absent.filter_map(|chunk| self.table.bytes_of(chunk));
        bytes.map(|(_, bytes)| bytes.end - bytes.start).sum()
    }

    /// Its numbers, without touching the disk.
    pub fn stats(&self) -> BlobStats {
        BlobStats {
            size: self.layout().size(),
            cached: self.presence.bytes() + self.kept_bytes(),
            fetched: self.fetched.total(),
            rejected: self.checks.rejected(),
            trust: self.trust(),
        }
    }

    /// Bytes fetched since it was opened, by the kind of source.
    pub fn fetched(&self) -> &BySource {
        &self.fetched
    }

    /// Bytes that the cache files take on disk (`st_blocks`).
    pub fn disk_bytes(&self) -> u64 {
        self.segments.disk_bytes()
    }

    /// The cache file of a complete segment, for reading (FUSE passthrough): byte 0 of the
    /// segment is byte 0 of the file. `None` if a chunk of it is absent or the blob is poisoned.
    /// Nothing of it is evicted before the hold is dropped, which must outlive all readers.
    ///
    /// # Errors
    /// When the file can't be opened.
    pub fn segment_file(
        self: &Arc<Self>,
        segment: usize,
    ) -> io::Result<Option<(File, SegmentHold)>> {
        let chunks = self.table.of_segment(segment);
        let extents = self.table.extents_of(&chunks);
        let Some(hold) = self.try_hold(&extents) else { return Ok(None) };
        let trusted = self.check_trust().is_ok() && self.may_serve();
        if chunks.is_empty() || !trusted || !self.presence.has_all(&chunks) {
            return Ok(None);
        }
        extents.for_each(|extent| self.ranks.read(extent, &self.shared.clock));
        let file = self.segments.open(segment)?;
        Ok(Some((file, SegmentHold::new(self, segment, hold)?)))
    }

    /// A read that ended while it waited for an eviction.
    fn too_late(&self) -> ReadError {
        let deadline = self.shared.fetch.deadline;
        ReadError::Deadline {
            digest: self.id.digest,
            deadline,
            cause: "evicting takes long".into(),
        }
    }

    /// Notes a hit, unless somebody else notes something or there is nothing to fetch.
    fn note_hit(self: &Arc<Self>, range: &Range<u64>, place: &Place) {
        if self.presence.is_complete() {
            return;
        }
        let Ok(mut readers) = self.readers.try_lock() else { return };
        let notice = self.notice(&mut readers, range, place, false);
        if !notice.advice.ahead.is_empty() || notice.whole {
            // Not from here: queueing takes locks that fetches hold, too.
            let blob = Arc::clone(self);
            self.shared.runtime.spawn(async move { blob.follow(&notice) });
        }
    }

    fn notice(
        &self,
        readers: &mut Readers,
        range: &Range<u64>,
        place: &Place,
        missed: bool,
    ) -> Notice {
        let advice = readers.ahead.on_read(place.segment, &place.covers, range);
        let (len, bytes) = (place.covers.end - place.covers.start, range.end - range.start);
        let whole = match self.shared.fetch.background {
            Background::Off => false,
            Background::TouchedFiles | Background::Everything => {
                readers.interest.on_read(place.segment, len, bytes, missed)
            }
        };
        Notice { segment: place.segment, advice, whole }
    }

    /// Fetches what a read gives reason to.
    fn follow(self: &Arc<Self>, notice: &Notice) {
        let Notice { segment, advice: Advice { ahead, window, .. }, whole } = notice;
        for range in ahead {
            if let Some(place) = self.table.locate(range) {
                self.fetcher.read_ahead(self, &place.chunks, *window);
            }
        }
        if *whole {
            self.fetcher.plan(self, Priority::Background, self.table.of_segment(*segment));
        }
    }

    /// When most of the blob is here and nothing else is to be done, the rest is fetched, too:
    /// only a whole blob can be verified.
    pub(crate) fn round_off(self: &Arc<Self>) {
        let size = self.layout().size();
        let most = self.presence.bytes() >= size - size / 4
            && !self.presence.is_complete()
            && !self.has_digests();
        let wanted = most && self.shared.fetch.background != Background::Off;
        if wanted && self.fetcher.is_calm() && !self.rounding_off.swap(true, Ordering::AcqRel) {
            self.fetcher.plan(self, Priority::Background, self.table.all());
        }
    }

    /// What was to be fetched of a segment in the background has failed: its next reader begins
    /// anew.
    pub(crate) fn forget_interest(&self, segment: usize) {
        lock(&self.readers).interest.forget(segment);
        self.rounding_off.store(false, Ordering::Release);
    }

    /// Published bytes, whose extents are held.
    fn slice(&self, range: &Range<u64>, place: &Place, hold: Hold) -> Result<Slice, ReadError> {
        Ok(Slice { hold, bytes: self.view(range, place)? })
    }

    /// Where published bytes are; their extents are held.
    fn view(&self, range: &Range<u64>, place: &Place) -> Result<SliceBytes, ReadError> {
        let cache = |cause| ReadError::Cache { digest: self.id.digest, cause: Arc::new(cause) };
        let offset = |at: u64| usize::try_from(at - place.covers.start).map_err(io::Error::other);
        let within = offset(range.start).map_err(cache)?..offset(range.end).map_err(cache)?;
        let len = place.covers.end - place.covers.start;
        match self.segments.view(place.segment, len, &within).map_err(cache)? {
            View::Mapped => Ok(SliceBytes::Mapped { segment: place.segment, range: within }),
            View::Copied(bytes) => Ok(SliceBytes::Copied(bytes)),
        }
    }
}

/// For the fetcher and the hash.
impl Blob {
    pub(crate) fn table(&self) -> &ChunkTable {
        &self.table
    }

    pub(crate) fn presence(&self) -> &Presence {
        &self.presence
    }

    pub(crate) fn segments(&self) -> &Segments {
        &self.segments
    }

    pub(crate) fn fetcher(&self) -> &Fetcher {
        &self.fetcher
    }

    pub(crate) fn hash(&self) -> &RunningHash {
        &self.hash
    }

    pub(crate) fn hashers(&self) -> &Arc<Hashers> {
        &self.shared.hashers
    }

    pub(crate) fn runtime(&self) -> &Handle {
        &self.shared.runtime
    }

    pub(crate) fn fetch_options(&self) -> &FetchOptions {
        &self.shared.fetch
    }

    pub(crate) fn sources(&self) -> Vec<Arc<dyn Source>> {
        self.sources.read().unwrap_or_else(PoisonError::into_inner).in_order.clone()
    }

    /// Whose line its requests take a place on; empty if it has no source.
    pub(crate) fn host(&self) -> Arc<str> {
        Arc::clone(&self.sources.read().unwrap_or_else(PoisonError::into_inner).host)
    }

    pub(crate) fn budget(&self) -> &Budget {
        &self.shared.budget
    }

    /// Whether the digests of its chunks are kept when the whole was hashed.
    pub(crate) fn keeps_digests(&self) -> bool {
        match self.shared.keep_digests {
            KeepDigests::Always => true,
            KeepDigests::WhereLimited => self.shared.budget.is_limited(),
        }
    }

    pub(crate) fn loose(&self) -> &LooseChunks {
        &self.shared.loose
    }

    pub(crate) fn scheduler(&self) -> &Scheduler {
        &self.shared.scheduler
    }

    pub(crate) fn source_names(&self) -> Vec<String> {
        self.sources().iter().map(|source| source.name().to_owned()).collect()
    }

    pub(crate) fn count_fetched(&self, kind: SourceKind, bytes: u64) {
        self.fetched.add(kind, bytes);
        self.counters().fetched.add(kind, bytes);
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// See [`Shared::enter`].
    pub(crate) fn enter(&self) -> io::Result<Entered<'_>> {
        self.shared.enter()
    }

    /// Makes a chunk readable whose bytes were written while `entered` was held.
    pub(crate) fn publish(
        self: &Arc<Self>,
        chunk: &VerifiedChunk,
        priority: Priority,
        entered: &Entered<'_>,
    ) {
        let only = chunk.chunk()..chunk.chunk().next();
        for extent in self.table.extents_of(&only) {
            match priority {
                Priority::Demand | Priority::ReadAhead | Priority::Profile => {
                    self.ranks.wanted(extent, &self.shared.clock);
                }
                Priority::Background => self.ranks.unasked(extent, &self.shared.clock),
            }
        }
        if let Some((segment, _)) = self.table.bytes_of(chunk.chunk()) {
            // Before the chunk is published, so that a record that has the chunk knows what to
            // sync: see `record`.
            self.unsynced.set(u32::try_from(segment).unwrap_or(u32::MAX));
        }
        // What was compared with digests of the very bytes that were hashed changes nothing.
        if self.checks.origin() != Some(Origin::Whole)
            && (self.judgement.is_verified() || self.hash.is_past(chunk.chunk()))
        {
            self.judgement.replaced();
        }
        self.presence.publish(chunk);
        self.arrived.notify_waiters();
        self.shared.changed(self, chunk.len(), entered);
    }

    /// The bytes of a chunk, if it is published.
    pub(crate) fn chunk_bytes(
        self: &Arc<Self>,
        chunk: ChunkNo,
    ) -> Result<Option<Slice>, ReadError> {
        let range = self.table.bytes_of(chunk).map_or(0..0, |(_, range)| range);
        let place = self.table.locate(&range).ok_or(ReadError::OutOfRange {
            digest: self.id.digest,
            start: range.start,
            end: range.end,
        })?;
        match self.try_hold(&place.extents) {
            Some(hold) if self.presence.has(chunk) => self.slice(&range, &place, hold).map(Some),
            _ => Ok(None),
        }
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        self.shared.loose.forget(self.id);
        if let Ok(_entered) = self.shared.enter() {
            touch(self.segments.dir());
        }
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stats = self.stats();
        f.debug_struct("Blob").field("id", &self.id).field("stats", &stats).finish_non_exhaustive()
    }
}
