//! Model artifacts of every kind but images: ModelPack under both names, Docker Model Runner's,
//! and ORAS artifacts (model-spec, "Manifest" and "Annotations").

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::layer::{Attributes, Compression, LayerBuilder};
use crate::remote::{Artifact, Blob, OCI_MANIFEST};

/// When made-up artifacts say they were created.
pub const CREATED_AT: &str = "2026-01-02T03:04:05Z";

/// Whose names an artifact uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// ModelPack's names of today.
    Cncf,
    /// ModelPack's older names, still in daily use.
    Cnai,
    /// Docker Model Runner 0.2.
    Docker,
    /// A generic ORAS artifact: names in the title annotation.
    Oras,
}

/// A layer to be packed.
#[derive(Debug, Clone)]
pub enum Plan {
    /// One file as it is, with its path in the model.
    Raw(String),
    /// Several files in a tar; a path may be a directory.
    Tar(Compression, Vec<String>),
}

/// One raw layer for every file of a model directory, sorted by path.
pub fn raw_plan(dir: &Path) -> Vec<Plan> {
    files_of(dir).into_iter().map(Plan::Raw).collect()
}

/// Packs files of the model in `dir`; tars are made in `work`.
pub fn pack(dir: &Path, work: &Path, dialect: Dialect, plans: &[Plan]) -> Artifact {
    let mut layers = Vec::new();
    let mut blobs = Vec::new();
    let mut diff_ids = Vec::new();
    for plan in plans {
        let (blob, diff_id, descriptor) = layer(dir, work, dialect, plan);
        diff_ids.push(diff_id);
        blobs.push(blob);
        layers.push(descriptor);
    }
    let config = Blob::from_bytes(config(dialect, &diff_ids).to_string());
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {
            "mediaType": config_type(dialect),
            "digest": config.digest.to_string(),
            "size": config.size,
        },
        "layers": layers,
    });
    if let Some(artifact_type) = artifact_type(dialect) {
        manifest["artifactType"] = json!(artifact_type);
    }
    blobs.insert(0, config);
    Artifact { blobs, manifest }
}

fn layer(dir: &Path, work: &Path, dialect: Dialect, plan: &Plan) -> (Blob, String, Value) {
    match plan {
        Plan::Raw(path) => {
            let blob = Blob::from_file(&dir.join(path));
            let descriptor = json!({
                "mediaType": layer_type(dialect, path, "raw"),
                "digest": blob.digest.to_string(),
                "size": blob.size,
                "annotations": annotations(dir, dialect, path),
            });
            let diff_id = blob.digest.to_string();
            (blob, diff_id, descriptor)
        }
        Plan::Tar(compression, paths) => {
            let layer = tar_of(dir, work, paths).finish(*compression);
            let kind = match compression {
                Compression::Plain => "tar",
                Compression::Gzip => "tar+gzip",
                Compression::Zstd => "tar+zstd",
            };
            let descriptor = json!({
                "mediaType": layer_type(dialect, &paths[0], kind),
                "digest": layer.blob.digest.to_string(),
                "size": layer.blob.size,
                // Readers must ignore it: the names in the tar count.
                "annotations": { filepath_key(dialect): paths[0] },
            });
            (layer.blob, layer.diff_id.to_string(), descriptor)
        }
    }
}

fn tar_of(dir: &Path, work: &Path, paths: &[String]) -> LayerBuilder {
    let mut tar = LayerBuilder::new(work);
    for path in paths.iter().flat_map(|path| below(dir, path)) {
        let source = dir.join(&path);
        let metadata = fs::symlink_metadata(&source).unwrap();
        let attributes = Attributes::mode(metadata.mode() & 0o7777)
            .at(metadata.mtime().try_into().unwrap(), metadata.mtime_nsec().try_into().unwrap());
        tar = if metadata.is_dir() {
            tar.dir(&path, &attributes)
        } else if metadata.is_symlink() {
            tar.symlink(&path, fs::read_link(&source).unwrap().to_str().unwrap(), &attributes)
        } else {
            tar.file_from(&path, &source, &attributes)
        };
    }
    tar
}

