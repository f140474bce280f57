//! Complete files: through the mount and through containerd's overlay, beside the same files on
//! ext4. In two states, since the size of the page cache's folios depends on how they came there:
//! read from the disk, and just fetched, beside files that containerd has just pulled.
//!
//! A pass over memory is short against the machine's other work, so each way is tried several
//! times in turn, and the best try of a round counts.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use weightfs_tests::figures::Figures;
use weightfs_tests::{Containerd, Mounted};

use crate::Bench;
use crate::images::{Node, OVERLAYFS, SNAPSHOTTER, View};
use crate::lab::{Fresh, Lab, Line, Model, drop_caches, rate};
use crate::read;
use crate::usage::wait_quiet;

/// Tries of each way in a round.
const TRIES: usize = 5;

/// Random reads of a try.
const RANDOM_READS: usize = 50_000;

/// The ways to read, with their names in figures.
const WAYS: [(&str, Way); 4] =
    [("seq", sequential), ("mmap", mapped), ("random", random), ("pread_random", pread_random)];

type Way = fn(&[PathBuf]) -> (u64, Duration);

/// The model in four places, complete in each.
#[derive(Debug)]
pub(crate) struct Warm<'a> {
    lab: &'a Lab,
    mounted: Option<Mounted>,
    point: TempDir,
    fresh: Fresh,
    view: Option<View>,
    node: Node,
    /// What a pull leaves on ext4, and in whose hands.
    pulled: Option<View>,
    containerd: &'a Containerd,
}

/// The shards' paths in each place.
struct Places {
    native: Vec<PathBuf>,
    mounted: Vec<PathBuf>,
    overlay: Vec<PathBuf>,
    /// On ext4, in the snapshot of containerd's pull.
    pulled: Vec<PathBuf>,
    /// The same through overlayfs.
    pulled_overlay: Vec<PathBuf>,
}

impl<'a> Warm<'a> {
    /// Pulls, mounts, and reads everything once.
    pub(crate) fn new(bench: &'a Bench) -> Self {
        let lab = &bench.lab;
        let containerd = bench.containerd21.as_ref().unwrap_or(&bench.containerd16);
        containerd.pull(&lab.reference(Line::Direct, "image"));
        let pulled = View::new(lab, containerd, OVERLAYFS);
        let fresh = lab.fresh();
        let point = lab.mount_point();
        let reference = lab.reference(Line::Direct, "model");
        let mounted = fresh.weightfs.mount(&lab.area, &reference, point.path());
        complete(&lab.model, mounted.pid(), mounted.dir());
        let node = Node::start(lab);
        node.rpull(&lab.reference(Line::Direct, "image"));
        let view = View::new(lab, &node.containerd, SNAPSHOTTER);
        complete(&lab.model, node.pid(), &view.weights());
        let (mounted, view, pulled) = (Some(mounted), Some(view), Some(pulled));
        Self { lab, mounted, point, fresh, view, node, pulled, containerd }
    }

    fn places(&self) -> Places {
        let model = &self.lab.model;
        let view = self.view.as_ref().expect("there is a view until the end");
        let pulled = self.pulled.as_ref().expect("there is one until the end");
        Places {
            native: model.native(),
            mounted: model.below(self.point.path()),
            overlay: model.below(&view.weights()),
            pulled: model.below(&pulled.weights_below()),
            pulled_overlay: model.below(&pulled.weights()),
        }
    }

    /// Mounts anew on the same state with nothing in memory (the kernel keeps pages that a process
    /// has mapped), reads, and gives the rate.
    fn mount_again(&mut self) -> f64 {
        if let Some(mounted) = self.mounted.take() {
            mounted.stop();
        }
        drop_caches();
        let lab = self.lab;
        let reference = lab.reference(Line::Direct, "model");
        let mounted = self.fresh.weightfs.mount(&lab.area, &reference, self.point.path());
        let (bytes, time) = sequential(&lab.model.below(mounted.dir()));
        self.mounted = Some(mounted);
        rate(bytes, time)
    }

    /// Everything is in memory as it comes from the disk.
    fn read_from_disk(&mut self) -> Places {
        if let Some(view) = self.view.take() {
            view.remove(&self.node.containerd);
        }
        // This drops the page cache, the mount's, too: it was made anew and has mapped nothing.
        self.node.restart(self.lab);
        self.view = Some(View::new(self.lab, &self.node.containerd, SNAPSHOTTER));
        let places = self.places();
        let read = [&places.native, &places.mounted, &places.overlay, &places.pulled_overlay];
        for paths in read {
            sequential(paths);
        }
        places
    }
}

