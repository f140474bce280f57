//! A registry, a WeightFS daemon and a containerd that uses it.

use std::path::Path;

use crate::area::Area;
use crate::bed::Bed;
use crate::containerd::{Containerd, ContainerdOptions, CriOptions, UserNamespaces, Version};
use crate::image::{busybox_layer, image};
use crate::layer::{Attributes, Compression, Layer, LayerBuilder};
use crate::proxy::Target;
use crate::remote::Artifact;
use crate::tree::{self, Scope};
use crate::weightfs::Daemon;

/// Name of the snapshotter in containerd.
pub const SNAPSHOTTER: &str = "weightfs";

/// A node with everything on it.
#[derive(Debug)]
pub struct Host {
    /// containerd, with the daemon plugged in. The first field, so that it goes first.
    pub containerd: Containerd,
    /// The daemon.
    pub daemon: Daemon,
    /// The rest.
    pub bed: Bed,
}

impl Host {
    /// Starts everything, without CRI.
    pub fn new() -> Self {
        Self::on(Version::Installed)
    }

    /// Starts everything around that containerd, without CRI.
    pub fn on(version: Version) -> Self {
        let bed = Bed::new();
        let daemon = bed.weightfs.serve(&bed.area);
        Self::start(bed, daemon, None, version)
    }

    /// Starts everything, with a keeper and without CRI.
    pub fn with_keeper() -> Self {
        let bed = Bed::new();
        let daemon = bed.weightfs.serve_kept(&bed.area);
        Self::beside(bed, daemon)
    }

    /// Starts everything, with CRI on the snapshotter. The sandbox image is the small one.
    pub fn with_cri() -> Self {
        Self::with_cri_on(Version::Installed)
    }

    /// Starts everything around that containerd, with CRI.
    pub fn with_cri_on(version: Version) -> Self {
        let bed = Bed::new();
        let daemon = bed.weightfs.serve(&bed.area);
        let cri = cri(&bed);
        Self::start(bed, daemon, Some(cri), version)
    }

    /// Starts everything, with a keeper and with CRI.
    pub fn with_keeper_and_cri() -> Self {
        Self::with_keeper_and_cri_on(Version::Installed)
    }

    /// Starts everything around that containerd, with a keeper and with CRI.
    pub fn with_keeper_and_cri_on(version: Version) -> Self {
        let bed = Bed::new();
        let daemon = bed.weightfs.serve_kept(&bed.area);
        let cri = cri(&bed);
        Self::start(bed, daemon, Some(cri), version)
    }

    /// Starts everything around containerd 2.1, with CRI, for pods with user namespaces.
    pub fn with_user_namespaces(parts: impl FnOnce(&Area) -> UserNamespaces) -> Self {
        let bed = Bed::new();
        let daemon = bed.weightfs.serve(&bed.area);
        let cri = CriOptions { user_namespaces: Some(parts(&bed.area)), ..cri(&bed) };
        Self::start(bed, daemon, Some(cri), Version::V21)
    }

    /// Starts containerd beside a daemon, without CRI.
    pub fn beside(bed: Bed, daemon: Daemon) -> Self {
        Self::start(bed, daemon, None, Version::Installed)
    }

    /// Starts that containerd, with CRI, beside a daemon.
    pub fn with_cri_beside(bed: Bed, daemon: Daemon, version: Version) -> Self {
        let cri = cri(&bed);
        Self::start(bed, daemon, Some(cri), version)
    }

    fn start(bed: Bed, daemon: Daemon, cri: Option<CriOptions>, version: Version) -> Self {
        let weightfs = Some(bed.weightfs.snapshotter_socket());
        let options = ContainerdOptions { weightfs, cri, version, ..ContainerdOptions::default() };
        let containerd = Containerd::start(&bed.area, &options);
        Self { containerd, daemon, bed }
    }

    /// Pulls an image lazily into containerd.
    pub fn rpull(&self, reference: &str) -> String {
        self.bed.weightfs.rpull(&self.containerd.socket(), reference).ok()
    }

    /// An image of busybox and these layers above it, pushed; its reference through the proxy.
    pub fn push_image(&self, repository: &str, layers: &[Layer]) -> (String, Artifact) {
        let mut all = vec![busybox_layer(self.bed.area.path(), Compression::Gzip)];
        all.extend_from_slice(layers);
        let image = image(&all);
        (self.bed.push(&image, repository), image)
    }

    /// An image whose lowest layers are these, with busybox above them.
    pub fn push_image_below(&self, repository: &str, layers: &[Layer]) -> (String, Artifact) {
        let mut all = layers.to_vec();
        all.push(busybox_layer(self.bed.area.path(), Compression::Gzip));
        let image = image(&all);
        (self.bed.push(&image, repository), image)
    }

    /// A plain-tar layer with one file below `/models`.
    pub fn weights_layer(&self, source: &Path, name: &str) -> Layer {
        LayerBuilder::new(self.bed.area.path())
            .dir("models", &Attributes::mode(0o755))
            .file_from(
                &format!("models/{name}"),
                source,
                &Attributes::mode(0o644).at(1_600_000_000, 7),
            )
            .finish(Compression::Plain)
    }

    /// Bytes sent of a layer.
    pub fn fetched(&self, layer: &Layer) -> u64 {
        self.bed.proxy.bytes(Target::Blob(layer.blob.digest))
    }

    /// Asserts that a running container's root file system is what containerd itself unpacks.
    pub fn assert_like_an_ordinary_unpack(&self, repository: &str, root: &Path) {
        let reference = self.bed.registry.remote().reference(repository, "v1");
        self.containerd.pull(&reference);
        let ordinary = self.containerd.start_container("overlayfs", &reference, "ordinary");
        tree::assert_same(&ordinary.root(), root, Scope::Image);
        ordinary.remove();
        self.containerd.remove_image(&reference);
    }

    /// Asserts that neither containerd nor the daemon holds anything any more, and stops them.
    pub fn assert_nothing_left(self) {
        let Self { containerd, daemon, bed } = self;
        crate::wait_until("the snapshots are gone", || {
            containerd.snapshots(SNAPSHOTTER).is_empty()
        });
        assert!(containerd.ctr(&["image", "ls", "-q"]).ok().is_empty());
        assert!(containerd.content("default").is_empty());
        assert!(containerd.ctr(&["leases", "ls", "-q"]).ok().is_empty());
        drop(containerd);
        daemon.stop();
        bed.area.assert_no_mounts();
    }
}

fn cri(bed: &Bed) -> CriOptions {
    let small = image(&[busybox_layer(bed.area.path(), Compression::Plain)]);
    let sandbox_image = bed.push(&small, "small");
    CriOptions { snapshotter: SNAPSHOTTER, sandbox_image, user_namespaces: None }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}
