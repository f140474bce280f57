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

fn filesystem() -> Filesystem {
    Filesystem::of_trees(Arc::new(Ledger::new().unwrap())).unwrap()
}

/// The filesystem of the process that comes after this one was killed; it shows nothing yet.
fn successor(filesystem: &Filesystem) -> Filesystem {
    let ledger = filesystem.ledger().descriptor().try_clone_to_owned().unwrap();
    Filesystem::of_trees(Arc::new(Ledger::inherited(ledger).unwrap())).unwrap()
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
    let filesystem = filesystem();
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
        let filesystem = filesystem();
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
    let filesystem = filesystem();
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
    let filesystem = filesystem();
    filesystem.add(A, tree());
    filesystem.remove(A);
    assert_eq!(filesystem.served(), 0);
}

#[test]
fn forgetting_more_than_was_counted_is_harmless() {
    let filesystem = filesystem();
    filesystem.add(A, tree());
    filesystem.forget(7 << 32, 1000);
    filesystem.forget(99 << 32, 1);
    filesystem.forget(ROOT_INODE, 1);
    assert!(look(&filesystem, ROOT_INODE, "7").is_ok());
}

#[test]
fn a_successor_knows_what_the_kernel_holds() {
    let first = filesystem();
    first.add(A, tree());
    first.add(B, tree());
    let root = look(&first, ROOT_INODE, "7").unwrap();
    let link = look(&first, root, "l").unwrap();
    first.remove(A);

    let second = successor(&first);
    assert_eq!(second.awaited(), [A], "nobody looked at the other");
    assert!(second.add(B, tree()));
    assert!(second.add_removed(A, tree()));
    assert_eq!(second.awaited(), []);
    assert!(matches!(look(&second, ROOT_INODE, "7"), Err(FsError::NotFound)));
    assert_eq!(second.node(link).unwrap().symlink(link).unwrap(), "d/f");
    second.forget(link, 1);
    assert!(second.serves(A));
    second.forget(root, 1);
    assert!(!second.serves(A), "forgotten as often as it was looked up in both lives");
    assert_eq!(successor(&second).awaited(), []);
}

#[test]
fn lookups_before_and_after_a_restart_are_one_count() {
    let first = filesystem();
    first.add(A, tree());
    look(&first, ROOT_INODE, "7").unwrap();
    let second = successor(&first);
    second.add(A, tree());
    let root = look(&second, ROOT_INODE, "7").unwrap();
    second.forget(root, 1);
    second.remove(A);
    assert!(second.serves(A), "the kernel still holds it once");
    second.forget(root, 1);
    assert!(!second.serves(A));
}

#[test]
fn another_tree_is_never_served_by_the_number_of_one_that_the_kernel_holds() {
    let other = || {
        let blob = testing::blob();
        let layer = testing::listed(&blob, Digest::of(b"y"), LayerContent::ImageTar, vec![]);
        Tree::merge(&[layer], Base::Nothing).unwrap()
    };
    let first = filesystem();
    first.add(A, tree());
    first.add(B, tree());
    let root = look(&first, ROOT_INODE, "7").unwrap();
    let second = successor(&first);
    assert!(!second.add(A, other()));
    assert!(matches!(second.inode(root), Err(FsError::Stale(_))));
    assert!(second.add(B, other()), "the kernel knows nothing of it");
}

#[test]
fn a_fingerprint_is_that_of_names_and_contents() {
    assert_eq!(tree().fingerprint(), tree().fingerprint());
    // Kept by mounts that outlive this version: it may change only with what it stands for.
    assert_eq!(tree().fingerprint(), 6330856508132459151);
}

#[test]
fn a_directory_is_listed_from_any_place_on() {
    let filesystem = filesystem();
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
    let filesystem = Filesystem::of_one(TreeNumber(1), tree()).unwrap();
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
    let filesystem = Filesystem::of_one(TreeNumber(1), tree()).unwrap();
    let directory = look(&filesystem, ROOT_INODE, "d").unwrap();
    assert!(matches!(filesystem.read(directory, 0, 1), Err(FsError::NotAFile(_))));
    assert!(matches!(filesystem.read(99 << 32, 0, 1), Err(FsError::Stale(_))));
    let node = filesystem.node(directory).unwrap();
    assert!(matches!(node.symlink(directory), Err(FsError::NotASymlink(_))));
    assert_eq!(node.xattr(OsStr::new("user.a")).unwrap(), b"1");
    assert!(matches!(node.xattr(OsStr::new("user.b")), Err(FsError::NoAttribute)));
    assert!(node.cache_file().unwrap().is_none());
}
