//! `weightfs mount` of artifacts that are not ModelPack: Docker Model Runner, ORAS, OCI images.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use tar::EntryType;
use weightfs_tests::id_mapped::IdMapped;
use weightfs_tests::image::{architecture, image, image_for, push_index};
use weightfs_tests::layer::{Attributes, Compression, Layer, LayerBuilder};
use weightfs_tests::model::{self, SMALL_MODEL};
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::tree::{self, Kind, Scope};
use weightfs_tests::{Area, Bed, Containerd, ContainerdOptions};

#[test]
fn docker_model_runner() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let mounted = bed.mount(&bed.push(&bed.pack_raw(&source, Dialect::Docker), "ai/small"));
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}

#[test]
fn oras_titles() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let mounted = bed.mount(&bed.push(&bed.pack_raw(&source, Dialect::Oras), "generic/small"));
    let bytes = |dir: &Path| -> Vec<(PathBuf, Kind)> {
        tree::read(dir).into_iter().map(|(path, entry)| (path, entry.kind)).collect()
    };
    assert_eq!(bytes(&source), bytes(mounted.dir()));
    mounted.stop();
}

/// The volume of a pod with a user namespace.
#[test]
fn a_model_is_shown_with_other_owners() {
    if !IdMapped::is_here() {
        return eprintln!("left out: needs Linux 6.12");
    }
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let mounted = bed.mount(&bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/owners"));
    let mapped = IdMapped::new(mounted.dir(), bed.mount_point(), 200_000).unwrap();
    let file = Path::new("tokenizer.json");
    let owner = |dir: &Path| fs::metadata(dir.join(file)).unwrap().uid();
    assert_eq!((owner(mounted.dir()), owner(mapped.path())), (0, 200_000));
    for _complete in [false, true] {
        let read = fs::read(mapped.path().join(file)).unwrap();
        assert!(read == fs::read(source.join(file)).unwrap());
    }
    drop(mapped);
    mounted.stop();
}

/// An image with what makes image layers hard: three layers, each with its own surprises.
fn hard_layers(area: &Area, compression: Compression) -> Vec<Layer> {
    let work = area.path();
    let dir = Attributes::mode(0o755).at(1_500_000_000, 5);
    let file = Attributes::mode(0o644).at(1_500_000_001, 999_999_999);
    let long = format!("usr/{}/{}", "d".repeat(90), "f".repeat(120));
    // cap_net_raw=ep, as struct vfs_ns_cap_data of revision 2 (linux/capability.h).
    let capability =
        b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let lower = LayerBuilder::new(work)
        .dir("usr", &dir)
        .dir(&format!("usr/{}", "d".repeat(90)), &dir)
        .file(&long, b"long", &file)
        .pax_named_file(&format!("{long}.pax"), b"pax", &file)
        .file("usr/su", &model::noise(5_000, 1), &Attributes::mode(0o4755).at(1, 0))
        .file(
            "usr/ping",
            b"ping",
            &Attributes::mode(0o755).xattr("security.capability", *capability),
        )
        .file("usr/owned", b"owned", &file.clone().owned(1000, 2_000_000))
        .hard_link("usr/same", "usr/owned", &file.clone().owned(1000, 2_000_000))
        .symlink("usr/link", "../models/weights", &Attributes::mode(0o777).owned(3, 4))
        .node(EntryType::Char, "usr/null", (1, 3), &Attributes::mode(0o666))
        .node(EntryType::Block, "usr/disk", (8, 1), &Attributes::mode(0o660).owned(0, 6))
        .node(EntryType::Fifo, "usr/pipe", (0, 0), &Attributes::mode(0o600))
        .dir("gone", &dir)
        .file("gone/file", b"gone", &file)
        .dir("opaque", &dir)
        .file("opaque/below", b"below", &file)
        .dir("models", &Attributes::mode(0o1777).owned(7, 8).xattr("user.kind", "models"))
        .file("models/old", &model::noise(2 << 20, 2), &file)
        .finish(compression);
    let middle = LayerBuilder::new(work)
        .whiteout("gone")
        .dir("opaque", &Attributes::mode(0o700).at(1_500_000_007, 0))
        .opaque("opaque")
        .file("opaque/above", b"above", &file)
        .dir("models", &Attributes::mode(0o1777).owned(7, 8).xattr("user.kind", "models"))
        .file("models/weights", &model::noise(9_000_001, 3), &Attributes::mode(0o444))
        .finish(compression);
    let upper = LayerBuilder::new(work)
        .dir("models", &Attributes::mode(0o755))
        .whiteout("models/old")
        .file("models/new", b"new", &file)
        .dir("gone", &Attributes::mode(0o711))
        .file("gone/again", b"again", &file)
        .finish(compression);
    vec![lower, middle, upper]
}

/// What containerd itself makes of an image: the reference for ours.
fn assert_unpacks_the_same(bed: &Bed, repository: &str, found: &Path) {
    let containerd = Containerd::start(&bed.area, &ContainerdOptions::default());
    let reference = bed.registry.remote().reference(repository, "v1");
    containerd.pull(&reference);
    let expected = bed.mount_point();
    containerd.mount_image("overlayfs", &reference, &expected);
    tree::assert_same(&expected, found, Scope::Image);
    nix::mount::umount(&expected).unwrap();
}

#[test]
fn an_image_of_plain_layers_is_what_an_ordinary_unpack_gives() {
    let bed = Bed::new();
    let reference = bed.push(&image(&hard_layers(&bed.area, Compression::Plain)), "images/hard");
    let mounted = bed.mount(&reference);
    assert_unpacks_the_same(&bed, "images/hard", mounted.dir());
    mounted.stop();
    bed.area.assert_no_mounts();
}

#[test]
fn an_image_of_compressed_layers_is_what_an_ordinary_unpack_gives() {
    let bed = Bed::new();
    let layers: Vec<_> = [Compression::Gzip, Compression::Zstd, Compression::Plain]
        .into_iter()
        .enumerate()
        .map(|(number, compression)| hard_layers(&bed.area, compression).swap_remove(number))
        .collect();
    let mounted = bed.mount(&bed.push(&image(&layers), "images/mixed"));
    assert_unpacks_the_same(&bed, "images/mixed", mounted.dir());
    mounted.stop();
}

#[test]
fn of_an_index_this_machines_image_is_mounted() {
    let bed = Bed::new();
    let layer = |text: &str| {
        LayerBuilder::new(bed.area.path())
            .file("which", text.as_bytes(), &Attributes::mode(0o644))
            .finish(Compression::Plain)
    };
    let ours = image(&[layer("ours")]);
    let other = image_for("s390x", &[layer("other")]);
    let images = [("s390x", &other), (architecture(), &ours)];
    push_index(bed.registry.remote(), "images/index", "v1", &images);
    let mounted = bed.mount(&bed.proxy.reference("images/index", "v1"));
    assert_eq!(std::fs::read_to_string(mounted.dir().join("which")).unwrap(), "ours");
    mounted.stop();
}

#[test]
fn an_index_without_this_machines_image_is_refused() {
    let bed = Bed::new();
    let other =
        image_for("s390x", &[LayerBuilder::new(bed.area.path()).finish(Compression::Plain)]);
    push_index(bed.registry.remote(), "images/other", "v1", &[("s390x", &other)]);
    let reference = bed.proxy.reference("images/other", "v1");
    bed.assert_refused(&reference, &[architecture(), "s390x"]);
}
