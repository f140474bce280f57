//! What several modules' tests need.

use std::sync::Arc;

use weightfs_store::{Blob, Digest};

use crate::artifact::{Compression, LayerContent, LayerDescriptor};
use crate::layer::OpenLayer;
use crate::listing::{Entry, Listing};

pub fn blob() -> Arc<Blob> {
    #[expect(unsafe_code, reason = "temporary")]
    // SAFETY: temporary
    unsafe {
        Arc::new(std::mem::zeroed())
    }
}

/// A layer that was listed, without any of its bytes.
pub fn listed(digest: Digest, content: LayerContent, entries: Vec<Entry>) -> Arc<OpenLayer> {
    let size = 1 << 30;
    let descriptor = LayerDescriptor {
        digest,
        size,
        media_type: "test".to_owned(),
        compression: Compression::None,
        content,
    };
    let listing = Listing::new(entries, size).unwrap();
    Arc::new(OpenLayer { descriptor, blob: blob(), listing })
}
