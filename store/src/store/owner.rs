//! Who owns the state directory, and whether it can hold a cache at all.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::statfs::statfs;

use super::{at, make_dir};
use crate::OpenError;

/// File systems that can't hold the cache, by the magic number of statfs(2) (linux/magic.h and
/// the kernel's file systems). In memory: reading a hole on a full one is SIGBUS. Overlay and
/// FUSE: no passthrough, and other people's rules for mappings. Network: mappings that are not
/// coherent, locks that are not exclusive.
const UNSUITABLE: &[(u32, &str)] = &[
    (0x0102_1994, "tmpfs"),
    (0x8584_58f6, "ramfs"),
    (0x9584_58f6, "hugetlbfs"),
    (0x794c_7630, "overlayfs"),
    (0x6573_5546, "FUSE"),
    (0x0000_6969, "NFS"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x0000_517b, "SMB"),
    (0x00c3_6400, "Ceph"),
    (0x0102_1997, "9p"),
    (0x5346_414f, "AFS"),
    (0x6b41_4653, "AFS"),
    (0x7375_7245, "Coda"),
    (0x0bd0_0bd0, "Lustre"),
    (0x4750_4653, "GPFS"),
    (0x1983_0326, "BeeGFS"),
    (0x0000_564c, "NCP"),
];

/// How long a lock is waited for, and the pause between two tries.
const PATIENCE: Duration = Duration::from_millis(300);
const PAUSE: Duration = Duration::from_millis(10);

/// The lock on a state directory; held until it is dropped.
#[derive(Debug)]
pub(super) struct Owner {
    _lock: File,
}

impl Owner {
    /// Makes the directory (an absolute path) if it is not there, and locks it.
    pub(super) fn take(root: &Path) -> Result<Self, OpenError> {
        // Before anything is made in it.
        check_file_system(root)?;
        make_dir(root)?;
        let path = root.join("lock");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut lock = options.open(&path).map_err(at(&path))?;
        match lock_soon(&lock) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(OpenError::Owned { pid: owner_of(lock), root: root.to_owned() });
            }
            Err(TryLockError::Error(error)) => return Err(at(&path)(error)),
        }
        let pid = std::process::id();
        lock.set_len(0).and_then(|()| writeln!(lock, "{pid}")).map_err(at(&path))?;
        Ok(Self { _lock: lock })
    }
}

/// Takes the lock, in a moment if need be: a process that its owner has just forked keeps it until
/// it executes its program, even if the owner is gone.
fn lock_soon(lock: &File) -> Result<(), TryLockError> {
    let until = Instant::now() + PATIENCE;
    loop {
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                std::thread::sleep(PAUSE);
            }
            other => return other,
        }
    }
}

/// The process id in a lock file; 0 if it can't be told.
fn owner_of(lock: File) -> u32 {
    let mut text = String::new();
    let read = lock.take(20).read_to_string(&mut text);
    read.ok().and_then(|_| text.trim().parse().ok()).unwrap_or(0)
}

/// Looks at the directory or, where it is not there, at the one that it would be made in.
pub(super) fn check_file_system(root: &Path) -> Result<(), OpenError> {
    let existing = root.ancestors().find(|path| path.exists()).unwrap_or(root);
    let found = statfs(existing).map_err(|error| at(existing)(error.into()))?;
    match unsuitable(found.filesystem_type().0) {
        None => Ok(()),
        Some(kind) => Err(OpenError::FileSystem { root: root.to_owned(), kind: kind.to_owned() }),
    }
}

/// The name of a file system that can't hold the cache. Magic numbers have 32 bits, whatever the
/// type in statfs(2), which some architectures extend by the sign.
fn unsuitable(magic: i64) -> Option<&'static str> {
    let magic = magic & 0xffff_ffff;
    UNSUITABLE.iter().find(|(known, _)| i64::from(*known) == magic).map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_told_who_the_first_one_is() {
        let dir = tempfile::tempdir().unwrap();
        let owner = Owner::take(dir.path()).unwrap();
        match Owner::take(dir.path()) {
            Err(OpenError::Owned { pid, .. }) => assert_eq!(pid, std::process::id()),
            other => panic!("{other:?}"),
        }
        drop(owner);
        Owner::take(dir.path()).unwrap();
    }

    #[test]
    fn memory_and_kernel_file_systems_are_told_apart_from_disks() {
        for magic in [0x0102_1994, 0x6969, 0xff53_4d42, 0xff53_4d42u32 as i32 as i64] {
            assert!(unsuitable(magic).is_some(), "{magic:x}");
        }
        // ext4, xfs, btrfs, zfs.
        for magic in [0xef53, 0x5846_5342, 0x9123_683e, 0x2fc1_2fc1] {
            assert_eq!(unsuitable(magic), None, "{magic:x}");
        }
    }

    #[test]
    fn a_directory_in_memory_is_refused_and_nothing_is_made_there() {
        let shm = Path::new("/dev/shm");
        let Ok(Some("tmpfs")) = statfs(shm).map(|found| unsuitable(found.filesystem_type().0))
        else {
            return;
        };
        let root = shm.join(format!("weightfs-test-{}", std::process::id()));
        match Owner::take(&root) {
            Err(OpenError::FileSystem { kind, .. }) => assert_eq!(kind, "tmpfs"),
            other => panic!("{other:?}"),
        }
        assert!(!root.exists());
    }
}
