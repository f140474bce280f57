//! One blob: its segments, what of them is published, and reads.
//!
//! Invariants: a slice covers only published bytes, holds their extents, and so they never change
//! while it is there. A read that finds everything takes no lock that a fetch can hold. A poisoned
//! blob serves nothing more.

mod check;
mod complete;
mod evict;
mod kernel;
mod recorder;
mod slice;

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;

use self::check::Checks;
pub(crate) use self::check::Compared;
pub(crate) use self::evict::Candidate;
use self::kernel::HandedOut;
pub use self::kernel::SegmentHold;
use self::recorder::Recorder;
pub(crate) use self::slice::Hold;
pub use self::slice::Slice;
use self::slice::SliceBytes;
use crate::budget::Budget;
use crate::chunk::{ChunkNo, ChunkTable, Place, VerifiedChunk, each};
use crate::digests::{ChunkDigests, Origin};
use crate::extents::Extents;
use crate::fetch::{Failure, Fetcher, Priority, Scheduler};
use crate::hash::{Follow, Hashers, RunningHash};
use crate::interest::Interest;
use crate::loose::LooseChunks;
use crate::presence::{Bits, Presence, ones};
use crate::rank::Ranks;
use crate::read_ahead::{Advice, ReadAhead};
use crate::segment::{Segments, View};
use crate::shared::{Entered, Epochs, Shared, lock};
use crate::state::{Record, Verdict};
use crate::store::{Background, FetchOptions, touch};
use crate::trust::{Era, Judgement, Settled};
use crate::{BlobId, Layout, ReadError, Source, Verify};

/// Sources that a blob can have at the most: the registry under a few names, and peers.
const MAX_SOURCES: usize = 64;

/// What is known of a blob's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// They came over a transport that the configuration trusts; the whole was not hashed yet.
    Transport,
    /// Each chunk was compared with its digest in an index.
    Indexed,
    /// The whole blob hashes to its digest.
    Verified,
    /// The whole blob does not hash to its digest.
    Poisoned,
}

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
    /// See [`Blob::sweep`].
    swept: AtomicBool,
    /// Whether what nobody has asked for is to be fetched, too, because little is missing.
    rounding_off: AtomicBool,
    fetched: AtomicU64,
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

/// A read that waits for its bytes. Nothing is asked for before [`Miss::wait`] is polled.
#[derive(Debug)]
pub struct Miss {
    blob: Arc<Blob>,
    range: Range<u64>,
    place: Place,
    /// `None` if one of its extents was just being evicted.
    hold: Option<Hold>,
    notice: Notice,
    until: Instant,
}

impl Miss {
    /// Fetches what is missing, or waits for whoever does. Ends within the deadline, which began
    /// with the read. If it is dropped, what was asked for is still fetched.
    ///
    /// # Errors
    /// When no source gave the bytes in time, or one refused for good; when the cache files can't
    /// be written; when the blob turned out to be poisoned.
    pub async fn wait(self) -> Result<Slice, ReadError> {
        let Self { blob, range, place, hold, notice, until } = self;
        // From here on nothing of it is evicted before the slice is dropped.
        let hold = match hold {
            Some(hold) => hold,
            None => blob.hold(&place.extents, until).await.ok_or_else(|| blob.too_late())?,
        };
        if blob.shared.verify == Verify::Strict && !blob.compares_all() {
            blob.complete().await?;
            return blob.slice(&range, &place, hold);
        }
        let access = notice.advice.access;
        let (mut loose, tickets) = blob.demand(&place, access, until);
        // After the demand, so that it comes after it in the queue, too.
        blob.follow(&notice);
        let mut waited = blob.fetcher.wait(tickets, until).await;
        // It had joined a request that nobody else waited for.
        while let Err(Failure::NoRoom) = waited {
            let (known, tickets) = blob.demand(&place, access, until);
            loose = known;
            waited = blob.fetcher.wait(tickets, until).await;
        }
        loose.extend(waited.map_err(|failure| failure.into_read_error(&blob))?);
        blob.check_trust()?;
        if loose.is_empty() {
            blob.slice(&range, &place, hold)
        } else {
            blob.assembled(&range, &place, hold, &loose)
        }
    }
}

