//! `weightfs mount`: by the daemon if one owns the state directory, else by this process.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;
use weightfs::bind::bind;
use weightfs::cli::MountArgs;
use weightfs::config::Config;
use weightfs::control;
use weightfs::indexes;
use weightfs::owner;
use weightfs::profiles;
use weightfs::publish::Publisher;
use weightfs::trees::TreesError;
use weightfs_fusefs::session::detach;
use weightfs_fusefs::{Filesystem, Misses, Recorder, Session, SpecialFiles, TreeNumber};
use weightfs_proto::control::{MountRequest, Mounted, ReleaseRequest, StatusRequest};
use weightfs_store::{Digest, OpenError, Store};

use super::progress::{Downloads, Fetched, MountLine, REFRESH};

/// The one tree of a mount without a daemon.
const TREE: TreeNumber = TreeNumber(1);

/// What a background mount prints when it is up.
const READY: &str = "ready";

/// File in the state directory that a background mount logs to.
const LOG_FILE: &str = "mount.log";

/// Starts this program again as a process of its own, and waits until its mount is up. Errors
/// appear on stderr as they would in the foreground.
pub fn in_background(arguments: &MountArgs) -> anyhow::Result<()> {
    check_mountpoint(&arguments.dir)?;
    let program = std::env::current_exe().context("can't find this program")?;
    let others = std::env::args_os().skip(1).filter(|argument| argument != "--daemon");
    let mut command = Command::new(program);
    command.args(others).arg("--detached").stdin(Stdio::null()).stdout(Stdio::piped());
    // SAFETY: setsid is async-signal-safe, and nothing else runs between fork and exec.
    #[expect(unsafe_code, reason = "a session of its own needs a call between fork and exec")]
    unsafe {
        command.pre_exec(|| Ok(nix::unistd::setsid().map(drop)?));
    }
    let mut child = command.spawn().context("can't start the background process")?;
    let output = child.stdout.take().context("no pipe to the background process")?;
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line).context("the background process")?;
    if line.trim_end() == READY {
        return Ok(());
    }
    let status = child.wait().context("the background process")?;
    // It has said why.
    std::process::exit(status.code().unwrap_or(1));
}

/// Mounts, and stays until a signal or an unmount.
pub async fn run(config: &Config, arguments: &MountArgs) -> anyhow::Result<()> {
    // One for the whole life of the mount: a signal that comes between two would be lost.
    let stop = asked_to_stop();
    tokio::pin!(stop);
    let target = check_mountpoint(&arguments.dir)?;
    // Asked first: while a daemon is replaced nobody has the lock, but its socket is there.
    if let Some(address) = owner::control_address(&config.root)
        && UnixStream::connect(&address).await.is_ok()
    {
        return ask_daemon(&address, arguments, &target, stop).await;
    }
    match Store::open(&config.root, config.store_options()) {
        Ok(store) => serve_here(config, arguments, &target, store, stop).await,
        Err(OpenError::Owned { root, pid }) => {
            let address = owner::control_address(&root).with_context(|| {
                format!("{} is in use by process {pid}; use another --root", root.display())
            })?;
            ask_daemon(&address, arguments, &target, stop).await
        }
        Err(error) => Err(error.into()),
    }
}

/// The directory, absolute; it must be empty and nothing mounted there.
fn check_mountpoint(dir: &Path) -> anyhow::Result<PathBuf> {
    let name = dir.display();
    let advice = "give an empty directory";
    let target = dir.canonicalize().with_context(|| format!("mount point {name}; {advice}"))?;
    let mut entries = target.read_dir().with_context(|| format!("mount point {name}; {advice}"))?;
    if entries.next().is_some() {
        bail!("mount point {name} is not empty; {advice}");
    }
    if owner::is_mountpoint(&target)? {
        bail!("something is mounted on {name} already; unmount it or {advice}");
    }
    Ok(target)
}

