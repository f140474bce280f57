//! What the mount shows, without FUSE: trees by number, inodes, attributes, reads.
//!
//! An inode number is `tree << 32 | node`, a pure function of what is mounted, so it means the
//! same after a restart. Inode 1 is the root: the directory of all trees, or, in a mount of one
//! model, that model's root directory itself.
//!
//! Invariants: a tree never changes once it was added. A removed tree vanishes from the root at
//! once, but its inodes are served until the kernel has forgotten them all: overlayfs remembers
//! a passing ENOENT below one of its layers for good. How often the kernel looked up inodes of a
//! tree is in the [`Ledger`] before the kernel has its answer, so that this holds across a restart.

mod lookups;

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde::{Deserialize, Serialize};
use weightfs_store::{Blob, Read, ReadError, SegmentHold};

use crate::counters::{MountCounters, TreeCounters};
use crate::ledger::Ledger;
use crate::loader::Loader;
use crate::profile::Recorder;
use crate::tree::{Content, Node, NodeId, NodeKind, Tree};

use lookups::{Inherited, Lookups};

/// The root directory's inode (`FUSE_ROOT_ID`).
pub const ROOT_INODE: u64 = 1;

/// Names a tree of a mount; at least 1, and never used again for another tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TreeNumber(pub u32);

impl fmt::Display for TreeNumber {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl TreeNumber {
    /// The name of the tree's directory below the root.
    pub fn directory_name(self) -> OsString {
        self.0.to_string().into()
    }

    /// The inode of a node of this tree.
    pub fn inode(self, node: NodeId) -> u64 {
        u64::from(self.0) << 32 | u64::from(node.0)
    }
}

/// `.` and `..`
const DOTS: usize = 2;

/// What a request of the kernel can meet.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// No such entry.
    #[error("no such entry")]
    NotFound,
    /// The inode belongs to no tree of this mount.
    #[error("inode {0:#x} belongs to no tree of this mount")]
    Stale(u64),
    /// A directory was expected.
    #[error("inode {0:#x} is not a directory")]
    NotADirectory(u64),
    /// A regular file was expected.
    #[error("inode {0:#x} is not a regular file")]
    NotAFile(u64),
    /// A symbolic link was expected.
    #[error("inode {0:#x} is not a symbolic link")]
    NotASymlink(u64),
    /// No such extended attribute.
    #[error("no such attribute")]
    NoAttribute,
    /// The store could not give the bytes.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// What the root directory is.
#[derive(Debug, Clone, Copy)]
enum Root {
    /// The directory of all trees.
    AllTrees,
    /// The root of this one tree.
    OneTree(TreeNumber),
}

/// The content of one mount.
#[derive(Debug)]
pub struct Filesystem {
    root: Root,
    ledger: Arc<Ledger>,
    counters: Arc<MountCounters>,
    /// What a predecessor counted of trees that were not added yet.
    inherited: Inherited,
    trees: RwLock<HashMap<TreeNumber, Arc<MountedTree>>>,
    /// The trees that the root shows, a subset of `trees`.
    shown: RwLock<BTreeMap<TreeNumber, Arc<MountedTree>>>,
}

/// A tree and how often the kernel holds one of its inodes.
#[derive(Debug)]
struct MountedTree {
    number: TreeNumber,
    tree: Tree,
    loader: Loader,
    recorder: OnceLock<Arc<Recorder>>,
    counters: Arc<TreeCounters>,
    lookups: Lookups,
}

/// An inode, resolved.
#[derive(Debug, Clone)]
pub enum Inode {
    /// The directory of all trees.
    Root,
    /// A node of a tree.
    Node(NodeRef),
}

/// A node, with the tree that it lives in.
#[derive(Debug, Clone)]
pub struct NodeRef {
    mounted: Arc<MountedTree>,
    id: NodeId,
}

/// An entry of a directory.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its name.
    pub name: OsString,
    /// What it names.
    pub inode: Inode,
}

impl Filesystem {
    /// A mount whose root lists all trees. A ledger that a predecessor wrote says what of them the
    /// kernel holds.
    ///
    /// # Errors
    /// When the ledger can't be read.
    pub fn of_trees(ledger: Arc<Ledger>) -> io::Result<Self> {
        Ok(Self {
            root: Root::AllTrees,
            inherited: Inherited::of(&ledger)?,
            ledger,
            counters: Arc::default(),
            trees: RwLock::default(),
            shown: RwLock::default(),
        })
    }

