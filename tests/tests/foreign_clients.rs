//! Artifacts that other programs wrote, and a loader that reads through the mount.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::{Duration, SystemTime};

use weightfs_tests::Bed;
use weightfs_tests::image::{busybox_layer, image};
use weightfs_tests::layer::Compression;
use weightfs_tests::model::{self, SMALL_MODEL};
use weightfs_tests::modelpack::{Dialect, Plan, files_of, raw_plan};
use weightfs_tests::process::run;
use weightfs_tests::python::{python, real_model};
use weightfs_tests::tree::{self, Scope};

/// Pushes config.json and weights as raw layers, docs as a tar.
const PUSH: &str = r#"
import sys
from modelpack_client import ModelPackClient, ModelLayer, ModelPackConfig
reference, source = sys.argv[1:]
kind = "application/vnd.cncf.model."
raw = ["config.json", "weights/model-00001-of-00003.safetensors"]
layers = [ModelLayer(path=f"{source}/{path}", artifact_path=path,
          media_type=kind + ("weight.config" if path.endswith(".json") else "weight") + ".v1.raw")
          for path in raw]
layers.append(ModelLayer(path=f"{source}/docs", artifact_path="docs", media_type=kind + "doc.v1.tar"))
ModelPackClient(insecure=True).push(reference, layers, config=ModelPackConfig())
"#;

/// Compares every tensor of two safetensors files.
const COMPARE: &str = r#"
import sys
from safetensors import safe_open
ours, theirs = (safe_open(path, framework="numpy") for path in sys.argv[1:])
assert set(ours.keys()) == set(theirs.keys())
for name in ours.keys():
    a, b = ours.get_tensor(name), theirs.get_tensor(name)
    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), name
print(len(ours.keys()))
"#;

#[test]
fn an_artifact_of_modelpack_client_mounts_like_its_source() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let expected = bed.area.dir("expected");
    let raw = ["config.json", "weights/model-00001-of-00003.safetensors"];
    for path in raw {
        // That client writes times in whole microseconds.
        let time = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456);
        model::set_mtime(&source.join(path), time);
    }
    let pushed = bed.registry.remote().reference("foreign/model", "v1");
    python(PUSH, &[&pushed, source.to_str().unwrap()]).ok();
    let copy = "cd \"$1\" && cp -a --parents config.json docs \
                weights/model-00001-of-00003.safetensors \"$2\"";
    run(Command::new("sh").args(["-c", copy, "copy"]).args([&source, &expected])).ok();
    // And in its tars everything is of the epoch and has one mode.
    for path in files_of(&expected.join("docs")) {
        let path = expected.join("docs").join(path);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        model::set_mtime(&path, SystemTime::UNIX_EPOCH);
    }
    let mounted = bed.mount(&bed.proxy.reference("foreign/model", "v1"));
    tree::assert_same(&expected, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}

#[test]
fn a_real_model_loads_through_the_mount() {
    let bed = Bed::new();
    let source = real_model();
    for (name, plans) in [
        ("raw", raw_plan(&source)),
        ("tar", vec![Plan::Tar(Compression::Plain, vec!["model.safetensors".to_owned()])]),
        ("gzip", vec![Plan::Tar(Compression::Gzip, vec!["model.safetensors".to_owned()])]),
    ] {
        let artifact = bed.pack(&source, Dialect::Cncf, &plans);
        let mounted = bed.mount(&bed.push(&artifact, &format!("real/{name}")));
        let files = [mounted.dir().join("model.safetensors"), source.join("model.safetensors")];
        let tensors = python(COMPARE, &files.each_ref().map(|path| path.to_str().unwrap())).ok();
        assert!(tensors.trim().parse::<u32>().unwrap() > 100, "{tensors}");
        if name == "raw" {
            tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
        }
        mounted.stop();
    }
}

#[test]
fn an_image_that_skopeo_converted_mounts() {
    let bed = Bed::new();
    let original = image(&[busybox_layer(bed.area.path(), Compression::Plain)]);
    bed.push(&original, "skopeo/from");
    let at = |name: &str| format!("docker://{}", bed.registry.remote().reference(name, "v1"));
    // Docker's own manifest and media types, as older images have them.
    run(Command::new("skopeo")
        .args(["copy", "--src-tls-verify=false", "--dest-tls-verify=false", "--format", "v2s2"])
        .args([at("skopeo/from"), at("skopeo/to")]))
    .ok();
    let first = bed.mount(&bed.proxy.reference("skopeo/from", "v1"));
    let second = bed.mount_with_other_root(&bed.proxy.reference("skopeo/to", "v1"));
    tree::assert_same(first.dir(), second.dir(), Scope::Everything);
    second.stop();
    first.stop();
}
