//! Tries the Debian package as a stranger would, on a bare Debian: the commands of the README, a
//! model that is mounted, a container that runs, and nothing left after a purge.
//!
//! `make test-install` runs it. usage: install PACKAGE ROOT-FILE-SYSTEM; as root.
//!
//! The root file system is copied, so that it can be used again. There is no systemd in it: the
//! keeper does its part.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use weightfs_tests::image::{busybox_layer, image};
use weightfs_tests::layer::{Attributes, Compression, LayerBuilder};
use weightfs_tests::model::{Part, write_safetensors};
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::process::run_within;
use weightfs_tests::{Bed, digest};

/// The README, which the commands come from.
const README: &str = include_str!("../../../../README.md");

/// What a stranger does.
const SCRIPT: &str = include_str!("node.sh");

/// How long all of it may take.
const PATIENCE: Duration = Duration::from_secs(300);

const MODEL: &[Part] = &[
    Part { path: "config.json", bytes: 600, mode: 0o644 },
    Part { path: "model.safetensors", bytes: 32 << 20, mode: 0o644 },
];

fn main() {
    let arguments: Vec<_> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [package, root] = arguments.as_slice() else { panic!("usage: install PACKAGE ROOT") };
    weightfs_tests::interrupt::watch();
    let bed = Bed::new();
    let source = bed.model(MODEL);
    let model = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/llama");
    let weights = bed.area.path().join("weights");
    write_safetensors(&weights, 32 << 20, 7).unwrap();
    let layer = LayerBuilder::new(bed.area.path())
        .dir("models", &Attributes::mode(0o755))
        .file_from("models/weights", &weights, &Attributes::mode(0o644))
        .finish(Compression::Plain);
    let small = busybox_layer(bed.area.path(), Compression::Gzip);
    let image = bed.push(&image(&[layer, small]), "images/llama");

    let node = bed.area.path().join("node");
    copy(root, &node);
    let here = node.join("root/try");
    fs::create_dir_all(&here).unwrap();
    fs::copy(package, here.join("weightfs.deb")).unwrap();
    let put = |name: &str, command: &str| {
        let command = command
            .replace("./weightfs_0.1.0-1_amd64.deb", "/root/try/weightfs.deb")
            .replace("registry.example.com/models/llama:8b", &model)
            .replace("registry.example.com/vllm-llama:8b", &image);
        fs::write(here.join(name), command + "\n").unwrap();
    };
    put("install", &command_of_the_readme("apt install "));
    put("mount", &command_of_the_readme("weightfs mount "));
    put("node", &command_of_the_readme("weightfs node install  "));
    put("rpull", &command_of_the_readme("weightfs rpull "));
    fs::write(here.join("run"), SCRIPT).unwrap();

    let sum = |path: &Path| digest::of_file(path).unwrap().hex();
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"])
        .args(["sh", "-euc", ENTER, "sh"])
        .arg(&node)
        .env("IMAGE", &image)
        .env("MODEL_SUM", sum(&source.join("model.safetensors")))
        .env("WEIGHTS_SUM", sum(&weights))
        .env("LC_ALL", "C");
    for name in ["http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
    let outcome = run_within(PATIENCE, &mut command);
    print!("{}", outcome.stdout);
    if outcome.code != 0 {
        for log in ["daemon.log", "containerd.log"] {
            eprintln!("---- {log}\n{}", fs::read_to_string(here.join(log)).unwrap_or_default());
        }
        panic!("the package does not work on a bare Debian: {outcome}");
    }
    bed.area.assert_no_mounts();
}

/// Enters the root file system `$1` with what a booted machine has mounted.
const ENTER: &str = r#"
cd "$1"
mount --bind . .
cd "$1"
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs tmpfs run
exec chroot . /bin/bash /root/try/run
"#;

/// The first command of the README that begins so, without its comment.
fn command_of_the_readme(start: &str) -> String {
    let blocks = README.split("```").skip(1).step_by(2);
    let line = blocks.flat_map(str::lines).find(|line| line.starts_with(start));
    let line = line.unwrap_or_else(|| panic!("the README has no command `{start}…`"));
    line.split("  #").next().unwrap_or(line).trim_end().to_owned()
}

/// Copies a tree with all that belongs to its files.
fn copy(from: &Path, to: &Path) {
    let mut command = Command::new("cp");
    run_within(PATIENCE, command.args(["-a", "--reflink=auto"]).arg(from).arg(to)).ok();
}
