//! The daemon dies, restarts and is replaced while containers read: nothing fails, nothing is
//! wrong. `WEIGHTFS_ROUNDS` sets how often it is killed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use weightfs_tests::area::is_mount_point;
use weightfs_tests::cri::Cri;
use weightfs_tests::host::SNAPSHOTTER;
use weightfs_tests::layer::{Attributes, Compression, Layer, LayerBuilder};
use weightfs_tests::many::mount_in_background;
use weightfs_tests::model::{SMALL_MODEL, noise, write_safetensors};
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::process::{Service, run};
use weightfs_tests::readers::{Figures, Pulse, Readers, Way};
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::weightfs::{Daemon, binary, umount};
use weightfs_tests::{Bed, Fault, Host, Many, Target, digest, wait_until};

const MIB: u64 = 1 << 20;

/// Times that the daemon is killed, if nothing else is asked for.
const ROUNDS: u32 = 10;

/// Upper bound of the random time between two kills, from the moment that the daemon serves.
const BETWEEN_KILLS: Duration = Duration::from_millis(400);

fn rounds() -> u32 {
    std::env::var("WEIGHTFS_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap())
}

/// A layer with a file that is read slowly and one that is soon complete, and where their bytes
/// are.
struct Files {
    layer: Layer,
    large: PathBuf,
    small: PathBuf,
}

impl Files {
    fn make(bed: &Bed) -> Self {
        let [large, small] = ["large", "small"].map(|name| bed.area.path().join(name));
        write_safetensors(&large, 192 * MIB, 1).unwrap();
        write_safetensors(&small, 8 * MIB, 2).unwrap();
        let attributes = Attributes::mode(0o644);
        let layer = LayerBuilder::new(bed.area.path())
            .dir("models", &Attributes::mode(0o755))
            .file_from("models/large", &large, &attributes)
            .file_from("models/small", &small, &attributes)
            .finish(Compression::Plain);
        Self { layer, large, small }
    }

    /// Asserts that a container's sums are those of the files, all of them.
    fn assert_sums(&self, log: &str) {
        let sum = |path: &Path, name| format!("{}  {name}", digest::of_file(path).unwrap().hex());
        let right = [sum(&self.large, "/models/large"), sum(&self.small, "/models/small")];
        // The last line may be cut.
        let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
        assert!(whole.lines().count() > 0, "nothing was read: {log}");
        assert!(whole.lines().all(|line| right.iter().any(|right| right == line)), "{log}");
    }

    /// Readers of both files, in every way, below a container's root.
    fn read(&self, root: &Path) -> Readers {
        let mut readers = Readers::default();
        let [large, small] = ["large", "small"].map(|name| root.join("models").join(name));
        fs::read(&small).unwrap();
        for way in [Way::Read, Way::Open, Way::Map, Way::Direct] {
            readers.start(way, &large, &self.large);
            readers.start(way, &small, &self.small);
        }
        readers
    }
}

fn report(what: &str, pause: Duration, Figures { reads, longest }: Figures) {
    eprintln!("{what}: longest pause {pause:?}; {reads} reads, the longest {longest:?}");
}

/// A container's commands that read all the time, to be started beside a container.
fn reading_forever() -> [&'static str; 3] {
    let script = "while sha256sum /models/small && sha256sum /models/large; do :; done";
    ["/bin/sh", "-c", script]
}

/// The program of this build, and one of other bytes, by turns at the same path.
struct Builds {
    program: PathBuf,
    this: PathBuf,
    next: PathBuf,
}

impl Builds {
    fn new(bed: &Bed) -> Self {
        let [program, this, next] =
            ["weightfs", "weightfs.this", "weightfs.next"].map(|name| bed.area.path().join(name));
        run(Command::new("strip").arg("-o").arg(&this).arg(binary())).ok();
        let mut bytes = fs::read(&this).unwrap();
        bytes.extend_from_slice(b"another build");
        fs::write(&next, bytes).unwrap();
        fs::set_permissions(&next, fs::metadata(&this).unwrap().permissions()).unwrap();
        let builds = Self { program, this, next };
        builds.install(false);
        builds
    }

    /// Puts one of them in the program's place, as a package manager does.
    fn install(&self, next: bool) {
        let new = self.program.with_extension("new");
        fs::copy(if next { &self.next } else { &self.this }, &new).unwrap();
        fs::rename(new, &self.program).unwrap();
    }

    /// Whether the daemon is the other build.
    fn is_next(&self, daemon: &Daemon) -> bool {
        let pid = daemon.child().expect("a daemon runs");
        let runs = fs::read(format!("/proc/{pid}/exe")).unwrap();
        let [this, next] = [&self.this, &self.next].map(|build| fs::read(build).unwrap() == runs);
        assert_ne!(this, next, "it is one of them");
        next
    }
}

#[test]
fn kills_and_upgrades_at_any_moment_lose_no_read() {
    let bed = Bed::new();
    let builds = Builds::new(&bed);
    let daemon = bed.weightfs.with_binary(&builds.program).serve_kept(&bed.area);
    let host = Host::beside(bed, daemon);
    // Reads are under way most of the time.
    host.bed.proxy.fail(Target::Blobs, Fault::Delay(Duration::from_millis(30)));
    let files = Files::make(&host.bed);
    let (reference, _) = host.push_image("images/killed", std::slice::from_ref(&files.layer));
    host.rpull(&reference);
    let container = host.containerd.start_container(SNAPSHOTTER, &reference, "killed");
    let mut inside = container.start(&host.bed.area, &reading_forever());
    let readers = files.read(&container.root());
    let pulse = Pulse::start(host.bed.weightfs.root().join("mnt"));
    for round in 1..=rounds() {
        // Not to hide a race but to be anywhere in one.
        std::thread::sleep(BETWEEN_KILLS.mul_f64(fastrand::f64()));
        // Each third time another build takes over, one older or newer.
        if round % 3 == 0 {
            builds.install(round % 2 == 0);
        }
        let reads = readers.reads();
        let starts = host.daemon.starts();
        host.daemon.kill_kept().expect("a daemon runs");
        host.daemon.wait_starts(starts + 1);
        wait_until("readers go on", || readers.reads() > reads + 20);
        assert_eq!(host.daemon.starts(), starts + 1, "it died by itself in round {round}");
    }
    let pause = pulse.finish();
    let figures = readers.finish();
    inside.kill();
    files.assert_sums(&inside.log());
    report(&format!("{} kills", rounds()), pause, figures);
    container.remove();
    host.containerd.remove_image(&reference);
    host.assert_nothing_left();
}

#[test]
fn kills_in_rapid_succession_lose_no_read() {
    let host = Host::with_keeper();
    let files = Files::make(&host.bed);
    let (reference, _) = host.push_image("images/rapid", std::slice::from_ref(&files.layer));
    host.rpull(&reference);
    let container = host.containerd.start_container(SNAPSHOTTER, &reference, "rapid");
    let readers = files.read(&container.root());
    // Also while it starts, and while it takes over.
    for _ in 0..3 * rounds() {
        std::thread::sleep(Duration::from_millis(fastrand::u64(0..60)));
        host.daemon.kill_kept();
    }
    let reads = readers.reads();
    wait_until("readers go on", || readers.reads() > reads + 20);
    readers.finish();
    container.remove();
}

#[test]
fn another_build_takes_over() {
    let bed = Bed::new();
    let builds = Builds::new(&bed);
    let daemon = bed.weightfs.with_binary(&builds.program).serve_kept(&bed.area);
    let host = Host::beside(bed, daemon);
    let files = Files::make(&host.bed);
    let (reference, _) = host.push_image("images/upgraded", std::slice::from_ref(&files.layer));
    host.rpull(&reference);
    let container = host.containerd.start_container(SNAPSHOTTER, &reference, "upgraded");
    let readers = files.read(&container.root());
    let pulse = Pulse::start(host.bed.weightfs.root().join("mnt"));
    assert!(!builds.is_next(&host.daemon));
    builds.install(true);
    let reads = readers.reads();
    host.daemon.signal(Signal::SIGHUP);
    host.daemon.wait_starts(2);
    assert!(builds.is_next(&host.daemon));
    wait_until("readers go on", || readers.reads() > reads + 20);
    report("an upgrade", pulse.finish(), readers.finish());
    container.remove();
    host.containerd.remove_image(&reference);
    host.assert_nothing_left();
}

#[test]
fn the_daemon_and_containerd_restart_in_either_order() {
    let mut host = Host::with_keeper();
    let files = Files::make(&host.bed);
    let (reference, _) = host.push_image("images/both", std::slice::from_ref(&files.layer));
    host.rpull(&reference);
    let before = host.containerd.snapshots(SNAPSHOTTER);
    let root = host.containerd.start_container(SNAPSHOTTER, &reference, "both").root();
    let readers = files.read(&root);
    for daemon_first in [true, false] {
        let starts = host.daemon.starts();
        if daemon_first {
            host.daemon.kill_kept().unwrap();
            host.containerd.restart(&host.bed.area);
        } else {
            host.containerd.restart(&host.bed.area);
            host.daemon.kill_kept().unwrap();
        }
        host.daemon.wait_starts(starts + 1);
        let names = host.containerd.snapshots(SNAPSHOTTER);
        assert!(before.iter().all(|name| names.contains(name)), "{names:?}");
        let again = host.containerd.run(SNAPSHOTTER, &reference, "again", &["/bin/true"]);
        assert_eq!(again.code, 0, "{again}");
    }
    readers.finish();
}

#[test]
fn containerd_that_starts_while_no_daemon_runs_waits_for_it() {
    let mut host = Host::with_keeper_and_cri();
    let files = Files::make(&host.bed);
    let (reference, _) = host.push_image_below("images/waiting", &[files.layer]);
    let cri = Cri::connect(&host.containerd, &host.bed.area.dir("pods"));
    cri.pull(&reference).unwrap();
    // A keeper that is stopped starts nothing.
    host.daemon.signal(Signal::SIGSTOP);
    host.daemon.kill_kept().unwrap();
    let Host { containerd, daemon, bed } = &mut host;
    containerd.restart_and(&bed.area, || daemon.signal(Signal::SIGCONT));
    let cri = Cri::connect(&host.containerd, &host.bed.area.dir("pods"));
    wait_until("CRI knows its images", || cri.tags().is_ok());
    assert!(cri.tags().unwrap().contains(&reference), "CRI dropped the image");
    let ended = cri.run(&reference, "waited", &["/bin/sha256sum", "/models/small"]).unwrap();
    assert!(ended.output.starts_with(&digest::of_file(&files.small).unwrap().hex()), "{ended:?}");
}

#[test]
fn calls_wait_for_the_next_daemon() {
    let host = Host::with_keeper();
    host.daemon.signal(Signal::SIGSTOP);
    host.daemon.kill_kept().unwrap();
    let root = host.bed.weightfs.root();
    let mut command = host.bed.weightfs.command(["status", "--root"]);
    let mut status = Service::start(&host.bed.area, "status", {
        command.arg(root);
        command
    });
    let snapshots = std::thread::scope(|scope| {
        let listed = scope.spawn(|| host.containerd.snapshots(SNAPSHOTTER));
        host.daemon.signal(Signal::SIGCONT);
        listed.join().unwrap()
    });
    assert!(snapshots.is_empty());
    assert!(status.wait().success());
    assert!(status.log().contains("weightfs keeper keeps the mount"), "{}", status.log());
}

#[test]
fn a_restart_asks_no_registry() {
    let host = Host::with_keeper();
    let files = Files::make(&host.bed);
    let (reference, _) = host.push_image("images/offline", std::slice::from_ref(&files.layer));
    host.rpull(&reference);
    let container = host.containerd.start_container(SNAPSHOTTER, &reference, "offline");
    let small = container.root().join("models/small");
    let expected = fs::read(&files.small).unwrap();
    assert!(fs::read(&small).unwrap() == expected);
    host.bed.proxy.refuse();
    host.daemon.signal(Signal::SIGHUP);
    host.daemon.wait_starts(2);
    assert!(fs::read(&small).unwrap() == expected, "what is cached");
    let again = host.containerd.run(SNAPSHOTTER, &reference, "new", &["/bin/ls", "/models"]);
    assert_eq!(again.ok(), "large\nsmall\n");
    host.bed.proxy.accept();
    assert!(
        fs::read(container.root().join("models/large")).unwrap() == fs::read(&files.large).unwrap()
    );
    container.remove();
}

/// A lazy layer whose only file is being read from a source that gives nothing any more.
struct Stalled {
    host: Host,
    reference: String,
    root: PathBuf,
    readers: Vec<Service>,
}

impl Stalled {
    fn new() -> Self {
        let bed = Bed::new();
        // Nothing ends because of it.
        bed.weightfs.configure("[fetch]\ndeadline = \"1h\"");
        let daemon = bed.weightfs.serve_kept(&bed.area);
        let host = Host::beside(bed, daemon);
        let source = host.bed.area.path().join("weights");
        write_safetensors(&source, 64 * MIB, 1).unwrap();
        let layer = host.weights_layer(&source, "weights");
        let (reference, _) = host.push_image("images/stalled", std::slice::from_ref(&layer));
        host.rpull(&reference);
        let root = host.containerd.start_container(SNAPSHOTTER, &reference, "stalled").root();
        host.bed.proxy.forget();
        host.bed.proxy.fail(Target::Blob(layer.blob.digest), Fault::Hang);
        let file = root.join("models/weights");
        let readers: Vec<_> =
            [("read", "import sys; open(sys.argv[1], 'rb').read()"), ("map", MAP)]
                .into_iter()
                .map(|(name, script)| {
                    let mut command = Command::new("python3");
                    command.args(["-c", script]).arg(&file);
                    Service::start(&host.bed.area, name, command)
                })
                .collect();
        wait_until("somebody reads", || !host.bed.proxy.seen().is_empty());
        Self { host, reference, root, readers }
    }
}

/// Reads the first byte through a mapping.
const MAP: &str = "import sys, mmap; file = open(sys.argv[1], 'rb'); \
                   mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[0]";

#[test]
fn readers_of_a_stalled_source_can_be_killed() {
    let mut stalled = Stalled::new();
    for reader in &mut stalled.readers {
        assert!(reader.is_running());
        reader.signal(Signal::SIGKILL);
        reader.wait();
    }
}

#[test]
fn containers_and_images_can_be_removed_while_the_source_stalls() {
    let Stalled { host, reference, root, readers } = Stalled::new();
    drop(readers);
    host.containerd.remove_containers();
    assert!(!is_mount_point(&root));
    host.containerd.remove_image(&reference);
    host.assert_nothing_left();
}

#[test]
fn readers_of_a_stalled_source_go_on_after_a_restart() {
    let mut stalled = Stalled::new();
    stalled.host.daemon.kill_kept().unwrap();
    stalled.host.daemon.wait_starts(2);
    stalled.host.bed.proxy.heal();
    for reader in &mut stalled.readers {
        assert!(reader.wait().success(), "{}", reader.log());
    }
}

#[test]
fn a_removed_image_is_served_on_to_who_has_it_open() {
    let host = Host::with_keeper();
    let files = Files::make(&host.bed);
    let (reference, _) = host.push_image("images/removed", std::slice::from_ref(&files.layer));
    host.rpull(&reference);
    let mnt = host.bed.weightfs.root().join("mnt");
    let tree = fs::read_dir(&mnt).unwrap().next().unwrap().unwrap().path();
    let open = File::open(tree.join("models/large")).unwrap();
    let directory = File::open(tree.join("models")).unwrap();
    host.containerd.remove_image(&reference);
    wait_until("the tree is gone", || fs::read_dir(&mnt).unwrap().next().is_none());
    for round in 0..2 {
        host.daemon.kill_kept().unwrap();
        host.daemon.wait_starts(2 + round);
        let offset = 64 * MIB * (1 + round as u64);
        let (mut bytes, mut expected) = (vec![0; 4096], vec![0; 4096]);
        open.read_exact_at(&mut bytes, offset).unwrap();
        File::open(&files.large).unwrap().read_exact_at(&mut expected, offset).unwrap();
        assert!(bytes == expected);
        let below = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&directory));
        let small = fs::read(Path::new(&below).join("small")).unwrap();
        assert!(small == fs::read(&files.small).unwrap());
    }
    drop((open, directory));
    host.assert_nothing_left();
}

