//! The daemon's mount: taken over from a keeper, or made.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::{info, warn};
use weightfs_fusefs::session::{detach, is_connected};
use weightfs_fusefs::{Filesystem, Ledger, Misses, Session, SpecialFiles};

use super::DaemonError;
use crate::handover::{Inherited, Keeper, Name};
use crate::models::MountState;
use crate::owner;
use crate::trees::{Removed, Trees};

/// Directory of the mount, below the root.
pub const MOUNT_DIRECTORY: &str = "mnt";

/// A mount that is not served yet.
#[derive(Debug)]
pub(super) struct Mount {
    path: PathBuf,
    keeper: Keeper,
    ledger: Arc<Ledger>,
    /// Of a mount that is there.
    device: Option<OwnedFd>,
}

impl Mount {
    /// Finds what was handed over. A mount that can't be taken over is given up.
    pub(super) fn find(root: &Path, inherited: &mut Inherited) -> Result<Self, DaemonError> {
        // The mount table has canonical paths.
        let root = root.canonicalize().map_err(|source| at(root, source))?;
        let path = root.join(MOUNT_DIRECTORY);
        let keeper = Keeper::find();
        let ledger = inherited.get(Name::Ledger);
        if let Some(device) = inherited.get(Name::Mount) {
            match usable(&path, &device, ledger) {
                Ok(ledger) => {
                    return Ok(Self { path, keeper, ledger, device: Some(device) });
                }
                Err(reason) => {
                    warn!(reason, "the kept mount is of no use: a new one is made");
                    forget_mount(keeper);
                }
            }
        }
        let ledger = Ledger::new().map_err(|source| at(&path, source))?;
        Ok(Self { path, keeper, ledger: Arc::new(ledger), device: None })
    }

    /// What it is.
    pub(super) const fn state(&self) -> MountState {
        match self.device {
            Some(_) => MountState::TakenOver,
            None => MountState::New,
        }
    }

    /// Its trees; none yet.
    pub(super) fn trees(&self, root: &Path) -> Result<Trees, DaemonError> {
        let failed = |source| at(&self.path, source);
        let removed = Removed::open(root).map_err(failed)?;
        if self.state() == MountState::New {
            removed.sweep(|_| false);
        }
        let filesystem = Filesystem::of_trees(Arc::clone(&self.ledger)).map_err(failed)?;
        Ok(Trees::new(Arc::new(filesystem), self.path.clone(), removed))
    }

    /// Serves it, and gives it to the keeper if it is new. Gives who keeps it.
    pub(super) fn serve(self, trees: &Trees, misses: Misses) -> Result<Keeper, DaemonError> {
        let Self { path, keeper, ledger, device } = self;
        let failed = |source| at(&path, source);
        let filesystem = Arc::clone(trees.filesystem());
        if let Some(device) = device {
            let session = Session::take_over(filesystem, &path, device, misses);
            trees.serve(session.map_err(failed)?);
            info!(path = %path.display(), "the mount of an earlier daemon is taken over");
            return Ok(keeper);
        }
        // Several daemons may have died on top of each other.
        while owner::is_mountpoint(&path).map_err(failed)? {
            warn!(path = %path.display(), "detaching the mount of an earlier daemon");
            detach(&path).map_err(failed)?;
        }
        std::fs::create_dir_all(&path).map_err(failed)?;
        let session = Session::mount(filesystem, &path, SpecialFiles::Honoured, misses);
        let session = trees.serve(session.map_err(failed)?);
        Ok(keep(keeper, session, &ledger))
    }
}

/// The ledger of a mount that can be taken over, or why it can't.
fn usable(path: &Path, device: &OwnedFd, ledger: Option<OwnedFd>) -> Result<Arc<Ledger>, String> {
    let ledger = Ledger::inherited(ledger.ok_or("its ledger is missing")?);
    let ledger = ledger.map_err(|error| error.to_string())?;
    if !is_connected(device.as_fd()) {
        return Err("the kernel has ended it".into());
    }
    match owner::is_mount_of(path, ledger.device()) {
        Ok(true) => Ok(Arc::new(ledger)),
        Ok(false) => Err(format!("it is not mounted at {}", path.display())),
        Err(error) => Err(error.to_string()),
    }
}

/// Gives a new mount to the keeper. Says once how it is kept.
fn keep(keeper: Keeper, session: &Session, ledger: &Ledger) -> Keeper {
    let consequence = "running containers lose their lazy files when this daemon ends";
    if keeper == Keeper::Nobody {
        warn!(
            "nobody keeps the mount while no daemon runs: {consequence}; run it as a systemd unit \
             with FileDescriptorStoreMax= or by `weightfs keeper -- weightfs serve`"
        );
        return Keeper::Nobody;
    }
    if !session.can_be_taken_over() {
        warn!("before Linux 6.9 a mount can't be taken over: {consequence}");
        return Keeper::Nobody;
    }
    // The ledger first: without it the mount is of no use.
    let kept = keeper
        .keep(Name::Ledger, ledger.descriptor())
        .and_then(|()| keeper.keep(Name::Mount, session.device()))
        .and_then(|()| keeper.settle());
    match kept {
        Ok(()) => {
            session.leave();
            keeper
        }
        Err(error) => {
            warn!(%keeper, %error, "the keeper did not take the mount: {consequence}");
            Keeper::Nobody
        }
    }
}

/// Takes the mount away for good.
pub(super) fn unmount(trees: &Trees, keeper: Keeper) -> Result<(), DaemonError> {
    if keeper != Keeper::Nobody {
        forget_mount(keeper);
        [Name::Snapshotter, Name::Control].into_iter().for_each(|name| forget(keeper, name));
    }
    let Some(session) = trees.session() else { return Ok(()) };
    session.unmount().map_err(|source| at(trees.mountpoint(), source))
}

fn forget_mount(keeper: Keeper) {
    [Name::Mount, Name::Ledger].into_iter().for_each(|name| forget(keeper, name));
}

/// Makes the keeper forget a descriptor.
pub(super) fn forget(keeper: Keeper, name: Name) {
    if let Err(error) = keeper.forget(name) {
        warn!(%keeper, ?name, %error, "the keeper goes on keeping a descriptor");
    }
}

fn at(path: &Path, source: io::Error) -> DaemonError {
    DaemonError::Mount { path: path.to_owned(), source }
}
