//! Unpacking layers in order, in memory.
//!
//! Every name remembers the last layer that put it or needed it as a parent. That is how a
//! whiteout or an opaque marker tells what lower layers brought from what its own layer brings,
//! in whatever order the tar has them. Replaced subtrees stay among the drafts, unreachable.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use weightfs_store::Digest;

use super::{Base, DeviceNumber, MAX_NODES, Timestamp, TreeError, TreeProblem};
use crate::artifact::{LayerContent, RawFile, RawKind};
use crate::listing::{Entry, EntryKind};
use crate::path::{MAX_COMPONENT_BYTES, PathError, clean, clean_model, shown};

/// Symbolic links on the way to one path at the most, as in containerd's fs.RootPath.
pub const MAX_LINKS: usize = 255;

/// Directories in each other at the most: what Linux's `PATH_MAX` leaves room for.
pub const MAX_DEPTH: usize = 2048;

/// Replaced files of one layer that are named in the log at the most.
const MAX_WARNINGS: u64 = 20;

/// Prefix of whiteouts (image-spec, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// Prefix of aufs's own files, which are no files of the image.
const AUFS: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A layer to merge.
#[derive(Debug)]
pub struct Input<'a> {
    pub digest: Digest,
    /// Bytes of a raw layer.
    pub size: u64,
    pub content: &'a LayerContent,
    pub entries: &'a [Entry],
}

/// A node that is not numbered yet.
#[derive(Debug)]
pub struct Draft {
    pub kind: DraftKind,
    pub permissions: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
    /// Sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Position of the layer that describes it; `None` if none does.
    pub origin: Option<usize>,
}

#[derive(Debug)]
pub enum DraftKind {
    Directory(Folder),
    File { layer: usize, range: Range<u64> },
    Symlink(Vec<u8>),
    CharDevice(DeviceNumber),
    BlockDevice(DeviceNumber),
    Fifo,
    Whiteout,
}

#[derive(Debug, Default)]
pub struct Folder {
    pub names: BTreeMap<Box<[u8]>, Slot>,
    /// Hides what foreign layers below have at its path.
    pub opaque: bool,
}

/// What a name stands for.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    /// Position among the drafts.
    pub node: usize,
    /// Position of the last layer that put the name or needed it as a parent.
    layer: usize,
}

/// The tree as far as layers were unpacked.
#[derive(Debug)]
pub struct Merger<'a> {
    pub base: Base,
    /// The first is the root.
    pub drafts: Vec<Draft>,
    inputs: Vec<Input<'a>>,
    /// Position of the layer that is being unpacked.
    layer: usize,
    /// The layer whose file the last entry replaced, where that is unusual.
    replaced: Option<usize>,
}

/// The root's position among the drafts.
pub const ROOT: usize = 0;

/// What to do about a parent that is not there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Make,
    Refuse,
}

/// One step on the way to a directory.
enum Step {
    Directory(usize),
    Link(Vec<u8>),
    Nothing,
    /// Something that is no directory, by the layer that put it there.
    Other(usize),
}

impl<'a> Merger<'a> {
    /// Unpacks all layers, from the lowest to the highest.
    pub fn run(inputs: Vec<Input<'a>>, base: Base) -> Result<Self, TreeError> {
        let mtime = inputs.first().map_or_else(Timestamp::default, |input| created(input.content));
        let root = Draft::made_up(mtime);
        let mut merger = Self { base, drafts: vec![root], inputs, layer: 0, replaced: None };
        for layer in 0..merger.inputs.len() {
            merger.layer = layer;
            merger.unpack()?;
        }
        Ok(merger)
    }

    fn unpack(&mut self) -> Result<(), TreeError> {
        let Some(&Input { digest, size, content, entries }) = self.inputs.get(self.layer) else {
            return Ok(());
        };
        let place = |path: &[u8]| {
            let path = shown(path);
            move |problem| TreeError { layer: digest, path, problem }
        };
        match content {
            LayerContent::Raw(file) => {
                let path = file.path.as_os_str().as_encoded_bytes();
                self.raw_file(file, path, size).map_err(place(path))?;
                self.warn_of_replacement(path, 0);
            }
            LayerContent::ModelTar { .. } => self.unpack_model(digest, entries)?,
            LayerContent::ImageTar => {
                for entry in entries {
                    self.image_entry(entry).map_err(place(&entry.path))?;
                }
            }
        }
        Ok(())
    }

