//! Manifests of every kind, and what must be refused.

use serde_json::{Value, json};

use super::*;

const DIGEST: &str = "sha256:f338e13524cf74c04cefcbd19e8f625e65aa35831bbd8b9ae24aa7d1a6e8bd19";

fn parse_with(manifest: &str, config: &str) -> Result<Artifact, ArtifactError> {
    let repository =
        Repository { registry: "localhost:5000".to_owned(), name: "models/small".to_owned() };
    let manifest = Bytes::copy_from_slice(manifest.as_bytes());
    let digest = Digest::of(&manifest);
    Artifact::parse(repository, digest, manifest, Bytes::copy_from_slice(config.as_bytes()))
}

fn parse(manifest: &Value) -> Result<Artifact, ArtifactError> {
    parse_with(&manifest.to_string(), "")
}

fn layer(media_type: &str, size: u64, annotations: &Value) -> Value {
    json!({"mediaType": media_type, "digest": DIGEST, "size": size, "annotations": annotations})
}

fn with_config(config_type: &str, layers: &[Value]) -> Value {
    json!({"schemaVersion": 2, "layers": layers,
        "config": {"mediaType": config_type, "digest": DIGEST, "size": 2}})
}

fn model_pack(layers: &[Value]) -> Value {
    with_config("application/vnd.cncf.model.config.v1+json", layers)
}

fn raw_file(layer: &LayerDescriptor) -> &RawFile {
    match &layer.content {
        LayerContent::Raw(file) => file,
        other => panic!("{other:?}"),
    }
}

fn raw_with(annotations: &Value) -> Result<RawFile, ArtifactError> {
    let layer = layer("application/vnd.cncf.model.weight.v1.raw", 5, annotations);
    parse(&model_pack(&[layer])).map(|artifact| raw_file(&artifact.layers[0]).clone())
}

#[test]
fn the_example_of_the_specification_is_read() {
    let manifest = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
     "artifactType":"application/vnd.cncf.model.manifest.v1+json",
     "config":{"mediaType":"application/vnd.cncf.model.config.v1+json","digest":"sha256:20529ffa88a6069c8903fd3cc30f2ed257ec260603cc1a228b2b9f50b2a82621","size":489},
     "layers":[
      {"mediaType":"application/vnd.cncf.model.weight.config.v1.raw","digest":"sha256:f338e13524cf74c04cefcbd19e8f625e65aa35831bbd8b9ae24aa7d1a6e8bd19","size":37,
       "annotations":{"org.cncf.model.filepath":"config.json",
        "org.cncf.model.file.metadata+json":"{\"name\":\"config.json\",\"mode\":384,\"uid\":7,\"gid\":7,\"size\":37,\"mtime\":\"2026-01-01T00:00:00Z\",\"typeflag\":0}",
        "org.cncf.model.file.mediatype.untested":"false"}},
      {"mediaType":"application/vnd.cncf.model.weight.v1.raw","digest":"sha256:5d13da7718a982061b95bd12b5fd1161c9c850437f5e2f63a774f014bd0ba581","size":112,
       "annotations":{"org.cncf.model.filepath":"weights/model-00001-of-00001.safetensors"}},
      {"mediaType":"application/vnd.cncf.model.doc.v1.tar","digest":"sha256:5f4eee0fcc8d3ff95383ee8a46d1f9f28e042b5e4db501fb4a58dca24e5cbfc5","size":10240}]}"#;
    let config = r#"{"descriptor":{"createdAt":"2025-01-01T00:00:00Z"},"config":{},"modelfs":{"type":"layers","diffIds":[]}}"#;
    let artifact = parse_with(manifest, config).unwrap();
    assert_eq!(artifact.kind, ArtifactKind::ModelPack);
    let sizes: Vec<_> = artifact.layers.iter().map(|layer| layer.size).collect();
    assert_eq!(sizes, [37, 112, 10240]);

    let created = Timestamp { seconds: 1_735_689_600, nanos: 0 };
    let first = raw_file(&artifact.layers[0]);
    assert_eq!(first.path.to_str(), Some("config.json"));
    assert_eq!((first.permissions, first.uid, first.gid), (0o600, 0, 0));
    assert_eq!(first.mtime, Timestamp { seconds: 1_767_225_600, nanos: 0 });
    let second = raw_file(&artifact.layers[1]);
    assert_eq!(second.path.to_str(), Some("weights/model-00001-of-00001.safetensors"));
    assert_eq!((second.permissions, second.mtime), (0o644, created), "defaults");
    assert_eq!(artifact.layers[2].content, LayerContent::ModelTar { created });

    let stored = serde_json::to_string(&artifact.layers).unwrap();
    let back: Vec<LayerDescriptor> = serde_json::from_str(&stored).unwrap();
    assert_eq!(back, artifact.layers);
}

