//! Layers of OCI and Docker images (OCI image-spec, "Image Layer Filesystem Changeset").

use super::{Compression, LayerContent};

/// Config media types of images.
pub const CONFIG_TYPES: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

const LAYER_TYPES: [&str; 4] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];

/// What a layer of that media type is; `None` if it is no tar of an image.
pub fn layer(media_type: &str) -> Option<(Compression, LayerContent)> {
    let suffix = LAYER_TYPES.iter().find_map(|known| media_type.strip_prefix(known))?;
    let compression = match suffix {
        "" => Compression::None,
        "+gzip" | ".gzip" => Compression::Gzip,
        "+zstd" | ".zstd" => Compression::Zstd,
        _ => return None,
    };
    Some((compression, LayerContent::ImageTar))
}
