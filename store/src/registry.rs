//! Registries: manifests, small blobs and ranged reads of large ones, with their authentication
//! (OCI distribution-spec 1.1).
//!
//! Invariants: what is asked for by digest is checked against it; nothing is read into memory
//! without a bound; no text that leaves this module holds a secret (tokens, passwords, signed
//! URLs).

mod auth;
mod blob;
mod body;
mod clients;
mod credentials;
mod dragonfly;
mod endpoints;
mod files;
mod health;
mod host;
mod hosts;
mod link;
mod push;
mod reference;
mod referrers;
mod retry_after;
mod small;
mod target;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use lru::LruCache;
use oci_spec::distribution::Reference;
use oci_spec::image::MediaType;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde::{Deserialize, Serialize};

use self::auth::Right;
use self::blob::BlobSource;
use self::credentials::Sources;
pub use self::credentials::{
    CredentialOptions, CredentialSource, Credentials, Noted, PluginOptions, PullSecrets, Secret,
};
pub use self::dragonfly::Dragonfly;
use self::host::Host;
pub use self::host::install_crypto;
use self::hosts::Hosts;
pub use self::reference::parse_reference;
pub use self::referrers::Referrer;
use self::small::Asked;
use crate::shared::lock;
use crate::{Digest, Source, SourceError};

/// What the configuration says of one registry.
#[derive(Debug, Clone, Default)]
pub struct RegistryOptions {
    /// Plain HTTP. Unset: only on loopback (localhost, 127.0.0.0/8, ::1), as docker does it.
    pub plain_http: Option<bool>,
    /// PEM file of certificate authorities to trust besides the system's.
    pub ca_file: Option<PathBuf>,
}

/// A repository of a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Repository {
    /// `host` or `host:port`.
    pub registry: String,
    /// Its path in the registry.
    pub name: String,
}

/// A manifest or image index, as the registry has it; its bytes hash to `digest`.
#[derive(Debug, Clone)]
pub struct Manifest {
    /// Where it was found.
    pub repository: Repository,
    /// Its digest.
    pub digest: Digest,
    /// The Content-Type that the registry gave, without parameters.
    pub media_type: String,
    /// Its bytes, [`MAX_MANIFEST_BYTES`] at the most.
    pub bytes: Bytes,
}

/// Largest manifest that is accepted (distribution-spec, "Pulling manifests").
pub const MAX_MANIFEST_BYTES: u64 = 4 << 20;

/// Registries that are remembered at the most, with connections and tokens.
const MAX_HOSTS: NonZeroUsize = NonZeroUsize::new(256).unwrap();

/// Blobs of repositories that are known to be ours to read; each is asked for again at no great cost.
const MAX_CONFIRMED: NonZeroUsize = NonZeroUsize::new(16 << 10).unwrap();

/// Tries of a request for something small, where the registry doesn't say when to come again.
const MAX_TRIES: usize = 4;

/// How many timeouts a request for something small waits for others to end. When many models are
/// mounted at once, most wait.
const MAX_TIMEOUTS_IN_LINE: u32 = 4;

/// The manifests that are understood, docker's older names among them.
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// How registries are reached.
#[derive(Debug, Clone)]
pub struct AccessOptions {
    /// What is known of some, by `host` or `host:port`.
    pub registries: BTreeMap<String, RegistryOptions>,
    /// containerd's directory with a hosts.toml for each registry, for those not in `registries`.
    pub hosts_dir: Option<PathBuf>,
    /// Where credentials come from.
    pub credentials: CredentialOptions,
    /// Dragonfly's daemon on this node, through which blobs are fetched first.
    pub dragonfly: Option<Dragonfly>,
    /// Bounds a request for a manifest or a small blob, with its authentication; a connection that
    /// gives no byte for so long (10 s at the most) is given up.
    pub timeout: Duration,
}

impl Default for AccessOptions {
    fn default() -> Self {
        Self {
            registries: BTreeMap::new(),
            hosts_dir: None,
            credentials: CredentialOptions::default(),
            dragonfly: None,
            timeout: Duration::from_secs(30),
        }
    }
}

/// The registries that this process talks to, with their connections and tokens.
#[derive(Debug)]
pub struct Registries {
    options: AccessOptions,
    credentials: Arc<Sources>,
    hosts: Mutex<LruCache<String, Arc<Hosts>>>,
    /// Blobs that repositories gave to us.
    confirmed: Mutex<LruCache<(Repository, Digest), ()>>,
}

