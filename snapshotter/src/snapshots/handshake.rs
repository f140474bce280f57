//! Making snapshots: Prepare and View, and containerd's handshake for layers that need not be
//! downloaded.
//!
//! The handshake: Prepare comes with the label `containerd.io/snapshot.ref`. If the layer can be
//! lazy, a *committed* snapshot with that label and exactly that parent is made at once, and the
//! answer is "already exists"; containerd then looks for it by label and parent. Else an ordinary
//! active snapshot is made, into which containerd unpacks.

use std::sync::Arc;

use super::layer::{LayerMounter, LayerRequest, LazyLayer, LazyParent, Verdict};
use super::{Labels, Mount, NewSnapshot, SnapshotError, Snapshots, describe, mounts};
use crate::metadata::{Backing, Change, Kind, Record, SNAPSHOT_REF, TreeNumber, Usage};
use crate::reason::Reason;

/// What became of a Prepare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prepared {
    /// An active snapshot, to be mounted so.
    Active(Vec<Mount>),
    /// The layer is there already, as this committed snapshot: containerd is told that it exists.
    Committed {
        /// The snapshot's name.
        name: String,
    },
}

impl Snapshots {
    /// Makes an active snapshot, or finds or mounts the layer that the labels name.
    pub async fn prepare(
        self: &Arc<Self>,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Prepared, SnapshotError> {
        let new = NewSnapshot::new(key, parent, labels)?;
        let this = self.clone();
        self.finish(async move {
            match new.labels.get(SNAPSHOT_REF).cloned() {
                None => this.create(new, Kind::Active, None).await.map(Prepared::Active),
                Some(chain_id) => this.prepare_layer(&chain_id, new).await,
            }
        })
        .await
    }

    /// Makes a read-only snapshot.
    pub async fn view(
        self: &Arc<Self>,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, SnapshotError> {
        let new = NewSnapshot::new(key, parent, labels)?;
        self.create(new, Kind::View, None).await
    }

    async fn prepare_layer(
        self: Arc<Self>,
        chain_id: &str,
        new: NewSnapshot,
    ) -> Result<Prepared, SnapshotError> {
        let _turn = self.flights.turn(chain_id, new.parent.as_deref()).await;
        new.check(&self.metadata.index())?;
        if let Some(name) = self.committed_layer(chain_id, new.parent.as_deref()) {
            return Ok(Prepared::Committed { name });
        }
        match self.mounter.mount(self.layer_request(chain_id, &new)).await {
            Verdict::Lazy(layer) => self.commit_lazy(new, layer).await,
            Verdict::Ordinary { reason } => {
                let (key, labels) = (new.key.clone(), new.labels.clone());
                let mounts = self.create(new, Kind::Active, Some(reason.clone())).await?;
                self.decisions.ordinary(&key, &labels, &reason);
                Ok(Prepared::Active(mounts))
            }
            Verdict::Refused { reason } => Err(SnapshotError::Refused { reason }),
        }
    }

    fn committed_layer(&self, chain_id: &str, parent: Option<&str>) -> Option<String> {
        let index = self.metadata.index();
        let mut found = index.targets(chain_id, parent);
        found
            .find(|record| record.info.kind == Kind::Committed)
            .map(|record| record.info.name.clone())
    }

    fn layer_request(&self, chain_id: &str, new: &NewSnapshot) -> LayerRequest {
        let parent = new.parent.as_ref().and_then(|name| {
            let tree = self.metadata.index().tree_of(name)?;
            Some(LazyParent { name: name.clone(), tree })
        });
        LayerRequest::new(chain_id, &new.labels, parent, new.parent.is_some())
    }

    /// Stores a mounted layer as a committed snapshot, under the key of its Prepare: containerd
    /// finds it by its label, and no other snapshot has that key.
    async fn commit_lazy(
        self: &Arc<Self>,
        new: NewSnapshot,
        layer: LazyLayer,
    ) -> Result<Prepared, SnapshotError> {
        let mounted = MountedTree { mounter: self.mounter.clone(), tree: Some(layer.tree) };
        let this = self.clone();
        let stored = self
            .blocking(move || {
                this.metadata.change(|index| {
                    new.check(index)?;
                    let backing = Backing::Lazy { tree: layer.tree, record: layer.record };
                    let info = new.into_info(Kind::Committed);
                    let stored = (info.name.clone(), info.labels.clone());
                    Ok((Change::Put(Record { info, backing }), stored))
                })
            })
            .await;
        match stored {
            Ok((name, labels)) => {
                mounted.keep();
                self.decisions.lazy(&name, &labels);
                Ok(Prepared::Committed { name })
            }
            Err(error) => {
                if error.is_clean() {
                    mounted.unmount().await;
                } else {
                    mounted.keep();
                }
                Err(error)
            }
        }
    }

    /// Makes an ordinary active snapshot or a view.
    async fn create(
        self: &Arc<Self>,
        new: NewSnapshot,
        kind: Kind,
        reason: Option<Reason>,
    ) -> Result<Vec<Mount>, SnapshotError> {
        let this = self.clone();
        self.blocking(move || this.create_blocking(new, kind, reason)).await
    }

    fn create_blocking(
        &self,
        new: NewSnapshot,
        kind: Kind,
        reason: Option<Reason>,
    ) -> Result<Vec<Mount>, SnapshotError> {
        // Told early, so that a call that can't succeed makes no directory.
        let lower = {
            let index = self.metadata.index();
            new.check(&index)?;
            let parent = new.parent.as_deref().and_then(|name| index.get(name));
            parent.map(|parent| mounts::shown_by(parent, &self.directories, &*self.mounter))
        };
        let directory = self.directories.create(kind, lower.as_deref())?;
        let stored = self.metadata.change(|index| {
            new.check(index)?;
            let (id, usage) = (directory.id(), Usage::default());
            let copies = mounts::copies(&new.key);
            let backing = Backing::Directory { id, usage, reason, copies };
            let record = Record { info: new.into_info(kind), backing };
            let ancestors = index.ancestors(&record);
            Ok((Change::Put(record.clone()), (record, ancestors)))
        });
        match stored {
            Ok((record, ancestors)) => {
                directory.keep();
                Ok(self.mounts_of(&record, &ancestors))
            }
            Err(error) => {
                if !SnapshotError::is_clean(&error) {
                    tracing::warn!(error = describe(&error), "a directory is left for the cleanup");
                    directory.keep();
                }
                Err(error)
            }
        }
    }
}

/// A tree that no record names yet. Unmounted again unless it is kept.
struct MountedTree {
    mounter: Arc<dyn LayerMounter>,
    tree: Option<TreeNumber>,
}

impl MountedTree {
    fn keep(mut self) {
        self.tree = None;
    }

    async fn unmount(mut self) {
        if let Some(tree) = self.tree.take() {
            self.mounter.unmount(tree).await;
        }
    }
}

impl Drop for MountedTree {
    /// Only a panic between mount and commit comes here with a tree.
    fn drop(&mut self) {
        let Some(tree) = self.tree.take() else { return };
        let mounter = self.mounter.clone();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { mounter.unmount(tree).await });
        }
    }
}
