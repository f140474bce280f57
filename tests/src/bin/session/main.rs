//! Records a terminal session as an SVG: real commands, with what they print and how long they take.
//!
//! `make session` runs it. usage: session FILE; as root.
//!
//! The model is made up; its registry is one of ours, which answers for the name in the session as
//! a mirror. All of it is in a mount namespace of its own, so that paths are those of a real node.

mod svg;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use weightfs_tests::Bed;
use weightfs_tests::model::Part;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::process::run_within;

/// What is typed.
const COMMANDS: &[&str] = &[
    "weightfs mount registry.example.com/models/llama:8b /mnt/llama --daemon",
    "ls -sh --block-size=MiB /mnt/llama        # all files, nothing fetched",
    "sha256sum < /mnt/llama/model-00002-of-00003.safetensors",
    "weightfs status",
    "weightfs map /mnt/llama",
];

const MODEL: &[Part] = &[
    Part { path: "config.json", bytes: 600, mode: 0o644 },
    Part { path: "model-00001-of-00003.safetensors", bytes: 76 << 20, mode: 0o644 },
    Part { path: "model-00002-of-00003.safetensors", bytes: 76 << 20, mode: 0o644 },
    Part { path: "model-00003-of-00003.safetensors", bytes: 76 << 20, mode: 0o644 },
];

/// How long all of it may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs the commands in `$1`, on a node that has WeightFS and nothing else of it. Of each, `$1` has
/// afterwards what it printed and how many milliseconds it took.
const NODE: &str = r#"
cd "$1"
for dir in etc mnt run var/lib; do
    mkdir -p "over/$dir" "work/$dir"
    mount -t overlay overlay -o "lowerdir=/$dir,upperdir=over/$dir,workdir=work/$dir" "/$dir"
done
mkdir -p /etc/weightfs/certs.d/registry.example.com /mnt/llama /var/lib/weightfs bin state
mount --bind state /var/lib/weightfs
cp hosts.toml /etc/weightfs/certs.d/registry.example.com/
printf '[mirrors]\nhosts_dir = "/etc/weightfs/certs.d"\n' > /etc/weightfs/config.toml
# How full this machine's disk is belongs to no session.
printf '[cache]\nmin_free = "0B"\n' >> /etc/weightfs/config.toml
ln -s "$PROGRAM" bin/weightfs
PATH="$PWD/bin:$PATH"
weightfs keeper -- weightfs serve > daemon.log 2>&1 &
keeper=$!
trap 'kill -INT $keeper; wait' EXIT
until weightfs status > /dev/null 2>&1; do kill -0 $keeper; sleep 0.05; done
for command in command-*; do
    started=$(date +%s%3N)
    bash -c "$(cat "$command")" > "output-${command#command-}" 2>&1
    echo $(($(date +%s%3N) - started)) > "time-${command#command-}"
done
weightfs umount /mnt/llama
"#;

fn main() {
    let arguments: Vec<_> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [file] = arguments.as_slice() else { panic!("usage: session FILE") };
    weightfs_tests::interrupt::watch();
    let session = record();
    fs::write(file, svg::document(&session)).unwrap();
}

/// A command and what came of it.
#[derive(Debug)]
struct Step {
    command: &'static str,
    output: String,
    time: Duration,
}

fn record() -> Vec<Step> {
    let bed = Bed::new();
    let artifact = bed.pack_raw(&bed.model(MODEL), Dialect::Cncf);
    artifact.push(bed.registry.remote(), "models/llama", "8b");
    let node = tempfile::tempdir_in(bed.area.path()).unwrap();
    let hosts = format!("[host.\"http://{}\"]\n", bed.proxy.address());
    fs::write(node.path().join("hosts.toml"), hosts).unwrap();
    for (number, command) in COMMANDS.iter().enumerate() {
        fs::write(node.path().join(format!("command-{number}")), command).unwrap();
    }
    let mut unshare = Command::new("unshare");
    unshare
        .args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"])
        .args(["--mount-proc", "bash", "-euc", NODE, "bash"])
        .arg(node.path())
        .env("PROGRAM", weightfs_tests::weightfs::binary())
        .env("LC_ALL", "C.UTF-8");
    for name in ["http_proxy", "https_proxy", "all_proxy"] {
        unshare.env_remove(name).env_remove(name.to_uppercase());
    }
    let outcome = run_within(PATIENCE, &mut unshare);
    let log = fs::read_to_string(node.path().join("daemon.log")).unwrap_or_default();
    assert_eq!(outcome.code, 0, "{outcome}\n{log}");
    let step = |(number, command): (usize, &&'static str)| step(node.path(), number, command);
    COMMANDS.iter().enumerate().map(step).collect()
}

fn step(node: &Path, number: usize, command: &'static str) -> Step {
    let read = |what: &str| fs::read_to_string(node.join(format!("{what}-{number}"))).unwrap();
    let time = Duration::from_millis(read("time").trim().parse().unwrap());
    Step { command, output: read("output"), time }
}
