//! What was opened here by name: for each reference the manifest that it named and the layers
//! that were opened of it. So the cache can be listed, pinned, evicted and repaired by reference,
//! without a network and whether a daemon runs or not.
//!
//! On disk: `<root>/references/<digest of the reference>`, a JSON document each, replaced whole.
//! One that can't be read is left out: it is written anew when the reference is opened again.
//!
//! Invariant: whoever changes a record holds the lock, so that layers of one image that are opened
//! at the same time all get into it.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tracing::warn;
use weightfs_fusefs::blob_id;
use weightfs_store::{BlobId, Digest};

use crate::trees::LayerRecord;

/// Directory of the records, below the root.
const DIRECTORY: &str = "references";

/// Bytes of a record at the most: a manifest has 4 MiB, and a record says each layer twice.
const MAX_RECORD_BYTES: u64 = 16 << 20;

/// Ends the name of a record that is being written.
const NEW: &str = ".new";

/// Whether what a reference names is kept in the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pin {
    /// As long as there is room.
    #[default]
    Loose,
    /// Whatever happens.
    Pinned,
}

/// What is known of a reference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReferenceRecord {
    /// The reference, in full.
    pub reference: String,
    /// The manifest that it named when it was opened last.
    pub manifest_digest: Digest,
    /// The layers that were opened, in no order.
    pub layers: Vec<LayerRecord>,
    /// Whether they are kept.
    #[serde(default)]
    pub pin: Pin,
}

impl ReferenceRecord {
    /// The blobs of its layers, each once.
    pub fn blobs(&self) -> Vec<BlobId> {
        let mut seen = HashSet::new();
        let ids = self.layers.iter().map(|layer| blob_id(&layer.descriptor));
        ids.filter(|id| seen.insert(*id)).collect()
    }
}

/// The references of a state directory.
#[derive(Debug)]
pub struct References {
    dir: PathBuf,
    changing: Mutex<()>,
    changed: Notify,
}

impl References {
    /// Those of that state directory, which need not be there yet.
    pub fn new(root: &Path) -> Arc<Self> {
        let (changing, changed) = Default::default();
        Arc::new(Self { dir: root.join(DIRECTORY), changing, changed })
    }

    /// Remembers layers of what a reference names. Layers of another manifest of that name are
    /// forgotten; whether it is pinned is not. What can't be remembered is logged: it costs
    /// nothing but its name. Blocks on the disk.
    pub fn remember(&self, reference: &str, manifest_digest: Digest, layers: &[LayerRecord]) {
        let _changing = self.lock();
        let known = self.find(reference);
        let pin = known.as_ref().map_or(Pin::Loose, |known| known.pin);
        let same = known.filter(|known| known.manifest_digest == manifest_digest);
        let before = same.map(|known| known.layers).unwrap_or_default();
        let place = |layer: &LayerRecord| (blob_id(&layer.descriptor), layer.repository.clone());
        let known: HashSet<_> = before.iter().map(place).collect();
        let is_new = |layer: &&LayerRecord| !known.contains(&place(layer));
        let new: Vec<_> = layers.iter().filter(is_new).cloned().collect();
        if new.is_empty() && !before.is_empty() {
            return;
        }
        let (reference, layers) = (reference.to_owned(), [before, new].concat());
        let record = ReferenceRecord { reference, manifest_digest, layers, pin };
        match self.write(&record) {
            Ok(()) => self.changed.notify_one(),
            Err(error) => warn!(record.reference, %error, "a reference is not remembered"),
        }
    }

    /// Waits until a reference is remembered that was not, or has more layers. One may wait; what
    /// happened before is not missed.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Pins a reference or takes its pin away; `None` if it is not known. Blocks on the disk.
    ///
    /// # Errors
    /// When that can't be written down.
    pub fn set_pin(&self, reference: &str, pin: Pin) -> io::Result<Option<ReferenceRecord>> {
        let _changing = self.lock();
        let Some(mut record) = self.find(reference) else { return Ok(None) };
        record.pin = pin;
        self.write(&record)?;
        Ok(Some(record))
    }

