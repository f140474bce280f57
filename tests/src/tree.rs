//! Comparing directory trees, bytes and everything else a reader can see.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use weightfs_store::Digest;

use crate::digest;

/// What a file is, with its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file with that size and digest.
    File(u64, Digest),
    /// A directory.
    Directory,
    /// A symbolic link to that target.
    Symlink(PathBuf),
    /// A character or block device, with its number.
    Device(char, u64),
    /// A fifo or a socket.
    Other(char),
}

/// What a reader can see of a file.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time in nanoseconds since the epoch.
    pub mtime: i128,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// The first path of its hard links, if it has others.
    pub linked_to: Option<PathBuf>,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, mode, uid, gid, mtime, .. } = self;
        write!(f, "{kind:?} {mode:o} {uid}:{gid} {mtime} ")?;
        write!(f, "xattrs {:?} linked {:?}", self.xattrs, self.linked_to)
    }
}

/// What of a tree is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All of it.
    Everything,
    /// All of it but the time of the root, which an unpack sets to now when the image has no entry
    /// for it.
    Image,
    /// Files only have bytes, mode and time compared, directories only their names: a model
    /// artifact of raw layers says no more.
    ModelFiles,
}

/// A tree, by path relative to its root. The root itself is the empty path.
pub type Tree = BTreeMap<PathBuf, Entry>;

/// Reads a whole tree.
pub fn read(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut links = BTreeMap::new();
    let mut open = vec![PathBuf::new()];
    while let Some(path) = open.pop() {
        let at = root.join(&path);
        let metadata =
            fs::symlink_metadata(&at).unwrap_or_else(|e| panic!("{}: {e}", at.display()));
        if metadata.is_dir() {
            let children = fs::read_dir(&at).unwrap_or_else(|e| panic!("{}: {e}", at.display()));
            open.extend(children.map(|child| path.join(child.unwrap().file_name())));
        } else if metadata.nlink() > 1 {
            links
                .entry((metadata.dev(), metadata.ino()))
                .or_insert_with(Vec::new)
                .push(path.clone());
        }
        tree.insert(path, entry(&at, &metadata));
    }
    for mut paths in links.into_values().filter(|paths| paths.len() > 1) {
        paths.sort();
        for path in &paths {
            tree.get_mut(path).unwrap().linked_to = Some(paths[0].clone());
        }
    }
    tree
}

/// Fails the test, naming each difference, if the trees are not the same.
pub fn assert_same(expected: &Path, found: &Path, scope: Scope) {
    assert_same_trees(&read(expected), &read(found), scope);
}

/// Fails the test, naming each difference, if the trees are not the same.
pub fn assert_same_trees(expected: &Tree, found: &Tree, scope: Scope) {
    let mut differences = Vec::new();
    for (path, entry) in expected {
        match found.get(path) {
            None => differences.push(format!("{}: is missing", path.display())),
            Some(other) if seen(path, entry, scope) != seen(path, other, scope) => {
                let name = path.display();
                differences.push(format!("{name}:\n  expected {entry:?}\n  found    {other:?}"));
            }
            Some(_) => {}
        }
    }
    let extra = found.keys().filter(|path| !expected.contains_key(*path));
    differences.extend(extra.map(|path| format!("{}: should not be there", path.display())));
    assert!(differences.is_empty(), "the trees differ:\n{}", differences.join("\n"));
}

/// The part of an entry that is compared.
fn seen(path: &Path, entry: &Entry, scope: Scope) -> Entry {
    let mut entry = entry.clone();
    if scope == Scope::Image && path.as_os_str().is_empty() {
        entry.mtime = 0;
    }
    if scope == Scope::ModelFiles {
        (entry.uid, entry.gid, entry.linked_to) = (0, 0, None);
        entry.xattrs.clear();
        if entry.kind == Kind::Directory {
            (entry.mode, entry.mtime) = (0, 0);
        }
    }
    entry
}

fn entry(at: &Path, metadata: &Metadata) -> Entry {
    let mtime = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
    Entry {
        kind: kind(at, metadata),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime,
        xattrs: xattrs(at),
        linked_to: None,
    }
}

fn kind(at: &Path, metadata: &Metadata) -> Kind {
    let kind = metadata.file_type();
    if kind.is_dir() {
        Kind::Directory
    } else if kind.is_symlink() {
        Kind::Symlink(fs::read_link(at).unwrap())
    } else if kind.is_file() {
        let digest = digest::of_file(at).unwrap_or_else(|e| panic!("read {}: {e}", at.display()));
        Kind::File(metadata.len(), digest)
    } else if kind.is_char_device() {
        Kind::Device('c', metadata.rdev())
    } else if kind.is_block_device() {
        Kind::Device('b', metadata.rdev())
    } else {
        Kind::Other(if kind.is_fifo() { 'p' } else { 's' })
    }
}

fn xattrs(at: &Path) -> BTreeMap<String, Vec<u8>> {
    let names = xattr::list(at).unwrap_or_else(|e| panic!("xattrs of {}: {e}", at.display()));
    let pairs = names.map(|name| {
        let value = xattr::get(at, &name).unwrap().unwrap_or_default();
        (name.to_string_lossy().into_owned(), value)
    });
    pairs.collect()
}
