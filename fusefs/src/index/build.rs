//! Making the index of a layer. What is known here of it is used; else its bytes are read once, in
//! order, and hashed on the way, as a whole and chunk by chunk, by a thread each.
//!
//! Invariant: chunk digests are made only of bytes that hash to what the layer's digest promises.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;
use weightfs_store::blob::Read;
use weightfs_store::{Blob, CHUNK_BYTES, Digest, Form, Layout, Source, Store, Trust, give_way};

use super::LayerIndex;
use crate::artifact::{Compression, LayerDescriptor};
use crate::layer::fetch::Remote;
use crate::layer::{LayerError, OpenLayer, Progress, stored_points};

/// Bytes of one request: each costs a registry some milliseconds, whatever its size.
const REQUEST_BYTES: u64 = 16 << 20;
/// Requests in flight. What none of the threads is ready for waits in the sockets.
const REQUESTS_AHEAD: usize = 4;
/// Pieces of a request, or for a thread, that wait here. Few, so that they are hashed while the
/// processor's caches have them: twice as many are hashed 15 % slower.
const WAITING_PIECES: usize = 2;

/// What an index is made of.
#[derive(Clone, Copy)]
pub enum Reading<'a> {
    /// Of what was verified here, on a thread that gives way to all others.
    Local,
    /// Of what was verified here; where that is not enough, of a source.
    From {
        /// The layer's blob.
        source: &'a Arc<dyn Source>,
        /// How long it may give nothing.
        deadline: Duration,
        /// Who is told how it goes.
        progress: &'a dyn Progress,
    },
}

impl std::fmt::Debug for Reading<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Local => f.write_str("Local"),
            Self::From { source, deadline, .. } => {
                f.debug_tuple("From").field(&source.name()).field(deadline).finish()
            }
        }
    }
}

/// The digest of a layer's content, and those of its chunks.
type Hashed = (Digest, Bytes);

/// Makes the index of an open layer; a compressed one must be in the store. `None` if the layer was
/// not verified here, and is not to be read elsewhere.
///
/// # Errors
/// A source that fails, bytes that don't hash to the layer's digest.
pub async fn layer_index(
    store: &Arc<Store>,
    layer: &Arc<OpenLayer>,
    reading: Reading<'_>,
) -> Result<Option<LayerIndex>, LayerError> {
    let descriptor = &layer.descriptor;
    let (known, open) = (Arc::clone(store), Arc::clone(layer));
    let hashed = match (reading, descriptor.compression) {
        (Reading::Local, _) => idle(move || verified(&known, &open.blob)).await,
        (Reading::From { source, deadline, progress }, Compression::None) => {
            match tokio::task::spawn_blocking(move || verified(&known, &open.blob)).await {
                Ok(Some(hashed)) => Some(hashed),
                Ok(None) | Err(_) => {
                    let source = Arc::clone(source);
                    let remote = Remote { source, digest: descriptor.digest, deadline };
                    let layout = layer.listing.layout().clone();
                    Some(stream_layer(&remote, descriptor, layout, progress).await?)
                }
            }
        }
        (Reading::From { .. }, Compression::Gzip | Compression::Zstd) => {
            let hashed = tokio::task::spawn_blocking(move || hash_blob(&open.blob)).await;
            let stopped = || LayerError::Stopped { digest: descriptor.digest };
            Some(hashed.ok().flatten().ok_or_else(stopped)?)
        }
    };
    Ok(hashed.map(|(content_digest, chunk_digests)| LayerIndex {
        digest: descriptor.digest,
        size: descriptor.size,
        compression: descriptor.compression,
        content_digest,
        listing: layer.listing.clone(),
        chunk_digests,
        points: stored_points(store, descriptor),
    }))
}

/// What a blob that was verified hashes to: as it is known, or by reading it where all of it is here.
fn verified(store: &Store, blob: &Arc<Blob>) -> Option<Hashed> {
    let id = blob.id();
    if id.form == Form::AsStored
        && let Some((layout, digests)) = store.verified_digests(id)
        && layout == *blob.layout()
    {
        return Some((id.digest, digests.into()));
    }
    let stats = blob.stats();
    if stats.trust != Trust::Verified || stats.cached < stats.size {
        return None;
    }
    hash_blob(blob).filter(|(whole, _)| id.form == Form::Decompressed || *whole == id.digest)
}

