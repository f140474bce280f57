//! From a chain of snapshots to the mounts that show it, as containerd's overlay snapshotter
//! gives them: a bind mount where one directory is enough, else overlay.
//!
//! Lazy layers that follow each other are merged in the tree of the uppermost, so they are one
//! lower directory. Paths are whole: containerd shortens lower directories with a common beginning
//! when the options don't fit in the page that mount(2) takes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::directories::Directories;
use super::layer::LayerMounter;
use crate::metadata::{Backing, Copies, Kind, Record};

/// A mount for containerd to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `bind` or `overlay`.
    pub kind: MountKind,
    /// The directory of a bind mount; `overlay` for overlay.
    pub source: String,
    /// Where below the mount point; empty: the mount point itself.
    pub target: String,
    /// As in fstab.
    pub options: Vec<String>,
}

/// The file system types in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountKind {
    /// A directory shown elsewhere.
    Bind,
    /// Layers.
    Overlay,
}

impl MountKind {
    /// The name that containerd's mounts use.
    pub fn as_str(self) -> &'static str {
        match self {
            MountKind::Bind => "bind",
            MountKind::Overlay => "overlay",
        }
    }
}

/// The end of the keys under which containerd, all versions of it, changes the owners of an image's
/// files for a user namespace, one after the other.
const REMAP: &str = "-remap";

/// Options that every overlay mount on this machine gets.
#[derive(Debug, Clone, Default)]
pub(super) struct OverlayOptions {
    all: Vec<String>,
    /// Those of a snapshot with [`Copies::Attributes`], and of all above it.
    attributes: Option<&'static str>,
}

impl OverlayOptions {
    /// Asks the kernel what containerd's overlay snapshotter asks.
    pub(super) fn detect() -> OverlayOptions {
        let mut options = Vec::new();
        // The index keeps an upper directory from being mounted twice, which containerd does.
        if Path::new("/sys/module/overlay/parameters/index").exists() {
            options.push("index=off".to_owned());
        }
        let metacopy = Path::new("/sys/module/overlay/parameters/metacopy").exists();
        let mut attributes = metacopy.then_some("metacopy=on");
        // Without rights outside its user namespace, overlay can't write trusted.* attributes.
        if in_user_namespace() {
            options.push("userxattr".to_owned());
            attributes = None;
        }
        OverlayOptions { all: options, attributes }
    }
}

/// What of files lies in the upper directory of a new snapshot. A change of owner copies a file as a
/// whole, and so fetches it: a model would be fetched, and be there twice, because a pod has a user
/// namespace. Only for that, since programs that look for changes in the upper directory itself
/// would take its files for empty (buildkit).
pub(super) fn copies(key: &str) -> Copies {
    if key.ends_with(REMAP) { Copies::Attributes } else { Copies::Whole }
}

fn copies_attributes(record: &Record) -> bool {
    matches!(record.backing, Backing::Directory { copies: Copies::Attributes, .. })
}

fn in_user_namespace() -> bool {
    let everything = ["0", "0", "4294967295"];
    // Without user namespaces in the kernel there is no such file, and nobody is in one.
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !map.split_whitespace().eq(everything))
}

/// The directory that shows a committed snapshot: of an ordinary one its own files, of a lazy one
/// those of its lazy parents as well.
pub(super) fn shown_by(
    record: &Record,
    directories: &Directories,
    mounter: &dyn LayerMounter,
) -> PathBuf {
    match record.backing {
        Backing::Directory { id, .. } => directories.files(id),
        Backing::Lazy { tree, .. } => mounter.directory(tree),
    }
}

/// The directories that show a chain of ancestors (nearest first), the uppermost first.
pub(super) fn lower_directories(
    ancestors: &[Arc<Record>],
    directories: &Directories,
    mounter: &dyn LayerMounter,
) -> Vec<PathBuf> {
    let is_lazy = |record: &Record| matches!(record.backing, Backing::Lazy { .. });
    let mut lower = Vec::new();
    let mut above_is_lazy = false;
    for record in ancestors {
        let merged_above = above_is_lazy && is_lazy(record);
        if !merged_above {
            lower.push(shown_by(record, directories, mounter));
        }
        above_is_lazy = is_lazy(record);
    }
    lower
}

/// The mounts of an active snapshot or a view.
pub(super) fn mounts(
    record: &Record,
    ancestors: &[Arc<Record>],
    lower: &[PathBuf],
    directories: &Directories,
    overlay: &OverlayOptions,
) -> Vec<Mount> {
    let Backing::Directory { id, .. } = record.backing else { return Vec::new() };
    let active = record.info.kind == Kind::Active;
    let mount = match lower {
        [] => bind(&directories.files(id), if active { "rw" } else { "ro" }),
        [only] if !active => bind(only, "ro"),
        _ => {
            let mut options = overlay.all.clone();
            if copies_attributes(record) || ancestors.iter().any(|below| copies_attributes(below)) {
                options.extend(overlay.attributes.map(str::to_owned));
            }
            if active {
                options.push(option("workdir", &directories.work(id)));
                options.push(option("upperdir", &directories.files(id)));
            }
            let lower: Vec<_> = lower.iter().map(|path| path.display().to_string()).collect();
            options.push(format!("lowerdir={}", lower.join(":")));
            let source = "overlay".to_owned();
            Mount { kind: MountKind::Overlay, source, target: String::new(), options }
        }
    };
    vec![mount]
}

fn bind(directory: &Path, access: &str) -> Mount {
    Mount {
        kind: MountKind::Bind,
        source: directory.display().to_string(),
        target: String::new(),
        options: vec![access.to_owned(), "rbind".to_owned()],
    }
}

fn option(name: &str, path: &Path) -> String {
    format!("{name}={}", path.display())
}
