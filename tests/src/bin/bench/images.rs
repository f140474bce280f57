//! From nothing to a model that was read, as containerd has it: our lazy pull, and containerd's
//! own pull into overlayfs, of 1.6 and 2.1.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::unistd::Pid;
use tempfile::TempDir;
use weightfs_tests::figures::Figures;
use weightfs_tests::process::run;
use weightfs_tests::wait::wait_until;
use weightfs_tests::{Containerd, ContainerdOptions, Daemon};

use crate::Bench;
use crate::cold::read_first_byte;
use crate::lab::{Fresh, IN_IMAGE, Lab, Line, drop_caches};
use crate::read;

/// Name of our snapshotter in containerd.
pub(crate) const SNAPSHOTTER: &str = "weightfs";

/// containerd's own.
pub(crate) const OVERLAYFS: &str = "overlayfs";

/// One round.
pub(crate) fn measure(bench: &Bench, figures: &mut Figures) {
    container_start(bench, figures);
    ours_first_byte(&bench.lab, figures);
    for line in Line::BOTH {
        ours_all_read(&bench.lab, figures, line);
        let peers = [
            ("containerd16", Some(&bench.containerd16)),
            ("containerd21", bench.containerd21.as_ref()),
        ];
        for (name, containerd) in peers {
            if let Some(containerd) = containerd {
                pull_and_read(&bench.lab, containerd, name, figures, line);
            }
        }
    }
}

/// A daemon and a containerd that uses it, with nothing in either.
#[derive(Debug)]
pub(crate) struct Node {
    /// containerd. The first field, so that it goes first.
    pub(crate) containerd: Containerd,
    daemon: Option<Daemon>,
    pub(crate) fresh: Fresh,
}

impl Node {
    /// Starts both.
    pub(crate) fn start(lab: &Lab) -> Self {
        let fresh = lab.fresh();
        let daemon = Some(fresh.weightfs.serve(&lab.area));
        let weightfs = Some(fresh.weightfs.snapshotter_socket());
        // Nothing is removed here, and views are to stay.
        let no_garbage_collection = true;
        let options = ContainerdOptions { weightfs, no_garbage_collection, ..Default::default() };
        let containerd = Containerd::start(&lab.area, &options);
        Self { containerd, daemon, fresh }
    }

    /// The daemon's process.
    pub(crate) fn pid(&self) -> Pid {
        self.daemon.as_ref().expect("there is one between two calls").pid()
    }

    /// Ends the daemon, drops the page cache, and starts it again on the same state. (The kernel
    /// keeps pages that a process has mapped.)
    pub(crate) fn restart(&mut self, lab: &Lab) {
        if let Some(daemon) = self.daemon.take() {
            daemon.stop();
        }
        drop_caches();
        self.daemon = Some(self.fresh.weightfs.serve(&lab.area));
        // containerd takes its time before it dials again.
        let list = ["snapshot", "--snapshotter", SNAPSHOTTER, "ls"];
        wait_until("containerd finds the daemon", || self.containerd.ctr(&list).code == 0);
    }

    /// Pulls an image without its weights.
    pub(crate) fn rpull(&self, reference: &str) {
        self.fresh.weightfs.rpull(&self.containerd.socket(), reference).ok();
    }
}

/// How long a container takes to start whose image is there, and the pull of an image without
/// weights: what no way to bring the weights can save.
fn container_start(bench: &Bench, figures: &mut Figures) {
    let containerd = &bench.containerd16;
    let reference = bench.lab.reference(Line::Direct, "small");
    drop_caches();
    let start = Instant::now();
    containerd.pull(&reference);
    figures.add("small_pull_s", start.elapsed().as_secs_f64());
    drop_caches();
    let start = Instant::now();
    let container = containerd.start_container(OVERLAYFS, &reference, "small");
    figures.add("container_start_s", start.elapsed().as_secs_f64());
    container.remove();
    containerd.remove_image(&reference);
}

fn ours_first_byte(lab: &Lab, figures: &mut Figures) {
    let node = Node::start(lab);
    let reference = lab.reference(Line::Direct, "image");
    drop_caches();
    let start = Instant::now();
    node.rpull(&reference);
    figures.add("rpull_s", start.elapsed().as_secs_f64());
    let container = node.containerd.start_container(SNAPSHOTTER, &reference, "ours");
    read_first_byte(&lab.model.below(&container.root().join(IN_IMAGE)));
    figures.add("first_byte_container_s", start.elapsed().as_secs_f64());
    container.remove();
}

