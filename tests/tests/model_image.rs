//! Model images: models in stock containerd and Kubernetes, of the artifact's own blobs.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use serde_json::Value;
use weightfs_tests::containerd::Version;
use weightfs_tests::cri::Cri;
use weightfs_tests::digest;
use weightfs_tests::host::SNAPSHOTTER;
use weightfs_tests::json::documented;
use weightfs_tests::layer::Compression;
use weightfs_tests::model::SMALL_MODEL;
use weightfs_tests::modelpack::{Dialect, Plan};
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::{Artifact, Bed, Fault, Host, Target};

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
    let outcome = bed.weightfs.run_here(&["image", reference, "--json"]);
    documented("image", &outcome.ok())
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

/// The manifests of a model image, by their digests in its index.
fn manifests_of(bed: &Bed, image: &Value) -> Vec<Value> {
    let document = |digest: &Value| -> Value {
        let hex = digest.as_str().unwrap().strip_prefix("sha256:").unwrap();
        serde_json::from_slice(&fs::read(bed.registry.stored(hex)).unwrap()).unwrap()
    };
    let index = document(&image["digest"]);
    index["manifests"].as_array().unwrap().iter().map(|one| document(&one["digest"])).collect()
}

#[test]
fn the_weights_come_first_and_each_layer_says_what_it_is() {
    let bed = Bed::new();
    let (_, artifact, reference) = push_model(&bed);
    let without = make_image(&bed, &reference);
    assert_eq!(without["index"], Value::Null);
    let outcome = bed.weightfs.run_here(&["image", &reference, "--index", "--json"]);
    let image: Value = serde_json::from_str(&outcome.ok()).unwrap();
    let index = image["index"].as_str().unwrap();
    assert_ne!(image["digest"], without["digest"]);
    assert_eq!(make_image(&bed, &reference), image, "the same artifact and index, the same image");
    for manifest in manifests_of(&bed, &image) {
        let layers = manifest["layers"].as_array().unwrap();
        assert_eq!(layers.len(), artifact.layers().len());
        let text = |layer: &Value, name: &str| {
            let key = format!("containerd.io/snapshot/weightfs.{name}");
            layer["annotations"][key].as_str().unwrap_or_default().to_owned()
        };
        let paths: Vec<_> = layers.iter().map(|layer| text(layer, "path")).collect();
        let weights = paths.iter().filter(|path| path.ends_with(".safetensors")).count();
        assert!(weights > 1 && paths[..weights].iter().all(|path| path.ends_with(".safetensors")));
        for layer in layers {
            assert_eq!(text(layer, "index"), index);
            let kind = if text(layer, "kind") == "tar" { "tar" } else { "raw" };
            let media_type = format!("application/vnd.oci.image.layer.v1.{kind}");
            assert_eq!(layer["mediaType"], media_type);
            if kind == "raw" {
                let part = SMALL_MODEL.iter().find(|part| part.path == text(layer, "path"));
                assert_eq!(text(layer, "mode"), format!("{:04o}", part.unwrap().mode));
                assert!(text(layer, "mtime").ends_with('Z'), "{layer}");
            }
        }
        assert!(layers.iter().any(|layer| text(layer, "kind") == "tar"));
    }
}

/// Reads the page at each MiB of the weights of a model image that was just pulled.
fn read_each_mib(dir: &Path, source: &Path) -> Vec<bool> {
    let (there, here) = (dir.join(WEIGHTS), fs::read(source.join(WEIGHTS)).unwrap());
    let there = File::open(there).unwrap();
    let pages = (0..here.len() - 4096).step_by(1 << 20);
    pages
        .map(|at| {
            let mut page = [0; 4096];
            let read = there.read_exact_at(&mut page, at as u64);
            assert!(read.is_err() || page == here[at..at + 4096], "a wrong byte was served");
            read.is_ok()
        })
        .collect()
}

#[test]
fn what_is_read_of_an_image_is_compared_with_the_index_that_it_names() {
    let bed = Bed::new();
    // The image's own digest binds the index: none that is only found is believed.
    bed.weightfs.configure(
        "[verify]\nreferrers = \"off\"\n[fetch]\nbackground = \"off\"\nread_ahead_min = \"0B\"\n\
         read_ahead_max = \"0B\"",
    );
    let (source, artifact, model) = push_model(&bed);
    let elsewhere = weightfs_tests::Weightfs::new(&bed.area);
    let made = elsewhere.run_here(&["image", &model, "--index", "--json"]).ok();
    let image: Value = serde_json::from_str(&made).unwrap();
    let reference = image["reference"].as_str().unwrap();
    let daemon = bed.weightfs.serve(&bed.area);
    let host = Host::beside(bed, daemon);
    let weights = artifact_blob(&artifact, &source.join(WEIGHTS));
    host.bed.proxy.fail(Target::Blob(weights), Fault::Corrupt { at: (2 << 20) + 5 });
    host.rpull(reference);
    let dir = host.bed.mount_point();
    let view = host.containerd.mount_view(SNAPSHOTTER, &dir);
    let good = read_each_mib(&dir, &source);
    assert!(good.len() > 3 && good[0] && !good[2] && good[3], "{good:?}");
    host.bed.proxy.heal();
    assert!(read_each_mib(&dir, &source).iter().all(|good| *good));
    let status = host.bed.weightfs.run_here(&["status", reference, "--json"]).ok();
    let status: Value = serde_json::from_str(&status).unwrap();
    let layers = status["layers"].as_array().unwrap();
    let layer = layers.iter().find(|layer| layer["digest"] == weights.to_string()).unwrap();
    assert_eq!(layer["trust"], "indexed", "{layers:?}");
    view.remove();
    host.containerd.remove_image(reference);
    host.assert_nothing_left();
}

#[test]
fn an_index_that_came_later_is_found_beside_the_artifact() {
    let bed = Bed::new();
    let (source, _, model) = push_model(&bed);
    let image = make_image(&bed, &model);
    bed.weightfs.run_here(&["index", &model]).ok();
    let elsewhere = weightfs_tests::Weightfs::new(&bed.area);
    let dir = bed.mount_point();
    let mounted = elsewhere.mount(&bed.area, image["reference"].as_str().unwrap(), &dir);
    tree::assert_same(&source, &dir, Scope::ModelFiles);
    mounted.stop();
    let listed = elsewhere.run_here(&["cache", "ls", "--json"]).ok();
    assert!(listed.contains("\"indexed\""), "{listed}");
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
    let outcome = host.bed.weightfs.run_here(&["image", &reference]);
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
    // runc keeps the containers of every containerd on the machine in one directory, by id.
    let id = format!("reader-{}-{version:?}", std::process::id());
    let arguments = ["run", "--rm", "--snapshotter", SNAPSHOTTER, "--mount", &mount, &busybox, &id];
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
