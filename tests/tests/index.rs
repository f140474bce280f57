//! Indexes beside artifacts: made, pushed, found.

use std::fs;

use weightfs_fusefs::index::Index;
use weightfs_store::{CHUNK_BYTES, Digest};
use weightfs_tests::json::documented;
use weightfs_tests::layer::Compression;
use weightfs_tests::model::SMALL_MODEL;
use weightfs_tests::modelpack::{Dialect, Plan};
use weightfs_tests::remote::OCI_MANIFEST;
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::{Artifact, Bed, Blob, Filters, Remote, Target, Weightfs, digest};

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
    documented("index", &bed.weightfs.run_here(&arguments).ok())
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

/// Another referrer of a manifest, of another kind.
fn push_sbom(bed: &Bed, subject: &str, number: usize) {
    let config = Blob::from_bytes("{}");
    let sbom = Blob::from_bytes(format!("sbom {number}"));
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": "application/spdx+json",
        "config": {
            "mediaType": "application/vnd.oci.empty.v1+json",
            "digest": config.digest.to_string(),
            "size": config.size,
        },
        "layers": [{
            "mediaType": "application/spdx+json",
            "digest": sbom.digest.to_string(),
            "size": sbom.size,
        }],
        "subject": {"mediaType": OCI_MANIFEST, "digest": subject, "size": 2},
    });
    let (blobs, tag) = (vec![config, sbom], format!("sbom-{number}"));
    Artifact { blobs, manifest }.push(&Remote::new(&bed.proxy.address()), "models/indexed", &tag);
}

/// An index is pushed and found by the referrers API, which has other referrers on the pages
/// before.
fn an_index_is_listed(filters: Filters) {
    let bed = Bed::new();
    let (source, artifact, reference) = push_model(&bed);
    bed.proxy.list_referrers(filters);
    let text = serde_json::to_vec(&artifact.manifest).unwrap();
    let manifest = Digest::of(&text).to_string();
    (0..3).for_each(|number| push_sbom(&bed, &manifest, number));
    let first = index(&bed, &reference, &[]);
    let tags: Vec<_> = bed.proxy.seen().into_iter().filter(|seen| seen.method == "PUT").collect();
    let tag = format!("/manifests/{}", manifest.replace(':', "-"));
    assert!(!tags.iter().any(|seen| seen.path.ends_with(&tag)), "the registry lists it itself");
    assert_eq!(index(&bed, &reference, &[]), first, "it is found");
    bed.proxy.forget();
    let mounted = bed.mount_with_other_root(&reference);
    let listed = |seen: &weightfs_tests::proxy::Seen| seen.path.contains("/referrers/");
    let pages = bed.proxy.seen().iter().filter(|seen| listed(seen)).count();
    assert_eq!(pages, if filters == Filters::Ignored { 2 } else { 1 }, "three sboms before it");
    tree::assert_same(&source.join("docs"), &mounted.dir().join("docs"), Scope::ModelFiles);
    assert_eq!(bed.proxy.bytes(Target::Blob(artifact.blobs[2].digest)), 0);
    mounted.stop();
}

#[test]
fn an_index_is_listed_by_a_registry_that_filters() {
    an_index_is_listed(Filters::Applied);
}

#[test]
fn an_index_is_listed_by_a_registry_that_lists_everything() {
    an_index_is_listed(Filters::Ignored);
}

#[test]
fn what_was_verified_here_is_not_downloaded_for_the_index() {
    let bed = Bed::new();
    let (source, artifact, reference) = push_model(&bed);
    let mounted = bed.mount(&reference);
    let weights = "weights/model-00001-of-00003.safetensors";
    assert_eq!(
        fs::read(mounted.dir().join(weights)).unwrap(),
        fs::read(source.join(weights)).unwrap()
    );
    mounted.stop();
    let verify = ["verify", &artifact.blobs[2].digest.to_string()];
    bed.weightfs.run_here(&verify).ok();
    bed.proxy.forget();
    let here = index(&bed, &reference, &[]);
    assert_eq!(bed.proxy.bytes(Target::Blob(artifact.blobs[2].digest)), 0, "it is here");
    let elsewhere = Weightfs::new(&bed.area).run_here(&["index", &reference, "--json"]).ok();
    let elsewhere: serde_json::Value = serde_json::from_str(&elsewhere).unwrap();
    assert_eq!(here, elsewhere);
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