    fn unpack_model(&mut self, layer: Digest, entries: &[Entry]) -> Result<(), TreeError> {
        let (mut skipped, mut replaced) = (0_u64, 0_u64);
        for entry in entries {
            let taken = self.model_entry(entry).map_err(|problem| TreeError {
                layer,
                path: shown(&entry.path),
                problem,
            })?;
            skipped += u64::from(!taken);
            replaced += u64::from(self.warn_of_replacement(&entry.path, replaced));
        }
        if skipped > 0 {
            tracing::warn!(%layer, skipped, "devices and fifos in a model are left out");
        }
        if replaced > MAX_WARNINGS {
            tracing::warn!(%layer, replaced, "more files were replaced than were named");
        }
        Ok(())
    }

    /// Logs that the last entry replaced a file of a lower layer, if it did and not too many were
    /// logged before.
    fn warn_of_replacement(&mut self, path: &[u8], before: u64) -> bool {
        let Some(lower) = self.replaced.take() else { return false };
        if before < MAX_WARNINGS {
            tracing::warn!(
                path = shown(path),
                lower = %self.digest(lower),
                upper = %self.digest(self.layer),
                "two layers of a model have this file: the upper one counts"
            );
        }
        true
    }

    fn raw_file(&mut self, file: &RawFile, path: &[u8], size: u64) -> Result<(), TreeProblem> {
        let components = clean(path)?;
        let Some((name, parents)) = components.split_last() else { return Ok(()) };
        let kind = match file.kind {
            RawKind::File => DraftKind::File { layer: self.layer, range: 0..size },
            RawKind::Directory => DraftKind::Directory(Folder::default()),
        };
        let RawFile { permissions, uid, gid, mtime, .. } = *file;
        let origin = Some(self.layer);
        let parent = self.parent(parents)?;
        self.put(parent, name, Draft { kind, permissions, uid, gid, mtime, xattrs: vec![], origin })
    }

    /// Whether the entry was taken.
    fn model_entry(&mut self, entry: &Entry) -> Result<bool, TreeProblem> {
        let components = clean_model(&entry.path)?;
        let Some((name, parents)) = components.split_last() else { return Ok(true) };
        let kind = match &entry.kind {
            EntryKind::HardLink(target) => {
                let parent = self.parent(parents)?;
                self.hard_link(parent, name, target, &clean_model(target)?)?;
                return Ok(true);
            }
            EntryKind::CharDevice(_) | EntryKind::BlockDevice(_) | EntryKind::Fifo => {
                return Ok(false);
            }
            other => self.draft_kind(other),
        };
        let parent = self.parent(parents)?;
        // The owner becomes root, so a set-id bit would give root's rights.
        let permissions = entry.permissions & 0o777;
        let user = entry.xattrs.iter().filter(|(name, _)| name.starts_with(b"user."));
        let xattrs = sorted(user.filter(|(name, _)| !name.starts_with(b"user.overlay.")));
        let (mtime, origin) = (entry.mtime, Some(self.layer));
        self.put(parent, name, Draft { kind, permissions, uid: 0, gid: 0, mtime, xattrs, origin })?;
        Ok(true)
    }

    fn image_entry(&mut self, entry: &Entry) -> Result<(), TreeProblem> {
        let components = clean(&entry.path)?;
        // The root's own entry changes nothing: containerd leaves it out as well.
        let Some((name, parents)) = components.split_last() else { return Ok(()) };
        let aufs = |component: &&[u8]| component.starts_with(AUFS);
        if parents.iter().any(aufs) || (aufs(name) && *name != OPAQUE) {
            return Ok(());
        }
        let parent = self.parent(parents)?;
        if *name == OPAQUE {
            return self.make_opaque(parent);
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return self.whiteout(parent, hidden);
        }
        let hard_link = match &entry.kind {
            EntryKind::HardLink(target) => {
                Some(self.hard_link(parent, name, target, &clean(target)?)?)
            }
            _ => None,
        };
        let kind = self.draft_kind(&entry.kind);
        // An overlay's own attributes would change what overlayfs makes of our layer.
        let foreign = |name: &[u8]| {
            name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.")
        };
        let xattrs = sorted(entry.xattrs.iter().filter(|(name, _)| !foreign(name)));
        let Entry { permissions, uid, gid, mtime, .. } = *entry;
        let origin = Some(self.layer);
        let draft = Draft { kind, permissions, uid, gid, mtime, xattrs, origin };
        match hard_link {
            Some(node) => self.update_linked(node, draft),
            None => self.put(parent, name, draft)?,
        }
        Ok(())
    }

