//! A node with many lazy snapshots and many models.

use std::path::PathBuf;

use tonic::Code;

use crate::bed::Bed;
use crate::digest;
use crate::host::{Host, SNAPSHOTTER};
use crate::model::{Part, noise};
use crate::modelpack::Dialect;
use crate::process::run;
use crate::snapshots::{Snapshots, labels};

/// What was put there.
#[derive(Debug)]
pub struct Many {
    /// A client of the daemon.
    pub snapshots: Snapshots,
    /// Where the models are mounted. Each has a file `w` of 4 KiB.
    pub models: Vec<PathBuf>,
}

impl Many {
    /// Prepares lazy snapshots of one layer, as containerd does, and mounts models.
    pub fn new(host: &Host, snapshots: usize, models: usize) -> Self {
        let client = Snapshots::connect(&host.bed.weightfs.snapshotter_socket(), SNAPSHOTTER);
        let layer = host.weights_layer(&host.bed.area.file("w", noise(9 << 20, 1)), "weights");
        let (reference, image) = host.push_image_below("images/many", std::slice::from_ref(&layer));
        let manifest = digest::of_reader(image.manifest.to_string().as_bytes()).unwrap();
        for number in 0..snapshots {
            let labels = labels(&[
                ("containerd.io/snapshot.ref", &format!("sha256:{number:064x}")),
                ("containerd.io/snapshot/cri.image-ref", &reference),
                ("containerd.io/snapshot/cri.manifest-digest", &manifest.to_string()),
                ("containerd.io/snapshot/cri.layer-digest", &layer.blob.digest.to_string()),
            ]);
            let refused = client.prepare_with(&format!("key {number}"), "", labels).unwrap_err();
            assert_eq!(refused.code(), Code::AlreadyExists, "{refused}");
        }
        let model = |number| {
            let source = host.bed.model(&[Part { path: "w", bytes: 4096, mode: 0o644 }]);
            let artifact = host.bed.pack_raw(&source, Dialect::Cncf);
            let reference = host.bed.push(&artifact, &format!("models/many{number}"));
            mount_in_background(&host.bed, &reference)
        };
        Self { snapshots: client, models: (0..models).map(model).collect() }
    }
}

/// Mounts through the daemon, in the background.
pub fn mount_in_background(bed: &Bed, reference: &str) -> PathBuf {
    let dir = bed.mount_point();
    let mut command = bed.weightfs.command(["mount", "--daemon", reference]);
    command.arg(&dir).arg("--root").arg(bed.weightfs.root());
    run(command.arg("--config").arg(bed.weightfs.config())).ok();
    dir
}
