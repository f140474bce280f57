//! Manifests, configs and platforms that nobody meant.

use std::path::Component;

use serde_json::{Value, json};
use weightfs_fuzz::foreign;

use super::*;

const DIGEST: &str = "sha256:f338e13524cf74c04cefcbd19e8f625e65aa35831bbd8b9ae24aa7d1a6e8bd19";
const METADATA: &str =
    r#"{"mode":420,"size":5,"mtime":"2026-01-01T02:00:00.5+02:00","typeflag":0}"#;

fn manifest(config_type: &str, layers: &[(&str, Value)]) -> Vec<u8> {
    let layer = |(media_type, annotations): &(&str, Value)| json!({"mediaType": media_type, "digest": DIGEST, "size": 5, "annotations": annotations});
    let layers: Vec<_> = layers.iter().map(layer).collect();
    let config = json!({"mediaType": config_type, "digest": DIGEST, "size": 2});
    json!({"schemaVersion": 2, "config": config, "layers": layers}).to_string().into_bytes()
}

/// One of each kind.
fn manifests() -> [Vec<u8>; 5] {
    let raw = json!({"org.cncf.model.filepath": "../a/./b/../c.bin",
        "org.cncf.model.file.metadata+json": METADATA});
    let title = json!({"org.opencontainers.image.title": "d/e.bin",
        "io.deis.oras.content.unpack": "true"});
    [
        manifest(
            "application/vnd.cncf.model.config.v1+json",
            &[
                ("application/vnd.cncf.model.weight.v1.raw", raw.clone()),
                ("application/vnd.cnai.model.doc.v1.tar+gzip", json!({})),
            ],
        ),
        manifest(
            "application/vnd.docker.ai.model.config.v0.1+json",
            &[1, 2].map(|_| ("application/vnd.docker.ai.gguf.v3", Value::Null)),
        ),
        manifest("a/b", &[("application/vnd.oci.image.layer.v1.tar", title)]),
        manifest(
            "application/vnd.oci.image.config.v1+json",
            &[("application/vnd.oci.image.layer.v1.tar+zstd", Value::Null)],
        ),
        json!({"manifests": [{"digest": DIGEST, "size": 1, "mediaType": "m",
            "platform": {"os": "linux", "architecture": "arm64", "variant": "v8"}}]})
        .to_string()
        .into_bytes(),
    ]
}

fn parse(manifest: Vec<u8>, config: Vec<u8>) -> Result<Artifact, ArtifactError> {
    let repository = Repository { registry: "localhost:5000".into(), name: "m".into() };
    Artifact::parse(repository, Digest::of(&manifest), manifest.into(), config.into())
}

#[test]
fn manifests_are_refused_or_give_clean_layers() {
    let samples = manifests();
    let samples = samples.each_ref().map(Vec::as_slice);
    bolero::check!().for_each(|input: &[u8]| {
        let Ok(artifact) = parse(foreign(&samples, input), vec![]) else { return };
        assert!(artifact.layers.len() <= MAX_LAYERS);
        for layer in &artifact.layers {
            assert!(i64::try_from(layer.size).is_ok());
            let LayerContent::Raw(file) = &layer.content else { continue };
            let mut parts = file.path.components();
            assert!(parts.all(|part| matches!(part, Component::Normal(_))), "{:?}", file.path);
            assert!(file.path.file_name().is_some() && file.permissions <= 0o777);
            assert!(file.mtime.nanos < 1_000_000_000);
        }
    });
}

#[test]
fn of_an_index_one_manifest_is_chosen_or_the_choice_is_said() {
    let samples = manifests();
    bolero::check!().for_each(|input: &[u8]| {
        let Ok(document) = Document::parse("r", &foreign(&[&samples[4]], input)) else { return };
        let Some(offered) = document.manifests else { return };
        match choose("r", &offered, &Platform::host()) {
            Ok(digest) => assert!(offered.iter().any(|one| one.digest == digest.to_string())),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    });
}

#[test]
fn configs_never_stop_a_model() {
    let manifest = manifests()[0].clone();
    let sample = br#"{"descriptor":{"createdAt":"2026-01-01T00:00:00.25+02:00"},"config":{}}"#;
    bolero::check!().for_each(|input: &[u8]| {
        let artifact = parse(manifest.clone(), foreign(&[sample], input)).unwrap();
        let LayerContent::Raw(file) = &artifact.layers[0].content else { panic!("not raw") };
        assert!(file.created.nanos < 1_000_000_000);
    });
}

#[test]
fn platforms_are_read_as_they_are_written() {
    bolero::check!().for_each(|input: &[u8]| {
        let bytes = foreign(&[b"linux/arm/v7", b"linux/amd64"], input);
        let Ok(text) = std::str::from_utf8(&bytes) else { return };
        if let Ok(platform) = text.parse::<Platform>() {
            assert_eq!(platform.to_string(), text);
        }
    });
}
