//! What most tests start from: a registry, the counting proxy before it, and a state directory.

use std::path::{Path, PathBuf};

use crate::area::Area;
use crate::model::{self, Part};
use crate::modelpack::{Dialect, Plan, pack, raw_plan};
use crate::process::Outcome;
use crate::proxy::Proxy;
use crate::registry::{Registry, RegistryOptions};
use crate::remote::Artifact;
use crate::weightfs::{Mounted, Weightfs};

/// A registry behind a proxy, and WeightFS with a fresh state directory.
#[derive(Debug)]
pub struct Bed {
    /// The program under test.
    pub weightfs: Weightfs,
    /// What it talks to.
    pub proxy: Proxy,
    /// What the tests push to.
    pub registry: Registry,
    /// Where everything is. The last field, so that it goes last.
    pub area: Area,
}

impl Bed {
    /// Starts the parts.
    pub fn new() -> Self {
        Self::with_registry(RegistryOptions::default())
    }

    /// Starts the parts with another registry.
    pub fn with_registry(options: RegistryOptions) -> Self {
        let area = Area::new();
        let registry = Registry::start_with(&area, options);
        let proxy = Proxy::start(registry.address());
        let weightfs = Weightfs::new(&area);
        Self { weightfs, proxy, registry, area }
    }

    /// A directory with the files of a made-up model.
    pub fn model(&self, parts: &[Part]) -> PathBuf {
        let dir = tempfile::Builder::new().prefix("m").tempdir_in(self.area.path()).unwrap().keep();
        model::make(&dir, parts);
        dir
    }

    /// Packs a model, one raw layer a file.
    pub fn pack_raw(&self, dir: &Path, dialect: Dialect) -> Artifact {
        self.pack(dir, dialect, &raw_plan(dir))
    }

    /// Packs a model.
    pub fn pack(&self, dir: &Path, dialect: Dialect, plans: &[Plan]) -> Artifact {
        pack(dir, self.area.path(), dialect, plans)
    }

    /// Pushes an artifact and gives its reference through the proxy, with nothing counted yet.
    pub fn push(&self, artifact: &Artifact, repository: &str) -> String {
        artifact.push(self.registry.remote(), repository, "v1");
        self.proxy.reference(repository, "v1")
    }

    /// A fresh mount point.
    pub fn mount_point(&self) -> PathBuf {
        tempfile::Builder::new().prefix("mnt").tempdir_in(self.area.path()).unwrap().keep()
    }

    /// Mounts an artifact at a fresh mount point.
    pub fn mount(&self, reference: &str) -> Mounted {
        self.weightfs.mount(&self.area, reference, &self.mount_point())
    }

    /// Mounts an artifact beside others: a state directory has one owner.
    pub fn mount_with_other_root(&self, reference: &str) -> Mounted {
        Weightfs::new(&self.area).mount(&self.area, reference, &self.mount_point())
    }

    /// Asserts that the artifact can't be mounted, that the message has each of `texts`, and that
    /// nothing is left of the attempt.
    pub fn assert_refused(&self, reference: &str, texts: &[&str]) -> Outcome {
        let dir = self.mount_point();
        let outcome = self.weightfs.mount_fails(reference, &dir);
        self.assert_clean_failure(&outcome, texts);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0, "left in the mount point");
        outcome
    }

    /// Asserts that a command failed with a message that has each of `texts`, and that nothing is
    /// mounted.
    pub fn assert_clean_failure(&self, outcome: &Outcome, texts: &[&str]) {
        outcome.assert_fails(1, texts);
        assert!(outcome.stderr.contains("weightfs: "), "{outcome}");
        assert!(!outcome.stderr.contains("panicked"), "{outcome}");
        self.area.assert_no_mounts();
    }
}

impl Default for Bed {
    fn default() -> Self {
        Self::new()
    }
}
