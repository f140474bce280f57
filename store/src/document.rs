//! Small files of the state directory: each with a header that tells its kind and a checksum,
//! each replaced whole.
//!
//! On disk: `WEIGHTFS`, the kind (u32), the version (u32), the payload's length (u64), its
//! sha256 (32 bytes), the payload. Numbers are little-endian.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use memmap2::Mmap;
use sha2::{Digest as _, Sha256};

use crate::Digest;
use crate::disk::{Disk, Durability};

/// Bytes of a document at the most. The largest layout takes some 20 MiB; listings of tar layers
/// with a million members some 200.
pub(crate) const MAX_DOCUMENT_BYTES: u64 = 256 << 20;

/// Bytes of a document at the most that is mapped and not read: the chunk digests of the largest
/// blob take 512 MiB.
const MAX_MAPPED_BYTES: u64 = (512 << 20) + 4096;

const MAGIC: &[u8; 8] = b"WEIGHTFS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 8 + 4 + 4 + 8 + 32;

/// What a document holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    /// A blob's cuts.
    Layout = 1,
    /// What is known of a blob's bytes.
    State = 2,
    /// Something that the store's user keeps beside a blob.
    Attachment = 3,
    /// How the owner of the directory stopped.
    Session = 4,
    /// What the chunks of a blob hash to.
    Digests = 5,
}

/// Replaces the document `name` of `dir`.
pub(crate) fn write(
    disk: &dyn Disk,
    dir: &Path,
    name: &str,
    kind: Kind,
    payload: &[u8],
    durability: Durability,
) -> io::Result<()> {
    write_parts(disk, dir, name, kind, &[payload], durability)
}

/// Replaces the document `name` of `dir`; its payload comes in parts.
pub(crate) fn write_parts(
    disk: &dyn Disk,
    dir: &Path,
    name: &str,
    kind: Kind,
    parts: &[&[u8]],
    durability: Durability,
) -> io::Result<()> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    let mut content = Vec::with_capacity(HEADER_BYTES + len);
    content.extend_from_slice(&header(kind, len as u64, Digest::from_raw(hash.finalize().into())));
    parts.iter().for_each(|part| content.extend_from_slice(part));
    disk.replace(&dir.join(name), &content, durability)
}

fn header(kind: Kind, len: u64, digest: Digest) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&(kind as u32).to_le_bytes());
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&len.to_le_bytes());
    header.extend_from_slice(digest.as_raw());
    header
}

/// A document that is used where it lies.
#[derive(Debug)]
pub(crate) struct Mapped {
    map: Mmap,
    digest: Digest,
}

impl Mapped {
    /// Maps a document and compares its checksum, once; `None` if there is none.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn open(path: &Path, kind: Kind) -> Result<Option<Self>, String> {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|error| error.to_string())?,
        };
        let len = file.metadata().map_err(|error| error.to_string())?.len();
        if len > MAX_MAPPED_BYTES || len < HEADER_BYTES as u64 {
            return Err("it is not as long as it can be".into());
        }
        // SAFETY: documents are replaced by renames, never written or cut in place, and the
        // directory has one owner.
        #[expect(unsafe_code, reason = "a mapping of a file that does not change")]
        let map = unsafe { Mmap::map(&file) }.map_err(|error| error.to_string())?;
        let payload = map.get(HEADER_BYTES..).unwrap_or_default();
        let digest = Digest::of(payload);
        if !map.starts_with(&header(kind, payload.len() as u64, digest)) {
            return Err(format!("no {kind:?} document of version {VERSION}, or a damaged one"));
        }
        Ok(Some(Self { map, digest }))
    }

    pub(crate) fn payload(&self) -> &[u8] {
        self.map.get(HEADER_BYTES..).unwrap_or_default()
    }

    /// The sha256 of the payload.
    pub(crate) fn digest(&self) -> Digest {
        self.digest
    }
}

/// What is at a document's place.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Its payload, as it was written.
    Payload(Vec<u8>),
    /// Nothing.
    Nothing,
    /// Something else: cut, changed, of another kind or version, unreadable.
    Damaged(String),
}

/// Reads a document.
pub(crate) fn read(path: &Path, kind: Kind) -> Found {
    match File::open(path) {
        Ok(file) => read_file(file, kind).map_or_else(Found::Damaged, Found::Payload),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Found::Nothing,
        Err(error) => Found::Damaged(error.to_string()),
    }
}

fn read_file(file: File, kind: Kind) -> Result<Vec<u8>, String> {
    let limit = MAX_DOCUMENT_BYTES + HEADER_BYTES as u64;
    if file.metadata().map_err(|error| error.to_string())?.len() > limit {
        return Err(format!("longer than {limit} bytes"));
    }
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    decode(bytes, kind)
}

fn decode(mut bytes: Vec<u8>, kind: Kind) -> Result<Vec<u8>, String> {
    if bytes.len() < HEADER_BYTES {
        return Err("shorter than its header".into());
    }
    let payload = bytes.split_off(HEADER_BYTES);
    let mut expected = Vec::with_capacity(HEADER_BYTES);
    expected.extend_from_slice(MAGIC);
    expected.extend_from_slice(&(kind as u32).to_le_bytes());
    expected.extend_from_slice(&VERSION.to_le_bytes());
    if !bytes.starts_with(&expected) {
        return Err(format!("no {kind:?} document of version {VERSION}"));
    }
    expected.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    expected.extend_from_slice(Digest::of(&payload).as_raw());
    if bytes == expected { Ok(payload) } else { Err("its checksum does not match".into()) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::disk::LocalDisk;

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        assert_eq!(read(&path, Kind::State), Found::Nothing);
        for payload in [&b"first, longer"[..], b"second", b""] {
            write(&LocalDisk, dir.path(), "x", Kind::State, payload, Durability::Synced).unwrap();
            assert_eq!(read(&path, Kind::State), Found::Payload(payload.to_vec()));
        }
        assert!(matches!(read(&path, Kind::Layout), Found::Damaged(_)));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        write(&LocalDisk, dir.path(), "x", Kind::Layout, b"payload", Durability::Atomic).unwrap();
        let good = fs::read(&path).unwrap();
        for len in 0..good.len() {
            assert!(decode(good[..len].to_vec(), Kind::Layout).is_err(), "cut at {len}");
        }
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(bad, Kind::Layout).is_err(), "bit {bit}");
        }
        let mut longer = good;
        longer.push(0);
        assert!(decode(longer, Kind::Layout).is_err());
    }

    #[test]
    fn a_failed_write_leaves_the_old_document() {
        let dir = tempfile::tempdir().unwrap();
        let gone = dir.path().join("gone");
        assert!(write(&LocalDisk, &gone, "x", Kind::State, b"new", Durability::Synced).is_err());
    }

    #[test]
    fn fuzz_documents_are_refused_or_whole() {
        let dir = tempfile::tempdir().unwrap();
        write(&LocalDisk, dir.path(), "x", Kind::State, b"payload", Durability::Atomic).unwrap();
        let sample = fs::read(dir.path().join("x")).unwrap();
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&[&sample], input);
            if let Ok(payload) = decode(bytes.clone(), Kind::State) {
                assert!(bytes.ends_with(&payload));
                assert_eq!(bytes.len(), HEADER_BYTES + payload.len());
            }
        });
    }
}