/// The path and everything below it, parents first, relative to `dir`.
fn below(dir: &Path, path: &str) -> Vec<String> {
    let mut found = vec![path.to_owned()];
    let here = dir.join(path);
    if fs::symlink_metadata(&here).unwrap().is_dir() {
        let mut children: Vec<_> =
            fs::read_dir(&here).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        children.sort();
        let joined = |name: &std::ffi::OsString| format!("{path}/{}", name.to_str().unwrap());
        found.extend(children.iter().flat_map(|name| below(dir, &joined(name))));
    }
    found
}

/// Every regular file below `dir`, sorted, relative to it.
pub fn files_of(dir: &Path) -> Vec<String> {
    let mut files = Vec::new();
    let mut open = vec![PathBuf::from(dir)];
    while let Some(here) = open.pop() {
        for entry in fs::read_dir(here).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            } else {
                let path = entry.path();
                files.push(path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    files.sort();
    files
}

fn annotations(dir: &Path, dialect: Dialect, path: &str) -> Value {
    if dialect == Dialect::Oras {
        return json!({ filepath_key(dialect): path });
    }
    let metadata = fs::metadata(dir.join(path)).unwrap();
    let mtime = Timestamp::try_from(metadata.modified().unwrap()).unwrap();
    let text = json!({
        "name": Path::new(path).file_name().unwrap().to_str(),
        "mode": metadata.mode() & 0o7777,
        "uid": 0,
        "gid": 0,
        "size": metadata.len(),
        "mtime": mtime.to_string(),
        "typeflag": 0,
    });
    let prefix = if dialect == Dialect::Cnai { "org.cnai" } else { "org.cncf" };
    json!({
        filepath_key(dialect): path,
        format!("{prefix}.model.file.metadata+json"): text.to_string(),
        format!("{prefix}.model.file.mediatype.untested"): "false",
    })
}

fn filepath_key(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::Cncf | Dialect::Docker => "org.cncf.model.filepath",
        Dialect::Cnai => "org.cnai.model.filepath",
        Dialect::Oras => "org.opencontainers.image.title",
    }
}

fn layer_type(dialect: Dialect, path: &str, kind: &str) -> String {
    let part = match path {
        path if path.ends_with(".safetensors") || path.starts_with("weights") => "weight",
        path if path.ends_with(".json") => "weight.config",
        path if path.ends_with(".sh") => "code",
        _ => "doc",
    };
    match dialect {
        Dialect::Cncf => format!("application/vnd.cncf.model.{part}.v1.{kind}"),
        Dialect::Cnai => format!("application/vnd.cnai.model.{part}.v1.{kind}"),
        Dialect::Docker if part == "weight" => {
            "application/vnd.cncf.model.weight.v1.safetensors".to_owned()
        }
        Dialect::Docker => format!("application/vnd.cncf.model.{part}.v1.raw"),
        Dialect::Oras => "application/octet-stream".to_owned(),
    }
}

fn config_type(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::Cncf => "application/vnd.cncf.model.config.v1+json",
        Dialect::Cnai => "application/vnd.cnai.model.config.v1+json",
        Dialect::Docker => "application/vnd.docker.ai.model.config.v0.2+json",
        Dialect::Oras => "application/vnd.oci.empty.v1+json",
    }
}

fn artifact_type(dialect: Dialect) -> Option<&'static str> {
    match dialect {
        Dialect::Cncf => Some("application/vnd.cncf.model.manifest.v1+json"),
        Dialect::Cnai => Some("application/vnd.cnai.model.manifest.v1+json"),
        Dialect::Docker => None,
        Dialect::Oras => Some("application/vnd.example.model"),
    }
}

fn config(dialect: Dialect, diff_ids: &[String]) -> Value {
    match dialect {
        Dialect::Oras => json!({}),
        _ => json!({
            "descriptor": { "name": "test", "createdAt": CREATED_AT },
            "config": { "format": "safetensors" },
            "modelfs": { "type": "layers", "diffIds": diff_ids },
        }),
    }
}
