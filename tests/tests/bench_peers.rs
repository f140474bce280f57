//! `make bench-peers` in small: daemons in network namespaces load a model at the same moment, one
//! of them lies, the registry goes away, and a reader is measured while others pull.

use std::fs;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use weightfs_tests::process::run_within;

/// What the sections that are run here measure.
const FIGURES: [&str; 8] = [
    "egress_blobs",
    "makespan_s",
    "makespan_ideal_s",
    "lying_egress_blobs",
    "registry_gone_egress_blobs",
    "demand_alone_ms",
    "demand_pulled_ms",
    "demand_delay_ratio",
];

#[test]
fn the_benchmark_of_peers_reads_the_right_bytes_and_has_its_figures() {
    let output = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench-peers"));
    command.env("QUICK", "1").env("MIB", "16").env("ONLY", "together,lying,gone,demand");
    // A wrong byte, or a read that fails, is a failure of the program.
    let outcome = run_within(Duration::from_secs(120), command.env("OUTPUT", output.path()));
    assert_eq!(outcome.code, 0, "{outcome}");
    let text = fs::read_to_string(output.path().join("peers.json")).unwrap();
    let figures = serde_json::from_str::<Value>(&text).unwrap()["figures"].take();
    for name in FIGURES {
        let figure = &figures[name];
        assert!(
            figure["n"] == 1 && figure["median"].as_f64().unwrap() > 0.0,
            "{name}: {figures:#}"
        );
        assert!(figure["unit"].is_string(), "{name}: {figures:#}");
    }
    // Three nodes get most of it from each other, however slow this machine is.
    let egress = figures["egress_blobs"]["median"].as_f64().unwrap();
    assert!((1.0..2.5).contains(&egress), "{egress} blobs left the registry");
}
