//! What a daemon says to monitoring systems: each metric moves when it should, none multiplies.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use weightfs_tests::layer::{Attributes, Compression, LayerBuilder};
use weightfs_tests::metrics::{self, Metrics, promtool};
use weightfs_tests::model::{Part, noise};
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::{Bed, Fault, Host, Target, wait_until};

const MODEL: &[Part] = &[
    Part { path: "model.safetensors", bytes: 40 << 20, mode: 0o644 },
    Part { path: "config.json", bytes: 517, mode: 0o644 },
];

/// What does not change while a daemon runs.
const CONSTANT: [&str; 5] = [
    "weightfs_cache_limit_bytes",
    "weightfs_cache_min_free_bytes",
    "weightfs_build_info",
    "process_max_fds",
    "process_start_time_seconds",
];

/// What needs a source that does as it is told: asserted where there is one.
const ELSEWHERE: [&str; 4] = [
    // weightfs-fusefs, watchdog: each_read_that_waits_too_long_is_told_of_once
    "weightfs_reads_hung_total",
    // weightfs-store, hedging: a_request_without_an_answer_is_sent_again_and_the_first_answer_wins
    "weightfs_hedges_total",
    "weightfs_hedges_won_total",
    // weightfs-store, eviction: where_nothing_can_go_reads_are_served_from_memory
    "weightfs_uncached_chunks_total",
];

