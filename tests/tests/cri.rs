//! Lazy images by CRI on containerd 1.6, as a kubelet pulls and runs them.

use weightfs_tests::Host;
use weightfs_tests::cri::Cri;
use weightfs_tests::digest;
use weightfs_tests::host::SNAPSHOTTER;
use weightfs_tests::layer::{Attributes, Compression, LayerBuilder};
use weightfs_tests::model::{self, write_safetensors};
use weightfs_tests::snapshots::Snapshots;

const MIB: u64 = 1 << 20;

#[test]
fn a_kubelet_pulls_lazily_and_runs() {
    let host = Host::with_cri();
    let source = host.bed.area.path().join("weights");
    write_safetensors(&source, 64 * MIB, 1).unwrap();
    let layer = host.weights_layer(&source, "weights");
    // The first layer that is not lazy makes containerd download all above it: weights go below.
    let (reference, _) = host.push_image_below("images/cri", std::slice::from_ref(&layer));
    let cri = Cri::connect(&host.containerd, &host.bed.area.dir("pods"));
    cri.pull(&reference).unwrap();
    let fetched = host.fetched(&layer);
    assert!(fetched <= 4 * MIB, "{fetched} bytes of a lazy layer");
    let content = host.containerd.content("k8s.io");
    assert!(!content.contains(&layer.blob.digest.to_string()), "the layer was downloaded");

    let words = ["/bin/sh", "-c", "sha256sum /models/weights && echo x > /models/new"];
    let ended = cri.run(&reference, "lazy", &words).unwrap();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.output.starts_with(&digest::of_file(&source).unwrap().hex()), "{ended:?}");
    assert!(cri.tags().unwrap().contains(&reference));

    cri.remove(&reference).unwrap();
    cri.remove(&host.bed.proxy.reference("small", "v1")).unwrap();
    weightfs_tests::wait_until("the snapshots are gone", || {
        let arguments = ["snapshot", "--snapshotter", SNAPSHOTTER, "ls"];
        host.containerd.ctr_in("k8s.io", &arguments).ok().lines().count() == 1
    });
    let Host { containerd, daemon, bed } = host;
    drop(containerd);
    daemon.stop();
    bed.area.assert_no_mounts();
}

#[test]
fn an_image_without_lazy_layers_runs_by_cri() {
    let host = Host::with_cri();
    let gzip = LayerBuilder::new(host.bed.area.path())
        .file("weights", &model::noise(9 * MIB, 1), &Attributes::mode(0o644))
        .finish(Compression::Gzip);
    let (reference, _) = host.push_image("images/eager", &[gzip]);
    let cri = Cri::connect(&host.containerd, &host.bed.area.dir("pods"));
    cri.pull(&reference).unwrap();
    let ended = cri.run(&reference, "eager", &["/bin/wc", "-c", "/weights"]).unwrap();
    assert_eq!((ended.code, ended.output.as_str()), (0, "9437184 /weights\n"));
}

#[test]
fn a_layer_whose_registry_fails_is_pulled_as_usual_or_refused_clearly() {
    use weightfs_tests::{Fault, Target};
    let host = Host::with_cri();
    host.bed.weightfs.configure("[fetch]\ndeadline = \"2s\"");
    let source = host.bed.area.path().join("weights");
    write_safetensors(&source, 16 * MIB, 1).unwrap();
    let layer = host.weights_layer(&source, "weights");
    let (reference, _) = host.push_image_below("images/failing", std::slice::from_ref(&layer));
    let cri = Cri::connect(&host.containerd, &host.bed.area.dir("pods"));
    host.bed.proxy.fail(Target::Blob(layer.blob.digest), Fault::Status(404));
    assert!(cri.pull(&reference).is_err(), "a missing layer was pulled");
    host.bed.proxy.heal();
    cri.pull(&reference).unwrap();
    let ended = cri.run(&reference, "healed", &["/bin/sha256sum", "/models/weights"]).unwrap();
    assert!(ended.output.starts_with(&digest::of_file(&source).unwrap().hex()), "{ended:?}");
}

#[test]
fn image_sizes_are_what_is_on_disk() {
    let host = Host::with_cri();
    let source = host.bed.area.path().join("weights");
    write_safetensors(&source, 64 * MIB, 1).unwrap();
    let layer = host.weights_layer(&source, "weights");
    let (reference, _) = host.push_image_below("images/size", &[layer]);
    let cri = Cri::connect(&host.containerd, &host.bed.area.dir("pods"));
    cri.pull(&reference).unwrap();
    weightfs_tests::wait_until("CRI has counted its images", || {
        cri.image_bytes().is_ok_and(|bytes| (1..32 * MIB).contains(&bytes))
    });
    cri.run(&reference, "all", &["/bin/sha256sum", "/models/weights"]).unwrap();
    // CRI asks for a committed snapshot's usage once; the daemon knows better.
    let snapshots = Snapshots::connect(&host.bed.weightfs.snapshotter_socket(), SNAPSHOTTER);
    let lazy = snapshots.list(&["kind==committed,labels.\"containerd.io/snapshot.ref\""]).unwrap();
    let sizes: Vec<_> = lazy.iter().map(|info| snapshots.usage(&info.name).unwrap().size).collect();
    let size = source.metadata().unwrap().len().cast_signed();
    assert_eq!(sizes.iter().filter(|found| **found >= size).count(), 1, "{sizes:?}");
}
