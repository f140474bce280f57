//! Indexes: how quickly one is made, and what that and using it takes.

use std::fs;
use std::process::Stdio;
use std::time::Instant;

use bytes::Bytes;
use nix::unistd::Pid;
use weightfs_fusefs::index::{Index, LayerIndex};
use weightfs_fusefs::{Compression, Listing};
use weightfs_store::{CHUNK_BYTES, Digest};
use weightfs_tests::figures::Figures;
use weightfs_tests::image::image;
use weightfs_tests::layer::{Attributes, Compression as Packed, LayerBuilder};

use crate::Bench;
use crate::lab::{Lab, Line, drop_caches, rate};
use crate::usage::MemoryWatch;
use crate::zeros::Zeros;

/// Bytes of the file of zeros.
const ZEROS: u64 = 10_000_000_000;
const QUICK_ZEROS: u64 = 256 << 20;

/// Bytes of weights whose index is opened.
const LARGE: u64 = 100_000_000_000;

/// Files of the image that is mounted.
const FILES: usize = 10_000;

pub(crate) fn measure(bench: &Bench, figures: &mut Figures) {
    let lab = &bench.lab;
    drop_caches();
    let start = Instant::now();
    let bytes = lab.blobs(Line::Direct).download_to_nowhere();
    figures.add("index_ceiling_mbps", rate(bytes, start.elapsed()));
    let start = Instant::now();
    make(lab, &lab.reference(Line::Direct, "model"));
    figures.add("index_build_mbps", rate(bytes, start.elapsed()));
    let zeros = Zeros::start(if bench.quick { QUICK_ZEROS } else { ZEROS });
    let start = Instant::now();
    let bytes = zeros.blobs().download_to_nowhere();
    figures.add("index_zeros_ceiling_mbps", rate(bytes, start.elapsed()));
    let start = Instant::now();
    figures.add("index_build_rss_mib", make(lab, &zeros.reference()));
    figures.add("index_zeros_mbps", rate(bytes, start.elapsed()));
    drop(zeros);
    mount_many(lab, figures);
    open_large(lab, figures);
}

/// Makes the index of a model and keeps nothing. Gives the program's peak memory, in MiB.
fn make(lab: &Lab, reference: &str) -> f64 {
    let fresh = lab.fresh();
    let output = lab.area.path().join("bench-index");
    let mut command = fresh.weightfs.command(["index", reference, "--config"]);
    command.arg(fresh.weightfs.config()).arg("-o").arg(&output).stdout(Stdio::null());
    let mut child = command.spawn().expect("weightfs index");
    let watch = MemoryWatch::start(Pid::from_raw(child.id().try_into().expect("a process id")));
    let ended = child.wait().expect("the end of weightfs index");
    let peak = watch.peak_mib();
    assert!(ended.success(), "weightfs index {reference}: {ended}");
    fs::remove_file(output).expect("the index is there");
    peak
}

/// Mounts an image of many files by its index.
fn mount_many(lab: &Lab, figures: &mut Figures) {
    let mode = Attributes::mode(0o644);
    let mut builder = LayerBuilder::new(lab.area.path());
    for at in 0..FILES {
        builder = builder.file(&format!("d{}/f{at}", at / 100), b"content", &mode);
    }
    let artifact = image(&[builder.finish(Packed::Gzip)]);
    artifact.push(lab.registry.remote(), "many", "v1");
    let reference = lab.reference(Line::Direct, "many");
    lab.fresh().weightfs.run_here(&["index", &reference]).ok();
    lab.with_mount(&reference, |mounted, start| {
        assert_eq!(fs::read_dir(mounted.dir().join("d7")).expect("a directory").count(), 100);
        figures.add("index_mount_10000_s", start.elapsed().as_secs_f64());
    });
}

/// Opens the index of a large model as a mount does: reads it and checks it.
fn open_large(lab: &Lab, figures: &mut Figures) {
    let digest = Digest::of(b"large");
    let chunks = usize::try_from(LARGE.div_ceil(CHUNK_BYTES)).expect("a number of chunks");
    let layer = LayerIndex {
        digest,
        size: LARGE,
        compression: Compression::None,
        content_digest: digest,
        listing: Listing::raw(LARGE),
        chunk_digests: Bytes::from(vec![7; 32 * chunks]),
        points: Bytes::new(),
    };
    let path = lab.area.path().join("bench-large");
    let bytes = Index::new(digest, vec![layer]).to_bytes().expect("an index");
    assert!(bytes.len() <= 40 * chunks, "{} bytes for {chunks} chunks", bytes.len());
    fs::write(&path, bytes).expect("the index is written");
    drop_caches();
    let start = Instant::now();
    let bytes = Bytes::from(fs::read(&path).expect("the index is read"));
    let index = Index::parse(&bytes, digest).expect("it is an index");
    figures.add("index_open_100gb_ms", start.elapsed().as_secs_f64() * 1e3);
    // What it takes is what it has: digests are used where they lie.
    let digests = &index.layers()[0].chunk_digests;
    assert!(bytes.as_ptr_range().contains(&digests.as_ptr()), "the digests were copied");
    figures.add("index_open_100gb_mib", bytes.len() as f64 / f64::from(1 << 20));
}
