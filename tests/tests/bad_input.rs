//! Bad input gets a clear error, and nothing is lost or left mounted.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::errno::Errno;
use serde_json::json;
use weightfs_tests::image::image;
use weightfs_tests::layer::{Attributes, Compression, Layer, LayerBuilder};
use weightfs_tests::model::{self, Part, SMALL_MODEL};
use weightfs_tests::modelpack::{Dialect, Plan};
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::{Artifact, Bed, Blob, Fault, Target, wait_until};

const MIB: u64 = 1 << 20;
const ONE_FILE: &[Part] = &[Part { path: "model.safetensors", bytes: 40 << 20, mode: 0o644 }];
/// A deadline that a test can wait for.
const SHORT_DEADLINE: &str = "[fetch]\ndeadline = \"2s\"";

fn read_at(path: &Path, offset: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4096];
    File::open(path)?.read_exact_at(&mut bytes, offset).map(|()| bytes)
}

fn is_io_error<T>(result: io::Result<T>) -> bool {
    result.is_err_and(|error| error.raw_os_error() == Some(Errno::EIO as i32))
}

/// A ModelPack artifact with one tar layer.
fn tar_model(bed: &Bed, layer: Layer) -> Artifact {
    let mut artifact = bed.pack_raw(&bed.model(&[]), Dialect::Cncf);
    artifact.manifest["layers"] = json!([{
        "mediaType": "application/vnd.cncf.model.weight.v1.tar",
        "digest": layer.blob.digest.to_string(),
        "size": layer.blob.size,
    }]);
    artifact.blobs.push(layer.blob);
    artifact
}

#[test]
fn a_reference_that_is_none() {
    let bed = Bed::new();
    let dir = bed.mount_point();
    bed.weightfs.mount_fails("Not A Reference", &dir).assert_fails(2, &["Not A Reference"]);
    bed.area.assert_no_mounts();
}

#[test]
fn an_unknown_repository() {
    let bed = Bed::new();
    bed.assert_refused(
        &bed.proxy.reference("models/none", "v1"),
        &["models/none", "v1", "not there"],
    );
}

#[test]
fn an_unknown_tag() {
    let bed = Bed::new();
    bed.push(&bed.pack_raw(&bed.model(&SMALL_MODEL[..1]), Dialect::Cncf), "models/some");
    bed.assert_refused(
        &bed.proxy.reference("models/some", "v2"),
        &["models/some", "v2", "not there"],
    );
}

