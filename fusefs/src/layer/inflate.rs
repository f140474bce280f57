//! Downloading a compressed tar, inflating it and writing it into the store, once.
//!
//! Ranges are fetched in order, a few ahead; a thread hashes and inflates them and walks the tar
//! on its way into the cache. Nothing of it is visible before the digest is checked: whatever
//! fails, and wherever this is cancelled, the store's draft goes away by itself.

use std::io::{self, BufRead, Read};
use std::sync::Arc;

use bytes::{Buf as _, Bytes};
use futures::{StreamExt as _, stream};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use weightfs_store::{Blob, BlobId, Digest, Form, Ingest, Store};

use super::fetch::Remote;
use super::spans::{Collector, Decoder};
use super::{LISTING, LayerError, POINTS, Progress};
use crate::archive::Walker;
use crate::artifact::LayerDescriptor;
use crate::listing::{Entry, Listing, cuts_of};

/// Bytes of one request: large enough for a registry's cost of a request to vanish.
const REQUEST_BYTES: u64 = 8 << 20;
/// Requests in flight. Up to twice as many times [`REQUEST_BYTES`] are in memory.
const REQUESTS_AHEAD: usize = 4;
/// Ranges that wait for the inflating thread.
const WAITING_RANGES: usize = 2;

/// Deflate can't exceed this ratio (zlib, "Technical Details"); zstd is held to it as well.
const MAX_RATIO: u64 = 1032;
/// A layer may inflate to this much whatever its ratio: zstd shrinks zeros without end.
const MIN_LIMIT_BYTES: u64 = 4 << 30;

/// Downloads and inflates a layer into the store, with its listing beside it.
///
/// # Errors
/// A source that fails, a digest or a format that is wrong, a cache that can't be written.
pub async fn download(
    store: &Arc<Store>,
    remote: &Remote,
    layer: &LayerDescriptor,
    progress: &dyn Progress,
) -> Result<(Arc<Blob>, Listing), LayerError> {
    let (ranges, waiting) = mpsc::channel(WAITING_RANGES);
    let (store, for_thread) = (Arc::clone(store), layer.clone());
    let thread = tokio::task::spawn_blocking(move || unpack(&store, &for_thread, waiting));
    let fed = feed(remote, layer, progress, ranges).await;
    // The thread ends by itself, as its ranges have ended; what it says is the cause where the
    // feed was stopped by it.
    let unpacked = thread.await.map_err(|_| LayerError::Stopped { digest: layer.digest })?;
    fed?;
    unpacked
}

/// Fetches all ranges in order. Ends early, without an error, when the thread takes no more.
async fn feed(
    remote: &Remote,
    layer: &LayerDescriptor,
    progress: &dyn Progress,
    ranges: mpsc::Sender<Vec<Bytes>>,
) -> Result<(), LayerError> {
    let count = layer.size.div_ceil(REQUEST_BYTES);
    let range = |at: u64| at * REQUEST_BYTES..layer.size.min((at + 1) * REQUEST_BYTES);
    let reads = (0..count).map(|at| async move {
        let range = range(at);
        remote.read(range.clone()).await.map(|pieces| (pieces, range.end))
    });
    let mut reads = std::pin::pin!(stream::iter(reads).buffered(REQUESTS_AHEAD));
    while let Some(read) = reads.next().await {
        let (pieces, end) = read?;
        if ranges.send(pieces).await.is_err() {
            return Ok(());
        }
        progress.downloaded(layer, end);
    }
    Ok(())
}

/// The thread's part.
fn unpack(
    store: &Arc<Store>,
    layer: &LayerDescriptor,
    ranges: mpsc::Receiver<Vec<Bytes>>,
) -> Result<(Arc<Blob>, Listing), LayerError> {
    let digest = layer.digest;
    let id = BlobId { digest, form: Form::Decompressed };
    let mut compressed = Compressed::new(layer, ranges);
    let limit = layer.size.saturating_mul(MAX_RATIO).max(MIN_LIMIT_BYTES);
    let mut writer = Writer::new(store.ingest(id)?, digest, limit);
    let inflated = inflate(&mut compressed, layer, &mut writer);
    // Where the bytes are not what the digest promises, that explains all else.
    if !matches!(&inflated, Err(LayerError::Store(_) | LayerError::TooLarge { .. })) {
        compressed.check()?;
    }
    let points = inflated?;
    let Writer { ingest, walker, entries, .. } = writer;
    debug_assert!(walker.needs().is_none(), "the walk ended");
    let listing = Listing::new(entries, ingest.position());
    let listing = listing.map_err(|source| LayerError::Layout { digest, source })?;
    // First the listing: without the blob it means nothing, and the blob is of no use without it.
    store.attach(id, LISTING, &listing.to_bytes())?;
    store.attach(id, POINTS, &points)?;
    Ok((ingest.finish()?, listing))
}

/// Gives the access points that were met.
fn inflate(
    compressed: &mut Compressed,
    layer: &LayerDescriptor,
    writer: &mut Writer,
) -> Result<Bytes, LayerError> {
    let failed = |source: io::Error| LayerError::Inflate {
        digest: layer.digest,
        compression: layer.compression,
        message: source.to_string(),
    };
    let mut decoder = Decoder::new(layer.compression).map_err(failed)?;
    let (mut points, mut taken) = (Collector::default(), 0);
    loop {
        points.note(&decoder, writer.ingest.position(), taken);
        let input = compressed.fill_buf().map_err(failed)?;
        let has_ended = input.is_empty();
        let step = decoder.step(input).map_err(failed)?;
        compressed.consume(step.consumed);
        taken += step.consumed as u64;
        match decoder.bytes(&step.produced) {
            [] if has_ended && decoder.may_end() => break,
            [] if has_ended => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
            bytes => writer.write(bytes)?,
        }
    }
    writer.end()?;
    Ok(points.finish(writer.ingest.position()))
}

