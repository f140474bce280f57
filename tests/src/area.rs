//! A private directory for one test, on a disk, with nothing left behind.
//!
//! Layout: `<base>/weightfs-test-<pid>-<random>/log` and what the test makes beside it. Whatever a
//! test starts has a path below that directory among its arguments, which nothing else has: so what
//! a killed run left behind can be told and ended by the next one.
//!
//! Invariant: when the guard is dropped, no process that the test started runs, nothing is mounted
//! below the directory, and it is gone.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Once;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, statfs};
use nix::unistd::Pid;

/// The variable that names another place for the directories of tests.
pub const BASE_VARIABLE: &str = "WEIGHTFS_TEST_DIR";

/// Paths of unix sockets end at 108 bytes, so the default is short.
const DEFAULT_BASE: &str = "/var/tmp";

const PREFIX: &str = "weightfs-test-";

/// A private directory for one test.
#[derive(Debug)]
pub struct Area {
    path: PathBuf,
}

impl Area {
    /// Makes a new directory, after ending what killed runs of this suite left behind.
    ///
    /// # Panics
    /// When the directory would not be on a disk: caches on tmpfs or overlayfs are refused.
    pub fn new() -> Self {
        static SWEEP: Once = Once::new();
        let base = std::env::var_os(BASE_VARIABLE).map_or(DEFAULT_BASE.into(), PathBuf::from);
        assert_disk(&base);
        SWEEP.call_once(|| sweep(&base));
        let path = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{}-", std::process::id()))
            .tempdir_in(&base)
            .expect("a directory for the test")
            .keep();
        fs::create_dir(path.join("log")).unwrap();
        Self { path }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A directory of that name in the area, made if it is not there.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// A file of that name in the area, with that content.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    /// A script of that name in the area.
    pub fn program(&self, name: &str, text: &str) -> PathBuf {
        let path = self.file(name, text);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// What is mounted below the directory.
    pub fn mounts(&self) -> Vec<PathBuf> {
        mounts_below(&self.path)
    }

    /// Fails the test if anything is mounted below the directory.
    pub fn assert_no_mounts(&self) {
        let left = self.mounts();
        assert!(left.is_empty(), "left mounted: {left:?}");
    }
}

impl Default for Area {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        clear(&self.path);
    }
}

/// Whether something is mounted at exactly that path.
pub fn is_mount_point(path: &Path) -> bool {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    mounts_below(&path).contains(&path)
}

fn assert_disk(base: &Path) {
    let kind = statfs(base).unwrap_or_else(|e| panic!("{}: {e}", base.display())).filesystem_type();
    assert!(
        kind != TMPFS_MAGIC && kind != OVERLAYFS_SUPER_MAGIC,
        "{} is not on a disk; name a directory on ext4 or xfs in {BASE_VARIABLE}",
        base.display()
    );
}

/// Mount points at or below `path`, in the order in which they were mounted.
fn mounts_below(path: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    // proc_pid_mountinfo(5): the fifth field is the mount point, with octal escapes.
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    points.map(|point| PathBuf::from(unescape(point))).filter(|p| p.starts_with(path)).collect()
}

fn unescape(field: &str) -> String {
    field.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
}

/// Ends what still uses `path`, unmounts what is mounted below it, and removes it.
fn clear(path: &Path) {
    end_users(path);
    for point in mounts_below(path).iter().rev() {
        let _ = umount2(point, MntFlags::MNT_DETACH);
    }
    // A detached mount may still be busy: never delete through one.
    if mounts_below(path).is_empty() {
        let _ = fs::remove_dir_all(path);
    }
}

/// Kills processes with an argument below `path`, and their children: a container's processes do
/// not name it, but its shim does.
fn end_users(path: &Path) {
    let path = format!("{}/", path.display());
    let own = std::process::id();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if pid != own && String::from_utf8_lossy(&line).contains(&path) {
            let children = format!("/proc/{pid}/task/{pid}/children");
            let children = fs::read_to_string(children).unwrap_or_default();
            let children = children.split_whitespace().filter_map(|child| child.parse().ok());
            for pid in children.chain([pid]) {
                let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
            }
        }
    }
}

/// Clears away what runs that are no more left behind.
fn sweep(base: &Path) {
    for entry in fs::read_dir(base).unwrap().flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        let owner = rest.split('-').next().and_then(|pid| pid.parse::<i32>().ok());
        if owner.is_some_and(|pid| kill(Pid::from_raw(pid), None).is_err()) {
            clear(&entry.path());
        }
    }
}
