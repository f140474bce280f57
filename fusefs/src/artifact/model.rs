//! Layers of model artifacts: ModelPack under its present and its older name, Docker Model
//! Runner's formats, and files pushed by ORAS. Rules: model-spec (spec.md, annotations.md), the
//! behaviour of modctl and Docker Model Runner, KEP-4639.

use std::path::PathBuf;

use serde_json::Value;

use super::manifest::Descriptor;
use super::{Compression, LayerContent, RawFile, RawKind};
use crate::path::{clean_model, shown};
use crate::tree::Timestamp;

/// Bytes of a file-metadata annotation at the most; real ones have about 150.
const MAX_METADATA_BYTES: usize = 64 << 10;

const TITLE: &str = "org.opencontainers.image.title";
/// Set by ORAS where a layer is a packed directory.
const ORAS_UNPACK: &str = "io.deis.oras.content.unpack";

/// Why a layer can't be used, without its name.
pub type Problem = String;

/// What a layer is.
pub type Content = (Compression, LayerContent);

/// Whether an artifact type or config type is ModelPack's.
pub fn is_model_pack(media_type: &str) -> bool {
    ["cncf", "cnai"].iter().any(|organisation| {
        ["manifest", "config"].iter().any(|document| {
            media_type == format!("application/vnd.{organisation}.model.{document}.v1+json")
        })
    })
}

/// Whether a config type is Docker Model Runner's.
pub fn is_docker_model(media_type: &str) -> bool {
    let version = media_type.strip_prefix("application/vnd.docker.ai.model.config.");
    matches!(version, Some("v0.1+json" | "v0.2+json"))
}

/// Whether ORAS named the file of this layer.
pub fn has_title(layer: &Descriptor) -> bool {
    layer.annotation(TITLE).is_some()
}

/// A layer of a ModelPack artifact.
pub fn model_pack_layer(layer: &Descriptor, created: Timestamp) -> Result<Content, Problem> {
    let format = format_of(&layer.media_type);
    let format = format.ok_or_else(|| format!("its type {:?} is not known", layer.media_type))?;
    let tar = LayerContent::ModelTar { created };
    match format {
        "tar" => Ok((Compression::None, tar)),
        "tar+gzip" => Ok((Compression::Gzip, tar)),
        "tar+zstd" => Ok((Compression::Zstd, tar)),
        _ => raw(layer, None, created),
    }
}

/// What follows the kind of content in a ModelPack layer type (`raw`, `tar`, …).
fn format_of(media_type: &str) -> Option<&str> {
    let known = ["application/vnd.cncf.model.", "application/vnd.cnai.model."];
    let rest = known.iter().find_map(|prefix| media_type.strip_prefix(prefix))?;
    let (content, format) = rest.split_once(".v1.")?;
    match (content, format) {
        (
            "weight" | "weight.config" | "doc" | "code" | "dataset",
            "raw" | "tar" | "tar+gzip" | "tar+zstd",
        )
        | ("weight", "gguf" | "safetensors") => Some(format),
        _ => None,
    }
}

/// All layers of a Docker Model Runner artifact. Version 0.2 names files by annotation, 0.1 by
/// the layer's type.
pub fn docker_layers(layers: &[Descriptor], created: Timestamp) -> Vec<Result<Content, Problem>> {
    let docker_layer = |(index, layer): (usize, &Descriptor)| {
        if format_of(&layer.media_type).is_some() {
            return model_pack_layer(layer, created);
        }
        if layer.media_type.ends_with(".tar") {
            return Ok((Compression::None, LayerContent::ModelTar { created }));
        }
        raw(layer, docker_name(layers, index), created)
    };
    layers.iter().enumerate().map(docker_layer).collect()
}

