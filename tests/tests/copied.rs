//! What skopeo took to another registry works there: an artifact, its index and its model image.

use std::process::Command;

use weightfs_store::Digest;
use weightfs_tests::host::SNAPSHOTTER;
use weightfs_tests::layer::Compression;
use weightfs_tests::model::SMALL_MODEL;
use weightfs_tests::modelpack::{Dialect, Plan};
use weightfs_tests::process::run;
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::{Host, Registry, Target, Weightfs};

const MODELS: &str = "models/moved";

#[test]
fn skopeo_takes_an_artifact_its_index_and_its_model_image_along() {
    let host = Host::new();
    let bed = &host.bed;
    let from = Registry::start(&bed.area);
    let source = bed.model(SMALL_MODEL);
    let paths = SMALL_MODEL.iter().map(|part| part.path.to_owned());
    let (docs, raw): (Vec<_>, Vec<_>) = paths.partition(|path| path.starts_with("docs"));
    let mut plans: Vec<_> = raw.into_iter().map(Plan::Raw).collect();
    plans.push(Plan::Tar(Compression::Plain, docs));
    let artifact = bed.pack(&source, Dialect::Cncf, &plans);
    artifact.push(from.remote(), MODELS, "v1");
    let reference = from.remote().reference(MODELS, "v1");
    let maker = Weightfs::new(&bed.area);
    maker.run_here(&["index", &reference]).ok();
    maker.run_here(&["image", &reference]).ok();

    let manifest = Digest::of(&serde_json::to_vec(&artifact.manifest).unwrap());
    for tag in ["v1", "v1-image", &format!("sha256-{}", manifest.hex())] {
        let at =
            |registry: &Registry| format!("docker://{}", registry.remote().reference(MODELS, tag));
        run(Command::new("skopeo")
            .args(["copy", "--all", "--src-tls-verify=false", "--dest-tls-verify=false"])
            .args([at(&from), at(&bed.registry)]))
        .ok();
    }
    // Nothing can come from there any more.
    drop(from);

    bed.proxy.forget();
    let fresh = Weightfs::new(&bed.area);
    let there = bed.proxy.reference(MODELS, "v1");
    let mounted = fresh.mount(&bed.area, &there, &bed.mount_point());
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
    let listed = fresh.run_here(&["cache", "ls", "--json"]).ok();
    assert!(listed.contains("\"indexed\""), "{listed}");

    bed.proxy.forget();
    let image = bed.proxy.reference(MODELS, "v1-image");
    let pulled = host.rpull(&image);
    let layers = artifact.layers().len();
    assert_eq!(pulled.lines().filter(|line| line.ends_with("lazy")).count(), layers, "{pulled}");
    let weights = SMALL_MODEL.iter().position(|part| part.path.contains("00001-of")).unwrap();
    let weights = weights
        - SMALL_MODEL.iter().take(weights).filter(|part| part.path.starts_with("docs")).count();
    let fetched = bed.proxy.bytes(Target::Blob(artifact.layer_digest(weights)));
    assert_eq!(fetched, 0, "weights were fetched");
    let dir = bed.mount_point();
    let view = host.containerd.mount_view(SNAPSHOTTER, &dir);
    tree::assert_same(&source, &dir, Scope::ModelFiles);
    view.remove();
    host.containerd.remove_image(&image);
    host.assert_nothing_left();
}