async fn serve_here(
    config: &Config,
    arguments: &MountArgs,
    target: &Path,
    store: Arc<Store>,
    mut stop: Stop<'_>,
) -> anyhow::Result<()> {
    let opener = super::opener(config, Arc::clone(&store))?;
    let given = arguments.profile.as_deref().map(profiles::read).transpose()?;
    let index = match &arguments.index {
        Some(path) => {
            let bytes = indexes::read(path.clone()).await;
            Some(bytes.with_context(|| format!("the index {}", path.display()))?)
        }
        None => None,
    };
    let downloads = Downloads::new("unpacking compressed layers");
    let opened = async {
        let artifact = opener.resolve(&arguments.reference).await?;
        let tree = opener.open_by(&artifact, index, &downloads).await?;
        let (name, digest) = (arguments.reference.whole(), artifact.manifest_digest);
        opener.remember(&name, digest, &tree.record).await;
        Ok::<_, TreesError>((digest, tree))
    };
    let (manifest, tree) = tokio::select! {
        opened = opened => opened?,
        () = &mut stop => return Ok(()),
    };
    downloads.finish();
    store.start_evicting();
    let publisher = Publisher::start(config, &opener);
    if let Some(profile) = profiles::choose(&store, manifest, given)? {
        info!(bytes = profile.bytes(), "fetching in the order of an earlier load");
        profile.expect(&tree.layers);
    }
    let merged = tree.merge()?;
    let files = merged.files();
    let filesystem = Arc::new(Filesystem::of_one(TREE, merged).context("no memory")?);
    let recording = arguments.record.as_ref().map(|file| Recording {
        file: file.as_deref(),
        recorder: Recorder::new(&tree.layers),
        manifest,
    });
    if let Some(recording) = &recording {
        filesystem.record(TREE, Arc::clone(&recording.recorder));
    }
    let misses = Misses { runtime: Handle::current(), deadline: config.fetch.deadline };
    let session = Session::mount(filesystem, target, SpecialFiles::Inert, misses)
        .with_context(|| format!("can't mount on {}", target.display()))?;
    info!(reference = %arguments.reference, dir = %target.display(), files, "mounted");
    if arguments.detached {
        detach_output(&config.root)?;
    }
    let mut line = MountLine::new();
    loop {
        tokio::select! {
            () = &mut stop => break,
            () = session.ended() => break,
            () = tokio::time::sleep(REFRESH) => {
                let stats = tree.stats();
                let (cached, size, fetched) = (stats.cached, stats.size, stats.fetched);
                line.show(Fetched { files, cached, size, fetched });
            }
        }
    }
    line.finish();
    drop(publisher);
    // Unmounting waits for the FUSE threads.
    tokio::task::spawn_blocking(move || session.unmount())
        .await?
        .with_context(|| format!("can't unmount {}", target.display()))?;
    store.checkpoint().context("the cache was not recorded")?;
    recording.map_or(Ok(()), |recording| recording.write(&store))
}

/// A load that is recorded.
struct Recording<'a> {
    /// Where to write it, if not into the store.
    file: Option<&'a Path>,
    recorder: Arc<Recorder>,
    manifest: Digest,
}

impl Recording<'_> {
    fn write(&self, store: &Store) -> anyhow::Result<()> {
        let profile = self.recorder.profile(self.manifest);
        info!(bytes = profile.bytes(), manifest = %self.manifest, "load recorded");
        match self.file {
            None => profiles::keep(store, &profile).context("the recorded profile"),
            Some(path) => std::fs::write(path, profile.encode())
                .with_context(|| format!("the recorded profile, {}", path.display())),
        }
    }
}

