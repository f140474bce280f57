//! containerd with a private root, state and socket, and containers on it by `ctr`.
//!
//! Invariant: when the guard is dropped, its containers and their mounts are gone. A shim that does
//! not end by itself ends with the area.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::Signal;

use crate::area::Area;
use crate::process::{Outcome, Service, run, run_within};
use crate::wait::{PATIENCE, wait_until};

/// The namespaces that tests use: that of `ctr` and that of CRI.
const NAMESPACES: [&str; 2] = ["default", "k8s.io"];

/// Which containerd runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Version {
    /// The installed one: 1.6 on Debian bookworm.
    #[default]
    Installed,
    /// 1.7, unpacked privately from Debian trixie.
    V17,
    /// 2.1, unpacked privately from Debian sid.
    V21,
}

impl Version {
    /// Whether it can be had here.
    pub fn is_here(self) -> bool {
        self == Self::Installed || self.programs().is_some()
    }

    /// One of its programs.
    pub fn program(self, name: &str) -> PathBuf {
        self.programs().map_or(name.into(), |programs| programs.join(name))
    }

    /// Where `packaging/containerd-package` has put its programs: beside the build's own.
    fn programs(self) -> Option<PathBuf> {
        let name = match self {
            Self::Installed => return None,
            Self::V17 => "containerd17/usr/bin",
            Self::V21 => "containerd21/usr/bin",
        };
        let me = std::env::current_exe().unwrap();
        let mut places = me.ancestors().skip(1).take(3).map(|dir| dir.join(name));
        places.find(|place| place.join("containerd").is_file())
    }
}

/// How containerd is set up.
#[derive(Debug, Clone, Default)]
pub struct ContainerdOptions {
    /// Socket of a WeightFS daemon that is plugged in as snapshotter `weightfs`.
    pub weightfs: Option<PathBuf>,
    /// Turns CRI on.
    pub cri: Option<CriOptions>,
    /// Which containerd.
    pub version: Version,
    /// Keeps the garbage collector away from snapshots that no image or container needs.
    pub no_garbage_collection: bool,
}

/// How CRI is set up.
#[derive(Debug, Clone)]
pub struct CriOptions {
    /// Which snapshotter it uses.
    pub snapshotter: &'static str,
    /// Image of the container that holds a pod's namespaces.
    pub sandbox_image: String,
    /// What pods with a user namespace need besides.
    pub user_namespaces: Option<UserNamespaces>,
}

/// A runtime that maps the owners of mounts (runc from 1.2 on, crun), and a network for pods: with a
/// user namespace, a pod can't have the host's.
#[derive(Debug, Clone)]
pub struct UserNamespaces {
    /// The runtime's program.
    pub runtime: PathBuf,
    /// Directory of CNI's plugins.
    pub cni_plugins: PathBuf,
}

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    dir: PathBuf,
    programs: Option<PathBuf>,
    service: Service,
    exec_count: AtomicU32,
}

impl Containerd {
    /// Starts one and waits until it answers.
    pub fn start(area: &Area, options: &ContainerdOptions) -> Self {
        let dir = tempfile::Builder::new().prefix("c").tempdir_in(area.path()).unwrap().keep();
        let config = dir.join("config.toml");
        fs::write(&config, config_text(&dir, options)).unwrap();
        let programs = options.version.programs();
        assert!(options.version.is_here(), "{:?} is not here", options.version);
        let service = Service::start(area, "containerd", command(programs.as_deref(), &config));
        let containerd = Self { dir, programs, service, exec_count: AtomicU32::new(0) };
        containerd.wait_ready();
        containerd
    }

    /// Stops the process, leaving its containers running, and starts it again.
    pub fn restart(&mut self, area: &Area) {
        self.restart_and(area, || {});
    }

    /// Restarts it as [`Containerd::restart`] does, and calls `begun` as soon as the new one has
    /// begun to start.
    pub fn restart_and(&mut self, area: &Area, begun: impl FnOnce()) {
        self.service.signal(Signal::SIGTERM);
        self.service.wait();
        let command = command(self.programs.as_deref(), &self.dir.join("config.toml"));
        self.service = Service::start(area, "containerd", command);
        self.service.wait_ready(|service| service.log().contains("loading plugin").then_some(()));
        begun();
        self.wait_ready();
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.dir.join("config.toml")
    }