/// Snapshots that a daemon has to show again, if nothing else is asked for; a fifth as many models.
const MANY: usize = 50;

#[test]
fn many_snapshots_and_models_are_there_again_without_a_registry() {
    let many = std::env::var("WEIGHTFS_MANY").map_or(MANY, |many| many.parse().unwrap());
    let host = Host::with_keeper();
    let Many { snapshots, models } = Many::new(&host, many, many / 5);
    host.bed.proxy.refuse();
    let pulse = Pulse::start(host.bed.weightfs.root().join("mnt"));
    host.daemon.kill_kept().unwrap();
    host.daemon.wait_starts(2);
    let pause = pulse.finish();
    eprintln!("{many} snapshots, {} models: longest pause {pause:?}", models.len());
    for target in &models {
        assert_eq!(fs::metadata(target.join("w")).unwrap().len(), 4096);
    }
    let mnt = fs::read_dir(host.bed.weightfs.root().join("mnt")).unwrap();
    assert_eq!(mnt.count(), many + models.len());
    assert_eq!(snapshots.list(&[]).unwrap().len(), many);
}

#[test]
fn mounted_models_outlive_the_daemon() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/kept");
    let daemon = bed.weightfs.serve_kept(&bed.area);
    let foreground = bed.mount(&reference);
    let dir = mount_in_background(&bed, &reference);
    for round in 0..3 {
        daemon.kill_kept().unwrap();
        tree::assert_same(&source, &dir, Scope::ModelFiles);
        tree::assert_same(&source, foreground.dir(), Scope::ModelFiles);
        daemon.wait_starts(round + 2);
    }
    // One that is unmounted while no daemon runs is forgotten.
    daemon.signal(Signal::SIGSTOP);
    daemon.kill_kept().unwrap();
    nix::mount::umount(&dir).unwrap();
    daemon.signal(Signal::SIGCONT);
    daemon.wait_starts(5);
    tree::assert_same(&source, foreground.dir(), Scope::ModelFiles);
    let root = bed.weightfs.root();
    let status = ["status", "--json", "--root", root.to_str().unwrap()];
    let status: serde_json::Value = serde_json::from_str(&bed.weightfs.run(status).ok()).unwrap();
    assert_eq!(status["models"].as_array().unwrap().len(), 1, "{status}");
    umount(&bed.weightfs, foreground.dir());
    drop(foreground);
    daemon.stop();
    bed.area.assert_no_mounts();
}

