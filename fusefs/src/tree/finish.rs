//! From drafts to numbered nodes: depth first, names in byte order.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::sync::Arc;

use super::merge::{Draft, DraftKind, Folder, Merger, ROOT};
use super::{Base, Children, Content, DeviceNumber, Node, NodeId, NodeKind, Tree};
use crate::layer::OpenLayer;

/// How overlayfs marks a directory that hides those below it.
const OPAQUE: (&str, &[u8]) = ("trusted.overlay.opaque", b"y");

/// How overlayfs knows that a directory may have whiteouts although no layer below has it; else
/// it would list them (`ovl_get_inode`, `ovl_path_check_origin_xattr`).
const MAY_HIDE: (&str, &[u8]) = ("trusted.overlay.origin", b"");

/// The drafts that are reachable, in the order of their numbers.
struct Numbering {
    /// Each with its parent's number.
    order: Vec<(usize, NodeId)>,
    /// By position among the drafts.
    numbers: Vec<Option<NodeId>>,
    /// By position among the drafts.
    links: Vec<u32>,
    /// By position among the drafts: whether a directory shows whiteouts.
    hides: Vec<bool>,
}

/// Numbers what is reachable and leaves out what is not.
pub fn finish(merger: Merger<'_>, layers: &[Arc<OpenLayer>]) -> Tree {
    let base = merger.base;
    let numbering = number(&merger.drafts);
    let mut drafts: Vec<_> = merger.drafts.into_iter().map(Some).collect();
    let mut tree = Tree {
        nodes: Vec::with_capacity(numbering.order.len()),
        origins: Vec::with_capacity(numbering.order.len()),
        layers: layers.iter().map(|layer| layer.descriptor.digest).collect(),
        content_bytes: 0,
    };
    for (position, parent) in &numbering.order {
        let Some(draft) = drafts.get_mut(*position).and_then(Option::take) else { continue };
        tree.origins.push(draft.origin);
        let node = node(draft, *position, *parent, base, layers, &numbering);
        if let NodeKind::File(content) = &node.kind {
            tree.content_bytes += content.range.end.saturating_sub(content.range.start);
        }
        tree.nodes.push(node);
    }
    tree
}

/// Walks with a stack of its own: links can make trees that are deeper than any path.
fn number(drafts: &[Draft]) -> Numbering {
    let mut numbers = vec![None; drafts.len()];
    let mut links = vec![0_u32; drafts.len()];
    let mut hides = vec![false; drafts.len()];
    let mut order: Vec<(usize, NodeId)> = Vec::new();
    // Position, parent's number, and whether foreign layers are hidden there.
    let mut open = vec![(ROOT, NodeId::ROOT, false)];
    while let Some((position, parent, hidden)) = open.pop() {
        let (Some(draft), Some(number)) = (drafts.get(position), numbers.get_mut(position)) else {
            continue;
        };
        // Below an opaque directory there is nothing for a whiteout to hide, and overlayfs would
        // list it.
        if hidden && matches!(draft.kind, DraftKind::Whiteout) {
            continue;
        }
        let folder = match &draft.kind {
            DraftKind::Directory(folder) => Some(folder),
            _ => None,
        };
        let own_links = folder.map_or(1, |folder| 2 + subdirectories(folder, drafts));
        if let Some(links) = links.get_mut(position) {
            *links += own_links;
        }
        if number.is_some() {
            continue;
        }
        let id = NodeId(u32::try_from(order.len()).unwrap_or(u32::MAX));
        *number = Some(id);
        order.push((position, parent));
        if let Some(Folder { names, opaque }) = folder {
            let hidden = hidden || *opaque;
            if let Some(hides) = hides.get_mut(position) {
                *hides = !hidden && names.values().any(|slot| is_whiteout(drafts, slot.node));
            }
            open.extend(names.values().rev().map(|slot| (slot.node, id, hidden)));
        }
    }
    Numbering { order, numbers, links, hides }
}

fn is_whiteout(drafts: &[Draft], position: usize) -> bool {
    drafts.get(position).is_some_and(|draft| matches!(draft.kind, DraftKind::Whiteout))
}

fn subdirectories(folder: &Folder, drafts: &[Draft]) -> u32 {
    let is_directory = |position: usize| {
        drafts.get(position).is_some_and(|draft| matches!(draft.kind, DraftKind::Directory(_)))
    };
    let count = folder.names.values().filter(|slot| is_directory(slot.node)).count();
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn node(
    draft: Draft,
    position: usize,
    parent: NodeId,
    base: Base,
    layers: &[Arc<OpenLayer>],
    numbering: &Numbering,
) -> Node {
    let Draft { kind, permissions, uid, gid, mtime, xattrs, origin: _ } = draft;
    let links = numbering.links.get(position).copied().unwrap_or_default();
    let mut xattrs: Vec<_> =
        xattrs.into_iter().map(|(name, value)| (OsString::from_vec(name), value)).collect();
    if let DraftKind::Directory(Folder { opaque, .. }) = &kind
        && base == Base::Foreign
    {
        let hides = numbering.hides.get(position).copied().unwrap_or_default();
        let marks = [opaque.then_some(OPAQUE), hides.then_some(MAY_HIDE)];
        let marks = marks.into_iter().flatten();
        xattrs.extend(marks.map(|(name, value)| (OsString::from(name), value.to_vec())));
        xattrs.sort();
    }
    let kind = match kind {
        DraftKind::Directory(folder) => NodeKind::Directory(children(folder, numbering)),
        DraftKind::File { layer, range } => {
            // The position comes from merging these very layers.
            NodeKind::File(Content { blob: Arc::clone(&layers[layer].blob), range })
        }
        DraftKind::Symlink(target) => NodeKind::Symlink(OsString::from_vec(target)),
        DraftKind::CharDevice(number) => NodeKind::CharDevice(number),
        DraftKind::BlockDevice(number) => NodeKind::BlockDevice(number),
        DraftKind::Fifo => NodeKind::Fifo,
        DraftKind::Whiteout => NodeKind::CharDevice(DeviceNumber::default()),
    };
    Node { parent, kind, permissions, uid, gid, mtime, links, xattrs }
}

fn children(folder: Folder, numbering: &Numbering) -> Children {
    let numbered = folder.names.into_iter().filter_map(|(name, slot)| {
        let number = numbering.numbers.get(slot.node).copied().flatten()?;
        Some((Box::from(OsStr::from_bytes(&name)), number))
    });
    Children(numbered.collect())
}
