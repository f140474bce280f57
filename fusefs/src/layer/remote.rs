//! Listing a plain tar at its source, by ranged reads of its headers.
//!
//! Headers of small files are read in windows that grow; what a large file holds is skipped. So
//! a tar with one large file costs two small requests, and one with thousands of small files few.

use std::ops::Range;

use super::LayerError;
use super::fetch::Remote;
use crate::archive::Walker;
use crate::listing::{Entry, Listing};

/// Bytes of the first window, and of each after a jump.
const MIN_WINDOW_BYTES: u64 = 64 << 10;
/// Bytes of a window at the most: a request costs as much time as a megabyte.
const MAX_WINDOW_BYTES: u64 = 1 << 20;
/// A header so near behind the window means small files: the window grows.
const NEAR_BYTES: u64 = 64 << 10;

/// Lists a tar of `size` bytes.
///
/// # Errors
/// A source that fails, or a tar that can't be read.
pub async fn list(remote: &Remote, size: u64) -> Result<Listing, LayerError> {
    let digest = remote.digest;
    let mut walker = Walker::new(Some(size));
    let mut window = Window::new(remote, size);
    let mut entries: Vec<Entry> = Vec::new();
    while let Some(need) = walker.needs() {
        if need.end > size {
            walker.end(size).map_err(|source| LayerError::Tar { digest, source })?;
            break;
        }
        let bytes = window.get(need).await?;
        let entry = walker.feed(bytes).map_err(|source| LayerError::Tar { digest, source })?;
        entries.extend(entry);
    }
    Listing::new(entries, size).map_err(|source| LayerError::Layout { digest, source })
}

/// The part of the blob that is in memory.
struct Window<'a> {
    remote: &'a Remote,
    size: u64,
    start: u64,
    bytes: Vec<u8>,
    /// Bytes of the next window.
    reach: u64,
}

impl<'a> Window<'a> {
    fn new(remote: &'a Remote, size: u64) -> Self {
        Self { remote, size, start: 0, bytes: Vec::new(), reach: MIN_WINDOW_BYTES }
    }

    /// Bytes of the blob, which are inside it.
    async fn get(&mut self, need: Range<u64>) -> Result<&[u8], LayerError> {
        if self.slice(&need).is_none() {
            self.load(&need).await?;
        }
        Ok(self.slice(&need).unwrap_or_default())
    }

    fn slice(&self, need: &Range<u64>) -> Option<&[u8]> {
        let from = usize::try_from(need.start.checked_sub(self.start)?).ok()?;
        let to = usize::try_from(need.end.checked_sub(self.start)?).ok()?;
        self.bytes.get(from..to)
    }

    async fn load(&mut self, need: &Range<u64>) -> Result<(), LayerError> {
        let end = self.start + u64::try_from(self.bytes.len()).unwrap_or(u64::MAX);
        let near = need.start <= end.saturating_add(NEAR_BYTES);
        self.reach = match (self.bytes.is_empty(), near) {
            (true, _) | (_, false) => MIN_WINDOW_BYTES,
            (false, true) => (self.reach * 2).min(MAX_WINDOW_BYTES),
        };
        // What the window has of the need already is kept.
        let kept = self.slice(&(need.start..end.max(need.start))).unwrap_or_default().to_vec();
        let from = need.start + u64::try_from(kept.len()).unwrap_or(u64::MAX);
        let to = need.end.max(need.start.saturating_add(self.reach)).min(self.size);
        (self.start, self.bytes) = (need.start, kept);
        for piece in self.remote.read(from..to).await? {
            self.bytes.extend_from_slice(&piece);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use tar::Builder;
    use weightfs_store::Digest;

    use super::*;
    use crate::archive::TarError;
    use crate::archive::tests::{add_file, walk};
    use crate::listing::EntryKind;
    use crate::testing::MemorySource;

    async fn list_from(source: &Arc<MemorySource>) -> Result<Listing, LayerError> {
        let size = source.size();
        let digest = Digest::of(b"");
        let source = Arc::clone(source) as _;
        list(&Remote { source, digest, deadline: Duration::from_secs(10) }, size).await
    }

    fn fetched(source: &MemorySource) -> u64 {
        source.requests().iter().map(|range| range.end - range.start).sum()
    }

    #[tokio::test]
    async fn a_tar_with_one_large_file_costs_two_small_requests() {
        let mut tar = Builder::new(Vec::new());
        add_file(&mut tar, "model.safetensors", &vec![1; 16 << 20]);
        let source = MemorySource::new(tar.into_inner().unwrap());
        let listing = list_from(&source).await.unwrap();
        assert_eq!(listing.entries().len(), 1);
        assert_eq!(listing.layout().segments(), 3);
        assert_eq!(source.requests().len(), 2);
        assert!(fetched(&source) <= 128 << 10, "{} bytes", fetched(&source));
    }

    #[tokio::test]
    async fn a_tar_of_small_files_is_read_in_large_windows() {
        let mut tar = Builder::new(Vec::new());
        for at in 0..5000 {
            add_file(&mut tar, &format!("d/{at}"), &[7; 300]);
        }
        let archive = tar.into_inner().unwrap();
        let source = MemorySource::new(archive.clone());
        let listing = list_from(&source).await.unwrap();
        assert_eq!(listing.entries(), walk(&archive).unwrap());
        assert!(source.requests().len() <= 10, "{:?}", source.requests());
        assert!(fetched(&source) <= source.size());
    }

    #[tokio::test]
    async fn headers_that_straddle_windows_are_read() {
        let mut tar = Builder::new(Vec::new());
        for at in 0..20 {
            tar.append_pax_extensions([
                ("path", format!("long/{at}").as_bytes()),
                ("SCHILY.xattr.user.a", &vec![b'x'; 100_000]),
            ])
            .unwrap();
            add_file(&mut tar, "short", &vec![3; at * 50_000]);
        }
        let archive = tar.into_inner().unwrap();
        let listing = list_from(&MemorySource::new(archive.clone())).await.unwrap();
        assert_eq!(listing.entries(), walk(&archive).unwrap());
        assert!(
            matches!(listing.entries()[19].kind, EntryKind::File(ref r) if r.end - r.start == 950_000)
        );
    }

    #[tokio::test]
    async fn a_cut_tar_is_refused() {
        let mut tar = Builder::new(Vec::new());
        add_file(&mut tar, "a", &vec![1; 3 << 20]);
        let mut archive = tar.into_inner().unwrap();
        archive.truncate(2 << 20);
        let error = list_from(&MemorySource::new(archive)).await.unwrap_err();
        let LayerError::Tar { source: TarError::Truncated { offset, .. }, .. } = error else {
            panic!("{error}")
        };
        assert_eq!(offset, 2 << 20);
    }
}