/// The name that Docker Model Runner 0.1 gives to a layer by its type, numbered where there are
/// several of the type.
fn docker_name(layers: &[Descriptor], index: usize) -> Option<String> {
    let (before, rest) = layers.split_at_checked(index)?;
    let media_type = rest.first()?.media_type.as_str();
    let extension = match media_type.strip_prefix("application/vnd.docker.ai.")? {
        "gguf.v3" => "gguf",
        "safetensors" => "safetensors",
        "chat.template.jinja" => return Some("template.jinja".to_owned()),
        "mmproj" => return Some("model.mmproj".to_owned()),
        "license" => return Some("LICENSE".to_owned()),
        _ => return None,
    };
    let same = |layers: &[Descriptor]| {
        layers.iter().filter(|layer| layer.media_type == media_type).count()
    };
    match same(layers) {
        1 => Some(format!("model.{extension}")),
        count => Some(format!("model-{:05}-of-{count:05}.{extension}", same(before) + 1)),
    }
}

/// A layer of an ORAS artifact; `None` if it has no name, which ORAS doesn't unpack either.
pub fn oras_layer(layer: &Descriptor, created: Timestamp) -> Option<Result<Content, Problem>> {
    layer.annotation(TITLE)?;
    let unpack = layer.annotation(ORAS_UNPACK);
    if !unpack.is_some_and(|text| text.eq_ignore_ascii_case("true")) {
        return Some(raw(layer, None, created));
    }
    let compression = match layer.media_type.rsplit(['+', '.']).next() {
        Some("zstd") => Compression::Zstd,
        Some("tar") => Compression::None,
        _ => Compression::Gzip,
    };
    Some(Ok((compression, LayerContent::ModelTar { created })))
}

fn annotation<'a>(layer: &'a Descriptor, name: &str) -> Option<&'a str> {
    ["org.cncf.model.", "org.cnai.model."]
        .iter()
        .find_map(|prefix| layer.annotation(&format!("{prefix}{name}")))
}

/// A layer that is one file, named by its annotations or else `name`.
fn raw(layer: &Descriptor, name: Option<String>, created: Timestamp) -> Result<Content, Problem> {
    let named = annotation(layer, "filepath").or_else(|| layer.annotation(TITLE));
    let name = named.map(str::to_owned).or(name).ok_or(
        "it has no name: the annotation org.cncf.model.filepath is missing; pack the artifact again",
    )?;
    let path = path_of(&name)?;
    let metadata = metadata(layer, &name)?;
    let kind = match metadata.typeflag {
        // What is packed of a symbolic link is the content of its target.
        Some(5) if layer.size == 0 => RawKind::Directory,
        Some(5) => {
            return Err(format!(
                "{:?} is called a directory, but has {} bytes",
                shown(name.as_bytes()),
                layer.size
            ));
        }
        _ => RawKind::File,
    };
    let usual = if kind == RawKind::Directory { 0o755 } else { 0o644 };
    let file = RawFile {
        path,
        kind,
        permissions: metadata.permissions.unwrap_or(usual),
        uid: 0,
        gid: 0,
        mtime: metadata.mtime.unwrap_or(created),
        created,
    };
    Ok((Compression::None, LayerContent::Raw(file)))
}

/// A path relative to the root, clean and not empty.
pub fn path_of(name: &str) -> Result<PathBuf, Problem> {
    let refuse = |why: &str| format!("its path {:?} can't be used: {why}", shown(name.as_bytes()));
    let components = clean_model(name.as_bytes()).map_err(|error| refuse(&error.to_string()))?;
    let components: Result<Vec<_>, _> = components.into_iter().map(std::str::from_utf8).collect();
    let path: PathBuf = components.map_err(|error| refuse(&error.to_string()))?.iter().collect();
    if path.as_os_str().is_empty() {
        return Err(refuse("it is empty"));
    }
    Ok(path)
}

#[derive(Debug, Default)]
struct Metadata {
    permissions: Option<u16>,
    mtime: Option<Timestamp>,
    typeflag: Option<u64>,
}

