//! What every measurement works on: a model, and a registry that has it as a ModelPack and as an
//! image, directly and behind the throttle.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::unistd::sync;
use serde_json::{Map, json};
use weightfs_store::Digest;
use weightfs_tests::image::{busybox_layer, image};
use weightfs_tests::layer::{Attributes, Compression, LayerBuilder};
use weightfs_tests::model::write_safetensors;
use weightfs_tests::modelpack::{Dialect, Plan, pack};
use weightfs_tests::{Area, Blob, Mounted, Proxy, Registry, RegistryOptions, Weightfs};

use crate::Options;
use crate::download::Blobs;
use crate::read::{self, Sum};
use crate::throttle::Throttle;

/// Shards of the model.
pub(crate) const SHARDS: u64 = 4;

/// Where the weights are in the image.
pub(crate) const IN_IMAGE: &str = "models";

/// The two lines to the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Line {
    /// Loopback as it is.
    Direct,
    /// Through the throttle.
    Throttled,
}

impl Line {
    /// Both.
    pub(crate) const BOTH: [Self; 2] = [Self::Direct, Self::Throttled];

    /// As figures have it in their names.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Throttled => "throttled",
        }
    }
}

/// A model on disk, and what reading it must give.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) dir: PathBuf,
    /// Its shards, in order.
    pub(crate) shards: Vec<String>,
    pub(crate) bytes: u64,
    sums: Vec<Sum>,
}

impl Model {
    fn make(dir: &Path, shard_bytes: u64) -> Self {
        let mut map = Map::new();
        let mut shards = Vec::new();
        for number in 1..=SHARDS {
            let name = format!("model-{number:05}-of-{SHARDS:05}.safetensors");
            let tensors = write_safetensors(&dir.join(&name), shard_bytes, number).unwrap();
            map.extend(tensors.into_iter().map(|t| (format!("{number}.{}", t.name), json!(name))));
            shards.push(name);
        }
        let index = json!({ "metadata": {}, "weight_map": map }).to_string();
        fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
        fs::write(dir.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
        let dir = dir.to_owned();
        let mut model = Self { dir, shards, bytes: 0, sums: Vec::new() };
        let paths = model.below(&model.dir);
        model.bytes = paths.iter().map(|path| path.metadata().unwrap().len()).sum();
        model.sums = paths.iter().map(|path| read::sequential(path).unwrap()).collect();
        model
    }

    /// The shards' paths where the model is shown at `dir`.
    pub(crate) fn below(&self, dir: &Path) -> Vec<PathBuf> {
        self.shards.iter().map(|name| dir.join(name)).collect()
    }

    /// Its shards on disk.
    pub(crate) fn native(&self) -> Vec<PathBuf> {
        self.below(&self.dir)
    }

    /// Asserts that reading the shards gave what is on disk.
    pub(crate) fn assert_read(&self, sums: &[Sum]) {
        for ((name, expected), found) in self.shards.iter().zip(&self.sums).zip(sums) {
            assert!(expected == found, "{name} was read with wrong bytes");
        }
        assert_eq!(sums.len(), self.sums.len(), "shards were left out");
    }

    /// Reads the shards below `dir` one after the other, checks them and gives the time it took.
    pub(crate) fn timed(&self, dir: &Path, how: fn(&Path) -> std::io::Result<Sum>) -> Duration {
        let start = Instant::now();
        let sums: Vec<_> = self.below(dir).iter().map(|path| how(path).unwrap()).collect();
        let time = start.elapsed();
        self.assert_read(&sums);
        time
    }
}

/// The set-up of a run.
#[derive(Debug)]
pub(crate) struct Lab {
    pub(crate) model: Model,
    pub(crate) throttle: Throttle,
    /// Counts what the registry sends; adds no delay on purpose, but costs CPU.
    pub(crate) counter: Proxy,
    pub(crate) registry: Registry,
    /// The image's chain ID: the name of its snapshot.
    pub(crate) image_chain: Digest,
    raw_blobs: Vec<Blob>,
    /// The last field, so that it goes last.
    pub(crate) area: Area,
}

impl Lab {
    /// Makes the model and starts and fills the registry.
    pub(crate) fn new(options: &Options) -> Self {
        let area = Area::new();
        let model = Model::make(&area.dir("model"), options.shard_bytes);
        let store = area.dir("registry");
        let none: Option<&str> = None;
        mount(Some("tmpfs"), &store, Some("tmpfs"), MsFlags::empty(), none).expect("a tmpfs");
        let registry = Registry::start_in(&area, &store, RegistryOptions::default());
        let throttle = Throttle::start(registry.address());
        let counter = Proxy::start(registry.address());
        let others = ["config.json", "model.safetensors.index.json"].map(str::to_owned);
        let files: Vec<_> = others.into_iter().chain(model.shards.clone()).collect();
        let raw_blobs = push_model(&area, &registry, "model", &model.dir, &files).split_off(2);
        let image_chain = push_images(&area, &registry, &model);
        Self { model, throttle, counter, registry, image_chain, raw_blobs, area }
    }

