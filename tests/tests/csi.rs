//! Kubernetes's volumes: the plugin's socket by the rules of the CSI specification, as a kubelet
//! uses it, with a daemon that does the work.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tonic::Code;
use weightfs_proto::csi::NodePublishVolumeRequest;
use weightfs_proto::csi::volume_capability::AccessMode;
use weightfs_proto::csi::volume_capability::access_mode::Mode;
use weightfs_tests::area::is_mount_point;
use weightfs_tests::csi::{Plugin, inline};
use weightfs_tests::model::SMALL_MODEL;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::process::{Service, run};
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::{Bed, Daemon, Fault, Target, wait_until};

/// A model, a daemon and its plugin.
struct Node {
    plugin: Plugin,
    daemon: Daemon,
    source: PathBuf,
    reference: String,
    /// The last field, so that it goes last.
    bed: Bed,
}

impl Node {
    fn new() -> Self {
        Self::with(|bed| bed.weightfs.serve(&bed.area))
    }

    fn kept() -> Self {
        Self::with(|bed| bed.weightfs.serve_kept(&bed.area))
    }

    fn with(serve: impl FnOnce(&Bed) -> Daemon) -> Self {
        let bed = Bed::new();
        let source = bed.model(SMALL_MODEL);
        let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/volume");
        let daemon = serve(&bed);
        let plugin = Plugin::start(&bed.area, &bed.weightfs);
        Self { plugin, daemon, source, reference, bed }
    }

    /// Where a kubelet wants the volume of a pod: it makes all directories but the last one.
    fn target(&self, pod: &str) -> PathBuf {
        self.bed.area.dir(&format!("pods/{pod}/volumes")).join("mount")
    }

    fn inline(&self, volume: &str, target: &Path) -> NodePublishVolumeRequest {
        inline(volume, target, &[("reference", &self.reference)])
    }

    fn code(&self, request: &NodePublishVolumeRequest) -> Code {
        self.plugin.publish(request).unwrap_err().code()
    }

    /// Asserts that a request is refused, and gives what was said.
    fn refused(&self, request: &NodePublishVolumeRequest, code: Code) -> String {
        let status = self.plugin.publish(request).unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        status.message().to_owned()
    }

    fn assert_nothing_at(&self, target: &Path) {
        assert!(!target.exists(), "{} is left", target.display());
        let root = self.bed.weightfs.root();
        let status = self.bed.weightfs.run(["status", "--json", "--root", root.to_str().unwrap()]);
        let status: serde_json::Value = serde_json::from_str(&status.ok()).unwrap();
        assert_eq!(status["models"].as_array().unwrap().len(), 0, "{status}");
    }

    fn end(self) {
        let Self { daemon, bed, .. } = self;
        daemon.stop();
        bed.area.assert_no_mounts();
    }
}

#[test]
fn an_inline_volume_comes_and_goes() {
    let node = Node::new();
    let target = node.target("a");
    let request = node.inline("csi-1", &target);
    node.plugin.publish(&request).unwrap();
    tree::assert_same(&node.source, &target, Scope::ModelFiles);
    let refused = fs::write(target.join("new"), "x").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(nix::libc::EROFS), "{refused}");
    // Done already, it is done.
    node.plugin.publish(&request).unwrap();
    node.plugin.unpublish("csi-1", &target).unwrap();
    node.assert_nothing_at(&target);
    node.plugin.unpublish("csi-1", &target).unwrap();
    node.end();
}

