//! Loads models through two real dfdaemons: right bytes, and the second load from the first one's
//! dfdaemon instead of the registry; then without the registry, and without a dfdaemon.
//!
//! `make test-dragonfly` runs it. usage: dragonfly DFDAEMON; as root.
//!
//! Real are dfdaemon and the registry. The scheduler is a stand-in: Dragonfly's is not to be had from
//! a registry of packages.

mod dfdaemon;
mod scheduler;

use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{fmt, fs, thread};

use weightfs_store::Digest;
use weightfs_tests::model::Part;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::{Bed, Fault, Target, Weightfs, interrupt, wait_until};

use dfdaemon::{Dfdaemon, Downloaded};
use scheduler::{Scheduler, Sent};

const FILE: &str = "model.safetensors";
const MODEL_BYTES: u64 = 256 << 20;
/// What may come another way without being noticed as such: 5 %.
const SLACK_BYTES: u64 = MODEL_BYTES / 20;

fn main() -> ExitCode {
    let Some(binary) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: dragonfly DFDAEMON");
        return ExitCode::from(2);
    };
    interrupt::watch();
    Lab::start(&binary).run();
    ExitCode::SUCCESS
}

/// Nodes with a dfdaemon each.
struct Lab {
    nodes: Vec<Dfdaemon>,
    scheduler: Scheduler,
    bed: Bed,
}

/// A model that the registry has, as one blob.
struct Model {
    reference: String,
    weights: Vec<u8>,
    blob: Target,
}

/// What a step came to.
struct Figures {
    time: Duration,
    /// Bytes of the model that the registry sent.
    egress: u64,
    /// What each dfdaemon downloaded.
    nodes: Vec<Downloaded>,
}

impl Lab {
    fn start(binary: &Path) -> Self {
        println!("two dfdaemons, and a stand-in for their scheduler");
        let bed = Bed::new();
        let scheduler = Scheduler::start();
        let [_, _, high, low] = std::process::id().to_be_bytes();
        let ips = [1, 2].map(|node| Ipv4Addr::new(127, high, low, node));
        let start = |ip| Dfdaemon::start(&bed.area, binary, ip, scheduler.address());
        let nodes = ips.into_iter().map(start).collect();
        Self { nodes, scheduler, bed }
    }

    fn run(mut self) {
        println!("models of {} MiB; of them, in MiB:\n", MODEL_BYTES >> 20);
        println!("{:32}     time   registry sent   by way of each dfdaemon", "");
        let one = self.model("models/one");
        let [first, second] = [0, 1].map(|node| self.nodes[node].endpoint());
        let alone = self.step("the first node loads one", &one, || self.load(&first, &one));
        let then = self.step("then the second node", &one, || self.load(&second, &one));
        self.bed.proxy.fail(one.blob, Fault::Status(503));
        let cached = self.step("again; the registry refuses", &one, || self.load(&second, &one));
        self.bed.proxy.heal();
        let two = self.model("models/two");
        self.step("both load another at once", &two, || {
            thread::scope(|scope| {
                scope.spawn(|| self.load(&first, &two));
                scope.spawn(|| self.load(&second, &two));
            });
        });
        let three = self.model("models/three");
        let dying = self.nodes.pop().expect("two nodes");
        self.step("a dfdaemon dies under a load", &three, || {
            thread::scope(|scope| {
                scope.spawn(|| self.load(&second, &three));
                wait_until("some of it came", || self.bed.proxy.bytes(three.blob) > SLACK_BYTES);
                dying.kill();
            });
        });
        let Sent { to_registry, to_parent } = self.scheduler.sent();
        println!(
            "\nthe scheduler sent them to the registry {to_registry} times, to the other one {to_parent} times"
        );

        assert_about(alone.egress, MODEL_BYTES, "the registry sent the first node");
        assert_about(alone.nodes[0].registry, MODEL_BYTES, "that went through its dfdaemon");
        assert_about(then.egress, 0, "the registry sent the second node");
        assert_about(then.nodes[1].peers, MODEL_BYTES, "the second node got from the first");
        assert_eq!(cached.egress, 0, "a registry that fails sent something");
        println!("right bytes each time, and the second node's came from the first");
    }

    /// Pushes a model.
    fn model(&self, repository: &str) -> Model {
        let part = Part { path: FILE, bytes: MODEL_BYTES, mode: 0o644 };
        let source = self.bed.model(&[part]);
        // Models are made up the same each time; these are to be different blobs.
        let path = source.join(FILE);
        let mut weights = fs::read(&path).unwrap();
        let end = weights.len() - repository.len();
        weights[end..].copy_from_slice(repository.as_bytes());
        fs::write(&path, &weights).unwrap();
        let reference = self.bed.push(&self.bed.pack_raw(&source, Dialect::Cncf), repository);
        let blob = Target::Blob(Digest::of(&weights));
        Model { reference, weights, blob }
    }

    /// Does something that loads a model, and says what it came to.
    fn step(&self, name: &str, model: &Model, load: impl FnOnce()) -> Figures {
        interrupt::check();
        print!("{name:32}");
        let _ = io::stdout().flush();
        let egress = || self.bed.proxy.bytes(model.blob);
        let downloaded = || self.nodes.iter().map(Dfdaemon::downloaded);
        let (egress_before, before) = (egress(), downloaded().collect::<Vec<_>>());
        let start = Instant::now();
        load();
        let time = start.elapsed();
        let nodes = downloaded().zip(before).map(|(after, before)| after - before).collect();
        let figures = Figures { time, egress: egress() - egress_before, nodes };
        println!("{figures}");
        figures
    }

    /// Loads a model on a node that has nothing of it in its own cache.
    fn load(&self, endpoint: &str, model: &Model) {
        let weightfs = Weightfs::new(&self.bed.area);
        weightfs.configure(&format!("[dragonfly]\nendpoint = \"{endpoint}\"\n"));
        let mounted = weightfs.mount(&self.bed.area, &model.reference, &self.bed.mount_point());
        let read = fs::read(mounted.dir().join(FILE)).unwrap();
        assert!(read == model.weights, "wrong bytes; its log:\n{}", mounted.log());
        mounted.stop();
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        write!(f, "{:7.1} s {:15.1}", self.time.as_secs_f64(), mebibytes(self.egress))?;
        for (node, Downloaded { registry, peers }) in (1..).zip(&self.nodes) {
            let (registry, peers) = (mebibytes(*registry), mebibytes(*peers));
            write!(f, "   {node}: {registry:.1} registry, {peers:.1} peer")?;
        }
        Ok(())
    }
}

/// Fails if the figure is another one.
fn assert_about(bytes: u64, expected: u64, what: &str) {
    assert!(bytes.abs_diff(expected) <= SLACK_BYTES, "{bytes} bytes {what}, not about {expected}");
}
