//! The program of a Fluid ThinRuntime's FUSE pod, with Fluid's runtime configuration.

use std::fs;

use weightfs_tests::Bed;
use weightfs_tests::area::is_mount_point;
use weightfs_tests::model::SMALL_MODEL;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::process::{Service, exit_code};
use weightfs_tests::tree::{self, Scope};

#[test]
fn a_dataset_is_mounted_where_fluid_wants_it_until_the_pod_ends() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/fluid");
    // Fluid makes the directory above it only.
    let target = bed.area.dir("runtime-mnt/thin/default/llama").join("thin-fuse");
    let json = serde_json::json!({
        "mounts": [{ "mountPoint": format!("oci://{reference}"), "name": "llama", "options": {} }],
        "targetPath": target,
        "accessModes": ["ReadOnlyMany"],
    });
    let file = bed.area.file("fluid/config.json", json.to_string());
    let mut command = bed.weightfs.command(["fluid", "--runtime-config"]);
    command.arg(file).arg("--config").arg(bed.weightfs.config());
    let mut pod = Service::start(&bed.area, "fluid", command);
    pod.wait_ready(|_| is_mount_point(&target).then_some(()));
    tree::assert_same(&source, &target, Scope::ModelFiles);
    pod.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(exit_code(pod.wait()), 0, "{}", pod.log());
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    bed.area.assert_no_mounts();
}
