//! Who serves a state directory or a mount, as another process can tell.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use nix::sys::stat::{FileStat, major, minor};
use procfs::process::{MountInfo, Process};
use weightfs_fusefs::TreeNumber;
use weightfs_fusefs::session::SOURCE_NAME;

/// File in the state directory that names the owner's control socket.
const ADDRESS_FILE: &str = "control-address";

/// Longest path of a unix socket (`sun_path`).
const MAX_ADDRESS_BYTES: u64 = 108;

/// Says in the state directory where the daemon answers; taken back when it is dropped.
#[derive(Debug)]
pub struct Announcement(Option<PathBuf>);

impl Announcement {
    /// Writes the address.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn new(root: &Path, address: &Path) -> io::Result<Self> {
        let path = root.join(ADDRESS_FILE);
        let new = root.join(format!("{ADDRESS_FILE}.new"));
        std::fs::write(&new, address.as_os_str().as_bytes())?;
        std::fs::rename(new, &path)?;
        Ok(Self(Some(path)))
    }

    /// Lets it stand: the socket outlives this process.
    pub fn leave(mut self) {
        self.0 = None;
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        // Left behind, it names a socket where nobody answers.
        if let Some(path) = &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Where the owner of a state directory answers, if it is a daemon.
pub fn control_address(root: &Path) -> Option<PathBuf> {
    use std::io::Read as _;
    let file = std::fs::File::open(root.join(ADDRESS_FILE)).ok()?;
    let mut address = Vec::new();
    file.take(MAX_ADDRESS_BYTES).read_to_end(&mut address).ok()?;
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(&address)))
}

/// Whether something is mounted exactly there. `path` is canonical.
///
/// # Errors
/// When the mount table can't be read.
pub fn is_mountpoint(path: &Path) -> io::Result<bool> {
    let mounts = mounts()?;
    Ok(mounts.into_iter().any(|mount| unescape(&mount.mount_point) == path))
}

/// Whether a tree of the mount with that device number is bound at `target`. Asks the mount
/// nothing.
///
/// # Errors
/// When the mount table can't be read.
pub fn is_bound(target: &Path, device: u64, tree: TreeNumber) -> io::Result<bool> {
    let device = device_name(device);
    let root = Path::new("/").join(tree.directory_name());
    Ok(mounts()?.into_iter().any(|mount| {
        mount.majmin == device
            && Path::new(&mount.root) == root
            && unescape(&mount.mount_point) == target
    }))
}

/// Whether what is mounted at `path`, on top of all else, is the mount with that device number.
/// Asks the mount nothing.
///
/// # Errors
/// When the mount table can't be read.
pub fn is_mount_of(path: &Path, device: u64) -> io::Result<bool> {
    // The last one in the table is on top.
    let mut at = mounts()?.into_iter().rev().filter(|mount| unescape(&mount.mount_point) == path);
    Ok(at.next().is_some_and(|mount| mount.majmin == device_name(device)))
}

/// What is mounted at a place, on top of all else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountedAt {
    /// Nothing.
    Nothing,
    /// A mount of WeightFS, whoever serves it, or nobody.
    Weightfs,
    /// Something else.
    Other,
}

/// What is mounted exactly there. Asks the mount nothing.
///
/// # Errors
/// When the mount table can't be read.
pub fn mounted_at(path: &Path) -> io::Result<MountedAt> {
    let mut at = mounts()?.into_iter().rev().filter(|mount| unescape(&mount.mount_point) == path);
    Ok(match at.next() {
        None => MountedAt::Nothing,
        Some(mount) if is_ours(&mount) => MountedAt::Weightfs,
        Some(_) => MountedAt::Other,
    })
}

fn is_ours(mount: &MountInfo) -> bool {
    mount.fs_type == "fuse" && mount.mount_source.as_deref() == Some(SOURCE_NAME)
}

/// Where the mount at `path` is mounted, and what is bound from it; the last one first. Asks the
/// mount nothing.
///
/// # Errors
/// When the mount table can't be read.
pub fn mounts_of(path: &Path) -> io::Result<Vec<PathBuf>> {
    let all: Vec<_> = mounts()?.into_iter().collect();
    let at = |mount: &&MountInfo| unescape(&mount.mount_point) == path;
    let devices: Vec<_> = all.iter().filter(at).map(|mount| &mount.majmin).collect();
    let same = all.iter().rev().filter(|mount| devices.contains(&&mount.majmin));
    Ok(same.map(|mount| unescape(&mount.mount_point)).collect())
}

fn device_name(device: u64) -> String {
    format!("{}:{}", major(device), minor(device))
}

/// Whether a file lies on a mount of WeightFS.
///
/// # Errors
/// When the mount table can't be read.
pub fn is_weightfs(status: &FileStat) -> io::Result<bool> {
    let device = device_name(status.st_dev);
    Ok(mounts()?.into_iter().any(|mount| mount.majmin == device && is_ours(&mount)))
}

/// The tree of a daemon's mount that a directory is the root of; `None` for a mount of its own.
pub fn tree_of(status: &FileStat) -> Option<TreeNumber> {
    let number = u32::try_from(status.st_ino >> 32).ok()?;
    (number > 0).then_some(TreeNumber(number))
}

fn mounts() -> io::Result<procfs::process::MountInfos> {
    Process::myself().and_then(|process| process.mountinfo()).map_err(io::Error::other)
}

/// The mount table writes space, tab, newline and backslash as three octal digits
/// (`mangle_path`).
fn unescape(path: &Path) -> PathBuf {
    let mut bytes = path.as_os_str().as_bytes().iter().copied();
    let mut plain = Vec::new();
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            plain.push(byte);
            continue;
        }
        let digits = [bytes.next(), bytes.next(), bytes.next()];
        let value = digits
            .into_iter()
            .flatten()
            .fold(0u32, |value, digit| value << 3 | u32::from(digit.wrapping_sub(b'0') & 7));
        plain.push((value & 0xff) as u8);
    }
    PathBuf::from(std::ffi::OsString::from(std::ffi::OsStr::from_bytes(&plain)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_tables_escapes_are_undone() {
        assert_eq!(unescape(Path::new("/a\\040b\\134c")), Path::new("/a b\\c"));
        assert_eq!(unescape(Path::new("/plain")), Path::new("/plain"));
    }

    #[test]
    fn the_root_is_a_mount_point_and_a_new_directory_is_not() {
        let dir = tempfile::tempdir().unwrap();
        assert!(is_mountpoint(Path::new("/")).unwrap());
        assert!(!is_mountpoint(&dir.path().canonicalize().unwrap()).unwrap());
    }

    #[test]
    fn an_announcement_lasts_as_long_as_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let address = Path::new("/run/x/control.sock");
        let announcement = Announcement::new(dir.path(), address).unwrap();
        assert_eq!(control_address(dir.path()).as_deref(), Some(address));
        drop(announcement);
        assert_eq!(control_address(dir.path()), None);
        Announcement::new(dir.path(), address).unwrap().leave();
        assert_eq!(control_address(dir.path()).as_deref(), Some(address));
    }
}
