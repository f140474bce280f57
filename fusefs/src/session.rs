//! The mount itself: set up, its read-ahead raised, taken over from a process that died, and
//! taken down or left to a successor.

mod take_over;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use fuser::{Config, INodeNo, InitFlags, MountOption, Notifier, SessionACL};
use nix::sys::stat::{major, minor, stat};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::warn;
use weightfs_store::SegmentHold;

use crate::device::Device;
pub use crate::device::is_connected;
use crate::filesystem::{Filesystem, ROOT_INODE, TreeNumber};
use crate::fuse::Adapter;
use crate::ledger::Negotiated;
use crate::open_files::{BackingNumber, OpenFiles};
use crate::watchdog::Watchdog;

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

/// How reads wait whose bytes have to be fetched.
#[derive(Debug, Clone)]
pub struct Misses {
    /// Where.
    pub runtime: Handle,
    /// For how long at the most, as the store was told.
    pub deadline: Duration,
}

/// What becomes of a mount when its [`Session`] is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OnDrop {
    Unmount,
    Leave,
}

/// A mount that is being served. Dropped, it is unmounted, unless it is another's to go on with
/// ([`Session::leave`]).
#[derive(Debug)]
pub struct Session {
    filesystem: Arc<Filesystem>,
    mountpoint: PathBuf,
    device: OwnedFd,
    notifier: Notifier,
    on_drop: Mutex<OnDrop>,
    /// Closed when the kernel ends the session.
    ended: watch::Receiver<()>,
}

impl Session {
    /// Mounts at an existing directory and serves from threads of its own.
    ///
    /// # Errors
    /// When /dev/fuse can't be opened or the mount is refused.
    pub fn mount(
        filesystem: Arc<Filesystem>,
        mountpoint: &Path,
        special: SpecialFiles,
        misses: Misses,
    ) -> io::Result<Self> {
        let device = Arc::new(OnceLock::new());
        let open_files = OpenFiles::new(Arc::clone(filesystem.ledger()), |_| {})?;
        let (adapter, ended) = adapter(&filesystem, open_files, Arc::clone(&device), misses);
        let session = fuser::Session::new(adapter, mountpoint, &config(special))?;
        // Nobody asks for it before the session runs.
        let _ = device.set(Device::new(session.as_fd().try_clone_to_owned()?));
        let session = Self::run(filesystem, mountpoint, session, ended)?;
        session.filesystem.ledger().set_device(stat(mountpoint)?.st_dev)?;
        if let Err(error) = raise_read_ahead(mountpoint) {
            let mountpoint = mountpoint.display();
            warn!(%mountpoint, %error, "could not raise the mount's read-ahead: loads will be slower");
        }
        Ok(session)
    }

    /// Goes on where the last server of a mount was killed: `device` is its /dev/fuse descriptor,
    /// and the filesystem's ledger the one that it wrote. Readers waited all the time; what they
    /// had asked for is asked again.
    ///
    /// # Errors
    /// When the session can't be begun; then the mount is as it was.
    pub fn take_over(
        filesystem: Arc<Filesystem>,
        mountpoint: &Path,
        device: OwnedFd,
        misses: Misses,
    ) -> io::Result<Self> {
        let ledger = filesystem.ledger();
        let device = Device::new(device);
        let open_files = OpenFiles::new(Arc::clone(ledger), |id| device.close_backing(id))?;
        let any = File::from(ledger.descriptor().try_clone_to_owned()?);
        device.close_unrecorded(BackingNumber(ledger.highest_backing()), &any);
        let negotiated = ledger.negotiated();
        let kept = Arc::new(OnceLock::from(Device::new(device.as_fd().try_clone_to_owned()?)));
        let (adapter, ended) = adapter(&filesystem, open_files, kept, misses);
        // Of a mount that is there the options don't matter.
        let config = config(SpecialFiles::Honoured);
        let session = take_over::take_over(adapter, device.as_fd(), negotiated, config)?;
        let session = Self::run(filesystem, mountpoint, session, ended)?;
        session.leave();
        Ok(session)
    }

    fn run(
        filesystem: Arc<Filesystem>,
        mountpoint: &Path,
        session: fuser::Session<Adapter>,
        ended: watch::Receiver<()>,
    ) -> io::Result<Self> {
        let device = session.as_fd().try_clone_to_owned()?;
        let background = session.spawn()?;
        let notifier = background.notifier();
        // Its threads end with the last user of the mount, which may be never: nobody waits for
        // them. And dropped, it would unmount, maybe what a successor has mounted there.
        std::mem::forget(background);
        let on_drop = Mutex::new(OnDrop::Unmount);
        Ok(Self { filesystem, mountpoint: mountpoint.to_owned(), device, notifier, on_drop, ended })
    }

    /// Whether a successor can take the mount over from whoever keeps [`Session::device`] and the
    /// filesystem's ledger. Not before Linux 6.9: requests that a killed server had taken would
    /// wait for ever.
    pub fn can_be_taken_over(&self) -> bool {
        let Negotiated { capabilities, .. } = self.filesystem.ledger().negotiated();
        capabilities & InitFlags::FUSE_HAS_RESEND.bits() != 0
    }

    /// Whether the kernel reads complete files by itself (Linux 6.9 with CONFIG_FUSE_PASSTHROUGH).
    pub fn passes_through(&self) -> bool {
        let Negotiated { capabilities, .. } = self.filesystem.ledger().negotiated();
        capabilities & InitFlags::FUSE_PASSTHROUGH.bits() != 0
    }

    /// Its /dev/fuse descriptor: while somebody holds one, the mount lives.
    pub fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
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

    /// Leaves the mount as it is when this process ends: to a successor, if somebody keeps its
    /// descriptor till then. It is served until the end.
    pub fn leave(&self) {
        *self.on_drop() = OnDrop::Leave;
    }

    /// Takes the mount away. Whoever still uses it (a container, a bind mount) goes on until this
    /// process ends; for everybody else it vanishes at once.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unmount(&self) -> io::Result<()> {
        self.leave();
        match detach(&self.mountpoint) {
            // Somebody else has unmounted it.
            Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => Ok(()),
            other => other,
        }
    }

    fn on_drop(&self) -> MutexGuard<'_, OnDrop> {
        self.on_drop.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if *self.on_drop() == OnDrop::Unmount
            && let Err(error) = self.unmount()
        {
            warn!(mountpoint = %self.mountpoint.display(), %error, "could not unmount");
        }
    }
}

fn config(special: SpecialFiles) -> Config {
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
    config
}

/// An adapter, and what is closed when the session has ended.
fn adapter(
    filesystem: &Arc<Filesystem>,
    open_files: OpenFiles<SegmentHold>,
    device: Arc<OnceLock<Device>>,
    Misses { runtime, deadline }: Misses,
) -> (Adapter, watch::Receiver<()>) {
    let (serving, ended) = watch::channel(());
    let filesystem = Arc::clone(filesystem);
    let counters = Arc::clone(filesystem.counters());
    let adapter = Adapter {
        filesystem,
        open_files,
        device,
        passthrough: false,
        watchdog: Watchdog::start(deadline, &runtime, Arc::clone(&counters)),
        counters,
        runtime,
        _serving: serving,
    };
    (adapter, ended)
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
