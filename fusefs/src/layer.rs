//! One layer, opened: its descriptor, the blob that holds its bytes and the listing of its files.
//!
//! A raw layer needs nothing; a plain tar is listed by ranged reads of its headers; a compressed
//! tar is downloaded, checked and inflated once, or read in part where an index has access points. The listing of a tar is kept beside its blob, so
//! that a restart needs no network.

pub(crate) mod fetch;
mod inflate;
mod remote;
mod spans;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use weightfs_store::{
    Blob, BlobId, Digest, Form, LayoutError, OpenError, Source, SourceError, Store, in_order,
};

use crate::archive::TarError;
use crate::artifact::{Compression, LayerContent, LayerDescriptor};
use crate::index::LayerIndex;
use crate::layer::fetch::Remote;
use crate::layer::spans::{InflatedSource, Points};
use crate::listing::Listing;

/// A layer whose files are known and whose bytes can be read.
#[derive(Debug)]
pub struct OpenLayer {
    /// Where it came from and what it is.
    pub descriptor: LayerDescriptor,
    /// Its bytes; decompressed, if it is compressed.
    pub blob: Arc<Blob>,
    /// Its files.
    pub listing: Listing,
}

/// Told how a download goes that must end before a layer can be opened.
pub trait Progress: Send + Sync {
    /// `bytes` of the `layer.size` bytes of the layer are here.
    fn downloaded(&self, layer: &LayerDescriptor, bytes: u64);
}

/// Tells nobody.
#[derive(Debug, Clone, Copy)]
pub struct Quiet;

impl Progress for Quiet {
    fn downloaded(&self, _layer: &LayerDescriptor, _bytes: u64) {}
}

/// Name of the listing beside a blob.
const LISTING: &str = "listing";

/// Name of the access points beside a decompressed blob.
const POINTS: &str = "points";

/// Why a layer can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The source failed in a way that another try would not mend.
    #[error("layer {digest}: {source}")]
    Source {
        /// The layer.
        digest: Digest,
        /// What it said.
        source: SourceError,
    },
    /// The source gave nothing for too long.
    #[error("layer {digest}: {source_name} gave nothing for {deadline:?}: {cause}")]
    Deadline {
        /// The layer.
        digest: Digest,
        /// The source.
        source_name: String,
        /// The configured deadline (`fetch.deadline`).
        deadline: Duration,
        /// The last failure seen, or that there was no answer at all.
        cause: String,
    },
    /// Its tar can't be read.
    #[error("layer {digest}: {source}")]
    Tar {
        /// The layer.
        digest: Digest,
        /// What is wrong.
        source: TarError,
    },
    /// Its large files make no layout.
    #[error("layer {digest}: {source}")]
    Layout {
        /// The layer.
        digest: Digest,
        /// What is wrong.
        source: LayoutError,
    },
    /// The downloaded bytes are not what the digest promises.
    #[error("layer {digest} was downloaded, but its bytes hash to {actual}; nothing of it is kept")]
    Digest {
        /// The digest that was promised.
        digest: Digest,
        /// The digest that the bytes have.
        actual: Digest,
    },
    /// It can't be decompressed.
    #[error("layer {digest} can't be decompressed as {compression:?}: {message}; push it again")]
    Inflate {
        /// The layer.
        digest: Digest,
        /// How it should be compressed.
        compression: Compression,
        /// What the decompressor said.
        message: String,
    },
    /// It inflates to more than such a layer can have in earnest.
    #[error("layer {digest} inflates to more than {limit} bytes, which is refused")]
    TooLarge {
        /// The layer.
        digest: Digest,
        /// The bound, in bytes.
        limit: u64,
    },
    /// The cache can't be used.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The work was given up before it was done, because the program ends.
    #[error("layer {digest}: opening it was given up")]
    Stopped {
        /// The layer.
        digest: Digest,
    },
}