    fn draft_kind(&self, kind: &EntryKind) -> DraftKind {
        match kind {
            EntryKind::File(range) => DraftKind::File { layer: self.layer, range: range.clone() },
            EntryKind::Symlink(target) => DraftKind::Symlink(target.clone()),
            EntryKind::CharDevice(number) => DraftKind::CharDevice(*number),
            EntryKind::BlockDevice(number) => DraftKind::BlockDevice(*number),
            EntryKind::Fifo => DraftKind::Fifo,
            EntryKind::Directory => DraftKind::Directory(Folder::default()),
            // Links are handled where they can be resolved.
            EntryKind::HardLink(target) => DraftKind::Symlink(target.clone()),
        }
    }

    /// Puts a node at a name. A directory over a directory changes its metadata only; all else
    /// replaces what is there.
    fn put(&mut self, parent: usize, name: &[u8], mut draft: Draft) -> Result<(), TreeProblem> {
        if let Some(slot) = self.slot(parent, name) {
            match (self.folder(slot.node).is_some(), &mut draft.kind) {
                (true, DraftKind::Directory(_)) => {
                    self.update_metadata(slot.node, draft);
                    return self.set_slot(parent, name, slot.node);
                }
                // What foreign layers have at this path was hidden, and stays so.
                (false, DraftKind::Directory(folder)) => folder.opaque = true,
                _ => {}
            }
            self.check_replacement(slot, matches!(draft.kind, DraftKind::Directory(_)))?;
        }
        let node = self.add(draft)?;
        self.set_slot(parent, name, node)
    }

    /// In a model, layers don't replace directories by files or the other way round, and what
    /// they replace is worth a warning. In an image both are usual.
    fn check_replacement(
        &mut self,
        slot: Slot,
        upper_is_directory: bool,
    ) -> Result<(), TreeProblem> {
        let upper = self.inputs.get(self.layer);
        if upper.is_none_or(|input| matches!(input.content, LayerContent::ImageTar)) {
            return Ok(());
        }
        let lower = self.digest(slot.layer);
        match (self.folder(slot.node).is_some(), upper_is_directory) {
            (true, false) => return Err(TreeProblem::FileOverDirectory { lower }),
            (false, true) => return Err(TreeProblem::DirectoryOverFile { lower }),
            _ => {}
        }
        if slot.layer != self.layer {
            self.replaced = Some(slot.layer);
        }
        Ok(())
    }

    /// A directory's metadata is that of the last layer that lists it, attributes included:
    /// containerd unpacks each layer into an empty upper directory.
    fn update_metadata(&mut self, node: usize, update: Draft) {
        let Some(draft) = self.drafts.get_mut(node) else { return };
        let Draft { permissions, uid, gid, mtime, xattrs, origin, kind: _ } = update;
        (draft.permissions, draft.uid, draft.gid) = (permissions, uid, gid);
        (draft.mtime, draft.origin) = (mtime, origin);
        draft.xattrs = xattrs;
    }

    /// As an unpack does that meets another name of a file: it sets what the name's header has,
    /// and removes no attribute.
    fn update_linked(&mut self, node: usize, update: Draft) {
        let Some(draft) = self.drafts.get_mut(node) else { return };
        let old = std::mem::take(&mut draft.xattrs).into_iter();
        let merged: BTreeMap<_, _> = old.chain(update.xattrs).collect();
        let (xattrs, origin) = (merged.into_iter().collect(), draft.origin);
        self.update_metadata(node, Draft { xattrs, origin, ..update });
    }

