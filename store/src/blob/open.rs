//! Opening a blob: what an earlier run knew of it, as far as its files bear it out.
//!
//! Invariant: a chunk that is in doubt, and that has a digest, is not published before it was
//! compared.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, RwLock};

use tokio::sync::Notify;

use super::check::Checks;
use super::kernel::{self, HandedOut};
use super::recorder::Recorder;
use super::{Blob, Readers};
use crate::BlobId;
use crate::chunk::{ChunkNo, ChunkTable, VerifiedChunk};
use crate::digests::{ChunkDigests, Origin};
use crate::extents::Extents;
use crate::fetch::Fetcher;
use crate::hash::{Follow, RunningHash};
use crate::interest::Interest;
use crate::presence::{Bits, Presence, ones};
use crate::rank::Ranks;
use crate::read_ahead::ReadAhead;
use crate::segment::Segments;
use crate::shared::{Epochs, Shared};
use crate::state::{Record, Verdict};
use crate::store::FetchOptions;
use crate::trust::Judgement;

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
            arrived: Notify::new(),
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
            fetched: Default::default(),
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
