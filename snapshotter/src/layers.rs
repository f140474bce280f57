//! The layers of images as `weightfs status` shows them: which are lazy, why others are not, and
//! how much of each is here.

use std::collections::HashMap;
use std::sync::Arc;

use weightfs_proto::control::Layer;
use weightfs_store::Reference;

use crate::metadata::{Backing, Index, Metadata, Record};
use crate::reason::LAZY;
use crate::snapshots::layer::{IMAGE_REF, LAYER_DIGEST, MANIFEST_DIGEST};
use crate::trees::{Trees, trust_name};

/// All layers: images one after the other, of each the lowest layer first.
pub fn all(metadata: &Metadata, trees: &Trees) -> Vec<Layer> {
    let index = metadata.index();
    sorted(&index, index.records().cloned().collect(), trees)
}

/// The layers of a snapshot or of an image, those that it shares with others included; none if
/// there is no such thing.
///
/// A snapshot is named by the whole key, or by what containerd's own tools show: the key without
/// the namespace and the number before it.
pub fn of(metadata: &Metadata, trees: &Trees, subject: &str) -> Vec<Layer> {
    let image: Option<Reference> = subject.parse().ok();
    let suffix = format!("/{subject}");
    let is_named = |record: &Arc<Record>| {
        let name = &record.info.name;
        name == subject
            || name.ends_with(&suffix)
            || is_image(label(record, IMAGE_REF), subject, image.as_ref())
    };
    let index = metadata.index();
    let mut found: HashMap<String, Arc<Record>> = HashMap::new();
    for record in index.records().filter(|record| is_named(record)) {
        let chain = std::iter::once(Arc::clone(record)).chain(index.ancestors(record));
        found.extend(chain.map(|record| (record.info.name.clone(), record)));
    }
    sorted(&index, found.into_values().collect(), trees)
}

/// `docker.io/library/x:latest` is known as `x`, too.
fn is_image(named: &str, subject: &str, image: Option<&Reference>) -> bool {
    if named == subject {
        return true;
    }
    let named: Option<Reference> = named.parse().ok();
    matches!((named, image), (Some(named), Some(image)) if named.whole() == image.whole())
}

fn sorted(index: &Index, records: Vec<Arc<Record>>, trees: &Trees) -> Vec<Layer> {
    let mut layers: Vec<(usize, Layer)> = records
        .iter()
        .filter_map(|record| Some((index.ancestors(record).len(), layer(record, trees)?)))
        .collect();
    layers.sort_by(|(a_depth, a), (b_depth, b)| {
        (&a.image, a_depth, &a.snapshot).cmp(&(&b.image, b_depth, &b.snapshot))
    });
    layers.into_iter().map(|(_, layer)| layer).collect()
}

/// What is said of a layer; `None` for a container or a view.
fn layer(record: &Record, trees: &Trees) -> Option<Layer> {
    let named = Layer {
        snapshot: record.info.name.clone(),
        parent: record.info.parent.clone().unwrap_or_default(),
        image: label(record, IMAGE_REF).to_owned(),
        // A whole artifact is known by its manifest.
        digest: [LAYER_DIGEST, MANIFEST_DIGEST]
            .map(|name| label(record, name))
            .into_iter()
            .find(|digest| !digest.is_empty())
            .unwrap_or_default()
            .to_owned(),
        ..Layer::default()
    };
    match &record.backing {
        Backing::Lazy { tree, .. } => {
            let lazy = Layer { mode: LAZY.to_owned(), ..named };
            Some(match trees.get(*tree).map(|tree| tree.own_stats()) {
                None => lazy,
                Some(own) => Layer {
                    size: own.size,
                    cached: own.cached,
                    fetched: own.fetched,
                    rejected: own.rejected,
                    trust: trust_name(own.trust).to_owned(),
                    ..lazy
                },
            })
        }
        Backing::Directory { reason: Some(reason), usage, .. } => Some(Layer {
            mode: reason.kind().to_owned(),
            reason: reason.to_string(),
            size: usage.bytes,
            cached: usage.bytes,
            ..named
        }),
        Backing::Directory { reason: None, .. } => None,
    }
}

fn label<'a>(record: &'a Record, name: &str) -> &'a str {
    record.info.labels.get(name).map_or("", String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_known_by_its_short_name_too() {
        let whole = "docker.io/library/busybox:latest";
        let is = |subject: &str| is_image(whole, subject, subject.parse().ok().as_ref());
        assert!(is(whole) && is("busybox") && is("busybox:latest"));
        assert!(!is("busybox:1") && !is("other"));
        assert!(!is_image("", "busybox", "busybox".parse().ok().as_ref()), "no label");
    }
}