    /// Its program.
    pub fn program(&self) -> PathBuf {
        self.programs.as_ref().map_or("containerd".into(), |programs| programs.join("containerd"))
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        self.service.log()
    }

    /// Runs `ctr` in its default namespace.
    pub fn ctr(&self, arguments: &[&str]) -> Outcome {
        self.ctr_in("default", arguments)
    }

    /// Runs `ctr` in a namespace.
    pub fn ctr_in(&self, namespace: &str, arguments: &[&str]) -> Outcome {
        run_within(2 * PATIENCE, &mut self.ctr_command(namespace, arguments))
    }

    /// Pulls an image from a registry on plain HTTP into containerd's own overlay snapshots.
    pub fn pull(&self, reference: &str) {
        let arguments = ["image", "pull", "--plain-http", "--snapshotter", "overlayfs", reference];
        self.ctr(&arguments).ok();
    }

    /// Mounts an image's unpacked root file system, read-only, at `to`.
    pub fn mount_image(&self, snapshotter: &str, reference: &str, to: &Path) {
        let to = to.to_str().unwrap();
        self.ctr(&["image", "mount", "--snapshotter", snapshotter, reference, to]).ok();
    }

    /// Mounts a view of the one image that a snapshotter has, at `to`, by the snapshots service:
    /// 1.6's `ctr image mount` knows containerd's own snapshotter only.
    pub fn mount_view(&self, snapshotter: &str, to: &Path) -> View<'_> {
        let table = self.ctr(&["snapshot", "--snapshotter", snapshotter, "ls"]).ok();
        let rows: Vec<Vec<_>> =
            table.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        let is_parent = |key: &str| rows.iter().any(|row| row.len() == 3 && row[1] == key);
        let mut tops = rows.iter().map(|row| row[0]).filter(|key| !is_parent(key));
        let top = tops.next().unwrap();
        assert!(tops.next().is_none(), "more than one image:\n{table}");
        let key = format!("view-{}", to.file_name().unwrap().to_str().unwrap());
        let arguments = ["snapshot", "--snapshotter", snapshotter, "view", "--target"];
        let arguments = [&arguments[..], &[to.to_str().unwrap(), &key, top]].concat();
        let label = ["snapshot", "--snapshotter", snapshotter, "label", &key];
        let label = [&label[..], &["containerd.io/gc.root=now"]].concat();
        // It prints the commands that mount it.
        let mut script = self.ctr(&arguments).ok();
        // No container or image refers to it: the garbage collector must be told, and may have
        // taken it before.
        while self.ctr(&label).code != 0 {
            script = self.ctr(&arguments).ok();
        }
        run(Command::new("sh").args(["-ec", &script])).ok();
        let snapshotter = snapshotter.to_owned();
        View { containerd: self, snapshotter, key, target: to.to_owned() }
    }

    /// Runs a command in a new container to its end and removes the container.
    pub fn run(&self, snapshotter: &str, reference: &str, id: &str, words: &[&str]) -> Outcome {
        let id = self.unique(id);
        let mut arguments = vec!["run", "--rm", "--snapshotter", snapshotter, reference, &id];
        arguments.extend(words);
        self.ctr(&arguments)
    }

    /// Starts a container that sleeps until it is removed.
    pub fn start_container(&self, snapshotter: &str, reference: &str, id: &str) -> Container<'_> {
        let id = self.unique(id);
        let arguments =
            ["run", "-d", "--snapshotter", snapshotter, reference, &id, "/bin/sleep", "100000"];
        self.ctr(&arguments).ok();
        Container { containerd: self, id }
    }

    /// Keys of the snapshots that a snapshotter has, in `ctr`'s namespace.
    pub fn snapshots(&self, snapshotter: &str) -> Vec<String> {
        first_words(&self.ctr(&["snapshot", "--snapshotter", snapshotter, "ls"]).ok(), 1)
    }

    /// Digests of the blobs in containerd's content store, in a namespace.
    pub fn content(&self, namespace: &str) -> Vec<String> {
        first_words(&self.ctr_in(namespace, &["content", "ls", "-q"]).ok(), 0)
    }

    /// Removes an image and waits for the garbage collector.
    pub fn remove_image(&self, reference: &str) {
        self.ctr(&["image", "rm", "--sync", reference]).ok();
    }

    /// runc keeps the containers of every containerd on the machine in one directory, by id.
    fn unique(&self, id: &str) -> String {
        format!("{id}-{}", self.dir.file_name().unwrap().to_str().unwrap())
    }

    fn ctr_command(&self, namespace: &str, arguments: &[&str]) -> Command {
        let mut command = program(self.programs.as_deref(), "ctr");
        command.arg("--address").arg(self.socket()).args(["--namespace", namespace]);
        command.args(arguments);
        command
    }

    fn wait_ready(&self) {
        wait_until("containerd answers", || {
            run(&mut self.ctr_command("default", &["version"])).code == 0
        });
    }

    /// Ends and removes all containers of `ctr`'s namespace.
    pub fn remove_containers(&self) {
        self.remove_containers_of("default");
    }

    fn remove_containers_of(&self, namespace: &str) {
        let list = run(&mut self.ctr_command(namespace, &["container", "ls", "-q"]));
        for id in first_words(&list.stdout, 0) {
            run(&mut self.ctr_command(namespace, &["task", "rm", "--force", &id]));
            run(&mut self.ctr_command(namespace, &["container", "rm", &id]));
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if self.service.is_running() {
            NAMESPACES.iter().for_each(|namespace| self.remove_containers_of(namespace));
        }
    }
}