    /// Another name for a file; which file.
    fn hard_link(
        &mut self,
        parent: usize,
        name: &[u8],
        target: &[u8],
        components: &[&[u8]],
    ) -> Result<usize, TreeProblem> {
        let refuse = || TreeProblem::HardLink { target: shown(target) };
        let (last, parents) = components.split_last().ok_or_else(refuse)?;
        let directory = self.descend(parents, Missing::Refuse)?.ok_or_else(refuse)?;
        let found = self.slot(directory, last).ok_or_else(refuse)?;
        let draft = self.drafts.get(found.node).ok_or_else(refuse)?;
        if matches!(draft.kind, DraftKind::Directory(_) | DraftKind::Whiteout) {
            return Err(refuse());
        }
        if let Some(slot) = self.slot(parent, name)
            && slot.node != found.node
        {
            self.check_replacement(slot, false)?;
        }
        self.set_slot(parent, name, found.node)?;
        Ok(found.node)
    }

    fn whiteout(&mut self, parent: usize, name: &[u8]) -> Result<(), TreeProblem> {
        if matches!(name, b"" | b"." | b"..") {
            return Err(TreeProblem::Whiteout);
        }
        match self.slot(parent, name) {
            Some(slot) if slot.layer == self.layer => {
                // This layer's own entry stays, without what lower layers have in it.
                if self.folder(slot.node).is_some() {
                    self.hide_lower(slot.node);
                }
                Ok(())
            }
            _ if self.base == Base::Foreign => {
                let kind = DraftKind::Whiteout;
                let origin = Some(self.layer);
                let node = self.add(Draft { kind, permissions: 0, origin, ..Draft::empty() })?;
                self.set_slot(parent, name, node)
            }
            _ => {
                if let Some(folder) = self.folder_mut(parent) {
                    folder.names.remove(name);
                }
                Ok(())
            }
        }
    }

    fn make_opaque(&mut self, directory: usize) -> Result<(), TreeProblem> {
        if directory == ROOT && self.base == Base::Foreign {
            return Err(TreeProblem::OpaqueRoot);
        }
        self.hide_lower(directory);
        Ok(())
    }

    /// Removes from a directory what lower layers have in it, at any depth.
    fn hide_lower(&mut self, directory: usize) {
        let layer = self.layer;
        if let Some(folder) = self.folder_mut(directory) {
            folder.opaque = true;
        }
        let mut open = vec![directory];
        while let Some(directory) = open.pop() {
            let Some(folder) = self.folder_mut(directory) else { continue };
            folder.names.retain(|_, slot| slot.layer == layer);
            open.extend(folder.names.values().map(|slot| slot.node));
        }
    }

    /// The directory that a new entry goes into; made where it is missing.
    fn parent(&mut self, components: &[&[u8]]) -> Result<usize, TreeProblem> {
        Ok(self.descend(components, Missing::Make)?.unwrap_or(ROOT))
    }

