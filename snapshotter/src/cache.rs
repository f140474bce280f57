//! The cache by name: what it holds, and evicting, pinning, hashing again and repairing it. Asked
//! through the control socket, or by the command line itself where no daemon owns the directory;
//! so what is said of it are the messages of the control protocol.
//!
//! Invariant: a blob is pinned in the store exactly while a pinned reference has it, as far as
//! [`settle_pins`] was reached after the last change.

mod pull;
mod verify;

pub use self::pull::Selection;
pub use self::verify::Repair;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use weightfs_proto::control::{
    CacheReply, CachedBlob, CachedReference, EvictReply, EvictedBlob, PinReply, PruneReply,
};
use weightfs_store::{
    BlobId, BlobUsage, Digest, Evicted, Form, OpenError, ReadError, Reference, Store, Usage,
    VerifyError, parse_reference,
};

use crate::profiles::ProfileUseError;
use crate::references::{Pin, ReferenceRecord, References};
use crate::trees::{Opener, TreeRecord, TreesError, layer_records, trust_name};

/// What a command on the cache is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// All blobs of what was mounted under that name, in full.
    Reference(String),
    /// One blob, in each form that is here.
    Blob(Digest),
}

impl FromStr for Subject {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(digest) = text.parse() {
            return Ok(Self::Blob(digest));
        }
        let reference = parse_reference(text).map_err(|error| format!("{text}: {error}"))?;
        Ok(Self::Reference(reference.whole()))
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reference(reference) => f.write_str(reference),
            Self::Blob(digest) => digest.fmt(f),
        }
    }
}