#[test]
fn either_type_makes_a_model_pack_under_both_names() {
    for organisation in ["cncf", "cnai"] {
        let layers = json!([layer(
            &format!("application/vnd.{organisation}.model.weight.v1.tar+zstd"),
            9,
            &Value::Null
        )]);
        let artifact_type = format!("application/vnd.{organisation}.model.manifest.v1+json");
        let config_type = format!("application/vnd.{organisation}.model.config.v1+json");
        let empty = "application/vnd.oci.empty.v1+json";
        for manifest in [
            json!({"artifactType": artifact_type, "layers": layers,
                "config": {"mediaType": empty, "digest": DIGEST, "size": 2}}),
            json!({"artifactType": artifact_type, "layers": layers}),
            json!({"config": {"mediaType": config_type, "digest": DIGEST, "size": 2}, "layers": layers}),
        ] {
            let artifact = parse(&manifest).unwrap();
            assert_eq!(artifact.kind, ArtifactKind::ModelPack);
            assert_eq!(artifact.layers[0].compression, Compression::Zstd);
        }
    }
}

#[test]
fn older_annotations_and_titles_name_a_file() {
    let path = |annotations| raw_with(&annotations).unwrap().path;
    assert_eq!(path(json!({"org.cnai.model.filepath": "a/b"})).to_str(), Some("a/b"));
    let title = "org.opencontainers.image.title";
    assert_eq!(path(json!({"org.cncf.model.filepath": "", title: "t"})).to_str(), Some("t"));
    assert_eq!(path(json!({"org.cncf.model.filepath": "p", title: "t"})).to_str(), Some("p"));
    let nameless = raw_with(&Value::Null).unwrap_err().to_string();
    assert!(nameless.contains("org.cncf.model.filepath"), "{nameless}");
}

#[test]
fn paths_are_cleaned_and_those_that_escape_refused() {
    let path = |text: &str| raw_with(&json!({"org.cncf.model.filepath": text}));
    assert_eq!(path("../../root/m/w.bin").unwrap().path.to_str(), Some("root/m/w.bin"));
    assert_eq!(path("/m/./w.bin").unwrap().path.to_str(), Some("m/w.bin"));
    for text in ["a/../../b", "..", "/", ".", "a\0b", &"a/".repeat(3000), &"a".repeat(256)] {
        let error = path(text).unwrap_err();
        assert!(matches!(error, ArtifactError::Layer { index: 0, .. }), "{text:?}: {error}");
    }
}

