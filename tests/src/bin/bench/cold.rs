//! Reads through `weightfs mount` with a fresh cache, and the raw ceiling beside them.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::thread;
use std::time::{Duration, Instant};

use weightfs_store::CHUNK_BYTES;
use weightfs_tests::figures::Figures;
use weightfs_tests::wait::holds_within;
use weightfs_tests::{Mounted, Target};

use crate::Bench;
use crate::lab::{Line, drop_caches, rate};
use crate::read;
use crate::usage::{MemoryWatch, cpu_seconds, wait_quiet};

/// Random reads of a round.
const RANDOM_READS: usize = 2000;

/// Bytes counted at the registry's side are final after this long without any.
const SETTLED: Duration = Duration::from_millis(300);

/// One round.
pub(crate) fn measure(bench: &Bench, figures: &mut Figures) {
    for line in Line::BOTH {
        ceiling(bench, figures, line);
        sequential(bench, figures, line);
    }
    mapped(bench, figures);
    four_readers(bench, figures);
    random(bench, figures);
    touch(bench, figures);
    touched_bytes(bench, figures);
}

fn ceiling(bench: &Bench, figures: &mut Figures, line: Line) {
    drop_caches();
    let start = Instant::now();
    let bytes = bench.lab.blobs(line).download_to_nowhere();
    let time = start.elapsed();
    assert_eq!(bytes, bench.lab.model.bytes, "the raw download is incomplete");
    figures.add(&format!("ceiling_{}_mbps", line.name()), rate(bytes, time));
}

fn sequential(bench: &Bench, figures: &mut Figures, line: Line) {
    let model = &bench.lab.model;
    bench.lab.with_mount(&bench.lab.reference(line, "model"), |mounted, _| {
        let before = cpu_seconds(mounted.pid());
        let memory = MemoryWatch::start(mounted.pid());
        let time = model.timed(mounted.dir(), read::sequential);
        figures.add(&format!("cold_seq_{}_mbps", line.name()), rate(model.bytes, time));
        // Hashing the whole blobs belongs to the cost.
        wait_quiet(mounted.pid());
        if line == Line::Direct {
            let spent = cpu_seconds(mounted.pid()) - before;
            figures.add("daemon_cpu_s_per_gb", spent / (model.bytes as f64 / 1e9));
        }
        figures.add("daemon_rss_mib", memory.peak_mib());
    });
}

fn mapped(bench: &Bench, figures: &mut Figures) {
    let model = &bench.lab.model;
    with_direct(bench, |mounted| {
        let time = model.timed(mounted.dir(), read::mapped);
        figures.add("cold_mmap_direct_mbps", rate(model.bytes, time));
    });
}

fn four_readers(bench: &Bench, figures: &mut Figures) {
    let model = &bench.lab.model;
    with_direct(bench, |mounted| {
        let memory = MemoryWatch::start(mounted.pid());
        let start = Instant::now();
        let sums = read::at_once(&model.below(mounted.dir())).unwrap();
        let time = start.elapsed();
        model.assert_read(&sums);
        figures.add("four_readers_direct_mbps", rate(model.bytes, time));
        figures.add("daemon_rss_mib", memory.peak_mib());
    });
}

fn random(bench: &Bench, figures: &mut Figures) {
    let model = &bench.lab.model;
    let places = read::places(&model.native(), RANDOM_READS, 1).unwrap();
    let expected = read::pages(&model.native(), &places).unwrap();
    with_direct(bench, |mounted| {
        let start = Instant::now();
        let found = read::pages(&model.below(mounted.dir()), &places).unwrap();
        figures.add("random_2000_s", start.elapsed().as_secs_f64());
        assert!(found == expected, "a random read gave wrong bytes");
    });
}

/// One read in the middle of a shard, and the first byte of the last shard, each from nothing.
fn touch(bench: &Bench, figures: &mut Figures) {
    with_direct(bench, |mounted| {
        // What a mount prefetches by itself is not the read's.
        wait_quiet(mounted.pid());
        figures.add("touch_4k_ms", read_middle(bench, mounted).as_secs_f64() * 1e3);
        wait_quiet(mounted.pid());
        let raw = bench.lab.blobs(Line::Direct).time_chunk(CHUNK_BYTES);
        figures.add("touch_raw_ms", raw.as_secs_f64() * 1e3);
    });
    let model = &bench.lab.model;
    let reference = bench.lab.reference(Line::Direct, "model");
    bench.lab.with_mount(&reference, |mounted, start| {
        read_first_byte(&model.below(mounted.dir()));
        figures.add("first_byte_mount_s", start.elapsed().as_secs_f64());
    });
}

fn touched_bytes(bench: &Bench, figures: &mut Figures) {
    let counter = &bench.lab.counter;
    let sent = || counter.bytes(Target::Blobs);
    let settle = || {
        let mut last = None;
        holds_within(Duration::from_secs(30), || {
            let before = last.replace(sent());
            thread::sleep(SETTLED);
            before == Some(sent())
        });
    };
    bench.lab.with_mount(&counter.reference("model", "v1"), |mounted, _| {
        settle();
        let before = sent();
        read_middle(bench, mounted);
        settle();
        figures.add("touch_4k_bytes", (sent() - before) as f64);
    });
}

fn with_direct(bench: &Bench, measure: impl FnOnce(&Mounted)) {
    let reference = bench.lab.reference(Line::Direct, "model");
    bench.lab.with_mount(&reference, |mounted, _| measure(mounted));
}

/// Reads 4 KiB in the middle of the second shard and checks them.
fn read_middle(bench: &Bench, mounted: &Mounted) -> Duration {
    let model = &bench.lab.model;
    let middle = model.bytes / 8 / 4096 * 4096;
    let place = [(1, middle)];
    let expected = read::pages(&model.native(), &place).unwrap();
    let start = Instant::now();
    let found = read::pages(&model.below(mounted.dir())[..2], &place).unwrap();
    let time = start.elapsed();
    assert!(found == expected, "a read gave wrong bytes");
    time
}

/// Reads the first byte of the last of these files.
pub(crate) fn read_first_byte(paths: &[std::path::PathBuf]) {
    let file = File::open(paths.last().expect("a shard")).unwrap();
    file.read_exact_at(&mut [0], 0).unwrap();
}