async fn ask_daemon(
    address: &Path,
    arguments: &MountArgs,
    target: &Path,
    mut stop: Stop<'_>,
) -> anyhow::Result<()> {
    let mut daemon = control::connect(address)
        .await
        .with_context(|| format!("the daemon's control socket {}", address.display()))?;
    if arguments.record.is_some() {
        bail!(
            "a daemon owns the state directory, and only a mount of its own is recorded: \
             give --root an empty directory and --record a file, and mount with --profile then"
        );
    }
    let profile = arguments.profile.as_deref().map(profiles::read).transpose()?;
    let index = arguments.index.as_deref().map(std::path::absolute).transpose()?;
    let request = MountRequest {
        reference: arguments.reference.whole(),
        target: target.display().to_string(),
        profile: profile.map(|profile| profile.encode()).unwrap_or_default(),
        index: index.map(|path| path.display().to_string()).unwrap_or_default(),
    };
    let downloads = Downloads::new("unpacking compressed layers");
    let mounted = async {
        let events = daemon.mount(request).await?.into_inner();
        let show = |download: weightfs_proto::control::Download| {
            downloads.show(&download.layer_digest, download.bytes, download.total);
        };
        control::mounted(events, show).await
    };
    let mounted = tokio::select! {
        mounted = mounted => mounted.map_err(|status| anyhow::anyhow!("{}", status.message()))?,
        () = &mut stop => return Ok(()),
    };
    downloads.finish();
    let release = ReleaseRequest { tree: mounted.tree };
    if let Err(error) = bind(Path::new(&mounted.directory), target) {
        // Should that fail as well, status shows the model.
        daemon.release(release).await.ok();
        let (directory, target) = (&mounted.directory, target.display());
        return Err(error).with_context(|| format!("can't bind {directory} to {target}"));
    }
    info!(reference = %arguments.reference, dir = %target.display(), "mounted by the daemon");
    if arguments.detached {
        println!("{READY}");
        return Ok(());
    }
    let watched = watch(&mut daemon, address, &mounted, target, stop).await;
    if owner::is_mountpoint(target).unwrap_or(true) {
        detach(target).with_context(|| format!("can't unmount {}", target.display()))?;
    }
    watched?;
    daemon.release(release).await.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
    Ok(())
}

/// Shows how the mount goes until a signal, an unmount, or the daemon's end. A daemon that is
/// replaced has not ended: its socket is there all the time.
async fn watch(
    daemon: &mut weightfs_proto::control::control_client::ControlClient<tonic::transport::Channel>,
    address: &Path,
    mounted: &Mounted,
    target: &Path,
    mut stop: Stop<'_>,
) -> anyhow::Result<()> {
    let mut line = MountLine::new();
    loop {
        tokio::select! {
            () = &mut stop => break,
            () = tokio::time::sleep(REFRESH) => {}
        }
        let status = daemon.status(StatusRequest::default()).await;
        let Ok(status) = status.map(tonic::Response::into_inner) else {
            if UnixStream::connect(address).await.is_ok() {
                continue;
            }
            line.finish();
            bail!("the daemon went away; {} is unmounted", target.display());
        };
        let model = status.models.into_iter().find(|model| model.tree == mounted.tree);
        let Some(model) = model else { break };
        line.show(Fetched {
            files: model.files,
            cached: model.cached,
            size: model.size,
            fetched: model.fetched,
        });
    }
    line.finish();
    Ok(())
}

/// Tells the waiting parent that the mount is up, and logs to a file from now on.
fn detach_output(root: &Path) -> anyhow::Result<()> {
    let path = root.join(LOG_FILE);
    let log = std::fs::File::options().create(true).append(true).open(&path);
    let log = log.with_context(|| format!("log file {}", path.display()))?;
    let mut output = std::io::stdout();
    writeln!(output, "{READY}").and_then(|()| output.flush()).context("the waiting parent")?;
    nix::unistd::dup2_stdout(log.as_fd()).context("log file")?;
    nix::unistd::dup2_stderr(log.as_fd()).context("log file")?;
    Ok(())
}

/// Waits for a signal to stop.
type Stop<'a> = Pin<&'a mut dyn Future<Output = ()>>;

/// Waits for SIGINT, SIGTERM or SIGHUP; counts them from the call on.
fn asked_to_stop() -> impl Future<Output = ()> {
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let mut signals: Vec<_> = kinds.into_iter().filter_map(|kind| signal(kind).ok()).collect();
    async move {
        let waits = signals.iter_mut().map(|signal| Box::pin(signal.recv()));
        futures::future::select_all(waits).await;
    }
}