/// Opens a layer: from the store if its listing is there, else by listing it at its source (a
/// plain tar) or by downloading and inflating it (a compressed one).
///
/// `deadline` is how long the source may give nothing at all before this fails.
///
/// # Errors
/// A source that fails, a tar that is malformed, a digest that doesn't match, a cache that can't
/// be written. Nothing is left behind then.
pub async fn open_layer(
    store: &Arc<Store>,
    source: Arc<dyn Source>,
    layer: &LayerDescriptor,
    deadline: Duration,
    progress: &dyn Progress,
) -> Result<Arc<OpenLayer>, LayerError> {
    let (local, known, sources) = (Arc::clone(store), layer.clone(), vec![Arc::clone(&source)]);
    let digest = layer.digest;
    let reopened = blocking(digest, move || reopen_layer(&local, sources, &known)).await?;
    if let Some(open) = reopened {
        return Ok(open);
    }
    let remote = Remote { source: Arc::clone(&source), digest, deadline };
    open_remote(store, remote, source, layer, progress).await
}

/// As [`open_layer`], of a host that ignores ranges: a tar is downloaded for its listing, and again
/// when its files are read.
///
/// # Errors
/// As [`open_layer`].
pub async fn open_layer_without_ranges(
    store: &Arc<Store>,
    source: Arc<dyn Source>,
    layer: &LayerDescriptor,
    deadline: Duration,
    progress: &dyn Progress,
) -> Result<Arc<OpenLayer>, LayerError> {
    let in_order = in_order(Arc::clone(&source), layer.size);
    let remote = Remote { source: in_order, digest: layer.digest, deadline };
    open_remote(store, remote, source, layer, progress).await
}

/// Opens a layer that is read by `remote` now and by `source` later.
async fn open_remote(
    store: &Arc<Store>,
    remote: Remote,
    source: Arc<dyn Source>,
    layer: &LayerDescriptor,
    progress: &dyn Progress,
) -> Result<Arc<OpenLayer>, LayerError> {
    if layer.compression != Compression::None {
        let (blob, listing) = inflate::download(store, &remote, layer, progress).await?;
        return Ok(Arc::new(OpenLayer { descriptor: layer.clone(), blob, listing }));
    }
    let listing = remote::list(&remote, layer.size).await?;
    let (store, descriptor) = (Arc::clone(store), layer.clone());
    blocking(layer.digest, move || {
        let id = blob_id(&descriptor);
        store.attach(id, LISTING, &listing.to_bytes())?;
        let blob = store.blob(id, listing.layout())?;
        blob.add_source(source);
        Ok(Arc::new(OpenLayer { descriptor, blob, listing }))
    })
    .await
}

/// Opens a layer by what an index says of it: nothing is asked of its source, and each chunk is
/// compared before it is served. `None` if the index has not enough of it.
///
/// # Errors
/// A cache that can't be used; one that has the layer with other files than the index says.
pub async fn open_indexed_layer(
    store: &Arc<Store>,
    source: Arc<dyn Source>,
    layer: &LayerDescriptor,
    index: &LayerIndex,
) -> Result<Option<Arc<OpenLayer>>, LayerError> {
    let same = (index.size, index.compression) == (layer.size, layer.compression);
    let raw = matches!(layer.content, LayerContent::Raw(_));
    let fits = !raw || index.listing == Listing::raw(layer.size);
    let lazy = layer.compression == Compression::None || !index.points.is_empty();
    if !same || !fits || !lazy {
        return Ok(None);
    }
    let (store, descriptor, index) = (Arc::clone(store), layer.clone(), index.clone());
    blocking(layer.digest, move || {
        let id = blob_id(&descriptor);
        store.discard_poisoned(id)?;
        let LayerIndex { listing, chunk_digests, points, .. } = index;
        let source = match id.form {
            Form::AsStored => Some(source),
            Form::Decompressed => inflated_source(source, &descriptor, &points, &listing),
        };
        let Some(source) = source else { return Ok(None) };
        let blob = store.indexed_blob(id, listing.layout(), &chunk_digests)?;
        if !raw {
            store.attach(id, LISTING, &listing.to_bytes())?;
        }
        if id.form == Form::Decompressed {
            store.attach(id, POINTS, &points)?;
        }
        blob.add_source(source);
        Ok(Some(Arc::new(OpenLayer { descriptor, blob, listing })))
    })
    .await
}

