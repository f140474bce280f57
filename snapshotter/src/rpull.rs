//! `weightfs rpull`: a pull by containerd's own services in which each layer is first offered to
//! the snapshotter. containerd 1.x does so only through CRI; this does so on any version.
//!
//! Invariants: everything is written under a lease, so a pull that fails leaves nothing for
//! longer than containerd's next garbage collection; the image's name is set last.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use containerd_client::types::Descriptor;
use futures::future::{join, try_join, try_join3};
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use oci_spec::image::{ImageConfiguration, ImageManifest};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio::sync::OnceCell;
use weightfs_fusefs::index::find::has_index;
use weightfs_fusefs::{Artifact, ArtifactError, Platform};
use weightfs_store::{Digest, DigestError, Reference, Registries, SourceError, Urgency};

use crate::client::{Answer, ClientError, Collect, Containerd};
use crate::metadata::SNAPSHOT_REF;

/// Prefix of the annotations that containerd passes on to a snapshotter.
const SNAPSHOT_PREFIX: &str = "containerd.io/snapshot/";

/// Largest image config that is read; the manifest's own bound.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Longest list of layers in the label `cri.image-layers`: containerd limits a label's key and
/// value to 4,096 bytes in total.
const MAX_IMAGE_LAYERS_LABEL: usize = 4096 - 64;

/// Blobs that are downloaded at the same time; containerd's own default.
const CONTENTS_AT_ONCE: usize = 3;