/// The names in the documentation's table.
fn documented() -> BTreeSet<String> {
    let page = include_str!("../../docs/metrics.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.filter_map(|row| Some(row.split_once('`')?.0.to_owned())).collect()
}

fn read_at(path: &Path, offset: u64) -> std::io::Result<()> {
    File::open(path)?.read_exact_at(&mut [0; 4096], offset)
}

fn push(bed: &Bed, name: &str) -> (weightfs_tests::Artifact, String) {
    let artifact = bed.pack_raw(&bed.model(MODEL), Dialect::Cncf);
    let reference = bed.push(&artifact, name);
    (artifact, reference)
}

/// A node whose metrics are watched.
struct Watched {
    host: Host,
    address: String,
    first: Metrics,
    moved: BTreeSet<String>,
}

impl Watched {
    fn start() -> Self {
        let bed = Bed::new();
        metrics::configure(
            &bed.weightfs,
            "[fetch]\ndeadline = \"3s\"\n[cache]\nlimit = \"2GiB\"\n",
        );
        let daemon = bed.weightfs.serve(&bed.area);
        let host = Host::beside(bed, daemon);
        let address = metrics::address(&host.bed.weightfs);
        let first = Metrics::of(&address);
        Self { host, address, first, moved: BTreeSet::new() }
    }

    fn now(&mut self) -> Metrics {
        let now = Metrics::of(&self.address);
        self.moved.extend(now.moved(&self.first));
        now
    }

    /// Waits until a series is at least so much.
    fn wait(&mut self, series: &str, least: f64) {
        wait_until(series, || self.now().value(series) >= least);
    }
}

fn pull_an_image(watched: &mut Watched) {
    let layer = |name: &str, bytes| {
        LayerBuilder::new(watched.host.bed.area.path())
            .file(name, &noise(bytes, bytes), &Attributes::mode(0o644))
            .finish(Compression::Plain)
    };
    let (lazy, small) = (layer("lazy", 9 << 20), layer("small", 1 << 10));
    let (image, _) = watched.host.push_image_below("images/metrics", &[lazy, small]);
    watched.host.rpull(&image);
    let now = watched.now();
    assert_eq!(now.value("weightfs_layer_decisions_total{decision=\"lazy\"}"), 1.0);
    assert_eq!(now.value("weightfs_layer_decisions_total{decision=\"small\"}"), 1.0);
    let lazy = "weightfs_snapshot_calls_total{method=\"Prepare\",code=\"AlreadyExists\"}";
    assert!(now.value(lazy) >= 1.0, "{}", now.text);
    assert!(now.value("weightfs_snapshots") >= 2.0);
}

/// A model is loaded, and evicted while it is mounted and after that.
fn load_and_evict(watched: &mut Watched) {
    let (artifact, reference) = push(&watched.host.bed, "models/good");
    let mounted = watched.host.bed.mount(&reference);
    assert_eq!(watched.now().value("weightfs_models"), 1.0);
    let weights = mounted.dir().join("model.safetensors");
    let read = fs::read(&weights).unwrap();
    watched.wait("weightfs_verified_blobs_total", 1.0);
    let now = watched.now();
    let answered = ["cache", "fetch"]
        .map(|from| now.value(&format!("weightfs_read_bytes_total{{from={from:?}}}")));
    assert!(answered.iter().sum::<f64>() >= read.len() as f64, "{answered:?}");
    let fetched = now.value("weightfs_fetched_bytes_total{source=\"registry\"}");
    assert!(fetched >= artifact.layer_bytes() as f64 - 1e6, "{fetched}");
    let evict = || watched.host.bed.weightfs.run_here(&["cache", "evict", &reference]).ok();
    evict();
    mounted.stop();
    evict();
    watched.wait("weightfs_evictions_total{what=\"extent\"}", 1.0);
    watched.wait("weightfs_evictions_total{what=\"blob\"}", 1.0);
}

/// A registry that is silent, that complains, and that gives something else.
fn meet_trouble(watched: &mut Watched) {
    let (artifact, reference) = push(&watched.host.bed, "models/trouble");
    let mounted = watched.host.bed.mount(&reference);
    let weights = mounted.dir().join("model.safetensors");
    watched.host.bed.proxy.fail(Target::Blobs, Fault::Hang);
    std::thread::scope(|scope| {
        let silent = scope.spawn(|| read_at(&weights, 0));
        watched.wait("weightfs_reads_waiting", 1.0);
        watched.wait("weightfs_fetch_requests_in_flight", 1.0);
        assert!(silent.join().unwrap().is_err(), "bytes from nowhere");
    });
    watched.wait("weightfs_reads_total{from=\"fetch\",result=\"deadline\"}", 1.0);
    watched.wait("weightfs_fetch_requests_total{result=\"failed\"}", 1.0);
    watched.host.bed.proxy.fail(Target::Blobs, Fault::Status(503));
    std::thread::scope(|scope| {
        let patient = scope.spawn(|| read_at(&weights, 30 << 20));
        watched.wait("weightfs_fetch_throttled_total", 1.0);
        watched.host.bed.proxy.heal();
        patient.join().unwrap().unwrap();
    });
    watched.wait("weightfs_fetch_retries_total", 1.0);
    let sizes = artifact.layers().iter().map(|layer| layer["size"].as_u64().unwrap());
    let largest = sizes.enumerate().max_by_key(|(_, size)| *size).unwrap().0;
    let digest = artifact.layer_digest(largest);
    watched.host.bed.proxy.fail(Target::Blob(digest), Fault::Corrupt { at: 5 << 20 });
    let _ = fs::read(&weights);
    watched.wait("weightfs_poisoned_blobs", 1.0);
    watched.wait("weightfs_verification_failures_total{what=\"blob\"}", 1.0);
    mounted.stop();
}

#[test]
fn every_metric_moves_and_their_series_stay_the_same() {
    let mut watched = Watched::start();
    promtool(&["check", "metrics"], &watched.first.text);
    assert_eq!(watched.first.value("weightfs_cache_limit_bytes"), f64::from(2u32 << 30));
    assert_eq!(watched.first.value("weightfs_cache_min_free_bytes"), 0.0);
    pull_an_image(&mut watched);
    load_and_evict(&mut watched);
    meet_trouble(&mut watched);
    let last = watched.now();
    promtool(&["check", "metrics"], &last.text);
    let series = |metrics: &Metrics| metrics.series.keys().cloned().collect::<Vec<_>>();
    assert_eq!(series(&last), series(&watched.first), "a series came with a blob or a name");
    let known = CONSTANT.into_iter().chain(ELSEWHERE).map(str::to_owned);
    let covered: BTreeSet<_> = watched.moved.into_iter().chain(known).collect();
    assert_eq!(covered, documented());
}

#[test]
fn the_alert_rules_are_sound_and_fire_where_they_should() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/monitoring");
    let file = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    promtool(&["check", "rules", &file("alerts.yaml")], "");
    promtool(&["test", "rules", &file("alerts-test.yaml")], "");
}

#[test]
fn metrics_are_off_unless_asked_for_and_a_taken_address_stops_nobody() {
    let bed = Bed::new();
    let daemon = bed.weightfs.serve(&bed.area);
    assert_eq!(metrics::address(&bed.weightfs), "");
    daemon.stop();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    bed.weightfs.configure(&format!("[metrics]\naddress = \"{}\"", address.port()));
    let daemon = bed.weightfs.serve(&bed.area);
    let log = daemon.log();
    assert!(log.contains("metrics.address can't be listened on"), "{log}");
    assert_eq!(metrics::address(&bed.weightfs), "");
    daemon.stop();
}
