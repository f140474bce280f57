//! Model images: models in stock containerd and Kubernetes, of the artifact's own blobs.

use std::path::Path;

use weightfs_tests::containerd::Version;
use weightfs_tests::cri::Cri;
use weightfs_tests::digest;
use weightfs_tests::host::SNAPSHOTTER;
use weightfs_tests::layer::Compression;
use weightfs_tests::model::SMALL_MODEL;
use weightfs_tests::modelpack::{Dialect, Plan};
use weightfs_tests::process::run;
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::{Artifact, Bed, Host, Target};

const MODELS: &str = "models/small";
const WEIGHTS: &str = "weights/model-00001-of-00003.safetensors";

/// The small model as raw layers and a plain tar: all of it can be lazy.
fn push_model(bed: &Bed) -> (std::path::PathBuf, Artifact, String) {
    let source = bed.model(SMALL_MODEL);
    let paths = SMALL_MODEL.iter().map(|part| part.path.to_owned());
    let (docs, raw): (Vec<_>, Vec<_>) = paths.partition(|path| path.starts_with("docs"));
    let mut plans: Vec<_> = raw.into_iter().map(Plan::Raw).collect();
    plans.push(Plan::Tar(Compression::Plain, docs));
    let artifact = bed.pack(&source, Dialect::Cncf, &plans);
    let reference = bed.push(&artifact, MODELS);
    (source, artifact, reference)
}

/// Makes the model image; what the program says of it.
fn make_image(bed: &Bed, reference: &str) -> serde_json::Value {
    let outcome = run(&mut bed.weightfs.command(["image", reference, "--json"]));
    serde_json::from_str(&outcome.ok()).unwrap()
}

fn bytes_of_blobs(bed: &Bed, artifact: &Artifact) -> u64 {
    // The first blob is the config.
    artifact.blobs.iter().skip(1).map(|blob| bed.proxy.bytes(Target::Blob(blob.digest))).sum()
}

#[test]
fn the_same_artifact_gives_the_same_image_and_nothing_of_it_is_moved() {
    let bed = Bed::new();
    let (_, artifact, reference) = push_model(&bed);
    let first = make_image(&bed, &reference);
    assert_eq!(first["reference"], format!("{reference}-image"));
    assert_eq!(first["lazy_layers"], first["layers"]);
    assert!(first["bytes"].as_u64().unwrap() < 64 << 10, "{first}");
    let tar = artifact.blobs.last().unwrap().size;
    let moved = bytes_of_blobs(&bed, &artifact);
    assert!(moved <= tar, "{moved} bytes, though listing the tar needs {tar} at the most");
    assert_eq!(make_image(&bed, &reference), first);
}

#[test]
fn a_compressed_layer_goes_above_the_lazy_ones() {
    let host = Host::new();
    let source = host.bed.model(SMALL_MODEL);
    let mut plans: Vec<_> = vec![Plan::Tar(Compression::Gzip, vec!["docs".into()])];
    let rest = SMALL_MODEL.iter().filter(|part| !part.path.starts_with("docs"));
    plans.extend(rest.map(|part| Plan::Raw(part.path.to_owned())));
    let artifact = host.bed.pack(&source, Dialect::Cncf, &plans);
    let image = make_image(&host.bed, &host.bed.push(&artifact, MODELS));
    let lazy = image["lazy_layers"].as_u64().unwrap();
    assert_eq!(lazy + 1, image["layers"].as_u64().unwrap());
    let reference = image["reference"].as_str().unwrap();
    let pulled = host.rpull(reference);
    assert_eq!(pulled.lines().filter(|line| line.ends_with("lazy")).count() as u64, lazy);
    let dir = host.bed.mount_point();
    let view = host.containerd.mount_view(SNAPSHOTTER, &dir);
    tree::assert_same(&source, &dir, Scope::ModelFiles);
    view.remove();
    host.containerd.remove_image(reference);
    host.assert_nothing_left();
}