    /// A mount whose root is the root of one tree.
    ///
    /// # Errors
    /// When there is no memory for its ledger.
    pub fn of_one(number: TreeNumber, tree: Tree) -> io::Result<Self> {
        let ledger = Arc::new(Ledger::new()?);
        let filesystem = Self { root: Root::OneTree(number), ..Self::of_trees(ledger)? };
        filesystem.add(number, tree);
        Ok(filesystem)
    }

    /// What the kernel holds of it.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Shows a tree as directory [`TreeNumber::directory_name`] of the root. `false` if the kernel
    /// knows another tree by that number; then it is not shown.
    pub fn add(&self, number: TreeNumber, tree: Tree) -> bool {
        let Some(mounted) = self.serve(number, tree) else { return false };
        write(&self.shown).insert(number, mounted);
        true
    }

    /// Serves a tree that was removed from the root while the kernel held inodes of it, until it
    /// has forgotten them. `false` as for [`Filesystem::add`].
    pub fn add_removed(&self, number: TreeNumber, tree: Tree) -> bool {
        self.serve(number, tree).is_some()
    }

    fn serve(&self, number: TreeNumber, tree: Tree) -> Option<Arc<MountedTree>> {
        let lookups = match self.inherited.take(number) {
            None => Lookups::none(number, Arc::clone(&self.ledger)),
            Some(inherited) => inherited.resume(&tree, Arc::clone(&self.ledger))?,
        };
        tree.blobs().for_each(Blob::shown);
        let loader = Loader::of(&tree);
        let (recorder, counters) = Default::default();
        let mounted = Arc::new(MountedTree { number, loader, tree, recorder, counters, lookups });
        write(&self.trees).insert(number, Arc::clone(&mounted));
        Some(mounted)
    }

    /// Trees that the kernel holds inodes of and that were not added yet.
    pub fn awaited(&self) -> Vec<TreeNumber> {
        self.inherited.numbers()
    }

    /// Takes a tree out of the root. What of it the kernel still holds is served on. Says
    /// whether it was there.
    pub fn remove(&self, number: TreeNumber) -> bool {
        let removed = write(&self.shown).remove(&number);
        let Some(mounted) = removed else { return false };
        self.drop_if_forgotten(&mounted);
        true
    }

    /// Has all reads of a tree recorded from now on. None of its files is passed through: such
    /// reads can't be seen.
    pub fn record(&self, number: TreeNumber, recorder: Arc<Recorder>) {
        if let Some(mounted) = read(&self.shown).get(&number) {
            // One recorder is enough: the first stays.
            let _ = mounted.recorder.set(recorder);
        }
    }

    /// Runs `look` on a tree that is shown.
    pub fn with_tree<T>(&self, number: TreeNumber, look: impl FnOnce(&Tree) -> T) -> Option<T> {
        let mounted = read(&self.shown).get(&number).cloned()?;
        Some(look(&mounted.tree))
    }

    /// What was read of a tree that is shown.
    pub fn tree_counters(&self, number: TreeNumber) -> Option<Arc<TreeCounters>> {
        read(&self.shown).get(&number).map(|mounted| Arc::clone(&mounted.counters))
    }

    /// What was read of all trees.
    pub const fn counters(&self) -> &Arc<MountCounters> {
        &self.counters
    }

    /// Trees that are served: shown ones, and removed ones that the kernel has not forgotten.
    pub fn served(&self) -> usize {
        read(&self.trees).len()
    }

    /// Whether a tree is served, shown or not.
    pub fn serves(&self, number: TreeNumber) -> bool {
        read(&self.trees).contains_key(&number)
    }

    /// The inode of that number.
    pub fn inode(&self, number: u64) -> Result<Inode, FsError> {
        let (tree, node) = match (number, self.root) {
            (ROOT_INODE, Root::AllTrees) => return Ok(Inode::Root),
            (ROOT_INODE, Root::OneTree(tree)) => (tree, NodeId::ROOT),
            _ => (TreeNumber((number >> 32) as u32), NodeId(number as u32)),
        };
        let mounted = read(&self.trees).get(&tree).cloned().ok_or(FsError::Stale(number))?;
        mounted.tree.node(node).ok_or(FsError::Stale(number))?;
        Ok(Inode::Node(NodeRef { mounted, id: node }))
    }

