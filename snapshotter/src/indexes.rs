//! Looking for the index of an artifact that is being opened.
//!
//! Invariant: an index that can't be had or used is passed over with a warning and its reason; the
//! artifact is opened as if there were none. Where nothing is served unverified
//! (`cache.verify = "strict"`), one that is refused keeps the artifact from being opened.

use std::io::{self, Read as _};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use lru::LruCache;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout};
use tracing::warn;
use weightfs_fusefs::Artifact;
use weightfs_fusefs::index::find::{Believe, Lookup, annotated_index, find_index, subject_of};
use weightfs_fusefs::index::{Index, MAX_INDEX_BYTES};
use weightfs_store::{Digest, Registries, SourceError, Verify};

/// How long a registry may take to find an index and to give it.
const LOOKUP_DEADLINE: Duration = Duration::from_secs(30);

/// Answers that are remembered: containerd asks for each layer of an image in turn. An index of
/// 100 GB has 3 MB.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(8).unwrap();

/// For how long: an index that is pushed meanwhile is found by the next pull.
const REMEMBERED_FOR: Duration = Duration::from_secs(60);

/// Which indexes are believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IndexPolicy {
    /// Those that somebody pushed who may push to the artifact's repository.
    SameRepository,
    /// Those with a signature.
    Signed,
    /// None that was only found.
    Off,
}

/// Why an artifact is not opened: it has an index, which is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the index of {manifest} is refused, and with cache.verify = \"strict\" nothing is mounted in \
     spite of that: {why}"
)]
pub struct BadIndex {
    manifest: Digest,
    why: String,
}

/// What came of looking for an index.
type Answer = Result<Option<Arc<Index>>, BadIndex>;

/// What was found of manifests, and when.
type Answers = LruCache<Digest, (Instant, Answer)>;

/// Finds indexes.
#[derive(Debug)]
pub struct Indexes {
    believe: Option<Believe>,
    verify: Verify,
    answers: Mutex<Answers>,
}

impl Indexes {
    /// Those that are to be believed; none of those that are only found, if that is `None`.
    pub fn new(believe: Option<Believe>, verify: Verify) -> Arc<Self> {
        Arc::new(Self { believe, verify, answers: Mutex::new(LruCache::new(REMEMBERED)) })
    }

    /// The index of an artifact: the one in the bytes that are `given`, the one that its manifest
    /// names, or one that the policy allows.
    ///
    /// # Errors
    /// One that is refused, where nothing is served unverified.
    pub async fn find(
        &self,
        registries: &Registries,
        artifact: &Artifact,
        given: Option<Bytes>,
    ) -> Answer {
        let manifest = artifact.manifest_digest;
        if let Some(bytes) = given {
            match Index::parse(&bytes, manifest) {
                Ok(index) => return Ok(Some(Arc::new(index))),
                Err(why) => {
                    warn!(%manifest, %why, "the given index is ignored");
                    self.refused(manifest, why.to_string())?;
                }
            }
        }
        if let Some((_, answer)) = self.answers().get(&manifest).filter(|(at, _)| is_fresh(*at)) {
            return answer.clone();
        }
        let answer = timeout(LOOKUP_DEADLINE, self.look_up(registries, artifact)).await;
        let answer = answer.unwrap_or_else(|_| {
            warn!(%manifest, "the registry takes too long to look for an index: none is used");
            Ok(None)
        });
        self.answers().put(manifest, (Instant::now(), answer.clone()));
        answer
    }

    async fn look_up(&self, registries: &Registries, artifact: &Artifact) -> Answer {
        let Artifact { repository, manifest_digest, manifest, .. } = artifact;
        match annotated_index(registries, repository, manifest).await {
            Ok(Some(index)) => return Ok(Some(Arc::new(index))),
            Ok(None) => {}
            Err(why) => {
                warn!(manifest = %manifest_digest, why, "the annotated index is ignored");
                self.refused(*manifest_digest, why)?;
            }
        }
        match self.beside(registries, artifact).await {
            Ok(Lookup::Found(found)) => Ok(Some(Arc::new(found.index))),
            Ok(Lookup::Refused(why)) => self.refused(*manifest_digest, why).map(|()| None),
            Ok(Lookup::Nothing) => Ok(None),
            Err(error) => {
                warn!(manifest = %manifest_digest, %error, "no index can be looked for");
                Ok(None)
            }
        }
    }

    /// What the registry has beside an artifact, as far as the policy allows to believe it.
    ///
    /// # Errors
    /// A registry that can't be reached or refuses.
    pub async fn beside(
        &self,
        registries: &Registries,
        artifact: &Artifact,
    ) -> Result<Lookup, SourceError> {
        let (repository, manifest) = (&artifact.repository, subject_of(artifact));
        match &self.believe {
            Some(believe) => find_index(registries, repository, manifest, believe).await,
            None => Ok(Lookup::Nothing),
        }
    }

    /// An index is refused; its reason has been logged.
    fn refused(&self, manifest: Digest, why: String) -> Result<(), BadIndex> {
        match self.verify {
            Verify::Background => Ok(()),
            Verify::Strict => Err(BadIndex { manifest, why }),
        }
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_fresh(at: Instant) -> bool {
    at.elapsed() < REMEMBERED_FOR
}

/// Reads the file of an index, as far as one can be long.
///
/// # Errors
/// When it can't be read.
pub async fn read(path: PathBuf) -> io::Result<Bytes> {
    let work = move || {
        let mut bytes = vec![];
        std::fs::File::open(&path)?.take(MAX_INDEX_BYTES + 1).read_to_end(&mut bytes)?;
        Ok(bytes.into())
    };
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