impl Blob {
    /// A blob whose directory is there; `record` is what an earlier run knew of it.
    pub(crate) fn open(
        id: BlobId,
        dir: PathBuf,
        table: ChunkTable,
        record: Option<Record>,
        digests: Option<ChunkDigests>,
        shared: Arc<Shared>,
    ) -> Arc<Self> {
        let (disk, mappings) = (Arc::clone(&shared.disk), Arc::clone(&shared.mappings));
        let segments = Segments::new(dir, table.layout().segments(), disk, mappings);
        let presence = Presence::new(table.all().end.0);
        let extents = Extents::new(table.extents());
        for segment in kernel::still_read(&segments, &shared.boot) {
            tracing::debug!(blob = %id.digest, segment, "read by the kernel since an earlier run");
            // Never released: the end of it can't be seen from here.
            extents.hold(&table.extents_of(&table.of_segment(segment)));
        }
        let Epochs { now, doubt_before } = shared.epochs;
        let compared_with = digests.as_ref().map(ChunkDigests::id);
        let checks = Checks::new(digests, table.all().end.0);
        let (mut verdict, mut epoch, mut claimed) = (None, now, vec![]);
        if let Some(record) = record {
            let in_doubt = record.epoch < doubt_before;
            let settled = record.verdict.is_some() || record.compared == compared_with;
            let restored = match compared_with {
                Some(_) if in_doubt || !settled => Restored::Unchecked,
                _ => Restored::Believed,
            };
            verdict = restore(id, &table, &segments, (&presence, &checks), &record, restored);
            claimed.clone_from(&record.present);
            if in_doubt {
                // Served where there is nothing to compare it with, but not called verified
                // before it was hashed again.
                verdict = verdict.filter(|verdict| *verdict != Verdict::Verified);
                epoch = record.epoch;
            }
        }
        if checks.are_done() && checks.origin() == Some(Origin::Whole) {
            // What is here, or will be, is what the whole was made of.
            verdict = verdict.or(Some(Verdict::Verified));
        }
        let follow = if presence.bytes() == 0 { Follow::Prefix } else { Follow::Whole };
        let FetchOptions { read_ahead_min, read_ahead_max, .. } = shared.fetch;
        let blob = Arc::new(Self {
            id,
            segments,
            recorder: Recorder::new(claimed),
            extents,
            handed_out: HandedOut::default(),
            ranks: Ranks::new(table.extents()),
            presence,
            epoch: AtomicU64::new(epoch),
            judgement: Judgement::new(verdict),
            checks,
            judged: Notify::new(),
            hash: RunningHash::new(follow),
            unsynced: Bits::new(u32::try_from(table.layout().segments()).unwrap_or(u32::MAX)),
            sources: RwLock::default(),
            fetcher: Fetcher::default(),
            readers: Mutex::new(Readers {
                ahead: ReadAhead::new(read_ahead_min, read_ahead_max),
                interest: Interest::default(),
            }),
            swept: AtomicBool::new(false),
            rounding_off: AtomicBool::new(false),
            fetched: AtomicU64::new(0),
            table,
            shared,
        });
        if let Err(error) = blob.take_back() {
            tracing::error!(blob = %id.digest, %error, "what is lost can't be taken out of the record");
        }
        // Complete but not judged: an earlier run ended before it had hashed the whole.
        blob.hash.poke(&blob);
        blob
    }

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
        if self.shared.fetch.prefetch
            && let Some(place) = self.table.locate(range)
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
            fetched: self.fetched.load(Ordering::Relaxed),
            rejected: self.checks.rejected(),
            trust: match self.judgement.verdict() {
                None if self.checks.are_done() => match self.checks.origin() {
                    Some(Origin::Whole) => Trust::Verified,
                    Some(Origin::Index) | None => Trust::Indexed,
                },
                None => Trust::Transport,
                Some(Verdict::Verified) => Trust::Verified,
                Some(Verdict::Poisoned { .. }) => Trust::Poisoned,
            },
        }
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

    fn check_trust(&self) -> Result<(), ReadError> {
        match self.judgement.verdict() {
            Some(Verdict::Poisoned { actual }) => {
                Err(ReadError::Poisoned { digest: self.id.digest, actual })
            }
            Some(Verdict::Verified) | None => Ok(()),
        }
    }

    /// Whether what is published may be served: the whole blob is verified, or each chunk was
    /// compared, or need not be.
    fn may_serve(&self) -> bool {
        self.shared.verify == Verify::Background
            || self.judgement.is_verified()
            || self.compares_all()
    }

    /// Whether all that is published was compared with chunk digests, and will be.
    fn compares_all(&self) -> bool {
        // Marks of published chunks come before the digests do, and new ones only with others.
        self.has_digests() && self.unchecked().iter().all(|chunk| !self.presence.has(*chunk))
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

    pub(crate) fn verdict(&self) -> Option<Verdict> {
        self.judgement.verdict()
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

    pub(crate) fn loose(&self) -> &LooseChunks {
        &self.shared.loose
    }

    /// A chunk is served that is not published.
    pub(crate) fn serve_unpublished(&self, _chunk: ChunkNo) {
        if self.judgement.is_verified() && self.checks.origin() != Some(Origin::Whole) {
            // Nobody can say whether it is the one that was hashed.
            self.judgement.replaced();
        }
    }

    pub(crate) fn scheduler(&self) -> &Scheduler {
        &self.shared.scheduler
    }

    pub(crate) fn source_names(&self) -> Vec<String> {
        self.sources().iter().map(|source| source.name().to_owned()).collect()
    }

    pub(crate) fn count_fetched(&self, bytes: u64) {
        self.fetched.fetch_add(bytes, Ordering::Relaxed);
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

    /// See [`Judgement::era`].
    pub(crate) fn era(&self) -> Era {
        self.judgement.era()
    }

    /// Settles the judgement of the whole blob, which was hashed in `era`. That it is poisoned is
    /// said once, here.
    pub(crate) fn judge(self: &Arc<Self>, verdict: Verdict, era: Era) -> Settled {
        let settled = self.judgement.settle(verdict, era);
        self.judged.notify_waiters();
        if settled != Settled::Now {
            return settled;
        }
        match verdict {
            Verdict::Verified => self.epoch.store(self.shared.epochs.now, Ordering::Release),
            Verdict::Poisoned { actual } => {
                self.shared.loose.forget(self.id);
                tracing::error!(
                    blob = %self.id.digest,
                    %actual,
                    sources = ?self.source_names(),
                    "blob is poisoned: its bytes do not hash to its digest; nothing of it is served any more",
                );
            }
        }
        // A store that is closed records nothing: the next one hashes the blob again.
        if let Ok(entered) = self.enter() {
            self.shared.changed(self, 0, &entered);
        }
        settled
    }
}

/// What becomes of the chunks of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Restored {
    /// They are published.
    Believed,
    /// They are compared with their digests before they are published.
    Unchecked,
}

/// Publishes what a record says, as far as its files bear it out. Gives its verdict, if that is
/// still about what is here.
fn restore(
    id: BlobId,
    table: &ChunkTable,
    segments: &Segments,
    (presence, checks): (&Presence, &Checks),
    record: &Record,
    restored: Restored,
) -> Option<Verdict> {
    let mut last: Option<(usize, Vec<Range<u64>>)> = None;
    let mut lost = 0u64;
    for chunk in ones(record.present.iter().copied()).map(ChunkNo) {
        let Some((segment, _)) = table.bytes_of(chunk) else { continue };
        let filled = match last.take() {
            Some(known) if known.0 == segment => known.1,
            _ => segments.filled(segment, table.layout()),
        };
        let within = table.within_segment(&(chunk..chunk.next()));
        let is_there = within.is_some_and(|within| {
            // In order: a fragmented file has many.
            let after = filled.partition_point(|range| range.start <= within.start);
            after
                .checked_sub(1)
                .and_then(|at| filled.get(at))
                .is_some_and(|range| within.end <= range.end)
        });
        if !is_there {
            lost += 1;
        } else if restored == Restored::Unchecked {
            checks.mark(chunk);
        } else if let Some(verified) = VerifiedChunk::recorded(table, chunk) {
            presence.publish(&verified);
        }
        last = Some((segment, filled));
    }
    if lost > 0 {
        tracing::warn!(blob = %id.digest, chunks = lost, "cache files are gone or cut: fetched again");
    }
    record.verdict.filter(|verdict| lost == 0 || *verdict != Verdict::Verified)
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
