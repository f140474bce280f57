//! Models that the daemon shows for `weightfs mount`. They are remembered, so that a daemon that
//! starts again shows them again where they were, without asking the registry.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tracing::{error, info};
use weightfs_fusefs::{Exclude, Profile, Progress, TreeNumber};
use weightfs_store::{Digest, Reference};

use crate::bind::{Bound, bound, rebind};
use crate::metadata::{Metadata, MetadataError};
use crate::owner;
use crate::profiles::{self, ProfileUseError};
use crate::trees::{OpenTree, Opener, TreeRecord, TreeStats, Trees, TreesError};

/// Why a model can't be shown.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// It can't be opened.
    #[error(transparent)]
    Trees(#[from] TreesError),
    /// Its profile can't be used.
    #[error(transparent)]
    Profile(#[from] ProfileUseError),
    /// It can't be remembered.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// It can't be bound to where it was.
    #[error("{}: {source}", target.display())]
    Bind {
        /// Where it was.
        target: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// It can't be written as JSON, or what was remembered is none.
    #[error("the record of a model: {0}")]
    Record(#[from] serde_json::Error),
}

/// What is remembered of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// What was asked for.
    pub reference: String,
    /// The manifest that it named at that time.
    pub manifest_digest: Digest,
    /// Where the caller bound it.
    pub target: PathBuf,
    /// The volume that it is; empty if it is none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub volume: String,
    /// Its layers.
    pub tree: TreeRecord,
}

/// What a caller wants to be shown.
#[derive(Debug)]
pub struct Asked {
    /// Which model.
    pub reference: Reference,
    /// Where the caller is going to bind it.
    pub target: PathBuf,
    /// The volume that it is; empty if it is none.
    pub volume: String,
    /// Files that are left out.
    pub exclude: Vec<String>,
    /// The order in which it is going to be read, if that is not known from earlier.
    pub profile: Option<Profile>,
    /// The index to go by.
    pub index: Option<Bytes>,
}

/// What the daemon's mount is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountState {
    /// Made by this daemon; what is bound elsewhere is dead.
    New,
    /// Taken over from a predecessor; what is bound elsewhere lives.
    TakenOver,
}

/// A model that can be shown.
#[derive(Debug)]
pub struct OpenModel {
    record: ModelRecord,
    tree: OpenTree,
    profile: Option<Profile>,
}

/// A model that is shown.
#[derive(Debug, Clone, PartialEq)]
pub struct ShownModel {
    /// Its tree.
    pub number: TreeNumber,
    /// What was asked for.
    pub reference: String,
    /// The manifest that it named at that time.
    pub manifest_digest: Digest,
    /// Where the caller bound it.
    pub target: PathBuf,
    /// The volume that it is; empty if it is none.
    pub volume: String,
    /// Files that are left out.
    pub exclude: Vec<String>,
    /// Its files.
    pub files: u64,
    /// Numbers of its blobs.
    pub stats: TreeStats,
}

impl ShownModel {
    /// Whether it is known by that reference, or mounted there.
    pub fn is_named(&self, subject: &str) -> bool {
        self.reference == subject || self.target.as_os_str() == subject
    }
}

/// The models of one daemon.
#[derive(Debug)]
pub struct Models {
    opener: Opener,
    trees: Arc<Trees>,
    metadata: Arc<Metadata>,
    shown: Mutex<BTreeMap<TreeNumber, ModelRecord>>,
}

impl Models {
    /// Models among `trees`; none yet.
    pub fn new(opener: Opener, trees: Arc<Trees>, metadata: Arc<Metadata>) -> Self {
        Self { opener, trees, metadata, shown: Mutex::default() }
    }

    /// Opens what was asked for. Nothing is shown yet, and nothing but the profile is left behind if
    /// this is given up.
    ///
    /// # Errors
    /// When it can't be opened.
    pub async fn open(
        &self,
        asked: Asked,
        progress: &dyn Progress,
    ) -> Result<OpenModel, ModelError> {
        let Asked { reference, target, volume, exclude, profile, index } = asked;
        Exclude::new(&exclude).map_err(TreesError::from)?;
        let artifact = self.opener.resolve(&reference).await?;
        let mut tree = self.opener.open_by(&artifact, index, progress).await?;
        // Now that one in an index has been found.
        let profile = profiles::choose(&self.opener.store, artifact.manifest_digest, profile)?;
        tree.record.exclude = exclude;
        let record = ModelRecord {
            reference: reference.whole(),
            manifest_digest: artifact.manifest_digest,
            target,
            volume,
            tree: tree.record.clone(),
        };
        self.opener.remember(&record.reference, record.manifest_digest, &tree.record).await;
        Ok(OpenModel { record, tree, profile })
    }

    /// Shows an open model. Blocks on the disk.
    ///
    /// # Errors
    /// When it can't be remembered; then it is not shown.
    pub fn show(&self, model: OpenModel) -> Result<ShownModel, ModelError> {
        let OpenModel { record, tree, profile } = model;
        let number = self.metadata.allocate_tree()?;
        if let Some(profile) = profile {
            profile.expect(&tree.layers);
        }
        self.trees.show(number, tree)?;
        let remembered = serde_json::to_value(&record)
            .map_err(ModelError::from)
            .and_then(|json| Ok(self.metadata.put_model(number, &json)?));
        if let Err(error) = remembered {
            self.trees.hide(number);
            return Err(error);
        }
        info!(reference = record.reference, tree = number.0, "model mounted");
        let shown = self.describe(number, &record);
        self.lock().insert(number, record);
        Ok(shown)
    }

    /// Takes a model away. One that is not there is taken away already. Blocks on the disk.
    ///
    /// # Errors
    /// When it can't be forgotten; then it stays.
    pub fn release(&self, number: TreeNumber) -> Result<(), MetadataError> {
        if !self.lock().contains_key(&number) {
            return Ok(());
        }
        self.metadata.remove_model(number)?;
        self.trees.hide(number);
        if let Some(record) = self.lock().remove(&number) {
            info!(reference = record.reference, tree = number.0, "model released");
        }
        Ok(())
    }

    /// Shows all models again that are still bound somewhere, and forgets those that were
    /// unmounted while no daemon ran. On a mount that was made anew they are bound anew; one that
    /// was taken over is not served before they are shown, and nothing is asked of it here. One
    /// that can't be shown is logged and left out.
    ///
    /// # Errors
    /// When the metadata can't be read.
    pub fn restore(&self, mount: MountState) -> Result<(), MetadataError> {
        for (number, json) in self.metadata.models()? {
            if let Err(error) = self.restore_one(number, &json, mount) {
                error!(model = %json["reference"], %error, "a model can't be shown again");
            }
        }
        Ok(())
    }

    fn restore_one(
        &self,
        number: TreeNumber,
        json: &serde_json::Value,
        mount: MountState,
    ) -> Result<(), ModelError> {
        let record = ModelRecord::deserialize(json)?;
        let bind_error = |source| ModelError::Bind { target: record.target.clone(), source };
        let there = match mount {
            MountState::New => bound(&record.target) == Bound::Dead,
            MountState::TakenOver => {
                let device = self.trees.filesystem().ledger().device();
                owner::is_bound(&record.target, device, number).map_err(bind_error)?
            }
        };
        if !there && mount == MountState::New {
            return Ok(self.metadata.remove_model(number)?);
        }
        let tree = self.opener.reopen(record.tree.clone())?;
        self.trees.show(number, tree)?;
        if !there {
            // Somebody may hold files of it all the same.
            self.metadata.remove_model(number)?;
            self.trees.hide(number);
            return Ok(());
        }
        if mount == MountState::New {
            rebind(&self.trees.directory(number), &record.target).map_err(bind_error)?;
        }
        self.lock().insert(number, record);
        Ok(())
    }

    /// All models that are shown.
    pub fn list(&self) -> Vec<ShownModel> {
        let shown = self.lock().clone();
        shown.iter().map(|(number, record)| self.describe(*number, record)).collect()
    }

    /// All models that are shown: their trees, what was asked for, and where they are bound.
    pub fn names(&self) -> Vec<(TreeNumber, String, PathBuf)> {
        let shown = self.lock();
        let name = |(number, record): (&TreeNumber, &ModelRecord)| {
            (*number, record.reference.clone(), record.target.clone())
        };
        shown.iter().map(name).collect()
    }

    /// How many models are shown.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    /// Whether a model is bound where its caller wanted it.
    ///
    /// # Errors
    /// When the mount table can't be read.
    pub fn is_bound(&self, model: &ShownModel) -> std::io::Result<bool> {
        let device = self.trees.filesystem().ledger().device();
        owner::is_bound(&model.target, device, model.number)
    }

    /// The directory of a model below the daemon's mount.
    pub fn directory(&self, number: TreeNumber) -> PathBuf {
        self.trees.directory(number)
    }

    fn describe(&self, number: TreeNumber, record: &ModelRecord) -> ShownModel {
        let tree = self.trees.get(number);
        let stats = tree.map_or_else(TreeStats::nothing, |tree| tree.stats());
        let files = self.trees.filesystem().with_tree(number, |tree| tree.files());
        ShownModel {
            number,
            reference: record.reference.clone(),
            manifest_digest: record.manifest_digest,
            target: record.target.clone(),
            volume: record.volume.clone(),
            exclude: record.tree.exclude.clone(),
            files: files.unwrap_or(0),
            stats,
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<TreeNumber, ModelRecord>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
