//! Tries the container image on a bare Debian as its node: what the DaemonSet's init container does
//! there, twice, with another configuration, and without systemd; and the daemon's own container.
//!
//! `make test-image` runs it. usage: install_node IMAGE ROOT-FILE-SYSTEM; as root.
//!
//! The image is unpacked and entered by chroot, with the node's files at /host as in the pod. systemd is
//! a stand-in there that notes what it is told.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use weightfs_tests::Area;
use weightfs_tests::process::{Outcome, run_within};

/// How long a step may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where containerd's configuration is.
const CONTAINERD: &str = "etc/containerd/config.toml";
/// What an administrator has there.
const OWN: &str =
    "version = 2\n# ours\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"pause:1\"\n";

/// Enters the image `$1` as a pod on the node `$2` does, and runs the rest of the arguments in it.
const ENTER: &str = r#"
image=$1 node=$2
shift 2
mount --bind "$image" "$image"
cd "$image"
mkdir -p host proc sys dev run var/lib/weightfs etc/weightfs
mount --rbind "$node" host
for root in . host; do
    mount -t proc proc $root/proc
    mount --rbind /sys $root/sys
    mount --rbind /dev $root/dev
done
mount --bind "$node/etc/weightfs" etc/weightfs
mount --bind "$node/var/lib/weightfs" var/lib/weightfs
exec chroot . "$@"
"#;

/// The daemon's container: the command and the probe of the DaemonSet.
const SERVE: &str = "
/usr/bin/weightfs keeper -- /usr/bin/weightfs serve &
for _ in $(seq 300); do
    /usr/bin/weightfs status && break
    sleep 0.1
done
/usr/bin/weightfs status
kill $!
wait $!
";

/// What systemd notes of what it is told.
const SYSTEMCTL: &str = "#!/bin/sh\necho \"$*\" >>/systemctl.log\n";

fn main() {
    let arguments: Vec<_> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [image, root] = arguments.as_slice() else { panic!("usage: install_node IMAGE ROOT") };
    let area = Area::new();
    let unpacked = area.path().join("image");
    let mut unpack = Command::new("umoci");
    unpack.args(["raw", "unpack", "--image"]).arg(image).arg(&unpacked);
    run_within(PATIENCE, &mut unpack).ok();
    on_a_node_with_systemd(&area, &unpacked, root);
    on_a_node_without(&area, &unpacked, root);
    area.assert_no_mounts();
}

/// A node and the image on it.
struct Node<'a> {
    image: &'a Path,
    root: PathBuf,
}

/// The daemon is the node's (`daemon: host`).
fn on_a_node_with_systemd(area: &Area, image: &Path, root: &Path) {
    let node = Node::new(area, image, root, "with-systemd");
    fs::create_dir_all(node.root.join("run/systemd/system")).unwrap();
    let systemctl = node.root.join("usr/bin/systemctl");
    fs::write(&systemctl, SYSTEMCTL).unwrap();
    fs::set_permissions(&systemctl, fs::Permissions::from_mode(0o755)).unwrap();
    node.put("config/config.toml", "[cache]\nmin_free = \"20%\"\n");
    node.put("config-docker/config.json", "{}");
    node.put("config-tls/tls.key", "secret");

    step("it is installed", || node.install("host").ok());
    const START: [&str; 2] =
        ["daemon-reload", "enable --now weightfs.socket weightfs-control.socket weightfs.service"];
    assert_eq!(
        node.told(),
        [&START[..], &["restart weightfs.service", "restart containerd.service"]].concat()
    );
    let own = fs::read(image.join("usr/bin/weightfs")).unwrap();
    assert!(node.read("opt/weightfs/bin/weightfs") == own, "another program");
    assert!(
        node.text("etc/systemd/system/weightfs.service")
            .contains("ExecStart=/opt/weightfs/bin/weightfs serve")
    );
    assert!(node.text(CONTAINERD).contains("weightfs"), "{}", node.text(CONTAINERD));
    for secret in ["docker/config.json", "tls/tls.key"] {
        let path = node.root.join("etc/weightfs").join(secret);
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600, "{secret}");
    }

    let said = step("again: nothing is to be done", || node.install("host").ok());
    assert!(!said.contains("wrote"), "{said}");
    assert_eq!(node.told(), START);

    node.put("config/config.toml", "[cache]\nmin_free = \"25%\"\n");
    step("with another configuration", || node.install("host").ok());
    assert_eq!(node.told(), [&START[..], &["restart weightfs.service"]].concat());
    assert!(node.text("etc/weightfs/config.toml").contains("25%"));

    let away = ["/usr/sbin/chroot", "/host", "/opt/weightfs/bin/weightfs", "node", "uninstall"];
    step("it is taken away", || node.run(&away).ok());
    assert_eq!(node.text(CONTAINERD), OWN);
    assert!(!node.root.join("etc/systemd/system/weightfs.service").exists());
}

/// The daemon is the pod's (`daemon: pod`).
fn on_a_node_without(area: &Area, image: &Path, root: &Path) {
    let node = Node::new(area, image, root, "without-systemd");
    node.put("config/config.toml", "");
    node.install("host").assert_fails(1, &["no systemd", "daemon: pod"]);
    let said = step("without systemd", || node.install("pod").ok());
    assert!(said.contains("restart containerd, so that it knows of weightfs"), "{said}");
    assert!(node.text(CONTAINERD).contains("weightfs"), "{}", node.text(CONTAINERD));
    assert!(!node.root.join("etc/systemd/system/weightfs.service").exists());
    let said = step("the daemon in the pod", || node.run(&["/bin/bash", "-c", SERVE]).ok());
    assert!(!said.is_empty(), "the probe says nothing");
}

/// Does something, and says that it went well.
fn step<T>(name: &str, what: impl FnOnce() -> T) -> T {
    let value = what();
    println!("{name}: ok");
    value
}

impl<'a> Node<'a> {
    fn new(area: &Area, image: &'a Path, bare: &Path, name: &str) -> Self {
        let root = area.path().join(name);
        let mut copy = Command::new("cp");
        run_within(PATIENCE, copy.args(["-a", "--reflink=auto"]).arg(bare).arg(&root)).ok();
        for dir in ["etc/containerd", "etc/weightfs", "var/lib/weightfs"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        fs::write(root.join(CONTAINERD), OWN).unwrap();
        for dir in ["config", "config-docker", "config-tls"] {
            let _ = fs::remove_dir_all(image.join(dir));
        }
        Self { image, root }
    }

    /// A file that the pod has of the cluster.
    fn put(&self, path: &str, text: &str) {
        let path = self.image.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn install(&self, daemon: &str) -> Outcome {
        self.run(&["/usr/libexec/weightfs/install-node", daemon])
    }

    /// Runs a command in the pod.
    fn run(&self, command: &[&str]) -> Outcome {
        let mut enter = Command::new("unshare");
        enter
            .args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"])
            .args(["sh", "-euc", ENTER, "sh"])
            .args([self.image, &self.root])
            .args(command);
        run_within(PATIENCE, &mut enter)
    }

    /// What systemd was told since the last time.
    fn told(&self) -> Vec<String> {
        let log = self.root.join("systemctl.log");
        let text = fs::read_to_string(&log).unwrap_or_default();
        let _ = fs::remove_file(log);
        text.lines().map(str::to_owned).collect()
    }

    fn read(&self, path: &str) -> Vec<u8> {
        let path = self.root.join(path);
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    fn text(&self, path: &str) -> String {
        String::from_utf8(self.read(path)).unwrap()
    }
}
