//! Tar layers with everything that image layers may hold.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};

use crate::digest::Hashing;
use crate::remote::Blob;

/// What a tar entry says of a file besides its content.
#[derive(Debug, Clone)]
pub struct Attributes {
    /// Permission bits, with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Seconds and nanoseconds since the epoch.
    pub mtime: (u64, u32),
    /// Extended attributes.
    pub xattrs: Vec<(String, Vec<u8>)>,
}

impl Attributes {
    /// Root's, with that mode and a time that is not the epoch.
    pub fn mode(mode: u32) -> Self {
        Self { mode, uid: 0, gid: 0, mtime: (1_650_000_000, 0), xattrs: Vec::new() }
    }

    /// With these owners.
    #[must_use]
    pub fn owned(self, uid: u64, gid: u64) -> Self {
        Self { uid, gid, ..self }
    }

    /// With that modification time.
    #[must_use]
    pub fn at(self, seconds: u64, nanoseconds: u32) -> Self {
        Self { mtime: (seconds, nanoseconds), ..self }
    }

    /// With one more extended attribute.
    #[must_use]
    pub fn xattr(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.xattrs.push((name.to_owned(), value.into()));
        self
    }
}

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    Plain,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

/// A finished layer.
#[derive(Debug, Clone)]
pub struct Layer {
    /// The blob to be pushed.
    pub blob: Blob,
    /// How it is compressed.
    pub compression: Compression,
    /// The digest of the tar, before compression.
    pub diff_id: weightfs_store::Digest,
}

/// Writes a tar layer to a file.
pub struct LayerBuilder {
    tar: Builder<Hashing<File>>,
    path: PathBuf,
}

impl fmt::Debug for LayerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerBuilder").field("path", &self.path).finish_non_exhaustive()
    }
}

impl LayerBuilder {
    /// A new layer; its blob will be a file in `dir`.
    pub fn new(dir: &Path) -> Self {
        let (file, path) = tempfile::Builder::new()
            .prefix("layer-")
            .suffix(".tar")
            .tempfile_in(dir)
            .and_then(|file| file.keep().map_err(io::Error::from))
            .unwrap();
        Self { tar: Builder::new(Hashing::new(file)), path }
    }

    /// Adds a directory.
    #[must_use]
    pub fn dir(self, path: &str, attributes: &Attributes) -> Self {
        self.add(EntryType::Directory, path, attributes, 0, io::empty())
    }

    /// Adds a file.
    #[must_use]
    pub fn file(self, path: &str, content: &[u8], attributes: &Attributes) -> Self {
        self.add(EntryType::Regular, path, attributes, content.len() as u64, content)
    }

