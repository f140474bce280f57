//! Traces by OTLP: a read that missed leads to the range that was fetched for it.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use weightfs_tests::collector::{Collector, Span};
use weightfs_tests::model::Part;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::{Bed, Weightfs, wait_until};

const MODEL: &[Part] = &[Part { path: "model.safetensors", bytes: 40 << 20, mode: 0o644 }];

/// The spans from one up to the root of its tree.
fn up<'a>(spans: &'a [Span], from: &'a Span) -> Vec<&'a Span> {
    let above = |span: &&'a Span| {
        let parent = |it: &&'a Span| it.trace == span.trace && it.id == span.parent;
        spans.iter().find(parent)
    };
    std::iter::successors(Some(from), above).collect()
}

/// The spans from a range up to the miss that it was fetched for.
fn tree_of_a_miss(spans: &[Span]) -> Option<Vec<&Span>> {
    let ranges = spans.iter().filter(|span| span.name == "range");
    ranges.map(|range| up(spans, range)).find(|up| up.last().is_some_and(|it| it.name == "miss"))
}

#[test]
fn a_read_that_missed_leads_to_the_range_that_filled_it() {
    let collector = Collector::start();
    let bed = Bed::new();
    let artifact = bed.pack_raw(&bed.model(MODEL), Dialect::Cncf);
    let reference = bed.push(&artifact, "models/traced");
    let weightfs = Weightfs::new(&bed.area)
        .with_variable("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.endpoint())
        .with_variable("OTEL_BSP_SCHEDULE_DELAY", "50");
    let mounted = weightfs.mount(&bed.area, &reference, &bed.mount_point());
    if mounted.log().contains("built without the feature `otlp`") {
        println!("left out: target/debug/weightfs has no traces (--features weightfs/otlp)");
        return mounted.stop();
    }
    let file = mounted.dir().join("model.safetensors");
    let inode = fs::metadata(&file).unwrap().ino().to_string();
    fs::read(&file).unwrap();
    let blob = artifact.layer_digest(0).to_string();
    let mut spans = vec![];
    wait_until("a range and the miss that it was fetched for", || {
        spans = collector.spans();
        tree_of_a_miss(&spans).is_some()
    });
    let tree = tree_of_a_miss(&spans).unwrap();
    let names: Vec<_> = tree.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(names, ["range", "request", "miss"]);
    let [range, _, miss] = tree[..] else { unreachable!("three names") };
    assert_eq!((&range.attributes["blob"], &miss.attributes["inode"]), (&blob, &inode));
    let number = |span: &Span, name: &str| span.attributes[name].parse::<u64>().unwrap();
    assert!(number(range, "start") < number(range, "end") && number(range, "end") <= 40 << 20);
    assert!(miss.parent.is_empty() && number(miss, "offset") < 40 << 20, "{miss:?}");
    mounted.stop();
}
