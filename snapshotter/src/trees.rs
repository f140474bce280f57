//! From an artifact to a tree: opens layers, and keeps for each tree that is shown the layers
//! that it was merged from, so that the next layer of a chain, a restart and `weightfs status`
//! find them.
//!
//! Invariant: a tree is shown only when all of its layers are open; what fails before leaves
//! nothing behind.

mod removed;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{Either, FutureExt as _, select};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde::{Deserialize, Serialize};
use tracing::{error, warn};
use weightfs_fusefs::index::Index;
use weightfs_fusefs::{
    Artifact, ArtifactError, Base, Compression, Exclude, ExcludeError, Filesystem, LayerContent,
    LayerDescriptor, LayerError, OpenLayer, Progress, Session, Tree, TreeError, TreeNumber,
    blob_id, open_indexed_layer, open_layer, open_layer_without_ranges, reopen_layer,
};
use weightfs_peers::Peers;
use weightfs_store::{
    BlobId, Digest, Reference, Registries, Repository, Source, SourceError, Store, Trust,
};

use crate::cache;
use crate::indexes::{BadIndex, Indexes};
use crate::profiles;
use crate::references::{Pin, References};

pub use removed::Removed;

/// Layers of one artifact that are opened at the same time: each may cost a few round trips.
const LAYERS_AT_ONCE: usize = 8;

/// Why an artifact can't be shown.
#[derive(Debug, thiserror::Error)]
pub enum TreesError {
    /// The reference names nothing that can be shown.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// A layer can't be opened.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The layers make no tree.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// Its index is refused.
    #[error(transparent)]
    Index(#[from] BadIndex),
    /// What is to be left out can't be said so.
    #[error("files to leave out: {0}")]
    Exclude(#[from] ExcludeError),
    /// The cache has lost the listing of a layer.
    #[error("layer {0}: its listing is no longer in the cache")]
    Forgotten(weightfs_store::Digest),
    /// The kernel knows another tree by that number.
    #[error(
        "this version of weightfs numbers the files of tree {0} otherwise than the one that \
         mounted it; end the containers that use it, and pull the image again"
    )]
    OtherNumbers(TreeNumber),
}

impl TreesError {
    /// Whether a registry gives a layer only as a whole.
    fn has_no_ranges(&self) -> bool {
        let Self::Layer(LayerError::Source { source, .. }) = self else { return false };
        matches!(source, SourceError::NoRanges { .. })
    }
}

/// Opens artifacts with one store and one set of registries.
#[derive(Debug, Clone)]
pub struct Opener {
    /// Where artifacts come from.
    pub registries: Arc<Registries>,
    /// Where their bytes go.
    pub store: Arc<Store>,
    /// What was opened, by name.
    pub references: Arc<References>,
    /// What is said of them beside them.
    pub indexes: Arc<Indexes>,
    /// How long a source may give nothing.
    pub deadline: Duration,
    /// Other nodes that have the same, if there are to be any.
    pub peers: Option<Arc<Peers>>,
}

/// What must be remembered of a tree to show it again without a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TreeRecord {
    /// Its layers, from the lowest to the highest.
    pub layers: Vec<LayerRecord>,
    /// Whether ordinary overlay layers lie below.
    pub over_foreign: bool,
    /// Files that are left out, as patterns.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
}

impl TreeRecord {
    /// Of these layers, with nothing left out.
    pub const fn new(layers: Vec<LayerRecord>, over_foreign: bool) -> Self {
        Self { layers, over_foreign, exclude: Vec::new() }
    }
}

/// A layer and where it can be had.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// The layer.
    pub descriptor: LayerDescriptor,
    /// A repository that has it.
    pub repository: Repository,
}

/// Layers of a tree, with what must be remembered of them.
#[derive(Debug, Clone)]
pub struct OpenTree {
    /// From the lowest to the highest.
    pub layers: Vec<Arc<OpenLayer>>,
    /// The same, as it is remembered.
    pub record: TreeRecord,
    /// How many of them are those of the tree below.
    below: usize,
}