impl Registries {
    /// # Errors
    /// When a registry's CA file can't be used.
    pub fn new(options: AccessOptions) -> Result<Arc<Self>, SourceError> {
        let hosts = Mutex::new(LruCache::new(MAX_HOSTS));
        let confirmed = Mutex::new(LruCache::new(MAX_CONFIRMED));
        let credentials = Arc::new(Sources::new(options.credentials.clone()));
        let registries = Self { options, credentials, hosts, confirmed };
        for registry in registries.options.registries.keys() {
            registries.hosts(registry)?;
        }
        Ok(Arc::new(registries))
    }

    /// Where to note what is told of credentials while images are pulled.
    pub fn pull_secrets(&self) -> &Arc<PullSecrets> {
        self.credentials.pull_secrets()
    }

    /// The manifest that a reference (tag or digest) names.
    ///
    /// # Errors
    /// When the registry can't be reached, refuses, does not have it, or gives something else.
    pub async fn resolve(&self, reference: &Reference) -> Result<Manifest, SourceError> {
        let from = Repository::of(reference);
        let Some(text) = reference.digest() else {
            return self.get_manifest(&from, reference.tag().unwrap_or("latest"), None).await;
        };
        let digest = text.parse().map_err(|error| {
            let what = format!("manifest {text}");
            SourceError::BadAnswer { source_name: from.to_string(), what, message: string(error) }
        })?;
        self.manifest(&from, digest).await
    }

    /// The manifest of that digest.
    ///
    /// # Errors
    /// As [`Registries::resolve`].
    pub async fn manifest(
        &self,
        from: &Repository,
        digest: Digest,
    ) -> Result<Manifest, SourceError> {
        self.get_manifest(from, &digest.to_string(), Some(digest)).await
    }

    /// The manifest under a tag of that repository.
    ///
    /// # Errors
    /// As [`Registries::resolve`].
    pub async fn tagged_manifest(
        &self,
        from: &Repository,
        tag: &str,
    ) -> Result<Manifest, SourceError> {
        self.get_manifest(from, tag, None).await
    }

    /// A small blob (a config), whole and checked against its digest; refused over `limit` bytes.
    ///
    /// # Errors
    /// As [`Registries::resolve`].
    pub async fn small_blob(
        &self,
        from: &Repository,
        digest: Digest,
        limit: u64,
    ) -> Result<Bytes, SourceError> {
        let asked = Asked { from, what: format!("blob {digest}"), limit, checked: true };
        let path = format!("blobs/{digest}");
        let (_, bytes) = self.get_small(&asked, &path, &HeaderMap::new()).await?;
        asked.check_digest(&bytes, digest)?;
        Ok(bytes)
    }

    /// A blob of that repository as a source. Does not talk to the registry yet.
    pub fn source(
        self: &Arc<Self>,
        from: &Repository,
        digest: Digest,
        size: u64,
    ) -> Arc<dyn Source> {
        Arc::new(BlobSource::new(Arc::clone(self), from.clone(), digest, size))
    }

    async fn get_manifest(
        &self,
        from: &Repository,
        name: &str,
        digest: Option<Digest>,
    ) -> Result<Manifest, SourceError> {
        let (what, limit) = (format!("manifest {name}"), MAX_MANIFEST_BYTES);
        let asked = Asked { from, what, limit, checked: digest.is_some() };
        let path = format!("manifests/{name}");
        let (headers, bytes) = self.get_small(&asked, &path, &manifest_headers()).await?;
        let found = match digest {
            Some(digest) => asked.check_digest(&bytes, digest)?,
            None => Digest::of(&bytes),
        };
        let media_type = media_type(&headers, &bytes);
        Ok(Manifest { repository: from.clone(), digest: found, media_type, bytes })
    }

    /// The hosts that answer for a registry, by what its files say now.
    fn hosts(&self, registry: &str) -> Result<Arc<Hosts>, SourceError> {
        let known = lock(&self.hosts).get(registry).cloned();
        if let Some(known) = known.as_ref().filter(|known| known.are_current()) {
            return Ok(Arc::clone(known));
        }
        let hosts = match (self.open_hosts(registry), &known) {
            (Ok(hosts), _) => Arc::new(hosts),
            (Err(error), None) => return Err(error),
            (Err(error), Some(known)) => {
                tracing::warn!(%error, "the registry's hosts stay as they were");
                Arc::clone(known)
            }
        };
        let mut all = lock(&self.hosts);
        let is_known = |other: &Arc<Hosts>| known.iter().any(|known| Arc::ptr_eq(known, other));
        // Whoever opened them first: their bounds are the registry's, not each caller's.
        if let Some(first) = all.get(registry).filter(|other| !is_known(other)) {
            return Ok(Arc::clone(first));
        }
        all.put(registry.to_owned(), Arc::clone(&hosts));
        Ok(hosts)
    }

