//! `weightfs node install` and `uninstall` with real containerds, in a prefix of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use weightfs_tests::containerd::Version;
use weightfs_tests::process::{Outcome, run};
use weightfs_tests::{Bed, Containerd, ContainerdOptions};

/// A node's files in a directory, and the containerd that reads them.
struct Node {
    bed: Bed,
    version: Version,
    prefix: PathBuf,
    config: PathBuf,
}

impl Node {
    fn new(version: Version) -> Self {
        let bed = Bed::new();
        let prefix = bed.area.dir("node");
        let config = prefix.join("etc/containerd/config.toml");
        fs::create_dir_all(config.with_file_name("conf.d")).unwrap();
        let program = version.program("containerd");
        bed.weightfs.configure(&format!(
            "[containerd]\nconfig = \"{}\"\nprogram = \"{}\"\n",
            config.display(),
            program.display()
        ));
        Self { bed, version, prefix, config }
    }

    fn node(&self, words: &[&str]) -> Outcome {
        let prefix = self.prefix.to_str().unwrap();
        self.bed.weightfs.run_here(&[&["node"], words, &["--prefix", prefix]].concat())
    }

    /// What containerd says that it is told.
    fn dump(&self) -> String {
        let mut command = Command::new(self.version.program("containerd"));
        run(command.arg("--config").arg(&self.config).args(["config", "dump"])).ok()
    }

    /// All files below the prefix with what is in them.
    fn files(&self) -> Vec<(PathBuf, String)> {
        let mut found = Vec::new();
        collect(&self.prefix, &mut found);
        found.sort();
        found
    }
}

fn collect(dir: &Path, found: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => collect(&path, found),
            false => found.push((path.clone(), fs::read_to_string(path).unwrap())),
        }
    }
}

/// A configuration of somebody who has settings of CRI, and comments.
const OWN: &str = r#"# ours
version = 2
imports = ["PREFIX/etc/containerd/conf.d/*.toml"]

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "my/pause:1" # small
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "/etc/containerd/certs.d"
"#;

const OWN_OF_2: &str = r#"version = 3
imports = ["conf.d/*.toml"]
[plugins."io.containerd.cri.v1.images"]
  max_concurrent_downloads = 7 # not more
"#;

/// Installs, looks at what containerd makes of it, and uninstalls.
fn round(version: Version, own: Option<&str>, kept: &[&str]) {
    if !version.is_here() {
        return;
    }
    let node = Node::new(version);
    if let Some(own) = own {
        fs::write(&node.config, own.replace("PREFIX", node.prefix.to_str().unwrap())).unwrap();
    }
    let before = node.files();
    let dry = node.node(&["install", "--dry-run"]).ok();
    assert!(dry.contains("would create") && node.files() == before, "{dry}");
    let said = node.node(&["install"]).ok();
    assert!(said.contains("systemctl restart containerd"), "{said}");
    let dump = node.dump().replace('\'', "\"");
    for text in ["snapshotter = \"weightfs\"", "disable_snapshot_annotations = false", "s.sock"] {
        assert!(dump.contains(text), "{text} in {dump}");
    }
    kept.iter().for_each(|text| assert!(dump.contains(text), "{text} in {dump}"));
    let unit = fs::read_to_string(node.prefix.join("etc/systemd/system/weightfs.service")).unwrap();
    assert!(unit.contains("ExecStart=/") && unit.contains("weightfs serve"), "{unit}");

    let installed = node.files();
    assert_eq!(node.node(&["install"]).ok(), "it is in place\n");
    assert_eq!(node.files(), installed);
    node.node(&["uninstall"]).ok();
    assert_eq!(node.files(), before, "byte for byte");
    assert_eq!(node.node(&["uninstall"]).ok(), "nothing is installed\n");
}

#[test]
fn containerd_1_6_takes_it_and_gives_it_back() {
    round(Version::Installed, Some(OWN), &["my/pause:1", "certs.d"]);
    round(Version::Installed, Some(&OWN.replace("PREFIX/etc/containerd/", "")), &["my/pause:1"]);
    round(Version::Installed, None, &[]);
}

#[test]
fn containerd_1_7_takes_it_and_gives_it_back() {
    round(Version::V17, Some(OWN), &["my/pause:1", "certs.d"]);
    round(Version::V17, Some("# nothing\n"), &[]);
}

#[test]
fn containerd_2_1_takes_it_and_gives_it_back() {
    let exports = "enable_remote_snapshot_annotations = \"true\"";
    round(Version::V21, Some(OWN_OF_2), &["max_concurrent_downloads = 7", exports]);
    round(Version::V21, None, &[exports]);
    // A file of the older format.
    round(Version::V21, Some(OWN), &["my/pause:1", "certs.d", exports]);
}

#[test]
fn what_others_changed_since_stays() {
    let node = Node::new(Version::Installed);
    fs::write(&node.config, OWN.replace("PREFIX/etc/containerd/", "")).unwrap();
    node.node(&["install"]).ok();
    let mut text = fs::read_to_string(&node.config).unwrap();
    text += "[debug]\n  level = \"info\" # for now\n";
    fs::write(&node.config, text).unwrap();
    assert_eq!(node.node(&["install"]).ok(), "it is in place\n");
    node.node(&["uninstall"]).ok();
    let left = fs::read_to_string(&node.config).unwrap();
    assert!(!left.contains("weightfs"), "{left}");
    for text in ["# ours", "my/pause:1\" # small", "certs.d", "level = \"info\" # for now"] {
        assert!(left.contains(text), "{text} in {left}");
    }
}

#[test]
fn a_configuration_of_another_kind_is_refused_and_left() {
    let node = Node::new(Version::Installed);
    let old = "disabled_plugins = [\"cri\"]\n";
    fs::write(&node.config, old).unwrap();
    node.node(&["install"]).assert_fails(1, &["as version 2"]);
    fs::write(&node.config, "version = 2\nproxy_plugins = 3\n").unwrap();
    node.node(&["install"]).assert_fails(1, &[]);
    assert_eq!(node.files().len(), 1);
}

/// A containerd that runs loads the plugin after an installation, and starts without it after.
fn runs_with_it(version: Version) {
    if !version.is_here() {
        return;
    }
    let node = Node::new(version);
    let options = ContainerdOptions { version, ..ContainerdOptions::default() };
    let mut containerd = Containerd::start(&node.bed.area, &options);
    let config = containerd.config();
    let words = ["--containerd-config", config.to_str().unwrap()];
    let before = fs::read(&config).unwrap();
    let _daemon = node.bed.weightfs.serve(&node.bed.area);
    node.node(&[&["install"], &words[..]].concat()).ok();
    containerd.restart(&node.bed.area);
    let listed = containerd.ctr(&["snapshot", "--snapshotter", "weightfs", "ls"]).ok();
    assert!(listed.contains("KEY"), "{listed}");
    node.node(&[&["uninstall"], &words[..]].concat()).ok();
    assert_eq!(fs::read(&config).unwrap(), before);
    containerd.restart(&node.bed.area);
    assert_ne!(containerd.ctr(&["snapshot", "--snapshotter", "weightfs", "ls"]).code, 0);
    containerd.ctr(&["snapshot", "--snapshotter", "overlayfs", "ls"]).ok();
}

#[test]
fn a_containerd_1_6_that_runs_loads_and_drops_it() {
    runs_with_it(Version::Installed);
}

#[test]
fn a_containerd_2_1_that_runs_loads_and_drops_it() {
    runs_with_it(Version::V21);
}