/// Numbers of a tree's blobs, each counted once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeStats {
    /// Bytes of the blobs.
    pub size: u64,
    /// Bytes of them that are in the cache.
    pub cached: u64,
    /// Bytes fetched since they were opened.
    pub fetched: u64,
    /// Chunks since then that were not what they should be, and were not served.
    pub rejected: u64,
    /// The least that is known of one of them.
    pub trust: Trust,
}

impl Opener {
    /// Where a layer comes from.
    fn source(&self, layer: &LayerRecord) -> Arc<dyn Source> {
        let LayerRecord { descriptor, repository } = layer;
        let source = self.registries.source(repository, descriptor.digest, descriptor.size);
        match &self.peers {
            Some(peers) => peers.in_front_of(source, descriptor.digest, repository),
            None => source,
        }
    }

    /// Other nodes may have what is here of an open layer.
    fn share(&self, layer: Arc<OpenLayer>, repository: &Repository) -> Arc<OpenLayer> {
        if let Some(peers) = &self.peers {
            peers.share(&layer.blob, repository);
        }
        layer
    }

    /// What the reference names.
    ///
    /// # Errors
    /// A registry that fails, or something that is no artifact of a known kind.
    pub async fn resolve(&self, reference: &Reference) -> Result<Artifact, TreesError> {
        let platform = weightfs_fusefs::Platform::host();
        Ok(Artifact::resolve(&self.registries, reference, &platform).await?)
    }

    /// Opens all layers of an artifact.
    ///
    /// # Errors
    /// A layer that can't be opened.
    pub async fn open(
        &self,
        artifact: &Artifact,
        progress: &dyn Progress,
    ) -> Result<OpenTree, TreesError> {
        self.open_by(artifact, None, progress).await
    }

    /// Opens all layers of an artifact, by the index in the bytes that are `given`, if it is
    /// usable, else by one that is found.
    ///
    /// # Errors
    /// A layer that can't be opened.
    pub async fn open_by(
        &self,
        artifact: &Artifact,
        given: Option<Bytes>,
        progress: &dyn Progress,
    ) -> Result<OpenTree, TreesError> {
        let records = layer_records(artifact);
        let must = given.is_some();
        // Looked for once, and only if a layer waits for it.
        let lookup = self.indexes.find(&self.registries, artifact, given).boxed().shared();
        let opened = stream::iter(records.clone())
            .map(|record| {
                let lookup = lookup.clone();
                async move {
                    self.confirm(&record).await?;
                    match self.open_one(&record, lookup, must, progress).await {
                        Err(error) if error.has_no_ranges() => {
                            self.open_without_ranges(&record, progress).await
                        }
                        opened => opened,
                    }
                }
            })
            .buffered(LAYERS_AT_ONCE)
            .try_collect();
        let layers = opened.await?;
        if let Some(Ok(Some(index))) = lookup.peek() {
            self.keep_profile(artifact, index).await;
        }
        Ok(OpenTree::new(layers, TreeRecord::new(records, false)))
    }

    /// Keeps the profile of an index for the mounts of an artifact, unless there is one: what was
    /// recorded or given here counts more.
    async fn keep_profile(&self, artifact: &Artifact, index: &Index) {
        let layers: Vec<_> = artifact.layers.iter().map(|layer| layer.digest).collect();
        let Some(profile) = index.profile_of(artifact.manifest_digest, &layers) else { return };
        let store = Arc::clone(&self.store);
        let kept =
            tokio::task::spawn_blocking(move || profiles::keep_unless_known(&store, &profile));
        if let Ok(Err(error)) = kept.await {
            warn!(%error, "the profile of an index is not kept");
        }
    }