#[test]
fn the_plugin_says_what_it_is_and_the_kubelet_finds_it() {
    let node = Node::new();
    assert_eq!(node.plugin.info().name, "csi.weightfs.io");
    assert!(!node.plugin.info().vendor_version.is_empty());
    // No controller; statistics and the condition of volumes.
    assert_eq!(node.plugin.capabilities(), (0, 2));
    assert_eq!(node.plugin.node().node_id, "node-1");
    assert!(node.plugin.is_ready());
    let known = node.plugin.register();
    assert_eq!((known.r#type.as_str(), known.name.as_str()), ("CSIPlugin", "csi.weightfs.io"));
    assert_eq!(known.supported_versions, ["1.0.0"]);
    let mode = fs::metadata(&known.endpoint).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "others may mount");
    assert!(node.plugin.log().contains("the kubelet has registered the plugin"));
    node.end();
}

#[test]
fn a_static_volume_is_at_several_targets() {
    let node = Node::new();
    let targets = [node.target("a"), node.target("b")];
    for target in &targets {
        let mut request = node.inline("model-pv", target);
        let capability = request.volume_capability.as_mut().unwrap();
        capability.access_mode = Some(AccessMode { mode: Mode::MultiNodeReaderOnly.into() });
        request.readonly = true;
        node.plugin.publish(&request).unwrap();
        tree::assert_same(&node.source, target, Scope::ModelFiles);
    }
    node.plugin.unpublish("model-pv", &targets[0]).unwrap();
    tree::assert_same(&node.source, &targets[1], Scope::ModelFiles);
    node.plugin.unpublish("model-pv", &targets[1]).unwrap();
    node.assert_nothing_at(&targets[1]);
    node.end();
}

#[test]
fn a_request_that_lacks_something_is_refused_with_its_name() {
    let node = Node::new();
    let target = node.target("a");
    let whole = node.inline("csi-1", &target);
    let refused = |change: fn(&mut NodePublishVolumeRequest)| {
        let mut request = whole.clone();
        change(&mut request);
        node.refused(&request, Code::InvalidArgument)
    };
    assert!(refused(|r| r.volume_id.clear()).contains("volume_id"));
    assert!(refused(|r| r.target_path.clear()).contains("target_path"));
    assert!(refused(|r| r.target_path = "relative".into()).contains("absolute"));
    assert!(refused(|r| r.target_path = "/a/../b".into()).contains(".."));
    assert!(refused(|r| r.volume_capability = None).contains("volume_capability"));
    assert!(refused(|r| r.volume_context.clear()).contains("`reference`"));
    assert!(refused(|r| r.volume_id = "v".repeat(600)).contains("volume"));
    let mut request = whole.clone();
    request.volume_context.insert("refrence".into(), "x/y:z".into());
    assert!(node.refused(&request, Code::InvalidArgument).contains("did you mean `reference`"));
    let mut request = whole.clone();
    request.volume_context.insert("exclude-file-patterns".into(), r#"["a[b"]"#.into());
    assert!(node.refused(&request, Code::InvalidArgument).contains("a[b"));
    for (volume, path) in [("", "/x"), ("v", "")] {
        let path = Path::new(path);
        assert_eq!(node.plugin.unpublish(volume, path).unwrap_err().code(), Code::InvalidArgument);
        assert_eq!(node.plugin.stats(volume, path).unwrap_err().code(), Code::InvalidArgument);
    }
    // Nobody has made the directory above it: that is the kubelet's.
    let missing = node.bed.area.path().join("pods/missing/mount");
    assert_eq!(node.code(&node.inline("csi-1", &missing)), Code::Internal);
    node.assert_nothing_at(&target);
    node.end();
}

#[test]
fn what_is_there_already_is_left_alone() {
    let node = Node::new();
    let target = node.target("a");
    node.plugin.publish(&node.inline("csi-1", &target)).unwrap();
    // The same place for another volume, or for the same one otherwise.
    assert!(node.refused(&node.inline("csi-2", &target), Code::AlreadyExists).contains("csi-1"));
    let mut other = node.inline("csi-1", &target);
    other.volume_context.insert("exclude-model-weights".into(), "true".into());
    node.refused(&other, Code::AlreadyExists);
    let refused = node.plugin.unpublish("csi-2", &target).unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists, "{refused}");
    tree::assert_same(&node.source, &target, Scope::ModelFiles);
    node.plugin.unpublish("csi-1", &target).unwrap();

    // Files and mounts of somebody else.
    fs::create_dir(&target).unwrap();
    fs::write(target.join("precious"), "x").unwrap();
    node.refused(&node.inline("csi-3", &target), Code::AlreadyExists);
    assert_eq!(node.plugin.unpublish("csi-3", &target).unwrap_err().code(), Code::Internal);
    assert_eq!(fs::read_to_string(target.join("precious")).unwrap(), "x");
    fs::remove_file(target.join("precious")).unwrap();
    let none = None::<&str>;
    mount(Some("tmpfs"), &target, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    node.refused(&node.inline("csi-3", &target), Code::AlreadyExists);
    assert_eq!(node.plugin.unpublish("csi-3", &target).unwrap_err().code(), Code::AlreadyExists);
    umount2(&target, MntFlags::empty()).unwrap();
    // An empty directory will do.
    node.plugin.publish(&node.inline("csi-3", &target)).unwrap();
    node.plugin.unpublish("csi-3", &target).unwrap();
    node.assert_nothing_at(&target);
    node.end();
}

#[test]
fn what_cannot_be_had_is_refused_by_its_reason_and_leaves_nothing() {
    let node = Node::new();
    let target = node.target("a");
    let missing = node.bed.proxy.reference("models/none", "v1");
    let request = inline("csi-1", &target, &[("reference", &missing)]);
    assert!(node.refused(&request, Code::NotFound).contains("models/none"));
    let request = node.inline("csi-1", &target);
    node.bed.proxy.fail(Target::Manifests, Fault::Status(401));
    assert!(node.refused(&request, Code::Unauthenticated).contains("docker login"));
    node.bed.proxy.heal();
    node.assert_nothing_at(&target);
    node.plugin.publish(&request).unwrap();
    node.plugin.unpublish("csi-1", &target).unwrap();
    node.end();
}

#[test]
fn files_that_are_excluded_are_not_there_also_after_a_restart() {
    let node = Node::kept();
    let target = node.target("a");
    let attributes = [
        ("reference", node.reference.as_str()),
        ("exclude-model-weights", "true"),
        ("exclude-file-patterns", r#"["README*", "!*-00001-of-*"]"#),
    ];
    let request = inline("csi-1", &target, &attributes);
    node.plugin.publish(&request).unwrap();
    let names = || {
        let mut names: Vec<_> = walk(&target).collect();
        names.sort();
        names
    };
    let weights = |name: &String| name.ends_with(".safetensors");
    let before = names();
    assert!(before.iter().any(|name| name.ends_with("config.json")), "{before:?}");
    assert!(walk(&node.source).any(|name| weights(&name)), "the model has none");
    let taken_back = before.iter().filter(|name| weights(name));
    assert!(taken_back.clone().all(|name| name.contains("-00001-of-")), "{before:?}");
    node.daemon.kill_kept().unwrap();
    node.daemon.wait_starts(2);
    assert_eq!(names(), before);
    node.plugin.publish(&request).unwrap();
    node.plugin.unpublish("csi-1", &target).unwrap();
    node.assert_nothing_at(&target);
    node.end();
}

/// The names of all files below a directory.
fn walk(dir: &Path) -> impl Iterator<Item = String> {
    let mut open = vec![dir.to_owned()];
    let mut names = Vec::new();
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            match entry.file_type().unwrap().is_dir() {
                true => open.push(entry.path()),
                false => names.push(entry.file_name().into_string().unwrap()),
            }
        }
    }
    names.into_iter()
}

#[test]
fn a_volume_has_statistics_while_it_is_there() {
    let node = Node::new();
    let target = node.target("a");
    assert_eq!(node.plugin.stats("csi-1", &target).unwrap_err().code(), Code::NotFound);
    node.plugin.publish(&node.inline("csi-1", &target)).unwrap();
    let before = node.plugin.stats("csi-1", &target).unwrap();
    tree::assert_same(&node.source, &target, Scope::ModelFiles);
    let after = node.plugin.stats("csi-1", &target).unwrap();
    let sizes = walk(&node.source).count();
    assert_eq!(after.usage[1].total, i64::try_from(sizes).unwrap());
    assert!(before.usage[0].used < after.usage[0].used, "{before:?} {after:?}");
    assert_eq!((after.usage[0].used, after.usage[0].available), (after.usage[0].total, 0));
    assert!(!after.volume_condition.unwrap().abnormal);
    assert_eq!(node.plugin.stats("csi-2", &target).unwrap_err().code(), Code::NotFound);
    node.plugin.unpublish("csi-1", &target).unwrap();
    assert_eq!(node.plugin.stats("csi-1", &target).unwrap_err().code(), Code::NotFound);
    node.end();
}

#[test]
fn a_plugin_that_dies_takes_nothing_with_it() {
    let node = Node::new();
    let target = node.target("a");
    let request = node.inline("csi-1", &target);
    node.plugin.publish(&request).unwrap();
    let Node { plugin, daemon, source, reference, bed } = node;
    plugin.kill();
    tree::assert_same(&source, &target, Scope::ModelFiles);
    let plugin = Plugin::start(&bed.area, &bed.weightfs);
    let node = Node { plugin, daemon, source, reference, bed };
    node.plugin.publish(&request).unwrap();
    node.plugin.unpublish("csi-1", &target).unwrap();
    node.assert_nothing_at(&target);
    node.end();
}

#[test]
fn volumes_outlive_a_daemon_that_is_kept_and_come_back_with_one_that_is_not() {
    let node = Node::kept();
    let target = node.target("a");
    let request = node.inline("csi-1", &target);
    node.plugin.publish(&request).unwrap();
    let mut open = fs::File::open(target.join("config.json")).unwrap();
    node.daemon.kill_kept().unwrap();
    let mut config = Vec::new();
    open.read_to_end(&mut config).unwrap();
    assert_eq!(config, fs::read(node.source.join("config.json")).unwrap(), "a reader waits");
    node.daemon.wait_starts(2);
    node.plugin.publish(&request).unwrap();
    node.plugin.unpublish("csi-1", &target).unwrap();
    node.assert_nothing_at(&target);
    node.end();

    let node = Node::new();
    let target = node.target("a");
    let request = node.inline("csi-1", &target);
    node.plugin.publish(&request).unwrap();
    let Node { plugin, daemon, source, reference, bed } = node;
    daemon.kill();
    assert!(!plugin.is_ready());
    let refused = plugin.publish(&request).unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert_eq!(plugin.unpublish("csi-1", &target).unwrap_err().code(), Code::Unavailable);
    let daemon = bed.weightfs.serve(&bed.area);
    let node = Node { plugin, daemon, source, reference, bed };
    assert!(node.plugin.is_ready());
    tree::assert_same(&node.source, &target, Scope::ModelFiles);
    node.plugin.publish(&request).unwrap();
    node.plugin.unpublish("csi-1", &target).unwrap();
    node.assert_nothing_at(&target);
    node.end();
}

#[test]
fn a_kubelet_that_gives_up_comes_again_to_the_same_work() {
    let node = Node::new();
    let target = node.target("a");
    let request = node.inline("csi-1", &target);
    let begun = || node.bed.proxy.requests(Target::Manifests) > 0;
    node.bed.proxy.fail(Target::Manifests, Fault::Hang);
    node.plugin.publish_and_give_up(&request, begun);
    // Something else for the same place has to wait.
    node.refused(&node.inline("csi-2", &target), Code::Aborted);
    node.bed.proxy.heal();
    node.plugin.publish(&request).unwrap();
    tree::assert_same(&node.source, &target, Scope::ModelFiles);
    node.plugin.unpublish("csi-1", &target).unwrap();

    // A pod that goes before its volume is there.
    node.bed.proxy.forget();
    node.bed.proxy.fail(Target::Manifests, Fault::Hang);
    node.plugin.publish_and_give_up(&request, begun);
    node.plugin.unpublish("csi-1", &target).unwrap();
    node.assert_nothing_at(&target);
    node.bed.proxy.heal();
    node.end();
}

#[test]
fn a_volume_is_seen_in_namespaces_that_were_there_before() {
    let node = Node::new();
    let target = node.target("a");
    // As a kubelet's directory is: shared.
    let pods = node.bed.area.path().join("pods");
    let none = None::<&str>;
    mount(Some(&pods), &pods, none, MsFlags::MS_BIND, none).unwrap();
    mount(none, &pods, none, MsFlags::MS_SHARED, none).unwrap();
    let mut pod = Command::new("unshare");
    pod.args(["--mount", "--propagation", "slave", "sh", "-c", "echo up; exec sleep 1000", "sh"]);
    let mut pod = Service::start(&node.bed.area, "pod", {
        pod.arg(&pods);
        pod
    });
    pod.wait_ready(|pod| pod.log().contains("up").then_some(()));
    node.plugin.publish(&node.inline("csi-1", &target)).unwrap();
    let inside = |words: &[&str]| {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--target", &pod.pid().to_string()]).args(words);
        run(command.arg(target.join("config.json")))
    };
    let size = node.source.join("config.json").metadata().unwrap().len();
    assert_eq!(inside(&["stat", "--format=%s"]).ok().trim(), size.to_string());
    node.plugin.unpublish("csi-1", &target).unwrap();
    wait_until("it is gone there, too", || inside(&["stat"]).code != 0);
    assert!(!is_mount_point(&target));
    drop(pod);
    umount2(&pods, MntFlags::MNT_DETACH).unwrap();
    node.end();
}
