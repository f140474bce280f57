//! `weightfs mount` of ModelPack artifacts: every file equals its source.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::process::Command;

use weightfs_tests::Bed;
use weightfs_tests::area::is_mount_point;
use weightfs_tests::json::documented;
use weightfs_tests::layer::{Attributes, Compression, LayerBuilder};
use weightfs_tests::model::{Part, SMALL_MODEL};
use weightfs_tests::modelpack::{CREATED_AT, Dialect, Plan, files_of};
use weightfs_tests::process::Service;
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::wait_until;
use weightfs_tests::weightfs::{binary, umount};

/// Mounts the small model, packed like that, and compares it with its source.
fn assert_mounts_like_its_source(dialect: Dialect, plans: &[Plan]) {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let artifact = bed.pack(&source, dialect, plans);
    let mounted = bed.mount(&bed.push(&artifact, "models/small"));
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
    bed.area.assert_no_mounts();
}

fn raw_plans() -> Vec<Plan> {
    SMALL_MODEL.iter().map(|part| Plan::Raw(part.path.to_owned())).collect()
}

/// Everything in tars of one compression, but for one raw file: the kinds mix.
fn tar_plans(compression: Compression) -> Vec<Plan> {
    let tar = |paths: &[&str]| {
        Plan::Tar(compression, paths.iter().map(|path| (*path).to_owned()).collect())
    };
    vec![
        tar(&["config.json", "empty.txt", "tokenizer.json"]),
        tar(&["weights"]),
        Plan::Raw("run.sh".to_owned()),
        tar(&["docs"]),
    ]
}

#[test]
fn cncf_raw_layers() {
    assert_mounts_like_its_source(Dialect::Cncf, &raw_plans());
}

#[test]
fn cnai_raw_layers() {
    assert_mounts_like_its_source(Dialect::Cnai, &raw_plans());
}

#[test]
fn cncf_tar_layers() {
    assert_mounts_like_its_source(Dialect::Cncf, &tar_plans(Compression::Plain));
}

#[test]
fn cnai_tar_layers() {
    assert_mounts_like_its_source(Dialect::Cnai, &tar_plans(Compression::Plain));
}

#[test]
fn gzip_layers() {
    assert_mounts_like_its_source(Dialect::Cncf, &tar_plans(Compression::Gzip));
}

#[test]
fn zstd_layers() {
    assert_mounts_like_its_source(Dialect::Cncf, &tar_plans(Compression::Zstd));
}

#[test]
fn tar_layers_keep_directories_times_and_symbolic_links() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    symlink("model-00001-of-00003.safetensors", source.join("weights/first")).unwrap();
    symlink("../docs/README.md", source.join("weights/up")).unwrap();
    let artifact = bed.pack(
        &source,
        Dialect::Cncf,
        &[
            Plan::Tar(Compression::Plain, vec!["weights".to_owned()]),
            Plan::Tar(Compression::Zstd, vec!["docs".to_owned()]),
        ],
    );
    let mounted = bed.mount(&bed.push(&artifact, "models/tar"));
    for part in ["weights", "docs"] {
        tree::assert_same(&source.join(part), &mounted.dir().join(part), Scope::Everything);
    }
    mounted.stop();
}

#[test]
fn either_mark_of_a_modelpack_artifact_is_enough() {
    let bed = Bed::new();
    let source = bed.model(&SMALL_MODEL[..3]);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let mut without_type = artifact.clone();
    without_type.manifest.as_object_mut().unwrap().remove("artifactType");
    let mut other_config = artifact;
    other_config.manifest["config"]["mediaType"] = "application/vnd.oci.empty.v1+json".into();
    for (name, artifact) in [("a/config", &without_type), ("a/type", &other_config)] {
        let mounted = bed.mount(&bed.push(artifact, name));
        tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
        mounted.stop();
    }
}

#[test]
fn a_file_without_metadata_has_the_defaults() {
    let bed = Bed::new();
    let source = bed.model(&[Part { path: "a/b.bin", bytes: 10, mode: 0o600 }]);
    let mut artifact = bed.pack_raw(&source, Dialect::Cncf);
    let annotations = artifact.manifest["layers"][0]["annotations"].as_object_mut().unwrap();
    annotations.remove("org.cncf.model.file.metadata+json");
    let mounted = bed.mount(&bed.push(&artifact, "models/bare"));
    let created: jiff::Timestamp = CREATED_AT.parse().unwrap();
    let file = fs::metadata(mounted.dir().join("a/b.bin")).unwrap();
    assert_eq!((file.mode() & 0o7777, file.mtime()), (0o644, created.as_second()));
    let dir = fs::metadata(mounted.dir().join("a")).unwrap();
    assert_eq!((dir.mode() & 0o7777, dir.uid(), dir.gid()), (0o755, 0, 0));
    mounted.stop();
}

#[test]
fn leading_dots_and_slashes_of_a_path_are_stripped() {
    let bed = Bed::new();
    let source = bed.model(&SMALL_MODEL[..2]);
    let mut artifact = bed.pack_raw(&source, Dialect::Cncf);
    for (number, path) in ["../../srv/config.json", "/abs/empty.txt"].iter().enumerate() {
        artifact.manifest["layers"][number]["annotations"]["org.cncf.model.filepath"] =
            (*path).into();
    }
    let mounted = bed.mount(&bed.push(&artifact, "models/dots"));
    assert_eq!(files_of(mounted.dir()), ["abs/empty.txt", "srv/config.json"]);
    mounted.stop();
}

