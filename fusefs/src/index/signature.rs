//! Signatures of indexes, as `cosign sign --key` pushes them: beside the manifest that carries the
//! index, under a tag made of its digest, a manifest whose layers are *payloads*, each with a
//! signature (ECDSA P-256 over the payload's sha256) in an annotation. A payload names the manifest
//! that it is about (containers/image, "simple signing").
//!
//! All of it is foreign: it is bounded, and a payload is parsed only after its signature was
//! checked.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use rustls_pki_types::SubjectPublicKeyInfoDer;
use rustls_pki_types::pem::PemObject as _;
use serde::Deserialize;
use webpki::RawPublicKeyEntity;
use webpki::ring::ECDSA_P256_SHA256;
use weightfs_store::{Digest, Registries, Repository, SourceError};

/// Signatures of one manifest that are looked at, at the most: each costs a request.
const MAX_SIGNATURES: usize = 16;

/// Bytes of a payload at the most; they have some 300.
const MAX_PAYLOAD_BYTES: u64 = 64 << 10;

/// Bytes of a key's file at the most; they have some 200.
const MAX_KEY_BYTES: u64 = 64 << 10;

/// The annotation with a payload's signature.
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";

/// What a payload says that it is.
const PAYLOAD_TYPE: &str = "cosign container image signature";

/// Where the name of its curve lies in a public key (RFC 5480, section 2): after the heads of two
/// sequences, as long as they are short.
const ALGORITHM_AT: usize = 4;

/// Why the file of a public key is of no use.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It can't be read.
    #[error("public key {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// It is none.
    #[error(
        "public key {}: {why}; give the PEM file that `cosign generate-key-pair` calls cosign.pub",
        path.display()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
}

/// A public key that signatures are checked with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey(SubjectPublicKeyInfoDer<'static>);

impl PublicKey {
    /// Reads the PEM file of a public key.
    ///
    /// # Errors
    /// A file that can't be read, or has no key of ECDSA on P-256.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        use std::io::Read as _;
        let mut pem = vec![];
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_KEY_BYTES).read_to_end(&mut pem))
            .map_err(|source| KeyError::Read { path: path.to_owned(), source })?;
        Self::from_pem(&pem).map_err(|why| KeyError::Malformed { path: path.to_owned(), why })
    }

    fn from_pem(pem: &[u8]) -> Result<Self, &'static str> {
        let key = SubjectPublicKeyInfoDer::from_pem_slice(pem)
            .map_err(|_| "it has no PUBLIC KEY in PEM")?;
        let algorithm = ECDSA_P256_SHA256.public_key_alg_id();
        let found = key.as_ref().get(ALGORITHM_AT..).unwrap_or_default();
        if !found.starts_with(&algorithm) || RawPublicKeyEntity::try_from(&key).is_err() {
            return Err("it is no key of ECDSA on the curve P-256");
        }
        Ok(Self(key.into_owned()))
    }

    fn has_signed(&self, payload: &[u8], signature: &[u8]) -> bool {
        RawPublicKeyEntity::try_from(&self.0)
            .is_ok_and(|key| key.verify_signature(ECDSA_P256_SHA256, payload, signature).is_ok())
    }
}

/// A manifest with signatures.
#[derive(Deserialize)]
struct Signatures {
    layers: Vec<Signed>,
}

/// A payload and its signature.
#[derive(Deserialize)]
struct Signed {
    digest: Digest,
    size: u64,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: Image,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Image {
    #[serde(rename = "docker-manifest-digest")]
    manifest: Digest,
}

/// Looks for a signature of `manifest` by one of `keys`: nothing if there is one, or why not.
///
/// # Errors
/// A registry that fails in a way that may pass.
pub async fn check(
    registries: &Registries,
    repository: &Repository,
    manifest: Digest,
    keys: &[PublicKey],
) -> Result<Result<(), String>, SourceError> {
    let tag = format!("{}.sig", manifest.to_string().replace(':', "-"));
    let signatures = match registries.tagged_manifest(repository, &tag).await {
        Ok(found) => parse_signatures(&found.bytes),
        Err(SourceError::NotFound { .. }) => return Ok(Err("it is not signed".into())),
        Err(error) if error.may_pass() => return Err(error),
        Err(error) => return Ok(Err(format!("its signatures: {error}"))),
    };
    let signatures = match signatures {
        Ok(signatures) => signatures,
        Err(why) => return Ok(Err(why)),
    };
    let mut reason = "its signatures are none of cosign's".to_owned();
    for (payload, size, signature) in signatures {
        let bytes = match registries.small_blob(repository, payload, size).await {
            Ok(bytes) => bytes,
            Err(error) if error.may_pass() => return Err(error),
            Err(error) => {
                reason = format!("its signature: {error}");
                continue;
            }
        };
        match check_payload(&bytes, &signature, manifest, keys) {
            Ok(()) => return Ok(Ok(())),
            Err(why) => reason = why,
        }
    }
    Ok(Err(reason))
}

/// Payloads with their sizes and signatures; what else is in the manifest is left out.
fn parse_signatures(manifest: &Bytes) -> Result<Vec<(Digest, u64, Vec<u8>)>, String> {
    let signatures: Signatures =
        serde_json::from_slice(manifest).map_err(|error| format!("its signatures: {error}"))?;
    let usable = signatures.layers.into_iter().filter_map(|mut signed| {
        let signature = STANDARD.decode(signed.annotations.remove(SIGNATURE)?).ok()?;
        (signed.size <= MAX_PAYLOAD_BYTES).then_some((signed.digest, signed.size, signature))
    });
    Ok(usable.take(MAX_SIGNATURES).collect())
}

/// Checks that one of the keys has signed this, and that it speaks of that manifest.
fn check_payload(
    payload: &[u8],
    signature: &[u8],
    manifest: Digest,
    keys: &[PublicKey],
) -> Result<(), String> {
    if !keys.iter().any(|key| key.has_signed(payload, signature)) {
        return Err("its signature is of none of the keys in verify.keys".into());
    }
    match signed_manifest(payload)? {
        signed if signed == manifest => Ok(()),
        other => Err(format!("its signature is of {other}")),
    }
}

/// The manifest that a payload speaks of.
fn signed_manifest(payload: &[u8]) -> Result<Digest, String> {
    let Payload { critical } = serde_json::from_slice(payload)
        .map_err(|error| format!("its signature is of something else: {error}"))?;
    if critical.kind != PAYLOAD_TYPE {
        return Err("its signature is of something else".into());
    }
    Ok(critical.image.manifest)
}

#[cfg(test)]
mod tests;
