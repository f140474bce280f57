//! Model images: an ordinary OCI image beside a model artifact, of the same blobs, so that stock
//! containerd and Kubernetes take the model for an image and our snapshotter mounts it lazily.
//!
//! containerd passes on to a snapshotter only those annotations of a layer that begin with
//! `containerd.io/snapshot/`, hence their names. A raw layer's type is one that containerd accepts
//! and no other snapshotter can unpack: without ours, such a pull fails clearly. Rules: image-spec,
//! "Image Manifest" and "Image Configuration".
//!
//! Invariant: the same layers give the same bytes, so a model image has one digest.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp as Moment;
use serde::Serialize;
use weightfs_store::Digest;

use super::manifest::Descriptor;
use super::model::{Content, Problem, parse_time, path_of};
use super::{Compression, LayerContent, LayerDescriptor, RawFile, RawKind};
use crate::tree::Timestamp;

/// Platforms that an image is made for. Weights are the same on all of them, but a node takes
/// only what is made for its own.
const PLATFORMS: [&str; 2] = ["amd64", "arm64"];

/// Bytes of a label's key and value together at the most (containerd, labels/validate.go).
const MAX_LABEL_BYTES: usize = 4096;

const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const RAW_TYPE: &str = "application/vnd.oci.image.layer.v1.raw";
const TAR_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// What a layer of a model image is: `file`, `directory` or `tar`.
const KIND: &str = "containerd.io/snapshot/weightfs.kind";
/// Where a file or directory is.
const PATH: &str = "containerd.io/snapshot/weightfs.path";
/// Its permissions, in octal.
const MODE: &str = "containerd.io/snapshot/weightfs.mode";
/// Its modification time (RFC 3339).
const MTIME: &str = "containerd.io/snapshot/weightfs.mtime";
/// When the model was made (RFC 3339): the time of directories that no layer lists.
const CREATED: &str = "containerd.io/snapshot/weightfs.created";
/// The manifest of the artifact that the image was made of.
const ARTIFACT: &str = "containerd.io/snapshot/weightfs.artifact";
/// The digest of the artifact's index, at each layer: whoever knows the image by its digest knows
/// that of each chunk.
pub(crate) const INDEX: &str = "containerd.io/snapshot/weightfs.index";

/// A layer of a model image, with what containerd must know of it.
#[derive(Debug)]
pub struct ImageLayer<'a> {
    /// The model's layer.
    pub layer: &'a LayerDescriptor,
    /// The digest of its bytes when they are decompressed.
    pub diff_id: Digest,
}

/// The documents of a model image. They are to be pushed in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelImage {
    /// Image configs, one for each platform; blobs.
    pub configs: Vec<Bytes>,
    /// Manifests, one for each platform.
    pub manifests: Vec<Bytes>,
    /// The index of the manifests.
    pub index: Bytes,
}

impl ModelImage {
    /// Media type of the manifests.
    pub const MANIFEST_TYPE: &'static str = MANIFEST_TYPE;
    /// Media type of the index.
    pub const INDEX_TYPE: &'static str = INDEX_TYPE;

    /// The image of those layers, which are in the order in which containerd shall have them, with
    /// the artifact's index if it has one.
    ///
    /// # Errors
    /// A layer that can't be described in containerd's terms, by its digest.
    pub fn new(
        artifact: Digest,
        index: Option<Digest>,
        layers: &[ImageLayer<'_>],
    ) -> Result<Self, (Digest, String)> {
        let mut described: Vec<_> = layers
            .iter()
            .map(|layer| describe(layer.layer).map_err(|why| (layer.layer.digest, why)))
            .collect::<Result<_, _>>()?;
        if let Some(index) = index {
            for layer in &mut described {
                layer.annotations.insert(INDEX, index.to_string());
            }
        }
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id.to_string()).collect();
        let annotations = BTreeMap::from([(ARTIFACT, artifact.to_string())]);
        let (mut configs, mut manifests, mut offered) = (vec![], vec![], vec![]);
        for architecture in PLATFORMS {
            let rootfs = RootFs { kind: "layers", diff_ids: &diff_ids };
            let config = json(&Config { architecture, os: "linux", config: Empty {}, rootfs });
            let manifest = json(&Manifest {
                schema_version: 2,
                media_type: MANIFEST_TYPE,
                config: Described::new(CONFIG_TYPE, &config),
                layers: &described,
                annotations: &annotations,
            });
            let platform = Some(Platform { architecture, os: "linux" });
            offered.push(Described { platform, ..Described::new(MANIFEST_TYPE, &manifest) });
            configs.push(config);
            manifests.push(manifest);
        }
        let index = json(&Index {
            schema_version: 2,
            media_type: INDEX_TYPE,
            manifests: offered,
            annotations: &annotations,
        });
        Ok(Self { configs, manifests, index })
    }
}

/// Where a layer of a model belongs among those of an image: the first that containerd has to
/// download makes it download all above, so lazy ones go below, and of these the weights lowest.
pub fn rank(layer: &LayerDescriptor) -> u8 {
    let weights = layer.media_type.contains(".weight.v1.")
        || layer.media_type.ends_with(".safetensors")
        || layer.media_type.contains(".gguf");
    match (layer.compression, weights) {
        (Compression::None, true) => 0,
        (Compression::None, false) => 1,
        (Compression::Gzip | Compression::Zstd, _) => 2,
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Index<'a> {
    schema_version: u32,
    media_type: &'a str,
    manifests: Vec<Described>,
    annotations: &'a BTreeMap<&'static str, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Manifest<'a> {
    schema_version: u32,
    media_type: &'a str,
    config: Described,
    layers: &'a [Described],
    annotations: &'a BTreeMap<&'static str, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Described {
    media_type: String,
    digest: String,
    size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    platform: Option<Platform>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<&'static str, String>,
}

impl Described {
    fn new(media_type: &str, bytes: &Bytes) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: Digest::of(bytes).to_string(),
            size: bytes.len() as u64,
            platform: None,
            annotations: BTreeMap::new(),
        }
    }
}