    /// The number of an inode.
    pub fn number(&self, inode: &Inode) -> u64 {
        match (inode, self.root) {
            (Inode::Root, _) => ROOT_INODE,
            (Inode::Node(node), Root::OneTree(_)) if node.id == NodeId::ROOT => ROOT_INODE,
            (Inode::Node(node), _) => node.mounted.number.inode(node.id),
        }
    }

    /// The entry of a directory with that name, counted as looked up: the caller tells the
    /// kernel of it.
    pub fn lookup(&self, directory: u64, name: &OsStr) -> Result<Inode, FsError> {
        match self.inode(directory)? {
            Inode::Root => {
                let number = name.to_str().and_then(|name| name.parse().ok()).map(TreeNumber);
                let number = number.filter(|number| number.directory_name() == name);
                let shown = read(&self.shown);
                let mounted = number.and_then(|number| shown.get(&number));
                let mounted = mounted.ok_or(FsError::NotFound)?;
                // Counted under the lock, so that a removal sees the count.
                mounted.looked_up();
                Ok(Inode::Node(NodeRef { mounted: Arc::clone(mounted), id: NodeId::ROOT }))
            }
            Inode::Node(parent) => {
                parent.directory(directory)?;
                let id = parent.mounted.tree.child(parent.id, name).ok_or(FsError::NotFound)?;
                parent.mounted.looked_up();
                Ok(Inode::Node(NodeRef { id, ..parent }))
            }
        }
    }

    /// The entries of a directory from the `skip`-th on, in a stable order, given to `take`
    /// until it says that it is full (`false`). `.` and `..` come first.
    pub fn read_directory(
        &self,
        directory: u64,
        skip: u64,
        mut take: impl FnMut(u64, &OsStr, Inode) -> bool,
    ) -> Result<(), FsError> {
        let inode = self.inode(directory)?;
        let parent = match &inode {
            Inode::Root => Inode::Root,
            Inode::Node(node) => self.parent(node),
        };
        let mut position = skip;
        let mut give = |name: &OsStr, inode: Inode| {
            position += 1;
            take(position, name, inode)
        };
        let dots = [(OsStr::new("."), inode.clone()), (OsStr::new(".."), parent)];
        let first = usize::try_from(skip).unwrap_or(usize::MAX);
        if !dots.into_iter().skip(first).all(|(name, inode)| give(name, inode)) {
            return Ok(());
        }
        let first = first.saturating_sub(DOTS);
        match inode {
            Inode::Root => {
                // `take` may count a lookup: under the lock, so that a removal sees the count.
                read(&self.shown).values().skip(first).all(|mounted| {
                    let name = mounted.number.directory_name();
                    let mounted = Arc::clone(mounted);
                    give(&name, Inode::Node(NodeRef { mounted, id: NodeId::ROOT }))
                });
            }
            Inode::Node(node) => {
                let mounted = &node.mounted;
                let entries = mounted.tree.entries_from(node.id, first);
                entries.ok_or(FsError::NotADirectory(directory))?.all(|(name, id)| {
                    give(name, Inode::Node(NodeRef { mounted: Arc::clone(mounted), id }))
                });
            }
        }
        Ok(())
    }

    /// Bytes of a regular file: at most `size` from `offset` on, none behind its end. `None` is
    /// an empty read.
    pub fn read(&self, inode: u64, offset: u64, size: u32) -> Result<Option<Read>, FsError> {
        let node = self.node(inode)?;
        let content = node.content().ok_or(FsError::NotAFile(inode))?;
        let Some(range) = clip(&content.range, offset, size) else { return Ok(None) };
        if let Some(recorder) = node.mounted.recorder.get() {
            recorder.note(content.blob.id(), &range);
        }
        let (counters, bytes) = (&node.mounted.counters, range.end - range.start);
        let found = content.blob.read(range)?;
        match found {
            Read::Ready(_) => {
                counters.hits.increment();
                counters.hit_bytes.add(bytes);
            }
            Read::Missing(_) => {
                counters.misses.increment();
                counters.missed_bytes.add(bytes);
            }
        }
        Ok(Some(found))
    }

    /// What a loader is expected to read next, having read these bytes: to be fetched by
    /// [`Blob::expect`], off the FUSE threads. Mostly nothing.
    pub fn expected(&self, inode: u64, offset: u64, size: u32) -> Vec<Content> {
        match self.inode(inode) {
            Ok(Inode::Node(node)) => node.mounted.loader.on_read(node.id, offset, size.into()),
            Ok(Inode::Root) | Err(_) => vec![],
        }
    }