    /// Forgets a reference.
    ///
    /// # Errors
    /// When its record can't be removed.
    pub fn forget(&self, reference: &str) -> io::Result<()> {
        let _changing = self.lock();
        match fs::remove_file(self.path(reference)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// What is known of a reference. Blocks on the disk.
    pub fn find(&self, reference: &str) -> Option<ReferenceRecord> {
        let record = read(&self.path(reference))?;
        (record.reference == reference).then_some(record)
    }

    /// All that are known, by name. Blocks on the disk.
    pub fn all(&self) -> Vec<ReferenceRecord> {
        let Ok(entries) = fs::read_dir(&self.dir) else { return vec![] };
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let whole = paths.filter(|path| !path.to_string_lossy().ends_with(NEW));
        let mut records: Vec<_> = whole.filter_map(|path| read(&path)).collect();
        records.sort_by(|a, b| a.reference.cmp(&b.reference));
        records
    }

    fn write(&self, record: &ReferenceRecord) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let path = self.path(&record.reference);
        let mut new = path.clone().into_os_string();
        new.push(NEW);
        fs::write(&new, serde_json::to_vec(record)?)?;
        fs::File::open(&new)?.sync_all()?;
        // The commit point.
        fs::rename(&new, &path)?;
        fs::File::open(&self.dir)?.sync_all()
    }

    /// Named by the reference's digest: a reference is no file name.
    fn path(&self, reference: &str) -> PathBuf {
        self.dir.join(Digest::of(reference.as_bytes()).hex())
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(path: &Path) -> Option<ReferenceRecord> {
    let mut bytes = Vec::new();
    let read = fs::File::open(path)
        .and_then(|file| file.take(MAX_RECORD_BYTES).read_to_end(&mut bytes))
        .and_then(|_| Ok(serde_json::from_slice(&bytes)?));
    match read {
        Ok(record) => Some(record),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            warn!(path = %path.display(), %error, "the record of a reference is ignored");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use weightfs_fusefs::{Compression, LayerContent, LayerDescriptor};
    use weightfs_store::Repository;

    use super::*;

    fn layer(bytes: &[u8]) -> LayerRecord {
        let descriptor = LayerDescriptor {
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
            media_type: "test".into(),
            compression: Compression::None,
            content: LayerContent::ImageTar,
        };
        let repository = Repository { registry: "localhost:5000".into(), name: "m".into() };
        LayerRecord { descriptor, repository }
    }

    #[test]
    fn layers_of_one_manifest_add_up_and_those_of_another_replace_them() {
        let root = tempfile::tempdir().unwrap();
        let references = References::new(root.path());
        assert!(references.all().is_empty() && references.find("a:1").is_none());
        let (first, second) = (Digest::of(b"1"), Digest::of(b"2"));
        references.remember("a:1", first, &[layer(b"x"), layer(b"y")]);
        references.remember("a:1", first, &[layer(b"y"), layer(b"z")]);
        references.remember("b:1", first, &[layer(b"x")]);
        let names: Vec<_> = references.all().into_iter().map(|known| known.reference).collect();
        assert_eq!(names, ["a:1", "b:1"]);
        assert_eq!(references.find("a:1").unwrap().blobs().len(), 3);
        references.set_pin("a:1", Pin::Pinned).unwrap().unwrap();
        references.remember("a:1", second, &[layer(b"z")]);
        let known = References::new(root.path()).find("a:1").unwrap();
        assert_eq!((known.manifest_digest, known.pin), (second, Pin::Pinned));
        assert_eq!(known.layers, [layer(b"z")]);
        references.forget("a:1").unwrap();
        references.forget("a:1").unwrap();
        assert!(references.find("a:1").is_none());
        assert!(references.set_pin("a:1", Pin::Pinned).unwrap().is_none());
    }

    #[test]
    fn a_damaged_record_is_left_out_and_written_anew() {
        let root = tempfile::tempdir().unwrap();
        let references = References::new(root.path());
        references.remember("a:1", Digest::of(b"1"), &[layer(b"x")]);
        let path = references.path("a:1");
        for damage in [&b""[..], b"{", b"[1]"] {
            fs::write(&path, damage).unwrap();
            assert!(references.all().is_empty());
            references.remember("a:1", Digest::of(b"1"), &[layer(b"x")]);
            assert_eq!(references.all().len(), 1);
        }
    }

    #[test]
    fn fuzz_records_are_left_out_or_name_blobs() {
        let root = tempfile::tempdir().unwrap();
        let references = References::new(root.path());
        references.remember("a:1", Digest::of(b"1"), &[layer(b"x")]);
        let path = references.path("a:1");
        let sample = fs::read(&path).unwrap();
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&[&sample], input);
            if let Ok(record) = serde_json::from_slice::<ReferenceRecord>(&bytes) {
                assert!(record.blobs().len() <= record.layers.len());
            }
        });
    }
}