    /// Learns whether a layer's repository gives it to us, if its bytes may come from elsewhere:
    /// the cache may have it from another repository, and so may other nodes.
    ///
    /// # Errors
    /// When it does not, or can't be asked.
    pub async fn confirm(&self, record: &LayerRecord) -> Result<(), TreesError> {
        let LayerRecord { descriptor, repository } = record;
        let (store, id) = (Arc::clone(&self.store), blob_id(descriptor));
        let look = tokio::task::spawn_blocking(move || store.layout(id).is_some());
        if self.peers.is_none() && !look.await.unwrap_or(true) {
            return Ok(());
        }
        let digest = descriptor.digest;
        let confirmed = self.registries.confirm(repository, digest).await;
        confirmed.map_err(|source| LayerError::Source { digest, source }.into())
    }

    /// Opens a layer, by what an index says of it where there is one. A layer of which enough is
    /// known does not wait for that; a tar whose headers would have to be read is begun with.
    async fn open_one(
        &self,
        record: &LayerRecord,
        lookup: impl Future<Output = Result<Option<Arc<Index>>, BadIndex>> + Send,
        must: bool,
        progress: &dyn Progress,
    ) -> Result<Arc<OpenLayer>, TreesError> {
        let (store, id) = (Arc::clone(&self.store), blob_id(&record.descriptor));
        let look = move || (store.is_settled(id), store.layout(id).is_some());
        let (settled, known) = tokio::task::spawn_blocking(look).await.unwrap_or_default();
        if settled && !must {
            return self.open_layer(record, None, progress).await;
        }
        let descriptor = &record.descriptor;
        let tar = !matches!(descriptor.content, LayerContent::Raw(_));
        if known || !tar || descriptor.compression != Compression::None {
            let index = lookup.await?;
            return self.open_layer(record, index.as_deref(), progress).await;
        }
        let walk = pin!(self.open_layer(record, None, progress));
        match select(pin!(lookup), walk).await {
            Either::Left((Ok(None), walk)) => walk.await,
            // Not waited for any more, and dropped when this returns.
            Either::Left((index, _walk)) => {
                self.open_layer(record, index?.as_deref(), progress).await
            }
            Either::Right((walked, lookup)) => match lookup.await? {
                None => walked,
                index => self.open_layer(record, index.as_deref(), progress).await,
            },
        }
    }

    /// Opens one layer, by what `index` says of it if it can be used.
    ///
    /// # Errors
    /// See [`open_layer`].
    pub async fn open_layer(
        &self,
        record: &LayerRecord,
        index: Option<&Index>,
        progress: &dyn Progress,
    ) -> Result<Arc<OpenLayer>, TreesError> {
        let LayerRecord { descriptor, repository } = record;
        let source = self.source(record);
        if let Some(index) = index.and_then(|index| index.layer(descriptor.digest)) {
            let source = Arc::clone(&source);
            match open_indexed_layer(&self.store, source, descriptor, index).await {
                Ok(Some(open)) => return Ok(self.share(open, repository)),
                Ok(None) => {}
                Err(why) => warn!(layer = %descriptor.digest, %why, "index ignored"),
            }
        }
        let open = open_layer(&self.store, source, descriptor, self.deadline, progress).await?;
        Ok(self.share(open, repository))
    }

    /// Opens a layer of a registry that ignores ranges.
    async fn open_without_ranges(
        &self,
        record: &LayerRecord,
        progress: &dyn Progress,
    ) -> Result<Arc<OpenLayer>, TreesError> {
        let LayerRecord { descriptor, repository } = record;
        let source = self.registries.source(repository, descriptor.digest, descriptor.size);
        let (store, deadline) = (&self.store, self.deadline);
        Ok(open_layer_without_ranges(store, source, descriptor, deadline, progress).await?)
    }

