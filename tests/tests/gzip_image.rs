//! An ordinary image of compressed layers, with an index beside it: it starts without its bytes.

use weightfs_tests::debian::python_layers;
use weightfs_tests::host::SNAPSHOTTER;
use weightfs_tests::image::image;
use weightfs_tests::{Host, Target, Weightfs};

const REPOSITORY: &str = "images/python";

#[test]
fn debians_python_starts_with_less_than_a_third_of_its_bytes() {
    let host = Host::new();
    let layers = python_layers();
    let reference = host.bed.push(&image(&layers), REPOSITORY);
    Weightfs::new(&host.bed.area).run_here(&["index", &reference]).ok();
    host.bed.proxy.forget();

    let pulled = host.rpull(&reference);
    assert_eq!(pulled.lines().filter(|line| line.ends_with("lazy")).count(), layers.len());
    let script = ["python3", "-c", "import json; print(json.dumps({'is': json.__name__}))"];
    let ran = host.containerd.run(SNAPSHOTTER, &reference, "python", &script).ok();
    assert_eq!(ran, "{\"is\": \"json\"}\n");
    let whole: u64 = layers.iter().map(|layer| layer.blob.size).sum();
    let fetched: u64 = layers.iter().map(|layer| host.fetched(layer)).sum();
    let all = host.bed.proxy.bytes(Target::Blobs);
    println!("{fetched} of {whole} bytes, and {} of index and config", all - fetched);
    assert!(fetched * 100 < whole * 30, "{fetched} of {whole} bytes");
    let content = host.containerd.content("default");
    let digests: Vec<_> = layers.iter().map(|layer| layer.blob.digest.to_string()).collect();
    assert!(!digests.iter().any(|digest| content.contains(digest)), "a layer was downloaded");

    let container = host.containerd.start_container(SNAPSHOTTER, &reference, "all");
    host.assert_like_an_ordinary_unpack(REPOSITORY, &container.root());
    container.remove();
    host.containerd.remove_image(&reference);
    host.assert_nothing_left();
}
