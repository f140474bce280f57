use super::*;
use crate::artifact::LayerContent;
use crate::listing::{Entry, EntryKind};
use crate::testing;
use crate::tree::{Base, Timestamp};
use weightfs_store::Digest;

const A: TreeNumber = TreeNumber(7);
const B: TreeNumber = TreeNumber(12);

/// A tree with `d/`, `d/f` (8 bytes) and `l -> d/f`.
fn tree() -> Tree {
    let entry = |path: &str, kind| Entry {
        path: path.into(),
        kind,
        permissions: 0o644,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        xattrs: vec![(b"user.a".to_vec(), b"1".to_vec())],
    };
    let entries = vec![
        entry("d", EntryKind::Directory),
        entry("d/f", EntryKind::File(512..520)),
        entry("l", EntryKind::Symlink(b"d/f".to_vec())),
    ];
    let blob = testing::blob();
    let layer = testing::listed(&blob, Digest::of(b"x"), LayerContent::ImageTar, entries);
    Tree::merge(&[layer], Base::Nothing).unwrap()
}

fn look(filesystem: &Filesystem, directory: u64, name: &str) -> Result<u64, FsError> {
    let inode = filesystem.lookup(directory, OsStr::new(name))?;
    Ok(filesystem.number(&inode))
}

fn names(filesystem: &Filesystem, directory: u64, skip: u64, most: usize) -> Vec<String> {
    let mut names = Vec::new();
    filesystem
        .read_directory(directory, skip, |position, name, _| {
            assert_eq!(position, skip + names.len() as u64 + 1);
            if names.len() == most {
                return false;
            }
            names.push(name.to_str().unwrap().to_owned());
            true
        })
        .unwrap();
    names
}

#[test]
fn the_root_shows_trees_by_number_until_they_are_removed() {
    let filesystem = Filesystem::of_trees();
    filesystem.add(B, tree());
    filesystem.add(A, tree());
    assert_eq!(names(&filesystem, ROOT_INODE, 0, 9), [".", "..", "7", "12"]);
    assert_eq!(look(&filesystem, ROOT_INODE, "7").unwrap(), 7 << 32);
    for other in ["07", "+7", "8", "x", ""] {
        assert!(matches!(look(&filesystem, ROOT_INODE, other), Err(FsError::NotFound)), "{other}");
    }
    assert!(filesystem.remove(A));
    assert!(!filesystem.remove(A));
    assert!(matches!(look(&filesystem, ROOT_INODE, "7"), Err(FsError::NotFound)));
    assert_eq!(names(&filesystem, ROOT_INODE, 0, 9), [".", "..", "12"]);
}

#[test]
fn inodes_are_a_function_of_what_is_mounted() {
    let numbers = || {
        let filesystem = Filesystem::of_trees();
        filesystem.add(A, tree());
        let root = look(&filesystem, ROOT_INODE, "7").unwrap();
        let directory = look(&filesystem, root, "d").unwrap();
        [root, directory, look(&filesystem, directory, "f").unwrap()]
    };
    assert_eq!(numbers(), numbers());
    assert_eq!(numbers(), [7 << 32, 7 << 32 | 1, 7 << 32 | 2]);
}

#[test]
fn a_removed_tree_is_served_until_the_kernel_has_forgotten_it() {
    let filesystem = Filesystem::of_trees();
    filesystem.add(A, tree());
    let root = look(&filesystem, ROOT_INODE, "7").unwrap();
    let link = look(&filesystem, root, "l").unwrap();
    filesystem.remove(A);
    assert_eq!(filesystem.node(link).unwrap().symlink(link).unwrap(), "d/f");
    assert_eq!(look(&filesystem, root, "l").unwrap(), link, "names below it work on");
    filesystem.forget(link, 2);
    assert_eq!(filesystem.served(), 1);
    filesystem.forget(root, 1);
    assert_eq!(filesystem.served(), 0);
    assert!(matches!(filesystem.inode(link), Err(FsError::Stale(_))));
}

#[test]
fn a_removed_tree_that_nobody_looked_at_is_gone_at_once() {
    let filesystem = Filesystem::of_trees();
    filesystem.add(A, tree());
    filesystem.remove(A);
    assert_eq!(filesystem.served(), 0);
}

#[test]
fn forgetting_more_than_was_counted_is_harmless() {
    let filesystem = Filesystem::of_trees();
    filesystem.add(A, tree());
    filesystem.forget(7 << 32, 1000);
    filesystem.forget(99 << 32, 1);
    filesystem.forget(ROOT_INODE, 1);
    assert!(look(&filesystem, ROOT_INODE, "7").is_ok());
}

#[test]
fn a_directory_is_listed_from_any_place_on() {
    let filesystem = Filesystem::of_trees();
    filesystem.add(A, tree());
    let root = 7 << 32;
    let all = [".", "..", "d", "l"];
    for skip in 0..6 {
        let rest = all.get(skip..).unwrap_or_default();
        assert_eq!(names(&filesystem, root, skip as u64, 9), rest, "from {skip}");
    }
    assert_eq!(names(&filesystem, root, 1, 2), ["..", "d"], "a full buffer ends it");
    let file = look(&filesystem, look(&filesystem, root, "d").unwrap(), "f").unwrap();
    let listed = filesystem.read_directory(file, 0, |_, _, _| true);
    assert!(matches!(listed, Err(FsError::NotADirectory(_))));
}

#[test]
fn one_tree_can_be_the_root_itself() {
    let filesystem = Filesystem::of_one(TreeNumber(1), tree());
    assert_eq!(names(&filesystem, ROOT_INODE, 0, 9), [".", "..", "d", "l"]);
    let directory = look(&filesystem, ROOT_INODE, "d").unwrap();
    let mut parent = None;
    filesystem
        .read_directory(directory, 1, |_, _, inode| {
            parent = Some(filesystem.number(&inode));
            false
        })
        .unwrap();
    assert_eq!(parent, Some(ROOT_INODE));
}

#[test]
fn reads_are_clipped_to_the_file() {
    assert_eq!(clip(&(100..110), 0, 4096), Some(100..110));
    assert_eq!(clip(&(100..110), 4, 3), Some(104..107));
    for (offset, size) in [(10, 1), (11, 1), (u64::MAX, 1), (0, 0)] {
        assert_eq!(clip(&(100..110), offset, size), None, "{size} at {offset}");
    }
}

#[test]
fn what_is_no_file_can_t_be_read() {
    let filesystem = Filesystem::of_one(TreeNumber(1), tree());
    let directory = look(&filesystem, ROOT_INODE, "d").unwrap();
    assert!(matches!(filesystem.read(directory, 0, 1), Err(FsError::NotAFile(_))));
    assert!(matches!(filesystem.read(99 << 32, 0, 1), Err(FsError::Stale(_))));
    let node = filesystem.node(directory).unwrap();
    assert!(matches!(node.symlink(directory), Err(FsError::NotASymlink(_))));
    assert_eq!(node.xattr(OsStr::new("user.a")).unwrap(), b"1");
    assert!(matches!(node.xattr(OsStr::new("user.b")), Err(FsError::NoAttribute)));
    assert!(node.cache_file().unwrap().is_none());
}