/// Why something could not be done with the cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The cache can't be used.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// A blob can't be read.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// The registry does not give it.
    #[error(transparent)]
    Trees(#[from] TreesError),
    /// The records of references can't be written.
    #[error("the records of references: {0}")]
    References(#[from] io::Error),
    /// Nothing of it is here.
    #[error("{0} is not in the cache; `weightfs cache ls` shows what is")]
    Unknown(Subject),
    /// No file has such a name.
    #[error("no file of {reference} matches {patterns}; `weightfs ls` shows its files")]
    NoFile {
        /// The artifact.
        reference: String,
        /// What was asked for.
        patterns: String,
    },
    /// No load of it was recorded here.
    #[error("no load of {0} was recorded here; see `weightfs mount --record`, or name a profile")]
    NoProfile(String),
    /// The profile can't be used.
    #[error(transparent)]
    Profile(#[from] ProfileUseError),
    /// A file can't be fetched.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// What is wrong.
        source: Box<ReadError>,
    },
    /// A part of the work panicked.
    #[error("the work was given up: {0}")]
    Stopped(#[from] tokio::task::JoinError),
}

/// The cache of a state directory.
#[derive(Debug, Clone)]
pub struct Cache {
    opener: Opener,
    root: String,
}

impl Cache {
    /// What that opener opens into; `root` is the state directory, for people.
    pub fn new(opener: Opener, root: &std::path::Path) -> Self {
        Self { opener, root: root.display().to_string() }
    }

    fn store(&self) -> &Arc<Store> {
        &self.opener.store
    }

    fn references(&self) -> &Arc<References> {
        &self.opener.references
    }

    /// What the cache holds. Blocks on the disk.
    ///
    /// # Errors
    /// When the state directory can't be read.
    pub fn list(&self) -> Result<CacheReply, CacheError> {
        let Usage { limit, min_free, free, used, blobs } = self.store().usage()?;
        let known = self.references().all();
        let names = names(&known);
        let blobs = blobs.iter().map(|blob| blob_message(blob, &names)).collect();
        let (root, references) = (self.root.clone(), known.iter().map(reference_message).collect());
        Ok(CacheReply { root, limit, min_free, free, used, blobs, references })
    }

    /// Takes what is here of `subject` out of the cache, as far as nobody uses it. Blocks on the
    /// disk.
    ///
    /// # Errors
    /// When nothing is known of it, or the state directory can't be changed.
    pub fn evict(&self, subject: &Subject) -> Result<EvictReply, CacheError> {
        let mut blobs = Vec::new();
        for id in self.blobs_of(subject)? {
            blobs.push(evicted_message(id, self.store().evict(id)?));
        }
        self.forget_unused()?;
        Ok(EvictReply { blobs })
    }

    /// Takes out of the cache what is neither in use nor pinned. Blocks on the disk.
    ///
    /// # Errors
    /// When the state directory can't be changed.
    pub fn prune(&self) -> Result<PruneReply, CacheError> {
        let pruned = self.store().prune()?;
        self.forget_unused()?;
        Ok(PruneReply { blobs: pruned.blobs as u64, freed: pruned.freed })
    }

    /// Keeps the blobs of a reference. One that was never opened here is looked up in its
    /// registry.
    ///
    /// # Errors
    /// When the registry does not have it, or it can't be written down.
    pub async fn pin(&self, reference: &Reference) -> Result<PinReply, CacheError> {
        let name = reference.whole();
        if self.references().find(&name).is_none() {
            let artifact = self.opener.resolve(reference).await?;
            let record = TreeRecord::new(layer_records(&artifact), false);
            self.opener.remember(&name, artifact.manifest_digest, &record).await;
        }
        self.set_pin(&name, Pin::Pinned).await
    }

    /// Takes a pin away.
    ///
    /// # Errors
    /// When the reference is not known, or it can't be written down.
    pub async fn unpin(&self, reference: &Reference) -> Result<PinReply, CacheError> {
        self.set_pin(&reference.whole(), Pin::Loose).await
    }

    async fn set_pin(&self, reference: &str, pin: Pin) -> Result<PinReply, CacheError> {
        let (own, name) = (self.clone(), reference.to_owned());
        let work = move || {
            let unknown = || CacheError::Unknown(Subject::Reference(name.clone()));
            let known = own.references().set_pin(&name, pin)?.ok_or_else(unknown)?;
            settle_pins(own.references(), own.store())?;
            let size = known.layers.iter().map(|layer| layer.descriptor.size).sum();
            Ok(PinReply { blobs: known.blobs().len() as u64, size })
        };
        tokio::task::spawn_blocking(work).await?
    }

    /// The blobs that a command is about.
    fn blobs_of(&self, subject: &Subject) -> Result<Vec<BlobId>, CacheError> {
        let blobs = match subject {
            Subject::Reference(reference) => {
                self.references().find(reference).map(|known| known.blobs()).unwrap_or_default()
            }
            Subject::Blob(digest) => {
                let usage = self.store().usage()?;
                let ids = usage.blobs.iter().map(|blob| blob.id);
                ids.filter(|id| id.digest == *digest).collect()
            }
        };
        if blobs.is_empty() { Err(CacheError::Unknown(subject.clone())) } else { Ok(blobs) }
    }

    /// Forgets references of which nothing is here any more, unless they are pinned.
    fn forget_unused(&self) -> Result<(), CacheError> {
        let usage = self.store().usage()?;
        let here: HashSet<_> = usage.blobs.iter().map(|blob| blob.id).collect();
        for known in self.references().all() {
            if known.pin == Pin::Loose && !known.blobs().iter().any(|id| here.contains(id)) {
                self.references().forget(&known.reference)?;
            }
        }
        Ok(())
    }
}

/// Pins what pinned references have, and nothing else. Blocks on the disk.
///
/// # Errors
/// When the state directory can't be changed.
pub fn settle_pins(references: &References, store: &Store) -> Result<(), OpenError> {
    let pinned = references.all().into_iter().filter(|known| known.pin == Pin::Pinned);
    let wanted: HashSet<_> = pinned.flat_map(|known| known.blobs()).collect();
    let usage = store.usage()?;
    let have: HashSet<_> =
        usage.blobs.iter().filter(|blob| blob.pinned).map(|blob| blob.id).collect();
    wanted.difference(&have).try_for_each(|id| store.pin(*id))?;
    have.difference(&wanted).try_for_each(|id| store.unpin(*id))
}

/// The references that have each blob.
fn names(known: &[ReferenceRecord]) -> HashMap<BlobId, Vec<String>> {
    let mut names: HashMap<BlobId, Vec<String>> = HashMap::new();
    for record in known {
        for id in record.blobs() {
            names.entry(id).or_default().push(record.reference.clone());
        }
    }
    names
}

fn reference_message(known: &ReferenceRecord) -> CachedReference {
    CachedReference {
        reference: known.reference.clone(),
        manifest_digest: known.manifest_digest.to_string(),
        pinned: known.pin == Pin::Pinned,
    }
}

fn blob_message(blob: &BlobUsage, names: &HashMap<BlobId, Vec<String>>) -> CachedBlob {
    let since_epoch = blob.last_used.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    CachedBlob {
        digest: blob.id.digest.to_string(),
        decompressed: blob.id.form == Form::Decompressed,
        size: blob.size,
        cached: blob.cached,
        disk: blob.disk,
        trust: trust_name(blob.trust).to_owned(),
        in_use: blob.in_use,
        pinned: blob.pinned,
        last_used: since_epoch.map(|time| time.as_secs()),
        references: names.get(&blob.id).cloned().unwrap_or_default(),
    }
}

fn evicted_message(id: BlobId, evicted: Evicted) -> EvictedBlob {
    let (outcome, freed, kept) = match evicted {
        Evicted::Whole { freed } => ("whole", freed, 0),
        Evicted::Part { freed, kept } => ("part", freed, kept),
        Evicted::Pinned => ("pinned", 0, 0),
        Evicted::Nothing => ("nothing", 0, 0),
    };
    EvictedBlob { digest: id.digest.to_string(), outcome: outcome.to_owned(), freed, kept }
}
