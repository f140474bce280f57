//! `weightfs rpull`: a pull by containerd's own services in which each layer is first offered to
//! the snapshotter. containerd 1.x does so only through CRI; this does so on any version.
//!
//! Invariants: everything is written under a lease, so a pull that fails leaves nothing for
//! longer than containerd's next garbage collection; the image's name is set last.

mod containerd;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use containerd_client::types::Descriptor;
use oci_spec::image::{ImageConfiguration, ImageManifest};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use weightfs_fusefs::{Artifact, ArtifactError, Platform};
use weightfs_store::{Digest, DigestError, Reference, Registries, SourceError};

use self::containerd::{Containerd, Prepared};

/// Label that names the chain ID of the layer that a Prepare is for.
const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";

/// Prefix of the annotations that containerd passes on to a snapshotter.
const SNAPSHOT_PREFIX: &str = "containerd.io/snapshot/";

/// Largest image config that is read; the manifest's own bound.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Longest list of layers in the label `cri.image-layers`: containerd limits a label's key and
/// value to 4,096 bytes in total.
const MAX_IMAGE_LAYERS_LABEL: usize = 4096 - 64;

/// Why a pull failed.
#[derive(Debug, thiserror::Error)]
pub enum RpullError {
    /// Nobody answers at containerd's socket.
    #[error("containerd at {}: {message}; is it running? --address names its socket", address.display())]
    Unreachable {
        /// The socket.
        address: PathBuf,
        /// What the transport said.
        message: String,
    },
    /// containerd refused a call.
    #[error("containerd: {call}: {message} ({code:?})")]
    Containerd {
        /// Service and method.
        call: &'static str,
        /// The gRPC status code.
        code: tonic::Code,
        /// What containerd said.
        message: String,
    },
    /// A name that can't be sent.
    #[error("{what} {name:?} has characters that containerd does not allow")]
    BadName {
        /// What is named.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// The reference names no image.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// Manifest or config can't be understood.
    #[error("{image}: {what}: {message}")]
    BadImage {
        /// The image.
        image: String,
        /// "manifest" or "config".
        what: &'static str,
        /// What is wrong.
        message: String,
    },
    /// A size that no containerd can hold.
    #[error("blob {digest}: {size} bytes are more than containerd can hold")]
    TooLarge {
        /// The blob.
        digest: Digest,
        /// Its size, in bytes.
        size: u64,
    },
    /// Another pull is unpacking the layer at this moment.
    #[error("containerd: snapshot {key:?} is in use by another pull; try again when it is done")]
    Busy {
        /// The snapshot's key.
        key: String,
    },
    /// A layer could not be downloaded.
    #[error(transparent)]
    Source(SourceError),
    /// The layer unpacked to something else than the config says.
    #[error("layer {layer}: unpacks to {actual}, but the image's config says {expected}")]
    WrongDiffId {
        /// The layer's digest.
        layer: String,
        /// The diff ID that was promised.
        expected: String,
        /// What it is.
        actual: String,
    },
}

/// How a layer came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerResult {
    /// Mounted, nothing downloaded.
    Lazy,
    /// Downloaded and unpacked.
    Unpacked,
    /// It was there.
    Present,
}

/// One layer of a pulled image.
#[derive(Debug, Clone, Serialize)]
pub struct PulledLayer {
    /// Its digest.
    pub digest: String,
    /// Its size in the registry, in bytes.
    pub size: u64,
    /// How it came to be.
    pub result: LayerResult,
}

/// What is wanted.
#[derive(Debug, Clone)]
pub struct Pull {
    /// The image.
    pub image: Reference,
    /// containerd's socket.
    pub address: PathBuf,
    /// containerd's namespace.
    pub namespace: String,
    /// The name that containerd knows the snapshotter by.
    pub snapshotter: String,
}

/// An image as the registry has it.
struct ImageParts {
    name: String,
    artifact: Artifact,
    manifest: ImageManifest,
    config_digest: Digest,
    config: Bytes,
    /// From the lowest to the highest.
    layers: Vec<ImageLayer>,
}

/// A layer as manifest and config have it.
struct ImageLayer {
    descriptor: oci_spec::image::Descriptor,
    /// The digest of the plain tar.
    diff_id: String,
}

/// Where a layer goes.
struct Place {
    /// Its position in the image.
    index: usize,
    /// The chain ID of the layers below it; empty for the lowest.
    parent: String,
    /// The chain ID of it and those below.
    chain_id: String,
}