    /// Remembers what a reference named; where it is pinned, so are its blobs from now on.
    pub async fn remember(&self, reference: &str, manifest: Digest, record: &TreeRecord) {
        let (references, store) = (Arc::clone(&self.references), Arc::clone(&self.store));
        let (reference, layers) = (reference.to_owned(), record.layers.clone());
        let remembered = tokio::task::spawn_blocking(move || {
            references.remember(&reference, manifest, &layers);
            match references.find(&reference) {
                Some(known) if known.pin == Pin::Pinned => cache::settle_pins(&references, &store),
                _ => Ok(()),
            }
        });
        // A panic in there has been reported.
        if let Ok(Err(error)) = remembered.await {
            warn!(%error, "a pinned layer is not pinned: it may be evicted");
        }
    }

    /// Opens the layers of a tree from the cache alone.
    ///
    /// # Errors
    /// When the cache does not know one of them any more.
    pub fn reopen(&self, record: TreeRecord) -> Result<OpenTree, TreesError> {
        let reopen = |layer: &LayerRecord| {
            let LayerRecord { descriptor, repository } = layer;
            let open = reopen_layer(&self.store, vec![self.source(layer)], descriptor)?;
            let open = open.ok_or(TreesError::Forgotten(descriptor.digest))?;
            self.registries.assume_confirmed(repository, descriptor.digest);
            Ok(self.share(open, repository))
        };
        let layers = record.layers.iter().map(reopen).collect::<Result<_, TreesError>>()?;
        Ok(OpenTree::new(layers, record))
    }
}

impl OpenTree {
    /// Open layers, none of them another tree's.
    pub const fn new(layers: Vec<Arc<OpenLayer>>, record: TreeRecord) -> Self {
        Self { layers, record, below: 0 }
    }

    /// It on top of another tree.
    #[must_use]
    pub fn over(self, below: Option<&Self>) -> Self {
        let Some(below) = below else { return self };
        let mut tree = below.clone();
        tree.below = below.layers.len();
        tree.layers.extend(self.layers);
        tree.record.layers.extend(self.record.layers);
        tree
    }

    /// The layers that it has beyond those of the tree below.
    pub fn own_layers(&self) -> &[Arc<OpenLayer>] {
        self.layers.get(self.below..).unwrap_or_default()
    }

    /// The tree that the layers make, without what is left out.
    ///
    /// # Errors
    /// Layers that contradict each other.
    pub fn merge(&self) -> Result<Tree, TreesError> {
        let base = if self.record.over_foreign { Base::Foreign } else { Base::Nothing };
        let exclude = Exclude::new(&self.record.exclude)?;
        Ok(Tree::merge_without(&self.layers, base, &exclude)?)
    }

    /// Numbers of its blobs.
    pub fn stats(&self) -> TreeStats {
        stats_of(&self.layers)
    }

    /// Numbers of the blobs of its own layers.
    pub fn own_stats(&self) -> TreeStats {
        stats_of(self.own_layers())
    }
}

fn stats_of(layers: &[Arc<OpenLayer>]) -> TreeStats {
    let mut seen: Vec<BlobId> = Vec::new();
    layers.iter().fold(TreeStats::nothing(), |sum, layer| {
        if seen.contains(&layer.blob.id()) {
            return sum;
        }
        seen.push(layer.blob.id());
        let blob = layer.blob.stats();
        TreeStats {
            size: sum.size + blob.size,
            cached: sum.cached + blob.cached,
            fetched: sum.fetched + blob.fetched,
            rejected: sum.rejected + blob.rejected,
            trust: least(sum.trust, blob.trust),
        }
    })
}

/// The layers of an artifact, as they are remembered.
pub fn layer_records(artifact: &Artifact) -> Vec<LayerRecord> {
    let record = |descriptor: &LayerDescriptor| LayerRecord {
        descriptor: descriptor.clone(),
        repository: artifact.repository.clone(),
    };
    artifact.layers.iter().map(record).collect()
}

impl TreeStats {
    /// Numbers of no blob.
    pub const fn nothing() -> Self {
        Self { size: 0, cached: 0, fetched: 0, rejected: 0, trust: Trust::Verified }
    }
}