impl Drop for Warm<'_> {
    fn drop(&mut self) {
        if let Some(view) = self.view.take() {
            view.remove(&self.node.containerd);
        }
        if let Some(view) = self.pulled.take() {
            view.remove(self.containerd);
            self.containerd.remove_image(&self.lab.reference(Line::Direct, "image"));
        }
        if let Some(mounted) = self.mounted.take() {
            mounted.stop();
        }
    }
}

/// Reads everything, and waits until the whole is checked.
fn complete(model: &Model, pid: nix::unistd::Pid, dir: &Path) {
    model.timed(dir, read::sequential);
    wait_quiet(pid);
    // What was opened before it was complete keeps its mode; these are opened anew.
    model.timed(dir, read::mapped);
}

/// One round.
pub(crate) fn measure(bench: &Bench, figures: &mut Figures) {
    let native = bench.lab.model.native();
    let from_disk = best_of_two(|| {
        drop_caches();
        let (bytes, time) = sequential(&native);
        rate(bytes, time)
    });
    let mut warm = Warm::new(bench);
    compare_fetched(&warm.places(), figures);
    let again = best_of_two(|| warm.mount_again());
    figures.add("native_dropped_seq_mbps", from_disk);
    figures.add("dropped_seq_of_native", again / from_disk);
    compare_from_disk(&warm.read_from_disk(), figures);
}

/// A virtual machine's host may have none of a file in its memory: the second try finds it there,
/// whoever's file it is.
fn best_of_two(mut rate: impl FnMut() -> f64) -> f64 {
    f64::max(rate(), rate())
}

/// Just fetched, beside just pulled, and beside ext4 as it comes from the disk.
fn compare_fetched(places: &Places, figures: &mut Figures) {
    let Places { native, mounted, overlay, pulled, .. } = places;
    for (name, way) in WAYS {
        let [native, mounted, overlay, pulled] = best(way, [native, mounted, overlay, pulled]);
        figures.add(&format!("fetched_{name}_of_pulled"), mounted / pulled);
        figures.add(&format!("fetched_{name}_overlay_of_pulled"), overlay / pulled);
        figures.add(&format!("fetched_{name}_of_native"), mounted / native);
    }
}

/// All from the disk.
fn compare_from_disk(places: &Places, figures: &mut Figures) {
    let Places { native, mounted, overlay, pulled_overlay, .. } = places;
    for (name, way) in WAYS {
        let places = [native, mounted, overlay, pulled_overlay];
        let [native, mounted, overlay, pulled_overlay] = best(way, places);
        figures.add(&format!("native_warm_{name}_mbps"), native);
        figures.add(&format!("warm_{name}_of_native"), mounted / native);
        figures.add(&format!("warm_{name}_overlay_of_native"), overlay / native);
        figures.add(&format!("native_warm_{name}_overlay_of_native"), pulled_overlay / native);
    }
}

/// The best of a few tries of each place, in turn.
fn best<const N: usize>(way: Way, places: [&Vec<PathBuf>; N]) -> [f64; N] {
    let mut best = [0.0_f64; N];
    for _ in 0..TRIES {
        for (best, paths) in best.iter_mut().zip(places) {
            let (bytes, time) = way(paths);
            *best = best.max(rate(bytes, time));
        }
    }
    best
}

fn sequential(paths: &[PathBuf]) -> (u64, Duration) {
    let start = Instant::now();
    let bytes = paths.iter().map(|path| read::drain(path).unwrap()).sum();
    (bytes, start.elapsed())
}

fn mapped(paths: &[PathBuf]) -> (u64, Duration) {
    let start = Instant::now();
    let bytes = paths.iter().map(|path| read::drain_mapped(path).unwrap()).sum();
    (bytes, start.elapsed())
}

fn random(paths: &[PathBuf]) -> (u64, Duration) {
    let places = read::places(paths, RANDOM_READS, 2).unwrap();
    let start = Instant::now();
    let bytes = read::drain_mapped_pages(paths, &places).unwrap();
    (bytes, start.elapsed())
}

fn pread_random(paths: &[PathBuf]) -> (u64, Duration) {
    let places = read::places(paths, RANDOM_READS, 2).unwrap();
    let start = Instant::now();
    let bytes = read::drain_pages(paths, &places).unwrap();
    (bytes, start.elapsed())
}