    /// Adds a file with the content of a file on disk.
    #[must_use]
    pub fn file_from(self, path: &str, source: &Path, attributes: &Attributes) -> Self {
        let content = File::open(source).unwrap();
        let size = content.metadata().unwrap().len();
        self.add(EntryType::Regular, path, attributes, size, content)
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn symlink(self, path: &str, target: &str, attributes: &Attributes) -> Self {
        self.link(EntryType::Symlink, path, target, attributes)
    }

    /// Adds a hard link to an earlier path of the layer.
    #[must_use]
    pub fn hard_link(self, path: &str, target: &str, attributes: &Attributes) -> Self {
        self.link(EntryType::Link, path, target, attributes)
    }

    /// Adds a device node or a fifo.
    #[must_use]
    pub fn node(mut self, kind: EntryType, path: &str, device: (u32, u32), a: &Attributes) -> Self {
        self.extensions(a, None);
        let mut header = header(kind, a, 0);
        header.set_device_major(device.0).unwrap();
        header.set_device_minor(device.1).unwrap();
        self.tar.append_data(&mut header, path, io::empty()).unwrap();
        self
    }

    /// Hides what lower layers have at that path (image-spec, "Whiteouts").
    #[must_use]
    pub fn whiteout(self, path: &str) -> Self {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let marker = Path::new(parent).join(format!(".wh.{name}"));
        self.file(marker.to_str().unwrap(), b"", &Attributes::mode(0o644))
    }

    /// Hides what lower layers have in that directory (image-spec, "Opaque Whiteout").
    #[must_use]
    pub fn opaque(self, path: &str) -> Self {
        self.file(&format!("{path}/.wh..wh..opq"), b"", &Attributes::mode(0o644))
    }

    /// Adds a file under a name that no sane writer would give: absolute, or with `..`.
    #[must_use]
    pub fn hostile_file(mut self, path: &str, content: &[u8]) -> Self {
        let mut header = header(EntryType::Regular, &Attributes::mode(0o644), content.len() as u64);
        // The builder's own calls refuse such names, so the field is filled by hand.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        self.tar.append(&header, content).unwrap();
        self
    }

    /// Adds a file whose name is in a pax header instead of a GNU one.
    #[must_use]
    pub fn pax_named_file(mut self, path: &str, content: &[u8], attributes: &Attributes) -> Self {
        self.extensions(attributes, Some(path));
        let mut header = header(EntryType::Regular, attributes, content.len() as u64);
        self.tar.append_data(&mut header, "see-the-pax-header", content).unwrap();
        self
    }

    /// Ends the tar and compresses it.
    pub fn finish(self, compression: Compression) -> Layer {
        let (file, diff_id, _) = self.tar.into_inner().unwrap().finish();
        drop(file);
        let path = match compression {
            Compression::Plain => self.path,
            Compression::Gzip => compress(&self.path, "gz", |to| {
                flate2::write::GzEncoder::new(to, flate2::Compression::fast())
            }),
            Compression::Zstd => {
                compress(&self.path, "zst", |to| zstd::Encoder::new(to, 1).unwrap().auto_finish())
            }
        };
        Layer { blob: Blob::from_file(&path), compression, diff_id }
    }

    /// Ends the tar at `bytes` bytes, in the middle of whatever lies there.
    pub fn finish_cut_at(self, bytes: u64) -> Layer {
        let path = self.path.clone();
        let _ = self.tar.into_inner().unwrap().finish();
        File::options().write(true).open(&path).unwrap().set_len(bytes).unwrap();
        let blob = Blob::from_file(&path);
        Layer { diff_id: blob.digest, blob, compression: Compression::Plain }
    }

    fn add(
        mut self,
        kind: EntryType,
        path: &str,
        attributes: &Attributes,
        size: u64,
        content: impl Read,
    ) -> Self {
        self.extensions(attributes, None);
        let mut header = header(kind, attributes, size);
        self.tar.append_data(&mut header, path, content).unwrap();
        self
    }

    fn link(mut self, kind: EntryType, path: &str, target: &str, attributes: &Attributes) -> Self {
        self.extensions(attributes, None);
        self.tar.append_link(&mut header(kind, attributes, 0), path, target).unwrap();
        self
    }

    /// Writes a pax header for what the entry's own header has no room for.
    fn extensions(&mut self, attributes: &Attributes, path: Option<&str>) {
        let mut records: Vec<(String, Vec<u8>)> = Vec::new();
        if let (seconds, 1..) = attributes.mtime {
            let text = format!("{seconds}.{:09}", attributes.mtime.1);
            records.push(("mtime".to_owned(), text.into_bytes()));
        }
        if let Some(path) = path {
            records.push(("path".to_owned(), path.as_bytes().to_vec()));
        }
        let named =
            |(name, value): &(String, Vec<u8>)| (format!("SCHILY.xattr.{name}"), value.clone());
        records.extend(attributes.xattrs.iter().map(named));
        let records = records.iter().map(|(key, value)| (key.as_str(), value.as_slice()));
        self.tar.append_pax_extensions(records).unwrap();
    }
}

fn header(kind: EntryType, attributes: &Attributes, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(attributes.mode);
    header.set_uid(attributes.uid);
    header.set_gid(attributes.gid);
    header.set_mtime(attributes.mtime.0);
    header.set_size(size);
    header
}

fn compress<W: io::Write>(tar: &Path, suffix: &str, encoder: impl FnOnce(File) -> W) -> PathBuf {
    let path = tar.with_extension(suffix);
    let mut to = encoder(File::create(&path).unwrap());
    io::copy(&mut File::open(tar).unwrap(), &mut to).unwrap();
    drop(to);
    fs::remove_file(tar).unwrap();
    path
}
