//! Daemons on hosts of their own, and loads through them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use serde_json::Value;
use weightfs_tests::area::is_mount_point;
use weightfs_tests::wait::holds_within;
use weightfs_tests::{Daemon, Mounted, Weightfs, digest};

use crate::lab::{Expected, Lab};

/// Where daemons listen for each other.
const PORT: u16 = 9480;

/// How long loads may take until something is to happen, in ideal loads.
const PATIENCE: f64 = 60.0;

/// Daemons of one measurement; their state goes with them.
#[derive(Debug)]
pub(crate) struct Cluster<'a> {
    lab: &'a Lab,
    pub(crate) nodes: Vec<Node>,
}

/// A daemon on a host.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) weightfs: Weightfs,
    daemon: Mutex<Option<Daemon>>,
    mounted: Mutex<Vec<Mounted>>,
    /// Bytes that were read through it.
    read: AtomicU64,
}

/// How a load went: the seconds that it took, or why it did not end.
pub(crate) type Load = Result<f64, String>;

/// The longest of these loads.
///
/// # Panics
/// When one has failed.
pub(crate) fn longest(loads: &[Load]) -> f64 {
    loads.iter().map(|load| *load.as_ref().unwrap()).fold(0.0, f64::max)
}

impl<'a> Cluster<'a> {
    /// So many daemons that are each other's peers; none is started.
    pub(crate) fn of_peers(lab: &'a Lab, count: usize) -> Self {
        let members: Vec<_> = (0..count).collect();
        Self::new(lab, count, |number| peers(lab, number, &members))
    }

    /// So many daemons that have no peers.
    pub(crate) fn without_peers(lab: &'a Lab, count: usize) -> Self {
        Self::new(lab, count, |_| String::new())
    }

    /// Daemons with these configurations.
    pub(crate) fn new(lab: &'a Lab, count: usize, more: impl Fn(usize) -> String) -> Self {
        let nodes = (0..count).map(|number| {
            let weightfs = Weightfs::new(&lab.area).on(&lab.hosts[number]);
            let registry = lab.registry();
            weightfs.configure(&format!(
                "{}\n[registry.{registry:?}]\nplain_http = true\n",
                more(number)
            ));
            Node {
                weightfs,
                daemon: Mutex::default(),
                mounted: Mutex::default(),
                read: AtomicU64::new(0),
            }
        });
        Self { lab, nodes: nodes.collect() }
    }

    /// Starts these daemons, and waits until they serve.
    pub(crate) fn start(&self, which: Range<usize>) {
        thread::scope(|scope| {
            for node in &self.nodes[which] {
                scope.spawn(|| {
                    *node.daemon.lock().unwrap() = Some(node.weightfs.serve(&self.lab.area));
                });
            }
        });
    }

    /// These nodes mount the model at the same moment and read all of it, while something else
    /// happens. What the registry sent before is forgotten.
    pub(crate) fn load(&self, which: Range<usize>, meanwhile: impl FnOnce(&Self)) -> Vec<Load> {
        self.lab.proxy.forget();
        self.load_more(which, meanwhile)
    }

    /// The same, and what the registry sent before counts.
    pub(crate) fn load_more(
        &self,
        which: Range<usize>,
        meanwhile: impl FnOnce(&Self),
    ) -> Vec<Load> {
        let reference = self.lab.reference();
        thread::scope(|scope| {
            let loads: Vec<_> = self.nodes[which]
                .iter()
                .map(|node| scope.spawn(|| node.load(self.lab, &reference)))
                .collect();
            meanwhile(self);
            loads.into_iter().map(|load| load.join().expect("a load's end")).collect()
        })
    }

    /// Requests to the registry because peers did not answer or were busy.
    pub(crate) fn fallbacks(&self) -> u64 {
        self.nodes.iter().map(|node| node.peers()["fallbacks"].as_u64().unwrap()).sum()
    }

    /// Waits until so many bytes were read through these nodes.
    pub(crate) fn wait_read(&self, which: Range<usize>, bytes: u64) {
        let read = || self.nodes[which.clone()].iter().map(Node::bytes_read).sum::<u64>();
        self.wait_until("bytes were read", || read() >= bytes);
    }

    /// Waits for something that loads bring about.
    pub(crate) fn wait_until(&self, what: &str, condition: impl FnMut() -> bool) {
        let patience = Duration::from_secs_f64(PATIENCE * self.lab.options.ideal() + 20.0);
        assert!(holds_within(patience, condition), "waited {patience:?} in vain until {what}");
    }
}

/// The table `[peers]` of a node whose members are these.
pub(crate) fn peers(lab: &Lab, number: usize, members: &[usize]) -> String {
    let name = |number: &usize| format!("{}:{PORT}", lab.hosts[*number].address());
    let members: Vec<_> = members.iter().map(name).collect();
    let tls = lab.authority.config("peer");
    format!("[peers]\nlisten = {:?}\nmembers = {members:?}\n{tls}\n", name(&number))
}

impl Node {
    fn load(&self, lab: &Lab, reference: &str) -> Load {
        let start = Instant::now();
        let dir = self.mount(lab, reference);
        for file in &lab.model {
            self.read_file(&dir, file)?;
        }
        Ok(start.elapsed().as_secs_f64())
    }

    /// Mounts an artifact, and gives where.
    pub(crate) fn mount(&self, lab: &Lab, reference: &str) -> PathBuf {
        let dir = tempfile::Builder::new().prefix("mnt").tempdir_in(lab.area.path());
        let dir = dir.unwrap().keep();
        let mounted = self.weightfs.mount(&lab.area, reference, &dir);
        self.mounted.lock().unwrap().push(mounted);
        dir
    }

    fn read_file(&self, dir: &Path, file: &Expected) -> Result<(), String> {
        let failed = |error: io::Error| format!("{}: {error}", file.name);
        let reader =
            Counting { file: File::open(dir.join(&file.name)).map_err(failed)?, node: self };
        let found = digest::of_reader(reader).map_err(failed)?;
        assert_eq!(found, file.digest, "{} was read with wrong bytes", file.name);
        Ok(())
    }

    /// Bytes that were read through it.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Kills its daemon, as a crash would.
    pub(crate) fn kill(&self) {
        self.daemon.lock().unwrap().take().expect("it runs").kill();
    }

    /// What it knows of its peers.
    pub(crate) fn peers(&self) -> Value {
        serde_json::from_str(&self.weightfs.run_here(&["peers", "--json"]).ok()).unwrap()
    }
}

struct Counting<'a> {
    file: File,
    node: &'a Node,
}

impl Read for Counting<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(into)?;
        self.node.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        thread::scope(|scope| {
            for node in &self.nodes {
                scope.spawn(|| node.clear());
            }
        });
    }
}

impl Node {
    /// Ends what runs, and removes its state: disks are not endless.
    fn clear(&self) {
        let no_poison = "no load has panicked with it";
        self.mounted.lock().expect(no_poison).clear();
        drop(self.daemon.lock().expect(no_poison).take());
        let root = self.weightfs.root();
        let mount = root.join("mnt");
        if is_mount_point(&mount) {
            // Of a daemon that was killed.
            let _ = umount2(&mount, MntFlags::MNT_DETACH);
        }
        if !is_mount_point(&mount) {
            let _ = fs::remove_dir_all(root.parent().unwrap_or(&root));
        }
    }
}
