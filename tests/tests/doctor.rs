//! `weightfs doctor` on nodes with real daemons and containerds.

use std::fs;

use weightfs_tests::containerd::Version;
use weightfs_tests::json::documented;
use weightfs_tests::process::Outcome;
use weightfs_tests::{Bed, Containerd, Host};

/// Runs it with that containerd in the configuration.
fn doctor(bed: &Bed, containerd: &Containerd, words: &[&str]) -> Outcome {
    let (config, program) = (containerd.config(), containerd.program());
    let [config, program] = [&config, &program].map(|path| path.display());
    bed.weightfs
        .configure(&format!("[containerd]\nconfig = \"{config}\"\nprogram = \"{program}\"\n"));
    bed.weightfs.run_here(&[&["doctor"], words].concat())
}

/// What is to be mended.
fn to_mend(outcome: &Outcome) -> Vec<String> {
    let report = documented("doctor", &outcome.stdout);
    let findings = report["findings"].as_array().unwrap().iter();
    let findings = findings.filter(|finding| finding["level"] == "mend");
    findings.map(|finding| finding["found"].as_str().unwrap().to_owned()).collect()
}

fn a_good_node_has_nothing_to_mend(version: Version) {
    let host = Host::with_keeper_and_cri_on(version);
    let fine = doctor(&host.bed, &host.containerd, &["--json"]);
    assert_eq!((fine.code, to_mend(&fine)), (0, vec![]), "{fine}");
    let fine = doctor(&host.bed, &host.containerd, &[]).ok();
    assert!(fine.contains("nothing to mend") && fine.contains("with weightfs"), "{fine}");
}

#[test]
fn a_good_node_with_1_6_has_nothing_to_mend() {
    a_good_node_has_nothing_to_mend(Version::Installed);
}

#[test]
fn a_good_node_with_2_1_has_nothing_to_mend() {
    if Version::V21.is_here() {
        a_good_node_has_nothing_to_mend(Version::V21);
    }
}

#[test]
fn what_is_wrong_is_named() {
    let host = Host::with_cri();
    let unkept = doctor(&host.bed, &host.containerd, &["--json"]);
    assert_eq!(unkept.code, 1);
    assert!(to_mend(&unkept)[0].contains("nobody keeps the mount"), "{unkept}");
    assert_eq!(to_mend(&unkept).len(), 1, "{unkept}");

    let config = host.containerd.config();
    let good = fs::read_to_string(&config).unwrap();
    fs::write(&config, good.replace("disable_snapshot_annotations = false", "")).unwrap();
    let mute = doctor(&host.bed, &host.containerd, &[]);
    mute.assert_fails(1, &[]);
    assert!(mute.stdout.contains("disable_snapshot_annotations = false"), "{mute}");

    // A plugin of another name: the containerd that runs has not heard of it.
    fs::write(&config, good.replace("proxy_plugins.weightfs", "proxy_plugins.other")).unwrap();
    let stale = doctor(&host.bed, &host.containerd, &[]);
    assert!(stale.stdout.contains("systemctl restart containerd"), "{stale}");

    let Host { containerd, daemon, bed } = host;
    daemon.stop();
    let dead = doctor(&bed, &containerd, &[]);
    dead.assert_fails(1, &[]);
    assert!(dead.stdout.contains("systemctl start weightfs"), "{dead}");
}
