//! What files a layer has and where their bytes lie in its blob.
//!
//! A listing says what the tar says: names are not cleaned and nothing is left out, because the
//! same blob can be a layer of an image and of a model. The tree gives them their meaning.
//!
//! Invariants: every file's bytes lie inside one segment of the layout, and every file of
//! [`LARGE_FILE_BYTES`] or more is a segment of its own.

mod text;

use std::ops::Range;

use serde::{Deserialize, Serialize};
use weightfs_store::{Layout, LayoutError};

use crate::listing::text::Text;
use crate::tree::{DeviceNumber, Timestamp};

/// Files from this size on are segments of their own, so that byte 0 of such a file is byte 0 of
/// a cache file, which passthrough needs. Below it a file is at most one chunk and the cost of a
/// cache file is not worth it.
pub const LARGE_FILE_BYTES: u64 = 1 << 20;

/// Changes when the stored form does; other versions are made anew.
const VERSION: u32 = 1;

/// The files of one layer, in the order of the tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    entries: Vec<Entry>,
    layout: Layout,
}

/// One member of a tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name, as the tar has it.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// 12 bits: rwx for owner, group and others, setuid, setgid and sticky.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// Extended attributes by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file whose bytes are that range of the blob.
    File(Range<u64>),
    /// Another name of an earlier file, by that file's name.
    HardLink(Vec<u8>),
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A directory.
    Directory,
    /// A character device.
    CharDevice(DeviceNumber),
    /// A block device.
    BlockDevice(DeviceNumber),
    /// A named pipe.
    Fifo,
}

impl Listing {
    /// The listing of a blob of `size` bytes, cut at its large files.
    ///
    /// # Errors
    /// When the files are not in order inside the blob, or there are too many large ones.
    pub fn new(entries: Vec<Entry>, size: u64) -> Result<Self, LayoutError> {
        let layout = Layout::new(size, cuts(&entries, size))?;
        Ok(Self { entries, layout })
    }

    /// The listing of a raw layer: the tree knows its file from the descriptor.
    pub fn raw(size: u64) -> Self {
        Self { entries: Vec::new(), layout: Layout::whole(size) }
    }

    /// The members, in the order of the tar.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The cuts of the blob.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The stored form, for [`Listing::from_bytes`].
    pub fn to_bytes(&self) -> Vec<u8> {
        let rows = self.entries.iter().map(Row::from).collect();
        let stored = Stored { version: VERSION, layout: self.layout.clone(), rows };
        serde_json::to_vec(&stored).unwrap_or_default()
    }

    /// Reads the stored form; `None` if it is of another version or damaged.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let stored: Stored = serde_json::from_slice(bytes).ok()?;
        let entries = stored.rows.into_iter().map(Entry::from).collect();
        let listing = Self { entries, layout: stored.layout };
        (stored.version == VERSION && listing.is_inside_segments()).then_some(listing)
    }

    fn is_inside_segments(&self) -> bool {
        self.entries.iter().all(|entry| match &entry.kind {
            EntryKind::File(range) if range.is_empty() => range.start == range.end,
            EntryKind::File(range) => {
                let segment = self.layout.segment_at(range.start);
                let segment = segment.and_then(|index| self.layout.segment(index));
                segment.is_some_and(|segment| range.end <= segment.end)
            }
            _ => true,
        })
    }
}

/// Where a file makes cuts in a blob, if it is large: before its first byte and after its last.
pub fn cuts_of(kind: &EntryKind) -> Option<[u64; 2]> {
    match kind {
        EntryKind::File(range) if range.end.saturating_sub(range.start) >= LARGE_FILE_BYTES => {
            Some([range.start, range.end])
        }
        _ => None,
    }
}

fn cuts(entries: &[Entry], size: u64) -> impl Iterator<Item = u64> {
    let cuts = entries.iter().filter_map(|entry| cuts_of(&entry.kind)).flatten();
    cuts.filter(move |cut| *cut != 0 && *cut != size)
}

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    layout: Layout,
    rows: Vec<Row>,
}

/// An entry as a JSON array, which is half the size of an object and as quickly read.
#[derive(Serialize, Deserialize)]
struct Row(Text, RowKind, u16, u32, u32, i64, u32, Vec<(Text, Text)>);

#[derive(Serialize, Deserialize)]
enum RowKind {
    #[serde(rename = "f")]
    File(u64, u64),
    #[serde(rename = "h")]
    HardLink(Text),
    #[serde(rename = "l")]
    Symlink(Text),
    #[serde(rename = "d")]
    Directory,
    #[serde(rename = "c")]
    CharDevice(u32, u32),
    #[serde(rename = "b")]
    BlockDevice(u32, u32),
    #[serde(rename = "p")]
    Fifo,
}

