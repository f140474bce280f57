//! The program under test: commands that end, mounts and daemons that run.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::area::{Area, is_mount_point};
use crate::network::NetHost;
use crate::process::{Outcome, Service, exit_code, run, run_within};
use crate::wait::{PATIENCE, wait_until};

/// The variable that names another binary.
const VARIABLE: &str = "WEIGHTFS_BIN";

/// A state directory with its configuration, and commands on them.
#[derive(Debug, Clone)]
pub struct Weightfs {
    binary: PathBuf,
    home: PathBuf,
    environment: Vec<(&'static str, String)>,
    /// Where its commands run, if not on this machine's network.
    host: Option<Arc<NetHost>>,
}

impl Weightfs {
    /// A new state directory in the area, with an empty configuration and no credentials.
    ///
    /// # Panics
    /// When the program is not built, or FUSE is missing.
    pub fn new(area: &Area) -> Self {
        assert!(Path::new("/dev/fuse").exists(), "/dev/fuse is missing: run `modprobe fuse`");
        let home = tempfile::Builder::new().prefix("w").tempdir_in(area.path()).unwrap().keep();
        fs::create_dir(home.join("root")).unwrap();
        let weightfs = Self { binary: binary(), home, environment: vec![], host: None };
        weightfs.configure("");
        weightfs
    }

    /// Adds to the configuration, which otherwise has the directories of this guard only, and
    /// leaves it to the machine how full its disk is.
    pub fn configure(&self, more: &str) {
        let home = self.home.display();
        let more = without_containerd(&without_min_free(more));
        let text = format!(
            "root = \"{home}/root\"\n\
             [snapshotter]\naddress = \"{home}/s.sock\"\n\
             [control]\naddress = \"{home}/ctl.sock\"\n\
             {more}\n"
        );
        fs::write(self.config(), text).unwrap();
    }

    /// Puts these credentials for a registry into docker's config.json.
    pub fn log_in(&self, registry: &str, user: &str, password: &str) {
        use base64::Engine as _;
        let auth = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        let text = serde_json::json!({ "auths": { registry: { "auth": auth } } }).to_string();
        fs::write(self.home.join("config.json"), text).unwrap();
    }

    /// Takes docker's config.json away.
    pub fn log_out(&self) {
        fs::remove_file(self.home.join("config.json")).unwrap();
    }

    /// The state directory.
    pub fn root(&self) -> PathBuf {
        self.home.join("root")
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.home.join("config.toml")
    }

    /// The snapshotter's socket, once a daemon runs.
    pub fn snapshotter_socket(&self) -> PathBuf {
        self.home.join("s.sock")
    }

