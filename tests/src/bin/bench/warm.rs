//! Files that were just fetched and are complete: through the mount and through containerd's
//! overlay, beside the same files on ext4.
//!
//! A pass over memory is short against the machine's other work, so each way is tried several
//! times in turn, and the best try of a round counts.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use weightfs_tests::Mounted;

use crate::Bench;
use crate::figures::Figures;
use crate::images::{Node, SNAPSHOTTER, View};
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

/// A mount and a container's view of the model, both complete.
#[derive(Debug)]
pub(crate) struct Warm {
    mounted: Option<Mounted>,
    point: TempDir,
    fresh: Fresh,
    view: Option<View>,
    node: Node,
}

impl Warm {
    /// Mounts both and reads everything once.
    pub(crate) fn new(lab: &Lab) -> Self {
        let fresh = lab.fresh();
        let point = lab.mount_point();
        let reference = lab.reference(Line::Direct, "model");
        let mounted = fresh.weightfs.mount(&lab.area, &reference, point.path());
        complete(&lab.model, mounted.pid(), mounted.dir());
        let node = Node::start(lab);
        node.rpull(&lab.reference(Line::Direct, "image"));
        let view = View::new(lab, &node.containerd, SNAPSHOTTER);
        complete(&lab.model, node.daemon.pid(), &view.weights());
        Self { mounted: Some(mounted), point, fresh, view: Some(view), node }
    }

    /// Mounts anew on the same state with nothing in memory (the kernel keeps pages that a process
    /// has mapped), reads, and gives the rate.
    fn mount_again(&mut self, lab: &Lab) -> f64 {
        if let Some(mounted) = self.mounted.take() {
            mounted.stop();
        }
        drop_caches();
        let reference = lab.reference(Line::Direct, "model");
        let mounted = self.fresh.weightfs.mount(&lab.area, &reference, self.point.path());
        let (bytes, time) = sequential(&lab.model.below(mounted.dir()));
        self.mounted = Some(mounted);
        rate(bytes, time)
    }
}

impl Drop for Warm {
    fn drop(&mut self) {
        if let Some(view) = self.view.take() {
            view.remove(&self.node.containerd);
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
    let lab = &bench.lab;
    let mut warm = Warm::new(lab);
    let native = lab.model.native();
    // From the disk anew: at its best, with the large folios that read-ahead makes.
    let from_disk = best_of_two(|| {
        drop_caches();
        let (bytes, time) = sequential(&native);
        rate(bytes, time)
    });
    compare(lab, &warm, figures, &native);
    let again = best_of_two(|| warm.mount_again(lab));
    figures.add("native_dropped_seq_mbps", from_disk);
    figures.add("dropped_seq_of_native", again / from_disk);
}

/// A virtual machine's host may have none of a file in its memory: the second try finds it there,
/// whoever's file it is.
fn best_of_two(mut rate: impl FnMut() -> f64) -> f64 {
    f64::max(rate(), rate())
}

fn compare(lab: &Lab, warm: &Warm, figures: &mut Figures, native: &[PathBuf]) {
    let mounted = lab.model.below(warm.point.path());
    let overlay = warm.view.as_ref().map(|view| lab.model.below(&view.weights()));
    let overlay = overlay.expect("there is a view until the end");
    for (name, way) in WAYS {
        let mut best = [0.0_f64; 3];
        for _ in 0..TRIES {
            for (best, paths) in best.iter_mut().zip([native, &mounted, &overlay]) {
                let (bytes, time) = way(paths);
                *best = best.max(rate(bytes, time));
            }
        }
        figures.add(&format!("native_warm_{name}_mbps"), best[0]);
        figures.add(&format!("warm_{name}_of_native"), best[1] / best[0]);
        figures.add(&format!("warm_{name}_overlay_of_native"), best[2] / best[0]);
    }
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
