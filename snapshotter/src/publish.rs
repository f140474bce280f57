//! `[index] publish`: artifacts that were verified here, and have no index, get one. So an artifact
//! has its index from the first node that loaded it.
//!
//! Made in the background, of what is here, once all layers are verified; nothing is downloaded
//! again. Nodes that do so at the same time push the same bytes, so a recorded profile, which only
//! one of them has, is left out.
//!
//! Invariant: nothing waits for this, and nothing fails by it. What fails is logged once for each
//! repository and tried again ever more rarely.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, info, warn};
use weightfs_fusefs::index::MEDIA_TYPE;
use weightfs_fusefs::index::find::annotated;
use weightfs_fusefs::{Artifact, blob_id};
use weightfs_store::{Digest, Repository, Store, Trust, parse_reference};

use crate::config::Config;
use crate::index::{MakeIndexError, make_of_what_is_here};
use crate::references::ReferenceRecord;
use crate::trees::{LayerRecord, Opener, TreesError};

/// How long it waits after something was verified or opened: the layers of an artifact are verified
/// one after the other.
const QUIET: Duration = Duration::from_secs(1);

/// How often it waits that long for all fetching to end, before it goes on beside it.
const BUSY_WAITS: u32 = 600;

/// The first pause after a failure in a repository; each further one doubles it.
const FIRST_PAUSE: Duration = Duration::from_secs(60);

/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(24 * 60 * 60);

/// A failure in a repository.
#[derive(Debug, Clone, Copy)]
struct Held {
    until: Instant,
    pause: Duration,
}

/// What came of an artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Its index is in the registry, now or before.
    Indexed,
    /// Not all of its layers were verified here.
    Incomplete,
}

/// Works in the background until it is dropped.
#[derive(Debug)]
pub struct Publisher(JoinHandle<()>);

impl Publisher {
    /// Starts it where the configuration asks for it.
    pub fn start(config: &Config, opener: &Opener) -> Option<Self> {
        let work = Work {
            opener: opener.clone(),
            done: HashSet::new(),
            incomplete: HashMap::new(),
            held: HashMap::new(),
        };
        config.index.publish.then(|| Self(tokio::spawn(work.run())))
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Work {
    opener: Opener,
    /// Manifests that have an index.
    done: HashSet<Digest>,
    /// Manifests that have layers which were not opened here, and how many were.
    incomplete: HashMap<Digest, usize>,
    held: HashMap<Repository, Held>,
}

impl Work {
    async fn run(mut self) {
        let mut verified = self.opener.store.verified();
        loop {
            self.wait_for_quiet(&mut verified).await;
            self.pass().await;
            let retry = self.held.values().map(|held| held.until).min();
            let retry = async {
                match retry {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = verified.changed() => if changed.is_err() { return },
                () = self.opener.references.changed() => {}
                () = retry => {}
            }
        }
    }

    /// Waits until nothing is fetched, but not for ever.
    async fn wait_for_quiet(&self, verified: &mut watch::Receiver<u64>) {
        for _ in 0..BUSY_WAITS {
            sleep(QUIET).await;
            if !self.opener.store.is_busy() {
                break;
            }
        }
        verified.mark_unchanged();
    }

    /// Looks at all that was opened here.
    async fn pass(&mut self) {
        let references = std::sync::Arc::clone(&self.opener.references);
        let known = tokio::task::spawn_blocking(move || references.all()).await;
        let now = Instant::now();
        self.held.retain(|_, held| held.until + LONGEST_PAUSE > now);
        for record in known.unwrap_or_default() {
            let Some(repository) = record.layers.first().map(|layer| layer.repository.clone())
            else {
                continue;
            };
            let manifest = record.manifest_digest;
            let is_held = self.held.get(&repository).is_some_and(|held| held.until > now);
            let is_incomplete = self.incomplete.get(&manifest) == Some(&record.layers.len());
            if is_held || is_incomplete || self.done.contains(&manifest) {
                continue;
            }
            match self.try_one(&record, &repository).await {
                Ok(Some(Outcome::Indexed)) => {
                    self.done.insert(manifest);
                    self.held.remove(&repository);
                }
                Ok(Some(Outcome::Incomplete)) => {
                    self.incomplete.insert(manifest, record.layers.len());
                }
                Ok(None) => {}
                Err(error) => self.hold(repository, &error),
            }
        }
    }

    /// Publishes the index of an artifact; `None` if its layers are not verified yet.
    async fn try_one(
        &self,
        record: &ReferenceRecord,
        repository: &Repository,
    ) -> Result<Option<Outcome>, MakeIndexError> {
        let (store, layers) = (std::sync::Arc::clone(&self.opener.store), record.layers.clone());
        let look = move || layers.iter().all(|layer| is_verified(&store, layer));
        if !tokio::task::spawn_blocking(look).await.unwrap_or(false) {
            return Ok(None);
        }
        let (registries, manifest) = (&self.opener.registries, record.manifest_digest);
        let referrers = registries.referrers(repository, manifest, MEDIA_TYPE).await?;
        if referrers.iter().any(|referrer| referrer.artifact_type == MEDIA_TYPE) {
            return Ok(Some(Outcome::Indexed));
        }
        let Some(artifact) = self.artifact(repository, manifest).await? else {
            return Ok(Some(Outcome::Incomplete));
        };
        if annotated(&artifact.manifest).is_some() {
            return Ok(Some(Outcome::Indexed));
        }
        let Some(made) = make_of_what_is_here(&self.opener, artifact).await? else {
            return Ok(Some(Outcome::Incomplete));
        };
        let pushed = made.push(&self.opener).await?;
        info!(%repository, %manifest, index = %pushed.index, bytes = pushed.bytes, "index published");
        Ok(Some(Outcome::Indexed))
    }

    async fn artifact(
        &self,
        repository: &Repository,
        manifest: Digest,
    ) -> Result<Option<Artifact>, TreesError> {
        // Was parsed when it was opened.
        match parse_reference(&format!("{repository}@{manifest}")) {
            Ok(reference) => self.opener.resolve(&reference).await.map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Nothing is tried in that repository for a while.
    fn hold(&mut self, repository: Repository, error: &MakeIndexError) {
        let before = self.held.get(&repository);
        let pause = before.map_or(FIRST_PAUSE, |held| (2 * held.pause).min(LONGEST_PAUSE));
        match before {
            None => warn!(
                %repository,
                %error,
                "an index can't be published; it is tried again later, ever more rarely"
            ),
            Some(_) => debug!(%repository, %error, "an index still can't be published"),
        }
        self.held.insert(repository, Held { until: Instant::now() + pause, pause });
    }
}

/// Whether a layer was verified as a whole here.
fn is_verified(store: &Store, layer: &LayerRecord) -> bool {
    let id = blob_id(&layer.descriptor);
    store.verified_digests(id).is_some() || store.trust(id) == Trust::Verified
}
