//! Containers of images with lazy layers, by `weightfs rpull` and `ctr run`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use weightfs_tests::host::{Host, SNAPSHOTTER};
use weightfs_tests::image::busybox_layer;
use weightfs_tests::layer::{Attributes, Compression, Layer, LayerBuilder};
use weightfs_tests::model::{self, Part, SMALL_MODEL, write_safetensors};
use weightfs_tests::{Fault, Target, digest, image};

const MIB: u64 = 1 << 20;

fn part_of(path: &Path, offset: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn a_container_reads_writes_and_leaves_nothing() {
    let host = Host::new();
    let source = host.bed.area.path().join("weights");
    write_safetensors(&source, 64 * MIB, 1).unwrap();
    let layer = host.weights_layer(&source, "weights");
    let (reference, _) = host.push_image("images/lazy", std::slice::from_ref(&layer));
    host.rpull(&reference);
    assert!(host.fetched(&layer) <= 4 * MIB, "{} bytes before any read", host.fetched(&layer));

    let container = host.containerd.start_container(SNAPSHOTTER, &reference, "lazy");
    let sum = container.exec(&["/bin/sha256sum", "/models/weights"]).ok();
    assert!(sum.starts_with(&digest::of_file(&source).unwrap().hex()), "{sum}");
    let script = "echo changed > /models/new && echo more >> /bin/added && rm /models/weights \
                  && cat /models/new && ls /models";
    assert_eq!(container.exec(&["/bin/sh", "-c", script]).ok(), "changed\nnew\n");
    container.remove();

    // What the container did is its own.
    let again = host.containerd.run(SNAPSHOTTER, &reference, "again", &["/bin/ls", "/models"]);
    assert_eq!(again.ok(), "weights\n");
    host.containerd.remove_image(&reference);
    host.assert_nothing_left();
}

#[test]
fn a_small_read_in_a_container_fetches_little() {
    let host = Host::new();
    let source = host.bed.area.path().join("weights");
    write_safetensors(&source, 256 * MIB, 1).unwrap();
    let layer = host.weights_layer(&source, "weights");
    let (reference, _) = host.push_image("images/large", std::slice::from_ref(&layer));
    host.rpull(&reference);
    let container = host.containerd.start_container(SNAPSHOTTER, &reference, "large");
    host.bed.proxy.forget();
    let script = "dd if=/models/weights bs=4096 skip=32768 count=1 2>/dev/null | sha256sum";
    let sum = container.exec(&["/bin/sh", "-c", script]).ok();
    let expected = weightfs_store::Digest::of(&part_of(&source, 128 * MIB, 4096)).hex();
    assert!(sum.starts_with(&expected), "{sum}");
    let fetched = host.fetched(&layer);
    assert!((4096..=2 * MIB).contains(&fetched), "{fetched} bytes for 4096");
    container.remove();
}

/// Two lazy layers and a small one, each changing what is below it, in the order in which `choose`
/// puts them.
fn hard_layers(host: &Host) -> [Layer; 3] {
    let dir = Attributes::mode(0o755).at(1_500_000_000, 9);
    let file = Attributes::mode(0o640).owned(1000, 1000).at(1_500_000_001, 1);
    // cap_net_raw=ep, as struct vfs_ns_cap_data of revision 2 (linux/capability.h).
    let capability =
        b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let capable = Attributes::mode(0o4755).xattr("security.capability", *capability);
    let builder = || LayerBuilder::new(host.bed.area.path());
    let lower = builder()
        .dir("models", &dir)
        .file("models/big", &model::noise(9 * MIB, 1), &file)
        .file("models/old", b"old", &file)
        .file("models/ping", b"ping", &capable)
        .hard_link("models/same", "models/old", &file)
        .node(tar::EntryType::Char, "models/null", (1, 3), &Attributes::mode(0o666))
        .dir("opaque", &dir)
        .file("opaque/below", b"below", &file)
        .finish(Compression::Plain);
    let middle = builder()
        .dir("models", &Attributes::mode(0o750).at(1_500_000_002, 3))
        .whiteout("models/old")
        .file("models/more", &model::noise(9 * MIB, 2), &file)
        .dir("opaque", &dir)
        .opaque("opaque")
        .symlink("opaque/link", "../models/big", &Attributes::mode(0o777))
        .finish(Compression::Plain);
    let small = builder()
        .dir("models", &Attributes::mode(0o750).at(1_500_000_002, 3))
        .whiteout("models/ping")
        .file("models/small", b"small", &file)
        .finish(Compression::Gzip);
    [lower, middle, small]
}

/// Where the layer with busybox is, which is always an ordinary one.
enum Base {
    Below,
    Above,
}

fn assert_like_an_ordinary_unpack(base: Base, choose: fn([Layer; 3]) -> Vec<Layer>) {
    let host = Host::new();
    let layers = choose(hard_layers(&host));
    let (reference, _) = match base {
        Base::Below => host.push_image("images/hard", &layers),
        Base::Above => host.push_image_below("images/hard", &layers),
    };
    host.rpull(&reference);
    let container = host.containerd.start_container(SNAPSHOTTER, &reference, "lazy");
    host.assert_like_an_ordinary_unpack("images/hard", &container.root());
    container.remove();
    host.containerd.remove_image(&reference);
    host.assert_nothing_left();
}

#[test]
fn lazy_layers_above_ordinary_ones_are_like_an_ordinary_unpack() {
    assert_like_an_ordinary_unpack(Base::Below, |[lower, middle, _]| vec![lower, middle]);
}

#[test]
fn lazy_layers_below_ordinary_ones_are_like_an_ordinary_unpack() {
    assert_like_an_ordinary_unpack(Base::Above, |[lower, middle, _]| vec![lower, middle]);
}

#[test]
fn lazy_layers_around_an_ordinary_one_are_like_an_ordinary_unpack() {
    assert_like_an_ordinary_unpack(Base::Below, |[lower, middle, small]| {
        vec![lower, small, middle]
    });
}

#[test]
fn lazy_layers_around_ordinary_ones_without_a_base_are_like_an_ordinary_unpack() {
    assert_like_an_ordinary_unpack(Base::Above, |[lower, middle, small]| {
        vec![lower, small, middle]
    });
}

#[test]
fn an_ordinary_layer_on_lazy_ones_is_like_an_ordinary_unpack() {
    assert_like_an_ordinary_unpack(Base::Below, Vec::from);
}

#[test]
fn ordinary_layers_on_lazy_ones_are_like_an_ordinary_unpack() {
    assert_like_an_ordinary_unpack(Base::Above, Vec::from);
}

#[test]
fn two_containers_share_one_cache() {
    let host = Host::new();
    let source = host.bed.area.path().join("weights");
    write_safetensors(&source, 48 * MIB, 1).unwrap();
    let layer = host.weights_layer(&source, "weights");
    let (reference, _) = host.push_image("images/shared", std::slice::from_ref(&layer));
    // Another image of another repository with the same layer below others.
    let other = LayerBuilder::new(host.bed.area.path())
        .file("other", b"other", &Attributes::mode(0o644))
        .finish(Compression::Gzip);
    let (other_reference, _) = host.push_image("images/other", &[layer.clone(), other]);
    host.rpull(&reference);
    let read = ["/bin/sha256sum", "/models/weights"];
    let first = host.containerd.start_container(SNAPSHOTTER, &reference, "first");
    let sum = first.exec(&read).ok();
    assert!(host.fetched(&layer) >= 48 * MIB);

    host.bed.proxy.forget();
    let second = host.containerd.start_container(SNAPSHOTTER, &reference, "second");
    assert_eq!(second.exec(&read).ok(), sum);
    host.rpull(&other_reference);
    let third = host.containerd.start_container(SNAPSHOTTER, &other_reference, "third");
    assert_eq!(third.exec(&read).ok(), sum);
    assert_eq!(host.fetched(&layer), 0, "bytes for what is cached");

    for container in [first, second, third] {
        container.remove();
    }
    host.containerd.remove_image(&reference);
    host.containerd.remove_image(&other_reference);
    host.assert_nothing_left();
}

#[test]
fn an_image_that_is_not_lazy_runs_as_well() {
    let host = Host::new();
    let gzip = LayerBuilder::new(host.bed.area.path())
        .dir("models", &Attributes::mode(0o755))
        .file("models/weights", &model::noise(10 * MIB, 1), &Attributes::mode(0o644))
        .finish(Compression::Gzip);
    let (reference, _) = host.push_image("images/gzip", &[gzip]);
    host.rpull(&reference);
    let count =
        host.containerd.run(SNAPSHOTTER, &reference, "gzip", &["/bin/wc", "-c", "/models/weights"]);
    assert_eq!(count.ok(), "10485760 /models/weights\n");
    host.containerd.remove_image(&reference);
    host.assert_nothing_left();
}

#[test]
fn an_ordinary_pull_works_with_the_snapshotter() {
    let host = Host::new();
    let source = host.bed.area.path().join("weights");
    write_safetensors(&source, 9 * MIB, 1).unwrap();
    let layer = host.weights_layer(&source, "weights");
    let (reference, _) = host.push_image("images/eager", &[layer]);
    let pull = ["image", "pull", "--plain-http", "--snapshotter", SNAPSHOTTER, &reference];
    host.containerd.ctr(&pull).ok();
    let sum = host.containerd.run(
        SNAPSHOTTER,
        &reference,
        "eager",
        &["/bin/sha256sum", "/models/weights"],
    );
    assert!(sum.ok().starts_with(&digest::of_file(&source).unwrap().hex()));
    host.containerd.remove_image(&reference);
    host.assert_nothing_left();
}

#[test]
fn a_chain_of_lazy_layers_runs() {
    let host = Host::new();
    let layers: Vec<_> = (0..12)
        .map(|number| {
            LayerBuilder::new(host.bed.area.path())
                .dir("models", &Attributes::mode(0o755))
                .file(
                    &format!("models/{number}"),
                    &model::noise(9 * MIB, number),
                    &Attributes::mode(0o644),
                )
                .finish(Compression::Plain)
        })
        .collect();
    let (reference, image) = host.push_image("images/chain", &layers);
    host.rpull(&reference);
    let fetched: u64 = layers.iter().map(|layer| host.fetched(layer)).sum();
    assert!(fetched < image.layer_bytes() / 4, "{fetched} of {} bytes", image.layer_bytes());
    let sums = host.containerd.run(
        SNAPSHOTTER,
        &reference,
        "chain",
        &["/bin/sh", "-c", "cat /models/* | wc -c"],
    );
    assert_eq!(sums.ok().trim(), (12 * 9 * MIB).to_string());
    host.containerd.remove_image(&reference);
    host.assert_nothing_left();
}

#[test]
fn rpull_of_an_index_takes_this_machines_image() {
    let host = Host::new();
    let small = image::image(&[busybox_layer(host.bed.area.path(), Compression::Plain)]);
    let other = image::image_for("s390x", &[]);
    let images = [("s390x", &other), (image::architecture(), &small)];
    image::push_index(host.bed.registry.remote(), "images/index", "v1", &images);
    let reference = host.bed.proxy.reference("images/index", "v1");
    host.rpull(&reference);
    host.containerd.run(SNAPSHOTTER, &reference, "index", &["/bin/true"]).ok();
    host.containerd.remove_image(&reference);
    host.assert_nothing_left();
}

#[test]
fn an_rpull_that_fails_leaves_nothing() {
    let host = Host::new();
    let rpull = |reference: &str| host.bed.weightfs.rpull(&host.containerd.socket(), reference);
    let unknown = host.bed.proxy.reference("images/none", "v1");
    rpull(&unknown).assert_fails(1, &["weightfs: ", "images/none"]);
    let model = host.bed.model(&SMALL_MODEL[..1]);
    let artifact = host.bed.pack_raw(&model, weightfs_tests::modelpack::Dialect::Cncf);
    let no_image = host.bed.push(&artifact, "models/raw");
    rpull(&no_image).assert_fails(1, &["weightfs: ", "models/raw"]);
    let nowhere = host.bed.area.path().join("no.sock");
    let (reference, _) = host.push_image("images/some", &[]);
    let outcome = host.bed.weightfs.rpull(&nowhere, &reference);
    outcome.assert_fails(1, &["weightfs: ", "no.sock"]);
    host.assert_nothing_left();
}

#[test]
fn a_registry_without_ranges_still_runs_images() {
    let host = Host::new();
    let source = host.bed.model(&[Part { path: "w", bytes: 9 << 20, mode: 0o644 }]).join("w");
    let layer = host.weights_layer(&source, "w");
    let (reference, _) = host.push_image("images/fallback", std::slice::from_ref(&layer));
    // The registry gives no ranges of that blob, only all of it.
    host.bed.proxy.fail(Target::Blob(layer.blob.digest), Fault::IgnoreRange);
    host.rpull(&reference);
    let sum =
        host.containerd.run(SNAPSHOTTER, &reference, "fallback", &["/bin/sha256sum", "/models/w"]);
    assert!(sum.ok().starts_with(&digest::of_file(&source).unwrap().hex()));
    host.containerd.remove_image(&reference);
    host.assert_nothing_left();
}

#[test]
fn images_and_containers_outlive_a_restart_of_containerd_and_daemon() {
    let mut host = Host::new();
    let source = host.bed.area.path().join("weights");
    write_safetensors(&source, 16 * MIB, 1).unwrap();
    let layer = host.weights_layer(&source, "weights");
    let (reference, _) = host.push_image("images/restart", std::slice::from_ref(&layer));
    host.rpull(&reference);
    let read = ["/bin/sha256sum", "/models/weights"];
    let sum = host.containerd.run(SNAPSHOTTER, &reference, "before", &read).ok();
    host.containerd.restart(&host.bed.area);
    assert_eq!(host.containerd.run(SNAPSHOTTER, &reference, "between", &read).ok(), sum);

    let Host { containerd, daemon, bed } = host;
    daemon.stop();
    let daemon = bed.weightfs.serve(&bed.area);
    bed.proxy.forget();
    let host = Host { containerd, daemon, bed };
    weightfs_tests::wait_until("containerd has connected to the new daemon", || {
        let list = ["snapshot", "--snapshotter", SNAPSHOTTER, "ls"];
        host.containerd.ctr(&list).code == 0
    });
    assert_eq!(host.containerd.run(SNAPSHOTTER, &reference, "after", &read).ok(), sum);
    assert_eq!(host.fetched(&layer), 0, "the cache was lost with the daemon");
    host.containerd.remove_image(&reference);
    host.assert_nothing_left();
}

#[test]
fn the_daemon_frees_what_was_written_by_removed_containers() {
    let host = Host::new();
    let (reference, _) = host.push_image("images/small", &[]);
    host.rpull(&reference);
    let container = host.containerd.start_container(SNAPSHOTTER, &reference, "writer");
    container.exec(&["/bin/dd", "if=/dev/zero", "of=/big", "bs=1048576", "count=20"]).ok();
    let snapshots = host.bed.weightfs.root().join("snapshots");
    let written = || {
        fs::read_dir(&snapshots).unwrap().flatten().any(|dir| dir.path().join("fs/big").exists())
    };
    assert!(written());
    container.remove();
    host.containerd.remove_image(&reference);
    weightfs_tests::wait_until("the upper directory is gone", || !written());
    host.assert_nothing_left();
}