/// An image's files, mounted; not any more when it is removed.
#[derive(Debug)]
pub struct View<'a> {
    containerd: &'a Containerd,
    snapshotter: String,
    key: String,
    target: PathBuf,
}

impl View<'_> {
    /// Unmounts it and removes its snapshot.
    pub fn remove(self) {
        run(Command::new("umount").arg(&self.target)).ok();
        let arguments = ["snapshot", "--snapshotter", &self.snapshotter, "rm", &self.key];
        self.containerd.ctr(&arguments).ok();
    }
}

/// A container that runs until it is removed.
#[derive(Debug)]
pub struct Container<'a> {
    containerd: &'a Containerd,
    id: String,
}

impl Container<'_> {
    /// Runs a command in the container.
    pub fn exec(&self, words: &[&str]) -> Outcome {
        let arguments = self.exec_arguments(words);
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        self.containerd.ctr(&arguments)
    }

    /// Starts a command in the container, and logs what it writes.
    pub fn start(&self, area: &Area, words: &[&str]) -> Service {
        let arguments = self.exec_arguments(words);
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        Service::start(area, "exec", self.containerd.ctr_command("default", &arguments))
    }

    fn exec_arguments(&self, words: &[&str]) -> Vec<String> {
        let number = self.containerd.exec_count.fetch_add(1, Ordering::Relaxed);
        let exec_id = format!("exec-{number}");
        let fixed = ["task", "exec", "--exec-id", &exec_id, &self.id];
        fixed.iter().chain(words).map(|word| (*word).to_owned()).collect()
    }

    /// Its root file system, as the host sees it.
    pub fn root(&self) -> PathBuf {
        let tasks = self.containerd.dir.join("state/io.containerd.runtime.v2.task/default");
        tasks.join(&self.id).join("rootfs")
    }

    /// Ends and removes it, and with it its snapshot.
    pub fn remove(self) {
        self.containerd.ctr(&["task", "rm", "--force", &self.id]).ok();
        self.containerd.ctr(&["container", "rm", &self.id]).ok();
    }
}

/// A program of containerd's, which finds its siblings first.
fn program(programs: Option<&Path>, name: &str) -> Command {
    let Some(programs) = programs else { return Command::new(name) };
    let mut command = Command::new(programs.join(name));
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{path}", programs.display()));
    command
}

