//! Directories shown a second time with the owners of a user namespace, as runc shows volumes in it
//! (mount_setattr(2), MOUNT_ATTR_IDMAP).

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use nix::libc;
use nix::mount::{MntFlags, umount2};

use crate::wait::wait_until;

/// A directory shown elsewhere, where user n is user `first + n`, until this guard goes.
#[derive(Debug)]
pub struct IdMapped(PathBuf);

impl IdMapped {
    /// Whether this kernel can do it with FUSE (Linux 6.12).
    pub fn is_here() -> bool {
        let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
        let mut numbers = release.split('.').map(|number| number.parse().unwrap_or(0));
        (numbers.next(), numbers.next()) >= (Some(6), Some(12))
    }

    /// Shows `from` at `to`.
    ///
    /// # Errors
    /// What the kernel says: EINVAL where the file system can't do it.
    pub fn new(from: &Path, to: PathBuf, first: u32) -> io::Result<Self> {
        let tree = open_tree(from)?;
        set_owners(&tree, &user_namespace(first)?)?;
        move_mount(&tree, &to)?;
        Ok(Self(to))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for IdMapped {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Ends a process, and waits for its end.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A user namespace; it outlives the process that began it.
fn user_namespace(first: u32) -> io::Result<File> {
    let holder = Ended(Command::new("unshare").args(["--user", "sleep", "1000"]).spawn()?);
    let proc = PathBuf::from(format!("/proc/{}", holder.0.id()));
    let own = fs::read_link("/proc/self/ns/user")?;
    wait_until("a user namespace", || {
        fs::read_link(proc.join("ns/user")).is_ok_and(|its| its != own)
    });
    for map in ["uid_map", "gid_map"] {
        fs::write(proc.join(map), format!("0 {first} 65536"))?;
    }
    File::open(proc.join("ns/user"))
}

fn text(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

/// What a system call gave.
fn result(given: libc::c_long) -> io::Result<libc::c_long> {
    if given < 0 { Err(io::Error::last_os_error()) } else { Ok(given) }
}

fn open_tree(path: &Path) -> io::Result<OwnedFd> {
    let path = text(path);
    let flags = libc::OPEN_TREE_CLONE | libc::O_CLOEXEC as u32;
    // SAFETY: the path ends with a zero byte; the descriptor that it gives is ours alone.
    #[expect(unsafe_code, reason = "nix has no open_tree(2)")]
    unsafe {
        let fd = result(libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

fn set_owners(tree: &OwnedFd, namespace: &File) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: namespace.as_raw_fd() as u64,
    };
    // SAFETY: path and attributes live till it returns.
    #[expect(unsafe_code, reason = "nix has no mount_setattr(2)")]
    let given = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    result(given).map(drop)
}

fn move_mount(tree: &OwnedFd, to: &Path) -> io::Result<()> {
    let to = text(to);
    // SAFETY: both paths end with a zero byte.
    #[expect(unsafe_code, reason = "nix has no move_mount(2)")]
    let given = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    result(given).map(drop)
}