/// A source of a layer's decompressed bytes; `None` if its access points make no sense.
fn inflated_source(
    source: Arc<dyn Source>,
    layer: &LayerDescriptor,
    points: &Bytes,
    listing: &Listing,
) -> Option<Arc<dyn Source>> {
    let content = listing.layout().size();
    match Points::parse(points, layer.compression, layer.size, content) {
        Ok(points) => Some(Arc::new(InflatedSource::new(source, Arc::new(points)))),
        Err(why) => {
            tracing::warn!(layer = %layer.digest, why, "access points ignored");
            None
        }
    }
}

/// Whether access points of a layer make sense.
pub(crate) fn check_points(
    points: &Bytes,
    compression: Compression,
    blob_bytes: u64,
    content_bytes: u64,
) -> Result<(), &'static str> {
    if compression == Compression::None {
        return Err("it has access points, but is not compressed");
    }
    Points::parse(points, compression, blob_bytes, content_bytes).map(drop)
}

/// The access points that the store keeps of a compressed layer; empty if there are none.
pub fn stored_points(store: &Store, layer: &LayerDescriptor) -> Bytes {
    store.attachment(blob_id(layer), POINTS).unwrap_or_default().into()
}

/// Opens a layer from what the store has on disk, without any network; `None` if the store
/// doesn't know its files, or has not all of a compressed layer.
///
/// # Errors
/// A cache that can't be used.
pub fn reopen_layer(
    store: &Arc<Store>,
    sources: Vec<Arc<dyn Source>>,
    layer: &LayerDescriptor,
) -> Result<Option<Arc<OpenLayer>>, LayerError> {
    let id = blob_id(layer);
    store.discard_poisoned(id)?;
    let listing = match layer.content {
        LayerContent::Raw(_) => Some(Listing::raw(layer.size)),
        _ => store.attachment(id, LISTING).and_then(|bytes| Listing::from_bytes(&bytes)),
    };
    let usable = |listing: &Listing| match id.form {
        Form::AsStored => listing.layout().size() == layer.size,
        // Never made here: it has no source that could fill it.
        Form::Decompressed => store.layout(id).as_ref() == Some(listing.layout()),
    };
    let Some(listing) = listing.filter(usable) else { return Ok(None) };
    let blob = store.blob(id, listing.layout())?;
    match id.form {
        Form::AsStored => sources.into_iter().for_each(|source| blob.add_source(source)),
        // Only what can be compared chunk by chunk may come from where it is inflated in part.
        Form::Decompressed if blob.has_digests() => {
            let points = stored_points(store, layer);
            let inflated = |source| inflated_source(source, layer, &points, &listing);
            let sources = sources.into_iter().filter(|_| !points.is_empty());
            sources.filter_map(inflated).for_each(|source| blob.add_source(source));
            if points.is_empty() && blob.stats().cached < listing.layout().size() {
                return Ok(None);
            }
        }
        Form::Decompressed if blob.stats().cached < listing.layout().size() => return Ok(None),
        Form::Decompressed => {}
    }
    Ok(Some(Arc::new(OpenLayer { descriptor: layer.clone(), blob, listing })))
}

/// What the store keeps of a layer.
pub fn blob_id(layer: &LayerDescriptor) -> BlobId {
    let form = match layer.compression {
        Compression::None => Form::AsStored,
        Compression::Gzip | Compression::Zstd => Form::Decompressed,
    };
    BlobId { digest: layer.digest, form }
}

/// Runs file operations where they don't hold up the runtime.
async fn blocking<T: Send + 'static>(
    digest: Digest,
    work: impl FnOnce() -> Result<T, LayerError> + Send + 'static,
) -> Result<T, LayerError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| LayerError::Stopped { digest })?
}

#[cfg(test)]
mod tests;
