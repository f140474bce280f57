//! OCI images and image indexes, and the small root file system that test containers run on.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use weightfs_store::Digest;

use crate::layer::{Attributes, Compression, Layer, LayerBuilder};
use crate::process::run;
use crate::remote::{Artifact, Blob, OCI_INDEX, OCI_MANIFEST, Remote, block_on};

/// Commands that the root file system has.
const APPLETS: &[&str] = &[
    "sh",
    "cat",
    "chmod",
    "cmp",
    "dd",
    "echo",
    "find",
    "id",
    "ls",
    "mkdir",
    "mv",
    "rm",
    "sha256sum",
    "sleep",
    "stat",
    "sync",
    "test",
    "touch",
    "true",
    "wc",
];

/// An image of these layers, lowest first, for `architecture` (as Go names it).
pub fn image_for(architecture: &str, layers: &[Layer]) -> Artifact {
    let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id.to_string()).collect();
    let config = Blob::from_bytes(
        json!({
            "architecture": architecture,
            "os": "linux",
            "config": { "Env": ["PATH=/bin"], "Cmd": ["/bin/sleep", "100000"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        })
        .to_string(),
    );
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config.digest.to_string(),
            "size": config.size,
        },
        "layers": layers.iter().map(descriptor).collect::<Vec<_>>(),
    });
    let mut blobs = vec![config];
    blobs.extend(layers.iter().map(|layer| layer.blob.clone()));
    Artifact { blobs, manifest }
}

/// An image of these layers, lowest first, for this machine.
pub fn image(layers: &[Layer]) -> Artifact {
    image_for(architecture(), layers)
}

/// Pushes an index that names these images, each with its architecture.
pub fn push_index(
    remote: &Remote,
    repository: &str,
    tag: &str,
    images: &[(&str, &Artifact)],
) -> Digest {
    let mut entries = Vec::new();
    for (architecture, image) in images {
        let digest = image.push(remote, repository, &format!("{tag}-{architecture}"));
        entries.push(json!({
            "mediaType": OCI_MANIFEST,
            "digest": digest.to_string(),
            "size": image.manifest.to_string().len(),
            "platform": { "architecture": architecture, "os": "linux" },
        }));
    }
    let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries });
    block_on(remote.push_manifest(repository, tag, OCI_INDEX, index.to_string().into_bytes()))
}

/// This machine's architecture, as Go names it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// A layer with busybox: enough to run commands in a container.
pub fn busybox_layer(work: &Path, compression: Compression) -> Layer {
    let program = run(Command::new("sh").args(["-c", "command -v busybox"])).ok();
    let dir = Attributes::mode(0o755);
    let mut layer = LayerBuilder::new(work).dir("bin", &dir).file_from(
        "bin/busybox",
        Path::new(program.trim()),
        &Attributes::mode(0o755),
    );
    for applet in APPLETS {
        layer = layer.symlink(&format!("bin/{applet}"), "busybox", &Attributes::mode(0o777));
    }
    for path in ["dev", "etc", "proc", "root", "run", "sys"] {
        layer = layer.dir(path, &dir);
    }
    layer.dir("tmp", &Attributes::mode(0o1777)).finish(compression)
}

fn descriptor(layer: &Layer) -> Value {
    let suffix = match layer.compression {
        Compression::Plain => "",
        Compression::Gzip => "+gzip",
        Compression::Zstd => "+zstd",
    };
    json!({
        "mediaType": format!("application/vnd.oci.image.layer.v1.tar{suffix}"),
        "digest": layer.blob.digest.to_string(),
        "size": layer.blob.size,
    })
}
