//! `weightfs status` says of each layer whether it is lazy, or why not.

use serde_json::Value;
use weightfs_tests::Host;
use weightfs_tests::host::SNAPSHOTTER;
use weightfs_tests::json::assert_documented;
use weightfs_tests::layer::{Attributes, Compression, Layer, LayerBuilder};
use weightfs_tests::model::noise;

fn layer(host: &Host, name: &str, bytes: u64, compression: Compression) -> Layer {
    LayerBuilder::new(host.bed.area.path())
        .file(name, &noise(bytes, bytes), &Attributes::mode(0o644))
        .finish(compression)
}

fn layers(host: &Host, subject: &[&str]) -> Vec<Value> {
    let arguments = [&["status", "--json"], subject].concat();
    let status = host.bed.weightfs.run_here(&arguments).ok();
    let status: Value = serde_json::from_str(&status).unwrap();
    assert_documented("a layer", &status["layers"]);
    status["layers"].as_array().unwrap().clone()
}

fn modes(layers: &[Value]) -> Vec<&str> {
    layers.iter().map(|layer| layer["mode"].as_str().unwrap()).collect()
}

#[test]
fn each_layer_is_lazy_or_says_why_not() {
    let host = Host::new();
    let lazy = layer(&host, "lazy", 9 << 20, Compression::Plain);
    let small = layer(&host, "small", 1 << 10, Compression::Plain);
    // busybox, compressed, goes on top.
    let (named, _) = host.push_image_below("images/named", &[lazy.clone(), small]);
    let (unnamed, _) = host.push_image_below("images/unnamed", &[]);
    host.rpull(&named);
    let words = ["image", "pull", "--plain-http", "--snapshotter", SNAPSHOTTER, &unnamed];
    host.containerd.ctr(&words).ok();

    let image = layers(&host, &[&named]);
    assert_eq!(modes(&image), ["lazy", "small", "compressed"], "{image:?}");
    assert_eq!(image[0]["digest"], lazy.blob.digest.to_string());
    assert_eq!((&image[0]["parent"], &image[0]["reason"]), (&"".into(), &"".into()));
    assert!(image[1]["reason"].as_str().unwrap().contains("min_layer_size"), "{image:?}");
    // The layers below a snapshot are its own, too.
    let middle = image[1]["snapshot"].as_str().unwrap();
    assert_eq!(modes(&layers(&host, &[middle])), ["lazy", "small"]);
    let mut everything = layers(&host, &[]);
    everything.retain(|layer| layer["image"] != named);
    assert_eq!(modes(&everything), ["no-labels"], "{everything:?}");

    let table = host.bed.weightfs.run_here(&["status", &named]).ok();
    for text in ["MOUNTS", "1 layer is pulled: small", "MODE", "compressed with gzip", &named] {
        assert!(table.contains(text), "{text} in {table}");
    }
    let log = host.daemon.log();
    let (mounted, pulled) = ("layer is mounted lazily", "layer is pulled");
    assert_eq!((log.matches(mounted).count(), log.matches(pulled).count()), (1, 3), "{log}");
    let unknown = host.bed.weightfs.run_here(&["status", "no/such:image"]);
    unknown.assert_fails(1, &["no snapshot, image or mounted model no/such:image"]);
}
