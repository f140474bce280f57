//! Volumes: models that an orchestrator wants to have at a place of its choice, and away again.
//!
//! Whoever asks (a CSI plugin) keeps nothing and may die at any time: what is published is what the
//! records of [`crate::models`] and the mount table say. So each request can be repeated.
//!
//! Invariants: at one target one thing is done at a time, by a task that no caller's end ends; what
//! fails leaves neither a record nor a mount; a directory is removed only when it is empty.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use tokio_util::sync::CancellationToken;
use tracing::info;
use weightfs_fusefs::Quiet;
use weightfs_fusefs::session::detach;
use weightfs_store::Reference;

use crate::bind::bind;
use crate::metadata::MetadataError;
use crate::models::{Asked, ModelError, Models, OpenModel, ShownModel};
use crate::owner::{MountedAt, mounted_at};

/// Bytes of a volume's name at the most; the specification of CSI says 128, Kubernetes has longer
/// ones.
const MAX_VOLUME_BYTES: usize = 512;

/// Mode of a target that is made: what is bound there says who may read it.
const TARGET_MODE: u32 = 0o750;

/// Why a volume is not published, or not taken away.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The volume's name can't be used.
    #[error("the name of a volume must have 1 to {MAX_VOLUME_BYTES} bytes")]
    Name,
    /// The place can't be used.
    #[error("{}: a target is an absolute path without `..`", .0.display())]
    Path(PathBuf),
    /// The model can't be shown.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The model can't be forgotten.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// Something else is being done there.
    #[error("{}: another request for it is under way", .0.display())]
    Busy(PathBuf),
    /// It was unpublished before it was there.
    #[error("{}: taken away before it was there", .0.display())]
    Cancelled(PathBuf),
    /// Something else is there.
    #[error("{} has {what} already", target.display())]
    Taken {
        /// The place.
        target: PathBuf,
        /// What is there.
        what: String,
    },
    /// The volume is not there.
    #[error("volume {volume} is not at {}", target.display())]
    NotPublished {
        /// The volume.
        volume: String,
        /// The place.
        target: PathBuf,
    },
    /// The directory can't be made, bound or removed.
    #[error("cannot {action} {}: {source}", target.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The place.
        target: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The task panicked.
    #[error("publishing failed: {0}")]
    Stopped(#[from] tokio::task::JoinError),
}

/// An absolute path without `..`, its directory canonical, as the mount table has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target(PathBuf);

impl Target {
    /// Checks a path. Blocks on the disk.
    ///
    /// # Errors
    /// [`VolumeError::Path`].
    pub fn new(path: &Path) -> Result<Self, VolumeError> {
        let bad = || VolumeError::Path(path.to_owned());
        if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
            return Err(bad());
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(bad());
        };
        // Where nothing is, nothing is published either.
        let parent = parent.canonicalize().unwrap_or_else(|_| parent.to_owned());
        Ok(Self(parent.join(name)))
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> VolumeError {
        move |source| VolumeError::Io { action, target: self.0.clone(), source }
    }

    fn taken(&self, what: impl Into<String>) -> VolumeError {
        VolumeError::Taken { target: self.0.clone(), what: what.into() }
    }
}

/// The name that an orchestrator has for a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeId(String);

impl VolumeId {
    /// Checks a name.
    ///
    /// # Errors
    /// [`VolumeError::Name`].
    pub fn new(name: String) -> Result<Self, VolumeError> {
        let fits = (1..=MAX_VOLUME_BYTES).contains(&name.len());
        fits.then_some(Self(name)).ok_or(VolumeError::Name)
    }
}

/// What is to be where.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// Its name.
    pub volume: VolumeId,
    /// The model.
    pub reference: Reference,
    /// Files that are left out, as patterns.
    pub exclude: Vec<String>,
}

impl Wanted {
    fn is(&self, model: &ShownModel) -> bool {
        model.volume == self.volume.0
            && model.reference == self.reference.whole()
            && model.exclude == self.exclude
    }
}

/// What is being done at a target.
#[derive(Debug, Clone, PartialEq)]
enum Work {
    Publish(Wanted),
    Unpublish(VolumeId),
}

/// The end of a task, for all who wait for it.
type Done = Shared<BoxFuture<'static, Result<(), Arc<VolumeError>>>>;

#[derive(Debug, Clone)]
struct Flight {
    work: Work,
    cancel: CancellationToken,
    done: Done,
}