#[test]
fn an_image_has_no_model_image() {
    let host = Host::new();
    let (reference, _) = host.push_image("images/plain", &[]);
    let outcome = run(&mut host.bed.weightfs.command(["image", &reference]));
    assert_eq!(outcome.code, 1);
    assert!(outcome.stderr.contains("is an image already"), "{outcome:?}");
}

/// A container with the model mounted into it, by containerd's own means.
fn a_container_reads_the_model_lazily(version: Version) {
    let host = Host::on(version);
    let (source, artifact, model) = push_model(&host.bed);
    let image = make_image(&host.bed, &model)["reference"].as_str().unwrap().to_owned();
    let (busybox, _) = host.push_image("images/plain", &[]);
    host.bed.proxy.forget();
    let pulled = host.rpull(&image);
    let layers = artifact.manifest["layers"].as_array().unwrap().len();
    assert_eq!(pulled.lines().filter(|line| line.ends_with("lazy")).count(), layers);
    let dir = host.bed.mount_point();
    let view = host.containerd.mount_view(SNAPSHOTTER, &dir);
    host.rpull(&busybox);
    let weights = artifact_blob(&artifact, &source.join(WEIGHTS));
    assert_eq!(host.bed.proxy.bytes(Target::Blob(weights)), 0, "weights were fetched");

    let mount = format!("type=bind,src={},dst=/models,options=rbind:ro", dir.display());
    let file = format!("/models/{WEIGHTS}");
    let arguments =
        ["run", "--rm", "--snapshotter", SNAPSHOTTER, "--mount", &mount, &busybox, "model-reader"];
    let arguments = [&arguments[..], &["/bin/sha256sum", &file]].concat();
    let output = host.containerd.ctr(&arguments).ok();
    let expected = digest::of_file(&source.join(WEIGHTS)).unwrap().hex();
    assert!(output.starts_with(&expected), "{output}");
    assert!(host.bed.proxy.bytes(Target::Blob(weights)) > 0);
    tree::assert_same(&source, &dir, Scope::ModelFiles);

    view.remove();
    host.containerd.remove_image(&image);
    host.containerd.remove_image(&busybox);
    host.assert_nothing_left();
}

fn artifact_blob(artifact: &Artifact, file: &Path) -> weightfs_store::Digest {
    let digest = digest::of_file(file).unwrap();
    assert!(artifact.blobs.iter().any(|blob| blob.digest == digest));
    digest
}

#[test]
fn containerd_1_6_reads_a_model_lazily() {
    a_container_reads_the_model_lazily(Version::Installed);
}

#[test]
fn containerd_1_7_reads_a_model_lazily() {
    if Version::V17.is_here() {
        a_container_reads_the_model_lazily(Version::V17);
    } else {
        println!("not run: containerd 1.7 can't be had from Debian trixie");
    }
}

#[test]
fn a_model_is_an_image_volume_on_containerd_2_1() {
    if !Version::V21.is_here() {
        println!("not run: containerd 2.1 can't be had from Debian sid");
        return;
    }
    let host = Host::with_cri_on(Version::V21);
    let (source, artifact, model) = push_model(&host.bed);
    let volume = make_image(&host.bed, &model)["reference"].as_str().unwrap().to_owned();
    let (busybox, _) = host.push_image_below("images/plain", &[]);
    host.bed.proxy.forget();
    let cri = Cri::connect(&host.containerd, &host.bed.area.dir("pods"));
    let volume = cri.pull(&volume).unwrap();
    cri.pull(&busybox).unwrap();
    let weights = artifact_blob(&artifact, &source.join(WEIGHTS));
    assert_eq!(host.bed.proxy.bytes(Target::Blob(weights)), 0, "weights were fetched");

    let file = format!("/models/{WEIGHTS}");
    let words = ["/bin/sha256sum", &file];
    let ended = cri.run_with_volume(&busybox, &volume, "reader", &words).unwrap();
    let expected = digest::of_file(&source.join(WEIGHTS)).unwrap().hex();
    assert!(ended.output.starts_with(&expected), "{ended:?}");
    assert!(host.bed.proxy.bytes(Target::Blob(weights)) > 0);
}
