//! Which layers are lazy and which are not: one line in the log for each, and how many of each
//! kind there were.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use tracing::info;

use super::Labels;
use super::layer::{IMAGE_REF, LAYER_DIGEST};
use crate::reason::{LAZY, Reason};

/// Decisions since this process began. What became of the layers that are here is in their records.
#[derive(Debug, Default)]
pub struct Decisions(Mutex<BTreeMap<&'static str, u64>>);

impl Decisions {
    /// How many layers were mounted lazily (`lazy`), or not for each kind of reason.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A layer is mounted lazily.
    pub(super) fn lazy(&self, snapshot: &str, labels: &Labels) {
        let (layer, image) = named(labels);
        info!(layer, image, snapshot, "layer is mounted lazily");
        self.count(LAZY);
    }

    /// containerd downloads a layer and unpacks it.
    pub(super) fn ordinary(&self, snapshot: &str, labels: &Labels, reason: &Reason) {
        let (layer, image) = named(labels);
        let kind = reason.kind();
        info!(layer, image, snapshot, kind, %reason, "layer is pulled");
        self.count(kind);
    }

    fn count(&self, kind: &'static str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(kind).or_default() += 1;
    }
}

fn named(labels: &Labels) -> (&str, &str) {
    let label = |name| labels.get(name).map_or("unknown", String::as_str);
    (label(LAYER_DIGEST), label(IMAGE_REF))
}
