//! `weightfs prepare` and `weightfs release`: an artifact as it was pushed, in containers of stock
//! containerd, which can't unpack it.
//!
//! containerd is asked to prepare a "layer" that is the whole artifact. The daemon shows it and says
//! that it exists already, so it becomes a committed snapshot with nothing downloaded. A view of
//! that is a bind mount, which any container can have.
//!
//! Invariant: what is prepared is its view. containerd's garbage collector leaves it alone because of
//! its label, and the snapshot below because of the view; both survive restarts. Everything made on
//! the way is kept by a lease only, so a failure leaves nothing.

use std::collections::HashMap;
use std::path::PathBuf;

use containerd_client::types::Mount;
use futures::future::join;
use serde::Serialize;
use weightfs_fusefs::{Artifact, ArtifactError, Platform};
use weightfs_store::{Digest, Reference, Registries};

use crate::client::{Answer, ClientError, Collect, Containerd};
use crate::metadata::SNAPSHOT_REF;
use crate::snapshots::layer::{IMAGE_REF, MANIFEST_DIGEST, SHOW, SHOW_ARTIFACT};

/// Label of a view: the reference that it was prepared for.
const PREPARED: &str = "containerd.io/snapshot/weightfs.prepared";

/// Label by which containerd's garbage collector leaves something alone.
const GC_ROOT: &str = "containerd.io/gc.root";

/// Why an artifact was not prepared or released.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// containerd did not do what it was asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The reference names no artifact.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// It made an ordinary snapshot to unpack into.
    #[error("snapshotter {0:?} is not WeightFS's; name ours with --snapshotter")]
    OtherSnapshotter(String),
    /// A view that is no bind mount.
    #[error("snapshot {key:?} can't be bound into a container: it is {found}")]
    NotABind {
        /// The view.
        key: String,
        /// What was answered.
        found: String,
    },
}

/// Where an artifact is to be prepared or released.
#[derive(Debug, Clone)]
pub struct Place {
    /// The artifact.
    pub reference: Reference,
    /// containerd's socket.
    pub address: PathBuf,
    /// containerd's namespace.
    pub namespace: String,
    /// The name that containerd knows the snapshotter by.
    pub snapshotter: String,
}

/// An artifact that is prepared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Prepared {
    /// What it was prepared for.
    pub reference: String,
    /// The artifact's manifest.
    pub manifest: Digest,
    /// The view's key in containerd.
    pub snapshot: String,
    /// The directory to be bound into containers.
    pub source: String,
}

impl Prepared {
    /// The argument of `ctr run --mount` that shows it at `target`.
    pub fn mount(&self, target: &str) -> String {
        format!("type=bind,src={},dst={target},options=rbind:ro", self.source)
    }
}

/// Makes containerd show an artifact. What is prepared already stays as it is.
///
/// # Errors
/// When the registry, containerd or the daemon fails; nothing is left then.
pub async fn prepare(registries: &Registries, place: &Place) -> Result<Prepared, PrepareError> {
    let platform = Platform::host();
    let resolve = Artifact::resolve(registries, &place.reference, &platform);
    let (containerd, artifact) = join(connect(place), resolve).await;
    let containerd = containerd?;
    let prepared = async {
        let artifact = artifact?;
        let view = View::new(place, artifact.manifest_digest);
        match view.make(&containerd).await {
            // containerd remembers a snapshot that the daemon has lost with its state directory.
            Err(PrepareError::Client(error)) if error.is_not_found() => {
                view.forget(&containerd).await?;
                view.make(&containerd).await
            }
            made => made,
        }
    }
    .await;
    // What failed says more than that the lease has to expire by itself.
    let released = containerd.release(Collect::Later).await;
    prepared.and_then(|prepared| Ok(released.map(|()| prepared)?))
}

/// Takes away what was prepared for a reference: the keys of its views. Nothing is asked of the
/// registry. Containers that have it mounted keep it until they end.
///
/// # Errors
/// When containerd fails.
pub async fn release(place: &Place) -> Result<Vec<String>, PrepareError> {
    let containerd = connect(place).await?;
    let released = async {
        let views = containerd.labelled(PREPARED, &place.reference.whole()).await?;
        let keys: Vec<_> = views.into_iter().map(|view| view.name).collect();
        for key in &keys {
            containerd.remove(key).await?;
        }
        Ok(keys)
    }
    .await;
    // The snapshot below goes with its last view.
    let collected = containerd.release(Collect::Now).await;
    released.and_then(|keys| Ok(collected.map(|()| keys)?))
}

async fn connect(place: &Place) -> Result<Containerd, ClientError> {
    Containerd::connect(&place.address, &place.namespace, &place.snapshotter).await
}

/// The two snapshots of a prepared artifact.
struct View<'a> {
    place: &'a Place,
    reference: String,
    manifest: Digest,
    /// The view's own key. The committed snapshot's name is the manifest's digest.
    key: String,
}

impl<'a> View<'a> {
    fn new(place: &'a Place, manifest: Digest) -> Self {
        let reference = place.reference.whole();
        let key = format!("weightfs-prepared {reference} {manifest}");
        Self { place, reference, manifest, key }
    }

    async fn make(&self, containerd: &Containerd) -> Result<Prepared, PrepareError> {
        let target = self.manifest.to_string();
        let key = format!("{} {}", containerd.lease(), self.key);
        match containerd.prepare(&key, "", self.artifact_labels()).await? {
            Answer::Exists => {}
            Answer::Made(_) => {
                containerd.remove(&key).await?;
                return Err(PrepareError::OtherSnapshotter(self.place.snapshotter.clone()));
            }
        }
        let labels = HashMap::from([
            (PREPARED.to_owned(), self.reference.clone()),
            (GC_ROOT.to_owned(), jiff::Timestamp::now().to_string()),
        ]);
        let mounts = match containerd.view(&self.key, &target, labels).await? {
            Answer::Made(mounts) => mounts,
            Answer::Exists => containerd.mounts(&self.key).await?,
        };
        Ok(Prepared {
            reference: self.reference.clone(),
            manifest: self.manifest,
            snapshot: self.key.clone(),
            source: self.bind_source(mounts)?,
        })
    }

    fn artifact_labels(&self) -> HashMap<String, String> {
        let labels = [
            (SNAPSHOT_REF, self.manifest.to_string()),
            (IMAGE_REF, self.reference.clone()),
            (MANIFEST_DIGEST, self.manifest.to_string()),
            (SHOW, SHOW_ARTIFACT.to_owned()),
        ];
        labels.map(|(name, value)| (name.to_owned(), value)).into()
    }

    fn bind_source(&self, mounts: Vec<Mount>) -> Result<String, PrepareError> {
        match <[Mount; 1]>::try_from(mounts) {
            Ok([mount]) if mount.r#type == "bind" => Ok(mount.source),
            other => {
                let mounts = other.map_or_else(|mounts| mounts, Vec::from);
                let kinds: Vec<_> = mounts.into_iter().map(|mount| mount.r#type).collect();
                let found = format!("{kinds:?}");
                Err(PrepareError::NotABind { key: self.key.clone(), found })
            }
        }
    }

    /// Makes containerd forget both, whatever of them is there.
    async fn forget(&self, containerd: &Containerd) -> Result<(), ClientError> {
        for name in [self.key.clone(), self.manifest.to_string()] {
            match containerd.remove(&name).await {
                Err(error) if error.is_not_found() => {}
                removed => removed?,
            }
        }
        Ok(())
    }
}