#[derive(Serialize)]
struct Platform {
    architecture: &'static str,
    os: &'static str,
}

#[derive(Serialize)]
struct Config<'a> {
    architecture: &'static str,
    os: &'static str,
    config: Empty,
    rootfs: RootFs<'a>,
}

#[derive(Serialize)]
struct Empty {}

#[derive(Serialize)]
struct RootFs<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    diff_ids: &'a [String],
}

/// Can't fail: what is written are texts and numbers.
fn json(document: &impl Serialize) -> Bytes {
    serde_json::to_vec(document).unwrap_or_default().into()
}

/// A model's layer as one of an image.
fn describe(layer: &LayerDescriptor) -> Result<Described, Problem> {
    let (media_type, annotations) = match &layer.content {
        LayerContent::Raw(file) => (RAW_TYPE.to_owned(), annotations_of(file)?),
        LayerContent::ModelTar { created } => {
            let suffix = match layer.compression {
                Compression::None => "",
                Compression::Gzip => "+gzip",
                Compression::Zstd => "+zstd",
            };
            let created = (CREATED, text_of(*created)?);
            let annotations = BTreeMap::from([(KIND, "tar".to_owned()), created]);
            (format!("{TAR_TYPE}{suffix}"), annotations)
        }
        LayerContent::ImageTar => return Err("it is an image's layer already".into()),
    };
    for (key, value) in &annotations {
        if key.len() + value.len() > MAX_LABEL_BYTES {
            return Err(format!("its path is longer than containerd allows: {value:.60}…"));
        }
    }
    let (digest, size) = (layer.digest.to_string(), layer.size);
    Ok(Described { media_type, digest, size, platform: None, annotations })
}

fn annotations_of(file: &RawFile) -> Result<BTreeMap<&'static str, String>, Problem> {
    let kind = match file.kind {
        RawKind::File => "file",
        RawKind::Directory => "directory",
    };
    let path = file.path.to_str().ok_or("its path is no UTF-8")?;
    Ok(BTreeMap::from([
        (KIND, kind.to_owned()),
        (PATH, path.to_owned()),
        (MODE, format!("{:04o}", file.permissions)),
        (MTIME, text_of(file.mtime)?),
        (CREATED, text_of(file.created)?),
    ]))
}

fn text_of(time: Timestamp) -> Result<String, Problem> {
    let nanos = i32::try_from(time.nanos).map_err(|_| "its time is malformed")?;
    let moment = Moment::new(time.seconds, nanos);
    moment.map(|moment| moment.to_string()).map_err(|_| "its time is out of range".to_owned())
}

/// The manifest of the artifact that a model image was made of, if a manifest says so.
pub fn artifact_of(manifest: &[u8]) -> Option<Digest> {
    #[derive(serde::Deserialize)]
    struct Annotated {
        annotations: BTreeMap<String, String>,
    }
    let annotated: Annotated = serde_json::from_slice(manifest).ok()?;
    annotated.annotations.get(ARTIFACT)?.parse().ok()
}

/// What a layer of an image is that says it is a model's; `None` if it does not say so.
pub fn layer(descriptor: &Descriptor) -> Option<Result<Content, Problem>> {
    let is_raw = descriptor.media_type == RAW_TYPE;
    match descriptor.annotation(KIND) {
        Some("tar") if descriptor.media_type.starts_with(TAR_TYPE) => {
            let (compression, _) = super::image::layer(&descriptor.media_type)?;
            let created = time(descriptor, CREATED);
            Some(created.map(|created| (compression, LayerContent::ModelTar { created })))
        }
        Some(kind) if is_raw => Some(raw(descriptor, kind)),
        None if is_raw => Some(Err(format!("it is raw, but has no annotation {KIND}"))),
        _ => None,
    }
}

fn raw(descriptor: &Descriptor, kind: &str) -> Result<Content, Problem> {
    let kind = match kind {
        "file" => RawKind::File,
        "directory" if descriptor.size == 0 => RawKind::Directory,
        other => return Err(format!("its {KIND} {other:.60?} is not known")),
    };
    let text = |key| descriptor.annotation(key).ok_or_else(|| format!("it has no {key}"));
    let mode = text(MODE)?;
    let permissions = u16::from_str_radix(mode, 8).ok().filter(|mode| *mode <= 0o777);
    let permissions = permissions.ok_or_else(|| format!("its {MODE} {mode:.60?} is no mode"))?;
    let file = RawFile {
        path: path_of(text(PATH)?)?,
        kind,
        permissions,
        uid: 0,
        gid: 0,
        mtime: time(descriptor, MTIME)?,
        created: time(descriptor, CREATED)?,
    };
    Ok((Compression::None, LayerContent::Raw(file)))
}

fn time(descriptor: &Descriptor, key: &str) -> Result<Timestamp, Problem> {
    let text = descriptor.annotation(key).ok_or_else(|| format!("it has no {key}"))?;
    parse_time(text).ok_or_else(|| format!("its {key} {text:.60?} is no time"))
}