    fn open_hosts(&self, registry: &str) -> Result<Hosts, SourceError> {
        let options = self.options.registries.get(registry);
        let found = endpoints::endpoints(registry, options, self.options.hosts_dir.as_deref());
        let found = found.map_err(|message| SourceError::Unreachable {
            source_name: registry.to_owned(),
            message,
        })?;
        Hosts::open(registry, found, &self.options, &self.credentials)
    }

    /// The host of a registry that takes what is pushed.
    fn host_to_push(&self, registry: &str) -> Result<Arc<Host>, SourceError> {
        let hosts = self.hosts(registry)?;
        let host = hosts.in_order().iter().rev().find(|host| host.can().push);
        host.map(Arc::clone).ok_or_else(|| SourceError::Unreachable {
            source_name: registry.to_owned(),
            message: "hosts.toml names no host with the capability \"push\"".into(),
        })
    }
}

/// What went wrong at the hosts of a registry.
#[derive(Debug, Default)]
struct Failures {
    best: Option<SourceError>,
}

impl Failures {
    /// What a host answered.
    fn add(&mut self, host: &Host, error: SourceError) {
        match (&error, error.asks_for_rest()) {
            (SourceError::Status { status, .. }, Some(rest)) => {
                host.health().asked_for_rest(*status, rest);
            }
            // It answers, though not with this.
            (SourceError::NotFound { .. } | SourceError::NoRanges { .. }, _) => {
                host.health().well();
            }
            _ => host.health().failed(),
        }
        self.keep(error);
    }

    /// What is known without asking.
    fn keep(&mut self, error: SourceError) {
        let hope = |error: &SourceError| match error {
            // It gives it, if only as a whole.
            SourceError::NoRanges { .. } => 2,
            // What may pass is tried again; that counts more than another host's refusal.
            error if error.may_pass() => 1,
            _ => 0,
        };
        let rank = |error: &SourceError| {
            // Of hosts that ask for time, the one that is back first.
            (hope(error), Reverse(error.asks_for_rest().unwrap_or_default()))
        };
        if self.best.as_ref().is_none_or(|best| rank(best) <= rank(&error)) {
            self.best = Some(error);
        }
    }

    fn into_error(self, registry: &str) -> SourceError {
        self.best.unwrap_or_else(|| SourceError::Unreachable {
            source_name: registry.to_owned(),
            message: "hosts.toml names no host with the capability for it".into(),
        })
    }
}

impl Repository {
    /// The repository of a reference.
    pub fn of(reference: &Reference) -> Self {
        Self { registry: reference.registry().to_owned(), name: reference.repository().to_owned() }
    }
}

impl std::fmt::Display for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.registry, self.name)
    }
}

fn manifest_headers() -> HeaderMap {
    let oci = [MediaType::ImageManifest, MediaType::ImageIndex].map(|kind| kind.to_string());
    let accept = [&oci[0], &oci[1], DOCKER_MANIFEST, DOCKER_INDEX].join(", ");
    HeaderValue::try_from(accept).map(|accept| (ACCEPT, accept)).into_iter().collect()
}

/// The Content-Type without parameters, in lower case; where a registry gives none or a useless
/// one, the manifest's own `mediaType`.
fn media_type(headers: &HeaderMap, manifest: &[u8]) -> String {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Typed {
        media_type: Option<String>,
    }
    let given = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let given = given.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    if !matches!(&*given, "" | "application/json" | "application/octet-stream" | "text/plain") {
        return given;
    }
    let own = serde_json::from_slice::<Typed>(manifest).ok().and_then(|typed| typed.media_type);
    own.unwrap_or(given)
}

fn string(error: impl ToString) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fuzz_media_types_are_plain() {
        let samples: [&[u8]; 2] =
            [br#"{"mediaType":"application/x"}"#, b"application/JSON; charset=utf-8"];
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&samples, input);
            assert!(media_type(&HeaderMap::new(), &bytes).len() <= 3 * bytes.len());
            let Ok(given) = HeaderValue::from_bytes(&bytes) else { return };
            let found = media_type(&HeaderMap::from_iter([(CONTENT_TYPE, given)]), b"");
            assert!(!found.contains(';') && found == found.to_ascii_lowercase());
        });
    }
}