/// Whose turn it is at a target.
enum Turn {
    /// This work's, begun now or before.
    Ours(Done),
    /// Other work's.
    Others(Flight),
}

/// The volumes of one daemon.
#[derive(Debug)]
pub struct Volumes {
    models: Arc<Models>,
    flights: Mutex<HashMap<Target, Flight>>,
}

/// Takes a flight away when its task ends.
struct Landing(Arc<Volumes>, Target);

impl Drop for Landing {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
    }
}

impl Volumes {
    /// Volumes among these models.
    pub fn new(models: Arc<Models>) -> Arc<Self> {
        Arc::new(Self { models, flights: Mutex::default() })
    }

    /// Has a model at the target. Done already, it is done.
    ///
    /// # Errors
    /// Something else there, or under way there; a model that can't be shown.
    pub async fn publish(
        self: &Arc<Self>,
        target: Target,
        wanted: Wanted,
    ) -> Result<(), Arc<VolumeError>> {
        match self.join_or_start(&target, Work::Publish(wanted)) {
            Turn::Ours(done) => done.await,
            Turn::Others(_) => Err(Arc::new(VolumeError::Busy(target.0))),
        }
    }

    /// Takes a volume and its directory away; one that is being published is given up. One that is
    /// not there is away already.
    ///
    /// # Errors
    /// Something else there.
    pub async fn unpublish(
        self: &Arc<Self>,
        target: Target,
        volume: VolumeId,
    ) -> Result<(), Arc<VolumeError>> {
        loop {
            match self.join_or_start(&target, Work::Unpublish(volume.clone())) {
                Turn::Ours(done) => return done.await,
                Turn::Others(before) => {
                    before.cancel.cancel();
                    let _ = before.done.await;
                }
            }
        }
    }

    /// The model of a volume. Blocks on the mount table.
    ///
    /// # Errors
    /// [`VolumeError::NotPublished`], or a mount table that can't be read.
    pub fn find(&self, target: &Target, volume: &VolumeId) -> Result<ShownModel, VolumeError> {
        let named = self.at(target).into_iter().find(|model| model.volume == volume.0);
        let bound = match &named {
            Some(model) => self.models.is_bound(model).map_err(target.failed("look at"))?,
            None => false,
        };
        named.filter(|_| bound).ok_or_else(|| VolumeError::NotPublished {
            volume: volume.0.clone(),
            target: target.0.clone(),
        })
    }

    /// Begins this work, if nothing is being done there.
    fn join_or_start(self: &Arc<Self>, target: &Target, work: Work) -> Turn {
        let mut flights = self.lock();
        if let Some(flight) = flights.get(target) {
            return match flight.work == work {
                true => Turn::Ours(flight.done.clone()),
                false => Turn::Others(flight.clone()),
            };
        }
        let cancel = CancellationToken::new();
        let task = tokio::spawn({
            let landing = Landing(Arc::clone(self), target.clone());
            let (own, target, work) = (Arc::clone(self), target.clone(), work.clone());
            let cancel = cancel.clone();
            async move {
                let _landing = landing;
                own.carry_out(target, work, cancel).await.map_err(Arc::new)
            }
        });
        let done = async { task.await.unwrap_or_else(|error| Err(Arc::new(error.into()))) };
        let done = done.boxed().shared();
        flights.insert(target.clone(), Flight { work, cancel, done: done.clone() });
        Turn::Ours(done)
    }

    async fn carry_out(
        self: Arc<Self>,
        target: Target,
        work: Work,
        cancel: CancellationToken,
    ) -> Result<(), VolumeError> {
        let wanted = match work {
            Work::Publish(wanted) => wanted,
            Work::Unpublish(volume) => {
                return tokio::task::spawn_blocking(move || self.take_away(&target, &volume))
                    .await?;
            }
        };
        let looked = tokio::task::spawn_blocking({
            let (own, target, wanted) = (Arc::clone(&self), target.clone(), wanted.clone());
            move || own.is_there(&target, &wanted)
        });
        if looked.await?? {
            return Ok(());
        }
        let asked = Asked {
            reference: wanted.reference,
            target: target.0.clone(),
            volume: wanted.volume.0,
            exclude: wanted.exclude,
            profile: None,
            index: None,
        };
        let opened = tokio::select! {
            opened = self.models.open(asked, &Quiet) => opened?,
            () = cancel.cancelled() => return Err(VolumeError::Cancelled(target.0)),
        };
        tokio::task::spawn_blocking(move || self.put(&target, opened)).await?
    }

