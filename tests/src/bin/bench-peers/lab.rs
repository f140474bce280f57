//! What everything is measured on: hosts on a bridge, a registry, and a model in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use weightfs_store::Digest;
use weightfs_tests::certificates::PeerAuthority;
use weightfs_tests::digest;
use weightfs_tests::model::{write_noise, write_safetensors};
use weightfs_tests::modelpack::{Dialect, pack, raw_plan};
use weightfs_tests::{Area, Megabits, NetHost, Network, Proxy, Registry, Target, Weightfs};

use crate::{Options, REGISTRY_LINKS};

/// Files of the model.
const SHARDS: u64 = 4;

/// Where the registry listens on its host.
const PORT: u16 = 5000;

/// A file, and what reading it must give.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    pub(crate) name: String,
    pub(crate) digest: Digest,
    pub(crate) bytes: u64,
}

/// The set-up of a run.
#[derive(Debug)]
pub(crate) struct Lab {
    pub(crate) options: Options,
    /// One for each node.
    pub(crate) hosts: Vec<Arc<NetHost>>,
    pub(crate) authority: PeerAuthority,
    pub(crate) model: Vec<Expected>,
    /// What the nodes talk to: counts what the registry sends.
    pub(crate) proxy: Proxy,
    registry: Registry,
    pub(crate) registry_host: NetHost,
    _network: Network,
    /// The last field, so that it goes last.
    pub(crate) area: Area,
}

impl Lab {
    /// Sets all up, and pushes the model with its index.
    pub(crate) fn new(options: &Options) -> Self {
        let area = Area::new();
        let authority = PeerAuthority::make(&area.dir("certificates"), "ca");
        authority.certify("peer", 2);
        let registry = Registry::start(&area);
        let shard = options.model_bytes / SHARDS;
        let dir = area.dir("model");
        for number in 1..=SHARDS {
            let name = format!("model-{number:05}-of-{SHARDS:05}.safetensors");
            write_safetensors(&dir.join(name), shard, number).unwrap();
        }
        push(&area, &registry, &dir, "model");
        let reference = registry.remote().reference("model", "v1");
        Weightfs::new(&area).run(["index", &reference]).ok();
        let model = expected(&dir);
        let network = Network::new(&area);
        let registry_host = network.join(Megabits(options.link.0 * REGISTRY_LINKS));
        let address = format!("{}:{PORT}", registry_host.address());
        let proxy = registry_host.run(|| Proxy::start_at(&address, registry.address()));
        let hosts = (0..options.nodes).map(|_| Arc::new(network.join(options.link))).collect();
        Self {
            options: options.clone(),
            hosts,
            authority,
            model,
            proxy,
            registry,
            registry_host,
            _network: network,
            area,
        }
    }

    /// `host:port` of the registry, as the nodes see it.
    pub(crate) fn registry(&self) -> String {
        self.proxy.address()
    }

    /// The model's reference.
    pub(crate) fn reference(&self) -> String {
        self.proxy.reference("model", "v1")
    }

    /// Pushes so many files of a chunk, without an index; gives their names and their reference.
    pub(crate) fn push_small_files(&self, count: usize) -> (Vec<String>, String) {
        let dir = self.area.dir("small");
        let names: Vec<_> = (0..count).map(|number| format!("part-{number:03}.dat")).collect();
        for (seed, name) in (1..).zip(&names) {
            let mut file = fs::File::create(dir.join(name)).unwrap();
            write_noise(&mut file, weightfs_store::CHUNK_BYTES, seed).unwrap();
        }
        push(&self.area, &self.registry, &dir, "small");
        (names, self.proxy.reference("small", "v1"))
    }

    pub(crate) fn model_bytes(&self) -> u64 {
        self.model.iter().map(|file| file.bytes).sum()
    }

    /// Bytes of blobs that the registry sent since it was forgotten, in models.
    pub(crate) fn egress(&self) -> f64 {
        self.proxy.bytes(Target::Blobs) as f64 / self.model_bytes() as f64
    }
}

fn push(area: &Area, registry: &Registry, dir: &Path, repository: &str) {
    let work: PathBuf = area.dir("work");
    pack(dir, &work, Dialect::Cncf, &raw_plan(dir)).push(registry.remote(), repository, "v1");
    fs::remove_dir_all(work).unwrap();
}

fn expected(dir: &Path) -> Vec<Expected> {
    let names = weightfs_tests::modelpack::files_of(dir);
    let files = names.into_iter().map(|name| {
        let path = dir.join(&name);
        let (digest, bytes) = (digest::of_file(&path).unwrap(), path.metadata().unwrap().len());
        Expected { name, digest, bytes }
    });
    files.collect()
}
