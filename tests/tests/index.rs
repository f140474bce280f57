//! Indexes beside artifacts: made, pushed, found.

use std::fs;

use weightfs_fusefs::index::Index;
use weightfs_store::{CHUNK_BYTES, Digest};
use weightfs_tests::layer::Compression;
use weightfs_tests::model::SMALL_MODEL;
use weightfs_tests::modelpack::{Dialect, Plan};
use weightfs_tests::{Artifact, Bed, Target, digest};

/// The small model: raw layers, a plain tar and a compressed one.
fn push_model(bed: &Bed) -> (std::path::PathBuf, Artifact, String) {
    let source = bed.model(SMALL_MODEL);
    let tar = |compression, path: &str| Plan::Tar(compression, vec![path.to_owned()]);
    let artifact = bed.pack(
        &source,
        Dialect::Cncf,
        &[
            Plan::Raw("config.json".into()),
            Plan::Raw("weights/model-00001-of-00003.safetensors".into()),
            tar(Compression::Plain, "weights/model-00003-of-00003.safetensors"),
            tar(Compression::Gzip, "docs"),
        ],
    );
    let reference = bed.push(&artifact, "models/indexed");
    (source, artifact, reference)
}

fn index(bed: &Bed, reference: &str, more: &[&str]) -> serde_json::Value {
    let arguments = [&["index", reference, "--json"], more].concat();
    serde_json::from_str(&bed.weightfs.run_here(&arguments).ok()).unwrap()
}

#[test]
fn each_chunk_has_its_digest() {
    let bed = Bed::new();
    let (source, artifact, reference) = push_model(&bed);
    let file = bed.area.path().join("index");
    let summary = index(&bed, &reference, &["-o", file.to_str().unwrap()]);
    let bytes = fs::read(&file).unwrap();
    assert_eq!(summary["index"], Digest::of(&bytes).to_string());
    let manifest: Digest = summary["manifest"].as_str().unwrap().parse().unwrap();
    let index = Index::parse(&bytes.into(), manifest).unwrap();
    assert_eq!(index.layers().len(), 4);

    let weights = source.join("weights/model-00001-of-00003.safetensors");
    let layer = index.layer(digest::of_file(&weights).unwrap()).unwrap();
    let bytes = fs::read(&weights).unwrap();
    let chunks = bytes.chunks(usize::try_from(CHUNK_BYTES).unwrap());
    let expected: Vec<u8> = chunks.flat_map(|chunk| *Digest::of(chunk).as_raw()).collect();
    assert_eq!(layer.chunk_digests, expected);

    let names = |at: usize| -> Vec<_> {
        let layer = index.layer(artifact.blobs[at].digest).unwrap();
        layer.listing.entries().iter().map(|entry| String::from_utf8_lossy(&entry.path)).collect()
    };
    assert!(names(3).iter().any(|name| name.ends_with("00003-of-00003.safetensors")));
    assert!(names(4).iter().any(|name| name.ends_with("notes.txt")), "{:?}", names(4));
}

#[test]
fn an_index_is_pushed_once_where_the_registry_has_no_referrers() {
    let bed = Bed::new();
    let (_, artifact, reference) = push_model(&bed);
    let first = index(&bed, &reference, &[]);
    let (weights, size) = (artifact.blobs[2].digest, artifact.blobs[2].size);
    assert_eq!(bed.proxy.bytes(Target::Blob(weights)), size, "each layer is read once");
    bed.proxy.forget();
    assert_eq!(index(&bed, &reference, &[]), first);
    assert_eq!(bed.proxy.bytes(Target::Blob(weights)), 0, "nothing has changed");
}

#[test]
fn a_layer_that_does_not_match_its_digest_makes_no_index() {
    let bed = Bed::new();
    let (_, artifact, reference) = push_model(&bed);
    let weights = artifact.blobs[2].digest;
    bed.proxy.fail(Target::Blob(weights), weightfs_tests::Fault::Corrupt { at: 5 << 20 });
    let outcome = bed.weightfs.run_here(&["index", &reference]);
    assert_eq!(outcome.code, 1);
    assert!(outcome.stderr.contains("hash to"), "{outcome:?}");
}