/// Runs something long where nobody else wants the processor.
async fn idle<T: Send + 'static>(work: impl FnOnce() -> Option<T> + Send + 'static) -> Option<T> {
    let (sender, done) = oneshot::channel();
    let work = move || {
        give_way();
        // Nobody waits for it any more if this fails.
        let _ = sender.send(work());
    };
    thread::Builder::new().name("weightfs-index".into()).spawn(work).ok()?;
    done.await.ok().flatten()
}

async fn stream_layer(
    remote: &Remote,
    layer: &LayerDescriptor,
    layout: Layout,
    progress: &dyn Progress,
) -> Result<Hashed, LayerError> {
    let digest = layer.digest;
    let (to_whole, mut for_whole) = mpsc::channel::<Bytes>(WAITING_PIECES);
    let (to_chunks, mut for_chunks) = mpsc::channel::<Bytes>(WAITING_PIECES);
    let whole = tokio::task::spawn_blocking(move || {
        let mut hash = Sha256::new();
        while let Some(piece) = for_whole.blocking_recv() {
            hash.update(piece);
        }
        Digest::from_raw(hash.finalize().into())
    });
    let chunks = tokio::task::spawn_blocking(move || {
        let mut chunks = ChunkHashes::new(layout);
        while let Some(piece) = for_chunks.blocking_recv() {
            chunks.update(&piece);
        }
        chunks.finish()
    });
    // The threads end when their channels do, also where this fails.
    let (sender, coming) = mpsc::channel(REQUESTS_AHEAD);
    tokio::try_join!(
        ask(remote, layer.size, sender),
        hand_out(coming, layer, progress, [to_whole, to_chunks]),
    )?;
    let stopped = |_| LayerError::Stopped { digest };
    let (actual, chunks) = (whole.await.map_err(stopped)?, chunks.await.map_err(stopped)?);
    if actual != digest {
        return Err(LayerError::Digest { digest, actual });
    }
    Ok((actual, chunks))
}

/// A range that is under way, by a task of its own: it comes also while nobody looks.
struct Coming {
    /// One past its last byte.
    end: u64,
    pieces: mpsc::Receiver<Bytes>,
    read: AbortOnDropHandle<Result<(), LayerError>>,
}

/// Asks for all ranges in order.
async fn ask(remote: &Remote, size: u64, ranges: mpsc::Sender<Coming>) -> Result<(), LayerError> {
    for start in (0..size.div_ceil(REQUEST_BYTES)).map(|at| at * REQUEST_BYTES) {
        let (remote, end) = (remote.clone(), size.min(start + REQUEST_BYTES));
        let (mut sender, pieces) = mpsc::channel(WAITING_PIECES);
        let Ok(room) = ranges.reserve().await else {
            return Err(LayerError::Stopped { digest: remote.digest });
        };
        let read = tokio::spawn(async move { remote.read_to(start..end, &mut sender).await });
        room.send(Coming { end, pieces, read: AbortOnDropHandle::new(read) });
    }
    Ok(())
}

/// Gives what comes, in order, to both threads.
async fn hand_out(
    mut ranges: mpsc::Receiver<Coming>,
    layer: &LayerDescriptor,
    progress: &dyn Progress,
    [whole, chunks]: [mpsc::Sender<Bytes>; 2],
) -> Result<(), LayerError> {
    let digest = layer.digest;
    while let Some(mut coming) = ranges.recv().await {
        while let Some(piece) = coming.pieces.recv().await {
            let sent = whole.send(piece.clone()).await.and(chunks.send(piece).await);
            sent.map_err(|_| LayerError::Stopped { digest })?;
        }
        coming.read.await.map_err(|_| LayerError::Stopped { digest })??;
        progress.downloaded(layer, coming.end);
    }
    Ok(())
}

/// Hashes a blob that is all here; `None` if something of it can't be read.
fn hash_blob(blob: &Arc<Blob>) -> Option<Hashed> {
    let mut whole = Sha256::new();
    let mut chunks = ChunkHashes::new(blob.layout().clone());
    for segment in (0..blob.layout().segments()).filter_map(|index| blob.layout().segment(index)) {
        let mut at = segment.start;
        while at < segment.end {
            let end = segment.end.min(at + CHUNK_BYTES);
            let Ok(Read::Ready(bytes)) = blob.read(at..end) else { return None };
            whole.update(&*bytes);
            chunks.update(&bytes);
            at = end;
        }
    }
    Some((Digest::from_raw(whole.finalize().into()), chunks.finish()))
}