/// The lesser of two.
pub(crate) fn least(a: Trust, b: Trust) -> Trust {
    match (a, b) {
        (Trust::Poisoned, _) | (_, Trust::Poisoned) => Trust::Poisoned,
        (Trust::Transport, _) | (_, Trust::Transport) => Trust::Transport,
        (Trust::Indexed, _) | (_, Trust::Indexed) => Trust::Indexed,
        (Trust::Verified, Trust::Verified) => Trust::Verified,
    }
}

/// The word that people see for it.
pub const fn trust_name(trust: Trust) -> &'static str {
    match trust {
        Trust::Transport => "transport",
        Trust::Indexed => "indexed",
        Trust::Verified => "verified",
        Trust::Poisoned => "poisoned",
    }
}

/// The trees of one mount.
#[derive(Debug)]
pub struct Trees {
    filesystem: Arc<Filesystem>,
    mountpoint: PathBuf,
    removed: Removed,
    /// Set when the mount is served.
    session: OnceLock<Session>,
    shown: Mutex<HashMap<TreeNumber, Arc<OpenTree>>>,
}

impl Trees {
    /// The trees of a mount at `mountpoint`; none yet, and nobody serves it yet.
    pub fn new(filesystem: Arc<Filesystem>, mountpoint: PathBuf, removed: Removed) -> Self {
        let (session, shown) = Default::default();
        Self { filesystem, mountpoint, removed, session, shown }
    }

    /// The mount is served from now on.
    pub fn serve(&self, session: Session) -> &Session {
        self.session.get_or_init(|| session)
    }

    /// The mount, once it is served.
    pub fn session(&self) -> Option<&Session> {
        self.session.get()
    }

    /// What the mount shows.
    pub const fn filesystem(&self) -> &Arc<Filesystem> {
        &self.filesystem
    }

    /// Where the mount is.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Shows a tree. The number must not have been used before for another one.
    ///
    /// # Errors
    /// Layers that contradict each other; a tree that the kernel knows otherwise.
    pub fn show(&self, number: TreeNumber, tree: OpenTree) -> Result<(), TreesError> {
        let merged = tree.merge()?;
        if !self.filesystem.add(number, merged) {
            return Err(TreesError::OtherNumbers(number));
        }
        self.lock().insert(number, Arc::new(tree));
        Ok(())
    }

    /// Serves on what a predecessor had removed while it was in use. One that can't be served is
    /// logged: its users get ESTALE.
    pub fn restore_removed(&self, opener: &Opener) {
        for number in self.filesystem.awaited() {
            if let Err(error) = self.restore_one_removed(opener, number) {
                error!(tree = number.0, error, "a removed tree is lost");
            }
        }
        self.sweep();
    }

    fn restore_one_removed(&self, opener: &Opener, number: TreeNumber) -> Result<(), String> {
        let record = self.removed.get(number).map_err(|error| error.to_string())?;
        let tree = opener.reopen(record).map_err(|error| error.to_string())?;
        let tree = tree.merge().map_err(|error| error.to_string())?;
        if self.filesystem.add_removed(number, tree) {
            return Ok(());
        }
        Err(TreesError::OtherNumbers(number).to_string())
    }

    /// Takes a tree away. Blocks as [`Session::remove`] does.
    pub fn hide(&self, number: TreeNumber) {
        if let Some(tree) = self.lock().remove(&number) {
            self.removed.put(number, &tree.record);
        }
        match self.session.get() {
            Some(session) => session.remove(number),
            None => drop(self.filesystem.remove(number)),
        }
        self.sweep();
    }

    /// A tree that is shown.
    pub fn get(&self, number: TreeNumber) -> Option<Arc<OpenTree>> {
        self.lock().get(&number).cloned()
    }

    /// The directory of a tree.
    pub fn directory(&self, number: TreeNumber) -> PathBuf {
        self.mountpoint.join(number.directory_name())
    }

    /// Forgets removed trees that nobody uses any more. Blocks on the disk.
    pub fn sweep(&self) {
        self.removed.sweep(|number| self.filesystem.serves(number));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TreeNumber, Arc<OpenTree>>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