    /// Pushes files as a ModelPack, a raw layer each, and gives their blobs.
    pub(crate) fn push_model(&self, repository: &str, dir: &Path, files: &[String]) -> Vec<Blob> {
        push_model(&self.area, &self.registry, repository, dir, files)
    }

    /// `host:port` of the registry on a line.
    pub(crate) fn address(&self, line: Line) -> String {
        match line {
            Line::Direct => self.registry.address().to_owned(),
            Line::Throttled => self.throttle.address(),
        }
    }

    /// A reference on a line.
    pub(crate) fn reference(&self, line: Line, repository: &str) -> String {
        format!("{}/{repository}:v1", self.address(line))
    }

    /// The shards' blobs on a line.
    pub(crate) fn blobs(&self, line: Line) -> Blobs {
        Blobs::new(&self.address(line), "model", &self.raw_blobs)
    }

    /// Mounts an artifact with a fresh cache, gives what `measure` gives, and clears all away.
    pub(crate) fn with_mount<T>(
        &self,
        reference: &str,
        measure: impl FnOnce(&Mounted, Instant) -> T,
    ) -> T {
        let fresh = self.fresh();
        let point = self.mount_point();
        drop_caches();
        let start = Instant::now();
        let mounted = fresh.weightfs.mount(&self.area, reference, point.path());
        let value = measure(&mounted, start);
        mounted.stop();
        value
    }

    /// A fresh state directory.
    pub(crate) fn fresh(&self) -> Fresh {
        Fresh { weightfs: Weightfs::new(&self.area) }
    }

    /// An empty directory to mount on.
    pub(crate) fn mount_point(&self) -> tempfile::TempDir {
        tempfile::Builder::new().prefix("mnt").tempdir_in(self.area.path()).unwrap()
    }
}

fn push_model(
    area: &Area,
    registry: &Registry,
    repository: &str,
    dir: &Path,
    files: &[String],
) -> Vec<Blob> {
    let plans: Vec<_> = files.iter().cloned().map(Plan::Raw).collect();
    let artifact = pack(dir, &area.dir("work"), Dialect::Cncf, &plans);
    artifact.push(registry.remote(), repository, "v1");
    artifact.blobs[1..].to_vec()
}

/// Pushes the weights as one plain-tar layer below a small root file system, and the latter alone;
/// gives the chain ID of the former (image-spec, "Layer ChainID").
fn push_images(area: &Area, registry: &Registry, model: &Model) -> Digest {
    let work = area.dir("work");
    let mut weights = LayerBuilder::new(&work).dir(IN_IMAGE, &Attributes::mode(0o755));
    for (name, source) in model.shards.iter().zip(model.native()) {
        let path = format!("{IN_IMAGE}/{name}");
        weights = weights.file_from(&path, &source, &Attributes::mode(0o644));
    }
    let weights = weights.finish(Compression::Plain);
    let small = busybox_layer(&work, Compression::Gzip);
    let chain = Digest::of(format!("{} {}", weights.diff_id, small.diff_id).as_bytes());
    image(&[weights, small.clone()]).push(registry.remote(), "image", "v1");
    image(&[small]).push(registry.remote(), "small", "v1");
    fs::remove_dir_all(&work).unwrap();
    chain
}

/// A state directory that goes with this guard: disks are not endless.
#[derive(Debug)]
pub(crate) struct Fresh {
    pub(crate) weightfs: Weightfs,
}

impl Drop for Fresh {
    fn drop(&mut self) {
        let root = self.weightfs.root();
        // A daemon that died leaves its mount: nothing is deleted through one.
        if !weightfs_tests::area::is_mount_point(&root.join("mnt")) {
            let _ = fs::remove_dir_all(root.parent().unwrap_or(&root));
        }
    }
}

/// Writes dirty pages and drops the page cache, for whoever is measured next.
pub(crate) fn drop_caches() {
    sync();
    fs::write("/proc/sys/vm/drop_caches", "3").expect("the page cache is dropped, as root");
}

/// 10⁶ bytes per second.
pub(crate) fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64()
}
