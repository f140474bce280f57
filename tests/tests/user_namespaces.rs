//! Pods with a user namespace, by CRI of containerd 2.1, in a network namespace of the test's own.
//! What can't be had here is said, and the test left out.

use std::path::Path;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use weightfs_tests::containerd::{UserNamespaces, Version};
use weightfs_tests::cri::Cri;
use weightfs_tests::model::write_safetensors;
use weightfs_tests::process::run;
use weightfs_tests::{Host, digest};

const MIB: u64 = 1 << 20;

/// Where Debian puts the plugins.
const CNI_PLUGINS: &str = "/usr/lib/cni";

/// Who is root in the pods.
const FIRST: u32 = 200_000;

/// Debian 12's runc can't map the owners of mounts, as it says. Without that, all is as it should be but
/// for the owners of what containerd puts into every container, like /etc/hosts.
const RUNTIME: &str = r#"#!/bin/sh
for word; do
    [ "$word" = features ] && exec echo '{"ociVersionMin":"1.0.0","ociVersionMax":"1.2.1",
        "linux":{"mountExtensions":{"idmap":{"enabled":true}}}}'
    [ "$last" = --bundle ] && python3 - "$word/config.json" <<'END'
import json, sys
with open(sys.argv[1]) as file:
    spec = json.load(file)
for mount in spec["mounts"]:
    mount.pop("uidMappings", None)
    mount.pop("gidMappings", None)
with open(sys.argv[1], "w") as file:
    json.dump(spec, file)
END
    last=$word
done
exec runc "$@"
"#;

/// Whether what it takes is here.
fn is_here() -> bool {
    let here = Version::V21.is_here() && Path::new(CNI_PLUGINS).join("ptp").exists();
    if !here {
        eprintln!("left out: needs containerd 2.1 and containernetworking-plugins");
    }
    here
}

#[test]
fn a_pod_with_a_user_namespace_reads_lazily_and_sees_its_owners() {
    if !is_here() {
        return;
    }
    // Everything that is started from here on is in it, threads included.
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    run(Command::new("ip").args(["link", "set", "lo", "up"])).ok();

    let host = Host::with_user_namespaces(|area| UserNamespaces {
        runtime: area.program("runtime", RUNTIME),
        cni_plugins: CNI_PLUGINS.into(),
    });
    let source = host.bed.area.path().join("weights");
    write_safetensors(&source, 32 * MIB, 1).unwrap();
    let layer = host.weights_layer(&source, "weights");
    let (reference, _) = host.push_image_below("images/userns", std::slice::from_ref(&layer));
    let cri = Cri::connect(&host.containerd, &host.bed.area.dir("pods"));
    cri.pull(&reference).unwrap();
    let script = "cat /proc/self/uid_map; stat -c %u /models/weights /bin; \
                  echo x > /models/new && stat -c %u /models/new";
    let words = ["/bin/sh", "-c", script];
    let ended = cri.run_in_user_namespace(FIRST, &reference, None, "owners", &words).unwrap();
    let (map, owners) = ended.output.split_once('\n').unwrap();
    assert!(map.split_whitespace().eq(["0", &FIRST.to_string(), "65536"]), "{ended:?}");
    assert_eq!(owners, "0\n0\n0\n", "{ended:?}");
    let fetched = host.fetched(&layer);
    assert!(fetched <= 4 * MIB, "{fetched} bytes fetched to change owners");
    let sum = digest::of_file(&source).unwrap().hex();
    let words = ["/bin/sha256sum", "/models/weights"];
    let ended = cri.run_in_user_namespace(FIRST, &reference, None, "sums", &words).unwrap();
    assert!(ended.output.starts_with(&sum), "{ended:?}");

    // A volume keeps its owners, who are nobody there; its files can be read.
    let script = "stat -c %u /models/models/weights; sha256sum /models/models/weights";
    let words = ["/bin/sh", "-c", script];
    let small = host.bed.proxy.reference("small", "v1");
    let volume = Some(reference.as_str());
    let ended = cri.run_in_user_namespace(FIRST, &small, volume, "volume", &words).unwrap();
    assert!(ended.output.starts_with(&format!("65534\n{sum}")), "{ended:?}");
}