/// The compressed bytes, hashed as they are read.
struct Compressed {
    ranges: mpsc::Receiver<Vec<Bytes>>,
    /// Of the range that is being read, last piece first.
    pieces: Vec<Bytes>,
    hash: Sha256,
    digest: Digest,
    /// Bytes that are still to come.
    missing: u64,
}

impl Compressed {
    fn new(layer: &LayerDescriptor, ranges: mpsc::Receiver<Vec<Bytes>>) -> Self {
        let (pieces, hash) = (Vec::new(), Sha256::new());
        Self { ranges, pieces, hash, digest: layer.digest, missing: layer.size }
    }

    /// Reads what is left and compares the digest.
    fn check(mut self) -> Result<(), LayerError> {
        let digest = self.digest;
        let stopped = |_| LayerError::Stopped { digest };
        io::copy(&mut self, &mut io::sink()).map_err(stopped)?;
        let actual = Digest::from_raw(self.hash.finalize().into());
        if actual != digest {
            return Err(LayerError::Digest { digest, actual });
        }
        Ok(())
    }
}

impl BufRead for Compressed {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.pieces.last().is_none_or(Bytes::is_empty) {
            if self.pieces.pop().is_some() {
                continue;
            }
            match self.ranges.blocking_recv() {
                Some(pieces) => self.pieces.extend(pieces.into_iter().rev()),
                None if self.missing == 0 => return Ok(&[]),
                None => return Err(io::Error::other("the download was given up")),
            }
        }
        Ok(self.pieces.last().map_or(&[], |piece| piece))
    }

    fn consume(&mut self, amount: usize) {
        if let Some(piece) = self.pieces.last_mut() {
            let amount = amount.min(piece.len());
            self.hash.update(piece.get(..amount).unwrap_or_default());
            piece.advance(amount);
            self.missing = self.missing.saturating_sub(u64::try_from(amount).unwrap_or(0));
        }
    }
}

impl Read for Compressed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(available) {
            *to = *from;
        }
        self.consume(length);
        Ok(length)
    }
}

/// Takes the inflated tar: walks it, and writes it with cuts at its large files.
struct Writer {
    ingest: Ingest,
    walker: Walker,
    digest: Digest,
    /// Bytes that the tar may have at the most.
    limit: u64,
    /// What has come of the bytes that the walker needs.
    header: Vec<u8>,
    /// Cuts that lie ahead, the nearest last.
    cuts: Vec<u64>,
    entries: Vec<Entry>,
}

impl Writer {
    fn new(ingest: Ingest, digest: Digest, limit: u64) -> Self {
        let walker = Walker::new(None);
        Self { ingest, walker, digest, limit, header: vec![], cuts: vec![], entries: vec![] }
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<(), LayerError> {
        while !bytes.is_empty() {
            let position = self.ingest.position();
            if position >= self.limit {
                return Err(LayerError::TooLarge { digest: self.digest, limit: self.limit });
            }
            let (length, wanted) = self.next_part(position, bytes.len());
            let (part, rest) = bytes.split_at(length);
            self.ingest.write(part)?;
            if wanted {
                self.header.extend_from_slice(part);
            }
            self.advance()?;
            bytes = rest;
        }
        Ok(())
    }

    /// How many of the next bytes belong together, and whether the walker wants them.
    fn next_part(&self, position: u64, available: usize) -> (usize, bool) {
        let cut = self.cuts.last().copied().unwrap_or(u64::MAX);
        let (end, wanted) = match self.walker.needs() {
            Some(need) if position < need.start => (need.start.min(cut), false),
            Some(need) => (need.end, true),
            None => (u64::MAX, false),
        };
        let length = usize::try_from(end.saturating_sub(position)).unwrap_or(usize::MAX);
        (length.clamp(1, available), wanted)
    }

    /// Feeds the walker when it has what it needs, and makes the cut that was reached, before
    /// and after: a large file can begin here.
    fn advance(&mut self) -> Result<(), LayerError> {
        let digest = self.digest;
        self.make_cuts()?;
        while let Some(need) = self.walker.needs()
            && need.end <= self.ingest.position()
        {
            let fed = self.walker.feed(&std::mem::take(&mut self.header));
            let Some(entry) = fed.map_err(|source| LayerError::Tar { digest, source })? else {
                continue;
            };
            if let Some([start, end]) = cuts_of(&entry.kind) {
                self.cuts = vec![end, start];
            }
            self.entries.push(entry);
        }
        self.make_cuts()
    }

    fn make_cuts(&mut self) -> Result<(), LayerError> {
        while self.cuts.last().is_some_and(|cut| *cut <= self.ingest.position()) {
            self.cuts.pop();
            self.ingest.cut()?;
        }
        Ok(())
    }

    /// The tar has ended.
    fn end(&mut self) -> Result<(), LayerError> {
        if self.walker.needs().is_none() {
            return Ok(());
        }
        let digest = self.digest;
        let ended = self.walker.end(self.ingest.position());
        ended.map_err(|source| LayerError::Tar { digest, source })
    }
}

#[cfg(test)]
mod fuzz;