/// Pulls an image; `report` hears of each layer as it is done.
///
/// # Errors
/// When the registry or containerd fails; what was begun is given up.
pub async fn pull(
    registries: &Arc<Registries>,
    pull: &Pull,
    mut report: impl FnMut(&PulledLayer),
) -> Result<Vec<PulledLayer>, RpullError> {
    let containerd = Containerd::connect(&pull.address, &pull.namespace, &pull.snapshotter).await?;
    let result = async {
        let image = ImageParts::resolve(registries, &pull.image).await?;
        image.write_documents(&containerd).await?;
        let mut layers = Vec::new();
        let mut parent = String::new();
        for (index, layer) in image.layers.iter().enumerate() {
            let place = Place { index, chain_id: chain_id(&parent, &layer.diff_id), parent };
            let pulled = image.pull_layer(registries, &containerd, layer, &place).await?;
            report(&pulled);
            layers.push(pulled);
            parent = place.chain_id;
        }
        image.finish(&containerd, &pull.snapshotter, &parent).await?;
        Ok(layers)
    }
    .await;
    // The result of the pull says more than that its lease has to expire by itself.
    let released = containerd.release().await;
    result.and_then(|layers| released.map(|()| layers))
}

impl ImageParts {
    async fn resolve(registries: &Registries, image: &Reference) -> Result<Self, RpullError> {
        let name = image.whole();
        let artifact = Artifact::resolve(registries, image, &Platform::host()).await?;
        let bad =
            |what, message: String| RpullError::BadImage { image: name.clone(), what, message };
        let manifest: ImageManifest = serde_json::from_slice(&artifact.manifest)
            .map_err(|error| bad("manifest", error.to_string()))?;
        let config_digest = parse_digest(&name, "config", manifest.config().digest().as_ref())?;
        let config = registries.small_blob(&artifact.repository, config_digest, MAX_CONFIG_BYTES);
        let config = config.await.map_err(RpullError::Source)?;
        let parsed: ImageConfiguration =
            serde_json::from_slice(&config).map_err(|error| bad("config", error.to_string()))?;
        let diff_ids = parsed.rootfs().diff_ids().clone();
        if diff_ids.len() != manifest.layers().len() {
            let (ids, layers) = (diff_ids.len(), manifest.layers().len());
            return Err(bad("config", format!("{ids} diff IDs for {layers} layers")));
        }
        let descriptors = manifest.layers().iter().cloned();
        let layers = descriptors
            .zip(diff_ids)
            .map(|(descriptor, diff_id)| ImageLayer { descriptor, diff_id })
            .collect();
        Ok(Self { name, artifact, manifest, config_digest, config, layers })
    }

    /// Manifest and config, with the labels that keep containerd from collecting what they need.
    async fn write_documents(&self, containerd: &Containerd) -> Result<(), RpullError> {
        let config = self.config_digest;
        containerd.write_bytes(config, self.config.clone(), HashMap::new()).await?;
        let mut labels =
            HashMap::from([("containerd.io/gc.ref.content.config".into(), config.to_string())]);
        for (index, layer) in self.manifest.layers().iter().enumerate() {
            let key = format!("containerd.io/gc.ref.content.l.{index}");
            labels.insert(key, layer.digest().to_string());
        }
        let manifest = self.artifact.manifest.clone();
        containerd.write_bytes(self.artifact.manifest_digest, manifest, labels).await
    }

    /// One layer: offered to the snapshotter, and unpacked if it declines.
    async fn pull_layer(
        &self,
        registries: &Arc<Registries>,
        containerd: &Containerd,
        layer: &ImageLayer,
        place: &Place,
    ) -> Result<PulledLayer, RpullError> {
        let Place { index, parent, chain_id } = place;
        let (digest, size) = (layer.descriptor.digest().to_string(), layer.descriptor.size());
        let done = |result| PulledLayer { digest: digest.clone(), size, result };
        if containerd.has_snapshot(chain_id).await? {
            return Ok(done(LayerResult::Present));
        }
        let key = format!("extract-{}-{index} {chain_id}", std::process::id());
        let labels = self.labels(layer, place);
        let mounts = match containerd.prepare(&key, parent, labels.clone()).await? {
            Prepared::Unpack(mounts) => mounts,
            Prepared::Exists if containerd.has_snapshot(chain_id).await? => {
                return Ok(done(LayerResult::Lazy));
            }
            Prepared::Exists => return Err(RpullError::Busy { key }),
        };
        let unpacked = self.unpack(registries, containerd, layer, mounts).await;
        let committed = match unpacked {
            Ok(()) => containerd.commit(&key, chain_id, labels).await,
            Err(error) => Err(error),
        };
        if let Err(error) = committed {
            // The first failure is the one to tell; the lease lets go of the key in any case.
            let _ = containerd.remove(&key).await;
            return Err(error);
        }
        Ok(done(LayerResult::Unpacked))
    }