impl From<&Entry> for Row {
    fn from(entry: &Entry) -> Self {
        let text = |bytes: &Vec<u8>| Text(bytes.clone());
        let kind = match &entry.kind {
            EntryKind::File(range) => RowKind::File(range.start, range.end),
            EntryKind::HardLink(target) => RowKind::HardLink(text(target)),
            EntryKind::Symlink(target) => RowKind::Symlink(text(target)),
            EntryKind::Directory => RowKind::Directory,
            EntryKind::CharDevice(device) => RowKind::CharDevice(device.major, device.minor),
            EntryKind::BlockDevice(device) => RowKind::BlockDevice(device.major, device.minor),
            EntryKind::Fifo => RowKind::Fifo,
        };
        let xattrs = entry.xattrs.iter().map(|(name, value)| (text(name), text(value)));
        let Entry { permissions, uid, gid, mtime: Timestamp { seconds, nanos }, .. } = *entry;
        Self(text(&entry.path), kind, permissions, uid, gid, seconds, nanos, xattrs.collect())
    }
}

impl From<Row> for Entry {
    fn from(row: Row) -> Self {
        let Row(path, kind, permissions, uid, gid, seconds, nanos, xattrs) = row;
        let kind = match kind {
            RowKind::File(start, end) => EntryKind::File(start..end),
            RowKind::HardLink(target) => EntryKind::HardLink(target.0),
            RowKind::Symlink(target) => EntryKind::Symlink(target.0),
            RowKind::Directory => EntryKind::Directory,
            RowKind::CharDevice(major, minor) => {
                EntryKind::CharDevice(DeviceNumber { major, minor })
            }
            RowKind::BlockDevice(major, minor) => {
                EntryKind::BlockDevice(DeviceNumber { major, minor })
            }
            RowKind::Fifo => EntryKind::Fifo,
        };
        let xattrs = xattrs.into_iter().map(|(name, value)| (name.0, value.0)).collect();
        let mtime = Timestamp { seconds, nanos };
        Self { path: path.0, kind, permissions, uid, gid, mtime, xattrs }
    }
}

#[cfg(test)]
mod fuzz;

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &[u8], range: Range<u64>) -> Entry {
        Entry {
            path: path.to_vec(),
            kind: EntryKind::File(range),
            permissions: 0o644,
            uid: 1,
            gid: 2,
            mtime: Timestamp { seconds: -3, nanos: 4 },
            xattrs: vec![(b"user.a".to_vec(), vec![0, 0xff])],
        }
    }

    #[test]
    fn large_files_are_segments_of_their_own() {
        let large = 512..512 + LARGE_FILE_BYTES;
        let next = large.end + 512..large.end + 1024;
        let last = next.end + 512..next.end + 512 + LARGE_FILE_BYTES;
        let size = last.end;
        let entries = vec![file(b"a", large.clone()), file(b"b", next), file(b"c", last.clone())];
        let listing = Listing::new(entries, size).unwrap();
        let layout = listing.layout();
        let segments: Vec<_> = (0..layout.segments()).filter_map(|i| layout.segment(i)).collect();
        assert_eq!(segments, [0..512, large.clone(), large.end..last.start, last]);
        assert!(listing.is_inside_segments());
    }

    #[test]
    fn the_stored_form_is_the_same_listing() {
        let mut entries = vec![file(b"a\xff\n\"", 512..600), file("ü".as_bytes(), 0..0)];
        for kind in [
            EntryKind::HardLink(b"a".to_vec()),
            EntryKind::Symlink(b"\xfe".to_vec()),
            EntryKind::Directory,
            EntryKind::CharDevice(DeviceNumber { major: 1, minor: 3 }),
            EntryKind::BlockDevice(DeviceNumber { major: 8, minor: 0 }),
            EntryKind::Fifo,
        ] {
            entries.push(Entry { kind, ..file(b"x", 0..0) });
        }
        let listing = Listing::new(entries, 2048).unwrap();
        assert_eq!(Listing::from_bytes(&listing.to_bytes()).unwrap(), listing);
    }

    #[test]
    fn a_damaged_stored_form_is_refused() {
        let listing = Listing::new(vec![file(b"a", 512..600)], 1024).unwrap();
        let text = String::from_utf8(listing.to_bytes()).unwrap();
        assert!(Listing::from_bytes(text.as_bytes()).is_some());
        for (from, to) in [("\"version\":1", "\"version\":2"), ("[512,600]", "[512,6000]")] {
            assert!(Listing::from_bytes(text.replace(from, to).as_bytes()).is_none(), "{to}");
        }
        assert!(Listing::from_bytes(&text.as_bytes()[..text.len() - 1]).is_none());
    }
}
