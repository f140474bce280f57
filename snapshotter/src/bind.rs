//! A model's directory, bound from the daemon's mount to where the user wants it.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::libc::ENOTCONN;
use nix::mount::{MsFlags, mount};
use weightfs_fusefs::session::detach;

/// What is at the place of a bind mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// A mount that nobody serves any more.
    Dead,
    /// Something else, or nothing.
    Gone,
}

/// Binds a model's directory to `target`: read-only, without special files.
///
/// # Errors
/// When the kernel refuses; then nothing is mounted.
pub fn bind(directory: &Path, target: &Path) -> io::Result<()> {
    let none = None::<&str>;
    mount(Some(directory), target, none, MsFlags::MS_BIND, none)?;
    let flags = MsFlags::MS_BIND
        | MsFlags::MS_REMOUNT
        | MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV;
    // The first error is the one to tell.
    mount(none, target, none, flags, none).map_err(|error| {
        let _ = detach(target);
        error.into()
    })
}

/// What an earlier daemon's bind mount has become.
pub fn bound(target: &Path) -> Bound {
    // Not stat: the kernel may still know the attributes of a dead mount's root.
    match File::open(target) {
        Err(error) if error.raw_os_error() == Some(ENOTCONN) => Bound::Dead,
        _ => Bound::Gone,
    }
}

/// Binds anew where a dead mount is.
///
/// # Errors
/// When the kernel refuses.
pub fn rebind(directory: &Path, target: &Path) -> io::Result<()> {
    detach(target)?;
    bind(directory, target)
}
