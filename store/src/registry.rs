//! Registries: manifests, small blobs and ranged reads of large ones, with their authentication.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use oci_client::Reference;
use serde::{Deserialize, Serialize};

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

/// The registries that this process talks to, with their connections and tokens.
#[derive(Debug)]
pub struct Registries {}

impl Registries {
    /// `options` by `host` or `host:port`. `docker_config` is the directory with docker's
    /// config.json (default: `$DOCKER_CONFIG`, else `~/.docker`).
    pub fn new(
        _options: BTreeMap<String, RegistryOptions>,
        _docker_config: Option<PathBuf>,
        _timeout: Duration,
    ) -> Result<Arc<Self>, SourceError> {
        todo!()
    }

    /// The manifest that a reference (tag or digest) names.
    pub async fn resolve(&self, _reference: &Reference) -> Result<Manifest, SourceError> {
        todo!()
    }

    /// The manifest of that digest.
    pub async fn manifest(
        &self,
        _from: &Repository,
        _digest: Digest,
    ) -> Result<Manifest, SourceError> {
        todo!()
    }

    /// A small blob (a config), whole and checked against its digest; refused over `limit` bytes.
    pub async fn small_blob(
        &self,
        _from: &Repository,
        _digest: Digest,
        _limit: u64,
    ) -> Result<Bytes, SourceError> {
        todo!()
    }

    /// A blob of that repository as a source. Does not talk to the registry yet.
    pub fn source(
        self: &Arc<Self>,
        _from: &Repository,
        _digest: Digest,
        _size: u64,
    ) -> Arc<dyn Source> {
        todo!()
    }
}