#[test]
fn damaged_metadata_costs_no_container_anything() {
    let host = Host::with_keeper();
    let files = Files::make(&host.bed);
    let (reference, _) = host.push_image("images/damaged", std::slice::from_ref(&files.layer));
    host.rpull(&reference);
    let container = host.containerd.start_container(SNAPSHOTTER, &reference, "damaged");
    container.exec(&["/bin/sh", "-c", "echo kept > /written"]).ok();
    let snapshots = host.containerd.snapshots(SNAPSHOTTER);
    host.daemon.signal(Signal::SIGSTOP);
    host.daemon.kill_kept().unwrap();
    fs::write(host.bed.weightfs.root().join("metadata.db"), "no database any more").unwrap();
    host.daemon.signal(Signal::SIGCONT);
    host.daemon.wait_starts(2);
    assert!(host.daemon.log().contains("rebuilt from its journal"), "{}", host.daemon.log());
    assert_eq!(host.containerd.snapshots(SNAPSHOTTER), snapshots);
    let script = "cat /written && sha256sum /models/small";
    let output = container.exec(&["/bin/sh", "-c", script]).ok();
    let expected = format!("kept\n{}", digest::of_file(&files.small).unwrap().hex());
    assert!(output.starts_with(&expected), "{output}");
    container.remove();
    host.containerd.remove_image(&reference);
    host.assert_nothing_left();
}