fn ours_all_read(lab: &Lab, figures: &mut Figures, line: Line) {
    let node = Node::start(lab);
    let reference = lab.reference(line, "image");
    drop_caches();
    let start = Instant::now();
    node.rpull(&reference);
    let view = mount_and_read(lab, &node.containerd, SNAPSHOTTER);
    figures.add(&format!("all_read_{}_s", line.name()), start.elapsed().as_secs_f64());
    view.remove(&node.containerd);
}

fn pull_and_read(
    lab: &Lab,
    containerd: &Containerd,
    name: &str,
    figures: &mut Figures,
    line: Line,
) {
    let reference = lab.reference(line, "image");
    drop_caches();
    let start = Instant::now();
    containerd.pull(&reference);
    let pulled = start.elapsed();
    if line == Line::Direct {
        let first_byte = pulled + start_and_touch(lab, containerd, &reference);
        let figure = format!("{name}_first_byte_container_s");
        figures.add(&figure, first_byte.as_secs_f64());
    }
    let start = Instant::now();
    let view = mount_and_read(lab, containerd, OVERLAYFS);
    let all_read = pulled + start.elapsed();
    view.remove(containerd);
    figures.add(&format!("{name}_all_read_{}_s", line.name()), all_read.as_secs_f64());
    containerd.remove_image(&reference);
}

fn start_and_touch(lab: &Lab, containerd: &Containerd, reference: &str) -> Duration {
    let start = Instant::now();
    let container = containerd.start_container(OVERLAYFS, reference, "touched");
    read_first_byte(&lab.model.below(&container.root().join(IN_IMAGE)));
    let time = start.elapsed();
    container.remove();
    time
}

/// Mounts an image's root file system and reads all weights in it.
fn mount_and_read(lab: &Lab, containerd: &Containerd, snapshotter: &'static str) -> View {
    let view = View::new(lab, containerd, snapshotter);
    lab.model.timed(&view.weights(), read::sequential);
    view
}

/// The image's root file system, mounted read-only. (`ctr image mount` of 1.6 unpacks into
/// overlayfs whatever it is told, so this is made of the snapshot itself.)
#[derive(Debug)]
pub(crate) struct View {
    snapshotter: &'static str,
    point: TempDir,
}

impl View {
    /// Makes the view and mounts it.
    pub(crate) fn new(lab: &Lab, containerd: &Containerd, snapshotter: &'static str) -> Self {
        let view = Self { snapshotter, point: lab.mount_point() };
        let (key, parent) = (view.key(), lab.image_chain.to_string());
        let mounts =
            ["snapshot", "--snapshotter", snapshotter, "view", "--target", key, key, &parent];
        let command = containerd.ctr(&mounts).ok();
        run(Command::new("sh").args(["-ec", &command])).ok();
        view
    }

    /// Where the weights are.
    pub(crate) fn weights(&self) -> PathBuf {
        self.point.path().join(IN_IMAGE)
    }

    /// Where the weights are in the layer's own directory, below the overlay.
    pub(crate) fn weights_below(&self) -> PathBuf {
        let table = fs::read_to_string("/proc/self/mounts").expect("a mount table");
        let own = table.lines().find(|line| line.split(' ').nth(1) == Some(self.key()));
        let options = own.and_then(|line| line.split(' ').nth(3)).expect("it is mounted");
        let layers = options.split(',').find_map(|option| option.strip_prefix("lowerdir="));
        let lowest = layers.and_then(|layers| layers.split(':').next_back()).expect("an overlay");
        PathBuf::from(lowest).join(IN_IMAGE)
    }

    /// Unmounts and removes it.
    pub(crate) fn remove(self, containerd: &Containerd) {
        umount2(self.point.path(), MntFlags::empty()).expect("the view is not busy");
        // No image needs it, so containerd's collector may have been quicker.
        containerd.ctr(&["snapshot", "--snapshotter", self.snapshotter, "rm", self.key()]);
    }

    /// The snapshot's key is the mount point.
    fn key(&self) -> &str {
        self.point.path().to_str().expect("a path in UTF-8")
    }
}