    /// Whether it is there already; what is dead or half done there is cleared away.
    fn is_there(&self, target: &Target, wanted: &Wanted) -> Result<bool, VolumeError> {
        let here = self.at(target);
        for model in &here {
            if self.models.is_bound(model).map_err(target.failed("look at"))? {
                return match wanted.is(model) {
                    true => Ok(true),
                    false => Err(target.taken(describe(model))),
                };
            }
        }
        match mounted_at(&target.0).map_err(target.failed("look at"))? {
            MountedAt::Nothing => {}
            MountedAt::Weightfs => detach(&target.0).map_err(target.failed("unmount"))?,
            MountedAt::Other => return Err(target.taken("another file system")),
        }
        self.release(&here)?;
        Ok(false)
    }

    fn put(&self, target: &Target, opened: OpenModel) -> Result<(), VolumeError> {
        let made = make_directory(target)?;
        let give_up = |error| {
            if made {
                // What is left is an empty directory.
                let _ = std::fs::remove_dir(&target.0);
            }
            error
        };
        let model = self.models.show(opened).map_err(|error| give_up(error.into()))?;
        let directory = self.models.directory(model.number);
        if let Err(source) = bind(&directory, &target.0) {
            self.models.release(model.number)?;
            return Err(give_up(target.failed("bind a model to")(source)));
        }
        info!(volume = model.volume, target = %target.0.display(), "volume published");
        Ok(())
    }

    fn take_away(&self, target: &Target, volume: &VolumeId) -> Result<(), VolumeError> {
        let here = self.at(target);
        if let Some(other) = here.iter().find(|model| model.volume != volume.0) {
            return Err(target.taken(describe(other)));
        }
        loop {
            match mounted_at(&target.0).map_err(target.failed("look at"))? {
                MountedAt::Nothing => break,
                MountedAt::Weightfs => detach(&target.0).map_err(target.failed("unmount"))?,
                MountedAt::Other => return Err(target.taken("another file system")),
            }
        }
        self.release(&here)?;
        match std::fs::remove_dir(&target.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => {
                removed.map_err(target.failed("remove"))?;
                info!(volume = volume.0, target = %target.0.display(), "volume unpublished");
            }
        }
        Ok(())
    }

    fn release(&self, models: &[ShownModel]) -> Result<(), VolumeError> {
        // A model without a volume is the command line's, which may be about to bind it.
        let volumes = models.iter().filter(|model| !model.volume.is_empty());
        volumes.into_iter().try_for_each(|model| Ok(self.models.release(model.number)?))
    }

    fn at(&self, target: &Target) -> Vec<ShownModel> {
        let mut models = self.models.list();
        models.retain(|model| model.target == target.0);
        models
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Target, Flight>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the directory, if it is not there; whether it was made.
fn make_directory(target: &Target) -> Result<bool, VolumeError> {
    let made = std::fs::DirBuilder::new().mode(TARGET_MODE).create(&target.0);
    match made {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let mut entries = target.0.read_dir().map_err(target.failed("use"))?;
            match entries.next() {
                None => Ok(false),
                Some(_) => Err(target.taken("files of somebody else")),
            }
        }
        Err(error) => Err(target.failed("make")(error)),
    }
}

fn describe(model: &ShownModel) -> String {
    match model.volume.as_str() {
        "" => format!("{}, mounted by `weightfs mount`,", model.reference),
        volume => format!("volume {volume}, {},", model.reference),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_an_absolute_path_that_goes_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(&real, dir.path().join("link")).unwrap();
        let target = Target::new(&dir.path().join("link/mount")).unwrap();
        assert_eq!(target.0, real.join("mount"), "the mount table has canonical paths");
        assert_eq!(Target::new(Path::new("/no/such/dir")).unwrap().0, Path::new("/no/such/dir"));
        for bad in ["relative", "", "/", "/a/../b", "/a/.."] {
            let error = Target::new(Path::new(bad)).unwrap_err();
            assert!(matches!(error, VolumeError::Path(_)), "{bad}");
        }
    }

    #[test]
    fn the_name_of_a_volume_is_bounded() {
        assert!(VolumeId::new("csi-0123".into()).is_ok());
        assert!(matches!(VolumeId::new(String::new()), Err(VolumeError::Name)));
        assert!(matches!(VolumeId::new("v".repeat(513)), Err(VolumeError::Name)));
    }
}