#[test]
fn without_a_keeper_the_daemon_says_so_and_its_successor_mounts_again() {
    let host = Host::new();
    let warning = "nobody keeps the mount";
    assert_eq!(host.daemon.log().matches(warning).count(), 1, "{}", host.daemon.log());
    let root = host.bed.weightfs.root();
    let status = host.bed.weightfs.run(["status", "--root", root.to_str().unwrap()]).ok();
    assert!(status.contains(warning), "{status}");
    let layer = LayerBuilder::new(host.bed.area.path())
        .file("w", &noise(8 * MIB, 1), &Attributes::mode(0o644))
        .finish(Compression::Plain);
    let (reference, _) = host.push_image("images/alone", &[layer]);
    host.rpull(&reference);
    let Host { containerd, daemon, bed } = host;
    daemon.kill();
    let daemon = bed.weightfs.serve(&bed.area);
    let host = Host { containerd, daemon, bed };
    // containerd needs a moment to find the new socket.
    wait_until("containerd is connected", || {
        host.containerd.ctr(&["snapshot", "--snapshotter", SNAPSHOTTER, "ls"]).code == 0
    });
    let count = host.containerd.run(SNAPSHOTTER, &reference, "new", &["/bin/wc", "-c", "/w"]).ok();
    assert_eq!(count, format!("{} /w\n", 8 * MIB));
    host.containerd.remove_image(&reference);
    host.assert_nothing_left();
}