#[test]
fn file_metadata_counts_where_it_makes_sense() {
    let with = |metadata: &str| {
        raw_with(&json!({"org.cncf.model.filepath": "f",
            "org.cncf.model.file.metadata+json": metadata}))
    };
    let odd = with(r#"{"mode":"0644","mtime":7,"size":99,"typeflag":2}"#).unwrap();
    assert_eq!((odd.kind, odd.permissions, odd.mtime.seconds), (RawKind::File, 0o644, 0));
    assert_eq!(with("not JSON").unwrap().permissions, 0o644);
    assert_eq!(with(r#"{"mode":2147484141}"#).unwrap().permissions, 0o755, "Go's type bits");
    assert!(with(r#"{"typeflag":5}"#).is_err(), "a directory has no bytes");
    assert!(with(&" ".repeat((64 << 10) + 1)).is_err());
}

#[test]
fn an_empty_raw_layer_can_be_a_directory() {
    let annotations = json!({"org.cncf.model.filepath": "d",
        "org.cncf.model.file.metadata+json": r#"{"typeflag":5}"#});
    let layer = layer("application/vnd.cncf.model.doc.v1.raw", 0, &annotations);
    let artifact = parse(&model_pack(&[layer])).unwrap();
    let directory = raw_file(&artifact.layers[0]);
    assert_eq!((directory.kind, directory.permissions), (RawKind::Directory, 0o755));
}

#[test]
fn docker_models_are_named_by_annotation_or_type() {
    let path = json!({"org.cncf.model.filepath": "model.gguf"});
    let manifest = with_config(
        "application/vnd.docker.ai.model.config.v0.2+json",
        &[layer("application/vnd.cncf.model.weight.v1.gguf", 5, &path)],
    );
    let artifact = parse(&manifest).unwrap();
    assert_eq!(artifact.kind, ArtifactKind::DockerModel);
    assert_eq!(raw_file(&artifact.layers[0]).path.to_str(), Some("model.gguf"));

    let old = |name: &str| layer(&format!("application/vnd.docker.ai.{name}"), 5, &Value::Null);
    let manifest = with_config(
        "application/vnd.docker.ai.model.config.v0.1+json",
        &[old("gguf.v3"), old("gguf.v3"), old("chat.template.jinja")],
    );
    let artifact = parse(&manifest).unwrap();
    let names: Vec<_> =
        artifact.layers.iter().map(|layer| raw_file(layer).path.to_str().unwrap()).collect();
    assert_eq!(names, ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf", "template.jinja"]);
}

#[test]
fn oras_files_are_named_by_title() {
    let title = |name: &str| json!({"org.opencontainers.image.title": name});
    let mut packed = title("dir");
    packed["io.deis.oras.content.unpack"] = json!("true");
    let manifest = with_config(
        "application/vnd.oci.empty.v1+json",
        &[
            layer("application/vnd.oci.image.layer.v1.tar", 5, &title("a/f.bin")),
            layer("application/octet-stream", 5, &Value::Null),
            layer("application/vnd.oci.image.layer.v1.tar+gzip", 5, &packed),
        ],
    );
    let artifact = parse(&manifest).unwrap();
    assert_eq!(artifact.kind, ArtifactKind::Oras);
    assert_eq!(artifact.layers.len(), 2, "what has no name is left out");
    assert_eq!(raw_file(&artifact.layers[0]).path.to_str(), Some("a/f.bin"));
    assert_eq!(artifact.layers[1].compression, Compression::Gzip);
    assert!(matches!(artifact.layers[1].content, LayerContent::ModelTar { .. }));
}

#[test]
fn images_have_tars_in_any_compression() {
    for config in image::CONFIG_TYPES {
        let types = [
            ("application/vnd.oci.image.layer.v1.tar", Compression::None),
            ("application/vnd.oci.image.layer.v1.tar+gzip", Compression::Gzip),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", Compression::Zstd),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", Compression::Gzip),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Compression::Gzip),
            ("application/vnd.docker.image.rootfs.diff.tar", Compression::None),
        ];
        let titled = json!({"org.opencontainers.image.title": "ignored"});
        let layers = types.map(|(media_type, _)| layer(media_type, 5, &titled));
        let artifact = parse(&with_config(config, &layers)).unwrap();
        assert_eq!(artifact.kind, ArtifactKind::Image);
        for (layer, (_, compression)) in artifact.layers.iter().zip(types) {
            assert_eq!((layer.compression, &layer.content), (compression, &LayerContent::ImageTar));
        }
    }
    let encrypted = layer("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", 5, &Value::Null);
    let error = parse(&with_config(image::CONFIG_TYPES[0], &[encrypted])).unwrap_err();
    assert!(error.to_string().contains("+encrypted"), "{error}");
}

#[test]
fn other_things_are_not_models() {
    let helm = with_config(
        "application/vnd.cncf.helm.config.v1+json",
        &[layer("application/vnd.cncf.helm.chart.content.v1.tar+gzip", 5, &Value::Null)],
    );
    for manifest in [helm, json!({}), json!({"layers": null}), json!({"manifests": []})] {
        let error = parse(&manifest).unwrap_err();
        assert!(matches!(error, ArtifactError::NotAModel { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("localhost:5000/models/small@sha256:"), "{text}");
        assert!(text.contains("ModelPack"), "{text}");
    }
}

#[test]
fn malformed_and_oversized_manifests_are_refused() {
    let refused = |manifest: &str| {
        let error = parse_with(manifest, "").unwrap_err();
        assert!(matches!(error, ArtifactError::Manifest { .. }), "{error}");
    };
    refused("");
    refused("[]");
    refused(r#"{"layers":[],"manifests":[]}"#);
    refused(r#"{"layers":[{"digest":"sha256:00","size":-1}]}"#);
    refused(&" ".repeat((4 << 20) + 1));
    let many = vec![layer("a", 1, &Value::Null); MAX_LAYERS + 1];
    refused(&model_pack(&many).to_string());
}

#[test]
fn bad_layers_are_named() {
    let raw = "application/vnd.cncf.model.weight.v1.raw";
    let path = json!({"org.cncf.model.filepath": "f"});
    let mut other_digest = layer(raw, 5, &path);
    other_digest["digest"] = json!("sha512:00");
    let huge = layer(raw, u64::MAX, &path);
    let unknown = layer("application/vnd.cncf.model.weight.v9.raw", 5, &path);
    for bad in [other_digest, huge, unknown] {
        let error = parse(&model_pack(&[layer(raw, 5, &path), bad])).unwrap_err();
        assert!(matches!(error, ArtifactError::Layer { index: 1, .. }), "{error}");
    }
}

#[test]
fn a_missing_platform_names_those_there_are() {
    let index = json!({"manifests": [
        {"mediaType": "m", "digest": DIGEST, "size": 1,
            "platform": {"os": "linux", "architecture": "arm64", "variant": "v8"}},
        {"digest": DIGEST, "size": 1, "platform": {"os": "unknown", "architecture": "unknown"}}]});
    let document = Document::parse("r", index.to_string().as_bytes()).unwrap();
    let offered = document.manifests.unwrap();
    let wanted = |text: &str| choose("r", &offered, &text.parse().unwrap());
    assert_eq!(wanted("linux/arm64").unwrap().to_string(), DIGEST);
    let error = wanted("linux/s390x").unwrap_err().to_string();
    assert_eq!(error, "r has nothing for linux/s390x; it has linux/arm64/v8");
}

/// A model of raw layers, a directory and tars.
fn model() -> Artifact {
    let metadata = r#"{"mode":493,"mtime":"2026-01-01T00:00:00.000000007Z","typeflag":5}"#;
    let named = |path: &str| json!({"org.cncf.model.filepath": path});
    let directory = json!({"org.cncf.model.filepath": "empty",
        "org.cncf.model.file.metadata+json": metadata});
    let kind = |kind: &str| format!("application/vnd.cncf.model.{kind}");
    parse(&model_pack(&[
        layer(&kind("doc.v1.tar+gzip"), 9, &json!({})),
        layer(&kind("weight.config.v1.raw"), 5, &named("config.json")),
        layer(&kind("weight.v1.raw"), 7, &named("a/w.safetensors")),
        layer(&kind("code.v1.tar"), 1024, &json!({})),
        layer(&kind("weight.v1.raw"), 0, &directory),
    ]))
    .unwrap()
}

fn image_of(artifact: &Artifact) -> model_image::ModelImage {
    let layers = artifact.layers.iter();
    let layers: Vec<_> =
        layers.map(|layer| model_image::ImageLayer { layer, diff_id: layer.digest }).collect();
    model_image::ModelImage::new(artifact.manifest_digest, None, &layers).unwrap()
}

fn parse_image(manifest: &Bytes) -> Result<Artifact, ArtifactError> {
    parse_with(std::str::from_utf8(manifest).unwrap(), "")
}

#[test]
fn a_model_image_has_the_layers_of_its_model() {
    let model = model();
    let image = image_of(&model);
    assert_eq!(image, image_of(&model), "reproducible");
    for manifest in &image.manifests {
        let parsed = parse_image(manifest).unwrap();
        assert_eq!(parsed.kind, ArtifactKind::Image);
        let contents = |artifact: &Artifact| -> Vec<_> {
            let layers = artifact.layers.iter();
            layers.map(|l| (l.digest, l.size, l.compression, l.content.clone())).collect()
        };
        assert_eq!(contents(&parsed), contents(&model));
    }
    let index: Value = serde_json::from_slice(&image.index).unwrap();
    let found = index["manifests"].as_array().unwrap().iter().map(|m| &m["digest"]);
    let expected: Vec<_> = image.manifests.iter().map(|m| Digest::of(m).to_string()).collect();
    assert_eq!(found.collect::<Vec<_>>(), expected.iter().collect::<Vec<_>>());
    let config: Value = serde_json::from_slice(&image.configs[1]).unwrap();
    assert_eq!(config["architecture"], "arm64");
    assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), model.layers.len());
}

#[test]
fn lazy_layers_go_below_and_weights_lowest() {
    let ranks: Vec<_> = model().layers.iter().map(model_image::rank).collect();
    assert_eq!(ranks, [2, 1, 0, 1, 0]);
}

#[test]
fn a_raw_layer_of_an_image_says_what_it_is_or_is_refused() {
    let image = image_of(&model());
    let good = std::str::from_utf8(&image.manifests[0]).unwrap();
    let prefix = "containerd.io/snapshot/weightfs";
    for (from, to) in [
        (format!(r#""{prefix}.kind":"file","#), String::new()),
        (format!(r#""{prefix}.kind":"file""#), format!(r#""{prefix}.kind":"socket""#)),
        (format!(r#""{prefix}.mode":"0644","#), String::new()),
        (format!(r#""{prefix}.mode":"0644""#), format!(r#""{prefix}.mode":"4644""#)),
        (format!(r#""{prefix}.mtime":"1970-01-01T00:00:00Z","#), String::new()),
        (format!(r#""{prefix}.path":"config.json""#), format!(r#""{prefix}.path":"/../..""#)),
    ] {
        let bad = good.replacen(&from, &to, 1);
        assert_ne!(bad, good, "{from}");
        let error = parse_with(&bad, "").unwrap_err();
        assert!(matches!(error, ArtifactError::Layer { .. }), "{error}");
    }
}

#[test]
fn a_path_that_no_label_can_hold_is_refused_by_name() {
    let mut model = model();
    let LayerContent::Raw(file) = &mut model.layers[1].content else { panic!("a raw layer") };
    file.path = std::iter::repeat_n("x".repeat(220), 20).collect();
    let layer = model_image::ImageLayer { layer: &model.layers[1], diff_id: Digest::of(b"") };
    let error =
        model_image::ModelImage::new(Digest::of(b""), None, &[layer]).map(drop).unwrap_err();
    assert!(error.1.contains("longer than containerd allows"), "{}", error.1);
}