    /// A command, not started. It sees the credentials of [`Weightfs::log_in`] and no proxy.
    pub fn command(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = match &self.host {
            None => Command::new(&self.binary),
            Some(host) => host.command(&self.binary),
        };
        command.args(arguments).env("DOCKER_CONFIG", &self.home);
        for name in ["http_proxy", "https_proxy", "all_proxy"] {
            command.env_remove(name).env_remove(name.to_uppercase());
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// With this variable in the environment of its commands.
    #[must_use]
    pub fn with_variable(mut self, name: &'static str, value: &str) -> Self {
        self.environment.push((name, value.to_owned()));
        self
    }

    /// With its commands on that host.
    #[must_use]
    pub fn on(mut self, host: &Arc<NetHost>) -> Self {
        self.host = Some(Arc::clone(host));
        self
    }

    /// Runs a command to its end.
    pub fn run(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Outcome {
        run(&mut self.command(arguments))
    }

    /// Runs a command on the state directory to its end.
    pub fn run_here(&self, arguments: &[&str]) -> Outcome {
        let mut command = self.command(arguments);
        run(command.arg("--config").arg(self.config()))
    }

    /// Mounts an artifact in the foreground and waits until it is there.
    ///
    /// # Panics
    /// When the program ends instead.
    pub fn mount(&self, area: &Area, reference: &str, dir: &Path) -> Mounted {
        self.mount_with(area, reference, dir, &[])
    }

    /// As [`Weightfs::mount`], with more arguments.
    ///
    /// # Panics
    /// When the program ends instead.
    pub fn mount_with(&self, area: &Area, reference: &str, dir: &Path, more: &[String]) -> Mounted {
        let mut command = self.mount_command(reference, dir);
        command.args(more);
        let mut service = Service::start(area, "weightfs-mount", command);
        service.wait_ready(|_| is_mount_point(dir).then_some(()));
        Mounted { service, dir: dir.to_owned() }
    }

    /// Tries to mount what can't be mounted, and gives how it ended.
    ///
    /// # Panics
    /// When it does not end.
    pub fn mount_fails(&self, reference: &str, dir: &Path) -> Outcome {
        run(&mut self.mount_command(reference, dir))
    }

    /// Starts the daemon and waits until it serves.
    ///
    /// # Panics
    /// When the program ends instead.
    pub fn serve(&self, area: &Area) -> Daemon {
        let mut service = Service::start(area, "weightfs-serve", self.serve_command());
        service.wait_ready(|service| service.log().contains("serving").then_some(()));
        Daemon { service, kept: false }
    }

    /// Starts the daemon under a keeper and waits until it serves.
    ///
    /// # Panics
    /// When the keeper ends instead.
    pub fn serve_kept(&self, area: &Area) -> Daemon {
        let mut command = self.command(["keeper", "--"]);
        let serve = self.serve_command();
        command.arg(serve.get_program()).args(serve.get_args());
        let mut service = Service::start(area, "weightfs-keeper", command);
        service.wait_ready(|service| (starts(service) == 1).then_some(()));
        Daemon { service, kept: true }
    }

    /// The same state directory, run by another binary.
    #[must_use]
    pub fn with_binary(&self, binary: &Path) -> Self {
        Self { binary: binary.to_owned(), ..self.clone() }
    }

    /// The daemon's command, not started.
    pub fn serve_command(&self) -> Command {
        let mut command = self.command(["serve", "--config"]);
        command.arg(self.config());
        command
    }

    /// Pulls an image lazily into containerd.
    pub fn rpull(&self, containerd: &Path, reference: &str) -> Outcome {
        let mut command = self.command(["rpull", reference, "--address"]);
        run_within(2 * PATIENCE, command.arg(containerd))
    }

    fn mount_command(&self, reference: &str, dir: &Path) -> Command {
        let mut command = self.command(["mount", "--foreground", reference]);
        command.arg(dir).arg("--root").arg(self.root()).arg("--config").arg(self.config());
        command
    }
}

/// A configuration whose cache keeps nothing free, unless it says so itself.
fn without_min_free(text: &str) -> String {
    const TABLE: &str = "[cache]\n";
    const KEY: &str = "min_free = \"0B\"\n";
    match text.split_once(TABLE) {
        _ if text.contains("min_free") => text.to_owned(),
        Some((before, after)) => [before, TABLE, KEY, after].concat(),
        None => [text, "\n", TABLE, KEY].concat(),
    }
}

/// A configuration that does not look at this machine's containerd, unless it says so itself.
fn without_containerd(text: &str) -> String {
    match text.contains("[containerd]") {
        true => text.to_owned(),
        false => format!("{text}\n[containerd]\nconfig = \"/nonexistent/containerd.toml\"\n"),
    }
}

/// A mount that a foreground process serves.
#[derive(Debug)]
pub struct Mounted {
    service: Service,
    dir: PathBuf,
}

impl Mounted {
    /// The process's id.
    pub fn pid(&self) -> Pid {
        self.service.pid()
    }

    /// Where it is mounted.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the process has written.
    pub fn log(&self) -> String {
        self.service.log()
    }

    /// Ends it as Ctrl-C does.
    ///
    /// # Panics
    /// When it does not end well or leaves its mount.
    pub fn stop(mut self) {
        self.service.signal(Signal::SIGINT);
        self.assert_ends_well();
    }

    /// Waits for the end that something else brings about.
    ///
    /// # Panics
    /// When it does not end well or leaves its mount.
    pub fn assert_ends_well(&mut self) {
        let code = exit_code(self.service.wait());
        assert_eq!(code, 0, "{}", self.service.log());
        assert!(!is_mount_point(&self.dir), "{} is left mounted", self.dir.display());
    }
}

/// A running daemon, maybe under a keeper.
#[derive(Debug)]
pub struct Daemon {
    service: Service,
    kept: bool,
}

impl Daemon {
    /// Its process id; of a kept daemon that of the keeper.
    pub fn pid(&self) -> Pid {
        self.service.pid()
    }

    /// How often a daemon came to serve so far.
    pub fn starts(&self) -> usize {
        starts(&self.service)
    }

    /// Kills a kept daemon, as a crash would, waits until it is dead, and leaves its keeper. `None`
    /// while there is none.
    pub fn kill_kept(&self) -> Option<()> {
        let child = self.child()?;
        kill(child, Signal::SIGKILL).ok()?;
        wait_until("the daemon is dead", || {
            let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
            let threads = fs::read_dir(format!("/proc/{child}/task")).map_or(0, Iterator::count);
            // A keeper that is stopped does not bury it; and its files close with its last thread.
            threads == 0 || (threads == 1 && status.contains("State:\tZ"))
        });
        Some(())
    }

    /// The process that the keeper runs.
    ///
    /// # Panics
    /// When there is no keeper.
    pub fn child(&self) -> Option<Pid> {
        assert!(self.kept, "no keeper, no child");
        let pid = self.service.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        children.split_whitespace().next().map(|child| Pid::from_raw(child.parse().unwrap()))
    }

    /// Sends a signal to the daemon; of a kept one to the keeper.
    pub fn signal(&self, signal: Signal) {
        self.service.signal(signal);
    }

    /// Waits until a daemon came to serve that often.
    pub fn wait_starts(&self, count: usize) {
        wait_until("the daemon serves again", || self.starts() >= count);
    }

    /// What it has written.
    pub fn log(&self) -> String {
        self.service.log()
    }

    /// Waits for the end that something else brings about.
    ///
    /// # Panics
    /// When it does not end well.
    pub fn assert_ends_well(&mut self) {
        assert_eq!(exit_code(self.service.wait()), 0, "{}", self.service.log());
    }

    /// Ends it as systemd does.
    ///
    /// # Panics
    /// When it does not end well.
    pub fn stop(mut self) {
        self.service.signal(Signal::SIGTERM);
        self.assert_ends_well();
    }

    /// Kills it, as a crash would.
    pub fn kill(mut self) {
        self.service.kill();
    }
}

fn starts(service: &Service) -> usize {
    service.log().matches("INFO serving").count()
}

/// Unmounts through the program and waits until the directory is no mount point.
pub fn umount(weightfs: &Weightfs, dir: &Path) {
    let dir_text = dir.to_str().unwrap();
    weightfs.run(["umount", dir_text, "--root", weightfs.root().to_str().unwrap()]).ok();
    wait_until("the directory is unmounted", || !is_mount_point(dir));
}

/// The binary of the same build as the running program.
///
/// # Panics
/// When it is not there.
pub fn binary() -> PathBuf {
    if let Some(named) = std::env::var_os(VARIABLE) {
        return named.into();
    }
    let me = std::env::current_exe().unwrap();
    // Programs are in <target>/<profile>, tests in <target>/<profile>/deps.
    let mut places = me.ancestors().skip(1).take(2).map(|dir| dir.join("weightfs"));
    places.find(|place| place.is_file()).unwrap_or_else(|| {
        panic!("weightfs is not built: run `cargo build -p weightfs`, or name it in {VARIABLE}")
    })
}