/// Why a pull failed.
#[derive(Debug, thiserror::Error)]
pub enum RpullError {
    /// containerd did not do what it was asked.
    #[error(transparent)]
    Client(#[from] ClientError),
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
    /// Set once containerd has its blob.
    content: OnceCell<()>,
}

impl ImageLayer {
    /// Whether it can be mounted only by an index.
    fn is_compressed(&self) -> bool {
        let media_type = self.descriptor.media_type().to_string();
        media_type.ends_with("+gzip")
            || media_type.ends_with("+zstd")
            || media_type.ends_with(".gzip")
    }
}

/// Where a layer goes.
#[derive(Default)]
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
    let connect = Containerd::connect(&pull.address, &pull.namespace, &pull.snapshotter);
    let (containerd, image) = join(connect, ImageParts::resolve(registries, &pull.image)).await;
    let containerd = containerd?;
    let result = async {
        let image = image?;
        // What keeps what is in containerd's label syntax, and need not be there yet: the lease
        // keeps all of it until the image has its name.
        let documents = image.write_documents(&containerd, &pull.snapshotter);
        let layers = image.pull_layers(registries, &containerd, &mut report);
        // Beside it, since a layer is unpacked only when those below it are there.
        let contents = image.fetch_contents(registries, &containerd).map(Ok);
        let ((), (), layers) = try_join3(documents, contents, layers).await?;
        image.put_name(&containerd).await?;
        Ok(layers)
    }
    .await;
    // The result of the pull says more than that its lease has to expire by itself.
    let released = containerd.release(Collect::Later).await;
    result.and_then(|layers| Ok(released.map(|()| layers)?))
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
            .map(|(descriptor, diff_id)| {
                let content = OnceCell::new();
                ImageLayer { descriptor, diff_id, content }
            })
            .collect();
        Ok(Self { name, artifact, manifest, config_digest, config, layers })
    }

    /// Manifest and config, with the labels that keep containerd from collecting what they need:
    /// the manifest keeps the config, and the config keeps the snapshots.
    async fn write_documents(
        &self,
        containerd: &Containerd,
        snapshotter: &str,
    ) -> Result<(), RpullError> {
        let config = self.config_digest;
        let mut keeps =
            HashMap::from([("containerd.io/gc.ref.content.config".into(), config.to_string())]);
        for (index, layer) in self.manifest.layers().iter().enumerate() {
            let key = format!("containerd.io/gc.ref.content.l.{index}");
            keeps.insert(key, layer.digest().to_string());
        }
        let manifest = self.artifact.manifest.clone();
        let manifest = containerd.write_bytes(self.artifact.manifest_digest, manifest, keeps);
        let config = async {
            let label = format!("containerd.io/gc.ref.snapshot.{snapshotter}");
            let keeps = HashMap::from([(label, self.places().pop().unwrap_or_default().chain_id)]);
            containerd.write_bytes(config, self.config.clone(), keeps.clone()).await?;
            // It may have been there, with another snapshotter's label.
            containerd.label_content(config, keeps).await
        };
        try_join(manifest, config).await?;
        Ok(())
    }

    /// Where each layer goes.
    fn places(&self) -> Vec<Place> {
        let mut parent = String::new();
        let place = |(index, layer): (usize, &ImageLayer)| {
            let chain_id = chain_id(&parent, &layer.diff_id);
            let parent = std::mem::replace(&mut parent, chain_id.clone());
            Place { index, parent, chain_id }
        };
        self.layers.iter().enumerate().map(place).collect()
    }

    /// Brings the blobs of layers that will be unpacked. What fails is tried again, and told,
    /// when the layer's turn comes. By an index, compressed layers may be lazy: then each waits for
    /// its turn.
    async fn fetch_contents(&self, registries: &Arc<Registries>, containerd: &Containerd) {
        let wanted = self.layers.iter().zip(self.places());
        let wanted: Vec<_> = wanted.filter(|(layer, _)| layer.is_compressed()).collect();
        if wanted.is_empty() || has_index(registries, &self.artifact).await {
            return;
        }
        stream::iter(wanted)
            .for_each_concurrent(CONTENTS_AT_ONCE, |(layer, place)| async move {
                if let Ok(false) = containerd.has_snapshot(&place.chain_id).await {
                    let _ = self.fetch_content(registries, containerd, layer).await;
                }
            })
            .await;
    }

    /// Has containerd hold the blob of a layer.
    async fn fetch_content(
        &self,
        registries: &Arc<Registries>,
        containerd: &Containerd,
        layer: &ImageLayer,
    ) -> Result<(), RpullError> {
        let (name, size) = (layer.descriptor.digest().to_string(), layer.descriptor.size());
        let digest = parse_digest(&self.name, "manifest", &name)?;
        let fetch = || async {
            if containerd.has_content(digest).await? {
                return Ok(());
            }
            let source = registries.source(&self.artifact.repository, digest, size);
            let bytes = source.fetch(0..size, Urgency::Demand).await?;
            let bytes = bytes.map_ok(|piece| piece.bytes).boxed();
            containerd.write(digest, size, bytes, HashMap::new()).await
        };
        Ok(layer.content.get_or_try_init(fetch).await.copied()?)
    }

    /// All layers, each on those below it.
    async fn pull_layers(
        &self,
        registries: &Arc<Registries>,
        containerd: &Containerd,
        mut report: impl FnMut(&PulledLayer),
    ) -> Result<Vec<PulledLayer>, RpullError> {
        let mut layers = Vec::new();
        for (layer, place) in self.layers.iter().zip(self.places()) {
            let pulled = self.pull_layer(registries, containerd, layer, &place).await?;
            report(&pulled);
            layers.push(pulled);
        }
        Ok(layers)
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
            Answer::Made(mounts) => mounts,
            Answer::Exists if containerd.has_snapshot(chain_id).await? => {
                return Ok(done(LayerResult::Lazy));
            }
            Answer::Exists => return Err(RpullError::Busy { key }),
        };
        let unpacked = self.unpack(registries, containerd, layer, mounts).await;
        let committed = match unpacked {
            Ok(()) => containerd.commit(&key, chain_id, labels).await.map_err(RpullError::from),
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
        self.fetch_content(registries, containerd, layer).await?;
        let ImageLayer { descriptor, diff_id, .. } = layer;
        let (name, size) = (descriptor.digest().to_string(), descriptor.size());
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

    /// The name keeps the manifest: now all of it lasts.
    async fn put_name(&self, containerd: &Containerd) -> Result<(), RpullError> {
        let media_type = self.manifest.media_type().as_ref().map(ToString::to_string);
        let target = Descriptor {
            media_type: media_type
                .unwrap_or_else(|| "application/vnd.oci.image.manifest.v1+json".into()),
            digest: self.artifact.manifest_digest.to_string(),
            size: i64::try_from(self.artifact.manifest.len()).unwrap_or(i64::MAX),
            annotations: HashMap::new(),
        };
        Ok(containerd.put_image(&self.name, target).await?)
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