#[test]
fn a_keeper_that_is_asked_to_end_takes_the_mount_away() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let bed = Bed::new();
        let mut daemon = bed.weightfs.serve_kept(&bed.area);
        assert!(is_mount_point(&bed.weightfs.root().join("mnt")));
        daemon.signal(signal);
        daemon.assert_ends_well();
        bed.area.assert_no_mounts();
    }
}

#[test]
fn what_a_stopped_daemon_left_is_taken_away_when_that_is_asked_for() {
    let bed = Bed::new();
    let reference = bed.push(&bed.pack_raw(&bed.model(SMALL_MODEL), Dialect::Cncf), "models/all");
    let daemon = bed.weightfs.serve_kept(&bed.area);
    let model = bed.mount(&reference);
    let root = bed.weightfs.root();
    let take_away = ["umount", "--all", "--root", root.to_str().unwrap()];
    bed.weightfs.run(take_away).assert_fails(1, &["no daemon serves", "in use"]);
    daemon.signal(Signal::SIGSTOP);
    daemon.kill_kept().unwrap();
    bed.weightfs.run(take_away).ok();
    bed.area.assert_no_mounts();
    // The next daemon makes a new mount.
    daemon.signal(Signal::SIGCONT);
    daemon.wait_starts(2);
    assert!(fs::read_dir(root.join("mnt")).unwrap().next().is_none());
    drop(model);
    daemon.stop();
    bed.area.assert_no_mounts();
}

#[test]
fn a_command_that_fails_before_anything_is_kept_ends_its_keeper() {
    let bed = Bed::new();
    bed.weightfs.configure("[fetch]\nno_such_key = 1");
    let serve = bed.weightfs.serve_command();
    let mut keeper = bed.weightfs.command(["keeper", "--"]);
    let outcome = run(keeper.arg(serve.get_program()).args(serve.get_args()));
    outcome.assert_fails(1, &["no_such_key"]);
    let missing = run(&mut bed.weightfs.command(["keeper", "--", "/no/such/program"]));
    missing.assert_fails(127, &["/no/such/program"]);
}