/// The file-metadata annotation. A model is usable without it, so what is malformed in it is
/// worth a warning only.
fn metadata(layer: &Descriptor, name: &str) -> Result<Metadata, Problem> {
    let Some(text) = annotation(layer, "file.metadata+json") else {
        return Ok(Metadata::default());
    };
    if text.len() > MAX_METADATA_BYTES {
        return Err(format!("its file metadata is longer than {MAX_METADATA_BYTES} bytes"));
    }
    let Ok(value) = serde_json::from_str::<Value>(text) else {
        tracing::warn!(file = name, digest = layer.digest, "file metadata is no JSON: ignored");
        return Ok(Metadata::default());
    };
    let size = value.get("size").and_then(Value::as_u64);
    if let Some(size) = size.filter(|size| *size != layer.size) {
        tracing::warn!(
            file = name,
            digest = layer.digest,
            metadata = size,
            descriptor = layer.size,
            "file metadata has another size than the layer: the layer's counts"
        );
    }
    let mode = value.get("mode").and_then(Value::as_u64);
    let mtime = value.get("mtime").and_then(Value::as_str);
    Ok(Metadata {
        permissions: mode.and_then(|mode| u16::try_from(mode & 0o777).ok()),
        mtime: mtime.and_then(parse_time),
        typeflag: value.get("typeflag").and_then(Value::as_u64),
    })
}

/// When a config says that its artifact was made (`descriptor.createdAt`); the epoch if it doesn't.
pub fn created(config: &[u8]) -> Timestamp {
    let config: Value = serde_json::from_slice(config).unwrap_or_default();
    let text = config.pointer("/descriptor/createdAt").and_then(Value::as_str);
    text.and_then(parse_time).unwrap_or_default()
}

/// A time of RFC 3339, with or without a fraction, with any offset.
pub fn parse_time(text: &str) -> Option<Timestamp> {
    const NANOS: i128 = 1_000_000_000;
    let nanoseconds = text.parse::<jiff::Timestamp>().ok()?.as_nanosecond();
    Some(Timestamp {
        seconds: i64::try_from(nanoseconds.div_euclid(NANOS)).ok()?,
        nanos: u32::try_from(nanoseconds.rem_euclid(NANOS)).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_twenty_layer_types_are_known_under_both_names() {
        let mut known = 0;
        for organisation in ["cncf", "cnai"] {
            for content in ["weight", "weight.config", "doc", "code", "dataset"] {
                for format in ["raw", "tar", "tar+gzip", "tar+zstd"] {
                    let text =
                        format!("application/vnd.{organisation}.model.{content}.v1.{format}");
                    assert_eq!(format_of(&text), Some(format));
                    known += 1;
                }
            }
        }
        assert_eq!(known, 40);
        for text in [
            "application/vnd.cncf.model.weight.v2.raw",
            "application/vnd.cncf.model.doc.v1.gguf",
            "application/vnd.cncf.model.other.v1.raw",
            "application/vnd.other.model.weight.v1.raw",
        ] {
            assert_eq!(format_of(text), None, "{text}");
        }
    }

    #[test]
    fn times_have_nanoseconds_and_offsets() {
        let time = parse_time("2026-01-01T02:00:00.000000007+02:00").unwrap();
        assert_eq!(time, Timestamp { seconds: 1_767_225_600, nanos: 7 });
        let before = parse_time("1969-12-31T23:59:59.5Z").unwrap();
        assert_eq!(before, Timestamp { seconds: -1, nanos: 500_000_000 });
        assert_eq!(parse_time("yesterday"), None);
    }

    #[test]
    fn a_config_without_a_time_means_the_epoch() {
        let config = br#"{"descriptor":{"createdAt":"2026-01-01T00:00:00Z"}}"#;
        assert_eq!(created(config).seconds, 1_767_225_600);
        for config in
            ["", "{}", "[]", r#"{"descriptor":null}"#, r#"{"descriptor":{"createdAt":5}}"#]
        {
            assert_eq!(created(config.as_bytes()), Timestamp::default(), "{config}");
        }
    }
}