    /// What CRI would say of the layer.
    fn labels(&self, layer: &ImageLayer, place: &Place) -> HashMap<String, String> {
        let cri = |name: &str| format!("{SNAPSHOT_PREFIX}cri.{name}");
        let mut layers = String::new();
        for layer in self.layers.iter().skip(place.index) {
            let digest = layer.descriptor.digest().to_string();
            if layers.len() + digest.len() + 1 > MAX_IMAGE_LAYERS_LABEL {
                break;
            }
            let comma = if layers.is_empty() { "" } else { "," };
            layers.push_str(&format!("{comma}{digest}"));
        }
        let annotations = layer.descriptor.annotations().iter().flatten();
        annotations
            .filter(|(key, _)| key.starts_with(SNAPSHOT_PREFIX))
            .map(|(key, value)| (key.clone(), value.clone()))
            .chain([
                (SNAPSHOT_REF.to_owned(), place.chain_id.clone()),
                (cri("image-ref"), self.name.clone()),
                (cri("manifest-digest"), self.artifact.manifest_digest.to_string()),
                (cri("layer-digest"), layer.descriptor.digest().to_string()),
                (cri("image-layers"), layers),
            ])
            .collect()
    }

    async fn unpack(
        &self,
        registries: &Arc<Registries>,
        containerd: &Containerd,
        layer: &ImageLayer,
        mounts: Vec<containerd_client::types::Mount>,
    ) -> Result<(), RpullError> {
        let ImageLayer { descriptor, diff_id } = layer;
        let (name, size) = (descriptor.digest().to_string(), descriptor.size());
        let digest = parse_digest(&self.name, "manifest", &name)?;
        if !containerd.has_content(digest).await? {
            let source = registries.source(&self.artifact.repository, digest, size);
            let bytes = source.fetch(0..size).await.map_err(RpullError::Source)?;
            containerd.write(digest, size, bytes, HashMap::new()).await?;
        }
        let descriptor = Descriptor {
            media_type: descriptor.media_type().to_string(),
            digest: name.clone(),
            size: i64::try_from(size).unwrap_or(i64::MAX),
            annotations: HashMap::new(),
        };
        let actual = containerd.apply(descriptor, mounts).await?;
        if actual != *diff_id {
            let expected = diff_id.clone();
            return Err(RpullError::WrongDiffId { layer: name, expected, actual });
        }
        Ok(())
    }

    /// The config keeps the snapshots, the name keeps the manifest: now all of it lasts.
    async fn finish(
        &self,
        containerd: &Containerd,
        snapshotter: &str,
        chain_id: &str,
    ) -> Result<(), RpullError> {
        let label = format!("containerd.io/gc.ref.snapshot.{snapshotter}");
        let labels = HashMap::from([(label, chain_id.to_owned())]);
        containerd.label_content(self.config_digest, labels).await?;
        let media_type = self.manifest.media_type().as_ref().map(ToString::to_string);
        let target = Descriptor {
            media_type: media_type
                .unwrap_or_else(|| "application/vnd.oci.image.manifest.v1+json".into()),
            digest: self.artifact.manifest_digest.to_string(),
            size: i64::try_from(self.artifact.manifest.len()).unwrap_or(i64::MAX),
            annotations: HashMap::new(),
        };
        containerd.put_image(&self.name, target).await
    }
}

fn parse_digest(image: &str, what: &'static str, text: &str) -> Result<Digest, RpullError> {
    text.parse().map_err(|error: DigestError| RpullError::BadImage {
        image: image.to_owned(),
        what,
        message: error.to_string(),
    })
}

/// The chain ID of a layer over `parent` (image-spec, "Layer ChainID"); `parent` is empty for
/// the lowest.
fn chain_id(parent: &str, diff_id: &str) -> String {
    if parent.is_empty() {
        return diff_id.to_owned();
    }
    Digest::from_raw(Sha256::digest(format!("{parent} {diff_id}")).into()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_are_those_of_the_image_specification() {
        let (a, b) = (Digest::of(b"a").to_string(), Digest::of(b"b").to_string());
        assert_eq!(chain_id("", &a), a);
        let expected = Digest::of(format!("{a} {b}").as_bytes()).to_string();
        assert_eq!(chain_id(&a, &b), expected);
    }
}