#[test]
fn an_artifact_that_is_no_model() {
    let bed = Bed::new();
    let mut artifact = bed.pack_raw(&bed.model(&SMALL_MODEL[..1]), Dialect::Oras);
    artifact.manifest["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json".into();
    artifact.manifest.as_object_mut().unwrap().remove("artifactType");
    artifact.manifest["layers"][0].as_object_mut().unwrap().remove("annotations");
    let reference = bed.push(&artifact, "charts/some");
    bed.assert_refused(&reference, &["charts/some", "application/vnd.cncf.helm.config.v1+json"]);
}

#[test]
fn a_manifest_that_is_no_json() {
    let bed = Bed::new();
    let reference =
        bed.push(&bed.pack_raw(&bed.model(&SMALL_MODEL[..1]), Dialect::Cncf), "models/text");
    let media_type = "application/vnd.oci.image.manifest.v1+json".to_owned();
    bed.proxy.fail(Target::Manifests, Fault::Replace { media_type, body: "<html>".into() });
    bed.assert_refused(&reference, &["models/text", "manifest"]);
}

#[test]
fn a_manifest_over_four_mebibytes() {
    let bed = Bed::new();
    let mut artifact = bed.pack_raw(&bed.model(&SMALL_MODEL[..1]), Dialect::Cncf);
    let reference = bed.push(&artifact, "models/huge");
    artifact.manifest["annotations"] = json!({ "padding": "x".repeat(5 << 20) });
    let media_type = "application/vnd.oci.image.manifest.v1+json".to_owned();
    let body = artifact.manifest.to_string().into();
    bed.proxy.fail(Target::Manifests, Fault::Replace { media_type, body });
    bed.assert_refused(&reference, &["models/huge", "manifest", "4194304"]);
}

#[test]
fn a_manifest_that_is_not_the_one_of_its_digest() {
    let bed = Bed::new();
    let mut artifact = bed.pack_raw(&bed.model(&SMALL_MODEL[..1]), Dialect::Cncf);
    bed.push(&artifact, "models/other");
    let digest = Blob::from_bytes(artifact.manifest.to_string()).digest;
    artifact.manifest["annotations"] = json!({ "not": "the same" });
    let media_type = "application/vnd.oci.image.manifest.v1+json".to_owned();
    let body = artifact.manifest.to_string().into();
    bed.proxy.fail(Target::Manifests, Fault::Replace { media_type, body });
    let reference = format!("{}/models/other@{digest}", bed.proxy.address());
    bed.assert_refused(&reference, &[&digest.to_string()]);
}

#[test]
fn a_config_that_does_not_match_its_digest() {
    let bed = Bed::new();
    let artifact = bed.pack_raw(&bed.model(&SMALL_MODEL[..1]), Dialect::Cncf);
    let reference = bed.push(&artifact, "models/config");
    bed.proxy.fail(Target::Blob(artifact.blobs[0].digest), Fault::Corrupt { at: 20 });
    bed.assert_refused(&reference, &[&artifact.blobs[0].digest.to_string()]);
}

#[test]
fn a_compressed_layer_that_does_not_match_its_digest() {
    let bed = Bed::new();
    let plans = [Plan::Tar(Compression::Gzip, vec!["tokenizer.json".to_owned()])];
    let artifact = bed.pack(&bed.model(SMALL_MODEL), Dialect::Cncf, &plans);
    let reference = bed.push(&artifact, "models/gzip");
    let digest = artifact.layer_digest(0);
    bed.proxy.fail(Target::Blob(digest), Fault::Corrupt { at: 200_000 });
    bed.assert_refused(&reference, &[&digest.to_string()]);
    // And once the registry sends the truth, so do we.
    bed.proxy.heal();
    bed.mount(&reference).stop();
}

#[test]
fn a_weight_layer_that_does_not_match_its_digest_is_poisoned() {
    let bed = Bed::new();
    let artifact = bed.pack_raw(&bed.model(ONE_FILE), Dialect::Cncf);
    let reference = bed.push(&artifact, "models/wrong");
    let digest = artifact.layer_digest(0);
    bed.proxy.fail(Target::Blob(digest), Fault::Corrupt { at: 30 * MIB });
    let mounted = bed.mount(&reference);
    let path = mounted.dir().join("model.safetensors");
    // The mismatch shows when the last byte has come: from then on nothing is served.
    let _ = fs::read(&path);
    wait_until("reads of the wrong blob fail", || is_io_error(fs::read(&path)));
    assert!(mounted.log().contains(&digest.to_string()), "{}", mounted.log());
    mounted.stop();
    bed.area.assert_no_mounts();
    // Nothing of it was kept: with a registry that tells the truth it is right.
    bed.proxy.heal();
    let again = bed.mount(&reference);
    assert!(
        weightfs_tests::digest::of_file(&again.dir().join("model.safetensors")).unwrap() == digest
    );
    again.stop();
}

#[test]
fn a_raw_layer_shorter_or_longer_than_its_descriptor() {
    for wrong in [39 * MIB, 41 * MIB] {
        let bed = Bed::new();
        bed.weightfs.configure(SHORT_DEADLINE);
        let mut artifact = bed.pack_raw(&bed.model(ONE_FILE), Dialect::Cncf);
        artifact.manifest["layers"][0]["size"] = wrong.into();
        let digest = artifact.layer_digest(0).to_string();
        let reference = bed.push(&artifact, "models/size");
        let mounted = bed.mount(&reference);
        let result = read_at(&mounted.dir().join("model.safetensors"), 20 * MIB);
        assert!(is_io_error(result), "a blob whose size is not {wrong} was served");
        assert!(mounted.log().contains(&digest), "{}", mounted.log());
        mounted.stop();
        bed.area.assert_no_mounts();
    }
}

#[test]
fn a_tar_layer_shorter_or_longer_than_its_descriptor() {
    for wrong in [39 * MIB, 41 * MIB] {
        let bed = Bed::new();
        bed.weightfs.configure(SHORT_DEADLINE);
        let plans = [Plan::Tar(Compression::Plain, vec!["model.safetensors".to_owned()])];
        let mut artifact = bed.pack(&bed.model(ONE_FILE), Dialect::Cncf, &plans);
        artifact.manifest["layers"][0]["size"] = wrong.into();
        let digest = artifact.layer_digest(0).to_string();
        let reference = bed.push(&artifact, "models/size");
        bed.assert_refused(&reference, &[&digest]);
    }
}

#[test]
fn a_tar_that_ends_in_the_middle_of_a_member() {
    let bed = Bed::new();
    let tar =
        || {
            LayerBuilder::new(bed.area.path())
                .file("first", b"first", &Attributes::mode(0o644))
                .file("second.safetensors", &model::noise(3 * MIB, 1), &Attributes::mode(0o644))
        };
    for cut in [3 * 512 + MIB, 2 * 512 + 100] {
        let layer = tar().finish_cut_at(cut);
        let digest = layer.blob.digest.to_string();
        let as_image = image(std::slice::from_ref(&layer));
        for artifact in [tar_model(&bed, layer.clone()), as_image] {
            let reference = bed.push(&artifact, "models/cut");
            bed.assert_refused(&reference, &[&digest]);
        }
    }
}

#[test]
fn a_tar_that_is_none() {
    let bed = Bed::new();
    let noise = Blob::from_bytes(model::noise(MIB, 1));
    let digest = noise.digest.to_string();
    let layer = Layer { diff_id: noise.digest, blob: noise, compression: Compression::Plain };
    let reference = bed.push(&tar_model(&bed, layer), "models/noise");
    bed.assert_refused(&reference, &[&digest]);
}

#[test]
fn a_raw_path_that_escapes() {
    let bed = Bed::new();
    let mut artifact = bed.pack_raw(&bed.model(&SMALL_MODEL[..1]), Dialect::Cncf);
    artifact.manifest["layers"][0]["annotations"]["org.cncf.model.filepath"] =
        "a/../../etc/passwd".into();
    let reference = bed.push(&artifact, "models/escape");
    bed.assert_refused(&reference, &["a/../../etc/passwd"]);
}

#[test]
fn a_path_in_a_tar_that_escapes() {
    let bed = Bed::new();
    let layer = LayerBuilder::new(bed.area.path())
        .hostile_file("a/../../etc/passwd", b"root::0:0:::")
        .finish(Compression::Plain);
    let reference = bed.push(&tar_model(&bed, layer), "models/escape");
    bed.assert_refused(&reference, &["a/../../etc/passwd"]);
}

#[test]
fn of_two_layers_with_one_path_the_higher_wins_and_a_warning_names_it() {
    let bed = Bed::new();
    let source = bed.model(&[
        Part { path: "a/config.json", bytes: 10, mode: 0o644 },
        Part { path: "b/config.json", bytes: 20, mode: 0o600 },
    ]);
    let mut artifact = bed.pack_raw(&source, Dialect::Cncf);
    artifact.manifest["layers"][0]["annotations"]["org.cncf.model.filepath"] =
        "b/config.json".into();
    let mounted = bed.mount(&bed.push(&artifact, "models/twice"));
    tree::assert_same(&source.join("b"), &mounted.dir().join("b"), Scope::ModelFiles);
    assert!(mounted.log().contains("b/config.json"), "no warning: {}", mounted.log());
    mounted.stop();
}

#[test]
fn a_mount_point_that_is_not_an_empty_directory() {
    let bed = Bed::new();
    let reference =
        bed.push(&bed.pack_raw(&bed.model(&SMALL_MODEL[..1]), Dialect::Cncf), "models/any");
    let file = bed.area.file("taken/file", "kept");
    let missing = bed.area.path().join("missing");
    for dir in [file.parent().unwrap(), &file, &missing] {
        let outcome = bed.weightfs.mount_fails(&reference, dir);
        bed.assert_clean_failure(&outcome, &[dir.to_str().unwrap()]);
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "kept");
}

#[test]
fn a_registry_that_refuses() {
    let bed = Bed::new();
    bed.weightfs.configure(SHORT_DEADLINE);
    let reference =
        bed.push(&bed.pack_raw(&bed.model(&SMALL_MODEL[..1]), Dialect::Cncf), "models/any");
    bed.proxy.refuse();
    bed.assert_refused(&reference, &[&bed.proxy.address(), "refused"]);
}

#[test]
fn a_registry_that_hangs() {
    let bed = Bed::new();
    bed.weightfs.configure(SHORT_DEADLINE);
    let reference =
        bed.push(&bed.pack_raw(&bed.model(&SMALL_MODEL[..1]), Dialect::Cncf), "models/any");
    bed.proxy.fail(Target::All, Fault::Hang);
    bed.assert_refused(&reference, &[&bed.proxy.address()]);
}

#[test]
fn a_registry_that_only_has_server_errors() {
    let bed = Bed::new();
    bed.weightfs.configure(SHORT_DEADLINE);
    let reference =
        bed.push(&bed.pack_raw(&bed.model(&SMALL_MODEL[..1]), Dialect::Cncf), "models/any");
    bed.proxy.fail(Target::All, Fault::Status(503));
    bed.assert_refused(&reference, &[&bed.proxy.address(), "503"]);
}

/// While the registry is in trouble: what is cached is read, what is not is an I/O error within
/// the deadline. Once it is well again, so are reads.
fn assert_reads_survive(trouble: impl Fn(&Bed), well_again: impl Fn(&Bed)) {
    let bed = Bed::new();
    bed.weightfs.configure(SHORT_DEADLINE);
    let source = bed.model(ONE_FILE);
    let mounted = bed.mount(&bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/trouble"));
    let path = mounted.dir().join("model.safetensors");
    let expected = read_at(&source.join("model.safetensors"), 0).unwrap();
    assert!(read_at(&path, 0).unwrap() == expected);
    trouble(&bed);
    assert!(is_io_error(read_at(&path, 30 * MIB)), "bytes from nowhere");
    assert!(read_at(&path, 0).unwrap() == expected, "cached bytes must not need the registry");
    well_again(&bed);
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
    bed.area.assert_no_mounts();
}

#[test]
fn a_registry_that_goes_away_between_reads() {
    assert_reads_survive(|bed| bed.proxy.refuse(), |bed| bed.proxy.accept());
}

#[test]
fn a_registry_that_hangs_between_reads() {
    assert_reads_survive(|bed| bed.proxy.fail(Target::All, Fault::Hang), |bed| bed.proxy.heal());
}

#[test]
fn a_registry_that_stalls_in_mid_body() {
    assert_reads_survive(
        |bed| bed.proxy.fail(Target::Blobs, Fault::Stall { after: 10_000 }),
        |bed| bed.proxy.heal(),
    );
}

#[test]
fn a_registry_that_cuts_every_body_short() {
    assert_reads_survive(
        |bed| bed.proxy.fail(Target::Blobs, Fault::Cut { after: 10 }),
        |bed| bed.proxy.heal(),
    );
}

#[test]
fn a_cut_in_mid_body_is_made_up_for() {
    let bed = Bed::new();
    let source = bed.model(ONE_FILE);
    let mounted = bed.mount(&bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/cuts"));
    bed.proxy.fail(Target::Blobs, Fault::Cut { after: 700_000 });
    let path = mounted.dir().join("model.safetensors");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(&path));
        wait_until("a body was cut", || bed.proxy.bytes(Target::Blobs) >= 700_000);
        bed.proxy.heal();
        assert!(
            reader.join().unwrap().unwrap() == fs::read(source.join("model.safetensors")).unwrap()
        );
    });
    mounted.stop();
}

#[test]
fn usage_errors_have_their_own_exit_code() {
    let bed = Bed::new();
    assert_eq!(bed.weightfs.run(["mount"]).code, 2);
    assert_eq!(bed.weightfs.run(["no-such-command"]).code, 2);
    assert_eq!(bed.weightfs.run(["--help"]).code, 0);
}
