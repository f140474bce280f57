//! One layer, opened: its descriptor, the blob that holds its bytes and the listing of its files.

use std::sync::Arc;
use std::time::Duration;

use weightfs_store::{Blob, Source, Store};

use crate::artifact::LayerDescriptor;
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

/// Why a layer can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {}

/// Opens a layer: from the store if its listing is there, else by listing it at its source (a
/// plain tar) or by downloading and inflating it (a compressed one).
///
/// `deadline` is how long the source may give nothing at all before this fails.
///
/// # Errors
/// A source that fails, a tar that is malformed, a digest that doesn't match, a cache that can't
/// be written. Nothing is left behind then.
pub async fn open_layer(
    _store: &Arc<Store>,
    _source: Arc<dyn Source>,
    _layer: &LayerDescriptor,
    _deadline: Duration,
    _progress: &dyn Progress,
) -> Result<Arc<OpenLayer>, LayerError> {
    todo!()
}

/// Opens a layer from what the store has on disk, without any network; `None` if the store
/// doesn't know its files.
///
/// # Errors
/// A cache that can't be used.
pub fn reopen_layer(
    _store: &Arc<Store>,
    _sources: Vec<Arc<dyn Source>>,
    _layer: &LayerDescriptor,
) -> Result<Option<Arc<OpenLayer>>, LayerError> {
    todo!()
}