    /// What a loader is expected to read next, having opened this file, which is complete. As
    /// [`Filesystem::expected`].
    pub fn expected_after(&self, node: &NodeRef) -> Vec<Content> {
        node.mounted.loader.on_open_complete(node.id)
    }

    /// The node of that number; the directory of all trees is none.
    pub fn node(&self, inode: u64) -> Result<NodeRef, FsError> {
        match self.inode(inode)? {
            Inode::Node(node) => Ok(node),
            Inode::Root => Err(FsError::NotAFile(inode)),
        }
    }

    /// The kernel is told of this inode once more (by an entry of READDIRPLUS).
    pub fn looked_up(&self, inode: &Inode) {
        if let Inode::Node(node) = inode {
            node.mounted.looked_up();
        }
    }

    /// The kernel forgot `count` of its lookups of an inode. The last one of a removed tree
    /// drops the tree.
    pub fn forget(&self, inode: u64, count: u64) {
        let Ok(Inode::Node(node)) = self.inode(inode) else { return };
        if node.mounted.lookups.forget(count) == 0 {
            self.drop_if_forgotten(&node.mounted);
        }
    }

    /// Bytes of all files of all trees.
    pub fn content_bytes(&self) -> u64 {
        read(&self.shown).values().map(|mounted| mounted.tree.content_bytes()).sum()
    }

    fn parent(&self, node: &NodeRef) -> Inode {
        match (self.root, node.id) {
            (Root::AllTrees, NodeId::ROOT) => Inode::Root,
            _ => Inode::Node(NodeRef { id: node.get().parent, mounted: Arc::clone(&node.mounted) }),
        }
    }

    fn drop_if_forgotten(&self, mounted: &MountedTree) {
        if read(&self.shown).contains_key(&mounted.number) {
            return;
        }
        let mut trees = write(&self.trees);
        if mounted.lookups.end_if_none() {
            trees.remove(&mounted.number);
        }
    }
}

impl MountedTree {
    fn looked_up(&self) {
        self.lookups.add(&self.tree);
    }
}

impl NodeRef {
    /// The node itself.
    pub fn get(&self) -> &Node {
        self.mounted.tree.node(self.id).expect("made for a node of a tree that never changes")
    }

    /// The bytes of a regular file.
    pub fn content(&self) -> Option<&Content> {
        match &self.get().kind {
            NodeKind::File(content) => Some(content),
            _ => None,
        }
    }

    /// The cache file that holds the bytes of a regular file, all of them and nothing else;
    /// `None` if some are missing, the file shares its segment with others, or its reads are
    /// recorded. It stays as it is until the hold is dropped.
    ///
    /// # Errors
    /// When the cache file can't be opened.
    pub fn cache_file(&self) -> io::Result<Option<(File, SegmentHold)>> {
        let Some(Content { blob, range }) = self.content() else { return Ok(None) };
        if self.mounted.recorder.get().is_some() {
            return Ok(None);
        }
        let layout = blob.layout();
        match layout.segment_at(range.start) {
            Some(segment) if layout.segment(segment).as_ref() == Some(range) => {
                blob.segment_file(segment)
            }
            _ => Ok(None),
        }
    }

    /// The value of an extended attribute.
    pub fn xattr(&self, name: &OsStr) -> Result<&[u8], FsError> {
        let xattrs = &self.get().xattrs;
        let found = xattrs.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_slice()).ok_or(FsError::NoAttribute)
    }

    /// The target of a symbolic link.
    pub fn symlink(&self, inode: u64) -> Result<&OsStr, FsError> {
        match &self.get().kind {
            NodeKind::Symlink(target) => Ok(target),
            _ => Err(FsError::NotASymlink(inode)),
        }
    }

    fn directory(&self, inode: u64) -> Result<(), FsError> {
        match self.get().kind {
            NodeKind::Directory(_) => Ok(()),
            _ => Err(FsError::NotADirectory(inode)),
        }
    }
}

/// The bytes of the blob that a read of a file covers; `None` if it covers none.
fn clip(file: &Range<u64>, offset: u64, size: u32) -> Option<Range<u64>> {
    let start = file.start.checked_add(offset)?;
    let end = start.saturating_add(size.into()).min(file.end);
    (start < end).then_some(start..end)
}

// A panic while one of these locks is held can't leave a map half changed: go on.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