    /// Goes down from the root, through symbolic links, never above the root. `None` if it leads
    /// to no directory and none shall be made.
    fn descend(
        &mut self,
        components: &[&[u8]],
        missing: Missing,
    ) -> Result<Option<usize>, TreeProblem> {
        let mut todo: Vec<Cow<'_, [u8]>> =
            components.iter().rev().map(|component| Cow::Borrowed(*component)).collect();
        let mut above = Vec::new();
        let mut here = ROOT;
        let mut links = 0;
        while let Some(name) = todo.pop() {
            if matches!(&*name, b"" | b".") {
                continue;
            }
            if &*name == b".." {
                here = above.pop().unwrap_or(ROOT);
                continue;
            }
            let next = match (self.step(here, &name), missing) {
                (Step::Link(target), _) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(TreeProblem::Links);
                    }
                    if target.starts_with(b"/") {
                        above.clear();
                        here = ROOT;
                    }
                    let parts = target.split(|byte| *byte == b'/').rev();
                    todo.extend(parts.map(|part| Cow::Owned(part.to_vec())));
                    continue;
                }
                (Step::Directory(node), Missing::Make) => {
                    self.set_slot(here, &name, node)?;
                    node
                }
                (Step::Directory(node), Missing::Refuse) => node,
                (Step::Nothing, Missing::Make) => self.make_directory(here, &name)?,
                (Step::Other(layer), Missing::Make) => {
                    let lower = self.digest(layer);
                    return Err(TreeProblem::NeedsDirectory { lower });
                }
                (Step::Nothing | Step::Other(_), Missing::Refuse) => return Ok(None),
            };
            above.push(here);
            here = next;
            if above.len() > MAX_DEPTH {
                return Err(TreeProblem::Depth);
            }
        }
        Ok(Some(here))
    }

    fn step(&self, directory: usize, name: &[u8]) -> Step {
        let Some(slot) = self.slot(directory, name) else { return Step::Nothing };
        match self.drafts.get(slot.node).map(|draft| &draft.kind) {
            Some(DraftKind::Directory(_)) => Step::Directory(slot.node),
            Some(DraftKind::Symlink(target)) => Step::Link(target.clone()),
            Some(DraftKind::Whiteout) | None => Step::Nothing,
            Some(_) => Step::Other(slot.layer),
        }
    }

    fn make_directory(&mut self, parent: usize, name: &[u8]) -> Result<usize, TreeProblem> {
        if name.len() > MAX_COMPONENT_BYTES {
            return Err(PathError::ComponentTooLong.into());
        }
        let content = self.inputs.get(self.layer).map(|input| input.content);
        let mut draft = Draft::made_up(content.map(created).unwrap_or_default());
        if let DraftKind::Directory(folder) = &mut draft.kind {
            // A whiteout that it replaces hid what foreign layers have here.
            folder.opaque = self.slot(parent, name).is_some();
        }
        let node = self.add(draft)?;
        self.set_slot(parent, name, node)?;
        Ok(node)
    }

    fn add(&mut self, draft: Draft) -> Result<usize, TreeProblem> {
        if self.drafts.len() >= MAX_NODES {
            return Err(TreeProblem::TooMany);
        }
        self.drafts.push(draft);
        Ok(self.drafts.len() - 1)
    }

    fn slot(&self, directory: usize, name: &[u8]) -> Option<Slot> {
        self.folder(directory)?.names.get(name).copied()
    }

    /// Lets a name stand for a node, as this layer has it.
    fn set_slot(&mut self, parent: usize, name: &[u8], node: usize) -> Result<(), TreeProblem> {
        let slot = Slot { node, layer: self.layer };
        let lower = self.digest(self.layer);
        let folder = self.folder_mut(parent).ok_or(TreeProblem::NeedsDirectory { lower })?;
        match folder.names.get_mut(name) {
            Some(known) => *known = slot,
            None => {
                folder.names.insert(name.into(), slot);
            }
        }
        Ok(())
    }

    pub(super) fn folder(&self, node: usize) -> Option<&Folder> {
        match &self.drafts.get(node)?.kind {
            DraftKind::Directory(folder) => Some(folder),
            _ => None,
        }
    }

    pub(super) fn folder_mut(&mut self, node: usize) -> Option<&mut Folder> {
        match &mut self.drafts.get_mut(node)?.kind {
            DraftKind::Directory(folder) => Some(folder),
            _ => None,
        }
    }

    fn digest(&self, layer: usize) -> Digest {
        self.inputs.get(layer).map_or(Digest::from_raw([0; 32]), |input| input.digest)
    }
}

impl Draft {
    fn empty() -> Self {
        Self {
            kind: DraftKind::Fifo,
            permissions: 0,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: Vec::new(),
            origin: None,
        }
    }

    /// A directory that no layer describes.
    fn made_up(mtime: Timestamp) -> Self {
        let kind = DraftKind::Directory(Folder::default());
        Self { kind, permissions: 0o755, mtime, ..Self::empty() }
    }
}

/// When the artifact of a layer was made, if that is known.
fn created(content: &LayerContent) -> Timestamp {
    match content {
        LayerContent::Raw(RawFile { created, .. }) | LayerContent::ModelTar { created } => *created,
        LayerContent::ImageTar => Timestamp::default(),
    }
}

fn sorted<'a>(xattrs: impl Iterator<Item = &'a (Vec<u8>, Vec<u8>)>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut xattrs: Vec<_> = xattrs.cloned().collect();
    xattrs.sort();
    xattrs
}
