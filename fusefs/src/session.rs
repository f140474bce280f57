//! The mount itself: set up, its read-ahead raised, and taken down.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use fuser::{BackgroundSession, Config, INodeNo, MountOption, Notifier, SessionACL};
use nix::sys::stat::{major, minor, stat};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::warn;

use crate::filesystem::{Filesystem, ROOT_INODE, TreeNumber};
use crate::fuse::Adapter;
use crate::open_files::OpenFiles;

/// The source that the mount table shows. (fuser mounts without a subtype.)
pub const SOURCE_NAME: &str = "weightfs";

/// Kernel read-ahead of the mount, in KiB. A plain stream keeps one to two windows in flight;
/// the default of 128 KiB makes loads wait for latency.
const READ_AHEAD_KIB: u32 = 4096;

/// Threads that answer the kernel. They never wait, so few are enough.
const THREADS: usize = 2;

/// What setuid bits and device nodes of the mount are worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialFiles {
    /// As in any file system: containers run from images need them.
    Honoured,
    /// Nothing: a model needs neither.
    Inert,
}

/// A mount that is being served. Dropped, it is unmounted.
#[derive(Debug)]
pub struct Session {
    filesystem: Arc<Filesystem>,
    mountpoint: PathBuf,
    notifier: Notifier,
    /// `None` once it was unmounted.
    background: Mutex<Option<BackgroundSession>>,
    /// Closed when the kernel ends the session.
    ended: watch::Receiver<()>,
}

impl Session {
    /// Mounts at an existing directory and serves from threads of its own; misses wait on
    /// `runtime`.
    ///
    /// # Errors
    /// When /dev/fuse can't be opened or the mount is refused.
    pub fn mount(
        filesystem: Arc<Filesystem>,
        mountpoint: &Path,
        special: SpecialFiles,
        runtime: Handle,
    ) -> io::Result<Self> {
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(THREADS);
        config.mount_options = vec![
            MountOption::FSName(SOURCE_NAME.into()),
            MountOption::RO,
            MountOption::NoAtime,
            MountOption::DefaultPermissions,
        ];
        config.mount_options.extend(match special {
            SpecialFiles::Honoured => [MountOption::Suid, MountOption::Dev],
            SpecialFiles::Inert => [MountOption::NoSuid, MountOption::NoDev],
        });
        let (serving, ended) = watch::channel(());
        let adapter = Adapter {
            filesystem: Arc::clone(&filesystem),
            open_files: OpenFiles::default(),
            passthrough: false,
            runtime,
            _serving: serving,
        };
        let background = fuser::Session::new(adapter, mountpoint, &config)?.spawn()?;
        if let Err(error) = raise_read_ahead(mountpoint) {
            let mountpoint = mountpoint.display();
            warn!(%mountpoint, %error, "could not raise the mount's read-ahead: loads will be slower");
        }
        Ok(Self {
            filesystem,
            mountpoint: mountpoint.to_owned(),
            notifier: background.notifier(),
            background: Mutex::new(Some(background)),
            ended,
        })
    }

    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// What it shows.
    pub fn filesystem(&self) -> &Arc<Filesystem> {
        &self.filesystem
    }

    /// Waits until somebody unmounts it from outside.
    pub async fn ended(&self) {
        // Nothing is ever sent; the channel closes with the adapter.
        let _ = self.ended.clone().changed().await;
    }

    /// Takes a tree away and makes the kernel drop its name. Blocks while a LOOKUP in the root
    /// is being answered: never call it from a FUSE thread or with a lock that one needs.
    pub fn remove(&self, number: TreeNumber) {
        if self.filesystem.remove(number) {
            // ENOENT: the kernel did not know the name. Anything else: it is found gone at the
            // next lookup all the same, which has no lifetime in the root.
            let _ = self.notifier.inval_entry(INodeNo(ROOT_INODE), &number.directory_name());
        }
    }

    /// Takes the mount away. Whoever still uses it (a container, a bind mount) goes on until this
    /// process ends; for everybody else it vanishes at once.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unmount(&self) -> io::Result<()> {
        let background = self.background.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(background) = background else { return Ok(()) };
        // Its threads end with the last user, which may be never: nobody waits for them. And
        // dropped, it would unmount once more, maybe what a successor has mounted here.
        std::mem::forget(background);
        match detach(&self.mountpoint) {
            // Somebody else has unmounted it.
            Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => Ok(()),
            other => other,
        }
    }
}

/// Detaches whatever is mounted at `mountpoint`, in use or dead.
///
/// # Errors
/// When nothing is mounted there, or the kernel refuses.
pub fn detach(mountpoint: &Path) -> io::Result<()> {
    nix::mount::umount2(mountpoint, nix::mount::MntFlags::MNT_DETACH).map_err(io::Error::from)
}

fn raise_read_ahead(mountpoint: &Path) -> io::Result<()> {
    // The device number of a FUSE mount names its backing device information.
    let device = stat(mountpoint)?.st_dev;
    let bdi = format!("/sys/class/bdi/{}:{}/read_ahead_kb", major(device), minor(device));
    std::fs::write(bdi, READ_AHEAD_KIB.to_string())
}