#[test]
fn devices_and_fifos_of_a_model_are_skipped() {
    let bed = Bed::new();
    let source = bed.model(&SMALL_MODEL[..1]);
    let mode = Attributes::mode(0o644);
    let layer = LayerBuilder::new(bed.area.path())
        .node(tar::EntryType::Char, "null", (1, 3), &mode)
        .node(tar::EntryType::Fifo, "pipe", (0, 0), &mode)
        .file("kept", b"kept", &mode)
        .finish(Compression::Plain);
    let mut artifact = bed.pack_raw(&source, Dialect::Cncf);
    artifact.manifest["layers"] = serde_json::json!([{
        "mediaType": "application/vnd.cncf.model.weight.v1.tar",
        "digest": layer.blob.digest.to_string(),
        "size": layer.blob.size,
    }]);
    artifact.blobs.push(layer.blob);
    let mounted = bed.mount(&bed.push(&artifact, "models/devices"));
    assert_eq!(files_of(mounted.dir()), ["kept"]);
    assert!(mounted.log().contains("skipped=2"), "no warning: {}", mounted.log());
    mounted.stop();
}

#[test]
fn a_mount_is_read_only() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let mounted = bed.mount(&bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/ro"));
    let refused = [
        fs::write(mounted.dir().join("new"), b"x"),
        fs::remove_file(mounted.dir().join("config.json")),
        fs::create_dir(mounted.dir().join("dir")),
        File::options().write(true).open(mounted.dir().join("config.json")).map(drop),
    ];
    for result in refused {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
    }
    mounted.stop();
}

#[test]
fn reads_at_any_place_give_the_bytes_of_that_place() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let plans = [Plan::Tar(Compression::Plain, vec!["weights".to_owned()])];
    let mounted = bed.mount(&bed.push(&bed.pack(&source, Dialect::Cncf, &plans), "models/any"));
    let path = "weights/model-00001-of-00003.safetensors";
    let expected = fs::read(source.join(path)).unwrap();
    let file = File::open(mounted.dir().join(path)).unwrap();
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..200 {
        let start = random.usize(..expected.len());
        let mut bytes = vec![0; random.usize(1..300_000)];
        let mut count = 0;
        while let Ok(more @ 1..) = file.read_at(&mut bytes[count..], (start + count) as u64) {
            count += more;
        }
        let end = expected.len().min(start + bytes.len());
        assert!(bytes[..count] == expected[start..end], "bytes {start}..{end}");
    }
    mounted.stop();
}

#[test]
fn the_umount_command_ends_a_mount() {
    let bed = Bed::new();
    let source = bed.model(&SMALL_MODEL[..1]);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/u");
    let mut mounted = bed.mount(&reference);
    umount(&bed.weightfs, mounted.dir());
    mounted.assert_ends_well();
    bed.area.assert_no_mounts();
}

#[test]
fn a_mount_in_the_background_outlives_the_command() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/bg");
    let dir = bed.mount_point();
    let arguments = ["mount", "--daemon", &reference, dir.to_str().unwrap()];
    let mut command = bed.weightfs.command(arguments);
    command.arg("--root").arg(bed.weightfs.root()).arg("--config").arg(bed.weightfs.config());
    weightfs_tests::process::run(&mut command).ok();
    assert!(is_mount_point(&dir), "the command returned before the mount was up");
    tree::assert_same(&source, &dir, Scope::ModelFiles);
    umount(&bed.weightfs, &dir);
    bed.area.assert_no_mounts();
}

#[test]
fn ls_prints_the_tree_without_mounting() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let reference = bed.push(&artifact, "models/ls");
    let root = bed.weightfs.root();
    let root = ["--root", root.to_str().unwrap()];
    let text = bed.weightfs.run(["ls", &reference].iter().chain(&root)).ok();
    let layer = artifact.layer_digest(0).to_string();
    let line = text.lines().find(|line| line.ends_with("config.json")).expect("a line a file");
    assert!(line.contains("517") && line.contains(&artifact.layer_digest(0).hex()[..12]), "{line}");
    let json = bed.weightfs.run(["ls", "--json", &reference].iter().chain(&root)).ok();
    for part in SMALL_MODEL {
        assert!(json.contains(part.path) && text.contains(part.path), "no {} in {json}", part.path);
    }
    assert!(json.contains(&layer), "{json}");
    documented("ls", &json);
    bed.area.assert_no_mounts();
}

#[test]
fn a_terminal_sees_the_progress() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/terminal");
    let dir = bed.mount_point();
    let line = format!(
        "{} mount {reference} {} --root {}",
        binary().display(),
        dir.display(),
        bed.weightfs.root().display()
    );
    let mut command = Command::new("script");
    command.args(["-qefc", &line, "/dev/null"]);
    let terminal = Service::start(&bed.area, "terminal", command);
    wait_until("it is mounted", || is_mount_point(&dir));
    fs::read(dir.join("tokenizer.json")).unwrap();
    // Its size is 400,001 bytes, the model's 14.4 million.
    wait_until("the line shows what was fetched", || {
        terminal.log().contains("9 files, 390.6 KiB fetched, 390.6 KiB of 13.7 MiB here")
    });
    drop(terminal);
    wait_until("the mount ends with its terminal", || !is_mount_point(&dir));
}