/// The sha256 of each chunk of bytes that come in order.
struct ChunkHashes {
    layout: Layout,
    position: u64,
    /// One past the last byte of the chunk that is being hashed.
    end: u64,
    hash: Sha256,
    digests: BytesMut,
}

impl ChunkHashes {
    fn new(layout: Layout) -> Self {
        let end = chunk_end(&layout, 0);
        Self { layout, position: 0, end, hash: Sha256::new(), digests: BytesMut::new() }
    }

    fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = usize::try_from(self.end - self.position).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(bytes.len().min(room.max(1)));
            self.hash.update(now);
            self.position += now.len() as u64;
            bytes = later;
            if self.position >= self.end {
                self.digests.extend_from_slice(&self.hash.finalize_reset());
                self.end = chunk_end(&self.layout, self.position);
            }
        }
    }

    fn finish(self) -> Bytes {
        self.digests.freeze()
    }
}

/// One past the last byte of the chunk that begins at `start`.
fn chunk_end(layout: &Layout, start: u64) -> u64 {
    let segment = layout.segment_at(start).and_then(|index| layout.segment(index));
    segment.map_or(u64::MAX, |segment| segment.end.min(start.saturating_add(CHUNK_BYTES)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::LayerContent;
    use crate::layer::Quiet;
    use crate::testing::{Fault, MemorySource};
    use crate::tree::Timestamp;

    const MIB: u64 = 1 << 20;

    /// The digests as they are defined: one chunk after the other.
    fn expected(bytes: &[u8], layout: &Layout) -> Vec<u8> {
        let segments = (0..layout.segments()).map(|index| layout.segment(index).unwrap());
        let of_segment = |segment: std::ops::Range<u64>| {
            let range = segment.start as usize..segment.end as usize;
            bytes[range].chunks(CHUNK_BYTES as usize).flat_map(|c| *Digest::of(c).as_raw())
        };
        segments.flat_map(of_segment).collect()
    }

    fn noise(length: u64) -> Vec<u8> {
        (0..length).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 11) as u8).collect()
    }

    fn raw_layer(digest: Digest, size: u64) -> LayerDescriptor {
        LayerDescriptor {
            digest,
            size,
            media_type: "application/vnd.cncf.model.weight.v1.tar".to_owned(),
            compression: Compression::None,
            content: LayerContent::ModelTar { created: Timestamp::default() },
        }
    }

    async fn index(
        source: &Arc<MemorySource>,
        digest: Digest,
        layout: &Layout,
    ) -> Result<(Digest, Bytes), LayerError> {
        let layer = raw_layer(digest, source.size());
        let remote =
            Remote { source: Arc::clone(source) as _, digest, deadline: Duration::from_secs(5) };
        stream_layer(&remote, &layer, layout.clone(), &Quiet).await
    }

    #[tokio::test]
    async fn each_chunk_is_hashed_from_its_segments_start() {
        let bytes = noise(11 * MIB + 5);
        let layout = Layout::new(11 * MIB + 5, [700, 3 * MIB + 9, 3 * MIB + 10]).unwrap();
        let source = MemorySource::new(bytes.clone());
        source.fail_next([Fault::CutAfter(1000)]);
        let (whole, chunks) = index(&source, Digest::of(&bytes), &layout).await.unwrap();
        assert_eq!(whole, Digest::of(&bytes));
        assert_eq!(chunks, expected(&bytes, &layout));
    }

    #[tokio::test]
    async fn an_empty_layer_has_no_chunk() {
        let source = MemorySource::new(vec![]);
        let (_, chunks) = index(&source, Digest::of(b""), &Layout::whole(0)).await.unwrap();
        assert!(chunks.is_empty());
    }

    #[tokio::test]
    async fn bytes_that_are_not_the_layers_make_no_index() {
        let source = MemorySource::new(noise(2 * MIB));
        let error =
            index(&source, Digest::of(b"other"), &Layout::whole(2 * MIB)).await.unwrap_err();
        assert!(matches!(error, LayerError::Digest { .. }), "{error}");
    }
}