fn command(programs: Option<&Path>, config: &Path) -> Command {
    let mut command = program(programs, "containerd");
    command.arg("--config").arg(config);
    command
}

fn first_words(table: &str, skip: usize) -> Vec<String> {
    let words = table.lines().skip(skip).filter_map(|line| line.split_whitespace().next());
    words.map(str::to_owned).collect()
}

fn config_text(dir: &Path, options: &ContainerdOptions) -> String {
    let of_2 = options.version == Version::V21;
    let mut text = basics(dir, options, of_2);
    if options.no_garbage_collection {
        text += "[plugins.\"io.containerd.gc.v1.scheduler\"]\n  startup_delay = \"24h\"\n  \
                 deletion_threshold = 0\n  mutation_threshold = 1000000000\n";
    }
    if let Some(socket) = &options.weightfs {
        let socket = socket.display();
        text +=
            &format!("[proxy_plugins.weightfs]\n  type = \"snapshot\"\n  address = \"{socket}\"\n");
        if of_2 {
            text += &exports(dir);
        }
    }
    match &options.cri {
        Some(cri) if of_2 => {
            text += &cri_of_2(dir, cri);
            if let Some(namespaces) = &cri.user_namespaces {
                text += &user_namespaces_of_2(dir, namespaces);
            }
        }
        Some(cri) => text += &cri_of_1(dir, cri),
        None => {}
    }
    text
}

fn basics(dir: &Path, options: &ContainerdOptions, of_2: bool) -> String {
    let dir = dir.display();
    let cri_off = match (&options.cri, of_2) {
        (Some(_), _) => "",
        (None, false) => "\"io.containerd.grpc.v1.cri\", ",
        (None, true) => {
            "\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\",
  \"io.containerd.cri.v1.runtime\", "
        }
    };
    let (version, nri_off) = if of_2 { (3, "\"io.containerd.nri.v1.nri\", ") } else { (2, "") };
    format!(
        r#"version = {version}
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = [{cri_off}{nri_off}"io.containerd.internal.v1.opt",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = "{dir}/c.sock"
[ttrpc]
  address = "{dir}/t.sock"
"#
    )
}

/// What containerd 2 must be told of a snapshotter to send it labels.
fn exports(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        r#"  [proxy_plugins.weightfs.exports]
    root = "{dir}"
    enable_remote_snapshot_annotations = "true"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "overlayfs"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "weightfs"
"#
    )
}

/// Sandboxes without CAP_SYS_RESOURCE can't lower oom scores, and have no AppArmor.
fn cri_of_1(dir: &Path, cri: &CriOptions) -> String {
    let dir = dir.display();
    format!(
        r#"[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{dir}/cni"
  conf_dir = "{dir}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "{}"
  disable_snapshot_annotations = false
"#,
        cri.sandbox_image, cri.snapshotter
    )
}

fn cri_of_2(dir: &Path, cri: &CriOptions) -> String {
    let plugins = match &cri.user_namespaces {
        Some(namespaces) => namespaces.cni_plugins.clone(),
        None => dir.join("cni"),
    };
    let (dir, plugins) = (dir.display(), plugins.display());
    format!(
        r#"[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "{}"
  disable_snapshot_annotations = false
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{plugins}"]
  conf_dir = "{dir}/cni"
"#,
        cri.snapshotter, cri.sandbox_image
    )
}

fn user_namespaces_of_2(dir: &Path, UserNamespaces { runtime, .. }: &UserNamespaces) -> String {
    let cni = dir.join("cni");
    fs::create_dir(&cni).unwrap();
    // A pair of devices with an address, and no way out.
    let network = serde_json::json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [{
            "type": "ptp",
            "ipam": {
                "type": "host-local",
                "subnet": "10.88.0.0/24",
                "dataDir": cni.join("addresses"),
            },
        }],
    });
    fs::write(cni.join("pods.conflist"), network.to_string()).unwrap();
    format!(
        r#"[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
  BinaryName = "{}"
"#,
        runtime.display()
    )
}
